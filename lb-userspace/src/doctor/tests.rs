use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls_pki_types::{PrivateKeyDer, pem::PemObject};

use super::*;
use crate::{
    config::{
        Admin, Backend, Balance, Cgroup, Check, CheckKind, Dataplane, Forward, OnDead, OnIdle, Service, Vip,
        VipMode, XdpMode,
    },
    hook::Place,
    network::testing::{Peer, in_namespace, ip, until_state},
};

/// Two hosts: this one, and a backend.
fn lan() -> Peer {
    let peer = Peer::behind("lan", "far");
    ip("addr add 10.1.0.1/24 dev lan");
    peer.ip("addr add 10.1.0.151/24 dev far");
    peer
}

fn config(listen: &str, backends: &[SocketAddr]) -> Config {
    let backend = |address: &SocketAddr| Backend {
        name: address.to_string(),
        address: *address,
        weight: 1,
        host: None,
        discovered: false,
    };
    Config {
        dataplane: Dataplane {
            interfaces: Interfaces::Auto,
            backend_interfaces: None,
            xdp_mode: XdpMode::Auto,
            snat_addresses: vec![],
            snat_addresses_max: 4,
            snat_ports: None,
            hash_key_file: None,
            source_share: Some(Dataplane::SOURCE_SHARE),
            half_open_share: None,
            path_mtu_floor: Dataplane::PATH_MTU_FLOOR,
            state_dir: "/nonexistent".into(),
            pin_dir: "/nonexistent".into(),
            cgroup: Cgroup::Auto,
        },
        vip: Vip { mode: VipMode::Follow },
        admin: Admin { socket: "/nonexistent".into(), group: None, listen: None },
        services: vec![Service {
            name: "api".to_owned(),
            listen: vec![listen.parse().unwrap()],
            balance: Balance::Maglev,
            forward: Forward::Nat,
            idle_timeout: Duration::from_secs(3600),
            allow: vec![],
            on_dead: OnDead::Reset,
            on_idle: OnIdle::Reset,
            reset_after: Duration::from_secs(5),
            reset_rate: 2000,
            drain_timeout: None,
            pods: false,
            check: Check {
                kind: CheckKind::Https,
                path: "/readyz".to_owned(),
                expect: vec![200..=200],
                interval: Duration::from_secs(1),
                fast_interval: Duration::from_millis(200),
                connect_timeout: Duration::from_secs(1),
                timeout: Duration::from_secs(5),
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
            },
            backends: backends.iter().map(backend).collect(),
            named_backends: vec![],
            discover: None,
        }],
    }
}

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The only finding about a subject that says this.
#[track_caller]
fn expect(findings: &[Finding], level: Level, subject: &str, what: &str) -> Finding {
    let found: Vec<_> =
        findings.iter().filter(|it| it.subject.starts_with(subject) && it.what.contains(what)).collect();
    let [finding] = found.as_slice() else { panic!("{what:?} is not there once: {findings:#?}") };
    assert_eq!(finding.level, level, "{finding:?}");
    (*finding).clone()
}

#[test]
fn a_vip_of_the_local_table_is_here() {
    in_namespace(async || {
        let _peer = lan();
        ip("route add to local 10.1.0.140 dev lo");
        let findings = examine(Some(&config("10.1.0.140:6443", &[socket("10.1.0.151:6443")]))).await;
        expect(&findings, Level::Ok, "VIP 10.1.0.140", "is here, on lo, by a route");
    });
}

#[test]
fn a_host_in_order_has_no_failures() {
    in_namespace(async || {
        let _peer = lan();
        ip("addr add 10.1.0.140/32 dev lan");
        let findings = examine(Some(&config("10.1.0.140:6443", &[socket("10.1.0.151:6443")]))).await;
        expect(&findings, Level::Ok, "VIP 10.1.0.140", "is here, on lan");
        expect(&findings, Level::Ok, "backend api/10.1.0.151:6443", "next hop 10.1.0.151 is at");
        expect(&findings, Level::Ok, "interface lan", "driver veth: native XDP");
        let failures: Vec<_> = findings.iter().filter(|finding| finding.level == Level::Failure).collect();
        assert!(failures.is_empty(), "{failures:#?}");
    });
}

