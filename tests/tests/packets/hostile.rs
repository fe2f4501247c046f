//! Packets that are cut short, contradict themselves, or are no packets at all: none leaves as garbage, none leaves a
//! slot behind.

use std::{cell::RefCell, collections::HashSet};

use etherparse::Ipv4Header;
use lb_common::outcome::{Action, Event, Outcome};
use lb_tests::packets::{
    Exchange, Flow, Fragment, Frame, Icmp, Ip, LOOPBACK, PSH, SYN, Seen, Shape, World, extension,
};
use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, RngSeed, TestRunner},
};

/// Packets of every kind that is rewritten, of one flow.
fn rewritten(flow: &Flow, ip: Ip, tags: &[(u16, u16)]) -> Vec<Vec<u8>> {
    let payload = b"some payload".to_vec();
    let mut frames = vec![
        Frame::syn(ip.client(777), flow.listener),
        Frame { flags: PSH, payload: payload.clone(), ..flow.from_client() },
        Frame { flags: PSH, payload: payload.clone(), ..flow.from_backend() },
        Frame { flags: SYN, ..flow.from_client() },
    ];
    if ip == Ip::V4 {
        frames.push(Frame { options: vec![1; 12], ..flow.from_client() });
    } else {
        let extensions = vec![extension::HOP_BY_HOP, extension::ROUTING, extension::DESTINATION_OPTIONS];
        frames.push(Frame { extensions, ..flow.from_client() });
    }
    let mut bytes: Vec<_> =
        frames.into_iter().map(|frame| Frame { tags: tags.to_vec(), ..frame }.bytes()).collect();
    for sent in [Frame::new(flow.listener, flow.client), Frame::new(flow.snat, ip.backend(flow.backend))] {
        for length in [8, 20, 28] {
            let sent = Frame { payload: payload.clone(), ..sent.clone() };
            let mut error = Icmp::too_big(ip.router(), &sent, length);
            error.outer.tags = tags.to_vec();
            bytes.push(error.bytes());
        }
    }
    bytes
}

/// A world whose one port has these tags, and a flow in it.
fn world(ip: Ip, tags: &[(u16, u16)]) -> (World, Flow) {
    let mut world = World::build(&Shape { ports: vec![Shape::port(LOOPBACK, tags)], ..Shape::new(ip) });
    let (client, listener) = (ip.client(1), ip.listener());
    let syn = Frame { tags: tags.to_vec(), ..Frame::syn(client, listener) };
    let exchange = world.run(&syn.bytes());
    let flow = world.flow(client, listener, &exchange);
    (world, flow)
}

/// Makes the IP header say the length that is there.
fn correct_length(frame: &mut [u8], network: usize) {
    match frame.get(network).map(|byte| byte >> 4) {
        Some(4) => {
            let Ok((mut header, _)) = Ipv4Header::from_slice(&frame[network..]) else { return };
            header.total_len = (frame.len() - network) as u16;
            header.header_checksum = header.calc_header_checksum();
            frame[network..network + header.header_len()].copy_from_slice(&header.to_bytes());
        }
        Some(6) if frame.len() >= network + 40 => {
            let length = (frame.len() - network - 40) as u16;
            frame[network + 4..network + 6].copy_from_slice(&length.to_be_bytes());
        }
        _ => {}
    }
}

#[test]
fn a_packet_cut_short_anywhere_never_leaves_and_takes_no_slot() {
    let tags: [&[(u16, u16)]; 3] = [&[], &[(0x8100, 42)], &[(0x88a8, 7), (0x8100, 42)]];
    for ip in Ip::BOTH {
        for tags in tags {
            let (mut world, flow) = world(ip, tags);
            for frame in rewritten(&flow, ip, tags) {
                // The kernel takes no frame shorter than an Ethernet header.
                for length in 14..frame.len() {
                    let exchange = world.run(&frame[..length]);
                    assert_ne!(
                        exchange.outcome.action(),
                        Action::Transmit,
                        "{ip:?}: {:?} with {length} of {} bytes: {frame:02x?}",
                        exchange.outcome,
                        frame.len()
                    );
                }
            }
            assert_eq!(world.slots().len(), 1);
        }
    }
}

#[test]
fn a_packet_whose_lengths_agree_but_whose_headers_do_not_fit_never_leaves() {
    for ip in Ip::BOTH {
        for tags in [&[][..], &[(0x8100, 42)]] {
            let (mut world, flow) = world(ip, tags);
            let network = 14 + 4 * tags.len();
            for frame in rewritten(&flow, ip, tags) {
                let headers = Headers::of(&frame, ip, network);
                // Shorter than its headers, once as the frame ends and once with padding behind.
                for (length, padding) in (network..headers.end).flat_map(|length| [(length, 0), (length, 64)])
                {
                    let mut cut = frame[..length].to_vec();
                    correct_length(&mut cut, network);
                    cut.resize(length + padding, 0);
                    let exchange = world.run(&cut);
                    let left = exchange.outcome.action() == Action::Transmit;
                    assert!(!left, "{ip:?}: {:?} with {length} bytes of {frame:02x?}", exchange.outcome);
                }
            }
            assert_eq!(world.slots().len(), 1);
        }
    }
}

/// Where the headers end that a packet must have.
struct Headers {
    end: usize,
}

impl Headers {
    fn of(frame: &[u8], ip: Ip, network: usize) -> Self {
        let (mut next, mut at) = match ip {
            Ip::V4 => (frame[network + 9], network + usize::from(frame[network] & 0xf) * 4),
            Ip::V6 => (frame[network + 6], network + 40),
        };
        while [extension::HOP_BY_HOP, extension::ROUTING, extension::DESTINATION_OPTIONS].contains(&next) {
            (next, at) = (frame[at], at + 8);
        }
        let end = match next {
            6 => at + usize::from(frame[at + 12] >> 4) * 4,
            // ICMP, the quoted IP header, eight bytes of TCP.
            _ => at + 8 + ip.header() + 8,
        };
        Self { end }
    }
}

