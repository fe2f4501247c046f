//! The claim protocol under every interleaving: the very code of [`crate::flow`], on CPUs that loom takes in turns.
//!
//! loom also lets a CPU see old values wherever acquire and release allow it: less order than x86 gives.
//!
//! That the models are worth something is shown beside them, by wrong copies of `take` that they catch.

use std::sync::Arc;

use loom::{model::Builder, thread};

use crate::{
    cell::Cell32,
    flight_recorder::{Note, Record},
    flow::{
        CANDIDATES, Claim, Claimer, Clock, Family, Found, Query, Slot, V4, V6, claim,
        close::{begin_again, mark_closed},
        find, is_owner, take,
    },
    kill::kill,
    layout::{BUCKETS, Bucket, SETS_PER_ADDRESS, WAYS},
    memory::Memory,
    meta::{BACKEND_FIN, CLIENT_FIN, Kind, Meta, NUMBERED, RESET, SYN_ACK, SYN_WAITS},
    sequence::SendSequence,
    subprograms::Subprograms as _,
};

/// The daemon's and everybody else's "now", in units.
const NOW: u16 = 1000;
/// Long enough ago for a handshake to be cut short.
const LONG_AGO: u16 = NOW - 10;

/// Runs `model` in every possible order; with a limit on preemptions where that takes minutes (what is known to go
/// wrong in this protocol goes wrong with two).
fn explore(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 100_000;
    builder.check(model);
}

/// As many sets as a tuple has candidates of interest, with one usable way each.
fn table(sets: u32) -> Memory {
    let mut memory = Memory::new(0, sets, 1);
    (0..sets as usize).for_each(|set| memory.block(set, 0b1110));
    // Also of three: the partner of set 0, where all of the queries begin, is set 1.
    memory.config.partners = memory.config.partners.max(1);
    memory
}

/// A tuple whose candidates are set 0, set 1, … in this order; the `number`th of its kind.
fn query<F: Family>(memory: &Memory, number: usize) -> Query<F::Tuple> {
    (0..u16::MAX)
        .map(|port| {
            let address = [0x0a00_0000 + u64::from(port), 0x0a00_0000 + u64::from(port)];
            Query::new::<F>(&memory.config, F::tuple(address, port, 1))
        })
        .filter(|query| (0..memory.config.sets).all(|number| query.candidate(number) == number))
        .nth(number)
        .unwrap()
}

fn claimer(memory: &Memory, backend: u32) -> Claimer {
    Claimer { clock: Clock::read(&memory, &memory.config), service: 1, backend, expected: 0, reserved: 0 }
}

/// The only way of a set that is used.
fn only_way(set: u32) -> Slot {
    Slot { set, way: 0 }
}

fn word<F: Family>(memory: &Memory, slot: Slot) -> Meta {
    Meta(F::meta(F::set(&memory, slot.set).unwrap(), slot.way).load())
}

/// The sets of all SNAT addresses.
fn all_sets(memory: &Memory) -> impl Iterator<Item = u32> {
    let sets = memory.config.sets;
    (0..memory.config.snat4_count)
        .flat_map(move |address| (0..sets).map(move |set| address * SETS_PER_ADDRESS + set))
}

/// Where a tuple lives.
fn live<F: Family>(memory: &Memory, query: &Query<F::Tuple>) -> Vec<Slot> {
    all_sets(memory)
        .flat_map(|set| (0..WAYS as u32).map(move |way| Slot { set, way }))
        .filter(|slot| {
            word::<F>(memory, *slot).is_live()
                && F::load(F::set(&memory, slot.set).unwrap(), slot.way) == query.tuple
        })
        .collect()
}

/// Puts a flow into a slot, as it was long before the model begins.
fn put<F: Family>(memory: &Memory, slot: Slot, query: &Query<F::Tuple>, meta: Meta) {
    let set = F::set(&memory, slot.set).unwrap();
    F::store(set, slot.way, query.tuple);
    F::meta(set, slot.way).store(meta.0);
}

/// Runs both at the same time.
fn race<A: 'static, B>(one: impl FnOnce() -> A + 'static, other: impl FnOnce() -> B) -> (A, B) {
    let one = thread::spawn(one);
    let other = other();
    (one.join().unwrap(), other)
}

