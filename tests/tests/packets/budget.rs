//! What the program may cost: the verifier's work, memory, refusals. Each figure is printed.

use aya::programs::Xdp;
use aya::programs::{TestRun as _, TestRunOptions};
use lb_common::{
    bench::{PACKET, Plan, call, direction},
    layout::{Numbers4, OverflowMarks, ReturnHops, SETS_PER_ADDRESS, Set4, Set6, WAYS},
    meta::{Kind, Meta},
    outcome::Outcome,
};
use lb_tests::packets::{Change, Frame, Ip, Shape, World};
use lb_userspace::dataplane::{BENCH_OBJECT, OBJECT};
use object::{Object as _, ObjectSection as _};

/// The kernel gives up at a million, but the time it takes is a daemon's start.
const VERIFIED_INSTRUCTIONS: u32 = 80_000;

#[test]
fn the_verifier_has_little_to_do() {
    let mut world = World::new(Ip::V4);
    let info = world.dataplane.program("sheave").unwrap().info().unwrap();
    let verified = info.verified_instruction_count().expect("the kernel says so since 5.16");
    println!("verified instructions: {verified}");
    assert!(verified < VERIFIED_INSTRUCTIONS);
}

#[test]
fn the_objects_have_types_and_no_path_that_panics() {
    for data in [OBJECT, BENCH_OBJECT] {
        let object = object::File::parse(data).unwrap();
        let names: Vec<_> =
            object.sections().filter_map(|section| section.name().ok().map(str::to_owned)).collect();
        assert!(names.iter().any(|name| name == ".BTF"), "{names:?}");
        assert!(names.iter().any(|name| name == "xdp.frags"), "{names:?}");
        assert!(!names.iter().any(|name| name.starts_with(".text.unlikely")), "{names:?}");
    }
}

#[test]
fn a_flow_slot_fits_its_memory() {
    for (ip, limit) in [(Ip::V4, 24.0), (Ip::V6, 48.0)] {
        let snat = (0..3).map(|host| ip.address(2, 10 + host)).collect::<Vec<_>>();
        let mut world = World::build(&Shape { snat: snat.clone(), ..Shape::new(ip) });
        let slots = snat.len() * SETS_PER_ADDRESS as usize * WAYS;
        let dataplane = &mut world.dataplane;
        let bytes = match ip {
            Ip::V4 => {
                dataplane.map::<Set4>("FLOW4").unwrap().bytes()
                    + dataplane.map::<Numbers4>("NUMBERS4").unwrap().bytes()
            }
            Ip::V6 => {
                dataplane.map::<Set6>("FLOW6").unwrap().bytes()
                    + dataplane.map::<ReturnHops>("RETURN_HOP6").unwrap().bytes()
                    + dataplane.map::<OverflowMarks>("OVERFLOW6").unwrap().bytes()
                    + dataplane.map::<u64>("BLOCKED").unwrap().bytes()
            }
        };
        let each = bytes as f64 / slots as f64;
        println!("{ip:?}: {each:.2} bytes of maps for each of {slots} flow slots");
        assert!(each <= limit);
    }
}

/// Slots of one address with the default range of ports, the listener's left out.
const SLOTS: usize = 64_512 - 1;
const FILL: usize = SLOTS * 8 / 10;
/// One in so many of the flows in the table is replaced in a round.
const PART: usize = 50;
/// Rounds: every flow is replaced about once and a half.
const ROUNDS: usize = 75;

#[test]
fn at_eighty_per_cent_fill_fewer_than_one_new_flow_in_a_thousand_is_refused() {
    for ip in Ip::BOTH {
        let mut world = World::around(BENCH_OBJECT, &Shape::new(ip));
        world.dataplane.program("bench").unwrap().load().unwrap();
        let mut next = 0;
        let refused = offer(&mut world, &mut next, FILL as u32);
        println!("{ip:?}: {refused} of {FILL} new flows refused on the way to 80 %");
        assert!(refused * 1000 < FILL as u64);

        // Flows come and go for a while, at random: that fills sets less evenly than a first filling.
        let mut random = 1u64;
        let (mut offered, mut refused) = (0, 0);
        for _ in 0..ROUNDS {
            for slot in world.slots() {
                random = lb_common::hash::split_mix(random);
                let word = if random.is_multiple_of(PART as u64) {
                    Meta::FREE
                } else {
                    slot.meta.become_kind(Kind::Established)
                };
                world.change(&slot, Change::Word(word));
            }
            let missing = (FILL - world.slots().len()) as u32;
            refused += offer(&mut world, &mut next, missing);
            offered += u64::from(missing);
        }
        println!("{ip:?}: {refused} of {offered} new flows refused at 80 % fill");
        assert!(offered > FILL as u64 && refused * 1000 < offered);
    }
}

/// Sends the SYNs of so many new flows; how many found no slot.
fn offer(world: &mut World, next: &mut u32, flows: u32) -> u64 {
    let ip = world.ip;
    let syn = Frame {
        payload: vec![0; PACKET - 14 - ip.header() - 20],
        tcp_options: Vec::new(),
        ..Frame::syn(ip.client(0), ip.listener())
    };
    let packet = syn.bytes();
    let mut words = [0; PACKET / 8];
    for (word, bytes) in words.iter_mut().zip(packet.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().unwrap());
    }
    let plan = Plan {
        call: call::PROGRAM,
        direction: direction::FORWARD,
        ipv6: u32::from(ip == Ip::V6),
        flow_mask: u32::MAX,
        next: 0,
        first: *next,
        snat: 0,
        round: 0,
        reserved: 0,
        backend: 0,
        packet: words,
    };
    *next += flows;
    world.forget_counts(Outcome::TableFull);
    world.dataplane.map("PLAN").unwrap().write(0, plan);
    let program: &mut Xdp = world.dataplane.program("bench").unwrap();
    let options = TestRunOptions { data_in: Some(&packet), repeat: flows, ..TestRunOptions::default() };
    program.test_run(options).unwrap();
    world.forget_counts(Outcome::TableFull)
}
