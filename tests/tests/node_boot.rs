//! A node that is not ready for sheave yet, or never will be; and the pod of `packaging/`, in a container made by hand.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, program},
    dial::dial,
    lab::eventually,
    load,
    stub::{AnonymousMode, TOKEN},
};
use serde_json::Value;

/// For a start, or a verdict, on a busy machine.
const MOMENT: Duration = Duration::from_secs(20);
const REFUSED: &str = "Connection refused (os error 111)";
const LOCAL4: &str = "127.0.0.1:16443";
const MANIFEST: &str = include_str!("../../packaging/sheave-node.yaml");
const UNIT: &str = include_str!("../../packaging/sheave.service");

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// Connections of the node's processes to its listener.
fn require_served(cluster: &Cluster, count: usize) {
    let dialled = dial(&cluster.lb, true, &cluster.ca_file(), at(LOCAL4), count).unwrap();
    dialled.require_all(count, at(LOCAL4)).unwrap();
}

/// A command on the load balancer's host after which nobody sees a cgroup v2 hierarchy.
fn without_cgroup2(cluster: &Cluster) -> Command {
    let script = r#"findmnt -rnt cgroup2 -o TARGET | while read -r place; do umount -l "$place"; done
        ! findmnt -t cgroup2 > /dev/null
        exec "$@""#;
    let mut command = cluster.lb.command("unshare");
    command.args(["--mount", "sh", "-ec", script, "sh"]).arg(program().unwrap());
    command
}

#[test]
fn without_cgroup_v2_a_node_is_told_and_a_load_balancer_goes_on() {
    let missing = "no cgroup v2 hierarchy is mounted";
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let auto = |mut settings: Settings| {
        settings.dataplane.push("cgroup = \"auto\"".to_owned());
        settings
    };
    let start = |settings: &Settings| {
        let config = |directory: &Path| settings.to_toml(directory);
        let command = without_cgroup2(&cluster);
        Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command).unwrap()
    };
    let mut node = start(&auto(cluster.settings_of_a_node().unwrap()));
    let ended = node.process().wait(MOMENT).unwrap();
    let log = node.log();
    assert!(!ended.success() && log.contains(missing) && log.contains("mount -t cgroup2"), "{ended}: {log}");

    let mut edge = start(&auto(cluster.settings().unwrap()));
    edge.wait_ready(1).unwrap();
    let status = edge.status_table().unwrap();
    assert!(status.contains(missing), "{status}");
    for vip in cluster.vips() {
        let client = cluster.client_of(vip).unwrap();
        load::sequential(&cluster.client, &client, 5).unwrap().require_all(5).unwrap();
    }
}

#[test]
fn a_node_boots_before_its_network_its_ca_and_its_cluster() {
    let mut cluster = Cluster::without_vips(Shape::OneArm, 2).unwrap();
    let ca_file = cluster.lab.directory().join("kubelet/ca.crt");
    let settings = Settings { ca_file: ca_file.clone(), ..cluster.settings_of_a_node().unwrap() };
    cluster.lab.unplug(&cluster.lb).unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    // Kubelet would dial by now, and hear at once that nobody can serve.
    eventually(MOMENT, "it is alive", || {
        ensure!(daemon.is_alive()?, "{}", daemon.log());
        Ok(())
    })
    .unwrap();
    // Nobody is to be reached without the hook either: that it is there shows by what it counts.
    let dialled = dial(&cluster.lb, true, &cluster.ca_file(), at(LOCAL4), 10).unwrap();
    assert_eq!(dialled.failures.get(REFUSED), Some(&10), "{dialled:?}");
    assert_eq!(daemon.status().unwrap().packets.get("connects_refused"), Some(&10));

    cluster.lab.replug(&cluster.lb).unwrap();
    for apiserver in &mut cluster.apiservers {
        apiserver.start().unwrap();
    }
    // Before its first join a node has no CA.
    daemon.wait_ready(2).unwrap();
    require_served(&cluster, 10);
    fs::create_dir(ca_file.parent().unwrap()).unwrap();
    fs::copy(cluster.ca_file(), &ca_file).unwrap();
    eventually(MOMENT, "its checks verify", || {
        let status = daemon.status_table()?;
        ensure!(!status.contains("ca.crt"), "{status}");
        Ok(())
    })
    .unwrap();
    daemon.wait_ready(2).unwrap();
    require_served(&cluster, 10);
}

