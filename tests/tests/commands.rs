//! The commands as a newcomer calls them: what they say of a host, and of what is wrong with it.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, has_xdp, program},
    lab::{pins_of, run},
    load,
};

/// A configuration in a directory of its own, with its own state, pins and socket.
fn configured(cluster: &Cluster, name: &str, settings: &Settings) -> (PathBuf, PathBuf) {
    let directory = cluster.lab.directory().join(name);
    fs::create_dir_all(&directory).unwrap();
    let config = directory.join("sheave.toml");
    fs::write(&config, settings.to_toml(&directory)).unwrap();
    (directory, config)
}

/// Runs `sheave <arguments> --config <config>` on the load balancer to its end.
fn sheave(cluster: &Cluster, arguments: &[&str], config: &Path) -> Output {
    let mut command = cluster.lb.command("timeout");
    command.args(["-s", "KILL", "30"]).arg(program().unwrap()).args(arguments);
    command.arg("--config").arg(config).output().unwrap()
}

/// It must end with this code; returns what it complained about.
fn complaint(output: &Output, code: i32) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{error}");
    error
}

fn require_served(cluster: &Cluster) {
    for vip in cluster.vips() {
        load::sequential(&cluster.client, &cluster.client_of(vip).unwrap(), 5)
            .unwrap()
            .require_all(5)
            .unwrap();
    }
}

#[test]
fn check_config_says_yes_or_where_the_mistake_is() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let (directory, config) = configured(&cluster, "checked", &cluster.settings().unwrap());
    let right = sheave(&cluster, &["check-config"], &config);
    assert_eq!(complaint(&right, 0), "");
    assert!(!directory.join("state").exists() && !pins_of(&directory).exists(), "it only looks");

    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}\n[vip2]\n")).unwrap();
    let said = complaint(&sheave(&cluster, &["check-config"], &config), 2);
    assert!(said.contains("unknown key \"vip2\"") && said.contains("sheave.toml"), "{said}");
    let said = complaint(&sheave(&cluster, &["check-config"], &directory.join("none.toml")), 2);
    assert!(said.contains("none.toml"), "{said}");
}

#[test]
fn another_program_on_the_interface_is_named_and_left_alone() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let _first = cluster.balance().unwrap();
    let (directory, config) = configured(&cluster, "second", &cluster.settings().unwrap());
    let said = complaint(&sheave(&cluster, &["run"], &config), 1);
    assert!(said.contains("another XDP program is on eth0 already"), "{said}");
    let left: Vec<_> = fs::read_dir(pins_of(&directory)).into_iter().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(has_xdp(&cluster.lb, "eth0").unwrap());
    require_served(&cluster);
}

#[test]
fn an_interface_that_is_not_there_is_named_and_nothing_is_loaded() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let mut settings = cluster.settings().unwrap();
    settings.dataplane.push("interfaces = [\"eth9\"]".to_owned());
    let (directory, config) = configured(&cluster, "elsewhere", &settings);
    let said = complaint(&sheave(&cluster, &["run"], &config), 2);
    assert!(said.contains("there is no interface eth9"), "{said}");
    let left: Vec<_> = fs::read_dir(pins_of(&directory)).into_iter().flatten().collect();
    assert!(left.is_empty() && !has_xdp(&cluster.lb, "eth0").unwrap(), "{left:?}");
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn without_privileges_it_says_so_and_touches_nothing() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let (directory, config) = configured(&cluster, "anybody", &cluster.settings().unwrap());
    // A place where anybody may go, whoever has built the program and where.
    for path in [cluster.lab.directory().parent().unwrap(), cluster.lab.directory()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let copy = cluster.lab.directory().join("sheave");
    fs::copy(program().unwrap(), &copy).unwrap();
    let mut command = cluster.lb.command("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    command.arg(&copy).args(["run", "--config"]).arg(&config);
    let said = complaint(&command.output().unwrap(), 1);
    assert!(said.to_lowercase().contains("root") || said.contains("CAP_"), "{said}");
    assert!(!has_xdp(&cluster.lb, "eth0").unwrap());
    // Where it may write it has looked whether another one is running: that is all.
    assert_eq!(names_in(&directory), ["sheave.toml", "state"]);
    assert_eq!(names_in(&directory.join("state")), ["lock"]);
    assert!(!pins_of(&directory).exists());
}

#[test]
fn doctor_finds_nothing_to_fix_where_all_is_well_and_says_what_is_not() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let _daemon = cluster.balance().unwrap();
    let config = cluster.daemon_directory().join("sheave.toml");
    let well = sheave(&cluster, &["doctor", "--json"], &config);
    assert_eq!(well.status.code(), Some(0), "{}", String::from_utf8_lossy(&well.stdout));
    let findings: serde_json::Value = serde_json::from_slice(&well.stdout).unwrap();
    let findings = findings["findings"].as_array().unwrap();
    for finding in findings {
        let level = finding["level"].as_str().unwrap();
        assert!(["ok", "note", "warning"].contains(&level), "{finding}");
        assert!(!finding["what"].as_str().unwrap().is_empty(), "{finding}");
    }
    let backend = format!("backend kube-apiserver/{}", cluster.apiservers[0].host.name());
    for subject in [format!("VIP {}", cluster.vip4), format!("VIP {}", cluster.vip6), backend] {
        let about: Vec<_> = findings.iter().filter(|finding| finding["subject"] == *subject).collect();
        assert!(!about.is_empty(), "{subject} is missing in {findings:#?}");
        assert!(about.iter().all(|finding| finding["level"] == "ok"), "{about:#?}");
    }

    let mut settings = cluster.settings().unwrap();
    settings.dataplane.push("interfaces = [\"eth9\"]".to_owned());
    let (_, config) = configured(&cluster, "ill", &settings);
    let ill = sheave(&cluster, &["doctor"], &config);
    let said = String::from_utf8_lossy(&ill.stdout).into_owned();
    assert_eq!(ill.status.code(), Some(1), "{said}");
    assert!(said.contains("eth9"), "{said}");
}

