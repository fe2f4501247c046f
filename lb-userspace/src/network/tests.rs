use std::{
    net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    time::Duration,
};

use super::{
    testing::{Peer, eventually, in_namespace, ip},
    *,
};

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A host with a router and a server at the other end of `lan`.
fn lan() -> Peer {
    let peer = Peer::behind("lan", "far");
    ip("addr add 10.1.0.1/24 dev lan");
    ip("-6 addr add fd01::1/64 dev lan nodad");
    peer.ip("addr add 10.1.0.2/24 dev far");
    peer.ip("-6 addr add fd01::2/64 dev far nodad");
    peer.ip("link set far address 02:00:00:00:00:02");
    peer
}

#[test]
fn routes_tell_neighbours_from_routers_and_this_host() {
    in_namespace(async || {
        let _peer = lan();
        ip("route add 10.2.0.0/16 via 10.1.0.2");
        ip("route add 10.3.0.0/16 via inet6 fd01::2 dev lan");
        ip("route add unreachable 10.4.0.0/16");
        let (network, _changes) = Network::open().await.unwrap();
        let lan = network.interface_named("lan").unwrap().index;

        let route = network.route_to(address("10.1.0.9")).await.unwrap();
        let source = Some(address("10.1.0.1"));
        assert_eq!(route, Route { interface: lan, gateway: None, preferred_source: source, local: false });
        let routed = network.route_to(address("10.2.3.4")).await.unwrap();
        assert_eq!(routed.gateway, Some(address("10.1.0.2")));
        let other_family = network.route_to(address("10.3.3.4")).await.unwrap();
        assert_eq!(other_family.gateway, Some(address("fd01::2")));
        assert!(network.route_to(address("10.1.0.1")).await.unwrap().local);
        // The kernel adds the route of an IPv6 address a moment after the address.
        eventually("it is local", async || network.route_to(address("fd01::1")).await.unwrap().local).await;
        for nowhere in ["10.4.0.1", "10.9.0.1", "fd09::1"] {
            let error = network.route_to(address(nowhere)).await.unwrap_err();
            assert!(matches!(error, NetworkError::NoRoute { .. }), "{error}");
        }
        assert_eq!(network.interface_carrying(address("fd01::1")), Some(lan));
        assert_eq!(network.interface_carrying(address("fd01::2")), None);
    });
}

#[test]
fn a_packet_goes_by_the_rules_about_its_source() {
    in_namespace(async || {
        let _peer = lan();
        let other = Peer::behind("wan", "away");
        ip("addr add 10.8.0.1/24 dev wan");
        ip("-6 addr add fd08::1/64 dev wan nodad");
        other.ip("addr add 10.8.0.2/24 dev away");
        ip("addr add 10.1.0.140/32 dev lan");
        ip("-6 addr add fd01::140/128 dev lan nodad");
        ip("route add default via 10.1.0.2");
        ip("-6 route add default via fd01::2");
        ip("rule add from 10.1.0.140 lookup 100");
        ip("-6 rule add from fd01::140 lookup 100");
        ip("route add default via 10.8.0.2 table 100");
        ip("-6 route add default via fd08::2 dev wan table 100");
        let (network, _changes) = Network::open().await.unwrap();
        for (vip, ours, away, theirs, far) in [
            ("10.1.0.140", "10.1.0.1", "10.8.0.2", "10.1.0.2", "10.9.0.1"),
            ("fd01::140", "fd01::1", "fd08::2", "fd01::2", "fd09::1"),
        ] {
            let gateway = async |source: Option<&str>| {
                network.route_from(source.map(address), address(far)).await.unwrap().gateway.unwrap()
            };
            eventually("the rule counts", async || gateway(Some(vip)).await == address(away)).await;
            assert_eq!(gateway(Some(ours)).await, address(theirs));
            assert_eq!(gateway(None).await, address(theirs));
            let hop = network.next_hop(Some(address(vip)), address(far)).await.unwrap();
            assert_eq!(hop.neighbour, address(away));
            assert_eq!(hop.port.index, network.interface_named("wan").unwrap().index);
        }
        // A VIP that is on another host, and the source of the other family.
        for source in ["10.1.0.141", "fd01::140"] {
            let route = network.route_from(Some(address(source)), address("10.9.0.1")).await.unwrap();
            assert_eq!(route.gateway, Some(address("10.1.0.2")));
        }
        ip("rule add from 10.1.0.140 to 10.9.0.0/16 prohibit pref 10");
        let error = network.route_from(Some(address("10.1.0.140")), address("10.9.0.1")).await.unwrap_err();
        assert!(error.to_string().contains("from 10.1.0.140"), "{error}");
    });
}

