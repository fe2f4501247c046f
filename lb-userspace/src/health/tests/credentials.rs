//! Who we are and whom we trust, while the files come and go.

use std::sync::Arc;

use super::*;
use crate::health::{HealthError, check_once, validate};

const UNAUTHORIZED: &str = "401 Unauthorized";

/// As kube-apiserver: a credential is right, or wrong, or absent and then `anonymous` decides.
fn authenticating(token: &'static str, anonymous: bool) -> impl Fn(&Asked) -> Answer {
    move |asked| {
        let known = match &asked.authorization {
            Some(authorization) => *authorization == format!("Bearer {token}"),
            None => asked.client_certificate || anonymous,
        };
        if known { Answer::ok() } else { Answer::status(UNAUTHORIZED, "") }
    }
}

#[tokio::test]
async fn a_changed_token_is_read_again() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(authenticating("new", false)).await;
    let check = Check { token_file: Some(cluster.path("token")), ..cluster.check() };
    let mut prober = prober(server.address, &check);

    let report = prober.check().await;
    assert_eq!(report.http_status, Some(401), "absent: anonymous");
    cluster.write("token", "old\n");
    let report = prober.check().await;
    assert_eq!(report.http_status, Some(401));
    cluster.write("token", "new\n");
    let report = prober.check().await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
    assert!(!report.credential_rejected);
}

#[tokio::test]
async fn a_rejected_token_is_our_fault_where_anonymous_passes() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(authenticating("right", true)).await;
    let check = Check { token_file: Some(cluster.write("token", "secret-and-wrong")), ..cluster.check() };
    let mut prober = prober(server.address, &check);
    for checks in 1..=2 {
        let report = prober.check().await;
        assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
        assert!(report.credential_rejected);
        assert!(!format!("{report:?}").contains("secret-and-wrong"));
        assert_eq!(
            server.accepted(),
            2 * checks,
            "the credential is tried again each time, nothing is reused"
        );
    }
}

#[tokio::test]
async fn a_rejected_token_is_seen_on_a_reused_connection_too() {
    let cluster = Cluster::new();
    let server = cluster
        .apiserver(|asked| match (&asked.authorization, asked.on_this_connection) {
            (Some(_), 2) => Answer::status(UNAUTHORIZED, ""),
            _ => Answer::ok(),
        })
        .await;
    let check = Check { token_file: Some(cluster.write("token", "expiring")), ..cluster.check() };
    let mut prober = prober(server.address, &check);
    assert!(!prober.check().await.credential_rejected);
    let report = prober.check().await;
    assert_eq!((report.outcome, report.credential_rejected), (Outcome::Pass, true));
}

#[tokio::test]
async fn a_rejected_credential_where_anonymous_is_refused_too_is_a_wrong_status() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(authenticating("right", false)).await;
    let check = Check { token_file: Some(cluster.write("token", "wrong")), ..cluster.check() };
    let report = check_once(server.address, &check).await;
    let wrong = Outcome::Fail(Failure::NotExpected);
    assert_eq!(gist(&report), (wrong, CheckCode::L7Sts, Some(401)));
    assert!(!report.credential_rejected);
    assert_eq!(server.accepted(), 2);
}

#[tokio::test]
async fn a_client_certificate_is_presented_and_left_out_when_rejected() {
    let cluster = Cluster::new();
    let check = Check { client_cert: Some(cluster.client_certificate()), ..cluster.check() };

    let server = cluster.apiserver(authenticating("", false)).await;
    let report = check_once(server.address, &check).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
    assert!(!report.credential_rejected);
    assert_eq!(report.client_certificate.unwrap().names, ["sheave"]);

    let unknown = |asked: &Asked| match asked.client_certificate {
        true => Answer::status(UNAUTHORIZED, ""),
        false => Answer::ok(),
    };
    let server = cluster.apiserver(unknown).await;
    let report = check_once(server.address, &check).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));
    assert!(report.credential_rejected);
}

#[tokio::test]
async fn a_ca_that_comes_later_is_used_and_one_that_goes_stays_in_force() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let check = Check { ca_file: Some(other.path("ca.crt")), ..check(CheckKind::Https) };
    let mut prober = prober(server.address, &check);
    let report = prober.check().await;
    assert_eq!((report.outcome, report.verified), (Outcome::Pass, false));

    // The one who answered without being verified is not of this CA.
    other.write("ca.crt", &other.ca.pem);
    let mut report = prober.check().await;
    while !report.fresh_connection {
        report = prober.check().await;
    }
    assert!(report.certificate_rejected, "{report:?}");
    other.write("ca.crt", &cluster.ca.pem);
    let report = prober.check().await;
    assert_eq!((report.outcome, report.verified), (Outcome::Pass, true));

    std::fs::remove_file(other.path("ca.crt")).unwrap();
    let mut report = prober.check().await;
    while !report.fresh_connection {
        report = prober.check().await;
    }
    assert_eq!((report.outcome, report.verified), (Outcome::Pass, true));
}