#[test]
fn every_failure_says_what_to_do() {
    in_namespace(async || {
        let peer = lan();
        peer.ip("addr add 10.1.0.141/32 dev far");
        let backends = ["10.1.0.152:6443", "10.9.0.1:6443", "10.1.0.1:7443"].map(socket);
        let mut config = config("10.1.0.140:6443", &backends);
        config.services[0].listen.push(socket("10.1.0.141:6443"));
        let findings = examine(Some(&config)).await;
        expect(&findings, Level::Failure, "VIP 10.1.0.140", "is nowhere");
        expect(&findings, Level::Note, "VIP 10.1.0.141", "is on another host now");
        expect(&findings, Level::Failure, "backend api/10.1.0.152:6443", "does not answer on the link");
        expect(&findings, Level::Failure, "backend api/10.9.0.1:6443", "no route to 10.9.0.1");
        expect(&findings, Level::Failure, "backend api/10.1.0.1:7443", "is this host, on port 7443");
        for finding in findings.iter().filter(|finding| finding.level >= Level::Warning) {
            assert!(finding.fix.is_some(), "{finding:?}");
        }
        config.vip.mode = VipMode::Own;
        let findings = examine(Some(&config)).await;
        expect(&findings, Level::Ok, "VIP 10.1.0.140", "is free");
        expect(&findings, Level::Failure, "VIP 10.1.0.141", "answers for it");
    });
}

/// A cgroup that nobody is in.
struct Elsewhere(std::path::PathBuf);

