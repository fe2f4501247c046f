//! The two ends of the admin socket against each other, and the server against the world.

use std::{
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
    task::JoinHandle,
};

use super::*;

/// Nothing here takes long; this is for a machine that is busy.
const DEADLINE: Duration = Duration::from_secs(20);

struct Daemon {
    _directory: tempfile::TempDir,
    path: PathBuf,
    server: JoinHandle<std::io::Result<()>>,
    controller: JoinHandle<()>,
}

fn status() -> Status {
    Status {
        services: vec![ServiceStatus {
            name: "api".to_owned(),
            listen: vec![([192, 0, 2, 1], 6443).into()],
            balance: "maglev".to_owned(),
            forward: "nat".to_owned(),
            backends: vec![BackendStatus {
                name: "master-1".to_owned(),
                address: ([10, 0, 0, 1], 6443).into(),
                discovered: false,
                state: BackendState::Ready,
                weight: 1,
                active_flows: 2,
                total_flows: 3,
                check: CheckStatus { code: "L7OK".to_owned(), http_status: Some(200), ..Default::default() },
            }],
            selection: String::new(),
            flags: Vec::new(),
            discovery: None,
        }],
        ..Status::default()
    }
}

/// A daemon whose controller answers at once.
fn start() -> Daemon {
    start_with(|request| match request {
        Request::Status(answer) => drop(answer.send(status())),
        Request::Alive(answer) => drop(answer.send(Alive { alive: true, reasons: Vec::new() })),
        Request::Unload(answer) => drop(answer.send(Err("the map is busy".to_owned()))),
        Request::Reload(_, answer) => {
            drop(answer.send(Err(Refusal::new(RefusalKind::Configuration, "line 7 is wrong"))));
        }
        Request::SetState(order, caller, answer) => drop(answer.send(ordered(&order.backend, caller))),
        Request::SetWeight(order, caller, answer) => drop(answer.send(ordered(&order.backend, caller))),
        Request::Kill(order, _, answer) => {
            drop(answer.send(Ok(Killed { flows: order.backend.map_or(0, |backend| backend.len() as u64) })));
        }
        Request::Flows(filter, from, answer) => drop(answer.send(flows(&filter, from))),
        Request::Events(answer) => drop(answer.send(Events::default())),
    })
}

/// Knows one backend, `master-1`, and says who asked.
fn ordered(backend: &str, caller: Caller) -> Result<Ordered, Refusal> {
    if backend != "master-1" {
        return Err(Refusal::new(RefusalKind::Usage, format!("there is no {backend}")));
    }
    Ok(Ordered { backends: Vec::new(), warnings: vec![caller.to_string()] })
}

/// As many pages of a thousand flows as `min_age` says; the seconds count them.
fn flows(filter: &FlowFilter, from: u64) -> Result<FlowPage, Refusal> {
    if filter.backend.is_some() {
        return Err(Refusal::new(RefusalKind::Usage, "nobody is called that"));
    }
    let flow = |number| Flow {
        client: ([10, 0, 0, 5], 40_000).into(),
        listener: None,
        service: Some("api".to_owned()),
        backend: Some("master-1".to_owned()),
        backend_address: None,
        source: ([10, 0, 0, 100], 1234).into(),
        state: "established".to_owned(),
        answered: true,
        idle_seconds: number,
    };
    let next = (from + 1 < filter.min_age).then_some(from + 1);
    Ok(FlowPage { flows: (from * 1000..(from + 1) * 1000).map(flow).collect(), next })
}

fn start_with(mut handle: impl FnMut(Request) + Send + 'static) -> Daemon {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("run/admin.sock");
    let listener = bind(&path).expect("bound");
    let (sender, mut receiver) = mpsc::channel(4);
    let controller = tokio::spawn(async move {
        while let Some(request) = receiver.recv().await {
            handle(request);
        }
    });
    Daemon { _directory: directory, path, server: tokio::spawn(listener.serve(sender)), controller }
}

impl Daemon {
    fn client(&self) -> Client {
        Client::new(&self.path, DEADLINE)
    }

    /// Sends bytes as they are and reads until the server closes.
    async fn raw(&self, bytes: &[u8]) -> String {
        let exchange = async {
            let mut stream = UnixStream::connect(&self.path).await.expect("connected");
            // The server may close before it has read everything.
            let _ = stream.write_all(bytes).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8_lossy(&answer).into_owned()
        };
        tokio::time::timeout(DEADLINE, exchange).await.expect("the server closes")
    }