#[tokio::test]
async fn no_token_is_sent_while_the_ca_is_missing() {
    let cluster = Cluster::new();
    let server = cluster
        .apiserver(|asked| match asked.authorization {
            Some(_) => Answer::status("418 I'm a teapot", ""),
            None => Answer::ok(),
        })
        .await;
    let token_file = Some(cluster.write("token", "secret"));
    let missing = Check { ca_file: Some(cluster.path("none")), token_file, ..check(CheckKind::Https) };
    let not_asked_for = Check { ca_file: None, ..missing.clone() };
    assert_eq!(check_once(server.address, &missing).await.http_status, Some(200));
    assert_eq!(check_once(server.address, &not_asked_for).await.http_status, Some(418));
}

#[tokio::test]
async fn a_file_of_no_use_is_our_own_trouble() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let broken = Some(cluster.write("broken", "garbage"));
    let check = Check { ca_file: broken, ..check(CheckKind::Https) };
    let report = check_once(server.address, &check).await;
    assert_eq!(gist(&report), (Outcome::Local, CheckCode::Unk, None));
    assert!(report.info.contains("no PEM certificate"), "{}", report.info);
    assert_eq!(server.accepted(), 0);
}

#[tokio::test]
async fn a_certificate_that_breaks_later_is_kept_as_it_was() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(authenticating("", false)).await;
    let files = cluster.client_certificate();
    let check = Check { client_cert: Some(files.clone()), ..cluster.check() };
    let credentials = Store::default().credentials(&check);
    let ask = async || Prober::new(server.address, &check, credentials.clone()).check().await;
    assert_eq!(ask().await.outcome, Outcome::Pass);
    // Half of a rotation: the new certificate is here, its key is not.
    let next = cluster.ca.issue(&["next"]);
    cluster.write("client.crt", &next.cert.pem());
    let report = ask().await;
    assert_eq!(report.client_certificate.unwrap().names, ["sheave"]);
    cluster.write("client.key", &next.key.serialize_pem());
    let report = ask().await;
    assert_eq!(report.outcome, Outcome::Pass);
    assert_eq!(report.client_certificate.unwrap().names, ["next"]);
}

#[test]
fn checks_that_name_the_same_files_share_what_is_made_of_them() {
    let cluster = Cluster::new();
    let check = Check { client_cert: Some(cluster.client_certificate()), ..cluster.check() };
    let mut store = Store::default();
    let (one, two) = (store.credentials(&check), store.credentials(&check));
    let config =
        |credentials: &crate::health::credentials::Credentials| credentials.tls().unwrap().unwrap().config;
    assert!(Arc::ptr_eq(&config(&one), &config(&two)));
    let before = config(&one);
    cluster.write("ca.crt", &Ca::new().pem);
    assert!(!Arc::ptr_eq(&before, &config(&one)));
    assert!(Arc::ptr_eq(&config(&one), &config(&two)));
}

