//! What the program notices about a backend while it forwards.

use lb_common::outcome::Outcome;
use lb_tests::packets::{ACK, Frame, Ip, RST, Shape, World};

/// Does anybody wait for the only backend, and has it ever refused a SYN?
fn noticed(world: &mut World) -> (bool, bool) {
    let signal = world.dataplane.signals([1].into_iter()).unwrap()[0];
    (signal.waiting.is_some(), signal.refused != 0)
}

#[test]
fn somebody_waits_from_the_question_to_the_answers_first_byte() {
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape { backends: 1, ..Shape::new(ip) });
        assert_eq!(noticed(&mut world), (false, false));
        let flow = world.open(ip.client(1), ip.listener());
        assert_eq!(noticed(&mut world), (true, false), "a SYN is a question");
        world.run(&flow.syn_ack().bytes());
        world.run(&flow.from_client().bytes());
        world.run(&flow.from_backend().bytes());
        assert_eq!(noticed(&mut world), (true, false), "a kernel's acknowledgements answer nothing");
        let answer = Frame { payload: vec![7; 10], ..flow.from_backend() };
        assert_eq!(world.run(&answer.bytes()).outcome, Outcome::Replied);
        assert_eq!(noticed(&mut world), (false, false));
        // A tick later.
        std::thread::sleep(std::time::Duration::from_millis(25));
        world.run(&flow.from_client().bytes());
        assert_eq!(noticed(&mut world), (false, false), "nor is an acknowledgement a question");
        world.run(&Frame { payload: vec![7; 10], ..flow.from_client() }.bytes());
        assert_eq!(noticed(&mut world), (true, false));
    }
}

#[test]
fn a_wait_that_is_forgotten_makes_way_for_the_next() {
    let mut world = World::build(&Shape { backends: 1, ..Shape::new(Ip::V4) });
    let flow = world.open(Ip::V4.client(1), Ip::V4.listener());
    let asked = world.dataplane.signals([flow.backend].into_iter()).unwrap()[0].asked;
    world.dataplane.forget_wait(flow.backend, asked.wrapping_add(1));
    assert_eq!(noticed(&mut world), (true, false), "another wait than was meant");
    world.dataplane.forget_wait(flow.backend, asked);
    assert_eq!(noticed(&mut world), (false, false));
    world.run(&Frame::syn(flow.client, flow.listener).bytes());
    assert_eq!(noticed(&mut world), (true, false));
}

#[test]
fn a_refused_syn_is_noticed() {
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape { backends: 1, ..Shape::new(ip) });
        let flow = world.open(ip.client(1), ip.listener());
        world.run(&Frame { flags: RST | ACK, ..flow.from_backend() }.bytes());
        assert!(noticed(&mut world).1);
    }
}
