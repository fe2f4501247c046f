//! `sheave why`: what became of a connection is told, also when nobody is left to tell it.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{fs, net::IpAddr, time::Duration};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, program},
    lab::eventually,
    load::Crowd,
};
use serde_json::Value;

const MOMENT: Duration = Duration::from_secs(30);

/// Asks `sheave why` on the load balancer's host, with the daemon's configuration: exit code, and what was said.
fn ask(cluster: &Cluster, client: IpAddr, arguments: &[&str]) -> (Option<i32>, String) {
    let directory = cluster.daemon_directory();
    let mut command = cluster.lb.command(program().unwrap());
    command.args(["why", &client.to_string(), "--config"]).arg(directory.join("sheave.toml"));
    command.arg("--socket").arg(directory.join("admin.sock")).args(arguments);
    let output = command.output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.code(), text)
}

/// What happened in each of a client's connections, the oldest first, and to whose backend.
fn stories(cluster: &Cluster, client: IpAddr) -> Vec<Vec<(String, String)>> {
    let (_, text) = ask(cluster, client, &["--json"]);
    let facts: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let story = |connection: &Value| {
        let steps = connection["steps"].as_array().unwrap().iter();
        steps.map(|step| (word(&step["what"]), word(&step["backend"]))).collect()
    };
    facts["connections"].as_array().unwrap().iter().map(story).collect()
}

/// One connection, and the server that it is at.
fn connect(cluster: &Cluster, vip: IpAddr) -> (Crowd, String) {
    let mut crowd = Crowd::open(&cluster.client, &cluster.client_of(vip).unwrap(), 1).unwrap();
    let server = crowd.ask_names().outcomes.remove(0).result.unwrap();
    (crowd, server)
}

/// The last connection of a client comes to its end, whoever says so.
fn wait_end(cluster: &Cluster, client: IpAddr) {
    eventually(MOMENT, "the end of the connection is written", || {
        let stories = stories(cluster, client);
        let last = stories.last().and_then(|story| story.last());
        ensure!(last.is_some_and(|(what, _)| what.contains("by_")), "{stories:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_story_is_told_while_the_daemon_is_dead_and_what_happens_then_is_in_it() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = cluster.balance().unwrap();
    for vip in cluster.vips() {
        let client = cluster.client.address(vip).unwrap();
        let (code, text) = ask(&cluster, client, &[]);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("no SYN of it was seen"), "{text}");
    }
    let before = cluster.vips().map(|vip| connect(&cluster, vip));
    daemon.process().kill().unwrap();
    for (vip, (crowd, server)) in cluster.vips().into_iter().zip(before) {
        let client = cluster.client.address(vip).unwrap();
        let begun = ["claimed", "established"].map(|what| (what.to_owned(), server.clone()));
        assert_eq!(stories(&cluster, client), [begun.to_vec()]);
        let (code, text) = ask(&cluster, client, &[]);
        assert_eq!(code, Some(0));
        assert!(text.contains(&format!("{server} answered: the connection is established")), "{text}");
        assert!(text.contains("it is open"), "{text}");
        // Nobody but the program sees this.
        drop(crowd);
        wait_end(&cluster, client);
        let (crowd, server) = connect(&cluster, vip);
        drop(crowd);
        wait_end(&cluster, client);
        let stories = stories(&cluster, client);
        assert_eq!(stories.len(), 2, "{stories:?}");
        assert_eq!(stories[1][0], ("claimed".to_owned(), server));
        let (_, now) = ask(&cluster, client, &["--at", "-1s"]);
        assert!(now.contains("new connection to"), "{now}");
        let (code, then) = ask(&cluster, client, &["--at", "-2h"]);
        assert_eq!(code, Some(1));
        assert!(then.contains("the nearest record is of"), "{then}");
    }
}

#[test]
fn a_connection_that_sheave_has_reset_says_by_which_verdict() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut settings = cluster.settings().unwrap();
    settings.service = vec!["reset_after = \"2s\"".to_owned()];
    settings.check = ["interval = \"300ms\"", "fast_interval = \"100ms\"", "connect_timeout = \"500ms\""]
        .map(str::to_owned)
        .to_vec();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(3).unwrap();
    let client = cluster.client.address(cluster.vip4).unwrap();
    let (_crowd, server) = connect(&cluster, cluster.vip4);
    cluster.apiserver(&server).unwrap().host.cut_off().unwrap();
    daemon.wait_state(&server, "dead", MOMENT).unwrap();
    eventually(MOMENT, "the reset is written", || {
        let stories = stories(&cluster, client);
        let reset = ("reset_backend_dead".to_owned(), server.clone());
        ensure!(stories.last().and_then(|story| story.last()) == Some(&reset), "{stories:?}");
        Ok(())
    })
    .unwrap();
    daemon.process().kill().unwrap();
    let (_, text) = ask(&cluster, client, &[]);
    let words = format!("reset by sheave, because {server} was declared dead (connect timeout for ");
    assert!(text.contains(&words), "{text}");
}

#[test]
fn where_nothing_is_pinned_there_is_nothing_to_tell_and_wrong_words_are_the_users() {
    let cluster = Cluster::without_vips(Shape::OneArm, 1).unwrap();
    let client = cluster.client.address(cluster.vip4).unwrap();
    let settings = cluster.settings().unwrap();
    let directory = cluster.daemon_directory();
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("sheave.toml"), settings.to_toml(&directory)).unwrap();
    let (code, text) = ask(&cluster, client, &[]);
    assert_eq!(code, Some(1));
    assert!(text.contains("there is no black box in"), "{text}");
    let (code, text) = ask(&cluster, client, &["--at", "noon"]);
    assert_eq!(code, Some(2));
    assert!(text.contains("\"noon\" is no time"), "{text}");
}
