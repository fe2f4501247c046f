use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use super::*;
use crate::{
    network::testing::{Peer, eventually, in_namespace, ip},
    vip::{Follower, Presence, leftovers, remove_leftovers},
};

const THEIRS: Mac = [2, 0, 0, 0, 0, 2];

fn vips() -> [IpAddr; 2] {
    ["10.1.0.140".parse().unwrap(), "fd01::140".parse().unwrap()]
}

/// Two hosts on a link, in the VIPs' subnets.
fn lan() -> Peer {
    let peer = Peer::behind("lan", "far");
    ip("addr add 10.1.0.1/24 dev lan");
    ip("-6 addr add fd01::1/64 dev lan nodad");
    peer.ip("link set far address 02:00:00:00:00:02");
    peer.ip("addr add 10.1.0.2/24 dev far");
    peer.ip("-6 addr add fd01::2/64 dev far nodad");
    peer
}

/// Hears on the peer's side what is said about an address.
fn ears(peer: &Peer, address: IpAddr) -> Link {
    peer.run(|| {
        let index = nix::net::if_::if_nametoindex("far").unwrap();
        Link::open(index, THEIRS, address).unwrap()
    })
}

async fn mac_of(network: &Network, name: &str) -> Mac {
    network.interface_named(name).unwrap().mac.unwrap()
}

#[test]
fn the_vip_is_asked_for_added_and_announced_and_taken_away() {
    in_namespace(async || {
        let peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let ears = vips().map(|vip| ears(&peer, vip));
        let owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();

        let ours = mac_of(&network, "lan").await;
        for link in &ears {
            let mut statements = Vec::new();
            while statements.iter().filter(|statement| **statement == Statement::Claim).count() < 3 {
                let heard = link.hear().await.unwrap();
                assert_eq!(heard.mac, ours);
                statements.push(heard.statement);
            }
            let probes = statements.iter().take_while(|statement| **statement == Statement::Probe).count();
            assert_eq!(probes, 3, "asked first: {statements:?}");
        }
        let addresses = ip("addr show dev lan");
        assert!(addresses.contains("inet 10.1.0.140/32 scope global lan"), "{addresses}");
        assert!(
            addresses.contains("inet6 fd01::140/128 scope global nodad deprecated noprefixroute"),
            "{addresses}"
        );
        for (peer, source) in [("10.1.0.2", "src 10.1.0.1"), ("fd01::2", "src fd01::1 ")] {
            let route = ip(&format!("route get {peer}"));
            assert!(route.contains(source), "the VIP must never be chosen as a source: {route}");
        }
        assert_eq!(owner.rivals(), []);
        owner.release().await.unwrap();
        let addresses = ip("addr show dev lan");
        assert!(!addresses.contains("140"), "{addresses}");
        assert!(addresses.contains("10.1.0.1/24"), "only ours: {addresses}");
        assert_eq!(leftovers(state.path()).unwrap(), []);
    });
}

#[test]
fn a_vip_that_somebody_answers_for_is_refused_and_nothing_is_added() {
    for taken in vips() {
        in_namespace(async move || {
            let peer = lan();
            peer.ip(&format!("addr add {taken} dev far{}", if taken.is_ipv6() { " nodad" } else { "" }));
            let state = tempfile::tempdir().unwrap();
            let (network, _changes) = Network::open().await.unwrap();
            let error = Owner::acquire(&network, vips(), state.path()).await.unwrap_err();
            assert!(matches!(error, VipError::InUse { vip, mac: THEIRS, .. } if vip == taken), "{error}");
            assert!(error.to_string().contains("02:00:00:00:00:02 answers for it on lan"), "{error}");
            assert!(!ip("addr show dev lan").contains("140"));
            assert_eq!(leftovers(state.path()).unwrap(), []);
        });
    }
}

#[test]
fn two_owners_that_start_together_both_notice() {
    in_namespace(async || {
        let peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let [vip, _] = vips();
        let other = ears(&peer, vip);
        let (result, _) = tokio::join!(Owner::acquire(&network, [vip], state.path()), async {
            other.hear().await.unwrap();
            other.probe().unwrap();
        });
        assert!(matches!(result.unwrap_err(), VipError::InUse { mac: THEIRS, .. }));
    });
}

/// Collects what is logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_rival_is_logged_once_and_remembered() {
    in_namespace(async || {
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let rivals = vips().map(|vip| ears(&peer, vip));
        let owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        for _ in 0..5 {
            rivals.iter().for_each(|rival| rival.announce().unwrap());
        }
        let expected = vips().map(|vip| Rival { vip, mac: THEIRS });
        eventually("both rivals are known", async || owner.rivals() == expected).await;
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        for vip in vips() {
            let line = format!("02:00:00:00:00:02 on lan says it has the VIP {vip}, which is ours");
            assert_eq!(log.matches(&line).count(), 1, "{log}");
        }
    });
}

