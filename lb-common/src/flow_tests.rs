//! Which slot a flow gets: how full the table may be, and in which order slots are used again.

use crate::{
    flow::{
        CANDIDATES, Claimer, Clock, Family, LONG_QUARANTINE, Query, SHORT_QUARANTINE, Slot, V4, V6, claim,
        find,
    },
    hash::split_mix,
    layout::{BUCKETS, Bucket, WAYS},
    memory::Memory,
    meta::{Kind, Meta, NUMBERED, RESET, SYN_ACK},
    outcome::{Counter, Event, Outcome},
};

const SERVICE: u16 = 1;
/// Sets of one SNAT address, ports 1024 to 65535.
const SETS: u32 = 16_128;
const FIRST_SET: u32 = 256;

/// The `number`th of some random, different tuples.
fn query<F: Family>(memory: &Memory, number: u64) -> Query<F::Tuple> {
    let random = split_mix(number);
    let address = if F::NUMBER == 4 { [random & 0xffff_ffff, 0] } else { [random, split_mix(random)] };
    Query::new::<F>(&memory.config, F::tuple(address, (random >> 32) as u16, 1))
}

fn claimer(memory: &Memory, backend: u32) -> Claimer {
    Claimer {
        clock: Clock::read(&memory, &memory.config),
        service: SERVICE.into(),
        backend,
        expected: 0,
        reserved: 0,
    }
}

fn set_meta<F: Family>(memory: &Memory, slot: Slot, meta: Meta) {
    F::meta(F::set(&memory, slot.set).expect("a set"), slot.way).store(meta.0);
}

/// Claims a slot for a flow that is established at once. None: refused.
fn establish<F: Family>(memory: &Memory, query: &Query<F::Tuple>) -> Option<Slot> {
    let claim = claim::<F, _>(&memory, query, &claimer(memory, 1));
    match claim.failure() {
        None => {
            set_meta::<F>(memory, claim.slot(), Meta::new(Kind::Established, 1, 0));
            Some(claim.slot())
        }
        Some(outcome) => {
            assert_eq!(outcome, Outcome::TableFull);
            None
        }
    }
}

/// Which of its tuple's candidates a slot is in.
fn candidate_of<F: Family>(query: &Query<F::Tuple>, slot: Slot) -> u32 {
    (0..CANDIDATES).find(|number| query.candidate(*number) == slot.set).expect("a candidate")
}

fn fill_to_four_fifths<F: Family>(name: &str) {
    const OFFERED: u64 = 200_000;
    let memory = Memory::new(FIRST_SET, SETS, 1);
    let full = SETS as usize * WAYS * 4 / 5;
    let mut flows: Vec<(u64, Slot)> = Vec::new();
    let mut tuples = 0u64..;
    let mut refused_on_the_way = 0;
    while flows.len() < full {
        let tuple = tuples.next().expect("another tuple");
        match establish::<F>(&memory, &query::<F>(&memory, tuple)) {
            Some(slot) => flows.push((tuple, slot)),
            None => refused_on_the_way += 1,
        }
    }
    // Flows come and go, until the table has forgotten how it was filled; then they are counted.
    let mut refused = 0;
    for offer in 0..2 * OFFERED {
        let tuple = tuples.next().expect("another tuple");
        match establish::<F>(&memory, &query::<F>(&memory, tuple)) {
            Some(slot) => {
                let leaving = split_mix(!offer) as usize % flows.len();
                set_meta::<F>(&memory, flows[leaving].1, Meta::FREE);
                flows[leaving] = (tuple, slot);
            }
            None => refused += u64::from(offer >= OFFERED),
        }
    }
    let mut at_candidate = [0u32; CANDIDATES as usize];
    for (tuple, slot) in &flows {
        let query = query::<F>(&memory, *tuple);
        assert_eq!(find::<F, _>(&&memory, &memory.config, &query).slot, *slot, "every flow is found");
        at_candidate[candidate_of::<F>(&query, *slot) as usize] += 1;
    }
    let share = |count: u32| f64::from(count) / flows.len() as f64;
    let near = share(at_candidate[0] + at_candidate[1]);
    let read: f64 = (1u32..).zip(at_candidate).map(|(sets, count)| f64::from(sets) * share(count)).sum();
    let refused = refused as f64 / OFFERED as f64;
    println!(
        "{name}, {} flows in {} slots: {:.3} % of new flows refused ({refused_on_the_way} while filling); \
         {:.0} % of the flows are in their first set, {:.0} % in the first two; a look-up reads {read:.2} sets",
        flows.len(),
        SETS as usize * WAYS,
        100.0 * refused,
        100.0 * share(at_candidate[0]),
        100.0 * near,
    );
    assert!(refused < 0.001, "{refused}");
    assert!(near > 0.75 && read < 2.2, "{near} {read}");
}

