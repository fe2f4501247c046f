//! The distribution's etcd behind the real daemon, configured as `docs/recipes.md` says.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{fs, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, program},
    etcd::{CLIENT_PORT, Etcd, failure},
    lab::{Process, cgroup_of, eventually, pins_of, run},
};

/// A verdict, an election or a reconnection, with room for a busy machine.
const MOMENT: Duration = Duration::from_secs(60);
/// Each a process and a connection of its own.
const REQUESTS: u32 = 12;

/// What the pages call things, and what they are called here.
struct Setting {
    etcd: Etcd,
    cluster: Cluster,
}

impl Setting {
    fn new() -> Self {
        let cluster = Cluster::start(Shape::OneArm, 0).unwrap();
        Self { etcd: Etcd::start(&cluster).unwrap(), cluster }
    }

    fn vip(&self) -> SocketAddr {
        SocketAddr::new(self.cluster.vip4, CLIENT_PORT)
    }

    /// The recipe under a heading of `docs/recipes.md`, with this lab's addresses and files.
    fn recipe(&self, heading: &str) -> String {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs/recipes.md");
        let page = fs::read_to_string(page).unwrap();
        let section = page.split_once(&format!("\n## {heading}\n")).expect("the page has this heading").1;
        let block = section.split_once("```toml\n").unwrap().1.split_once("```").unwrap().0;
        let files = [
            ("ca.crt", self.cluster.ca_file()),
            ("healthcheck-client.crt", self.etcd.client.certificate.clone()),
            ("healthcheck-client.key", self.etcd.client.key.clone()),
        ];
        let mut recipe = block.replace("192.168.2.140", &self.cluster.vip4.to_string());
        for (number, member) in (1..).zip(&self.etcd.members) {
            let address = member.client_address().ip().to_string();
            recipe = recipe.replace(&format!("192.168.2.15{number}"), &address);
        }
        let prefix = self.cluster.client.link().unwrap().segment.v4(0);
        recipe = recipe.replace("192.168.2.0/24", &format!("{prefix}/24"));
        for (name, path) in files {
            recipe = recipe.replace(&format!("/etc/sheave/etcd/{name}"), path.to_str().unwrap());
        }
        assert!(!recipe.contains("192.168") && !recipe.contains("/etc/"), "{recipe}");
        recipe
    }

    /// The daemon with a service, ready or not.
    fn balance(&self, service: &str) -> Daemon {
        let config = |directory: &Path| {
            let [state, socket] = ["state", "admin.sock"].map(|name| directory.join(name));
            let (pins, cgroup) = (pins_of(directory), cgroup_of(directory).unwrap_or_else(|| "none".into()));
            format!(
                "[dataplane]\nstate_dir = {state:?}\npin_dir = {pins:?}\ncgroup = {cgroup:?}\n\
                 [admin]\nsocket = {socket:?}\n{service}"
            )
        };
        let command = self.cluster.lb.command(program().unwrap());
        Daemon::start_with(&self.cluster.lb, self.cluster.lab.directory(), config, command).unwrap()
    }

    /// The daemon with a recipe that works.
    fn balance_ready(&self, heading: &str) -> Daemon {
        let mut daemon = self.balance(&self.recipe(heading));
        daemon.wait_ready(self.etcd.members.len()).unwrap();
        daemon
    }

    /// `etcdctl` through the VIP.
    fn through_vip(&self, arguments: &[&str]) -> Command {
        let mut command = self.etcd.etcdctl(&self.cluster.client, self.vip());
        command.args(arguments);
        command
    }

    fn put(&self, key: &str, value: &str) -> Result<()> {
        run(&mut self.through_vip(&["put", key, value])).map(drop)
    }

    /// Reads and writes, each on a new connection, none of which may fail.
    fn require_served(&self) {
        for number in 0..REQUESTS {
            let value = number.to_string();
            self.put("served", &value).unwrap();
            let read = run(&mut self.through_vip(&["get", "--print-value-only", "served"])).unwrap();
            assert_eq!(read.trim(), value);
        }
    }

