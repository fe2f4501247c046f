//! What a check says of each way a backend can answer, or not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tokio::{
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use super::*;
use crate::health::check_once;

#[tokio::test]
async fn the_expected_status_passes_and_is_verified() {
    let cluster = Cluster::new();
    let server = cluster
        .apiserver(|asked| {
            assert_eq!(asked.path, "/readyz");
            assert!(asked.host.starts_with("127.0.0.1:"), "{}", asked.host);
            Answer::ok()
        })
        .await;
    let report = check_once(server.address, &cluster.check()).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200), "{}", report.info);
    assert!(report.connected && report.verified && report.fresh_connection);
    let facts = report.server_certificate.unwrap();
    assert_eq!(facts.names, ["kubernetes"]);
    assert_eq!(facts.addresses, [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)]);
}

#[tokio::test]
async fn any_other_status_is_wrong_and_says_why() {
    let cluster = Cluster::new();
    for (status, body, info) in [
        ("401 Unauthorized", "{}", "Unauthorized"),
        ("403 Forbidden", "{}", "Forbidden"),
        ("500 Internal Server Error", "[+]ping ok\n[-]etcd failed: reason withheld\n", "failed: etcd"),
        ("302 Found\r\nLocation: /livez", "", "Found"),
        ("204 No Content", "", "No Content"),
    ] {
        let server = cluster.apiserver(|_| Answer::status(status, body)).await;
        let report = check_once(server.address, &cluster.check()).await;
        let code = status[..3].parse().ok();
        assert_eq!(gist(&report), (Outcome::Fail(Failure::NotExpected), CheckCode::L7Sts, code));
        assert_eq!(report.info, info);
        assert!(report.connected);
        assert_eq!(
            server.accepted(),
            1,
            "redirects are not followed, and there is no credential to try without"
        );
    }
}

#[tokio::test]
async fn expected_statuses_are_ranges() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::status("401 Unauthorized", "")).await;
    let check = Check { expect: vec![200..=200, 400..=403], ..cluster.check() };
    assert_eq!(gist(&check_once(server.address, &check).await), pass(CheckCode::L7Ok, 401));
}

#[tokio::test]
async fn no_answer_after_tls_is_not_silence() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::Silence).await;
    let check = Check { timeout: SHORT, ..cluster.check() };
    let report = check_once(server.address, &check).await;
    assert_eq!(gist(&report), fail(Failure::NoAnswer, CheckCode::L7Tout));
    assert!(report.connected && report.duration >= SHORT);
}

#[tokio::test]
async fn a_frozen_apiserver_is_silent() {
    let server = Server::start(Layer::Frozen, |_| Answer::ok()).await;
    for kind in [CheckKind::Https, CheckKind::Tls] {
        let report = check_once(server.address, &Check { connect_timeout: SHORT, ..check(kind) }).await;
        assert_eq!(gist(&report), fail(Failure::Silent, CheckCode::L6Tout));
        assert!(!report.connected);
    }
    let report = check_once(server.address, &check(CheckKind::Tcp)).await;
    assert_eq!(gist(&report), (Outcome::Pass, CheckCode::L4Ok, None), "why a TCP check is not enough");
}

#[tokio::test]
async fn without_tls_only_a_byte_of_a_reply_shows_that_somebody_is_there() {
    // Its kernel completes TCP and takes the request.
    let frozen = Server::start(Layer::Frozen, |_| Answer::ok()).await;
    let impatient = Check { timeout: SHORT, ..check(CheckKind::Http) };
    let report = check_once(frozen.address, &impatient).await;
    assert_eq!(gist(&report), fail(Failure::Silent, CheckCode::L7Tout));
    assert!(!report.connected, "no new flows for it, not even when nobody is ready");

    let slow = Server::start(Layer::Plain, |_| Answer::Trickle("HTTP/1.1 200 OK\r\nX: ".to_owned())).await;
    let report = check_once(slow.address, &impatient).await;
    assert_eq!(gist(&report), fail(Failure::NoAnswer, CheckCode::L7Tout));
    assert!(report.connected);
}