/// At most one of the claimers has the flow, and it is where they say.
fn assert_one_owner<F: Family>(memory: &Memory, query: &Query<F::Tuple>, claims: [Claim; 2]) {
    let live = live::<F>(memory, query);
    assert!(live.len() <= 1, "two live ways with one tuple");
    let won: Vec<_> =
        claims.iter().filter(|claim| claim.failure().is_none()).map(|claim| claim.slot()).collect();
    assert_eq!(won, live, "the winner has it, and nobody else");
    for set in all_sets(memory) {
        assert!(!word::<F>(memory, only_way(set)).is(Kind::Claiming), "a way was left behind");
    }
}

/// How a claimer takes a free way.
type Take<F> = fn(&Memory, &Query<<F as Family>::Tuple>, u32, Slot) -> Claim;

fn as_built<F: Family>(memory: &Memory, query: &Query<F::Tuple>, backend: u32, slot: Slot) -> Claim {
    take::<F, _>(&memory, query, &claimer(memory, backend), Found::new(slot, Meta::FREE))
}

/// Two copies of a SYN, which have chosen different ways of `sets` sets.
fn two_copies<F: Family>(sets: u32, slots: [Slot; 2], take: Take<F>) {
    explore(None, move || {
        let memory = Arc::new(table(sets));
        let query = query::<F>(&memory, 0);
        let rival = (memory.clone(), query);
        let (one, other) =
            race(move || take(&rival.0, &rival.1, 1, slots[0]), || take(&memory, &query, 2, slots[1]));
        assert_one_owner::<F>(&memory, &query, [one, other]);
    });
}

#[test]
fn two_copies_of_a_syn_never_own_two_ways() {
    two_copies::<V4>(2, [only_way(0), only_way(1)], as_built::<V4>);
}

#[test]
fn two_copies_of_a_syn_never_own_two_ways_ipv6() {
    two_copies::<V6>(2, [only_way(0), only_way(1)], as_built::<V6>);
}

#[test]
fn a_copy_beyond_the_second_candidate_is_seen_by_its_mark() {
    two_copies::<V4>(3, [only_way(0), only_way(2)], as_built::<V4>);
}

#[test]
fn two_copies_of_a_syn_choose_and_take() {
    explore(None, || {
        let memory = Arc::new(table(2));
        let query = query::<V4>(&memory, 0);
        let rival = (memory.clone(), query);
        let (one, other) = race(
            move || claim::<V4, _>(&&*rival.0, &rival.1, &claimer(&rival.0, 1)),
            || claim::<V4, _>(&&*memory, &query, &claimer(&memory, 2)),
        );
        assert_one_owner::<V4>(&memory, &query, [one, other]);
        assert!(one != Claim::FULL && other != Claim::FULL, "there was room for both");
    });
}

/// Two copies of a SYN while the flow's bucket moves to another SNAT address: the program that works on one of them has
/// not seen the last of it.
fn two_copies_at_two_addresses(early: Bucket, late: Bucket) {
    explore(Some(3), move || {
        let mut memory = table(2);
        memory.add_snat_address();
        let tuple = query::<V4>(&memory, 0).tuple;
        let queries = [early, late].map(|bucket| {
            let mut config = memory.config;
            config.bucket4 = [bucket; BUCKETS];
            Query::new::<V4>(&config, tuple)
        });
        let memory = Arc::new(memory);
        let rival = memory.clone();
        let (one, other) = race(
            move || claim::<V4, _>(&&*rival, &queries[0], &claimer(&rival, 1)),
            || claim::<V4, _>(&&*memory, &queries[1], &claimer(&memory, 2)),
        );
        assert_one_owner::<V4>(&memory, &queries[1], [one, other]);
    });
}

#[test]
fn two_copies_of_a_syn_meet_while_their_flows_move_to_another_address() {
    two_copies_at_two_addresses(Bucket::new(0, 1), Bucket::new(1, 0));
}

#[test]
#[should_panic(expected = "two live ways with one tuple")]
fn moving_in_one_step_would_be_caught() {
    two_copies_at_two_addresses(Bucket::new(0, 0), Bucket::new(1, 0));
}

/// The order and the means by which a wrong `take` publishes.
#[derive(Clone, Copy, PartialEq)]
enum Mistake {
    SearchesFirst,
    PublishesByStore,
    MarksLate,
}

