//! The laboratory itself, without sheave: what the other tests stand on.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    fs,
    net::{IpAddr, UdpSocket},
    process::Command,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request,
    client::conn::http2::{self, SendRequest},
    header::AUTHORIZATION,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lb_tests::{
    cluster::{Cluster, Router, Shape},
    lab::{Host, Lab, capture, capture::Capture, eventually},
    load,
    pattern::Checker,
    stub::{
        AnonymousMode, Door, Health, TOKEN,
        credentials::{provider, roots},
    },
};
use rustls::ClientConfig;
use tokio::{net::TcpStream, task::JoinHandle};
use tokio_rustls::TlsConnector;

/// What curl prints for a request: protocol, status, body.
fn ask(command: &mut Command) -> (String, String, String) {
    let output = command.args(["--write-out", "\n%{http_version} %{http_code}"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, facts) = text.rsplit_once('\n').unwrap();
    let (version, status) = facts.split_once(' ').unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (version.to_owned(), status.to_owned(), body.to_owned())
}

fn status(command: &mut Command) -> String {
    ask(command).1
}

fn namespaces_of(prefix: &str) -> usize {
    let entries = fs::read_dir("/run/netns").unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(prefix)).count()
}

/// The addresses under which a client reaches the first apiserver directly.
fn direct(cluster: &Cluster) -> [IpAddr; 2] {
    cluster.vips().map(|vip| cluster.apiservers[0].host.address(vip).unwrap())
}

fn addresses(host: &Host) -> [IpAddr; 2] {
    let link = host.link().unwrap();
    [link.v4.into(), link.v6.into()]
}

/// Sends a datagram from one host to an address of another, and waits a moment for it.
fn reach(from: &Host, to: &Host, address: IpAddr) -> anyhow::Result<()> {
    let receiver = to.in_namespace(|| UdpSocket::bind((address, 0)))??;
    receiver.set_read_timeout(Some(Duration::from_millis(300)))?;
    let target = receiver.local_addr()?;
    let unspecified: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    from.in_namespace(|| UdpSocket::bind((unspecified, 0))?.send_to(b"hello", target))??;
    receiver.recv(&mut [0; 8])?;
    Ok(())
}

#[test]
fn hosts_reach_each_other_and_two_labs_do_not_meet() {
    let (one, other) = (Lab::new().unwrap(), Lab::new().unwrap());
    for lab in [&one, &other] {
        let segment = lab.segment(1).unwrap();
        let (mut left, mut right) = (lab.host("left").unwrap(), lab.host("right").unwrap());
        lab.plug(&mut left, segment, 1).unwrap();
        lab.plug(&mut right, segment, 2).unwrap();
        let require_reached = || {
            for address in addresses(&right) {
                eventually(Duration::from_secs(30), "it is reached", || reach(&left, &right, address))
                    .unwrap();
            }
        };
        require_reached();
        right.cut_off().unwrap();
        for address in addresses(&right) {
            reach(&left, &right, address).unwrap_err();
        }
        right.reconnect().unwrap();
        require_reached();
        lab.unplug(&right).unwrap();
        reach(&left, &right, right.link().unwrap().v4.into()).unwrap_err();
        lab.replug(&right).unwrap();
        require_reached();
        assert_eq!(namespaces_of(lab.prefix()), 3, "with all its hosts still there");
    }
}

#[test]
fn a_lab_leaves_nothing_behind_when_a_test_panics() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let panicked = std::thread::spawn(move || {
        let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
        let process = {
            let mut sleep = cluster.client.command("sleep");
            sleep.arg("600");
            cluster.client.start("sleep", sleep).unwrap()
        };
        sender
            .send((cluster.lab.prefix().to_owned(), cluster.lab.directory().to_owned(), process.pid()))
            .unwrap();
        panic!("on purpose");
    })
    .join();
    assert!(panicked.is_err());
    let (prefix, directory, pid) = receiver.recv().unwrap();
    assert_eq!(namespaces_of(&prefix), 0);
    assert!(!directory.exists());
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
}

