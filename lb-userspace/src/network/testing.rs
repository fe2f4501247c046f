//! Network namespaces for tests: nameless, so that the kernel removes them with the thread that made them.

use std::{
    fs::File,
    os::fd::AsRawFd,
    process::Command,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns, unshare};

/// Runs a test in a network namespace of its own. Needs root.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("network tests need root");
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Another host: a second namespace, entered for the time of a call.
pub(crate) struct Peer {
    here: File,
    there: File,
}

fn current_namespace() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

impl Peer {
    /// A host at the other end of `link`, whose own end has the name `far`.
    ///
    /// Neither end does IPv6 address detection, which takes seconds.
    pub(crate) fn behind(link: &str, far: &str) -> Self {
        let here = current_namespace();
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let there = current_namespace();
        setns(&here, CloneFlags::CLONE_NEWNET).unwrap();
        let peer = Self { here, there };
        ip(&format!("link add {link} type veth peer name {far}"));
        let path = format!("/proc/{}/fd/{}", std::process::id(), peer.there.as_raw_fd());
        ip(&format!("link set {far} netns {path}"));
        quiet(link);
        ip(&format!("link set {link} up"));
        peer.run(|| {
            ip("link set lo up");
            quiet(far);
            ip(&format!("link set {far} up"));
            until_state(far, "UP");
        });
        until_state(link, "UP");
        peer
    }

    /// Does something on that host. Sockets opened there stay there.
    pub(crate) fn run<T>(&self, act: impl FnOnce() -> T) -> T {
        setns(&self.there, CloneFlags::CLONE_NEWNET).unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        setns(&self.here, CloneFlags::CLONE_NEWNET).unwrap();
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs `ip` on that host.
    pub(crate) fn ip(&self, arguments: &str) {
        self.run(|| ip(arguments));
    }
}

/// Waits until the kernel has taken note of what became of a link, which can take a second. (One that has just come up has no
/// queue for a moment, and drops what is sent.)
pub(crate) fn until_state(link: &str, state: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !ip(&format!("link show {link}")).contains(&format!("state {state}")) {
        assert!(Instant::now() < deadline, "{link} does not come to be {state}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn quiet(link: &str) {
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{link}/accept_dad"), "0").unwrap();
}

/// Runs `ip` and returns what it printed.
pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until something holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let result = tokio::time::timeout(Duration::from_secs(10), wait).await;
    assert!(result.is_ok(), "still not true after 10 s: {what}");
}