impl Elsewhere {
    fn below(hierarchy: &Place) -> Self {
        let path = hierarchy.path().join(format!("sheave-doctor-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn clients_and_servers_on_this_host_are_named() {
    in_namespace(async || {
        let _peer = lan();
        ip("addr add 10.1.0.140/32 dev lan");
        let server = TcpListener::bind("10.1.0.140:0").unwrap();
        let listener = server.local_addr().unwrap();
        let _client = TcpStream::connect(listener).unwrap();
        let mut client_config = config(&listener.to_string(), &[socket("10.1.0.151:6443")]);
        let findings = examine(Some(&client_config)).await;
        assert!(
            !findings.iter().any(|it| it.subject.starts_with("client")),
            "the hook serves it: {findings:#?}"
        );
        // A cgroup that we are not in.
        let hierarchy = Place::find(&Cgroup::Auto).unwrap().unwrap();
        let elsewhere = Elsewhere::below(&hierarchy);
        client_config.dataplane.cgroup = Cgroup::Directory(elsewhere.0.clone());
        let findings = examine(Some(&client_config)).await;
        let left_out = expect(&findings, Level::Failure, "client", "on this host is a client of 10.1.0.140");
        assert!(left_out.what.contains(&format!("is put on {}", elsewhere.0.display())), "{left_out:?}");
        drop(elsewhere);
        client_config.dataplane.cgroup = Cgroup::None;
        let findings = examine(Some(&client_config)).await;
        let us = format!("(pid {})", std::process::id());
        let client = expect(&findings, Level::Failure, "client", "on this host is a client of 10.1.0.140");
        assert!(client.what.contains(&us) && client.what.contains("connect hook, which cgroup"));
        let shadowed = expect(&findings, Level::Warning, "server", &format!("listens on {listener}"));
        assert!(shadowed.what.contains(&us));

        // A server of its own that is also a backend is reached as before.
        ip("addr del 10.1.0.140/32 dev lan");
        let wildcard = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = wildcard.local_addr().unwrap().port();
        let own = SocketAddr::new("10.1.0.1".parse().unwrap(), port);
        let findings = examine(Some(&config(&format!("10.1.0.140:{port}"), &[own]))).await;
        expect(&findings, Level::Ok, "backend", "is this host: its packets are passed");
        assert!(!findings.iter().any(|finding| finding.subject.starts_with("server")), "{findings:#?}");
    });
}

#[test]
fn a_local_apiserver_that_listens_on_its_own_address_alone_is_a_failure() {
    in_namespace(async || {
        let _peer = lan();
        ip("addr add 10.1.0.140/32 dev lan");
        let own = TcpListener::bind("10.1.0.1:0").unwrap().local_addr().unwrap();
        let vip = SocketAddr::new("10.1.0.140".parse().unwrap(), own.port());
        let config = config(&vip.to_string(), &[own]);
        let findings = examine(Some(&config)).await;
        expect(&findings, Level::Ok, "backend", "is this host: its packets are passed");
        let _server = TcpListener::bind(own).unwrap();
        let findings = examine(Some(&config)).await;
        let refused = expect(&findings, Level::Failure, "backend", &format!("listens on {own} only"));
        assert!(refused.fix.unwrap().contains("--bind-address=0.0.0.0"));
        let _beside = TcpListener::bind(vip).unwrap();
        let findings = examine(Some(&config)).await;
        expect(&findings, Level::Ok, "backend", "is this host: its packets are passed");
    });
}

#[test]
fn what_is_between_clients_and_backends_must_let_the_same_packets_through() {
    in_namespace(async || {
        let clients = lan();
        clients.ip("route add 10.2.0.0/24 via 10.1.0.1");
        let inside = Peer::behind("inside", "rear");
        ip("addr add 10.1.0.140/32 dev lan");
        ip("addr add 10.2.0.1/24 dev inside");
        inside.ip("addr add 10.2.0.151/24 dev rear");
        let config = config("10.1.0.140:6443", &[socket("10.2.0.151:6443"), socket("10.1.0.151:6443")]);
        let narrow = |findings: &[Finding]| {
            findings.iter().filter(|it| it.what.contains("clients come in by lan")).count()
        };
        assert_eq!(narrow(&examine(Some(&config)).await), 0, "both arms are the same");
        ip("link set inside mtu 1400");
        let findings = examine(Some(&config)).await;
        let found = expect(
            &findings,
            Level::Warning,
            "interface inside",
            "has MTU 1400, while clients come in by lan with 1500",
        );
        assert!(found.fix.unwrap().contains("ip link set inside mtu 1500"));
        ip("link set inside mtu 9000");
        assert_eq!(narrow(&examine(Some(&config)).await), 0);
    });
}

#[test]
fn a_link_without_a_peer_and_a_strict_filter_are_named() {
    in_namespace(async || {
        let peer = lan();
        let config = config("10.1.0.140:6443", &[socket("10.1.0.151:6443")]);
        for (set, level) in [("0", None), ("1", Some(Level::Note))] {
            for name in ["all", "lan"] {
                std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), set).unwrap();
            }
            let findings = examine(Some(&config)).await;
            let found = findings.iter().find(|it| it.what.contains("strict reverse path filter"));
            assert_eq!(found.map(|it| it.level), level, "{findings:#?}");
        }

        peer.ip("link set far down");
        until_state("lan", "DOWN");
        let findings = examine(Some(&config)).await;
        let fix = expect(&findings, Level::Failure, "interface lan", "is up and has no carrier").fix.unwrap();
        assert!(!fix.contains("ip link set"), "{fix}");
        ip("link set lan down");
        let findings = examine(Some(&config)).await;
        assert!(findings.iter().all(|it| !it.what.contains("carrier")), "{findings:#?}");
    });
}

#[test]
fn firewall_rules_that_xdp_passes_by_are_listed() {
    in_namespace(async || {
        let _peer = lan();
        let rules = "
            table inet filter {
                chain input {
                    type filter hook input priority 0; policy drop;
                    ct state established accept
                    tcp dport { 22, 6000-6500 } accept
                    tcp dport 22 accept
                    ip saddr 10.1.0.0/24 tcp dport 6443 accept
                    udp dport 6443 accept
                }
            }";
        assert!(Command::new("nft").arg(rules).status().unwrap().success());
        let findings = examine(Some(&config("10.1.0.140:6443", &[socket("10.1.0.151:6443")]))).await;
        expect(&findings, Level::Note, "firewall", "chain inet filter input drops");
        let rules = findings.iter().filter(|it| it.subject == "firewall" && it.level == Level::Warning);
        assert_eq!(rules.count(), 2, "{findings:#?}");
    });
}

/// A server on that host that nobody ever asks for its connections.
fn server(peer: &Peer, address: &str) -> TcpListener {
    let listener = peer.run(|| TcpListener::bind(address)).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

fn far_rule(peer: &Peer, rule: &str) {
    peer.run(|| {
        let chain = "add chain inet far in { type filter hook input priority 0; }";
        let rules = format!("add table inet far; {chain}; flush chain inet far in; {rule}");
        assert!(Command::new("nft").arg(rules).status().unwrap().success());
    });
}

#[test]
fn a_backend_that_drops_or_refuses_the_address_that_flows_leave_from_is_named() {
    in_namespace(async || {
        let peer = lan();
        ip("addr add 10.1.0.140/32 dev lan");
        let (network, _) = Network::open().await.unwrap();
        let accepted = server(&peer, "10.1.0.151:6443");
        let config = config("10.1.0.140:6443", &[socket("10.1.0.151:6443")]);
        let subject = "SNAT address 10.1.0.140";
        let reject = "add rule inet far in ip saddr 10.1.0.140 tcp dport 6443 reject with";
        for (rule, said) in [
            (
                "add rule inet far in ip saddr 10.1.0.140 drop",
                "answers this host's own 10.1.0.1, where checks come from, and not this one (no answer)",
            ),
            (
                &format!("{reject} icmp admin-prohibited"),
                "answers this host's own 10.1.0.1, where checks come from, and not this one (No route to host",
            ),
            (
                &format!("{reject} tcp reset"),
                "accepts this host's own 10.1.0.1, where checks come from, and refuses this one",
            ),
        ] {
            far_rule(&peer, rule);
            let findings = way_back::examine(&network, &config).await;
            let found = expect(&findings, Level::Failure, subject, said);
            assert!(found.what.contains("backend api/10.1.0.151:6443"), "{found:?}");
            assert!(found.fix.unwrap().contains("snat_addresses = [\"10.1.0.1\"]"));
        }
        far_rule(&peer, "add rule inet far in tcp sport < 1024 drop");
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Note, subject, "answers no port below 1024");
        far_rule(&peer, "add rule inet far in tcp dport 6443 drop");
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Note, subject, "no backend answers this host at all");
        far_rule(&peer, "");
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Ok, subject, "is answered by 1 of 1 backends");
        drop(accepted);
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Ok, subject, "is answered by 1 of 1 backends");
    });
}