#[test]
fn a_killed_owner_leaves_a_record_by_which_the_next_one_adopts_and_unload_removes() {
    in_namespace(async || {
        let _peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        drop(Owner::acquire(&network, vips(), state.path()).await.unwrap());
        let placed = vips().map(|vip| Placed { vip, interface: "lan".to_owned() });
        assert_eq!(leftovers(state.path()).unwrap(), placed, "still there, as after a kill");
        eventually("they are seen", async || {
            vips().iter().all(|vip| network.interface_carrying(*vip).is_some())
        })
        .await;

        let next = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        assert_eq!(next.placed(), placed, "adopted");
        drop(next);
        assert_eq!(remove_leftovers(&network, state.path()).await.unwrap(), placed);
        assert!(!ip("addr show dev lan").contains("140"));
        assert_eq!(remove_leftovers(&network, state.path()).await.unwrap(), []);
    });
}

#[test]
fn an_address_that_somebody_else_put_here_is_left_alone() {
    in_namespace(async || {
        let _peer = lan();
        let state = tempfile::tempdir().unwrap();
        ip("addr add 10.1.0.140/32 dev lan");
        let (network, _changes) = Network::open().await.unwrap();
        // A record of another boot says nothing about this one.
        let old = r#"{"boot":"another","placed":[{"vip":"10.1.0.140","interface":"lan"}]}"#;
        std::fs::write(state.path().join("vips.json"), old).unwrap();
        let owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        owner.release().await.unwrap();
        let addresses = ip("addr show dev lan");
        assert!(addresses.contains("10.1.0.140/32"), "{addresses}");
        assert!(!addresses.contains("fd01::140"), "{addresses}");
    });
}

#[test]
fn a_vip_outside_every_subnet_is_refused_with_advice() {
    in_namespace(async || {
        let _peer = lan();
        ip("route add default via 10.1.0.2");
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let vip = "10.9.0.140".parse().unwrap();
        let error = Owner::acquire(&network, [vip], state.path()).await.unwrap_err();
        assert!(matches!(error, VipError::NoSubnet { .. }), "{error}");
        assert!(error.to_string().contains("give an interface an address in the VIP's subnet"), "{error}");
    });
}

#[test]
fn a_follower_reports_what_others_do_and_does_nothing() {
    in_namespace(async || {
        let _peer = lan();
        let (network, mut changes) = Network::open().await.unwrap();
        let [vip, _] = vips();
        let mut follower = Follower::new([vip]);
        assert_eq!(follower.look(&network).await, [Presence::Elsewhere { vip }]);
        assert_eq!(follower.look(&network).await, []);
        let interface = network.interface_named("lan").unwrap().index;
        for (command, expected) in
            [("add", Presence::Here { vip, interface }), ("del", Presence::Elsewhere { vip })]
        {
            ip(&format!("addr {command} {vip}/32 dev lan"));
            eventually("a change of addresses", async || {
                changes.recv().await.unwrap();
                follower.look(&network).await == [expected]
            })
            .await;
        }
        let lo = network.interface_named("lo").unwrap().index;
        for (command, expected) in
            [("add", Presence::Here { vip, interface: lo }), ("del", Presence::Elsewhere { vip })]
        {
            ip(&format!("route {command} to local {vip} dev lo"));
            eventually("a change of the local table", async || {
                changes.recv().await.unwrap();
                follower.look(&network).await == [expected]
            })
            .await;
        }
    });
}

/// The kernel answers the request to add an address before its notification has been read.
#[test]
fn what_was_added_is_here_although_no_notification_has_come() {
    in_namespace(async || {
        let _peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let interface = network.interface_named("lan").unwrap().index;
        let mut follower = Follower::new(vips());
        network.stop_following();
        let owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        for vip in vips() {
            assert_eq!(network.interface_carrying(vip), Some(interface), "status says so at once");
        }
        assert_eq!(follower.look(&network).await, vips().map(|vip| Presence::Here { vip, interface }));
        owner.release().await.unwrap();
    });
}

#[test]
fn a_vip_is_gone_only_when_the_kernel_says_so() {
    in_namespace(async || {
        let _peer = lan();
        let (network, _changes) = Network::open().await.unwrap();
        let interface = network.interface_named("lan").unwrap().index;
        let [vip, _] = vips();
        network.stop_following();
        ip(&format!("addr add {vip}/32 dev lan"));
        assert_eq!(network.interface_carrying(vip), None, "not heard of yet");
        let mut follower = Follower::new([vip]);
        assert_eq!(follower.look(&network).await, [Presence::Here { vip, interface }]);
        ip(&format!("addr del {vip}/32 dev lan"));
        assert_eq!(follower.look(&network).await, [], "nobody has heard that it is gone");
        network.reread_addresses().await.unwrap();
        assert_eq!(follower.look(&network).await, [Presence::Elsewhere { vip }]);
    });
}

