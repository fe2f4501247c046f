//! What holds for every packet, and for every history of packets.

use proptest::{collection::vec, prelude::*};

use super::lab::{
    ACK, DOUBLE_TAGGED, FIN, FRONT, Lab, OURS, PLAIN, ROUTER, RST, SYN, Segment, TAGGED, VERSIONS, Version,
};
use crate::{Outcome, outcome::Action};

fn version() -> impl Strategy<Value = Version> {
    prop::sample::select(VERSIONS.to_vec())
}

fn port() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![PLAIN, TAGGED, DOUBLE_TAGGED])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Checksums of what is sent are verified by the lab.
    #[test]
    fn a_payload_arrives_as_it_was_sent(
        version in version(), port in port(), client: u16, options in 0usize..4,
        up in vec(any::<u8>(), 0..1300), down in vec(any::<u8>(), 0..1300), sequence: u32, acknowledgement: u32,
    ) {
        let lab = Lab::new();
        let flow = lab.establish(version.client(client), version.vip());
        let request = Segment { sequence, acknowledgement, ..flow.up(ACK) }
            .with_payload(&up).with_options(options).on(port);
        let sent = lab.send(&request).sent(Outcome::Forwarded);
        prop_assert_eq!(&sent.payload, &up);
        prop_assert_eq!((sent.sequence, sent.acknowledgement), (sequence, acknowledgement));
        let answer = Segment { sequence, acknowledgement, ..flow.down(ACK) }
            .with_payload(&down).with_options(options).on(port);
        let sent = lab.send(&answer).sent(Outcome::Replied);
        prop_assert_eq!(&sent.payload, &down);
        prop_assert_eq!((sent.sequence, sent.acknowledgement), (sequence, acknowledgement));
        prop_assert_eq!((sent.from, sent.to), (flow.listener, flow.client));
    }

    /// Two load balancers with one key agree on every flow's slot and backend.
    #[test]
    fn one_tuple_has_one_backend(version in version(), clients in vec(any::<u16>(), 1..40)) {
        let (lab, peer) = (Lab::new(), Lab::new());
        for client in &clients {
            let flow = lab.open(version.client(*client), version.vip());
            prop_assert_eq!(lab.open(version.client(*client), version.vip()), flow);
            let theirs = peer.open(version.client(*client), version.vip());
            prop_assert_eq!(theirs.backend, flow.backend);
        }
    }

    /// No two flows have one SNAT port, whatever happened to them before.
    #[test]
    fn flows_do_not_meet(
        version in version(), story in vec((0u16..30, any::<bool>(), 0u8..32, 0u64..3), 1..200),
    ) {
        let lab = Lab::with_sets(16);
        let mut flows = std::collections::BTreeMap::new();
        for (client, up, flags, units) in story {
            let listener = if client % 2 == 0 { version.vip() } else { version.other_vip() };
            let address = version.client(client / 2);
            lab.memory.advance(units);
            if up {
                let ran = lab.send(&Segment::new(address, listener, flags));
                if ran.outcome == Outcome::Forwarded {
                    let sent = ran.sent(Outcome::Forwarded);
                    flows.insert(client, super::lab::Flow { client: address, listener, snat: sent.from, backend: sent.to });
                }
            } else if let Some(flow) = flows.get(&client) {
                let ran = lab.send(&flow.down(flags));
                if ran.outcome == Outcome::Replied {
                    let sent = ran.sent(Outcome::Replied);
                    let slot = lab.slot(sent.to, sent.from);
                    prop_assert_eq!(slot.slot().port(), flow.snat.port(), "to the owner of the slot");
                }
            }
            let mut slots: Vec<_> = (0..30u16)
                .map(|client| {
                    let listener = if client % 2 == 0 { version.vip() } else { version.other_vip() };
                    lab.slot(version.client(client / 2), listener)
                })
                .filter(|found| found.is_some())
                .map(|found| found.slot().port())
                .collect();
            let live = slots.len();
            prop_assert_eq!(live, lab.occupied(), "every slot can be found by its tuple");
            slots.sort_unstable();
            slots.dedup();
            prop_assert_eq!(slots.len(), live);
        }
    }

    /// A packet for somebody else is passed as it is (the lab compares the bytes).
    #[test]
    fn foreign_segments_are_left_alone(
        version in version(), port in port(), from: u16, to: u16, flags in 0u8..32, payload in vec(any::<u8>(), 0..100),
    ) {
        let lab = Lab::new();
        let segment = Segment::new(version.client(from), version.client(to), flags).with_payload(&payload).on(port);
        prop_assert_eq!(lab.send(&segment).outcome, Outcome::NotOurs);
    }

    #[test]
    fn garbage_is_never_sent(mut bytes in vec(any::<u8>(), 0..200), start in 0usize..4) {
        let lab = Lab::new();
        // Some of it looks a little like a packet of ours.
        let header = [&OURS[..], &ROUTER, &[[8, 0], [0x86, 0xdd], [0x81, 0], [0x88, 0xa8]][start]].concat();
        for (place, byte) in bytes.iter_mut().zip(header) {
            *place = byte;
        }
        prop_assert_ne!(lab.run(FRONT, &bytes).outcome.action(), Action::Transmit);
        prop_assert_eq!(lab.occupied(), 0);
    }

    /// Damage to a packet's headers: whatever is sent all the same was whole and ours, and at most its own slot is
    /// touched. (A damaged TCP checksum is not looked at here, so the payload may be wrong; then it stays so.)
    #[test]
    fn damaged_headers_do_no_harm(
        version in version(), port in port(), up: bool, flags in 0u8..32,
        damage in vec((0usize..74, any::<u8>()), 1..4), options in 0usize..3,
    ) {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        let segment = if up { flow.up(flags) } else { flow.down(flags) }.with_options(options).on(port);
        let mut bytes = segment.bytes();
        for (offset, value) in damage {
            let length = bytes.len();
            bytes[offset % length] = value;
        }
        let mut frame = crate::bytes::Bytes::new(&bytes, FRONT).unwrap();
        let done = crate::pipeline(&mut frame, &&lab.memory);
        match done.action() {
            Action::Pass => prop_assert_eq!(frame.bytes(), &bytes[..]),
            Action::Transmit => {
                let sent = Segment::read(frame.bytes());
                prop_assert!(sent.is_some_and(|sent| sent.to == flow.backend || sent.to == flow.client
                    || [1, 2, 3].iter().any(|number| version.backend(*number) == sent.to)));
            }
            Action::Drop => {}
        }
        prop_assert!(lab.occupied() <= 2);
        if !flags & (FIN | RST) != 0 {
            lab.send(&flow.up(ACK)).sent(Outcome::Forwarded);
            lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
        }
    }
}
