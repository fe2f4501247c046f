//! The unit in `packaging/` is what systemd takes it for, and as closed as it is meant to be.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

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

fn packaged(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("packaging").join(file);
    fs::read_to_string(path).unwrap()
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

#[test]
fn systemd_understands_every_line_of_the_unit() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sheave.service");
    // It asks whether the program is there, too.
    fs::write(&file, unit().replace("/usr/bin/sheave", "/bin/sh")).unwrap();
    let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output();
    let Ok(verified) = verified else {
        eprintln!("left out: there is no systemd-analyze here");
        return;
    };
    let said = String::from_utf8_lossy(&[verified.stdout, verified.stderr].concat()).into_owned();
    let about_ours: Vec<_> = said.lines().filter(|line| line.contains("sheave.service")).collect();
    assert!(verified.status.success() && about_ours.is_empty(), "{said}");
}