#[test]
fn a_header_length_that_is_not_true_never_leaves() {
    for ip in Ip::BOTH {
        let (mut world, flow) = world(ip, &[]);
        for frame in [Frame::syn(ip.client(9), flow.listener), flow.from_client(), flow.from_backend()] {
            let offset = frame.transport_offset() + 12;
            for words in (0..5).chain(11..16) {
                let mut bytes = frame.bytes();
                bytes[offset] = words << 4;
                let exchange = world.run(&bytes);
                assert_ne!(exchange.outcome.action(), Action::Transmit, "{words} words of TCP header");
            }
        }
        assert_eq!(world.slots().len(), 1);
    }
}

#[test]
fn a_first_fragment_is_dropped_and_a_later_one_is_nobodys() {
    for ip in Ip::BOTH {
        let (mut world, flow) = world(ip, &[]);
        for frame in [Frame::syn(ip.client(9), flow.listener), flow.from_client(), flow.from_backend()] {
            let first = Frame { fragment: Some(Fragment::First), ..frame.clone() };
            assert_eq!(world.run(&first.bytes()).outcome, Outcome::Fragment);
            let later = Frame { fragment: Some(Fragment::Later), ..frame };
            assert_eq!(world.run(&later.bytes()).outcome, Outcome::NotOurs);
        }
        assert_eq!(world.slots().len(), 1);
    }
}

#[test]
fn a_packet_at_the_end_of_its_life_goes_nowhere() {
    for ip in Ip::BOTH {
        let (mut world, flow) = world(ip, &[]);
        for frame in [Frame::syn(ip.client(9), flow.listener), flow.from_client(), flow.from_backend()] {
            for ttl in [0, 1] {
                let frame = Frame { ttl, ..frame.clone() };
                assert_eq!(world.run(&frame.bytes()).outcome, Outcome::TtlExpired);
            }
        }
        assert_eq!(world.slots().len(), 1);
    }
}

/// Runs a frame that may be anything. What leaves is as right as what came: a checksum that was wrong may be wrong
/// still, a length or a header never is.
fn run_garbage(world: &mut World, frame: &[u8]) -> Result<Exchange, TestCaseError> {
    let exchange = world.run(frame);
    if exchange.outcome.action() == Action::Transmit
        && let Err(after) = Seen::parse(&exchange.bytes)
    {
        let before = Seen::parse(frame).map_or_else(|error| error.to_string(), |_| "right".to_owned());
        // An empty fragment header is no fragment, and looked through.
        let excused = ["checksum", "protocol 44"].iter().any(|excuse| before.contains(excuse));
        prop_assert!(excused, "{:?}: {before}; now {after}: {frame:02x?}", exchange.outcome);
    }
    Ok(exchange)
}

/// Counts flows that were opened, and makes sure that there is no slot without one, and none twice.
fn run_and_count(worlds: &RefCell<(World, usize)>, frame: &[u8]) -> Result<(), TestCaseError> {
    let (world, opened) = &mut *worlds.borrow_mut();
    let exchange = run_garbage(world, frame)?;
    *opened += exchange.events.iter().filter(|event| **event == Event::FlowClaimed).count();
    Ok(())
}

fn assert_no_leak((world, opened): (World, usize)) {
    let slots = world.slots();
    let clients: HashSet<_> = slots.iter().map(|slot| (slot.client, slot.listener)).collect();
    assert_eq!(clients.len(), slots.len(), "a flow with two slots");
    // A flow that was closed may be opened again, in its own slot.
    assert!((1..=opened).contains(&slots.len()), "{} slots for {opened} flows", slots.len());
    assert!(slots.iter().all(|slot| slot.meta.is_live()), "{slots:?}");
}

fn cases(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        max_shrink_iters: 100,
        ..Config::default()
    })
}

#[test]
fn damaged_packets_of_flows_leave_undamaged_or_not_at_all() {
    for ip in Ip::BOTH {
        let (world, flow) = world(ip, &[]);
        let frames = rewritten(&flow, ip, &[]);
        let world = RefCell::new((world, 1));
        let damage = proptest::collection::vec((any::<Index>(), any::<u8>()), 1..5);
        let strategy = (prop::sample::select(frames), damage, any::<Index>(), any::<u8>());
        cases(3000)
            .run(&strategy, |(mut frame, damage, length, correct)| {
                for (place, value) in damage {
                    let place = 12 + place.index(frame.len() - 12);
                    frame[place] = value;
                }
                // One in four is cut as well.
                if correct & 3 == 0 {
                    frame.truncate(14 + length.index(frame.len() - 14));
                }
                if correct & 4 == 0 {
                    correct_length(&mut frame, 14);
                }
                run_and_count(&world, &frame)
            })
            .unwrap();
        assert_no_leak(world.into_inner());
    }
}

#[test]
fn random_bytes_behind_the_beginning_of_a_packet_leave_no_slot_behind() {
    for ip in Ip::BOTH {
        let (world, flow) = world(ip, &[]);
        let world = RefCell::new((world, 1));
        let headers = [flow.from_client(), flow.from_backend()].map(|frame| frame.bytes());
        let noise = proptest::collection::vec(any::<u8>(), 0..200);
        let strategy = (prop::sample::select(headers.to_vec()), 0..60usize, noise);
        cases(3000)
            .run(&strategy, |(mut frame, keep, noise)| {
                frame.truncate(14 + keep);
                frame.extend(noise);
                run_and_count(&world, &frame)
            })
            .unwrap();
        assert_no_leak(world.into_inner());
    }
}