#[test]
fn an_unknown_next_hop_is_asked_for_and_reported_when_it_answers() {
    in_namespace(async || {
        let peer = lan();
        ip("route add 10.2.0.0/16 via 10.1.0.2");
        let (network, mut changes) = Network::open().await.unwrap();
        let answered = async |destination| {
            let hop = network.next_hop(None, address(destination)).await.unwrap();
            hop.mac == Some([2, 0, 0, 0, 0, 2])
        };
        network.next_hop(None, address("10.2.3.4")).await.unwrap();
        eventually("a neighbour change", async || changes.recv().await == Some(Change::Neighbours)).await;
        eventually("the router's answer", async || answered("10.2.3.4").await).await;
        eventually("the server's answer", async || answered("fd01::2").await).await;
        // A router is replaced by one with another MAC address, and says so.
        peer.ip("link set far address 02:00:00:00:00:03");
        ip("neigh replace 10.1.0.2 lladdr 02:00:00:00:00:03 nud reachable dev lan");
        eventually("the change", async || {
            network.next_hop(None, address("10.2.3.4")).await.unwrap().mac == Some([2, 0, 0, 0, 0, 3])
        })
        .await;
        let error = network.next_hop(None, address("10.1.0.1")).await.unwrap_err();
        assert!(matches!(error, NetworkError::Local(_)));
    });
}

#[test]
fn a_stale_neighbour_is_probed_again_and_a_permanent_one_left_alone() {
    in_namespace(async || {
        let _peer = lan();
        std::fs::write("/proc/sys/net/ipv4/neigh/lan/delay_first_probe_time", "0").unwrap();
        ip("neigh add 10.1.0.2 lladdr 02:00:00:00:00:02 nud stale dev lan");
        ip("neigh add 10.1.0.3 lladdr 02:00:00:00:00:03 nud permanent dev lan");
        let (network, _changes) = Network::open().await.unwrap();
        eventually("the stale neighbour is reachable", async || {
            network.keep_fresh([address("10.1.0.2"), address("10.1.0.3")]).await;
            ip("neigh show 10.1.0.2 dev lan").contains("REACHABLE")
        })
        .await;
        assert!(ip("neigh show 10.1.0.3 dev lan").contains("PERMANENT"));
        assert_eq!(network.next_hop(None, address("10.1.0.3")).await.unwrap().mac, Some([2, 0, 0, 0, 0, 3]));
    });
}

#[test]
fn addresses_and_links_are_followed() {
    in_namespace(async || {
        let _peer = lan();
        let (network, mut changes) = Network::open().await.unwrap();
        ip("addr add 10.1.0.50/32 dev lan");
        eventually("a change of addresses", async || changes.recv().await == Some(Change::Addresses)).await;
        assert!(network.interface_carrying(address("10.1.0.50")).is_some());
        ip("addr del 10.1.0.50/32 dev lan");
        eventually("it is gone", async || network.interface_carrying(address("10.1.0.50")).is_none()).await;

        ip("link add br0 type bridge");
        ip("link set lan master br0");
        eventually("the bridge is its master", async || {
            let bridge = network.interface_named("br0");
            bridge.is_ok_and(|it| network.interface_named("lan").unwrap().master == Some(it.index))
        })
        .await;
        ip("link set lan nomaster");
        eventually("it has left the bridge and still exists", async || {
            network.interface_named("lan").unwrap().master.is_none()
        })
        .await;
        assert_eq!(network.interface_named("br0").unwrap().kind, Kind::Bridge);
        let lan = network.interface_named("lan").unwrap();
        assert_eq!((lan.kind, lan.driver.as_deref(), lan.carrier), (Kind::Veth, Some("veth"), true));
        ip("link del lan");
        eventually("it is gone", async || network.interface_named("lan").is_err()).await;
    });
}