/// What doctor complains of: subject, what and fix. Anything but SNAT addresses is as it should be.
fn failures_of_doctor(cluster: &Cluster, config: &Path) -> Vec<[String; 3]> {
    let output = sheave(cluster, &["doctor", "--json"], config);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = said["findings"].as_array().unwrap();
    let text = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let failures: Vec<_> = findings
        .iter()
        .filter(|finding| finding["level"] == "failure")
        .map(|finding| ["subject", "what", "fix"].map(|key| text(finding, key)))
        .collect();
    assert_eq!(output.status.code(), Some(i32::from(!failures.is_empty())), "{said:#}");
    assert!(failures.iter().all(|[subject, ..]| subject.starts_with("SNAT address")), "{said:#}");
    failures
}

/// How many backends answer each SNAT address, as doctor says; nothing is wrong with any.
fn answered(cluster: &Cluster, config: &Path) -> Vec<(String, String)> {
    let output = sheave(cluster, &["doctor", "--json"], config);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = said["findings"].as_array().unwrap().iter();
    let about = findings.filter_map(|finding| {
        let address = finding["subject"].as_str()?.strip_prefix("SNAT address ")?;
        assert_eq!(finding["level"], "ok", "{said:#}");
        Some((address.to_owned(), finding["what"].as_str()?.to_owned()))
    });
    about.collect()
}

#[test]
fn doctor_names_the_backend_that_does_not_answer_the_address_that_flows_leave_from() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let ill = &cluster.apiservers[1].host;
    let (vip4, vip6) = (cluster.vip4, cluster.vip6);
    let all_well = [vip4, vip6].map(|vip| (vip.to_string(), "is answered by 2 of 2 backends".to_owned()));
    let (_, before) = configured(&cluster, "before", &cluster.settings().unwrap());
    let mut daemon = None;
    for config in [before, cluster.daemon_directory().join("sheave.toml")] {
        assert_eq!(answered(&cluster, &config), all_well);
        ill.nft(&format!(
            "add table inet guard; add chain inet guard in {{ type filter hook input priority 0; }}; \
             add rule inet guard in ip saddr {vip4} drop"
        ))
        .unwrap();
        ill.ip(&format!("-6 route add blackhole {vip6}/128")).unwrap();
        let failures = failures_of_doctor(&cluster, &config);
        let named: Vec<_> = failures
            .iter()
            .map(|[subject, what, _]| (subject.clone(), what.split(' ').nth(1).unwrap().to_owned()))
            .collect();
        let expected = [(vip4, "kube-apiserver/api-2"), (vip6, "kube-apiserver-v6/api-2")]
            .map(|(vip, backend)| (format!("SNAT address {vip}"), backend.to_owned()));
        assert_eq!(named, expected, "{failures:#?}");
        ill.ip(&format!("-6 route del blackhole {vip6}/128")).unwrap();
        ill.nft("delete table inet guard").unwrap();
        assert_eq!(answered(&cluster, &config), all_well);
        // With the program on the interface the answers pass it.
        daemon.get_or_insert_with(|| cluster.balance().unwrap());
    }
    let packets = daemon.unwrap().status().unwrap().packets;
    assert_eq!(packets["reply_unknown_slot"], 0, "what doctor sends comes from no slot: {packets:?}");
    assert!(has_xdp(&cluster.lb, "eth0").unwrap());
    require_served(&cluster);
}