    /// The same when there may be an election first.
    fn require_served_after_election(&self) {
        eventually(MOMENT, "there is a leader", || self.put("served", "again")).unwrap();
        self.require_served();
    }

    /// Waits until a member is in a state and its check's last word is this code.
    fn wait_member(&self, daemon: &Daemon, member: usize, state: &str, code: &str) {
        let address = self.etcd.members[member].client_address().to_string();
        eventually(MOMENT, &format!("{address} is {state} with {code}"), || {
            let status = daemon.status_json()?;
            let backends = status["services"][0]["backends"].as_array().context("no backends")?.clone();
            let backend = backends.iter().find(|it| it["address"] == *address).context("not there")?;
            let check = &backend["check"];
            let mut seen = check["code"].as_str().unwrap_or_default().to_owned();
            if let Some(status) = check["http_status"].as_u64() {
                seen.push_str(&format!("/{status}"));
            }
            ensure!(backend["state"] == state && seen == code, "{backend}");
            Ok(())
        })
        .unwrap();
    }

    fn wait_all_ready(&self, daemon: &mut Daemon) {
        for member in 0..self.etcd.members.len() {
            self.wait_member(daemon, member, "ready", "L7OK/200");
        }
        daemon.wait_ready(self.etcd.members.len()).unwrap();
    }

    /// `etcdctl watch` on a key, whose own keepalive does not find out for an hour that nobody is there.
    fn watch(&self, key: &str, number: usize) -> Process {
        let command = self.through_vip(&["--keepalive-time=1h", "watch", key]);
        self.cluster.client.start(&format!("watch-{number}"), command).unwrap()
    }
}

/// Waits until a sentence about the service says this.
fn wait_flag(daemon: &Daemon, words: &str) {
    daemon.wait_flag(words, MOMENT).unwrap();
}

/// Waits until every watch has shown a value.
fn wait_shown(watches: &[Process], value: &str, mut before: impl FnMut() -> Result<()>) {
    eventually(MOMENT, &format!("every watch shows {value}"), || {
        before()?;
        let blind = watches.iter().filter(|watch| !watch.log().contains(value)).count();
        ensure!(blind == 0, "{blind} of {} do not", watches.len());
        Ok(())
    })
    .unwrap();
}

const IN_THE_CLEAR: &str = "etcd, health in the clear";
const WITH_A_CERTIFICATE: &str = "etcd, health with a client certificate";

#[test]
fn a_stopped_and_a_frozen_member_are_told_apart_by_http_on_another_port() {
    let mut setting = Setting::new();
    let mut daemon = setting.balance_ready(IN_THE_CLEAR);
    setting.wait_all_ready(&mut daemon);
    setting.require_served();

    let followers = setting.etcd.followers(&setting.cluster.client).unwrap();
    setting.etcd.members[followers[0]].stop().unwrap();
    // Also before the verdict: who is refused by one is sent to another.
    setting.require_served();
    setting.wait_member(&daemon, followers[0], "draining", "L4CON");
    setting.require_served();
    setting.etcd.members[followers[0]].start().unwrap();
    setting.wait_all_ready(&mut daemon);

    // Watches that say nothing, at all members; the follower that has most is frozen.
    let watches: Vec<_> = (0..12).map(|number| setting.watch("watched", number)).collect();
    wait_shown(&watches, "first-value", || setting.put("watched", "first-value"));
    let vip = setting.cluster.vip4;
    let at = |member: &usize| setting.etcd.members[*member].connections_from(vip).unwrap();
    let frozen = setting.etcd.followers(&setting.cluster.client).unwrap().into_iter().max_by_key(at).unwrap();
    assert!(at(&frozen) > 0, "somebody must have something to lose");
    setting.etcd.members[frozen].freeze().unwrap();
    setting.wait_member(&daemon, frozen, "silent", "L7TOUT");
    setting.require_served();
    setting.wait_member(&daemon, frozen, "dead", "L7TOUT");
    setting.put("watched", "second-value").unwrap();
    wait_shown(&watches, "second-value", || Ok(()));
    setting.require_served();

    setting.etcd.members[frozen].thaw().unwrap();
    setting.wait_all_ready(&mut daemon);
    setting.require_served();
    setting.cluster.require_no_own_resets().unwrap();
}