#[test]
fn a_server_never_hears_of_the_syn_that_tried_the_way_back() {
    in_namespace(async || {
        let peer = lan();
        ip("addr add 10.1.0.140/32 dev lan");
        let server = server(&peer, "10.1.0.151:6443");
        let to = socket("10.1.0.151:6443");
        let heard_of = || server.accept().map(drop).map_err(|error| error.kind());
        // The same port each time: none of them waits in TIME_WAIT.
        let all_but_one = (513..=1023).collect();
        let from = syn::Origin::Reserved(Some("10.1.0.140".parse().unwrap()), &all_but_one);
        // Some may be heard of, or find no answer: while the machine stands still for longer than an ACK is delayed, or than we
        // wait. If an ACK were sent nearly all would be heard of.
        let deadline = Instant::now() + Duration::from_secs(60);
        let (mut accepted, mut unheard) = (0, 0);
        while accepted < 40 {
            assert!(Instant::now() < deadline, "only {accepted} were accepted");
            if syn::send(from, to).await.unwrap() == syn::Answer::Accepted {
                accepted += 1;
                unheard += u32::from(heard_of() == Err(std::io::ErrorKind::WouldBlock));
            }
        }
        assert!(unheard >= 20, "{unheard}");
        let taken = TcpListener::bind("10.1.0.140:512").unwrap();
        assert!(syn::send(from, to).await.unwrap_err().to_string().contains("512-1023 are in use"));
        let all_but_two = (514..=1023).collect();
        let from = syn::Origin::Reserved(Some(taken.local_addr().unwrap().ip()), &all_but_two);
        while syn::send(from, to).await.expect("from the next") != syn::Answer::Accepted {
            assert!(Instant::now() < deadline, "no answer");
        }
    });
}