#[test]
fn lost_notifications_are_made_up_for() {
    in_namespace(async || {
        let _peer = lan();
        let (network, mut changes) = Network::open().await.unwrap();
        // This thread does not run the follower meanwhile: far more notifications than its socket holds.
        let batch: String =
            (0..12_000).map(|n| format!("route add 10.{}.{}.0/24 dev lan\n", 2 + n / 250, n % 250)).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), batch).unwrap();
        ip(&format!("-batch {}", file.path().display()));
        ip("addr add 10.1.0.50/32 dev lan");
        eventually("the last news", async || {
            tokio::time::timeout(Duration::from_millis(10), changes.recv()).await.ok();
            network.interface_carrying(address("10.1.0.50")).is_some()
        })
        .await;
    });
}

#[test]
fn every_port_a_host_socket_holds_on_an_address_is_used() {
    in_namespace(async || {
        let _peer = lan();
        let on = |ip: &str| TcpListener::bind((address(ip), 0)).unwrap();
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let (ours, wildcard, other) = (on("10.1.0.1"), on("0.0.0.0"), on("127.0.0.1"));
        let (ours_v6, wildcard_v6) = (on("fd01::1"), on("::"));
        let client = TcpStream::connect(ours.local_addr().unwrap()).unwrap();
        let used = used_tcp_ports(&[address("10.1.0.1"), address("fd01::1")]).await.unwrap();
        for listener in [&ours, &wildcard, &ours_v6, &wildcard_v6] {
            assert!(used.contains(&port(listener)), "{listener:?} not in {used:?}");
        }
        assert!(used.contains(&client.local_addr().unwrap().port()));
        assert!(!used.contains(&port(&other)), "loopback is no address of ours");

        let v4_only = used_tcp_ports(&[IpAddr::V4(Ipv4Addr::new(10, 1, 0, 1))]).await.unwrap();
        assert!(v4_only.contains(&port(&wildcard_v6)), "an IPv6 wildcard listener answers IPv4 too");
        assert!(!v4_only.contains(&port(&ours_v6)));
        assert!(
            used_tcp_ports(&[IpAddr::V6(Ipv6Addr::LOCALHOST)]).await.unwrap().contains(&port(&wildcard_v6))
        );
    });
}

#[test]
fn offloads_are_switched_off_and_on_again() {
    in_namespace(async || {
        let _peer = lan();
        let state = tempfile::tempdir().unwrap();
        let generic = offloads::harmful("lan", true).unwrap();
        assert!(generic.contains(&"rx-checksum".to_owned()), "{generic:?}");
        let off = offloads::turn_off("lan", true, state.path()).unwrap().off;
        assert!(off.contains(&"rx-checksum".to_owned()), "{off:?}");
        assert!(!offloads::harmful("lan", true).unwrap().contains(&"rx-checksum".to_owned()));
        assert_eq!(offloads::turn_off("lan", true, state.path()).unwrap().off, [""; 0], "nothing left to do");

        assert_eq!(offloads::restore(state.path()).unwrap(), ["lan"]);
        assert_eq!(offloads::harmful("lan", true).unwrap(), generic);
        assert_eq!(offloads::restore(state.path()).unwrap(), [""; 0], "restored once");
    });
}