#[test]
fn at_four_fifths_fill_fewer_than_one_flow_in_a_thousand_is_refused() {
    fill_to_four_fifths::<V4>("IPv4");
}

#[test]
fn at_four_fifths_fill_fewer_than_one_flow_in_a_thousand_is_refused_ipv6() {
    fill_to_four_fifths::<V6>("IPv6");
}

#[test]
fn a_blocked_port_never_becomes_a_slot() {
    let mut memory = Memory::new(FIRST_SET, 8, 1);
    for (set, blocked) in [(256, 0b0001), (258, 0b1010), (263, 0b1111)] {
        memory.block(set, blocked);
    }
    let mut ports: Vec<u16> = (0..1000)
        .filter_map(|number| establish::<V4>(&memory, &query::<V4>(&memory, number)))
        .map(Slot::port)
        .collect();
    ports.sort_unstable();
    let usable: Vec<u16> = (256u16 * 4..264 * 4)
        .filter(|port| memory.blocked[usize::from(port / 4)] >> (port % 4) & 1 == 0)
        .collect();
    assert_eq!(ports, usable, "every other port once");
}

/// A table of one usable set, whose ways were left behind like this: what, by which backend's flow, how long ago.
fn left_behind(ways: [(Kind, u32, u8, u16); WAYS]) -> Memory {
    let memory = Memory::new(0, 1, 1);
    let now = Clock::read(&&memory, &memory.config).seen;
    for (way, (kind, flags, backend, age)) in ways.into_iter().enumerate() {
        let meta = Meta::new(kind, backend, now.wrapping_sub(age)).with(flags);
        set_meta::<V4>(&memory, Slot { set: 0, way: way as u32 }, meta);
    }
    memory
}

/// The ways that new flows of backend 1 are given, one after the other, each with what was counted for it.
fn given(memory: &Memory) -> Vec<(u32, Option<Event>)> {
    let count = |event| memory.count(SERVICE, Counter::Event(event));
    let mut given = Vec::new();
    for number in 0.. {
        let before = [count(Event::ReusedEarly), count(Event::HalfOpenReclaimed)];
        let Some(slot) = establish::<V4>(memory, &query::<V4>(memory, number)) else {
            break;
        };
        let event = if count(Event::ReusedEarly) > before[0] {
            Some(Event::ReusedEarly)
        } else if count(Event::HalfOpenReclaimed) > before[1] {
            Some(Event::HalfOpenReclaimed)
        } else {
            None
        };
        given.push((slot.way, event));
    }
    given
}

#[test]
fn a_slot_in_its_backends_time_wait_is_used_last() {
    let memory = left_behind([
        (Kind::ClosedByBackend, 0, 1, 5),
        (Kind::ClosedByBackend, 0, 2, 5),
        (Kind::Free, 0, 0, 0),
        (Kind::ClosedByBackend, 0, 1, 9),
    ]);
    let expected = [
        (2, None),
        // Another backend's TIME_WAIT is in nobody's way.
        (1, None),
        // The one that has rested longest.
        (3, Some(Event::ReusedEarly)),
        (0, Some(Event::ReusedEarly)),
    ];
    assert_eq!(given(&memory), expected);
}

#[test]
fn a_slot_that_has_rested_is_as_good_as_new() {
    let memory = left_behind([
        (Kind::ClosedByBackend, 0, 1, LONG_QUARANTINE - 1),
        (Kind::ClosedByBackend, 0, 1, LONG_QUARANTINE),
        (Kind::ClosedByClient, 0, 1, SHORT_QUARANTINE),
        (Kind::ClosedByClient, 0, 1, SHORT_QUARANTINE - 1),
    ]);
    let expected = [(1, None), (2, None), (0, Some(Event::ReusedEarly)), (3, Some(Event::ReusedEarly))];
    assert_eq!(given(&memory), expected);
}