#[test]
fn a_vip_that_went_with_its_interface_is_put_back_when_one_of_that_name_is_here_and_served() {
    in_namespace(async || {
        let peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let mut owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        ip("link del lan");
        drop(peer);
        eventually("it is gone", async || network.interface_named("lan").is_err()).await;
        for vip in vips() {
            assert_eq!(owner.lose(vip).as_deref(), Some("lan"));
        }
        assert_eq!(owner.put_back(|_| true).await, [], "there is no interface");

        let peer = lan();
        let ears = vips().map(|vip| ears(&peer, vip));
        eventually("it is back", async || network.interface_named("lan").is_ok()).await;
        for _ in 0..10 {
            assert_eq!(owner.put_back(|_| false).await, [], "no program is on it");
            sleep(Duration::from_millis(100)).await;
        }
        let mut back = Vec::new();
        eventually("both are back", async || {
            back.extend(owner.put_back(|_| true).await);
            back.len() == 2
        })
        .await;
        back.sort();
        assert_eq!(back, vips().map(|vip| Placed { vip, interface: "lan".to_owned() }));
        for (vip, link) in vips().iter().zip(&ears) {
            assert!(ip("addr show dev lan").contains(&vip.to_string()));
            assert_eq!(link.hear().await.unwrap().statement, Statement::Probe, "asked first");
            eventually("it is announced", async || link.hear().await.unwrap().statement == Statement::Claim)
                .await;
        }
        assert_eq!(owner.put_back(|_| true).await, []);
        owner.release().await.unwrap();
        assert!(!ip("addr show dev lan").contains("140"));
    });
}

#[test]
fn a_lost_vip_that_another_host_has_meanwhile_is_not_put_back() {
    in_namespace(async || {
        let peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let mut owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        ip("link del lan");
        drop(peer);
        eventually("it is gone", async || network.interface_named("lan").is_err()).await;
        let lost = vips().map(|vip| owner.lose(vip));
        assert!(lost.iter().all(Option::is_some));
        let peer = lan();
        let [taken, free] = vips();
        peer.ip(&format!("addr add {taken} dev far"));
        let mut back = Vec::new();
        eventually("the other one is back", async || {
            back.extend(owner.put_back(|_| true).await);
            !back.is_empty()
        })
        .await;
        sleep(PROBE_INTERVAL * PROBES + PROBE_WAIT).await;
        back.extend(owner.put_back(|_| true).await);
        assert_eq!(back, [Placed { vip: free, interface: "lan".to_owned() }]);
        assert!(!ip("addr show dev lan").contains(&taken.to_string()));
    });
}

#[test]
fn an_ipv6_vip_is_put_back_on_an_interface_that_was_down_for_a_moment() {
    in_namespace(async || {
        let _peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let mut owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        let [_, vip] = vips();
        ip("link set lan down");
        ip("link set lan up");
        eventually("it is gone", async || network.interface_carrying(vip).is_none()).await;
        assert_eq!(owner.lose(vip).as_deref(), Some("lan"));
        ip("-6 addr add fd01::1/64 dev lan nodad");
        eventually("it is back", async || !owner.put_back(|_| true).await.is_empty()).await;
        assert!(ip("addr show dev lan").contains(&format!("{vip}/128")));
        owner.release().await.unwrap();
    });
}

#[test]
fn a_vip_that_was_taken_off_an_interface_is_not_put_back() {
    in_namespace(async || {
        let _peer = lan();
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let mut owner = Owner::acquire(&network, vips(), state.path()).await.unwrap();
        let [vip, _] = vips();
        // IPv4 addresses stay on an interface that is set down.
        ip("link set lan down");
        ip("link set lan up");
        let index = network.interface_named("lan").unwrap().index;
        eventually("it was down", async || network.downs(index) == 1).await;
        assert_eq!(owner.put_back(|_| true).await, []);
        ip(&format!("addr del {vip}/32 dev lan"));
        network.reread_addresses().await.unwrap();
        assert_eq!(owner.lose(vip), None);
        for _ in 0..10 {
            assert_eq!(owner.put_back(|_| true).await, []);
            sleep(Duration::from_millis(100)).await;
        }
        assert!(!ip("addr show dev lan").contains(&vip.to_string()));
    });
}

/// As a network card that starts anew when its offloads are switched.
#[test]
fn a_carrier_that_is_gone_for_a_moment_is_waited_for() {
    in_namespace(async || {
        let peer = lan();
        peer.ip("link set far down");
        let state = tempfile::tempdir().unwrap();
        let (network, _changes) = Network::open().await.unwrap();
        let [vip, _] = vips();
        let index = network.interface_named("lan").unwrap().index;
        eventually("it has no carrier", async || !network.interface_now(index).await.unwrap().carrier).await;
        let comes_back = async {
            sleep(Duration::from_millis(200)).await;
            peer.ip("link set far up");
        };
        let (owner, ()) = tokio::join!(Owner::acquire(&network, [vip], state.path()), comes_back);
        let owner = owner.unwrap();
        assert!(ip("addr show dev lan").contains("10.1.0.140/32"));
        owner.release().await.unwrap();
    });
}
