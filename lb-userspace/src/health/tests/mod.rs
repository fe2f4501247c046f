//! Checks against real servers on loopback.

mod credentials;
mod hostile;
mod layers;
mod schedule;
mod server;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use tokio::sync::mpsc;

use self::server::{Answer, Asked, Ca, Layer, Pair, Server};
use super::{
    CheckCode, CheckReport, Event, Failure, Handle, Outcome, State, Target, TargetId, credentials::Store,
    probe::Prober, resume,
};
use crate::config::{Check, CheckKind, ClientCertificate};

/// Long enough to be met on a busy machine.
const AMPLE: Duration = Duration::from_secs(30);

/// Waited out in full by the tests that wait for nothing.
const SHORT: Duration = Duration::from_millis(200);

fn check(kind: CheckKind) -> Check {
    Check {
        kind,
        path: "/readyz".to_owned(),
        expect: vec![200..=200],
        interval: AMPLE,
        fast_interval: Duration::from_millis(20),
        connect_timeout: AMPLE,
        timeout: AMPLE,
        rise: 2,
        fall: 2,
        port: None,
        address: None,
        server_name: None,
        ca_file: None,
        client_cert: None,
        token_file: None,
        kubeconfig: None,
        insecure_skip_tls_verify: false,
    }
}

fn prober(address: SocketAddr, check: &Check) -> Prober {
    Prober::new(address, check, Store::default().credentials(check))
}

/// The backend of this number of the only service.
fn target(backend: usize, address: SocketAddr, check: Check) -> Target {
    let id = TargetId { service: 0, backend };
    Target { id, address, host: None, check }
}

/// Checks of backends that nobody has asked yet.
fn spawn(targets: Vec<Target>, events: mpsc::Sender<Event>) -> Handle {
    resume(targets, |_| State::Unknown, events)
}

/// Outcome, code and status: what most tests are about.
fn gist(report: &CheckReport) -> (Outcome, CheckCode, Option<u16>) {
    (report.outcome, report.code, report.http_status)
}

fn pass(code: CheckCode, status: u16) -> (Outcome, CheckCode, Option<u16>) {
    (Outcome::Pass, code, Some(status))
}

fn fail(failure: Failure, code: CheckCode) -> (Outcome, CheckCode, Option<u16>) {
    (Outcome::Fail(failure), code, None)
}

/// A cluster's CA, an apiserver's certificate for 127.0.0.1, and a directory for the check's files.
struct Cluster {
    ca: Ca,
    pair: Pair,
    directory: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Self {
        let ca = Ca::new();
        let pair = ca.issue(&["127.0.0.1", "::1", "kubernetes"]);
        Self { ca, pair, directory: tempfile::tempdir().unwrap() }
    }

    async fn apiserver(&self, answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Server {
        Server::start(Layer::tls(&self.ca, &self.pair), answer).await
    }

    /// An apiserver that answers the first request on each connection, and never another.
    async fn silent_after_first(&self) -> Server {
        self.apiserver(|asked| match asked.on_this_connection {
            1 => Answer::ok(),
            _ => Answer::Silence,
        })
        .await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, contents: &str) -> PathBuf {
        // A new file each time, as those who rotate credentials do.
        let next = self.path("next");
        std::fs::write(&next, contents).unwrap();
        std::fs::rename(next, self.path(name)).unwrap();
        self.path(name)
    }

    /// An HTTPS check that verifies with the cluster's CA.
    fn check(&self) -> Check {
        Check { ca_file: Some(self.write("ca.crt", &self.ca.pem)), ..check(CheckKind::Https) }
    }

    fn client_certificate(&self) -> ClientCertificate {
        let pair = self.ca.issue(&["sheave"]);
        ClientCertificate {
            cert_file: self.write("client.crt", &pair.cert.pem()),
            key_file: self.write("client.key", &pair.key.serialize_pem()),
        }
    }
}