#[test]
fn what_a_killed_run_left_is_swept() {
    // A run that has ended. Its number is its own: no other test makes a namespace of this name.
    let mut run = Command::new("true").spawn().unwrap();
    run.wait().unwrap();
    let name = format!("sh{}-0-left", run.id());
    // Other tests sweep as well: it may be gone before `ip` has finished with it.
    let added = Command::new("ip").args(["netns", "add", &name]).output().unwrap();
    let _lab = Lab::new().unwrap();
    assert_eq!(namespaces_of(&name), 0, "{added:?}");
}

#[test]
fn a_stub_answers_by_credential_as_the_real_server_does() {
    let mut cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let health = cluster.authority.client("health", &[]).unwrap();
    let masters = cluster.authority.client("admin", &["system:masters"]).unwrap();
    let foreign_directory = cluster.lab.directory().join("foreign");
    let foreign =
        lb_tests::lab::authority::Authority::new(&foreign_directory).unwrap().client("x", &[]).unwrap();
    for address in direct(&cluster) {
        for protocol in ["--http1.1", "--http2"] {
            let request = |path: &str| {
                let mut curl = cluster.curl(address, path);
                curl.arg(protocol);
                curl
            };
            let version = if protocol == "--http2" { "2" } else { "1.1" };
            assert_eq!(ask(&mut request("/readyz")), (version.to_owned(), "200".to_owned(), "ok".to_owned()));
            assert_eq!(status(&mut request("/readyz?verbose")), "200");
            assert_eq!(status(&mut request("/readyz/etcd")), "403");
            assert_eq!(status(request("/readyz").args(["--header", "Authorization: Bearer wrong"])), "401");
            let token = format!("Authorization: Bearer {TOKEN}");
            assert_eq!(status(request("/api").args(["--header", &token])), "200");
            for (identity, path, expected) in [
                (&health, "/readyz", "200"),
                (&health, "/readyz/etcd", "403"),
                (&masters, "/readyz/etcd", "200"),
                (&masters, "/readyz/nonsense", "404"),
                (&foreign, "/readyz", "401"),
            ] {
                let mut curl = request(path);
                curl.arg("--cert").arg(&identity.certificate).arg("--key").arg(&identity.key);
                assert_eq!(status(&mut curl), expected, "{path} with {identity:?}");
            }
        }
    }
    let apiserver = &mut cluster.apiservers[0];
    apiserver.stub.kill().unwrap();
    apiserver.stub.set_anonymous(AnonymousMode::Off);
    apiserver.start().unwrap();
    let [address, _] = direct(&cluster);
    let (_, code, body) = ask(&mut cluster.curl(address, "/readyz"));
    assert_eq!((code.as_str(), body.len()), ("401", 157));
}

/// A client's HTTP/2 connection to a stub.
struct Http2 {
    sender: SendRequest<Empty<Bytes>>,
    /// Ends when the connection does.
    driver: JoinHandle<hyper::Result<()>>,
    token: Option<&'static str>,
}

impl Http2 {
    async fn connect(
        cluster: &Cluster,
        address: IpAddr,
        token: Option<&'static str>,
    ) -> anyhow::Result<Self> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(&cluster.ca_file())?)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let tcp = TcpStream::connect((address, 6443)).await?;
        let tls = TlsConnector::from(Arc::new(config)).connect(address.into(), tcp).await?;
        let (sender, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await?;
        Ok(Self { sender, driver: tokio::spawn(driver), token })
    }

    async fn ask(&mut self) -> anyhow::Result<Bytes> {
        let mut request = Request::get("https://kubernetes/readyz");
        if let Some(token) = self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let answer = self.sender.send_request(request.body(Empty::new())?).await?;
        Ok(answer.into_body().collect().await?.to_bytes())
    }
}