#[tokio::test]
async fn a_host_that_drops_packets_is_silent() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    // With its backlog full, a listener's kernel drops SYNs.
    let mut backlog = Vec::new();
    while let Ok(connected) = timeout(SHORT, TcpStream::connect(address)).await {
        backlog.push(connected.unwrap());
    }
    let report = check_once(address, &Check { connect_timeout: SHORT, ..check(CheckKind::Https) }).await;
    assert_eq!(gist(&report), fail(Failure::Silent, CheckCode::L4Tout));
    assert!(!report.connected);
}

#[tokio::test]
async fn a_closed_port_is_refused() {
    // Bound, so that nobody else listens there, and not listening.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = socket.local_addr().unwrap();
    for kind in [CheckKind::Https, CheckKind::Http, CheckKind::Tls, CheckKind::Tcp] {
        let report = check_once(address, &check(kind)).await;
        assert_eq!(gist(&report), fail(Failure::Refused, CheckCode::L4Con));
        assert_eq!(report.detail(), "Layer4 connection problem: Connection refused");
        assert!(!report.connected);
    }
}

#[tokio::test]
async fn an_address_we_have_no_way_to_is_our_own_trouble() {
    // Never a valid destination for TCP.
    let broadcast = "255.255.255.255:6443".parse().unwrap();
    let report = check_once(broadcast, &check(CheckKind::Https)).await;
    assert_eq!(gist(&report), (Outcome::Local, CheckCode::SockErr, None), "{}", report.info);
}

#[tokio::test]
async fn hanging_up_in_the_handshake_is_an_answer() {
    let server = Server::start(Layer::HangUp, |_| Answer::ok()).await;
    let report = check_once(server.address, &check(CheckKind::Https)).await;
    assert_eq!(gist(&report), fail(Failure::Refused, CheckCode::L6Rsp), "{}", report.info);
    assert!(!report.connected);
}

#[tokio::test]
async fn a_plain_http_port_speaks_no_tls() {
    let server = Server::start(Layer::Plain, |_| Answer::ok()).await;
    let report = check_once(server.address, &check(CheckKind::Https)).await;
    assert_eq!(gist(&report), fail(Failure::NotExpected, CheckCode::L6Rsp));
    assert_eq!(report.detail(), "Layer6 invalid response: SSL handshake failure: not TLS");
    assert!(!report.certificate_rejected);
}

#[tokio::test]
async fn another_clusters_ca_is_not_trusted() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let report = check_once(server.address, &other.check()).await;
    assert_eq!(gist(&report), fail(Failure::NotExpected, CheckCode::L6Rsp));
    assert!(report.certificate_rejected && !report.connected, "{}", report.info);

    let insecure = Check { insecure_skip_tls_verify: true, ..other.check() };
    let report = check_once(server.address, &insecure).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
    assert!(!report.verified);
}

#[tokio::test]
async fn the_certificate_must_be_for_the_name_or_the_address() {
    let mut cluster = Cluster::new();
    cluster.pair = cluster.ca.issue(&["kubernetes", "127.0.0.2"]);
    let server = cluster
        .apiserver(|asked| {
            assert!(asked.host.starts_with("kubernetes:"), "{}", asked.host);
            Answer::ok()
        })
        .await;
    let named = |name: &str| Check { server_name: Some(name.to_owned()), ..cluster.check() };
    let report = check_once(server.address, &cluster.check()).await;
    assert!(report.certificate_rejected, "no name: the address that is checked: {}", report.info);
    let report = check_once(server.address, &named("other")).await;
    assert!(report.certificate_rejected, "{}", report.info);
    let report = check_once(server.address, &named("kubernetes")).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200), "{}", report.info);
}

#[tokio::test]
async fn a_backend_is_checked_over_ipv6() {
    let cluster = Cluster::new();
    let localhost = Ipv6Addr::LOCALHOST.into();
    let server = Server::start_on(localhost, Layer::tls(&cluster.ca, &cluster.pair), |asked| {
        assert!(asked.host.starts_with("[::1]:"), "{}", asked.host);
        Answer::ok()
    })
    .await;
    let report = check_once(server.address, &cluster.check()).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200), "{}", report.info);
}

