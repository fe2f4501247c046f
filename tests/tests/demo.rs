//! The demonstration, as it is told to somebody who has just built it.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::ensure;
use lb_tests::lab::{
    cgroup_of, eventually,
    process::{Signal, said, sibling_program},
};
use nix::{sys::signal::kill, unistd::Pid};

/// Its laboratory is built in a second or two.
const MOMENT: Duration = Duration::from_secs(30);

/// What a laboratory of a process leaves if it leaves anything: names begin with this.
fn traces(pid: u32) -> Vec<PathBuf> {
    let begins = format!("sh{pid}-");
    let labs = Path::new("/tmp/sheave-lab");
    let cgroups = cgroup_of(&labs.join("any")).unwrap().parent().unwrap().to_owned();
    let places = ["/run/netns", "/sys/fs/bpf/sheave-lab"].map(PathBuf::from);
    let places = places.into_iter().chain([labs.to_owned(), cgroups]);
    let entries = places.flat_map(|place| fs::read_dir(place).into_iter().flatten().flatten());
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&begins)).collect()
}

/// Tells a story to its end: what was said, when nothing of it is left.
fn tell(arguments: &[&str]) -> Output {
    let mut command = Command::new(sibling_program("sheave-demo").unwrap());
    let demo = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = demo.id();
    let output = demo.wait_with_output().unwrap();
    assert_eq!(traces(pid), Vec::<PathBuf>::new(), "{}", said(&output));
    output
}

#[test]
fn the_demonstration_tells_its_story_and_leaves_nothing() {
    let output = tell(&["--once"]);
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    for scene in
        ["sheave: api-1 is", "sheave: api-2 is", "api-3 drains", "No request was lost after a verdict"]
    {
        assert!(text.contains(scene), "{scene:?} is missing in\n{text}");
    }
    assert!(
        text.lines()
            .filter(|line| line.starts_with("requests: "))
            .all(|line| line.ends_with(", 0 lost otherwise")),
        "{text}"
    );
}

#[test]
fn a_nodes_demonstration_tells_of_its_watch_and_leaves_nothing() {
    let output = tell(&["--node", "--once"]);
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    for scene in [
        "is dead, after",
        "the watch is told, ",
        "its client watches anew",
        "No request was lost after a verdict",
    ] {
        assert!(text.contains(scene), "{scene:?} is missing in\n{text}");
    }
}

#[test]
fn a_demonstration_that_is_interrupted_has_not_succeeded_and_leaves_nothing() {
    for arguments in [&["--once"][..], &["--node", "--once"]] {
        let mut command = Command::new(sibling_program("sheave-demo").unwrap());
        let demo = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = demo.id();
        eventually(MOMENT, "there is something to leave", || {
            // The network namespaces, the directory, the pins and the cgroup.
            let traces = traces(pid);
            ensure!(
                traces.len() >= 6 && traces.iter().any(|path| path.starts_with("/sys/fs/bpf")),
                "{traces:?}"
            );
            Ok(())
        })
        .unwrap();
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT).unwrap();
        let output = demo.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert_eq!(traces(pid), Vec::<PathBuf>::new(), "{}", said(&output));
    }
}
