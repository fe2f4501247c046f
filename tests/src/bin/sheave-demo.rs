//! The demonstration: a laboratory in which apiservers die, freeze and fall ill while a client keeps asking.

use std::{
    collections::BTreeMap,
    io::BufRead as _,
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, program},
    load::{Asker, Client, Outcome, Report},
    stub::{Health, PORT},
};
use tokio::signal::unix::{SignalKind, signal};

/// Requests under way at the same time: one that hangs must not hold up the rest.
const LANES: usize = 8;
/// After each request of a lane.
const PAUSE: Duration = Duration::from_millis(30);
/// A request that has taken this long is lost.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest verdict: a reply that never comes (5 s), then a fresh connection that stays silent (1 s).
const VERDICT_LIMIT: Duration = Duration::from_secs(15);
/// How long requests go on after each turn of the story.
const SCENE: Duration = Duration::from_millis(1500);

/// Three apiservers behind TLS, sheave in front of them, and a client that keeps asking.
#[derive(Parser)]
struct Arguments {
    /// Tell the story once, unattended, and judge it: the exit code is 0 only if no request was lost but those on
    /// a killed or frozen server before sheave noticed.
    #[arg(long)]
    once: bool,
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
    println!("Building a laboratory: a client, a load balancer, three apiservers behind TLS ...");
    let cluster = Cluster::start(Shape::OneArm, 3)?;
    let started = Instant::now();
    let daemon = cluster.balance()?;
    println!(
        "sheave runs on the load balancer and found three ready apiservers in {:.1?}.",
        started.elapsed()
    );
    let client = Client::new(&cluster.ca_file(), SocketAddr::new(cluster.vip4, PORT), PATIENCE)?;
    let asker = Asker::start(&cluster.client, &client, LANES, PAUSE);
    println!("A client keeps asking https://{}:{PORT}, {LANES} new connections at a time.", cluster.vip4);
    let mut demo = Demo { daemon, cluster, asker, interrupted, faults: Vec::new() };
    if arguments.once { demo.story() } else { demo.play() }
}

/// The running demonstration. The daemon and the asker go before the ground they stand on.
struct Demo<'flag> {
    daemon: Daemon,
    asker: Asker,
    cluster: Cluster,
    interrupted: &'flag AtomicBool,
    faults: Vec<Fault>,
}

/// The time between a fault and sheave's verdict: until then, requests that meet the server are lost.
struct Fault {
    began: Instant,
    noticed: Option<Instant>,
}

impl Fault {
    /// Whether a lost request may have met the server. It has not said which server it met; but it was under way
    /// after the fault, and its connection was made before the verdict.
    fn excuses(&self, lost: &Outcome) -> bool {
        lost.ended >= self.began && self.noticed.is_none_or(|noticed| lost.started <= noticed)
    }
}

