//! What the demo, the tests and the benchmarks run is installed or built before they begin: their sources are asked.

use std::{collections::BTreeSet, fs, path::PathBuf};

use crate::{
    bench, demo, process,
    setup::{DEMO_TOOLS, NODE_BENCH_TOOLS, TEST_TOOLS, Tool},
};

/// What every Linux with util-linux and coreutils has; and systemd-analyze, without which a test does.
const EVERYWHERE: [&str; 8] =
    ["nsenter", "setpriv", "sh", "sleep", "systemd-analyze", "timeout", "true", "unshare"];
/// The demo's own code, and the laboratory that it builds.
const DEMO: [&str; 7] = [
    "tests/src/bin/sheave-demo",
    "tests/src/cluster.rs",
    "tests/src/daemon.rs",
    "tests/src/lab",
    "tests/src/load.rs",
    "tests/src/stub",
    "tests/src/watches.rs",
];
/// Those of the benchmarks, beside the same laboratory.
const BENCH: [&str; 10] = [
    "tests/src/attacks",
    "tests/src/bin/sheave-bench.rs",
    "tests/src/dial.rs",
    "tests/src/failover",
    "tests/src/hold.rs",
    "tests/src/idle.rs",
    "tests/src/lab",
    "tests/src/node",
    "tests/src/stub",
    "tests/src/transfer.rs",
];

/// The sources in these places, named from the root of the repository on.
fn sources(places: &[&str]) -> Vec<String> {
    let mut left: Vec<PathBuf> = places.iter().map(|place| process::workspace().join(place)).collect();
    let mut texts = Vec::new();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(fs::read_dir(&path).expect("a directory").map(|it| it.expect("an entry").path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            texts.push(fs::read_to_string(&path).expect("a file"));
        }
    }
    texts
}

/// The first words of the texts that are written out in calls of a function: `.command("curl")`, `.run("ss -tn")`.
fn called(texts: &[String], function: &str) -> BTreeSet<String> {
    let mut words = BTreeSet::new();
    for text in texts {
        for (index, _) in text.match_indices(function) {
            let before = &text[..index];
            // What a daemon is asked by is a command of `sheave`, and no program.
            if before.ends_with("daemon.") || before.ends_with("self.") && text.contains("\nimpl Daemon {") {
                continue;
            }
            // Not into a closure or a structure: nothing is run there.
            let call = text[index + function.len()..].split([')', '|', '{']).next().unwrap_or_default();
            words.extend(call.split('"').nth(1).and_then(|it| it.split(' ').next()).map(str::to_owned));
        }
    }
    words
}

/// Programs of others.
fn programs(texts: &[String]) -> BTreeSet<String> {
    let mut programs: BTreeSet<_> =
        ["Command::new(", "command(", ".run("].iter().flat_map(|function| called(texts, function)).collect();
    // Nor a text of clap's `#[command(...)]`.
    let is_name = |name: &str| name.chars().all(|it| it.is_ascii_alphanumeric() || it == '-');
    programs.retain(|name| is_name(name) && !name.starts_with("sheave"));
    programs
}

fn names(tools: &[Tool]) -> BTreeSet<String> {
    tools.iter().map(|tool| tool.program.to_owned()).collect()
}

#[test]
fn every_program_that_is_run_is_installed_and_no_other() {
    let (demo, tests) = (programs(&sources(&DEMO)), programs(&sources(&["tests", "lb-userspace"])));
    let for_tests = &names(&TEST_TOOLS) | &names(&NODE_BENCH_TOOLS);
    for (run, installed) in [(&demo, &names(&DEMO_TOOLS)), (&tests, &for_tests)] {
        let missing: Vec<_> =
            run.difference(installed).filter(|it| !EVERYWHERE.contains(&it.as_str())).collect();
        assert!(missing.is_empty(), "{missing:?} of {run:?}");
    }
    assert!(demo.is_superset(&names(&DEMO_TOOLS)), "more than {demo:?} is installed");
    assert!(tests.is_superset(&names(&TEST_TOOLS)), "more than {tests:?} is installed");
}

#[test]
fn what_runs_beside_the_demo_and_the_benchmarks_is_built() {
    for (places, built) in [(&DEMO[..], &demo::BESIDE[..]), (&BENCH[..], &bench::BESIDE[..])] {
        let run = called(&sources(places), "sibling_program(");
        assert_eq!(run, built.iter().map(|name| (*name).to_owned()).collect());
    }
}
