//! A service's checks as the controller sees them.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{sync::mpsc, time::timeout};

use super::*;
use crate::health::{Event, State, TargetId};

async fn receive(events: &mut mpsc::Receiver<Event>) -> Event {
    timeout(AMPLE, events.recv()).await.expect("an event in time").expect("running checks")
}

async fn until(events: &mut mpsc::Receiver<Event>, state: State) -> Event {
    loop {
        let event = receive(events).await;
        if event.state == state {
            return event;
        }
    }
}

#[tokio::test]
async fn first_checks_are_made_at_once_and_all_together() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let frozen = Server::start(Layer::Frozen, |_| Answer::ok()).await;
    let (sender, mut events) = mpsc::channel(16);
    let hour = Duration::from_secs(3600);
    let check = Check { interval: hour, fast_interval: hour, ..cluster.check() };
    let addresses = [frozen.address, server.address, server.address];
    let targets =
        addresses.iter().zip(0..).map(|(address, backend)| target(backend, *address, check.clone()));
    let handle = spawn(targets.collect(), sender);

    // The frozen one, though first, keeps nobody waiting.
    let mut ready = Vec::new();
    for _ in 0..2 {
        let event = receive(&mut events).await;
        assert_eq!((event.state, event.successes, event.failures), (State::Ready, 1, 0));
        assert_eq!(event.transition.unwrap().from, State::Unknown);
        ready.push(event.id.backend);
    }
    ready.sort_unstable();
    assert_eq!(ready, [1, 2]);

    let id = TargetId { service: 0, backend: 1 };
    assert!(handle.check_now(id));
    let event = receive(&mut events).await;
    assert_eq!((event.id, event.successes, event.transition), (id, 2, None));
    assert!(!handle.check_now(TargetId { service: 1, backend: 0 }));

    drop(handle);
    assert!(timeout(AMPLE, events.recv()).await.unwrap().is_none(), "nobody is left to send events");
}

#[tokio::test]
async fn a_backend_falls_hurriedly_and_rises_again() {
    let cluster = Cluster::new();
    let well = Arc::new(AtomicBool::new(true));
    let says = Arc::clone(&well);
    let server = cluster
        .apiserver(move |_| match says.load(Ordering::Relaxed) {
            true => Answer::ok(),
            false => Answer::status("500 Internal Server Error", "[-]shutdown failed: reason withheld\n"),
        })
        .await;
    let (sender, mut events) = mpsc::channel(1);
    let check = Check { interval: Duration::from_millis(100), ..cluster.check() };
    let _handle = spawn(vec![target(0, server.address, check)], sender);
    until(&mut events, State::Ready).await;

    well.store(false, Ordering::Relaxed);
    let event = until(&mut events, State::Draining).await;
    assert_eq!(event.failures, 2);
    let transition = event.transition.unwrap();
    assert_eq!((transition.from, transition.to), (State::Ready, State::Draining));
    assert_eq!(transition.report, event.report);
    assert_eq!(event.report.info, "failed: shutdown");

    well.store(true, Ordering::Relaxed);
    let event = until(&mut events, State::Ready).await;
    assert_eq!(event.successes, 2);
}

#[tokio::test]
async fn a_frozen_backend_becomes_silent_and_its_silence_is_timed() {
    let server = Server::start(Layer::Frozen, |_| Answer::ok()).await;
    let (sender, mut events) = mpsc::channel(1);
    let check = Check { connect_timeout: SHORT, ..check(CheckKind::Https) };
    let _handle = spawn(vec![target(0, server.address, check)], sender);
    let first = receive(&mut events).await;
    assert_eq!((first.state, first.failures), (State::Unknown, 1));
    let second = receive(&mut events).await;
    assert_eq!((second.state, second.failures), (State::Silent, 2));
    assert_eq!(second.silent_since, first.silent_since);
}

#[tokio::test]
async fn an_accusation_is_settled_on_a_fresh_connection_at_once() {
    let cluster = Cluster::new();
    let server = cluster.silent_after_first().await;
    let (sender, mut events) = mpsc::channel(1);
    let hour = Duration::from_secs(3600);
    let check = Check { interval: hour, timeout: hour, connect_timeout: hour, ..cluster.check() };
    let handle = spawn(vec![target(0, server.address, check)], sender);
    receive(&mut events).await;
    let id = TargetId { service: 0, backend: 0 };
    handle.check_now(id);
    assert!(timeout(SHORT, events.recv()).await.is_err(), "the connection of old is waited for");
    handle.accuse(id, true);
    let event = receive(&mut events).await;
    assert!(event.report.fresh_connection && event.successes == 2, "{event:?}");
}

const ONLY: TargetId = TargetId { service: 0, backend: 0 };
const INTERVAL: Duration = Duration::from_secs(10);