#[tokio::test]
async fn what_is_no_http_is_an_invalid_response() {
    let cluster = Cluster::new();
    for garbage in ["SSH-2.0-OpenSSH_9.2\r\n\r\n", "ok", "HTTP/9.9 200 OK\r\n\r\n", "\0\0\0\0\0", ""] {
        let server = cluster.apiserver(|_| Answer::Last(garbage.to_owned())).await;
        let report = check_once(server.address, &cluster.check()).await;
        assert_eq!(
            gist(&report),
            fail(Failure::NotExpected, CheckCode::L7Rsp),
            "{garbage:?} {}",
            report.info
        );
        assert!(report.connected);
    }
}

#[tokio::test]
async fn an_endless_head_is_an_invalid_response() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::Flood("HTTP/1.1 200 OK\r\nX: ".to_owned())).await;
    let report = check_once(server.address, &cluster.check()).await;
    assert_eq!(gist(&report), fail(Failure::NotExpected, CheckCode::L7Rsp), "{}", report.info);
}

#[tokio::test]
async fn a_reply_that_breaks_off_is_an_invalid_response() {
    let cluster = Cluster::new();
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nok";
    let server = cluster.apiserver(|_| Answer::Last(cut.to_owned())).await;
    let report = check_once(server.address, &cluster.check()).await;
    let expected = (Outcome::Fail(Failure::NotExpected), CheckCode::L7Rsp, Some(200));
    assert_eq!(gist(&report), expected, "{}", report.info);
}

#[tokio::test]
async fn a_body_that_trickles_is_bounded_by_the_timeout() {
    let cluster = Cluster::new();
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n";
    let server = cluster.apiserver(|_| Answer::Trickle(head.to_owned())).await;
    let check = Check { timeout: SHORT, ..cluster.check() };
    let report = check_once(server.address, &check).await;
    assert_eq!(gist(&report), (Outcome::Fail(Failure::NoAnswer), CheckCode::L7Tout, Some(200)));
}

#[tokio::test]
async fn a_huge_body_is_not_read_to_its_end() {
    let cluster = Cluster::new();
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n";
    let server = cluster.apiserver(|_| Answer::Flood(head.to_owned())).await;
    let mut prober = prober(server.address, &cluster.check());
    for connections in 1..=2 {
        assert_eq!(gist(&prober.check().await), pass(CheckCode::L7Ok, 200));
        assert_eq!(server.accepted(), connections, "the connection is of no more use");
    }
}

#[tokio::test]
async fn plain_http_is_checked_without_tls() {
    let server = Server::start(Layer::Plain, |_| Answer::ok()).await;
    let report = check_once(server.address, &check(CheckKind::Http)).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
    assert!(report.connected && !report.verified);
}

#[tokio::test]
async fn a_tls_check_is_content_with_a_handshake() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::Silence).await;
    let report = check_once(server.address, &Check { kind: CheckKind::Tls, ..cluster.check() }).await;
    assert_eq!(gist(&report), (Outcome::Pass, CheckCode::L6Ok, None));
    assert!(report.verified && report.server_certificate.is_some());
}

#[tokio::test]
async fn no_check_is_always_ready() {
    let nowhere = "192.0.2.1:6443".parse().unwrap();
    let report = check_once(nowhere, &check(CheckKind::None)).await;
    assert_eq!(report.outcome, Outcome::Pass);
    assert_eq!(report.to_string(), "no check");
}

#[tokio::test]
async fn another_port_and_address_can_be_checked() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let check =
        Check { port: Some(server.address.port()), address: Some(server.address.ip()), ..cluster.check() };
    let report = check_once("192.0.2.1:6443".parse().unwrap(), &check).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
}

#[tokio::test]
async fn every_fifth_check_opens_a_connection() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let mut prober = prober(server.address, &cluster.check());
    let mut fresh = Vec::new();
    for _ in 0..11 {
        let report = prober.check().await;
        assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
        assert!(report.verified && report.server_certificate.is_some(), "also on a reused connection");
        fresh.push(report.fresh_connection);
    }
    let five = [true, false, false, false, false];
    assert_eq!(fresh, [&five[..], &five, &five[..1]].concat());
    assert_eq!(server.accepted(), 3);
}