    async fn assert_serves(&self) {
        assert_eq!(self.client().status().await.expect("a status"), status());
    }
}

#[tokio::test]
async fn every_question_has_its_answer() {
    let daemon = start();
    daemon.assert_serves().await;
    assert!(daemon.client().alive().await.expect("an answer").alive);
    let refused = daemon.client().unload().await.expect_err("refused").to_string();
    assert_eq!(refused, "the sheave daemon says: the map is busy");
}

fn drain(backend: &str) -> StateOrder {
    StateOrder {
        backend: backend.to_owned(),
        service: None,
        all_services: false,
        state: OrderedState::Drain,
        timeout_seconds: None,
    }
}

#[tokio::test]
async fn orders_are_carried_out_or_refused_with_the_reason() {
    let daemon = start();
    let ordered = daemon.client().set_state(&drain("master-1")).await.expect("done");
    let root = nix::unistd::geteuid().is_root();
    let ourselves = if root { "root".to_owned() } else { format!("user {}", nix::unistd::geteuid()) };
    assert_eq!(ordered.warnings, [ourselves], "the kernel says who asks");
    let refused = daemon.client().set_state(&drain("master-2")).await.expect_err("unknown");
    assert!(refused.is_mistake());
    assert_eq!(refused.to_string(), "the sheave daemon says: there is no master-2");
    let order = KillOrder { backend: Some("master-1".to_owned()), ..KillOrder::default() };
    assert_eq!(daemon.client().kill(&order).await.expect("done"), Killed { flows: 8 });
    let refused = daemon.client().reload().await.expect_err("a wrong file");
    assert!(refused.is_mistake() && refused.to_string().contains("line 7 is wrong"), "{refused}");
    assert!(!daemon.client().unload().await.expect_err("refused").is_mistake(), "the daemon's own trouble");
}

#[tokio::test]
async fn a_list_of_flows_comes_in_pieces_and_may_be_left_early() {
    let daemon = start();
    let client = daemon.client();
    let three_pages = FlowFilter { min_age: 3, ..FlowFilter::default() };
    let mut seen = Vec::new();
    let all = client.flows(&three_pages, |flow| {
        seen.push(flow.idle_seconds);
        Ok(true)
    });
    all.await.expect("listed");
    assert_eq!(seen, (0..3000).collect::<Vec<_>>());

    let mut taken = 0;
    let endless = FlowFilter { min_age: u64::MAX, ..FlowFilter::default() };
    let some = client.flows(&endless, |_| {
        taken += 1;
        Ok(taken < 5000)
    });
    some.await.expect("enough");
    assert_eq!(taken, 5000);

    let nobody = FlowFilter { backend: Some("nobody".to_owned()), ..FlowFilter::default() };
    let refused = daemon.client().flows(&nobody, |_| Ok(true)).await.expect_err("unknown").to_string();
    assert!(refused.contains("nobody is called that"), "{refused}");
    daemon.assert_serves().await;
}

