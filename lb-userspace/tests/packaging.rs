//! The unit in `packaging/`, and what may be installed beside it, is what systemd takes it for, and as closed as it is meant to
//! be.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::Command,
};

/// What keeps a daemon with our capabilities from the rest of the host. Whoever takes one away says why, here.
const HARDENING: [&str; 20] = [
    "CapabilityBoundingSet=CAP_BPF CAP_NET_ADMIN CAP_NET_RAW CAP_PERFMON CAP_CHOWN CAP_DAC_READ_SEARCH CAP_SETPCAP",
    "DevicePolicy=closed",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "NoNewPrivileges=yes",
    "PrivateTmp=yes",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHome=read-only",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectProc=invisible",
    "ProtectSystem=strict",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service bpf capset membarrier",
];

/// What makes a stop and a restart no event, and an end of the daemon a short one.
const LIFE: [&str; 7] = [
    "ExecReload=/usr/bin/sheave reload",
    "ExecStart=/usr/bin/sheave run",
    "NotifyAccess=main",
    "Restart=on-failure",
    "Type=notify",
    "UMask=0077",
    "WatchdogSec=10",
];

fn path_of(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("packaging").join(file)
}

fn packaged(file: &str) -> String {
    fs::read_to_string(path_of(file)).unwrap()
}

fn unit() -> String {
    packaged("sheave.service")
}

/// The lines that mean something.
fn settings(file: &str) -> Vec<&str> {
    file.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

#[test]
fn the_unit_is_as_closed_as_it_is_meant_to_be() {
    let unit = unit();
    let service = unit.split_once("[Service]\n").unwrap().1.split_once("\n[Install]").unwrap().0;
    let lines: BTreeSet<_> = service.lines().collect();
    for required in HARDENING.iter().chain(&LIFE) {
        assert!(lines.contains(required), "{required} is missing");
    }
    // A key that is there twice is added to, or the last one counts: neither is meant.
    let keys: Vec<_> = service.lines().filter_map(|line| line.split_once('=')).map(|(key, _)| key).collect();
    let once: BTreeSet<_> = keys.iter().filter(|key| !key.starts_with('#')).collect();
    assert_eq!(once.len(), keys.iter().filter(|key| !key.starts_with('#')).count(), "{keys:?}");
}

#[test]
fn only_who_serves_pods_gives_it_what_pods_take() {
    for capability in ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"] {
        assert!(settings(&unit()).iter().all(|line| !line.contains(capability)), "{capability}");
    }
    // Where a list is there twice systemd allows what is in either, and after `yes` that is what is in the other
    // (systemd.exec(5)).
    assert_eq!(
        settings(&packaged("sheave.service.d/pods.conf")),
        ["[Service]", "CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_PTRACE", "RestrictNamespaces=net"]
    );
}

/// What may be installed beside the unit, by name.
fn drop_ins() -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path_of("sheave.service.d"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["edge.conf", "node.conf", "pods.conf"]);
    names
}

/// What systemd has to say about the unit with a drop-in beside it, and about units that are wrong on purpose: `others`, by
/// name. It sees no other unit. None: it is not here.
fn verified(drop_in: Option<&str>, others: &[(&str, &str)]) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    // It asks whether the program is there, too.
    place("sheave.service", &unit().replace("/usr/bin/sheave", "/bin/sh"));
    if let Some(name) = drop_in {
        fs::create_dir(directory.path().join("sheave.service.d")).unwrap();
        place(&format!("sheave.service.d/{name}"), &packaged(&format!("sheave.service.d/{name}")));
    }
    place("sysinit.target", "[Unit]\n");
    others.iter().for_each(|(name, text)| place(name, text));
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(directory.path().join("sheave.service"))
        .env("SYSTEMD_UNIT_PATH", directory.path())
        .output()
        .inspect_err(|error| eprintln!("left out: systemd-analyze: {error}"))
        .ok()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{drop_in:?}: {said}");
    Some(said)
}

#[test]
fn the_static_pod_sees_what_its_configuration_and_a_kubelets_kubeconfig_name() {
    let pod: serde_json::Value = serde_saphyr::from_str(&packaged("sheave-node.yaml")).unwrap();
    let spec = &pod["spec"];
    let list = |value: &serde_json::Value| value.as_array().unwrap().clone();
    let mounts = list(&spec["containers"][0]["volumeMounts"]);
    let volumes: BTreeMap<_, _> = list(&spec["volumes"])
        .into_iter()
        .map(|volume| (volume["name"].as_str().unwrap().to_owned(), volume["hostPath"].clone()))
        .collect();
    assert_eq!(mounts.len(), volumes.len());
    // At the same place as on the host: a kubeconfig names files by their paths.
    for mount in &mounts {
        assert_eq!(mount["mountPath"], volumes[mount["name"].as_str().unwrap()]["path"], "{mount}");
    }
    let is_for_reading = |path: &str| {
        let mount = mounts.iter().find(|mount| mount["mountPath"] == path);
        mount.unwrap_or_else(|| panic!("{path} is not mounted"))["readOnly"] == true
    };
    for path in ["/etc/sheave", "/etc/kubernetes", "/var/lib/kubelet/pki"] {
        assert!(is_for_reading(path), "{path}");
    }
    // Where kubelet has not been yet.
    assert_eq!(volumes["kubelet"]["type"], "DirectoryOrCreate");
}

#[test]
fn systemd_understands_every_line_of_the_unit_and_of_what_may_be_beside_it() {
    let drop_ins = drop_ins();
    for drop_in in drop_ins.iter().map(|name| Some(name.as_str())).chain([None]) {
        let Some(said) = verified(drop_in, &[]) else { return };
        assert!(!said.contains("sheave.service"), "{drop_in:?}: {said}");
    }
}

#[test]
fn nobody_but_a_load_balancer_waits_for_the_network() {
    // Where a dependency is, systemd reads the unit that it is on; and nothing takes one back, no empty list either
    // (systemd.unit(5)).
    let wrong = [("network-online.target", "[Unit]\nSuchAThing=no\n")];
    let waits = |drop_in| verified(drop_in, &wrong).map(|said| said.contains("SuchAThing"));
    for (drop_in, expected) in
        [(None, false), (Some("node.conf"), false), (Some("pods.conf"), false), (Some("edge.conf"), true)]
    {
        assert!(waits(drop_in).is_none_or(|it| it == expected), "{drop_in:?}");
    }
    // Also where there is no systemd to ask.
    let node = packaged("sheave.service.d/node.conf");
    assert_eq!(settings(&node), ["[Unit]", "Before=kubelet.service k3s-agent.service rke2-agent.service"]);
    let edge = packaged("sheave.service.d/edge.conf");
    assert_eq!(settings(&edge), ["[Unit]", "Wants=network-online.target", "After=network-online.target"]);
    assert!(settings(&unit()).iter().all(|line| !line.contains("network")));
}