#[test]
fn files_may_be_absent_but_not_broken() {
    let cluster = Cluster::new();
    let good = cluster.client_certificate();
    let complete = Check {
        client_cert: Some(good.clone()),
        token_file: Some(cluster.write("token", "word\n")),
        ..cluster.check()
    };
    assert_eq!(validate(&complete), Ok(()));
    let absent = cluster.path("absent");
    let nothing_yet = Check {
        ca_file: Some(absent.clone()),
        client_cert: Some(ClientCertificate { cert_file: absent.clone(), key_file: absent.clone() }),
        token_file: Some(absent),
        ..complete.clone()
    };
    assert_eq!(validate(&nothing_yet), Ok(()));

    let key = |file: PathBuf| Check {
        client_cert: Some(ClientCertificate { key_file: file, ..good.clone() }),
        ..complete.clone()
    };
    let ca = |file: PathBuf| Check { ca_file: Some(file), ..complete.clone() };
    let token = |file: PathBuf| Check { token_file: Some(file), ..complete.clone() };
    let cut = &cluster.ca.pem[..cluster.ca.pem.len() / 2];
    let other_key = rcgen::KeyPair::generate().unwrap().serialize_pem();
    let broken_key = format!("-----BEGIN PRIVATE KEY-----\n{}!\n", "hunter2".repeat(9));
    for (check, problem) in [
        (ca(cluster.write("cut", cut)), "a section is cut short"),
        (ca(cluster.write("empty", "")), "no PEM certificate in it"),
        (ca(cluster.directory.path().to_owned()), "is not a file"),
        (
            ca(cluster.write("not-der", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
            "CA",
        ),
        (key(cluster.write("other.key", &other_key)), "the private key is not the certificate's"),
        (key(cluster.write("broken.key", &broken_key)), "no unencrypted PEM private key"),
        (key(good.cert_file.clone()), "no unencrypted PEM private key"),
        (token(cluster.write("empty-token", " \n")), "it is empty"),
        (token(cluster.write("two-words", "hunter2 hunter2")), "one word"),
    ] {
        let error = validate(&check).unwrap_err();
        assert!(matches!(error, HealthError::File { .. }));
        let message = error.to_string();
        assert!(message.contains(problem), "{message}");
        assert!(!message.contains("hunter2") && !message.contains('\n'), "{message}");
    }
}

#[test]
fn names_and_paths_are_validated() {
    let check = check(CheckKind::Https);
    for name in ["kubernetes.default.svc", "10.0.0.1", "::1"] {
        assert_eq!(validate(&Check { server_name: Some(name.to_owned()), ..check.clone() }), Ok(()));
    }
    for path in ["/readyz?verbose", "/"] {
        assert_eq!(validate(&Check { path: path.to_owned(), ..check.clone() }), Ok(()));
    }
    for name in ["", "a b", "https://kubernetes"] {
        let check = Check { server_name: Some(name.to_owned()), ..check.clone() };
        assert_eq!(validate(&check), Err(HealthError::ServerName(name.to_owned())));
    }
    for path in ["", "readyz", "/a b", "https://other/readyz", "/a\r\nX: y", "*"] {
        let check = Check { path: path.to_owned(), ..check.clone() };
        assert_eq!(validate(&check), Err(HealthError::Path(path.to_owned())));
    }
}

/// A kubeconfig in the cluster's directory, with these lines for its cluster and user.
fn kubeconfig(cluster: &Cluster, of_cluster: &str, of_user: &str) -> PathBuf {
    cluster.write(
        "kubeconfig",
        &format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'https://192.0.2.1', {of_cluster}}}}}]\n\
             users: [{{name: u, user: {{{of_user}}}}}]\n"
        ),
    )
}

fn with_kubeconfig(path: PathBuf) -> Check {
    Check { kubeconfig: Some(path), ..check(CheckKind::Https) }
}

fn base64(text: &str) -> String {
    data_encoding::BASE64.encode(text.as_bytes())
}

#[tokio::test]
async fn a_kubeconfig_gives_ca_certificate_and_name() {
    let mut cluster = Cluster::new();
    cluster.pair = cluster.ca.issue(&["kubernetes"]);
    let server = cluster.apiserver(authenticating("", false)).await;
    let client = cluster.ca.issue(&["sheave"]);
    let path = kubeconfig(
        &cluster,
        &format!("certificate-authority-data: {}, tls-server-name: kubernetes", base64(&cluster.ca.pem)),
        &format!(
            "client-certificate-data: {}, client-key-data: {}",
            base64(&client.cert.pem()),
            base64(&client.key.serialize_pem())
        ),
    );
    assert_eq!(validate(&with_kubeconfig(path.clone())), Ok(()));
    let report = check_once(server.address, &with_kubeconfig(path.clone())).await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200), "{}", report.info);
    assert!(report.verified);
    assert_eq!(report.client_certificate.unwrap().names, ["sheave"]);

    let other_name = Check { server_name: Some("other".to_owned()), ..with_kubeconfig(path) };
    assert!(check_once(server.address, &other_name).await.certificate_rejected, "what is configured holds");
}

#[tokio::test]
async fn a_kubeconfig_is_read_again_and_so_are_the_files_it_names() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(authenticating("new", false)).await;
    cluster.write("ca.crt", &cluster.ca.pem);
    let check = with_kubeconfig(cluster.path("kubeconfig"));
    let mut prober = prober(server.address, &check);
    let report = prober.check().await;
    assert_eq!((report.http_status, report.verified), (Some(401), false), "absent: anonymous, not verified");

    kubeconfig(&cluster, "certificate-authority: ca.crt", "token: old");
    let report = prober.check().await;
    assert_eq!((report.http_status, report.verified), (Some(401), true));
    kubeconfig(&cluster, "certificate-authority: ca.crt", "tokenFile: token");
    assert_eq!(prober.check().await.http_status, Some(401), "its token is not there yet");
    cluster.write("token", "new");
    let report = prober.check().await;
    assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200));

    // Broken, then gone: the last good one stays in force.
    cluster.write("kubeconfig", "current-context: [");
    for _ in 0..6 {
        let report = prober.check().await;
        assert_eq!((gist(&report), report.verified), (pass(CheckCode::L7Ok, 200), true));
    }
    std::fs::remove_file(cluster.path("kubeconfig")).unwrap();
    for _ in 0..6 {
        let report = prober.check().await;
        assert_eq!((gist(&report), report.verified), (pass(CheckCode::L7Ok, 200), true));
    }
}