#[tokio::test]
async fn a_list_that_nobody_reads_costs_the_daemon_no_more_than_a_page() {
    let (pages, mut counted) = mpsc::unbounded_channel();
    let daemon = start_with(move |request| match request {
        Request::Flows(filter, from, answer) => {
            let _ = pages.send(from);
            drop(answer.send(flows(&filter, from)));
        }
        Request::Status(answer) => drop(answer.send(status())),
        _ => {}
    });
    let mut lazy = UnixStream::connect(&daemon.path).await.expect("connected");
    lazy.write_all(b"GET /v1/flows?min_age=100000 HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("written");
    // It is asked for as long as the socket takes more, and then no more.
    let mut asked = 0;
    while let Ok(Some(_)) = tokio::time::timeout(Duration::from_secs(1), counted.recv()).await {
        asked += 1;
        assert!(asked < 1000, "pages are made for nobody");
    }
    assert!(asked > 0);
    daemon.assert_serves().await;
}

#[tokio::test]
async fn an_order_that_is_none_is_answered() {
    let daemon = start();
    for (body, status, what) in [
        ("", 400, "EOF"),
        ("{", 400, "EOF"),
        ("[]", 400, "the JSON that is expected"),
        ("{\"backend\": \"a\"}", 400, "missing field `state`"),
        ("{\"backend\": \"a\", \"state\": \"dead\"}", 400, "unknown variant"),
        ("{\"backend\": \"a\", \"state\": \"drain\", \"when\": \"now\"}", 400, "unknown field `when`"),
    ] {
        let request = format!(
            "POST /v1/backends/state HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = daemon.raw(request.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(what),
            "{body}: {answer}"
        );
    }
    let answer = daemon.raw(b"GET /v1/flows?colour=red HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("min_age"), "{answer}");
    daemon.assert_serves().await;
}

#[tokio::test]
async fn an_order_that_is_too_long_or_never_ends_is_given_up() {
    let daemon = start();
    let head = "POST /v1/backends/state HTTP/1.1\r\nHost: a\r\nContent-Length:";
    let long = format!("{head} {}\r\n\r\n{}", 1 << 20, "a".repeat(1 << 17));
    let answer = daemon.raw(long.as_bytes()).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer}");
    let answer = daemon.raw(format!("{head} 100\r\n\r\n{{").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    daemon.assert_serves().await;
}

#[tokio::test]
async fn many_orders_at_once_are_all_answered() {
    let daemon = start();
    let mut orders = tokio::task::JoinSet::new();
    for number in 0..200 {
        let client = daemon.client();
        orders.spawn(
            async move { (number, client.set_state(&drain(&format!("master-{}", number % 2))).await) },
        );
    }
    for (number, result) in orders.join_all().await {
        assert_eq!(result.is_ok(), number % 2 == 1, "{number}: {result:?}");
    }
}

#[tokio::test]
async fn the_socket_may_be_a_groups_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = bind(&directory.path().join("admin.sock")).expect("bound");
    let error = listener.share_with("no-such-group-here").expect_err("unknown").to_string();
    assert!(error.contains("groupadd --system no-such-group-here"), "{error}");
    // Root may give it to any group, everybody else to a group of his own.
    let own = nix::unistd::Group::from_gid(nix::unistd::getegid()).expect("readable").expect("has a name");
    listener.share_with(&own.name).expect("shared");
}

#[tokio::test]
async fn the_json_is_the_documented_one() {
    let daemon = start();
    let answer = daemon.raw(b"GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let json: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(
        json["services"],
        serde_json::json!([{
            "name": "api", "listen": ["192.0.2.1:6443"], "balance": "maglev", "forward": "nat",
            "backends": [{
                "name": "master-1", "address": "10.0.0.1:6443", "discovered": false, "state": "ready", "weight": 1,
                "active_flows": 2, "total_flows": 3,
                "check": {"code": "L7OK", "http_status": 200, "duration_ms": null, "detail": "", "failed": [], "last_change": null,
                          "certificate_days": null, "credential_days": null}
            }],
            "selection": "", "flags": [], "discovery": null
        }])
    );
}

#[tokio::test]
async fn the_socket_is_roots_and_its_directory_everybodys_to_see() {
    let daemon = start();
    let mode =
        |path: &std::path::Path| std::fs::metadata(path).expect("it is there").permissions().mode() & 0o7777;
    assert_eq!(mode(&daemon.path), 0o660);
    assert_eq!(mode(daemon.path.parent().expect("a directory")), 0o755);
}

#[tokio::test]
async fn a_second_daemon_is_told_who_owns_the_socket() {
    let daemon = start();
    let error = bind(&daemon.path).expect_err("in use").to_string();
    let expected = format!("another sheave is running (process {})", std::process::id());
    assert!(error.starts_with(&expected), "{error}");
    daemon.assert_serves().await;
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    assert!(path.exists(), "a socket file outlives its socket");
    let client = Client::new(&path, DEADLINE);
    assert!(client.status().await.expect_err("dead").is_no_daemon());

    let listener = bind(&path).expect("replaced");
    assert!(path.exists());
    drop(listener);
    assert!(!path.exists(), "the file goes with its owner");
}

#[test]
fn of_daemons_that_start_together_one_wins() {
    const RACERS: usize = 4;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    for _ in 0..50 {
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a dead socket to fight for"));
        let start = std::sync::Barrier::new(RACERS);
        let race = || {
            start.wait();
            bind(&path)
        };
        let results: Vec<_> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..RACERS).map(|_| scope.spawn(race)).collect();
            racers.into_iter().map(|racer| racer.join().expect("no panic")).collect()
        });
        let told = |result: &Result<_, BindError>| matches!(result, Err(BindError::InUse { .. }));
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        assert_eq!(results.iter().filter(|result| told(result)).count(), RACERS - 1, "{results:?}");
    }
}