#[test]
fn without_quorum_the_last_member_still_answers_serializable_reads() {
    let mut setting = Setting::new();
    let mut daemon = setting.balance_ready(IN_THE_CLEAR);
    setting.put("kept", "for-ever").unwrap();

    let [killed, frozen, last] = [0, 1, 2];
    setting.etcd.members[killed].kill().unwrap();
    setting.etcd.members[frozen].freeze().unwrap();
    setting.wait_member(&daemon, killed, "draining", "L4CON");
    setting.wait_member(&daemon, frozen, "dead", "L7TOUT");
    setting.wait_member(&daemon, last, "draining", "L7STS/503");
    wait_flag(&daemon, "no backend is ready: new flows go to those that still complete the connection");
    for _ in 0..REQUESTS {
        let read = run(&mut setting.through_vip(&["get", "--consistency=s", "--print-value-only", "kept"]));
        assert_eq!(read.unwrap().trim(), "for-ever");
    }
    for needs_quorum in [&["get", "kept"][..], &["put", "kept", "otherwise"]] {
        let mut command = setting.through_vip(&["--command-timeout=2s"]);
        let said = failure(command.args(needs_quorum)).unwrap();
        assert!(said.contains("deadline exceeded") || said.contains("no leader"), "{said}");
    }

    setting.etcd.members[frozen].thaw().unwrap();
    setting.wait_member(&daemon, frozen, "ready", "L7OK/200");
    setting.wait_member(&daemon, last, "ready", "L7OK/200");
    setting.require_served_after_election();
    setting.etcd.members[killed].start().unwrap();
    setting.wait_all_ready(&mut daemon);
    setting.require_served();
    setting.cluster.require_no_own_resets().unwrap();
}

#[test]
fn the_clients_own_port_is_checked_with_a_certificate() {
    let mut setting = Setting::new();
    let mut daemon = setting.balance_ready(WITH_A_CERTIFICATE);
    setting.wait_all_ready(&mut daemon);
    setting.require_served();

    let leader = setting.etcd.leader(&setting.cluster.client).unwrap();
    setting.etcd.members[leader].freeze().unwrap();
    setting.wait_member(&daemon, leader, "silent", "L6TOUT");
    setting.require_served_after_election();
    setting.etcd.members[leader].thaw().unwrap();
    setting.wait_all_ready(&mut daemon);

    let follower = setting.etcd.followers(&setting.cluster.client).unwrap()[0];
    setting.etcd.members[follower].kill().unwrap();
    setting.wait_member(&daemon, follower, "draining", "L4CON");
    setting.require_served();
    setting.etcd.members[follower].start().unwrap();
    setting.wait_all_ready(&mut daemon);
    setting.cluster.require_no_own_resets().unwrap();
}

#[test]
fn without_a_certificate_nobody_is_ready_and_everybody_is_served() {
    let setting = Setting::new();
    let recipe = setting.recipe(WITH_A_CERTIFICATE);
    let anonymous: Vec<_> = recipe.lines().filter(|line| !line.starts_with("client_")).collect();
    assert_eq!(recipe.lines().count(), anonymous.len() + 2);
    let daemon = setting.balance(&(anonymous.join("\n") + "\n"));
    for member in 0..setting.etcd.members.len() {
        setting.wait_member(&daemon, member, "draining", "L7RSP");
    }
    wait_flag(&daemon, "no backend is ready");
    setting.require_served();
}
