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
    hold::{Holder, Order, SOME_AT_EACH},
    lab::eventually,
    load,
    stub::{AnonymousMode, PORT, TOKEN},
};
use serde_json::Value;

/// For a start, or a verdict, on a busy machine.
const MOMENT: Duration = Duration::from_secs(60);
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
    assert_eq!(pod["spec"]["hostPID"], Value::Null);
    pod["spec"]["containers"][0].clone()
}

/// The same with what the manifest says of pods.
fn container_for_pods() -> Value {
    let least = MANIFEST.lines().find(|line| line.trim_start().starts_with("add: ")).unwrap();
    let manifest = MANIFEST.replace(&format!("{least}\n"), "");
    let manifest = manifest.replace("# hostPID: ", "hostPID: ").replace("# add: ", "add: ");
    let pod: Value = serde_saphyr::from_str(&manifest).unwrap();
    assert_eq!(pod["spec"]["hostPID"], true);
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

/// What a container may do and see beyond the manifest's capabilities.
#[derive(Clone, Copy, Default)]
struct Sight {
    /// The host's cgroups are mounted for writing.
    writable_cgroup: bool,
    /// It sees the host's processes.
    host_pid: bool,
}

fn in_a_container(cluster: &Cluster, capabilities: &[String], sight: Sight) -> Command {
    let root = cluster.lab.directory().join("root");
    fs::create_dir_all(&root).unwrap();
    let added: String = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
    let mut command = cluster.lb.command("unshare");
    command.args(["--mount", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup"]);
    if !sight.host_pid {
        command.arg("--pid");
    }
    command.args(["sh", "-ec", RUNTIME, "sh"]).arg(root).arg(added).arg(cluster.lab.directory());
    command.arg(if sight.writable_cgroup { "rw" } else { "ro" }).arg(program().unwrap());
    command
}

fn start(cluster: &Cluster, capabilities: &[String], writable_cgroup: bool) -> Daemon {
    let sight = Sight { writable_cgroup, host_pid: false };
    start_with(cluster, &cluster.settings_of_a_node().unwrap(), capabilities, sight)
}

fn start_with(cluster: &Cluster, settings: &Settings, capabilities: &[String], sight: Sight) -> Daemon {
    let config = |directory: &Path| settings.to_toml(directory);
    let command = in_a_container(cluster, capabilities, sight);
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

/// A node that serves pods. The client's network namespace stands for a pod's.
fn settings_for_pods(cluster: &Cluster) -> Settings {
    let mut settings = cluster.settings_of_a_node().unwrap();
    settings.listen.push(vip(cluster));
    settings.dataplane.push("interfaces = []".to_owned());
    settings.service = vec!["pods = true".to_owned(), "reset_after = \"1500ms\"".to_owned()];
    settings.check.extend(["fast_interval = \"100ms\"", "connect_timeout = \"500ms\""].map(str::to_owned));
    settings
}

fn vip(cluster: &Cluster) -> SocketAddr {
    SocketAddr::new(cluster.vip4, PORT)
}

#[test]
fn the_static_pod_ends_connections_of_pods_with_what_its_manifest_says_and_not_without() {
    let all = capabilities(&container_for_pods());
    let least = capabilities(&container());
    let more: Vec<_> = all.iter().filter(|name| !least.contains(name)).collect();
    assert_eq!(more, ["SYS_ADMIN", "SYS_PTRACE"]);
    let sight = |host_pid| Sight { writable_cgroup: false, host_pid };
    let all_but = |without| all.iter().filter(|name| *name != without).cloned().collect::<Vec<_>>();
    // As it is shipped, and with one of the two left out: pods are served, and whoever looks is told what is missing.
    for (capabilities, host_pid) in [(least, false), (all_but(more[0]), true), (all_but(more[1]), true)] {
        let cluster = Cluster::start_without_vips(Shape::OneArm, 1).unwrap();
        let settings = settings_for_pods(&cluster);
        let mut daemon = start_with(&cluster, &settings, &capabilities, sight(host_pid));
        daemon.wait_ready(1).unwrap();
        daemon.wait_flag("pods.conf", MOMENT).unwrap();
        let dialled = dial(&cluster.client, true, &cluster.ca_file(), vip(&cluster), 10).unwrap();
        dialled.require_all(10, vip(&cluster)).unwrap();
    }
    for host_pid in [false, true] {
        let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
        let mut daemon = start_with(&cluster, &settings_for_pods(&cluster), &all, sight(host_pid));
        daemon.wait_ready(2).unwrap();
        let mut pod = Holder::start(&cluster.client, true, &cluster.ca_file(), vip(&cluster)).unwrap();
        pod.order(Order::Open(SOME_AT_EACH)).unwrap();
        let opened = pod.opened_to("api-1");
        assert!(opened > 0);
        assert!(!daemon.flags().unwrap().contains("pods.conf"));
        cluster.apiservers[0].host.cut_off().unwrap();
        daemon.wait_state("api-1", "dead", MOMENT).unwrap();
        eventually(MOMENT, "its connections are ended, or it says why not", || {
            let ended = pod.ended().len();
            ensure!(if host_pid { ended == opened } else { daemon.log().contains("hostPID") }, "{ended}");
            Ok(())
        })
        .unwrap();
        assert_eq!(pod.ended().len(), if host_pid { opened } else { 0 });
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