#[test]
fn without_the_privilege_for_low_ports_the_way_back_is_left_out() {
    in_namespace(async || {
        let peer = lan();
        ip("addr add 10.1.0.140/32 dev lan");
        let _server = server(&peer, "10.1.0.151:6443");
        let config = config("10.1.0.140:6443", &[socket("10.1.0.151:6443")]);
        let (network, _) = Network::open().await.unwrap();
        // Of this thread alone.
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_NET_BIND_SERVICE).unwrap();
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Note, "SNAT address 10.1.0.140", "needs CAP_NET_BIND_SERVICE");
        assert_eq!(findings.len(), 1, "{findings:#?}");
    });
}

#[test]
fn addresses_that_flows_would_leave_from_elsewhere_are_tried_there() {
    in_namespace(async || {
        let peer = lan();
        let (network, _) = Network::open().await.unwrap();
        let _server = server(&peer, "10.1.0.151:6443");
        let mut config = config("10.1.0.140:6443", &[socket("10.1.0.151:6443")]);
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Note, "SNAT address 10.1.0.140", "is not on this host now");
        config.dataplane.snat_addresses = vec!["10.1.0.9".parse().unwrap()];
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Warning, "SNAT address 10.1.0.9", "backends find nobody there");
        ip("addr add 10.1.0.9/24 dev lan");
        let (network, _) = Network::open().await.unwrap();
        let findings = way_back::examine(&network, &config).await;
        expect(&findings, Level::Ok, "SNAT address 10.1.0.9", "is answered by 1 of 1 backends");
    });
}

/// A TLS server on loopback with a certificate for these addresses.
async fn tls_server(names: &[&str]) -> SocketAddr {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(names).unwrap();
    let key = PrivateKeyDer::from_pem_slice(signing_key.serialize_pem().as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let _ = acceptor.accept(connection).await;
        }
    });
    address
}

#[tokio::test]
async fn a_certificate_without_the_vip_is_named_with_the_way_to_add_it() {
    let server = tls_server(&["192.0.2.140", "kubernetes"]).await;
    let findings = certificates::examine(&config("192.0.2.140:6443", &[server])).await;
    expect(&findings, Level::Ok, "certificate of api/", "holds every listener's address");
    expect(&findings, Level::Ok, "certificate of api/", "valid for");

    let findings = certificates::examine(&config("[fd00::140]:6443", &[server])).await;
    let finding = expect(
        &findings,
        Level::Warning,
        "certificate of api/",
        "does not hold the listener's address fd00::140",
    );
    assert!(finding.fix.unwrap().contains("add \"fd00::140\" to apiServer.certSANs"));
}

#[test]
fn findings_are_written_with_lower_case_levels() {
    let finding = warning("firewall", "in the way").fix("nft flush ruleset");
    let json = serde_json::to_string(&finding).unwrap();
    assert_eq!(
        json,
        r#"{"level":"warning","subject":"firewall","what":"in the way","fix":"nft flush ruleset"}"#
    );
}