#[test]
fn another_owners_file_is_left_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    std::fs::write(&path, "precious").expect("written");
    let error = bind(&path).expect_err("not a socket").to_string();
    assert!(error.contains("exists and is not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).expect("still there"), "precious");

    std::fs::remove_file(&path).expect("removed");
    let listener = bind(&path).expect("bound");
    std::fs::remove_file(&path).expect("taken away");
    let successor = bind(&path).expect("bound again");
    let inode = std::fs::metadata(&path).expect("there").ino();
    drop(listener);
    assert_eq!(std::fs::metadata(&path).expect("still there").ino(), inode);
    drop(successor);
}

#[tokio::test]
async fn no_daemon_says_what_to_do() {
    let directory = tempfile::tempdir().expect("a directory");
    let client = Client::new(&directory.path().join("none.sock"), DEADLINE);
    let error = client.status().await.expect_err("nobody there");
    assert!(error.is_no_daemon());
    let message = error.to_string();
    assert!(message.contains("systemctl start sheave") && message.contains("sheave run"), "{message}");
}

#[tokio::test]
async fn what_is_not_there_says_what_is() {
    let daemon = start();
    let answer = daemon.raw(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("/v1/status"), "{answer}");
    let answer = daemon.raw(b"GET /v1/unload HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: POST"), "{answer}");
}

#[tokio::test]
async fn garbage_hurts_nobody() {
    let daemon = start();
    for garbage in [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"\r\n\r\n\r\n", b"show stat\n\n", &[0xff; 4096]] {
        let answer = daemon.raw(garbage).await;
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    daemon.assert_serves().await;
}

#[tokio::test]
async fn a_huge_request_is_cut_off() {
    let daemon = start();
    let header = format!("GET /v1/status HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    let answer = daemon.raw(header.as_bytes()).await;
    assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    let body =
        format!("POST /v1/status HTTP/1.1\r\nContent-Length: {}\r\n\r\n{}", 1 << 30, "a".repeat(1 << 20));
    let answer = daemon.raw(body.as_bytes()).await;
    assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    daemon.assert_serves().await;
}

#[tokio::test]
async fn slow_clients_lose_their_place() {
    let daemon = start();
    let mut slow = Vec::new();
    // More than are served at once.
    for _ in 0..40 {
        let mut stream = UnixStream::connect(&daemon.path).await.expect("connected");
        stream.write_all(b"GET /v1/sta").await.expect("written");
        slow.push(stream);
    }
    daemon.assert_serves().await;
}

#[tokio::test]
async fn a_controller_that_hangs_is_not_alive() {
    let mut kept = Vec::new();
    let daemon = start_with(move |request| kept.push(request));
    let alive = daemon.client().alive().await.expect("an answer");
    assert!(!alive.alive);
    assert!(alive.reasons[0].contains("the daemon hangs"), "{alive:?}");
    let error = daemon.client().status().await.expect_err("no answer").to_string();
    assert!(error.contains("the daemon hangs"), "{error}");
}

#[tokio::test]
async fn the_server_ends_with_the_controller() {
    let daemon = start();
    daemon.assert_serves().await;
    daemon.controller.abort();
    let ended = tokio::time::timeout(DEADLINE, daemon.server).await.expect("it ends");
    ended.expect("no panic").expect("no error");
    assert!(!daemon.path.exists());
}

#[tokio::test]
async fn what_is_no_daemon_of_ours_is_said_to_be_strange() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    let listener = tokio::net::UnixListener::bind(&path).expect("bound");
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        let _ = stream.write_all(b"220 mail.example.com ESMTP\r\n").await;
    });
    let error = Client::new(&path, DEADLINE).status().await.expect_err("not HTTP").to_string();
    assert!(error.contains("is not this version of sheave"), "{error}");
    server.await.expect("no panic");
}

#[tokio::test]
async fn a_silent_daemon_is_given_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    let _listener = tokio::net::UnixListener::bind(&path).expect("bound");
    let error =
        Client::new(&path, Duration::from_millis(50)).status().await.expect_err("silence").to_string();
    assert!(error.contains("did not answer within 50ms"), "{error}");
}