/// [`take`] with a mistake in it.
fn mistaken(memory: &Memory, query: &Query<u64>, backend: u32, slot: Slot, mistake: Mistake) -> Claim {
    let maps = &memory;
    let ways = V4::set(maps, slot.set).unwrap();
    let word = V4::meta(ways, slot.way);
    if word.compare_exchange(0, Meta::new(Kind::Claiming, backend as u8, NOW).0) != 0 {
        return Claim::RACED;
    }
    let home = V4::set(maps, query.candidate(0)).unwrap();
    let mark = V4::overflow(maps, home, query.candidate(0)).unwrap();
    let beyond = slot.set != query.candidate(0) && slot.set != query.candidate(1);
    if beyond && mistake != Mistake::MarksLate {
        mark.store(1);
    }
    V4::store(ways, slot.way, query.tuple);
    let half_open = Meta::new(Kind::HalfOpen, backend as u8, NOW);
    let search = || {
        let candidates = if mark.load() == 0 { 2 } else { CANDIDATES };
        maps.find_in::<V4>(query, candidates, slot).is_some()
    };
    let rival = match mistake {
        Mistake::SearchesFirst => {
            let rival = search();
            word.swap(half_open.0);
            rival
        }
        Mistake::PublishesByStore => {
            word.store(half_open.0);
            search()
        }
        Mistake::MarksLate => {
            word.swap(half_open.0);
            let rival = search();
            if beyond {
                mark.store(1);
            }
            rival
        }
    };
    if rival {
        word.compare_exchange(half_open.0, 0);
        return Claim::RACED;
    }
    Claim::won(slot)
}

#[test]
#[should_panic(expected = "two live ways with one tuple")]
fn searching_before_publishing_would_be_caught() {
    two_copies::<V4>(2, [only_way(0), only_way(1)], |memory, query, backend, slot| {
        mistaken(memory, query, backend, slot, Mistake::SearchesFirst)
    });
}

#[test]
#[should_panic(expected = "two live ways with one tuple")]
fn publishing_by_a_plain_store_would_be_caught() {
    two_copies::<V4>(2, [only_way(0), only_way(1)], |memory, query, backend, slot| {
        mistaken(memory, query, backend, slot, Mistake::PublishesByStore)
    });
}

#[test]
#[should_panic(expected = "two live ways with one tuple")]
fn marking_after_publishing_would_be_caught() {
    two_copies::<V4>(3, [only_way(0), only_way(2)], |memory, query, backend, slot| {
        mistaken(memory, query, backend, slot, Mistake::MarksLate)
    });
}

/// A third packet of the flow refreshes the slot that one of two claimers is about to give back.
#[test]
fn a_refreshed_slot_is_given_back_all_the_same() {
    explore(Some(3), || {
        let memory = Arc::new(table(2));
        let query = query::<V4>(&memory, 0);
        let (rival, packet) = (memory.clone(), memory.clone());
        let packet = thread::spawn(move || {
            let maps = &*packet;
            let found = find::<V4, _>(&maps, &packet.config, &query).found();
            if found.is_some() {
                let slot = found.slot();
                V4::meta(V4::set(&maps, slot.set).unwrap(), slot.way).store_high(NOW + 1);
            }
        });
        let (one, other) = race(
            move || as_built::<V4>(&rival, &query, 1, only_way(0)),
            || as_built::<V4>(&memory, &query, 2, only_way(1)),
        );
        packet.join().unwrap();
        assert_one_owner::<V4>(&memory, &query, [one, other]);
    });
}

/// The daemon's side, as its reaper does it: examine a word, exchange it if it is still the same.
fn reap(memory: &Memory, slot: Slot) {
    let word = V4::meta(V4::set(&memory, slot.set).unwrap(), slot.way);
    let meta = Meta(word.load());
    if meta.is_live() && meta.age(NOW) > 5 {
        word.compare_exchange(meta.0, Meta::FREE.0);
    }
}