/// How many checks are made in thirty intervals, while somebody vouches for the target or nobody does.
async fn made_in_thirty(handle: &Handle, events: &mut mpsc::Receiver<Event>, vouched: bool) -> usize {
    let end = tokio::time::Instant::now() + INTERVAL * 30;
    let mut vouching = tokio::time::interval(INTERVAL / 20);
    let mut checks = 0;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(end) => return checks,
            _ = vouching.tick(), if vouched => handle.vouch(ONLY, tokio::time::Instant::now().into_std()),
            event = receive(events) => {
                assert_eq!(event.state, State::Ready);
                checks += 1;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn checks_are_left_out_while_somebody_vouches_and_nothing_is_odd() {
    // The kernel accepts.
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (sender, mut events) = mpsc::channel(16);
    let check = Check { interval: INTERVAL, fast_interval: INTERVAL / 10, ..check(CheckKind::Tcp) };
    let handle = spawn(vec![target(0, server.local_addr().unwrap(), check)], sender);
    until(&mut events, State::Ready).await;
    let alone = made_in_thirty(&handle, &mut events, false).await;
    let vouched = made_in_thirty(&handle, &mut events, true).await;
    assert!((29..=31).contains(&alone) && (9..=12).contains(&vouched), "{alone}, {vouched}");
    handle.accuse(ONLY, true);
    let accused = made_in_thirty(&handle, &mut events, true).await;
    assert!((29..=31).contains(&accused), "{accused}");
    handle.accuse(ONLY, false);
    assert!(made_in_thirty(&handle, &mut events, true).await <= 12);

    // And whoever is asked for is asked at once.
    let begin = tokio::time::Instant::now();
    handle.vouch(ONLY, begin.into_std());
    handle.check_now(ONLY);
    receive(&mut events).await;
    assert!(begin.elapsed() <= INTERVAL / 10, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn silence_while_our_own_link_may_be_down_is_not_the_backends() {
    let cluster = Cluster::new();
    let frozen = Server::start(Layer::Frozen, |_| Answer::ok()).await;
    let ill = cluster.apiserver(|_| Answer::status("500 Internal Server Error", "")).await;
    let (sender, mut events) = mpsc::channel(16);
    let timeout = Duration::from_millis(100);
    let check = Check {
        interval: timeout,
        fast_interval: timeout,
        connect_timeout: timeout,
        timeout,
        ..cluster.check()
    };
    let targets = vec![target(0, frozen.address, check.clone()), target(1, ill.address, check)];
    let handle = spawn(targets, sender);
    let until = std::time::Instant::now() + 10 * timeout;
    handle.cut_off(until);
    let mut answered = 0;
    loop {
        let event = receive(&mut events).await;
        if event.id.backend == 0 {
            assert!(std::time::Instant::now() >= until, "of a check that began before");
            assert_eq!(event.failures, 1, "those before are not counted");
            break;
        }
        answered += 1;
    }
    assert!(answered > 1, "an answer is an answer");
}

#[tokio::test]
async fn a_backend_without_checks_is_ready_and_left_alone() {
    let (sender, mut events) = mpsc::channel(1);
    let nowhere = "192.0.2.1:6443".parse().unwrap();
    let check = Check { interval: Duration::from_millis(1), ..check(CheckKind::None) };
    let handle = spawn(vec![target(0, nowhere, check)], sender);
    assert_eq!(receive(&mut events).await.state, State::Ready);
    assert!(timeout(SHORT, events.recv()).await.is_err());
    handle.check_now(TargetId { service: 0, backend: 0 });
    assert_eq!(receive(&mut events).await.successes, 2);
}

#[tokio::test]
async fn an_update_ends_begins_and_goes_on_with_the_verdict_that_stood() {
    let cluster = Cluster::new();
    let server = cluster.apiserver(|_| Answer::ok()).await;
    let ill = cluster.apiserver(|_| Answer::status("500 Internal Server Error", "")).await;
    let (sender, mut events) = mpsc::channel(16);
    let hour = Duration::from_secs(3600);
    let check = Check { interval: hour, fast_interval: hour, fall: 3, ..cluster.check() };
    let mut handle = spawn(
        vec![target(0, server.address, check.clone()), target(1, server.address, check.clone())],
        sender,
    );
    until(&mut events, State::Ready).await;
    until(&mut events, State::Ready).await;

    // The first is gone, the second is checked elsewhere, the third is new.
    let elsewhere = Check { port: Some(ill.address.port()), ..check.clone() };
    let targets =
        vec![target(1, server.address, elsewhere.clone()), target(2, server.address, check.clone())];
    handle.update(targets.clone(), |id| if id.backend == 1 { State::Ready } else { State::Unknown });
    let mut seen = [receive(&mut events).await, receive(&mut events).await];
    seen.sort_unstable_by_key(|event| event.id);
    assert_eq!((seen[0].id.backend, seen[0].state, seen[0].failures), (1, State::Ready, 1));
    assert_eq!((seen[1].id.backend, seen[1].state, seen[1].successes), (2, State::Ready, 1));

    // The same again disturbs nobody: the count goes on.
    handle.update(targets, |_| State::Unknown);
    assert!(!handle.check_now(TargetId { service: 0, backend: 0 }));
    assert!(handle.check_now(TargetId { service: 0, backend: 1 }));
    let event = receive(&mut events).await;
    assert_eq!((event.id.backend, event.state, event.failures), (1, State::Ready, 2));
}

#[tokio::test(start_paused = true)]
async fn checks_in_a_hurry_are_a_fast_interval_apart() {
    let (sender, mut events) = mpsc::channel(16);
    let nowhere = "192.0.2.1:6443".parse().unwrap();
    let hour = Duration::from_secs(3600);
    let fast_interval = Duration::from_millis(200);
    let check = Check { interval: hour, fast_interval, ..check(CheckKind::None) };
    let handle = spawn(vec![target(0, nowhere, check)], sender);
    let id = receive(&mut events).await.id;
    let begin = tokio::time::Instant::now();
    let mut times = Vec::new();
    while begin.elapsed() < Duration::from_secs(1) {
        // As the signals of a busy data path.
        handle.check_now(id);
        tokio::time::sleep(Duration::from_millis(25)).await;
        while events.try_recv().is_ok() {
            times.push(begin.elapsed().as_millis());
        }
    }
    assert!(times[0] <= 25, "the first is made at once: {times:?}");
    // Looked at every 25 ms.
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 175), "{times:?}");
    assert!(times.len() >= 4, "{times:?}");
}