/// What doctor says of the path through each VIP's listener: its level and the sentence.
fn paths(cluster: &Cluster, config: &Path) -> Vec<(String, String)> {
    let output = sheave(cluster, &["doctor", "--json"], config);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let findings = said["findings"].as_array().unwrap().iter();
    let about = findings.filter(|finding| text(finding, "subject").starts_with("path"));
    about.map(|finding| (text(finding, "level"), text(finding, "what"))).collect()
}

#[test]
fn doctor_proves_the_path_with_a_flow_of_its_own() {
    for shape in [Shape::OneArm, Shape::TwoArm] {
        let cluster = Cluster::start(shape, 1).unwrap();
        let (_, before) = configured(&cluster, "before", &cluster.settings().unwrap());
        let said = paths(&cluster, &before);
        assert!(said.len() == 1 && said[0].0 == "note" && said[0].1.contains("no daemon runs"), "{said:?}");
        let daemon = cluster.balance().unwrap();
        let config = cluster.daemon_directory().join("sheave.toml");
        let require = |level: &str, words: &str| {
            let said = paths(&cluster, &config);
            assert!(
                said.len() == 2 && said.iter().all(|it| it.0 == level && it.1.contains(words)),
                "{said:?}"
            );
        };
        require("ok", "went through listener and flow table to api-1");
        assert!(daemon.status().unwrap().packets["replied"] >= 2);
        let left = run(daemon.command("flows").unwrap().arg("--json")).unwrap();
        assert!(left.lines().all(|flow| !flow.contains("half-open")), "{left}");
        require_served(&cluster);

        // Its checks come from the host's own sockets, which the backend goes on to answer.
        let ill = &cluster.apiservers[0].host;
        let (vip4, vip6) = (cluster.vip4, cluster.vip6);
        ill.nft(&format!(
            "add table inet guard; add chain inet guard in {{ type filter hook input priority 0; }}; \
             add rule inet guard in ip saddr {vip4} drop; add rule inet guard in ip6 saddr {vip6} drop; \
             add rule inet guard in tcp sport 1024-32767 drop"
        ))
        .unwrap();
        require("warning", "was given to api-1");
        ill.nft("delete table inet guard").unwrap();
        for vip in cluster.vips() {
            let length = if vip.is_ipv4() { 32 } else { 128 };
            cluster.lb.ip(&format!("address del {vip}/{length} dev eth0")).unwrap();
        }
        require("note", "the VIP is not on this host");
    }
}

#[test]
fn doctor_tries_the_way_back_from_another_subnet() {
    let cluster = Cluster::start(Shape::TwoArm, 2).unwrap();
    let mut settings = cluster.settings().unwrap();
    settings.dataplane.clear();
    let inside = cluster.lb.links().last().unwrap();
    let inside = [inside.v4.to_string(), inside.v6.to_string()];
    let (_, chosen) = configured(&cluster, "chosen", &settings);
    let well = inside.clone().map(|address| (address, "is answered by 2 of 2 backends".to_owned()));
    assert_eq!(answered(&cluster, &chosen), well);
    // The backends have no route to the VIPs.
    settings.dataplane.push(format!("snat_addresses = {:?}", cluster.vips().map(|vip| vip.to_string())));
    let (_, named) = configured(&cluster, "named", &settings);
    let failures = failures_of_doctor(&cluster, &named);
    assert_eq!(failures.len(), 4, "two backends, two families: {failures:#?}");
    for ([subject, what, fix], own) in failures.iter().zip([0, 0, 1, 1].map(|family| &inside[family])) {
        assert!(
            what.contains(&format!(
                "answers this host's own {own}, where checks come from, and not this one"
            )),
            "{subject}: {what}"
        );
        assert!(fix.contains(&format!("snat_addresses = [{own:?}")), "{subject}: {fix}");
    }
    // Where flows leave from an address already, it stays that one, whatever would be chosen now.
    let other = cluster.lb.links().last().unwrap().segment.v4(3);
    cluster.lb.ip(&format!("address add {other}/24 dev eth1")).unwrap();
    settings.dataplane = vec![format!("snat_addresses = {:?}", [&other.to_string(), &inside[1]])];
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    settings.dataplane.clear();
    let running = cluster.daemon_directory().join("unnamed.toml");
    fs::write(&running, settings.to_toml(&cluster.daemon_directory())).unwrap();
    let well = [other.to_string(), inside[1].clone()]
        .map(|address| (address, "is answered by 2 of 2 backends".to_owned()));
    assert_eq!(answered(&cluster, &running), well);
    require_served(&cluster);
}

#[test]
fn completions_are_of_this_program() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(program().unwrap()).args(["completions", shell]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("check-config") && text.contains("drain"),
            "{shell}"
        );
    }
}
