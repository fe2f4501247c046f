//! What is tried in every kernel: do the programs load, do they decide as they should, does the load balancer serve.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    cluster::{Cluster, NODE_PORT, Shape},
    daemon::{Daemon, has_xdp},
    dial::dial,
    load::Crowd,
};
use lb_userspace::dataplane::{OBJECT, probe};

use crate::{
    PREFIX,
    joints::Joint,
    serving::{serve, wait_for_the_network},
};

/// The packet tests' program, as the host has put it into the machine.
const PACKETS: &str = "packets";
/// Connections that are open while the daemon is killed.
const OPEN: usize = 20;

/// What the verifier may go through for one program. It gives up at a million, but the time that it takes is a daemon's
/// start.
const VERIFIED_INSTRUCTIONS: u32 = 250_000;
/// Packet tests that are the host's alone: one has a limit for the host's kernel, where [`VERIFIED_INSTRUCTIONS`] is for
/// all; the other counts how evenly a hash fills a table, which is the same everywhere, with millions of packets.
const HOST_ONLY: [&str; 2] = ["the_verifier_has_little_to_do", "at_eighty_per_cent_fill"];

/// Packet tests that route by a veth: in a kernel of which only the image can be had, and no modules, there is none.
const NEEDS_VETH: [&str; 1] = ["a_client_whose_router_was_not_remembered_is_answered_by_the_route"];

/// Loads every program, with and without the packet log, and says how many instructions the verifier went through.
pub(crate) fn load() -> Result<()> {
    let mut above = Vec::new();
    for (log_one_in, suffix) in [(None, ""), (Some(1), "+log")] {
        for program in probe(OBJECT, log_one_in)? {
            // Only one program has a log in it.
            if let Some(count) = program.verified_instructions
                && (suffix.is_empty() || program.name == "sheave")
            {
                println!("{PREFIX}figure {}{suffix} {count}", program.name);
                above.extend((count > VERIFIED_INSTRUCTIONS).then_some(program.name));
            }
        }
    }
    ensure!(above.is_empty(), "above {VERIFIED_INSTRUCTIONS} verified instructions: {above:?}");
    Ok(())
}

/// Modules of the packet tests that look at what becomes of single packets: every outcome, every event, every kind of
/// packet is in them.
pub(crate) const DECISIONS: [&str; 8] =
    ["budget::", "icmp::", "outcomes::", "refusal::", "routes::", "stack::", "tags::", "translation::"];
/// Those of what becomes of flows and tables, and those of hostile packets: minutes on emulated processors.
pub(crate) const HISTORIES: [&str; 9] = [
    "emptied::",
    "flight_recorder::",
    "hostile::",
    "killed::",
    "selection::",
    "source_budget::",
    "states::",
    "table::",
    "witness::",
];

/// The tests of some modules that hand packets to the program with `BPF_PROG_TEST_RUN`.
pub(crate) fn packets(modules: &[&str]) -> Result<()> {
    let without_veth: &[&str] = if has_veth()? { &[] } else { &NEEDS_VETH };
    without_veth.iter().for_each(|test| println!("not run, as this kernel has no veth: {test}"));
    let mut child = Command::new(PACKETS)
        .arg("--nocapture")
        .args(modules)
        .args(HOST_ONLY.iter().chain(without_veth).flat_map(|name| ["--skip", name]))
        .env("RUST_TEST_THREADS", "2")
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the packet tests")?;
    let output = child.stdout.take().context("the tests have no output")?;
    let (mut failed, mut passed) = (Vec::new(), 0);
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        let name = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"));
        failed.extend(name.map(str::to_owned));
        passed += usize::from(line.ends_with(" ... ok"));
    }
    let status = child.wait()?;
    ensure!(status.success(), "{status}: {}", failed.join(" "));
    ensure!(passed > 0, "no packet test has a name with any of {modules:?}");
    Ok(())
}

/// Whether this kernel can make a veth.
fn has_veth() -> Result<bool> {
    let ip = |arguments: &[&str]| Command::new("ip").args(arguments).output().context("running ip");
    let made = ip(&["link", "add", "asked", "type", "veth", "peer", "name", "asked-peer"])?;
    if made.status.success() {
        ip(&["link", "del", "asked"])?;
        return Ok(true);
    }
    let said = String::from_utf8_lossy(&made.stderr);
    ensure!(said.contains("Unknown device type"), "asking for a veth: {said}");
    Ok(false)
}

/// One arm on a virtio card: requests, the connect hook, `kill -9` and the next start, and the end of everything.
pub(crate) fn smoke() -> Result<()> {
    let mut join =
        |lab: &_, host: &mut _, segment, number| Joint::card("front").join(lab, host, segment, number);
    let cluster = Cluster::start_joined(Shape::OneArm, 2, &mut join, true)?;
    wait_for_the_network(&cluster)?;
    let mut settings = cluster.settings()?;
    let local = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let local = local.map(|address| SocketAddr::new(address, NODE_PORT));
    settings.listen.extend(local);
    let start = || -> Result<Daemon> {
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings)?;
        daemon.wait_ready(cluster.apiservers.len())?;
        Ok(daemon)
    };
    let mut daemon = start()?;
    serve(&cluster)?;
    for address in local {
        dial(&cluster.lb, true, &cluster.ca_file(), address, OPEN)?.require_all(OPEN, address)?;
    }

    let mut crowds = Vec::new();
    for vip in cluster.vips() {
        let mut crowd = Crowd::open(&cluster.client, &cluster.client_of(vip)?, OPEN)?;
        crowd.ask_names().require_all(OPEN)?;
        crowds.push(crowd);
    }
    daemon.process().kill()?;
    for crowd in &mut crowds {
        crowd.ask_names().require_all(OPEN).context("without a daemon")?;
    }
    let daemon = start()?;
    for crowd in &mut crowds {
        crowd.ask_names().require_all(OPEN).context("after the next start")?;
    }
    drop(crowds);
    cluster.require_no_own_resets()?;

    let interface = &cluster.lb.link()?.interface;
    ensure!(has_xdp(&cluster.lb, interface)?, "the program is not on {interface}");
    let unloaded = daemon.unload()?;
    ensure!(unloaded.status.success(), "unload: {}", String::from_utf8_lossy(&unloaded.stderr));
    ensure!(!has_xdp(&cluster.lb, interface)?, "the program is still on {interface} after `unload`");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;

    /// A module that is in neither list would be tried in no kernel but the host's.
    #[test]
    fn every_module_of_the_packet_tests_is_in_one_of_the_lists() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/packets");
        let there: BTreeSet<_> = std::fs::read_dir(directory)
            .unwrap()
            .filter_map(|entry| Some(format!("{}::", entry.unwrap().path().file_stem()?.to_str()?)))
            .filter(|module| module != "main::")
            .collect();
        let listed: BTreeSet<_> =
            DECISIONS.iter().chain(&HISTORIES).map(|module| (*module).to_owned()).collect();
        assert_eq!(listed, there);
        assert_eq!(listed.len(), DECISIONS.len() + HISTORIES.len(), "none is in both");
    }
}