#[test]
fn closed_slots_go_before_handshakes_and_no_established_one_goes() {
    let memory = left_behind([
        (Kind::HalfOpen, SYN_ACK | NUMBERED, 2, 100),
        (Kind::Established, RESET, 2, 50_000),
        (Kind::ClosedByBackend, 0, 1, 1),
        (Kind::Established, 0, 2, 50_000),
    ]);
    let expected = [(2, Some(Event::ReusedEarly)), (0, Some(Event::HalfOpenReclaimed))];
    assert_eq!(given(&memory), expected, "not even one that a RST was seen of");
}

#[test]
fn a_free_slot_further_on_is_better_than_one_that_rests() {
    // Two sets: one full of its backend's TIME_WAIT, one free.
    let memory = Memory::new(0, 2, 1);
    let now = Clock::read(&&memory, &memory.config).seen;
    for way in 0..WAYS as u32 {
        set_meta::<V4>(&memory, Slot { set: 0, way }, Meta::new(Kind::ClosedByBackend, 1, now));
    }
    let given = given(&memory);
    assert!(given[..WAYS].iter().all(|(_, event)| event.is_none()), "{given:?}");
    assert!(given[WAYS..].iter().all(|(_, event)| *event == Some(Event::ReusedEarly)), "{given:?}");
    assert_eq!(given.len(), 2 * WAYS);
}

/// Two SNAT addresses, of which the buckets know both.
fn two_addresses(now: u8, before: u8) -> Memory {
    const SMALL: u32 = 32;
    let mut memory = Memory::new(FIRST_SET, SMALL, 1);
    memory.add_snat_address();
    memory.config.bucket4 = [Bucket::new(now, before); BUCKETS];
    memory.config.bucket6 = memory.config.bucket4;
    memory
}

/// A flow that was there before its bucket moved is found at the address it leaves from, whichever candidate it is in; a
/// new one is at the other.
fn flows_are_found_at_both_addresses<F: Family>() {
    let mut memory = two_addresses(0, 0);
    let flows: Vec<_> =
        (0..125).map(|number| (number, establish::<F>(&memory, &query::<F>(&memory, number)))).collect();
    let flows: Vec<_> = flows.into_iter().filter_map(|(number, slot)| Some((number, slot?))).collect();
    let beyond = |(number, slot): &&(u64, Slot)| candidate_of::<F>(&query::<F>(&memory, *number), *slot) > 1;
    assert!(flows.iter().filter(beyond).count() > 3, "all candidates are used");
    memory.config.bucket4 = [Bucket::new(1, 0); BUCKETS];
    memory.config.bucket6 = memory.config.bucket4;
    for (number, slot) in &flows {
        let query = query::<F>(&memory, *number);
        assert_eq!(find::<F, _>(&&memory, &memory.config, &query).slot, *slot, "where it was");
    }
    for number in 1000..1050 {
        let query = query::<F>(&memory, number);
        let slot = establish::<F>(&memory, &query).expect("room");
        assert_eq!(slot.address(), 1);
        assert_eq!(find::<F, _>(&&memory, &memory.config, &query).slot, slot);
    }
}

#[test]
fn flows_are_found_at_the_address_they_leave_from() {
    flows_are_found_at_both_addresses::<V4>();
}

#[test]
fn flows_are_found_at_the_address_they_leave_from_ipv6() {
    flows_are_found_at_both_addresses::<V6>();
}

#[test]
fn a_flow_that_is_at_the_other_address_gets_no_second_slot() {
    let mut memory = two_addresses(0, 0);
    let slot = establish::<V4>(&memory, &query::<V4>(&memory, 7)).expect("room");
    memory.config.bucket4 = [Bucket::new(1, 0); BUCKETS];
    let query = query::<V4>(&memory, 7);
    let claim = claim::<V4, _>(&&memory, &query, &claimer(&memory, 2));
    assert_eq!(claim.failure(), Some(Outcome::SynRace));
    assert_eq!(find::<V4, _>(&&memory, &memory.config, &query).slot, slot);
}