#[test]
fn the_daemon_never_frees_the_next_owner() {
    explore(None, || {
        let memory = Arc::new(table(2));
        let (old, new) = (query::<V4>(&memory, 0), query::<V4>(&memory, 1));
        let slot = only_way(0);
        let meta = Meta::new(Kind::ClosedByBackend, 1, LONG_AGO);
        put::<V4>(&memory, slot, &old, meta);
        let daemon = memory.clone();
        let ((), claim) = race(
            move || {
                reap(&daemon, slot);
                reap(&daemon, slot);
            },
            || take::<V4, _>(&&*memory, &new, &claimer(&memory, 2), Found::new(slot, meta)),
        );
        if claim == Claim::RACED {
            assert_eq!(word::<V4>(&memory, slot), Meta::FREE, "the daemon was first");
        } else {
            assert_eq!(live::<V4>(&memory, &new), [slot]);
            assert_eq!(word::<V4>(&memory, slot), Meta::new(Kind::HalfOpen, 2, NOW));
        }
    });
}

/// An IPv6 tuple is three words; whoever looks for one must not find a slot that is half another's.
#[test]
fn nobody_finds_a_slot_under_a_mixed_tuple() {
    explore(Some(3), || {
        let memory = Arc::new(table(2));
        let (old, new) = (query::<V6>(&memory, 0), query::<V6>(&memory, 1));
        let slot = only_way(0);
        let meta = Meta::new(Kind::HalfOpen, 1, LONG_AGO);
        put::<V6>(&memory, slot, &old, meta);
        let (address, _, _) = V6::parts(new.tuple);
        let (_, port, listener) = V6::parts(old.tuple);
        let mut mixed = old;
        mixed.tuple = V6::tuple(address, port, listener);
        let writer = memory.clone();
        let (_, found) = race(
            move || take::<V6, _>(&&*writer, &new, &claimer(&writer, 2), Found::new(slot, meta)),
            || [old, new, mixed].map(|query| find::<V6, _>(&&*memory, &memory.config, &query).found()),
        );
        assert!(!found[2].is_some(), "found under a tuple that nobody has");
        assert!(!found[0].is_some() || found[0].meta() == meta, "the old flow in the new one's slot");
        assert!(!found[1].is_some() || found[1].meta().backend() == 2, "the new flow in the old one's slot");
    });
}

#[test]
fn of_two_flows_that_want_one_way_one_has_it() {
    explore(None, || {
        let memory = Arc::new(table(2));
        let queries = [query::<V6>(&memory, 0), query::<V6>(&memory, 1)];
        let rival = memory.clone();
        let (one, other) = race(
            move || as_built::<V6>(&rival, &queries[0], 1, only_way(0)),
            || as_built::<V6>(&memory, &queries[1], 2, only_way(0)),
        );
        let winners = [(one, queries[0], 1), (other, queries[1], 2)];
        assert_eq!(winners.iter().filter(|(claim, ..)| *claim == Claim::won(only_way(0))).count(), 1);
        for (claim, query, backend) in winners {
            if claim == Claim::RACED {
                assert!(live::<V6>(&memory, &query).is_empty());
            } else {
                assert_eq!(live::<V6>(&memory, &query), [only_way(0)]);
                assert_eq!(word::<V6>(&memory, only_way(0)).backend(), backend);
            }
        }
    });
}

/// A packet of a half-open flow, on its way through [`crate::forward`] or [`crate::reply`] when the slot is taken from
/// it: what it still writes.
fn late_packet(change: fn(&crate::cell::Cell32)) {
    explore(None, move || {
        let memory = Arc::new(table(2));
        let (old, new) = (query::<V4>(&memory, 0), query::<V4>(&memory, 1));
        let slot = only_way(0);
        let meta = Meta::new(Kind::HalfOpen, 1, LONG_AGO);
        put::<V4>(&memory, slot, &old, meta);
        let packet = memory.clone();
        let (found, claim) = race(
            move || {
                let maps = &*packet;
                let found = find::<V4, _>(&maps, &packet.config, &old).found();
                if found.is_some() {
                    change(V4::meta(V4::set(&maps, slot.set).unwrap(), slot.way));
                }
                found
            },
            || take::<V4, _>(&&*memory, &new, &claimer(&memory, 2), Found::new(slot, meta)),
        );
        let now = word::<V4>(&memory, slot);
        assert!(now.is(Kind::HalfOpen));
        if claim == Claim::RACED {
            assert!(found.is_some() && now.backend() == 1);
            assert_eq!(live::<V4>(&memory, &old), [slot], "it was in time: the slot is still its own");
        } else {
            assert_eq!(now.backend(), 2);
            assert_eq!(live::<V4>(&memory, &new), [slot], "it was late: the slot is the new owner's");
            assert_eq!(live::<V4>(&memory, &old), []);
        }
    });
}

