//! The proxies that nodes have on localhost, as kubespray configures them, but for their logs of every connection.

use std::{fmt::Write as _, fs, net::SocketAddr, path::Path};

use anyhow::Result;

use crate::{
    cluster::Cluster,
    lab::{Process, cgroup::Group},
};

/// Where Debian has nginx's `stream`; elsewhere it is in the program.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// HAProxy on the load balancer's host, which is the node, in `group`.
pub(super) fn haproxy(
    cluster: &Cluster,
    group: &Group,
    listen: SocketAddr,
    servers: &[SocketAddr],
) -> Result<Process> {
    let mut config = format!(
        "global\n  maxconn 4000\n  log stdout format iso local0 notice\n\
         defaults\n  \
           log global\n  mode tcp\n  option redispatch\n  retries 5\n  \
           timeout queue 5m\n  timeout connect 30s\n  timeout client 5m\n  timeout server 15m\n  \
           timeout check 30s\n  maxconn 4000\n\
         frontend kube_api_frontend\n  bind {listen}\n  default_backend kube_api_backend\n\
         backend kube_api_backend\n  \
           balance leastconn\n  \
           default-server inter 15s downinter 15s rise 2 fall 2 maxconn 1000 maxqueue 256 weight 100\n  \
           option httpchk GET /healthz\n  http-check expect status 200\n"
    );
    for (number, server) in servers.iter().enumerate() {
        writeln!(config, "  server api-{number} {server} check check-ssl verify none")?;
    }
    let file = cluster.lab.directory().join("node-haproxy.cfg");
    fs::write(&file, config)?;
    let mut command = group.command(&cluster.lb, "haproxy");
    command.arg("-db").arg("-f").arg(file);
    cluster.lb.start("node-haproxy", command)
}

/// nginx with its module `stream`, on the node, in `group`.
pub(super) fn nginx(
    cluster: &Cluster,
    group: &Group,
    listen: SocketAddr,
    servers: &[SocketAddr],
) -> Result<Process> {
    let load = if Path::new(STREAM_MODULE).exists() {
        format!("load_module {STREAM_MODULE};\n")
    } else {
        String::new()
    };
    let mut upstream = String::new();
    for server in servers {
        writeln!(upstream, "    server {server};")?;
    }
    let file = cluster.lab.directory().join("node-nginx.conf");
    let config = format!(
        "{load}daemon off;\npid {};\nerror_log stderr notice;\n\
         worker_processes 2;\nworker_rlimit_nofile 130048;\n\
         events {{\n  multi_accept on;\n  use epoll;\n  worker_connections 16384;\n}}\n\
         stream {{\n  \
           upstream kube_apiserver {{\n    least_conn;\n{upstream}  }}\n  \
           server {{\n    listen {listen};\n    proxy_pass kube_apiserver;\n    \
             proxy_timeout 10m;\n    proxy_connect_timeout 1s;\n  }}\n}}\n",
        file.with_extension("pid").display()
    );
    fs::write(&file, config)?;
    let mut command = group.command(&cluster.lb, "nginx");
    command.args(["-e", "stderr", "-c"]).arg(file);
    cluster.lb.start("node-nginx", command)
}