impl Demo<'_> {
    /// Everything that can happen to an apiserver, once.
    fn story(&mut self) -> Result<()> {
        self.scene("All is well")?;
        self.fault("api-1 is killed", |cluster| cluster.apiserver("api-1")?.stub.kill())?;
        self.verdict("api-1")?;
        self.scene("api-1 is out, nobody notices")?;

        self.fault("api-2 freezes: its kernel accepts connections, nobody answers", |cluster| {
            cluster.apiserver("api-2")?.stub.freeze()
        })?;
        self.verdict("api-2")?;
        self.scene("One of three is left")?;

        println!("\n>> api-1 is started again, api-2 thaws");
        self.cluster.apiserver("api-1")?.start()?;
        self.cluster.apiserver("api-2")?.stub.thaw()?;
        self.wait_for("api-1", "ready")?;
        self.wait_for("api-2", "ready")?;
        self.scene("All three again")?;

        println!("\n>> api-3 says 500 at /readyz: it is about to stop, and still serves");
        self.cluster.apiserver("api-3")?.stub.health(Health::Status(500))?;
        self.wait_for("api-3", "draining")?;
        // Requests that were under way have ended by then.
        self.go_on_for(PATIENCE)?;
        let before = self.new_connections("api-3")?;
        self.scene("api-3 drains: no new connection, no lost request")?;
        let after = self.new_connections("api-3")?;
        ensure!(before == after, "api-3 got {} new connections while draining", after - before);

        println!("\n>> api-3 is well again");
        self.cluster.apiserver("api-3")?.stub.health(Health::Normal)?;
        self.wait_for("api-3", "ready")?;
        self.scene("All is well")?;
        self.judge()
    }

    /// Lets requests go on for a while, then shows where things stand.
    fn scene(&mut self, title: &str) -> Result<()> {
        self.go_on_for(SCENE)?;
        println!("\n== {title}");
        print!("{}", self.daemon.status_table()?);
        println!("{}", self.tally());
        Ok(())
    }

    fn go_on_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.breathe()?;
        }
        Ok(())
    }

    /// Waits a moment, and stops the demonstration when the user asked for it.
    fn breathe(&mut self) -> Result<()> {
        thread::sleep(Duration::from_millis(20));
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        let ended = self.daemon.process().exited()?;
        ensure!(ended.is_none(), "sheave ended:\n{}", self.daemon.log());
        Ok(())
    }

    /// Does harm to a server.
    fn fault(&mut self, title: &str, harm: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
        println!("\n>> {title}");
        self.faults.push(Fault { began: Instant::now(), noticed: None });
        harm(&mut self.cluster)
    }

    /// Waits until sheave has noticed the latest fault.
    fn verdict(&mut self, server: &str) -> Result<()> {
        let state = self.wait_until(server, |state| !matches!(state, "ready" | "unknown"))?;
        let noticed = Instant::now();
        let fault = self.faults.last_mut().context("no fault")?;
        fault.noticed = Some(noticed);
        println!("   sheave: {server} is {state}, after {:.1?}", noticed - fault.began);
        Ok(())
    }

    fn wait_for(&mut self, server: &str, wanted: &str) -> Result<()> {
        let started = Instant::now();
        self.wait_until(server, |state| state == wanted)?;
        println!("   sheave: {server} is {wanted}, after {:.1?}", started.elapsed());
        Ok(())
    }

    /// Waits until all states of a server satisfy `wanted`, and returns one of them.
    fn wait_until(&mut self, server: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + VERDICT_LIMIT;
        loop {
            let status = self.daemon.status()?;
            let states = status.states(server);
            if !states.is_empty() && states.iter().all(|state| wanted(state)) {
                return Ok(states[0].to_owned());
            }
            ensure!(Instant::now() < deadline, "{server} is still {states:?} after {VERDICT_LIMIT:?}");
            self.breathe()?;
        }
    }

    fn new_connections(&mut self, server: &str) -> Result<u64> {
        Ok(self.cluster.apiserver(server)?.stub.connections()?.values().sum())
    }

    /// What the client has seen, in one line.
    fn tally(&self) -> String {
        let report = self.asker.report();
        let servers = report.by_server().into_iter().map(|(server, count)| format!("{server} {count}"));
        let (excused, lost) = self.losses(&report);
        format!(
            "requests: {} answered ({}), {} lost on a failing server before the verdict, {} lost otherwise",
            report.answered(),
            servers.collect::<Vec<_>>().join(", "),
            excused.len(),
            lost.len()
        )
    }

    /// Lost requests, divided into those that a fault excuses and others.
    fn losses<'report>(&self, report: &'report Report) -> (Vec<&'report Outcome>, Vec<&'report Outcome>) {
        report.failures().partition(|lost| self.faults.iter().any(|fault| fault.excuses(lost)))
    }

    /// Fails unless requests went on without a loss that is sheave's.
    fn judge(&self) -> Result<()> {
        let report = self.asker.report();
        let (_, lost) = self.losses(&report);
        let reasons: BTreeMap<_, usize> = lost.iter().fold(BTreeMap::new(), |mut reasons, outcome| {
            *reasons.entry(outcome.result.as_ref().err()).or_default() += 1;
            reasons
        });
        ensure!(lost.is_empty(), "{} requests were lost: {reasons:#?}", lost.len());
        ensure!(report.by_server().len() == 3, "not every server was used: {:?}", report.by_server());
        println!("\nNo request was lost after a verdict, none on a server that was well.");
        Ok(())
    }

    /// Lets the user do the harm.
    fn play(&mut self) -> Result<()> {
        self.scene("All is well")?;
        self.print_help()?;
        let lines = lines_of_stdin();
        loop {
            match lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) if matches!(line.trim(), "quit" | "exit") => return Ok(()),
                Ok(line) => {
                    if let Err(error) = self.obey(&line) {
                        println!("{error:#}");
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Started without a terminal: stays up until it is told to stop.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(200)),
            }
            self.breathe()?;
        }
    }

    fn print_help(&self) -> Result<()> {
        println!(
            "
Play with it. Type here, in any order:
  kill api-1        start api-1       a crash, and its end
  freeze api-2      thaw api-2        it accepts connections and never answers
  fail api-3        heal api-3        /readyz says 500, everything else works
  status                              or just Enter: where things stand
  quit                                or Ctrl-C: removes the laboratory
or in another terminal, as root:
  {}
  {}
",
            shown(&self.daemon.command("status")?),
            shown(&self.cluster.curl(self.cluster.vip4, "/name")),
        );
        Ok(())
    }

    fn obey(&mut self, line: &str) -> Result<()> {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            [] | ["status"] => {
                print!("{}", self.daemon.status_table()?);
                println!("{}", self.tally());
                return Ok(());
            }
            ["help"] => return self.print_help(),
            ["kill", server] => self.fault(line.trim(), |cluster| cluster.apiserver(server)?.stub.kill())?,
            ["freeze", server] => {
                self.fault(line.trim(), |cluster| cluster.apiserver(server)?.stub.freeze())?
            }
            ["start", server] => return self.cluster.apiserver(server)?.start(),
            ["thaw", server] => return self.cluster.apiserver(server)?.stub.thaw(),
            ["fail", server] => return self.cluster.apiserver(server)?.stub.health(Health::Status(500)),
            ["heal", server] => return self.cluster.apiserver(server)?.stub.health(Health::Normal),
            _ => bail!("{:?} is no command: try help", line.trim()),
        }
        self.verdict(words[1])
    }
}

/// A command as it is typed.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The lines that are typed, without waiting for them.
fn lines_of_stdin() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
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