#[test]
fn a_late_flag_brings_no_slot_back() {
    late_packet(|word| {
        word.fetch_or(SYN_ACK);
    });
    late_packet(|word| {
        word.fetch_or(CLIENT_FIN);
    });
}

#[test]
fn a_late_refresh_brings_no_slot_back() {
    late_packet(|word| word.store_high(NOW));
}

#[test]
fn what_is_written_to_a_freed_slot_leaves_it_free() {
    explore(None, || {
        let memory = Arc::new(table(2));
        let old = query::<V4>(&memory, 0);
        let slot = only_way(0);
        put::<V4>(&memory, slot, &old, Meta::new(Kind::HalfOpen, 1, LONG_AGO));
        let packet = memory.clone();
        let (found, ()) = race(
            move || {
                let maps = &*packet;
                let found = find::<V4, _>(&maps, &packet.config, &old).found();
                if found.is_some() {
                    let word = V4::meta(V4::set(&maps, slot.set).unwrap(), slot.way);
                    word.fetch_or(SYN_ACK);
                    word.store_high(NOW);
                }
                found
            },
            || reap(&memory, slot),
        );
        let now = word::<V4>(&memory, slot);
        assert!(
            now.is(Kind::Free) || found.is_some() && now.has(SYN_ACK),
            "either freed or refreshed: {now:?}"
        );
        assert!(live::<V4>(&memory, &old).len() <= 1);
    });
}

/// The daemon resets a flow while a packet of it is on its way, having examined the slot's word before.
fn killed_meanwhile(before: Meta, packet: fn(&crate::cell::Cell32, Meta)) {
    explore(None, move || {
        let memory = Arc::new(table(2));
        let query = query::<V4>(&memory, 0);
        let slot = only_way(0);
        put::<V4>(&memory, slot, &query, before);
        let late = memory.clone();
        let ((), killed) = race(
            move || {
                let maps = &*late;
                let word = V4::meta(V4::set(&maps, slot.set).unwrap(), slot.way);
                packet(word, Meta(word.load()));
            },
            || {
                let maps = &*memory;
                let set = V4::set(&maps, slot.set).unwrap();
                kill(V4::meta(set, slot.way), V4::numbers(&maps, set, slot).unwrap(), 1, NOW)
            },
        );
        let now = word::<V4>(&memory, slot);
        assert!(killed.is_some(), "a packet does not stand in the way for long");
        assert!(now.is(Kind::Killed) && now.backend() == 1, "and brings nothing back: {now:?}");
        assert_eq!(live::<V4>(&memory, &query), [slot]);
    });
}

#[test]
fn a_packet_on_its_way_does_not_bring_a_killed_flow_back() {
    let established = Meta::new(Kind::Established, 1, LONG_AGO);
    killed_meanwhile(established, |word, _| word.store_high(NOW));
    killed_meanwhile(established, |word, _| {
        word.fetch_or(CLIENT_FIN);
    });
    killed_meanwhile(established.with(RESET), |word, meta| {
        if meta.is(Kind::Established) {
            let next = meta.without(RESET);
            let now = Meta(word.compare_exchange(meta.0, next.0));
            if now.0 != meta.0 && now.at(meta.seen()).0 == meta.0 {
                word.compare_exchange(now.0, next.at(now.seen()).0);
            }
        }
    });
    killed_meanwhile(Meta::new(Kind::HalfOpen, 1, LONG_AGO).with(SYN_ACK | NUMBERED), |word, meta| {
        if meta.is(Kind::HalfOpen) {
            word.compare_exchange(meta.0, meta.become_kind(Kind::Established).0);
        }
    });
}

