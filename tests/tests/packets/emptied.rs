//! The tests here use programs and maps again that others are done with. None may see what another has left.

use std::time::Duration;

use lb_tests::packets::{Frame, Ip, RST, Shape, World};
use lb_userspace::dataplane::{Dataplane, IdlePolicy, OBJECT, SourceShares};

#[test]
fn emptied_maps_are_those_that_the_kernel_makes() {
    for ip in Ip::BOTH {
        let shape = Shape::new(ip);
        let fresh = Dataplane::load(OBJECT, &shape.settings()).unwrap();
        let used = used(&shape);
        let touched = differences(&fresh, &used);
        let common = [
            "ALLOW",
            "BACKEND_FLOWS",
            "BLACK_BOX",
            "BLOCKED",
            "CONTROL",
            "COUNTER",
            "NEXT_HOP",
            "SELECTION",
            "SOURCES",
        ];
        let tables = if ip == Ip::V4 { ["FLOW4", "NUMBERS4"] } else { ["FLOW6", "RETURN_HOP6"] };
        for map in common.into_iter().chain(tables) {
            assert!(touched.contains(&map.to_owned()), "{map} is not used: {touched:?}");
        }
        let emptied = used.emptied(&shape.settings()).unwrap();
        assert_eq!(differences(&fresh, &emptied), [""; 0]);
    }
}

/// One in which many things have happened.
fn used(shape: &Shape) -> Dataplane {
    let mut world = World::build(shape);
    let ip = shape.ip;
    let allowed = format!("{}/{}", ip.client(0).ip(), if ip == Ip::V4 { 16 } else { 64 });
    world.dataplane.set_allowed(0, &[allowed.parse().unwrap()]).unwrap();
    world.dataplane.set_source_shares(SourceShares { slots: Some(25), half_open: None });
    for number in 0..100 {
        let flow = world.establish(ip.client(number));
        if number % 3 == 0 {
            world.run(&Frame { flags: RST, ..flow.from_client() }.bytes());
        }
    }
    world.dataplane.count_sources().unwrap();
    world.dataplane.block(8080);
    world.select(0, &[2]);
    world.dataplane.reap(&[IdlePolicy { timeout: Duration::from_secs(60), tell: false }]).unwrap();
    world.dataplane.into_inner()
}

/// The maps that do not hold the same. The kernel's time is another each time.
fn differences(one: &Dataplane, other: &Dataplane) -> Vec<String> {
    let (one, other) = (one.contents().unwrap(), other.contents().unwrap());
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    let differ = one.iter().filter(|(name, words)| **name != "CLOCK" && other[*name] != **words);
    differ.map(|(name, _)| (*name).to_owned()).collect()
}