#[test]
fn an_unauthenticated_http2_connection_ends_after_each_answer() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let [address, _] = direct(&cluster);
    let story = async {
        let mut anonymous = Http2::connect(&cluster, address, None).await.unwrap();
        assert_eq!(anonymous.ask().await.unwrap(), "ok");
        let _how = (&mut anonymous.driver).await.unwrap();
        anonymous.ask().await.unwrap_err();

        // What ends a connection is sent with the answer: a client that asks often enough has seen it.
        let mut known = Http2::connect(&cluster, address, Some(TOKEN)).await.unwrap();
        for _ in 0..5 {
            assert_eq!(known.ask().await.unwrap(), "ok");
        }
        assert!(!known.driver.is_finished());

        let mut http1 = cluster.client_of(address).unwrap().connect().await.unwrap();
        for _ in 0..5 {
            let answer = http1.get("/readyz").await.unwrap().into_body().collect().await.unwrap();
            assert_eq!(answer.to_bytes(), "ok");
        }
    };
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let in_time = async { tokio::time::timeout(Duration::from_secs(60), story).await };
    cluster.client.in_namespace(|| runtime().block_on(in_time)).unwrap().unwrap();
}

#[test]
fn a_stub_falls_ill_on_demand_and_recovers() {
    let mut cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let [address, _] = direct(&cluster);
    let readyz = || status(&mut cluster.curl(address, "/readyz"));
    let fails = |limit: &str| {
        let output = cluster.curl(address, "/readyz").args(["--max-time", limit]).output().unwrap();
        output.status.code()
    };
    let stub = &cluster.apiservers[0].stub;
    for code in [200, 401, 403, 500] {
        stub.health(Health::Status(code)).unwrap();
        assert_eq!(readyz(), code.to_string());
    }
    stub.health(Health::EtcdHang).unwrap();
    assert_eq!(fails("1"), Some(28), "curl: operation timed out");
    assert_eq!(readyz(), "500");
    stub.health(Health::Never).unwrap();
    assert_eq!(fails("1"), Some(28));
    stub.health(Health::Late(Duration::from_millis(300))).unwrap();
    assert_eq!(readyz(), "200");
    stub.health(Health::Normal).unwrap();
    let host = &cluster.apiservers[0].host;
    stub.door(host, Door::Refusing).unwrap();
    assert_eq!(fails("5"), Some(7), "curl: failed to connect");
    stub.door(host, Door::TlsSilent).unwrap();
    assert_eq!(fails("1"), Some(28));
    stub.door(host, Door::Open).unwrap();
    assert_eq!(readyz(), "200");
    assert_eq!(stub.connections().unwrap().values().sum::<u64>(), 0, "checks are not counted");
    let client = cluster.client_of(address).unwrap();
    load::sequential(&cluster.client, &client, 3).unwrap().require_all(3).unwrap();
    assert_eq!(stub.connections().unwrap()[&cluster.client.address(address).unwrap()], 3);

    cluster.apiservers[0].stub.freeze().unwrap();
    let frozen = cluster.curl(address, "/readyz").args(["--max-time", "1"]).output().unwrap();
    assert_eq!(frozen.status.code(), Some(28));
    cluster.apiservers[0].stub.thaw().unwrap();
    assert_eq!(status(&mut cluster.curl(address, "/readyz")), "200");
    cluster.apiservers[0].stub.kill().unwrap();
    let killed = cluster.curl(address, "/readyz").output().unwrap();
    assert_eq!(killed.status.code(), Some(7));
}

#[test]
fn a_stub_that_is_told_to_stop_says_so_first_and_finishes_its_watches() {
    let mut cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let [address, _] = direct(&cluster);
    cluster.apiservers[0].stub.kill().unwrap();
    cluster.apiservers[0].stub.set_shutdown_delay(Duration::from_secs(10));
    cluster.apiservers[0].start().unwrap();
    let mut watching = cluster.curl(address, "/watch");
    watching.arg("--no-buffer");
    let mut watch = cluster.client.start("watch", watching).unwrap();
    let limit = Duration::from_secs(30);
    let events = |watch: &lb_tests::lab::Process, least: usize| {
        eventually(limit, "the watch goes on", || {
            let count = watch.log().lines().count();
            anyhow::ensure!(count >= least, "{count} events");
            Ok(())
        })
        .unwrap();
    };
    events(&watch, 1);
    let process = cluster.apiservers[0].stub.process().unwrap();
    process.signal(lb_tests::lab::process::Signal::SIGTERM).unwrap();
    let body = eventually(limit, "readyz is 500", || {
        let (_, code, body) = ask(&mut cluster.curl(address, "/readyz"));
        anyhow::ensure!(code == "500", "{code}");
        Ok(body)
    })
    .unwrap();
    assert!(body.contains("[-]shutdown failed"), "{body}");
    assert_eq!(ask(&mut cluster.curl(address, "/name")).2, "api-1", "everything else is still served");
    eventually(limit, "connections are refused", || {
        let output = cluster.curl(address, "/name").output()?;
        anyhow::ensure!(output.status.code() == Some(7), "{}", output.status);
        Ok(())
    })
    .unwrap();
    events(&watch, watch.log().lines().count() + 3);
    watch.kill().unwrap();
    let ended = cluster.apiservers[0].stub.process().unwrap().wait(limit).unwrap();
    assert!(ended.success());
}

