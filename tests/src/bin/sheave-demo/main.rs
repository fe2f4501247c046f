//! The demonstration: a laboratory in which apiservers die, freeze and fall ill while a client keeps asking.

mod demo;
mod edge;
mod losses;
mod node;
mod play;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Result, bail};
use clap::Parser;
use lb_tests::daemon::program;
use tokio::signal::unix::{SignalKind, signal};

use self::demo::Demo;

/// Requests under way at the same time: one that hangs must not hold up the rest.
const LANES: usize = 8;
/// After each request of a lane.
const PAUSE: Duration = Duration::from_millis(30);
/// A request that has taken this long is lost. One whose server refused its SYN is sent to another a second later, when the
/// SYN is sent again, and is answered.
const PATIENCE: Duration = Duration::from_millis(2500);

/// Three apiservers behind TLS, sheave in front of them, and a client that keeps asking.
#[derive(Parser)]
struct Arguments {
    /// Tell the story once, unattended, and judge it: the exit code is 0 only if no request was lost but those on
    /// a killed or frozen server before sheave noticed, and the watch on a dead server was told at once.
    #[arg(long)]
    once: bool,
    /// Not a load balancer but a node: clients that reach the apiservers by 127.0.0.1.
    #[arg(long)]
    node: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let interrupted = Arc::new(AtomicBool::new(false));
    watch_signals(Arc::clone(&interrupted))?;
    let result = run(&arguments, &interrupted);
    if interrupted.load(Ordering::Relaxed) {
        println!("\ninterrupted; the laboratory is gone");
        return if arguments.once { bail!("the story was not told to its end") } else { Ok(()) };
    }
    result
}

fn run(arguments: &Arguments, interrupted: &AtomicBool) -> Result<()> {
    // Before anything is built.
    program()?;
    let mut demo =
        if arguments.node { Demo::on_a_node(interrupted)? } else { Demo::on_the_edge(interrupted)? };
    match arguments {
        Arguments { once: false, .. } => demo.play(),
        Arguments { node: true, .. } => demo.tell_of_a_node(),
        Arguments { node: false, .. } => demo.tell_of_the_edge(),
    }
}

/// Notes the signals that ask for an end: the laboratory is then taken down in good order.
fn watch_signals(interrupted: Arc<AtomicBool>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let context = runtime.enter();
    let [interrupt, terminate, hang_up] = kinds.map(signal);
    let (mut interrupt, mut terminate, mut hang_up) = (interrupt?, terminate?, hang_up?);
    drop(context);
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hang_up.recv() => {}
            }
        });
        interrupted.store(true, Ordering::Relaxed);
    });
    Ok(())
}