/// A killed flow's client begins anew while another flow wants the slot, and the daemon frees it.
#[test]
fn a_killed_slot_has_one_next_owner() {
    explore(Some(3), || {
        let memory = Arc::new(table(2));
        let (old, new) = (query::<V4>(&memory, 0), query::<V4>(&memory, 1));
        let slot = only_way(0);
        let meta = Meta::new(Kind::Killed, 1, LONG_AGO);
        put::<V4>(&memory, slot, &old, meta);
        let (daemon, rival) = (memory.clone(), memory.clone());
        let daemon = thread::spawn(move || reap(&daemon, slot));
        let found = Found::new(slot, meta);
        let (again, other) = race(
            move || take::<V4, _>(&&*rival, &old, &claimer(&rival, 2), found),
            || take::<V4, _>(&&*memory, &new, &claimer(&memory, 2), found),
        );
        daemon.join().unwrap();
        let winners = [(again, old), (other, new)];
        let won = winners.iter().filter(|(claim, _)| *claim == Claim::won(slot)).count();
        assert!(won <= 1, "two owners of one slot");
        assert!(won == 1 || word::<V4>(&memory, slot) == Meta::FREE, "nobody's, and not free");
        for (claim, query) in winners {
            let lives = live::<V4>(&memory, &query) == [slot];
            assert_eq!(lives, claim == Claim::won(slot));
        }
    });
}

/// How a SYN for a flow that has ended says that it waits for the backend's answer.
type Ask = fn(&Cell32, Meta);

/// A flow has ended. Its client's SYN asks the backend, whose SYN-ACK begins the flow again; at the same time the slot is
/// taken, as pressure takes closed slots, for a flow with the `number`th tuple.
fn asked_while_taken(number: usize, ask: Ask) {
    explore(Some(3), move || {
        let memory = Arc::new(table(2));
        let (ended, new) = (query::<V4>(&memory, 0), query::<V4>(&memory, number));
        let slot = only_way(0);
        let closed = Meta::new(Kind::ClosedByClient, 1, LONG_AGO).with(CLIENT_FIN | BACKEND_FIN);
        put::<V4>(&memory, slot, &ended, closed);
        let (client, backend) = (memory.clone(), memory.clone());
        let client = thread::spawn(move || {
            ask(V4::meta(V4::set(&&*client, slot.set).unwrap(), slot.way), closed);
        });
        let again = Meta::new(Kind::HalfOpen, 1, NOW).with(SYN_ACK);
        let (begun, claim) = race(
            move || {
                let maps = &*backend;
                let word = V4::meta(V4::set(&maps, slot.set).unwrap(), slot.way);
                let met = Meta(word.load());
                met.is_closed() && met.has(SYN_WAITS) && begin_again(word, met, again)
            },
            || take::<V4, _>(&&*memory, &new, &claimer(&memory, 2), Found::new(slot, closed)),
        );
        client.join().unwrap();
        let now = word::<V4>(&memory, slot);
        if claim == Claim::won(slot) {
            assert!(!begun, "two flows in one slot");
            assert!(now.is(Kind::HalfOpen) && now.backend() == 2, "{now:?}");
            assert!(!now.has(SYN_ACK), "the new flow's backend has not answered");
            assert_eq!(live::<V4>(&memory, &new), [slot]);
        } else {
            assert!(if begun { now == again } else { now == closed.with(SYN_WAITS) }, "{now:?}");
            assert_eq!(live::<V4>(&memory, &ended), [slot]);
        }
    });
}

#[test]
fn a_slot_whose_backend_is_asked_has_one_next_owner() {
    asked_while_taken(1, mark_closed);
}

#[test]
fn of_two_syns_of_one_client_one_begins_its_flow_again() {
    asked_while_taken(0, mark_closed);
}

#[test]
#[should_panic(expected = "the new flow's backend has not answered")]
fn asking_whatever_is_in_the_slot_by_now_would_be_caught() {
    asked_while_taken(1, |word, _| {
        word.fetch_or(SYN_WAITS);
    });
}

/// A record in the black box is read as it was written, or not at all.
#[test]
fn a_record_is_never_read_in_two_halves() {
    explore(None, || {
        let record = Arc::new(Record::default());
        let note = |number| Note { address: [number; 2], what: number, other: 0 };
        record.write(&note(1), 1 << 24);
        let writer = record.clone();
        let (read, ()) = race(move || record.read(), move || writer.write(&note(2), 2 << 24));
        if let Some(written) = read {
            assert!(written.note == note(written.jiffies), "{written:?}");
        }
    });
}

/// Does a backend's packet for a slot belong to the flow that is read there? As [`crate::reply`] and [`crate::icmp`] read it.
fn read_owner<F: Family>(memory: &Memory, slot: Slot, owns: Owns<F>) -> Option<(Meta, F::Tuple)> {
    let set = F::set(&memory, slot.set).unwrap();
    let meta = Meta(F::meta(set, slot.way).load());
    if !meta.is_live() {
        return None;
    }
    let tuple = F::load(set, slot.way);
    owns(set, slot.way, meta, tuple).then_some((meta, tuple))
}

