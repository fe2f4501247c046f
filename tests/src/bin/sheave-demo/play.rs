//! The user does the harm.

use std::{
    io::BufRead as _,
    process::Command,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Result, bail};
use lb_tests::stub::{Health, Stub};

use crate::demo::Demo;

impl Demo<'_> {
    /// Lets the user do the harm.
    pub(crate) fn play(&mut self) -> Result<()> {
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
            self.by_hand,
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
            ["kill", server] => self.fault(server, line.trim(), Stub::kill)?,
            ["freeze", server] => self.fault(server, line.trim(), Stub::freeze)?,
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
pub(crate) fn shown(command: &Command) -> String {
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
