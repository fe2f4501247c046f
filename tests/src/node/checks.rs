//! What a check costs an apiserver, and so what thousands of nodes do.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{
    figures::Spread,
    worker::{Load, Order, Worker},
};
use crate::{
    aligned::aligned,
    cluster::Cluster,
    lab::{Process, cgroup::Group, eventually, process::sibling_program},
    stub::PORT,
};

/// What 5,000 nodes send to each apiserver every 10 s: 500 a second.
const PAUSE: Duration = Duration::from_millis(2);
const NODES: f64 = 5000.0;
/// One of so many checks is on a fresh connection (`docs/health.md`).
const FRESH_ONE_IN: f64 = 5.0;
/// `interval` where every listener is on loopback, and what it may be stretched to.
const INTERVALS: [f64; 2] = [10.0, 30.0];
const NGINX_PORT: u16 = 7443;
const START_LIMIT: Duration = Duration::from_secs(20);

/// What checks cost one server.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cost {
    server: &'static str,
    /// Processor time of a check with its own TCP and TLS handshakes, in microseconds.
    fresh: Spread,
    /// Of one on a connection that was there, in microseconds.
    reused: Spread,
    /// Percent of one processor of each apiserver that 5,000 nodes take at 10 s and at 30 s.
    processor_percent: [f64; INTERVALS.len()],
}

/// Measures the stub, and nginx: a server that does nothing but TLS and HTTP.
pub(super) fn measure(cluster: &mut Cluster, rounds: usize, time: Duration) -> Result<Vec<Cost>> {
    let (stub, nginx) = (Group::new(&cluster.lab, "check-stub")?, Group::new(&cluster.lab, "check-nginx")?);
    let address = cluster.apiservers[0].host.address(cluster.vip4)?;
    let stub_pid = cluster.apiservers[0].stub.process()?.pid();
    stub.adopt(stub_pid)?;
    let _nginx = start_nginx(cluster, &nginx)?;
    let mut costs = Vec::new();
    for (server, group, port) in [("stub apiserver", &stub, PORT), ("nginx", &nginx, NGINX_PORT)] {
        let mut command = cluster.lb.command(sibling_program("sheave-load")?);
        command.env_remove("SHEAVE");
        let mut worker = Worker::start(command, &cluster.ca_file(), 1, &[SocketAddr::new(address, port)])?;
        let mut each = |fresh| -> Result<Spread> {
            let rounds: Result<Vec<_>> = (0..rounds).map(|_| cost(&mut worker, group, fresh, time)).collect();
            Ok(Spread::of(rounds?))
        };
        let (fresh, reused) = (each(true)?, each(false)?);
        let processor_percent =
            INTERVALS.map(|interval| processor_percent(fresh.median, reused.median, interval));
        costs.push(Cost { server, fresh, reused, processor_percent });
    }
    Ok(costs)
}

/// The server's processor time a check, in microseconds.
fn cost(worker: &mut Worker, server: &Group, fresh: bool, time: Duration) -> Result<f64> {
    worker.order(Order::Prepare(Load::Checks { fresh, microseconds: u64::try_from(PAUSE.as_micros())? }))?;
    let before = server.processor_time()?;
    let tally = worker.order(Order::Go { milliseconds: u64::try_from(time.as_millis())? })?;
    let taken = server.processor_time()? - before;
    worker.order(Order::Rest)?;
    Ok(taken.as_secs_f64() * 1e6 / tally.answered.max(1) as f64)
}

/// Every node asks every apiserver.
fn processor_percent(fresh: f64, reused: f64, interval: f64) -> f64 {
    let each = (fresh + (FRESH_ONE_IN - 1.0) * reused) / FRESH_ONE_IN;
    NODES / interval * each / 1e6 * 100.0
}

fn start_nginx(cluster: &Cluster, group: &Group) -> Result<Process> {
    let host = &cluster.apiservers[0].host;
    let link = host.link()?;
    let identity = cluster.authority.server("check-nginx", &[link.v4.into(), link.v6.into()])?;
    let file = cluster.lab.directory().join("check-nginx.conf");
    let config = format!(
        "daemon off;\nmaster_process off;\npid {};\nerror_log stderr notice;\n\
         events {{\n  worker_connections 4096;\n}}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000;\n  keepalive_timeout 1h;\n  \
           server {{\n    listen [::]:{NGINX_PORT} ssl ipv6only=off;\n    \
             ssl_certificate {};\n    ssl_certificate_key {};\n    \
             location / {{ return 200 ok; }}\n  }}\n}}\n",
        file.with_extension("pid").display(),
        identity.certificate.display(),
        identity.key.display(),
    );
    fs::write(&file, config)?;
    let mut command = group.command(host, "nginx");
    command.args(["-e", "stderr", "-c"]).arg(file);
    let mut nginx = host.start("check-nginx", command)?;
    eventually(START_LIMIT, "nginx listens", || {
        anyhow::ensure!(nginx.exited()?.is_none(), "nginx ended: {}", nginx.log());
        let sockets = host.run(&format!("ss -Hltn sport = :{NGINX_PORT}"))?;
        (!sockets.is_empty()).then_some(()).context("nobody listens")
    })?;
    Ok(nginx)
}

/// A table of costs.
pub(super) fn table(costs: &[Cost]) -> String {
    let head = ["a check of", "fresh", "reused", "5,000 nodes at 10 s", "at 30 s"];
    let mut rows = vec![head.map(str::to_owned)];
    for Cost { server, fresh, reused, processor_percent: [at_10, at_30] } in costs {
        rows.push([
            (*server).to_owned(),
            format!("{} us", fresh.shown(0)),
            format!("{} us", reused.shown(0)),
            format!("{at_10:.1} % of a processor"),
            format!("{at_30:.1} %"),
        ]);
    }
    aligned(&rows, [false, true, true, true, true])
}

#[cfg(test)]
mod tests {
    use super::processor_percent;

    #[test]
    fn every_fifth_check_is_fresh() {
        // 500 checks a second: 100 of 1,000 us, 400 of 100 us.
        assert!((processor_percent(1000.0, 100.0, 10.0) - 14.0).abs() < 1e-9);
        assert!((processor_percent(1000.0, 100.0, 30.0) - 14.0 / 3.0).abs() < 1e-9);
    }
}