/// How it is found out that the tuple is that of the flow whose word was read before.
type Owns<F> = fn(&<F as Family>::Set, u32, Meta, <F as Family>::Tuple) -> bool;

/// A backend's packet comes while its client's acknowledgement proves the flow on another CPU.
fn replies_while_established<F: Family>(owns: Owns<F>) {
    explore(None, move || {
        let memory = Arc::new(table(2));
        let query = query::<F>(&memory, 0);
        let slot = only_way(0);
        let half_open = Meta::new(Kind::HalfOpen, 1, NOW).with(SYN_ACK);
        put::<F>(&memory, slot, &query, half_open);
        let client = memory.clone();
        let ((), owner) = race(
            move || {
                let maps = &*client;
                let word = F::meta(F::set(&maps, slot.set).unwrap(), slot.way);
                word.compare_exchange(half_open.0, half_open.become_kind(Kind::Established).0);
            },
            || read_owner::<F>(&memory, slot, owns),
        );
        assert!(owner.is_some_and(|(_, tuple)| tuple == query.tuple), "taken for a packet of no flow");
    });
}

#[test]
fn a_reply_is_its_flows_while_that_is_proven() {
    replies_while_established::<V4>(is_owner::<V4>);
    replies_while_established::<V6>(is_owner::<V6>);
}

#[test]
#[should_panic(expected = "taken for a packet of no flow")]
fn comparing_states_would_be_caught() {
    replies_while_established::<V4>(|set, way, meta, _| {
        Meta(V4::meta(set, way).load()).kind() == meta.kind()
    });
}

/// A backend's packet comes while its slot is taken for another flow, of the same backend.
fn replies_while_taken<F: Family>(owns: Owns<F>) {
    explore(Some(3), move || {
        let memory = Arc::new(table(2));
        let (old, new) = (query::<F>(&memory, 0), query::<F>(&memory, 1));
        let slot = only_way(0);
        let meta = Meta::new(Kind::HalfOpen, 2, LONG_AGO);
        put::<F>(&memory, slot, &old, meta);
        let claiming = memory.clone();
        let (_, owner) = race(
            move || take::<F, _>(&&*claiming, &new, &claimer(&claiming, 2), Found::new(slot, meta)),
            || read_owner::<F>(&memory, slot, owns),
        );
        if let Some((_, tuple)) = owner {
            assert!(tuple == old.tuple || tuple == new.tuple, "sent to a client that nobody is");
        }
    });
}

#[test]
fn a_reply_goes_to_one_of_the_two_flows_of_its_slot() {
    replies_while_taken::<V4>(is_owner::<V4>);
    replies_while_taken::<V6>(is_owner::<V6>);
}

#[test]
#[should_panic(expected = "sent to a client that nobody is")]
fn looking_at_the_word_alone_would_be_caught() {
    replies_while_taken::<V6>(|set, way, meta, _| meta.is_kept(Meta(V6::meta(set, way).load())));
}

/// The numbers of a flow are there before its word says so.
#[test]
fn nobody_reads_numbers_before_they_are_known() {
    explore(None, || {
        let memory = Arc::new(table(2));
        let query = query::<V4>(&memory, 0);
        let slot = only_way(0);
        let half_open = Meta::new(Kind::HalfOpen, 1, NOW).with(SYN_ACK);
        put::<V4>(&memory, slot, &query, half_open);
        let proof = memory.clone();
        let ((), ()) = race(
            move || {
                let maps = &*proof;
                let set = V4::set(&maps, slot.set).unwrap();
                let numbers = V4::numbers(&maps, set, slot).unwrap();
                numbers.store(SendSequence::default(), SendSequence::at(500));
                let established = half_open.become_kind(Kind::Established).with(NUMBERED);
                V4::meta(set, slot.way).compare_exchange(half_open.0, established.0);
            },
            || {
                let maps = &*memory;
                let set = V4::set(&maps, slot.set).unwrap();
                if Meta(V4::meta(set, slot.way).load()).has(NUMBERED) {
                    assert_eq!(V4::numbers(&maps, set, slot).unwrap().load(), SendSequence::at(500));
                }
            },
        );
    });
}