#[tokio::test]
async fn a_kubeconfig_of_no_use_is_our_own_trouble() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let ca = format!("certificate-authority-data: {}", base64(&cluster.ca.pem));
    for (of_cluster, of_user, problem) in [
        (ca.as_str(), "exec: {command: hunter2}", "an exec plugin"),
        (ca.as_str(), "token: hunter2 hunter2", "its bearer token: not a token"),
        (
            ca.as_str(),
            "client-certificate-data: aHVudGVyMg==, client-key-data: aHVudGVyMg==",
            "no PEM certificate",
        ),
        ("certificate-authority-data: aHVudGVyMg==", "token: a", "its CA: no PEM certificate"),
        ("certificate-authority: broken.crt", "token: a", "no PEM certificate"),
    ] {
        cluster.write("broken.crt", "hunter2");
        let check = with_kubeconfig(kubeconfig(&cluster, of_cluster, of_user));
        let message = validate(&check).unwrap_err().to_string();
        let report = check_once(server.address, &check).await;
        assert_eq!(gist(&report), (Outcome::Local, CheckCode::Unk, None));
        for text in [message, report.info] {
            assert!(text.contains(problem), "{problem}: {text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
    assert_eq!(server.accepted(), 0);
}

#[tokio::test]
async fn a_foreign_or_expired_client_certificate_is_told_from_an_ill_backend() {
    // kube-apiserver lets any client certificate through the handshake and answers 401 then.
    let cluster = Cluster::new();
    let picky = |asked: &Asked| match asked.client_certificate {
        true => Answer::status(UNAUTHORIZED, ""),
        false => Answer::ok(),
    };
    let foreign = Ca::new().issue(&["sheave"]);
    let expired = cluster.ca.issue_expired(&["sheave"]);
    for (pair, is_expired) in [(foreign, false), (expired, true)] {
        let client_cert = Some(ClientCertificate {
            cert_file: cluster.write("client.crt", &pair.cert.pem()),
            key_file: cluster.write("client.key", &pair.key.serialize_pem()),
        });
        let check = Check { client_cert, ..cluster.check() };
        let server = Server::start(Layer::tls_that_takes_any_client_certificate(&cluster.pair), picky).await;
        let report = check_once(server.address, &check).await;
        assert_eq!(gist(&report), pass(CheckCode::L7Ok, 200), "{}", report.info);
        assert!(report.credential_rejected);
        let days = report.client_certificate.unwrap().days_to_expiry(std::time::SystemTime::now());
        assert_eq!(days < 0, is_expired);
    }
}

#[tokio::test]
async fn what_failed_is_asked_for_where_a_failure_does_not_say() {
    let cluster = Cluster::new();
    let list = "[+]ping ok\n[-]etcd failed: reason withheld\n[-]shutdown failed: reason withheld\n";
    let server = cluster
        .apiserver(move |asked| match asked.path.as_str() {
            "/readyz?verbose" => Answer::status("500 Internal Server Error", list),
            _ => Answer::status("500 Internal Server Error", "no"),
        })
        .await;
    let report = check_once(server.address, &cluster.check()).await;
    assert_eq!(report.failed, ["etcd", "shutdown"]);
    assert_eq!((report.http_status, report.info.as_str()), (Some(500), "failed: etcd, shutdown"));
    assert_eq!(server.accepted(), 1, "on the same connection");

    // The verdict does not wait for a list that never comes.
    let server = cluster
        .apiserver(|asked| match asked.path.as_str() {
            "/readyz" => Answer::status("503 Service Unavailable", ""),
            _ => Answer::Silence,
        })
        .await;
    let check = Check { connect_timeout: Duration::from_secs(2), ..cluster.check() };
    let report = check_once(server.address, &check).await;
    assert_eq!((report.http_status, report.info.as_str()), (Some(503), "Service Unavailable"));
    assert!(report.failed.is_empty() && report.duration < AMPLE);
}
