//! What can go wrong between the daemon and the kernel, and what to do about it.

use std::io;

use aya::programs::ProgramError;
use thiserror::Error;

/// An operation on programs, maps or interfaces that failed.
#[derive(Debug, Error)]
pub enum DataplaneError {
    /// The kernel refused the object.
    #[error(
        "the kernel does not take the program: {0}\n  needed: root (or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON) and a kernel that takes the programs: Linux 6.1 and newer do; `sheave doctor` says what is missing"
    )]
    Load(#[source] Box<aya::EbpfError>),
    /// The verifier, or the kernel's lack of a feature.
    #[error(
        "the kernel does not take program {name}: {source}\n  needed: root (or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON) and a kernel that takes the programs: Linux 6.1 and newer do; `sheave doctor` says what is missing"
    )]
    Program {
        /// Which.
        name: &'static str,
        /// Why.
        source: Box<aya::programs::ProgramError>,
    },
    /// The verifier read the program and said no.
    #[error(
        "the kernel's verifier does not take program {name}: {reason}\n{last_words}\n  Linux 6.1 and newer are tried: an older one may lack \
         what the program needs; `--log debug` shows all that the verifier said"
    )]
    Verifier {
        /// Which.
        name: &'static str,
        /// What the system call said.
        reason: io::Error,
        /// The end of the verifier's log, a line each.
        last_words: String,
    },
    /// The object is not the one this code was written for.
    #[error("the embedded program has no {0}: this build is broken, build it again with `cargo xtask build`")]
    Missing(&'static str),
    /// The kernel's clock could not be told from others like it.
    #[error(
        "cannot find out how fast the kernel's clock ticks: the measurement was interrupted again and again for 10 s; start \
         sheave again when this host is less busy"
    )]
    Clock,
    /// The build was told to leave the program out.
    #[error("this build has no kernel program in it (SHEAVE_SKIP_EBPF was set): build it again without")]
    Empty,
    /// Other SNAT addresses cannot be had now.
    #[error(transparent)]
    Snat(#[from] super::SnatError),
    /// A map of another type.
    #[error("map {name} is not an array: this build is broken, build it again with `cargo xtask build`")]
    NotAnArray {
        /// Which.
        name: &'static str,
    },
    /// A map's description could not be read.
    #[error("cannot ask the kernel about map {name}: {source}")]
    MapInfo {
        /// Which.
        name: &'static str,
        /// Why.
        source: aya::maps::MapError,
    },
    /// A map with other values than this code's.
    #[error("map {name} has values of {found} bytes, expected {expected}: this build is broken")]
    ValueSize {
        /// Which.
        name: &'static str,
        /// This code's.
        expected: usize,
        /// The map's.
        found: u32,
    },
    /// A map could not be mapped into memory.
    #[error("cannot map {name} into memory: {source}")]
    MapMemory {
        /// Which.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("cannot change map {name}: {source}")]
    Map {
        /// Which.
        name: &'static str,
        /// Why.
        source: aya::maps::MapError,
    },
    /// Somebody else's XDP program is on the interface.
    #[error(
        "another XDP program is on {interface} already{owner}; sheave never replaces a program that is not its own\n  see what it is with `bpftool net show dev {interface}`; take it off with its own tool, or with `ip link set dev {interface} xdp off`"
    )]
    Occupied {
        /// The interface's name.
        interface: String,
        /// Its id and name, where known.
        owner: String,
    },
    /// The connect hook may not be on the cgroup.
    #[error(
        "the kernel does not let program {name} of the connect hook on the cgroup: {source}\n  needed: root (or CAP_BPF \
         and CAP_NET_ADMIN); and nobody else's program there that wants to be the only one: see `bpftool cgroup tree`"
    )]
    HookRefused {
        /// Which.
        name: &'static str,
        /// What the kernel said.
        source: Box<aya::programs::ProgramError>,
    },
    /// The driver has no XDP, and generic mode would lose data there.
    #[error(
        "{interface}: driver {driver} does not take the program in native mode ({source}), and generic mode would corrupt packets with unfinished checksums there\n   = help: {fix}"
    )]
    NoNativeMode {
        /// The interface's name.
        interface: String,
        /// Its driver.
        driver: String,
        /// What usually helps.
        fix: String,
        /// What the kernel said.
        source: Box<aya::programs::ProgramError>,
    },
    /// The program could not be attached.
    #[error("cannot attach to {interface} in {mode} mode: {source}{fix}")]
    Attach {
        /// The interface's name.
        interface: String,
        /// Which mode was tried.
        mode: &'static str,
        /// What the kernel said.
        source: Box<aya::programs::ProgramError>,
        /// What helps, on a line of its own; empty: not known.
        fix: String,
    },
    /// More than fit into a map.
    #[error("too many {what}: at most {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// What is pinned is in the way.
    #[error(transparent)]
    Pins(#[from] super::PinsError),
    /// The program that is attached could not be replaced by this one.
    #[error("cannot replace the program on the interface with index {interface}: {source}")]
    Replace {
        /// The interface's index.
        interface: u32,
        /// What the kernel said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A system call beside the maps.
    #[error("{call}: {source}")]
    System {
        /// Which.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl DataplaneError {
    /// The program that the kernel refused, and why: of the verifier's log the sentence, without the figures behind it.
    pub fn refused_program(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Verifier { name, last_words, .. } => {
                let is_figure = |line: &str| {
                    ["processed ", "verification time ", "stack depth "]
                        .iter()
                        .any(|start| line.starts_with(start))
                };
                let mut lines = last_words.lines().rev().map(str::trim);
                let reason = lines.find(|line| !is_figure(line)).unwrap_or("the verifier gives no reason");
                Some((name, reason.to_owned()))
            }
            Self::Program { name, source } => Some((name, source.to_string())),
            _ => None,
        }
    }

    /// Why a program was not loaded. The verifier says thousands of lines, and what matters in the last few.
    pub(super) fn not_loaded(name: &'static str, source: ProgramError) -> Self {
        const LAST_WORDS: usize = 5;
        match source {
            ProgramError::LoadError { io_error, verifier_log }
                if !verifier_log.to_string().trim().is_empty() =>
            {
                let log = verifier_log.to_string();
                tracing::debug!("the verifier about {name}:\n{log}");
                let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
                let last = lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n  ");
                Self::Verifier { name, reason: io_error, last_words: format!("  {last}") }
            }
            source => Self::Program { name, source: Box::new(source) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_the_verifiers_sentence_and_not_its_figures() {
        let error = DataplaneError::Verifier {
            name: "sheave",
            reason: io::Error::from_raw_os_error(libc::EACCES),
            last_words: "  113: (0f) r1 += r2\n  math between pkt pointer and register with unbounded min value is not \
                         allowed\n  processed 4511 insns (limit 1000000) max_states_per_insn 4"
                .to_owned(),
        };
        let (program, reason) = error.refused_program().unwrap();
        assert_eq!(program, "sheave");
        assert_eq!(reason, "math between pkt pointer and register with unbounded min value is not allowed");
    }
}