#[test]
fn data_arrives_byte_for_byte_over_every_shape() {
    let narrow = Router { mtu: Some(1300), ..Router::default() };
    let masquerading = Router { masquerades: true, ..Router::default() };
    for shape in [Shape::OneArm, Shape::Routed(narrow), Shape::Routed(masquerading)] {
        let cluster = Cluster::start(shape, 1).unwrap();
        for address in direct(&cluster) {
            let file = cluster.lab.directory().join("received");
            let mut curl = cluster.curl(address, "/bytes/5000000");
            lb_tests::lab::run(curl.arg("--output").arg(&file)).unwrap();
            let mut checker = Checker::default();
            checker.check(&fs::read(&file).unwrap()).unwrap();
            assert_eq!(checker.position(), 5_000_000);
        }
        let connections = cluster.apiservers[0].stub.connections().unwrap();
        if shape == Shape::Routed(masquerading) {
            let router = cluster.router.as_ref().unwrap().links()[1].clone();
            assert!(
                connections.contains_key(&router.v4.into()) && connections.contains_key(&router.v6.into())
            );
        }
        if shape == Shape::Routed(narrow) {
            let router = cluster.router.as_ref().unwrap();
            assert!(router.counter("Icmp", "OutDestUnreachs").unwrap() > 0, "the path was narrow");
        }
    }
}

#[test]
fn many_connections_at_once_and_open_together() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let [address, _] = direct(&cluster);
    let client = cluster.client_of(address).unwrap();
    load::parallel(&cluster.client, &client, 200).unwrap().require_all(200).unwrap();
    let mut crowd = load::Crowd::open(&cluster.client, &client, 100).unwrap();
    crowd.ask_names().require_all(100).unwrap();
    cluster.apiservers[0].host.cut_off().unwrap();
    cluster.apiservers[0].host.reconnect().unwrap();
    crowd.ask_names().require_all(100).unwrap();
}

#[test]
fn a_raw_frame_arrives_as_it_was_sent() {
    let lab = Lab::new().unwrap();
    let segment = lab.segment(1).unwrap();
    let (mut left, mut right) = (lab.host("left").unwrap(), lab.host("right").unwrap());
    lab.plug(&mut left, segment, 1).unwrap();
    lab.plug(&mut right, segment, 2).unwrap();
    let (sending, receiving) =
        (Capture::open(&left, "eth0").unwrap(), Capture::open(&right, "eth0").unwrap());
    // An ethertype for local experiments (IEEE 802): nobody answers it.
    let frame = [
        capture::mac(&right, "eth0").unwrap().as_slice(),
        &capture::mac(&left, "eth0").unwrap(),
        &[0x88, 0xb5],
        &[0x5a; 46],
    ]
    .concat();
    sending.send(&frame).unwrap();
    let received = receiving.receive(Duration::from_secs(30), |frame| frame[12..14] == [0x88, 0xb5]).unwrap();
    assert_eq!(received, frame);
}

#[test]
fn the_counter_of_own_resets_counts() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    cluster.require_no_own_resets().unwrap();
    // Nobody listens on the VIP, and no sheave stands in front of it: the kernel refuses.
    for vip in cluster.vips() {
        cluster.curl(vip, "/").output().unwrap();
    }
    assert_eq!(cluster.own_resets().unwrap(), 2);
    assert!(cluster.lb.counter("Tcp", "OutRsts").unwrap() >= 2);
}