#[tokio::test]
async fn every_check_after_a_failure_opens_a_connection() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::status("500 Internal Server Error", "")).await;
    let mut prober = prober(server.address, &cluster.check());
    for connections in 1..=3 {
        assert!(prober.check().await.fresh_connection);
        assert_eq!(server.accepted(), connections);
    }
}

#[tokio::test]
async fn a_wrong_status_on_a_reused_connection_counts() {
    let cluster = Cluster::new();
    let server = cluster
        .apiserver(|asked| match asked.on_this_connection {
            1 => Answer::ok(),
            _ => Answer::status("500 Internal Server Error", ""),
        })
        .await;
    let mut prober = prober(server.address, &cluster.check());
    prober.check().await;
    let report = prober.check().await;
    assert_eq!((report.http_status, report.fresh_connection), (Some(500), false));
}

#[tokio::test]
async fn trouble_on_a_reused_connection_is_settled_on_a_fresh_one() {
    let cluster = Cluster::new();
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nok";
    for trouble in ["hang up", "silence", "garbage", "cut"] {
        let server = cluster
            .apiserver(move |asked| match (asked.on_this_connection, trouble) {
                (1, "hang up") => Answer::Last("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_owned()),
                (1, _) => Answer::ok(),
                (_, "garbage") => Answer::Bytes("garbage\r\n\r\n".to_owned()),
                (_, "cut") => Answer::Last(cut.to_owned()),
                _ => Answer::Silence,
            })
            .await;
        let check = Check { timeout: Duration::from_secs(2), ..cluster.check() };
        let mut prober = prober(server.address, &check);
        for connections in 1..=2 {
            let report = prober.check().await;
            assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200), "{trouble}: {}", report.info);
            assert!(report.fresh_connection, "{trouble}");
            assert_eq!(server.accepted(), connections, "{trouble}");
        }
    }
}

#[tokio::test]
async fn a_doubt_makes_a_reused_connection_be_waited_for_no_longer() {
    let cluster = Cluster::new();
    let server = cluster.silent_after_first().await;
    // Without a doubt this would be waited for as long as the test may take.
    let mut prober = prober(server.address, &cluster.check());
    prober.check().await;
    let report = timeout(AMPLE / 2, prober.check_doubting(sleep(SHORT))).await.unwrap();
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
    assert!(report.fresh_connection);
    assert_eq!(server.accepted(), 2);
}

#[tokio::test]
async fn a_demand_for_a_client_certificate_is_an_answer() {
    let cluster = Cluster::new();
    let layer = Layer::tls_that_requires_a_client_certificate(&cluster.ca, &cluster.pair);
    let server = Server::start(layer, |_| Answer::ok()).await;
    let report = check_once(server.address, &cluster.check()).await;
    // TLS 1.3 tells it after the client's side of the handshake is done.
    assert_eq!(gist(&report), fail(Failure::NotExpected, CheckCode::L7Rsp), "{}", report.info);
    assert!(report.info.contains("CertificateRequired"), "{}", report.info);

    let check = Check { client_cert: Some(cluster.client_certificate()), ..cluster.check() };
    assert_eq!(gist(&check_once(server.address, &check).await), pass(CheckCode::L7Ok, 200));
}

#[tokio::test]
async fn who_refuses_our_certificate_is_alive_whatever_version_of_tls_it_speaks() {
    let cluster = Cluster::new();
    let elsewhere = Cluster::new();
    let unknown = Check { client_cert: Some(elsewhere.client_certificate()), ..cluster.check() };
    for (layer, code) in [
        (Layer::tls_that_requires_a_client_certificate(&cluster.ca, &cluster.pair), CheckCode::L7Rsp),
        (Layer::tls12_that_requires_a_client_certificate(&cluster.ca, &cluster.pair), CheckCode::L6Rsp),
    ] {
        let server = Server::start(layer, |_| Answer::ok()).await;
        let report = check_once(server.address, &unknown).await;
        assert_eq!(gist(&report), fail(Failure::NotExpected, code), "{}", report.info);
        assert!(report.info.starts_with("our client certificate is refused: alert "), "{}", report.info);
        assert!(report.connected, "new flows go there when nobody is ready: {}", report.info);
    }
}
