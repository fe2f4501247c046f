//! Servers that mean harm, or are broken: bounded in time and memory, with the right word for it, and nobody else's
//! trouble.

use tokio::sync::mpsc;

use super::*;
use crate::health::{Event, State, check_once};

/// A reply of 10 MB that claims to be as long.
const HUGE: &str = "Content-Length: 10485760\r\n\r\n";

#[tokio::test]
async fn a_huge_failure_is_read_as_far_as_it_matters() {
    let cluster = Cluster::new();
    let head = format!("HTTP/1.1 500 Internal Server Error\r\n{HUGE}[-]etcd failed: reason withheld\n");
    let server = cluster.apiserver(move |_| Answer::Flood(head.clone())).await;
    let report = check_once(server.address, &cluster.check()).await;
    assert_eq!(gist(&report), (Outcome::Fail(Failure::NotExpected), CheckCode::L7Sts, Some(500)));
    assert_eq!(report.failed, ["etcd"]);
    assert_eq!(server.accepted(), 1, "and nothing is asked of it again");
}

#[tokio::test]
async fn a_head_that_trickles_is_bounded_by_the_timeout() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::Trickle("HTTP/1.1 200 OK\r\nX: ".to_owned())).await;
    let check = Check { timeout: SHORT, ..cluster.check() };
    let report = check_once(server.address, &check).await;
    assert_eq!(gist(&report), fail(Failure::NoAnswer, CheckCode::L7Tout), "{}", report.info);
}

#[tokio::test]
async fn a_handshake_that_trickles_is_bounded_by_the_timeout() {
    let server = Server::start(Layer::Dribble, |_| Answer::ok()).await;
    for kind in [CheckKind::Https, CheckKind::Tls] {
        let report = check_once(server.address, &Check { connect_timeout: SHORT, ..check(kind) }).await;
        assert_eq!(gist(&report), fail(Failure::Silent, CheckCode::L6Tout), "{}", report.info);
    }
}

#[tokio::test]
async fn chunks_that_are_none_and_http_0_9_are_invalid_responses() {
    let cluster = Cluster::new();
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let server = cluster.apiserver(move |_| Answer::Flood(chunked.to_owned())).await;
    let report = check_once(server.address, &cluster.check()).await;
    let broken = (Outcome::Fail(Failure::NotExpected), CheckCode::L7Rsp, Some(200));
    assert_eq!(gist(&report), broken, "{}", report.info);
    // HTTP/0.9 has no head: the reply is the body.
    let server = cluster.apiserver(|_| Answer::Last("ok\n".to_owned())).await;
    let report = check_once(server.address, &cluster.check()).await;
    assert_eq!(gist(&report), fail(Failure::NotExpected, CheckCode::L7Rsp), "{}", report.info);
}

#[tokio::test]
async fn an_answer_before_the_question_and_many_at_once_are_taken_for_what_they_are() {
    let cluster = Cluster::new();
    let twice = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".repeat(100);
    let server = cluster.apiserver(move |_| Answer::Bytes(twice.clone())).await;
    let mut prober = prober(server.address, &cluster.check());
    for _ in 0..3 {
        assert_eq!(gist(&prober.check().await), pass(CheckCode::L7Ok, 200));
    }
}

/// The state of each backend after each has had so many checks.
async fn states(
    events: &mut mpsc::Receiver<Event>,
    backends: usize,
    checks: usize,
) -> Vec<(State, CheckCode)> {
    let mut seen = vec![Vec::new(); backends];
    while seen.iter().any(|of| of.len() < checks) {
        let event = tokio::time::timeout(AMPLE, events.recv()).await.unwrap().unwrap();
        seen[event.id.backend].push((event.state, event.report.code));
    }
    seen.iter().map(|of| of[checks - 1]).collect()
}

#[tokio::test]
async fn the_others_of_a_service_are_none_the_worse() {
    let cluster = Cluster::new();
    let endless = format!("HTTP/1.1 500 Internal Server Error\r\n{HUGE}");
    let servers = [
        cluster.apiserver(|_| Answer::ok()).await,
        cluster.apiserver(move |_| Answer::Flood(endless.clone())).await,
        cluster.apiserver(|_| Answer::Trickle("HTTP/1.1 200 OK\r\nX: ".to_owned())).await,
        cluster.apiserver(|_| Answer::Last("ok\n".to_owned())).await,
        cluster.apiserver(|_| Answer::status("302 Found\r\nLocation: /livez", "")).await,
        Server::start(Layer::Dribble, |_| Answer::ok()).await,
        Server::start(Layer::HangUp, |_| Answer::ok()).await,
        cluster.apiserver(|_| Answer::ok()).await,
    ];
    // All of them share this machine: the good ones answer in time also beside those that send all they can.
    let hurried = Check {
        interval: Duration::from_millis(50),
        timeout: Duration::from_secs(3),
        connect_timeout: Duration::from_secs(3),
        ..cluster.check()
    };
    let of = |(backend, server): (usize, &Server)| target(backend, server.address, hurried.clone());
    let (sender, mut events) = mpsc::channel(64);
    let _checks = spawn(servers.iter().enumerate().map(of).collect(), sender);
    assert_eq!(
        states(&mut events, servers.len(), 3).await,
        [
            (State::Ready, CheckCode::L7Ok),
            (State::Draining, CheckCode::L7Sts),
            (State::Draining, CheckCode::L7Tout),
            (State::Draining, CheckCode::L7Rsp),
            (State::Draining, CheckCode::L7Sts),
            (State::Silent, CheckCode::L6Tout),
            (State::Draining, CheckCode::L6Rsp),
            (State::Ready, CheckCode::L7Ok),
        ]
    );
}
