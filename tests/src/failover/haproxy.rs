//! An HAProxy as people have it in front of their apiservers.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, ensure};

use crate::{
    cluster::{Apiserver, Cluster},
    lab::{Process, eventually},
    stub::PORT,
};

/// Until it listens and its checks have passed.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// HAProxy on the load balancer. Dropping it kills it.
#[derive(Debug)]
pub(super) struct HaProxy {
    process: Process,
    /// Those that still serve connections which a reload has left to them.
    former: Vec<Process>,
    directory: PathBuf,
}

impl HaProxy {
    /// Starts it in front of the apiservers for which `wanted` holds.
    pub(super) fn start(cluster: &Cluster, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let directory = cluster.lab.directory().to_owned();
        write_config(cluster, &directory, wanted)?;
        let process = cluster.lb.start("haproxy", command(cluster, &directory))?;
        Ok(Self { process, former: Vec::new(), directory })
    }

    /// Its hitless reload: a new process is given the listening sockets of the old one, which goes when its last
    /// connection does.
    pub(super) fn reload(&mut self, cluster: &Cluster, wanted: impl Fn(&str) -> bool) -> Result<()> {
        write_config(cluster, &self.directory, wanted)?;
        let mut command = command(cluster, &self.directory);
        command.arg("-x").arg(socket(&self.directory)).arg("-sf").arg(self.process.pid().to_string());
        let new = cluster.lb.start("haproxy", command)?;
        self.former.push(std::mem::replace(&mut self.process, new));
        Ok(())
    }

    /// Ends it as a crash would.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Waits until the checks of so many servers have passed.
    pub(super) fn wait_ready(&self, servers: usize) -> Result<()> {
        eventually(READY_LIMIT, &format!("{servers} servers are UP"), || {
            let statistics = self.statistics()?;
            let passed = |line: &&str| line.contains(",UP,") && line.contains(",L7OK,");
            let passed = statistics.lines().filter(passed).count();
            ensure!(passed == servers, "{passed} are:\n{statistics}");
            Ok(())
        })
    }

    fn statistics(&self) -> Result<String> {
        let mut stream = UnixStream::connect(socket(&self.directory))?;
        stream.write_all(b"show stat\n")?;
        let mut statistics = String::new();
        stream.read_to_string(&mut statistics)?;
        Ok(statistics)
    }

    /// What it has logged.
    pub(super) fn log(&self) -> String {
        self.process.log()
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("haproxy.sock")
}

fn command(cluster: &Cluster, directory: &Path) -> Command {
    let mut command = cluster.lb.command("haproxy");
    command.arg("-db").arg("-f").arg(directory.join("haproxy.cfg"));
    command
}

/// kubeadm's, with the timeouts that people give it for the sake of watches, and checks as fast as is usual.
fn write_config(cluster: &Cluster, directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let mut servers = String::new();
    for Apiserver { host, .. } in cluster.apiservers.iter().filter(|apiserver| wanted(apiserver.host.name()))
    {
        let address = SocketAddr::new(host.address(cluster.vip4)?, PORT);
        servers += &format!("  server {} {address} check verify none\n", host.name());
    }
    let config = format!(
        "global\n  \
           log stdout format iso local0 notice\n  \
           maxconn 4000\n  \
           stats socket {} mode 600 level admin expose-fd listeners\n\
         defaults\n  \
           log global\n  mode tcp\n  option redispatch\n  retries 1\n  \
           timeout connect 5s\n  timeout client 3h\n  timeout server 3h\n  timeout check 10s\n\
         frontend apiserver\n  \
           bind {}:{PORT}\n  default_backend kube-apiserver\n\
         backend kube-apiserver\n  \
           option httpchk\n  http-check connect ssl\n  http-check send meth GET uri /readyz\n  \
           http-check expect status 200\n  balance roundrobin\n  \
           default-server inter 1s fall 2 rise 2 on-marked-down shutdown-sessions\n{servers}",
        socket(directory).display(),
        cluster.vip4,
    );
    fs::write(directory.join("haproxy.cfg"), config)?;
    Ok(())
}