#[test]
fn a_kubeconfig_may_point_at_the_listener_that_needs_it() {
    let mut cluster = Cluster::without_vips(Shape::OneArm, 2).unwrap();
    for apiserver in &mut cluster.apiservers {
        apiserver.stub.set_anonymous(AnonymousMode::Off);
        apiserver.start().unwrap();
    }
    let file = cluster.lab.directory().join("kubelet.conf");
    let mut settings = Settings { ca_file: PathBuf::new(), ..cluster.settings_of_a_node().unwrap() };
    settings.check.push(format!("kubeconfig = {file:?}"));
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    // Not there before the first join; and nobody answers 200 to a stranger, so that its token is what helps.
    eventually(MOMENT, "strangers are turned away", || {
        let status = daemon.status()?;
        let checks = status.services.iter().flat_map(|service| &service.backends).map(|it| &it.check);
        for check in checks {
            let http_status = check.as_ref().and_then(|check| check.http_status);
            ensure!(http_status == Some(401), "{check:?}");
        }
        Ok(())
    })
    .unwrap();
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: node\n\
         contexts:\n- {{name: node, context: {{cluster: here, user: node}}}}\n\
         clusters:\n- {{name: here, cluster: {{server: \"https://{LOCAL4}\", certificate-authority: {:?}}}}}\n\
         users:\n- {{name: node, user: {{token: {TOKEN}}}}}\n",
        cluster.ca_file()
    );
    fs::write(&file, text).unwrap();
    daemon.wait_ready(2).unwrap();
    require_served(&cluster, 10);
}

/// The container of the manifest.
fn container() -> Value {
    let pod: Value = serde_saphyr::from_str(MANIFEST).unwrap();
    assert_eq!((&pod["kind"], &pod["spec"]["hostNetwork"]), (&"Pod".into(), &true.into()));
    pod["spec"]["containers"][0].clone()
}

/// The capabilities it is given, as the kernel calls them without `CAP_`.
fn capabilities(container: &Value) -> Vec<String> {
    let added = container["securityContext"]["capabilities"]["add"].as_array().unwrap();
    added.iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

/// Where the host's directory is in the container, and whether it may be written there.
fn mount<'a>(container: &'a Value, name: &str) -> (&'a str, bool) {
    let mounts = container["volumeMounts"].as_array().unwrap();
    let found = mounts.iter().find(|mount| mount["name"] == *name).unwrap();
    (found["mountPath"].as_str().unwrap(), found["readOnly"] != true)
}

/// As a container runtime does it: namespaces of its own but for the network, a read-only root, `/proc/sys` and `/sys` for
/// reading, what is mounted from the host, and a bounding set. The lab's directory stands for the configuration, the
/// state and the socket.
const RUNTIME: &str = r#"
root=$1 capabilities=$2 directory=$3 cgroup=$4 program=$5
shift 4
mount -t tmpfs -o size=1m none "$root"
share() { mkdir -p "$root$1"; mount --rbind "$1" "$root$1"; }
protect() { mount -o remount,bind,ro "$root$1"; }
for place in /usr "$(dirname "$program")"; do share "$place"; protect "$place"; done
for place in /bin /lib /lib64; do
    if [ -L "$place" ]; then cp -P "$place" "$root$place"; elif [ -e "$place" ]; then share "$place"; protect "$place"; fi
done
mkdir -p "$root/proc" "$root/sys" "$root/dev"
for device in null zero random urandom; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
protect /proc/sys
mount -t sysfs -o ro sysfs "$root/sys"
share /sys/fs/cgroup
share /sys/fs/bpf
if [ "$cgroup" = ro ]; then
    findmnt -rno TARGET -R "$root/sys/fs/cgroup" | while read -r place; do mount -o remount,bind,ro "$place"; done
fi
mkdir -p "$root$directory"
mount --bind "$directory" "$root$directory"
mount -o remount,ro "$root"
exec chroot "$root" setpriv --no-new-privs --inh-caps=-all --bounding-set="-all$capabilities" "$@"
"#;

fn in_a_container(cluster: &Cluster, capabilities: &[String], writable_cgroup: bool) -> Command {
    let root = cluster.lab.directory().join("root");
    fs::create_dir_all(&root).unwrap();
    let added: String = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
    let mut command = cluster.lb.command("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup"]);
    command.args(["sh", "-ec", RUNTIME, "sh"]).arg(root).arg(added).arg(cluster.lab.directory());
    command.arg(if writable_cgroup { "rw" } else { "ro" }).arg(program().unwrap());
    command
}

fn start(cluster: &Cluster, capabilities: &[String], writable_cgroup: bool) -> Daemon {
    let settings = cluster.settings_of_a_node().unwrap();
    let config = |directory: &Path| settings.to_toml(directory);
    let command = in_a_container(cluster, capabilities, writable_cgroup);
    Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command).unwrap()
}

#[test]
fn the_static_pod_has_what_the_hook_needs() {
    let container = container();
    let capabilities = capabilities(&container);
    assert_eq!(mount(&container, "bpf"), ("/sys/fs/bpf", true));
    let (place, writable_cgroup) = mount(&container, "cgroup");
    assert_eq!(place, "/sys/fs/cgroup");
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let mut daemon = start(&cluster, &capabilities, writable_cgroup);
    daemon.wait_ready(2).unwrap();
    require_served(&cluster, 20);
    // And takes over from itself.
    daemon.process().kill().unwrap();
    require_served(&cluster, 20);
    let mut daemon = start(&cluster, &capabilities, writable_cgroup);
    daemon.wait_ready(2).unwrap();
    require_served(&cluster, 20);
    let unloaded = daemon.unload().unwrap();
    assert!(unloaded.status.success(), "{unloaded:?}");
}

#[test]
fn the_static_pod_has_no_capability_that_it_does_not_need() {
    let all = capabilities(&container());
    for without in &all {
        let rest: Vec<_> = all.iter().filter(|name| *name != without).cloned().collect();
        let cluster = Cluster::start_without_vips(Shape::OneArm, 1).unwrap();
        let mut daemon = start(&cluster, &rest, false);
        let ended = daemon.process().wait(MOMENT);
        let log = daemon.log();
        assert!(ended.is_ok_and(|ended| !ended.success()), "without {without}:\n{log}");
        let refused = log.contains("not permitted") || log.contains("Permission denied");
        assert!(refused, "without {without} it says:\n{log}");
    }
}

#[test]
fn the_static_pod_has_no_privilege_that_the_unit_has_not() {
    let container = container();
    let unit = UNIT.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let unit: Vec<_> = unit.split_whitespace().map(|name| name.strip_prefix("CAP_").unwrap()).collect();
    let context = &container["securityContext"];
    for name in capabilities(&container) {
        assert!(unit.contains(&name.as_str()), "{name} is not in {unit:?}");
    }
    assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]));
    assert_eq!(context["privileged"], Value::Null);
    assert_eq!(context["allowPrivilegeEscalation"] == false, UNIT.contains("\nNoNewPrivileges=yes\n"));
    assert_eq!(context["readOnlyRootFilesystem"] == true, UNIT.contains("\nProtectSystem=strict\n"));
    // The same command, but for the place of the program.
    let words: Vec<_> = container["command"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(words[0].ends_with("/sheave") && words[1] == "run", "{words:?}");
    assert!(UNIT.contains("\nExecStart=/usr/bin/sheave run\n"));
}
