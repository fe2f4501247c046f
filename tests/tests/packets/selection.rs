//! Which backend a new flow gets, and that an old one keeps its own.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
};

use lb_common::outcome::Outcome;
use lb_tests::packets::{Flow, Frame, Ip, Processor, Seen, Shape, World};

fn assert_stay(world: &mut World, flows: &[Flow]) {
    for flow in flows {
        let seen = world.run(&flow.from_client().bytes()).seen();
        assert_eq!((seen.source, seen.destination), (flow.snat, world.ip.backend(flow.backend)));
        assert_eq!(world.run(&flow.from_backend().bytes()).outcome, Outcome::Replied);
    }
}

#[test]
fn a_flip_moves_new_flows_and_no_old_one() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let mut flows: Vec<_> = (0..30).map(|number| world.establish(ip.client(number))).collect();
        for (round, selected) in [&[1, 2][..], &[3], &[2, 3], &[1], &[1, 2, 3]].into_iter().enumerate() {
            world.select(0, selected);
            assert_stay(&mut world, &flows);
            for number in 0..10 {
                let flow = world.establish(ip.client(100 * (round as u32 + 1) + number));
                assert!(selected.contains(&flow.backend), "{flow:?} but selected are {selected:?}");
                flows.push(flow);
            }
        }
        assert_stay(&mut world, &flows);
    }
}

#[test]
fn while_selections_flip_no_new_flow_is_lost_and_no_old_one_moves() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flows: Vec<_> = (0..20).map(|number| world.establish(ip.client(number))).collect();
        let processor = world.processor();
        let over = AtomicBool::new(false);
        let opened = std::thread::scope(|scope| {
            let traffic = scope.spawn(|| traffic(&processor, ip, &flows, &over));
            for selected in [&[1, 2][..], &[3], &[2, 3], &[1]].into_iter().cycle().take(40) {
                world.select(0, selected);
            }
            over.store(true, Ordering::Relaxed);
            traffic.join().unwrap()
        });
        println!("{ip:?}: {opened} flows were opened during 40 flips");
        assert_eq!(world.slots().len(), flows.len() + opened);
    }
}

/// Packets of old flows and SYNs of new ones, until it is over; how many were opened.
fn traffic(processor: &Processor, ip: Ip, flows: &[Flow], over: &AtomicBool) -> usize {
    let backends = [1, 2, 3].map(|id| ip.backend(id));
    let mut opened = 0;
    for flow in flows.iter().cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
        let sent = processor.run(&flow.from_client().bytes()).expect("an old flow's packet is forwarded");
        assert_eq!(Seen::parse(&sent).unwrap().destination, ip.backend(flow.backend));
        // With more the table would no longer be nearly empty, and not every SYN find a slot.
        if opened == 15_000 {
            continue;
        }
        let syn = Frame::syn(ip.client(1000 + opened as u32), ip.listener());
        let sent = processor.run(&syn.bytes()).expect("somebody is selected at any time");
        assert!(backends.contains(&Seen::parse(&sent).unwrap().destination));
        opened += 1;
    }
    opened
}

#[test]
fn with_nobody_selected_new_flows_are_refused_and_old_ones_go_on() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flows: Vec<_> = (0..20).map(|number| world.establish(ip.client(number))).collect();
        world.select(0, &[]);
        assert_stay(&mut world, &flows);
        let syn = Frame::syn(ip.client(99), ip.listener()).bytes();
        assert_eq!(world.run(&syn).outcome, Outcome::RefusedNoBackend);
        assert_eq!(world.slots().len(), flows.len());
        world.select(0, &[2]);
        assert_eq!(world.run(&syn).seen().destination, ip.backend(2));
        assert_stay(&mut world, &flows);
    }
}

#[test]
fn every_backend_gets_its_share_and_its_flows_are_counted() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let mut flows = [0u64; 4];
        for number in 0..300 {
            flows[usize::from(world.open(ip.client(number), ip.listener()).backend)] += 1;
        }
        // A hundred each, give or take five deviations.
        assert!(flows[1..].iter().all(|count| (60..=140).contains(count)), "{flows:?}");
        for id in 1..=3 {
            assert_eq!(world.dataplane.total_flows(id).unwrap(), flows[usize::from(id)]);
        }
    }
}

#[test]
fn a_tuple_has_the_same_backend_on_every_load_balancer() {
    for ip in Ip::BOTH {
        let [mut one, mut other] = [(); 2].map(|()| World::new(ip));
        other.select(0, &[2]);
        other.select(0, &[3, 2, 1]);
        for number in 0..50 {
            let flows = [&mut one, &mut other].map(|world| world.open(ip.client(number), ip.listener()));
            assert_eq!(flows[0], flows[1]);
        }
    }
}

#[test]
fn services_select_for_themselves() {
    for ip in Ip::BOTH {
        let second = SocketAddr::new(ip.vip(0), 9345);
        let mut world =
            World::build(&Shape { listeners: vec![(ip.listener(), 0), (second, 1)], ..Shape::new(ip) });
        world.select(0, &[1]);
        world.select(1, &[2]);
        for number in 0..10 {
            assert_eq!(world.open(ip.client(number), ip.listener()).backend, 1);
            assert_eq!(world.open(ip.client(number), second).backend, 2);
        }
        world.select(0, &[]);
        assert_eq!(world.open(ip.client(50), second).backend, 2);
    }
}
