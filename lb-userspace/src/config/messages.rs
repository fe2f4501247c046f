//! The messages are the product: each mistake with the exact words it is answered with.

use std::{path::Path, time::Duration};

use proptest::prelude::*;

use super::*;

/// The smallest file that is right.
const RIGHT: &str = r#"
[[service]]
name = "api"
listen = ["192.0.2.1:6443"]
backends = ["10.0.0.1:6443", "10.0.0.2:6443"]
"#;

fn wrong(text: &str) -> String {
    match Config::parse(text, "sheave.toml") {
        Err(error) => error.to_string(),
        Ok((config, _)) => panic!("accepted: {text}\nas {config:?}"),
    }
}

fn right(text: &str) -> (Config, Vec<String>) {
    match Config::parse(text, "/etc/sheave/sheave.toml") {
        Ok((config, warnings)) => (config, warnings.iter().map(Warning::one_line).collect()),
        Err(error) => panic!("rejected: {text}\n{error}"),
    }
}

/// Prints every message of a table next to what was expected, so that a change of wording is reviewed at once.
fn assert_messages(table: &[(&str, &str)]) {
    let different: Vec<String> = table
        .iter()
        .map(|(text, expected)| (wrong(text), expected))
        .filter(|(message, expected)| {
            let lines: Vec<&str> = message.lines().map(str::trim).collect();
            let mut wanted = expected.lines().map(str::trim).filter(|line| !line.is_empty());
            !wanted.all(|line| lines.contains(&line))
        })
        .map(|(message, expected)| format!("--- expected to hold{expected}\n--- got\n{message}\n"))
        .collect();
    assert!(different.is_empty(), "{}", different.join("\n"));
}

/// The smallest file with something added to its service.
fn service_with(lines: &str) -> String {
    format!("{RIGHT}{lines}\n")
}

fn check_with(lines: &str) -> String {
    service_with(&format!("[service.check]\n{lines}"))
}

#[test]
fn a_message_shows_the_place_and_what_to_write() {
    assert_eq!(
        wrong(&check_with("intervall = \"1s\"")),
        r#"unknown key "intervall" in [service.check]
  --> sheave.toml:7:1
   |
 7 | intervall = "1s"
   | ^^^^^^^^^
   = help: did you mean "interval"?"#
    );
}

#[test]
fn a_duplicate_names_both_lines() {
    assert_eq!(
        wrong(&format!("{RIGHT}{}", RIGHT.replace("192.0.2.1:6443", "192.0.2.9:6443"))),
        r#"two services have the name "api" (first in line 3)
  --> sheave.toml:8:8
   |
 8 | name = "api"
   |        ^^^^^
   = help: give each its own name"#
    );
}

#[test]
fn without_a_place_the_file_is_named() {
    assert_eq!(
        wrong(""),
        r#"there is no [[service]], nothing to balance
  --> sheave.toml
   = help: add a [[service]] with "name", "listen" and "backends""#
    );
}

#[test]
fn the_first_evening_file_gets_every_default() {
    let (config, warnings) = right(
        r#"
[vip]
mode = "follow"

[[service]]
name = "kube-apiserver"
listen = ["192.168.2.140:6443"]
backends = ["192.168.2.151:6443", "192.168.2.152:6443", "192.168.2.153:6443"]

[service.check]
ca_file = "/etc/sheave/ca.crt"
"#,
    );
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(config.dataplane.interfaces, Interfaces::Auto);
    assert_eq!(config.dataplane.xdp_mode, XdpMode::Auto);
    assert_eq!(config.dataplane.snat_ports, None);
    assert_eq!((config.dataplane.source_share, config.dataplane.half_open_share), (Some(50), None));
    assert_eq!(config.dataplane.path_mtu_floor, 552);
    assert_eq!(config.dataplane.backend_interfaces, None);
    assert_eq!(config.dataplane.state_dir, Path::new("/var/lib/sheave"));
    assert_eq!(config.dataplane.pin_dir, Path::new("/sys/fs/bpf/sheave"));
    assert_eq!(config.admin.socket, Path::new("/run/sheave/admin.sock"));
    let [service] = config.services.as_slice() else { panic!("{config:?}") };
    assert_eq!(service.idle_timeout, Duration::from_secs(3 * 3600));
    assert_eq!(
        (service.on_dead, service.reset_after, service.reset_rate),
        (OnDead::Reset, Duration::from_secs(5), 2000)
    );
    assert_eq!(service.drain_timeout, None, "flows of who is drained live on");
    assert_eq!(service.check, Check { ca_file: Some("/etc/sheave/ca.crt".into()), ..Check::default() });
    assert_eq!(service.check.interval, Duration::from_secs(1));
    assert_eq!(
        service.backends.iter().map(|backend| backend.name.as_str()).collect::<Vec<_>>(),
        ["192.168.2.151:6443", "192.168.2.152:6443", "192.168.2.153:6443"]
    );
}

#[test]
fn every_key_can_be_set() {
    let (config, warnings) = right(
        r#"
[dataplane]
interfaces = ["eth0", "bond0.12"]
backend_interfaces = ["bond0.12"]
xdp_mode = "generic"
snat_addresses = ["10.0.0.250", "fd00::250"]
snat_ports = "20000-32767"
hash_key_file = "hash.key"
source_share = "100 %"
half_open_share = "25%"
path_mtu_floor = 1_280
state_dir = "/srv/sheave"
pin_dir = "/sys/fs/bpf/other"
cgroup = "/sys/fs/cgroup/system.slice"
[vip]
mode = "own"
[admin]
socket = "/run/other.sock"
[[service]]
name = "kube-apiserver"
listen = ["192.168.2.140:6443", "[fd00::140]:6443"]
balance = "maglev"
forward = "nat"
idle_timeout = "1h30m"
allow = ["10.0.0.0/8", "fd00::/8", "192.0.2.7"]
on_dead = "keep"
reset_after = "10s"
reset_rate = 0
drain_timeout = "10m"
pods = true
[service.check]
type = "https"
path = "/readyz?verbose"
expect = [200, "300-399"]
interval = "2s"
fast_interval = "500ms"
connect_timeout = "800ms"
timeout = "3s"
rise = 3
fall = 4
port = 6444
address = "10.0.0.9"
server_name = "kubernetes"
ca_file = "ca.crt"
client_cert_file = "client.crt"
client_key_file = "/etc/pki/client.key"
token_file = "token"
[[service.backend]]
name = "master-1"
address = "192.168.2.151:6443"
weight = 0
[[service.backend]]
address = "192.168.2.152:6443"
weight = 256
[[service.backend]]
address = "[fd00::151]:6443"
"#,
    );
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(config.dataplane.hash_key_file.as_deref(), Some(Path::new("/etc/sheave/hash.key")));
    assert_eq!(config.dataplane.snat_ports, Some(20000..=32767));
    assert_eq!((config.dataplane.source_share, config.dataplane.half_open_share), (Some(100), Some(25)));
    assert_eq!(config.dataplane.path_mtu_floor, 1280);
    assert_eq!(config.dataplane.backend_interfaces.as_deref(), Some(&["bond0.12".to_owned()][..]));
    assert_eq!(config.vip.mode, VipMode::Own);
    let service = &config.services[0];
    assert_eq!(service.idle_timeout, Duration::from_secs(5400));
    assert_eq!(
        (service.on_dead, service.reset_after, service.reset_rate),
        (OnDead::Keep, Duration::from_secs(10), 0)
    );
    assert_eq!(service.drain_timeout, Some(Duration::from_secs(600)));
    assert_eq!(service.allow.len(), 3);
    assert_eq!(service.check.expect, [200..=200, 300..=399]);
    assert_eq!(service.check.fast_interval, Duration::from_millis(500));
    assert_eq!(
        service.check.client_cert,
        Some(ClientCertificate {
            cert_file: "/etc/sheave/client.crt".into(),
            key_file: "/etc/pki/client.key".into()
        })
    );
    assert_eq!(
        service.backends.iter().map(|backend| (backend.name.as_str(), backend.weight)).collect::<Vec<_>>(),
        [("master-1", 0), ("192.168.2.152:6443", 256), ("[fd00::151]:6443", 1)]
    );
}

#[test]
fn a_short_interval_shortens_the_fast_one() {
    let (config, _) = right(&check_with("interval = \"100ms\""));
    assert_eq!(config.services[0].check.fast_interval, Duration::from_millis(100));
}

#[test]
fn unknown_keys() {
    assert_messages(&[
        ("[datapath]\n", "unknown key \"datapath\"\n= help: did you mean \"dataplane\"?"),
        ("[[services]]\n", "unknown key \"services\"\n= help: did you mean \"service\"?"),
        ("[vip]\nmodes = 1\n", "unknown key \"modes\" in [vip]\n= help: did you mean \"mode\"?"),
        ("[stats]\n", "unknown key \"stats\"\n= help: known here: dataplane, vip, admin, service"),
        (
            &service_with("idle-timeout = \"1h\""),
            "unknown key \"idle-timeout\" in [[service]]\n= help: did you mean \"idle_timeout\"?",
        ),
        (
            &service_with("bind = [\"192.0.2.1:6443\"]"),
            "unknown key \"bind\" in [[service]]\n= help: known here: name, listen, backends, backend, check, \
             balance, forward, idle_timeout, allow, on_dead, on_idle, reset_after, reset_rate, drain_timeout, pods, discover",
        ),
        (
            "[[service]]\nname = \"a\"\nlisten = [\"192.0.2.1:1\"]\n[[service.backend]]\nadress = \"10.0.0.1:1\"\n",
            "unknown key \"adress\" in [[service.backend]]\n= help: did you mean \"address\"?",
        ),
    ]);
}

#[test]
fn shape_of_the_file() {
    assert_messages(&[
        ("name = \"a\"\nname = \"b\"\n", "name is given twice\n2 | name = \"b\""),
        ("[vip]\nmode = \n", "--> sheave.toml:2:8"),
        ("[vip]\nmode = follow\n", "2 | mode = follow\n= help: strings are written in double quotes"),
        ("[[vip]]\n", "there is only one [vip]\n= help: write [vip] with single brackets, once"),
        ("vip = \"own\"\n", "\"vip\" must be a table, not a string"),
        ("[service]\nname = \"a\"\n", "= help: write [[service]], with double brackets"),
        (
            "[[service]]\n",
            "[[service]] has no \"name\"\n1 | [[service]]\n= help: add `name = \"kube-apiserver\"`",
        ),
        (
            "[[service]]\nname = \"a\"\n",
            "[[service]] has no \"listen\"\n= help: add `listen = [\"192.168.2.140:6443\"]`",
        ),
        (
            "[[service]]\nname = \"a\"\nlisten = [\"192.0.2.1:1\"]\n",
            "[[service]] has no \"backends\"\n= help: add `backends = [\"192.168.2.151:6443\"]`",
        ),
        (
            "[[service]]\nname = \"a\"\nlisten = \"192.0.2.1:1\"\n",
            "\"listen\" must be a list, not a string\n= help: write `listen = [\"192.168.2.140:6443\"]`",
        ),
        (
            "[[service]]\nname = 7\n",
            "\"name\" must be a string, not an integer\n= help: write \"kube-apiserver\", in double quotes",
        ),
        (&service_with("").replace("\"api\"", "\"a/b\""), "\"a/b\" cannot be a name"),
        (
            &service_with("").replace("[\"192.0.2.1:6443\"]", "[]"),
            "\"listen\" is empty, no client could connect",
        ),
        ("[[service]]\nname = \"a\"\nlisten = [\"192.0.2.1:1\"]\nbackends = []\n", "\"backends\" is empty"),
        (
            &service_with("[[service.backend]]\naddress = \"10.0.0.3:6443\""),
            "both \"backends\" and [[service.backend]]",
        ),
        ("[admin]\nsocket = \"\"\n", "\"socket\" is not the name of a file"),
        (
            "[dataplane]\ninterfaces = \"eth0\"\n",
            "= help: write \"auto\", or a list: `interfaces = [\"eth0\"]`",
        ),
        (
            "[dataplane]\ninterfaces = [\"eth0\", \"eth0\"]\n",
            "interface \"eth0\" is named twice (first in line 2)",
        ),
        (
            "[dataplane]\ninterfaces = [\"a-name-too-long-for-it\"]\n",
            "= help: write a name that `ip link` shows",
        ),
    ]);
}

#[test]
fn addresses() {
    let listen = |address: &str| RIGHT.replace("192.0.2.1:6443", address);
    let backend = |address: &str| RIGHT.replace("10.0.0.1:6443", address);
    assert_messages(&[
        (&listen("192.0.2.1:0"), "port 0 in \"192.0.2.1:0\"\n= help: write the port, 1 to 65535"),
        (&listen("192.0.2.1"), "\"192.0.2.1\" has no port\n= help: write \"192.0.2.1:6443\""),
        (&listen("fd00::1"), "\"fd00::1\" has no port\n= help: write \"[fd00::1]:6443\""),
        (&listen("192.0.2.1:70000"), "\"70000\" is not a port"),
        (&listen("*:6443"), "= help: write the VIP itself: packets are matched by their exact destination"),
        (&listen("0.0.0.0:6443"), "\"0.0.0.0:6443\" stands for every address of the host"),
        (&listen("[::]:6443"), "\"[::]:6443\" stands for every address of the host"),
        (&listen("224.0.0.18:6443"), "224.0.0.18 is not the address of one host"),
        (&listen("255.255.255.255:6443"), "255.255.255.255 is not the address of one host"),
        (&listen("[fe80::1]:6443"), "fe80::1 is a link-local address, which is not forwarded"),
        (&listen("[::ffff:192.0.2.1]:6443"), "= help: write 192.0.2.1"),
        (&listen("lb.example.com:6443"), "lb.example.com is a name; listeners are matched by address"),
        (&listen("10.0.0.256:6443"), "\"10.0.0.256:6443\" is not an address and port"),
        (
            &backend("master-1.example.com"),
            "\"master-1.example.com\" has no port\n= help: write \"master-1.example.com:6443\"",
        ),
        (&backend("master-1:66443"), "\"66443\" is not a port"),
        (&backend("localhost:6443"), "localhost is a loopback address, packets cannot be forwarded there"),
        (&backend("https://10.0.0.1:6443"), "= help: write \"10.0.0.1:6443\""),
        (&backend("127.0.0.1:6443"), "127.0.0.1 is a loopback address, packets cannot be forwarded there"),
        (&backend("0.0.0.0:6443"), "0.0.0.0 is no host's address"),
        (&backend("10.0.0.2:6443"), "backend 10.0.0.2:6443 is given twice (first in line 5)"),
        (&backend("192.0.2.1:6443"), "backend 192.0.2.1:6443 is itself a listener (first in line 4)"),
        (
            &backend("192.0.2.1:6444"),
            "backend 192.0.2.1:6444 is on an address that sheave listens on (first in line 4)",
        ),
        (&backend("[fd00::1]:6443"), "backend [fd00::1]:6443 is IPv6, and no listener of \"api\" is"),
        (&listen("[fd00::1]:6443"), "listener [fd00::1]:6443 is IPv6, and no backend of \"api\" is"),
        (
            &listen("192.0.2.1:6443\", \"192.0.2.1:6443"),
            "listener 192.0.2.1:6443 is given twice (first in line 4)",
        ),
        (
            &service_with("allow = [\"10.0.0.1/8\"]"),
            "= help: write \"10.0.0.0/8\" for the network, or \"10.0.0.1\" for the host",
        ),
        (&service_with("allow = [\"ten\"]"), "\"ten\" is not a source prefix"),
        (
            "[dataplane]\nsnat_addresses = [\"10.0.0.1:80\"]\n",
            "= help: write the address alone: \"10.0.0.1\"",
        ),
        (
            "[dataplane]\nsnat_addresses = [\"10.0.0.1\", \"10.0.0.1\"]\n",
            "10.0.0.1 is given twice (first in line 2)",
        ),
        (
            &format!("[dataplane]\nsnat_addresses = [\"fd00::1\"]\n{RIGHT}"),
            "listener 192.0.2.1:6443 is IPv4, and \"snat_addresses\" has no IPv4 address",
        ),
        (
            &format!("[dataplane]\nsnat_addresses = [\"10.0.0.2\"]\n{RIGHT}"),
            "backend 10.0.0.2:6443 has an address that is in \"snat_addresses\"",
        ),
    ]);
}

#[test]
fn numbers_and_durations() {
    assert_messages(&[
        (
            &check_with("interval = 5"),
            "\"interval\" must be a string, not an integer\n= help: write \"1s\", in double quotes",
        ),
        (&check_with("interval = \"5\""), "\"interval\" is not a duration: \"5\""),
        (
            &check_with("interval = \"1.5s\""),
            "= help: write a whole number with its unit: \"200ms\", \"1s\", \"5m\", \"3h\", \"1m30s\"",
        ),
        (&check_with("interval = \"1ms\""), "\"interval\" is too short\n= help: write \"10ms\" to \"24h\""),
        (&check_with("timeout = \"0s\""), "\"timeout\" is too short\n= help: write \"1ms\" to \"24h\""),
        (&check_with("connect_timeout = \"0ms\""), "\"connect_timeout\" is too short"),
        (&check_with("fast_interval = \"2s\""), "\"fast_interval\" is longer than \"interval\" (1s)"),
        (
            &service_with("on_dead = \"kill\""),
            "\"on_dead\" cannot be \"kill\"\n= help: write \"reset\" or \"keep\"",
        ),
        (
            &service_with("reset_after = \"900ms\""),
            "\"reset_after\" is too short\n= help: write \"1s\" to \"1h\"",
        ),
        (
            &service_with("reset_rate = -1"),
            "\"reset_rate\" is out of range\n= help: write a number from 0 to 1000000",
        ),
        (
            &service_with("idle_timeout = \"9h\""),
            "\"idle_timeout\" is too long\n= help: write \"1m\" to \"8h\"",
        ),
        (&service_with("idle_timeout = \"30s\""), "\"idle_timeout\" is too short"),
        (&check_with("fall = 0"), "\"fall\" is out of range\n= help: write a number from 1 to 1000"),
        (&check_with("rise = -1"), "\"rise\" is out of range"),
        (&check_with("rise = 99999999999999999999999999"), "\"rise\" is out of range"),
        (&check_with("rise = \"2\""), "\"rise\" must be a whole number, not a string"),
        (&check_with("port = 65536"), "\"port\" is out of range\n= help: write a number from 1 to 65535"),
        (
            &check_with("expect = 200"),
            "\"expect\" must be a list, not an integer\n= help: write `expect = [200]`",
        ),
        (&check_with("expect = []"), "\"expect\" is empty, nothing would ever be ready"),
        (&check_with("expect = [99]"), "not an HTTP status, nor a range of them"),
        (&check_with("expect = [\"200-600\"]"), "not an HTTP status, nor a range of them"),
        (
            &check_with("expect = [\"399-300\"]"),
            "= help: write a number from 100 to 599, or a range such as \"300-399\"",
        ),
        ("[dataplane]\npin_dir = \"/sys/fs/bpf/my.lb\"\n", "\"pin_dir\" has a dot: \"/sys/fs/bpf/my.lb\""),
        ("[dataplane]\nsnat_ports = \"20000\"\n", "\"20000\" is not a range of ports"),
        ("[dataplane]\nsnat_ports = \"80-20000\"\n", "\"snat_ports\" begins below 1024"),
        ("[dataplane]\nsnat_ports = \"20000-24094\"\n", "\"snat_ports\" holds 4095 ports, too few"),
        ("[dataplane]\nsnat_ports = \"30000-20000\"\n", "\"snat_ports\" holds 0 ports, too few"),
        (
            "[dataplane]\nsource_share = \"0%\"\n",
            "\"source_share\" is not a share: \"0%\"\n= help: write \"1%\" to \"100%\" of the flow table, such as \"50%\", or \"off\"",
        ),
        ("[dataplane]\nsource_share = \"101%\"\n", "\"source_share\" is not a share: \"101%\""),
        (
            "[dataplane]\nhalf_open_share = \"25\"\n",
            "\"half_open_share\" is not a share: \"25\"\n= help: write \"1%\" to \"100%\" of the flow table, such as \"25%\", or \"off\"",
        ),
        (
            "[dataplane]\nhalf_open_share = 25\n",
            "\"half_open_share\" must be a string, not an integer\n= help: write \"25%\", in double quotes",
        ),
        (
            "[dataplane]\nbackend_interfaces = []\n",
            "\"backend_interfaces\" names no interface\n= help: name those that backends answer by, or write \"auto\"",
        ),
        (
            "[dataplane]\nbackend_interfaces = \"eth1\"\n",
            "\"backend_interfaces\" cannot be \"eth1\"\n= help: write \"auto\", or a list: `backend_interfaces = [\"eth1\"]`",
        ),
        (
            "[dataplane]\npath_mtu_floor = 67\n",
            "\"path_mtu_floor\" is out of range\n= help: write a number from 68 to 1500",
        ),
        ("[dataplane]\npath_mtu_floor = 1501\n", "\"path_mtu_floor\" is out of range"),
        (
            "[dataplane]\npath_mtu_floor = \"552\"\n",
            "\"path_mtu_floor\" must be a whole number, not a string\n= help: write `path_mtu_floor = 68`, without quotes",
        ),
        (
            "[[service]]\nname = \"a\"\nlisten = [\"192.0.2.1:1\"]\n[[service.backend]]\naddress = \"10.0.0.1:1\"\nweight = 257\n",
            "\"weight\" is out of range\n= help: write a number from 0 to 256",
        ),
    ]);
}

#[test]
fn checks() {
    assert_messages(&[
        (&check_with("type = \"htps\""), "\"type\" cannot be \"htps\"\n= help: did you mean \"https\"?"),
        (&check_with("type = \"exec\""), "= help: write \"https\", \"http\", \"tls\", \"tcp\" or \"none\""),
        (&check_with("path = \"readyz\""), "\"readyz\" is not the path of a URL"),
        (
            &check_with("path = \"/a\\r\\nHost: b\""),
            "= help: write one that begins with a slash and has no spaces, such as \"/readyz\"",
        ),
        (&check_with("server_name = \"two words\""), "\"two words\" is neither a DNS name nor an address"),
        (&check_with("client_cert_file = \"a\""), "\"client_cert_file\" without \"client_key_file\""),
        (&check_with("client_key_file = \"a\""), "\"client_key_file\" without \"client_cert_file\""),
        (
            &check_with("insecure_skip_tls_verify = \"yes\""),
            "= help: write `insecure_skip_tls_verify = false`, without quotes",
        ),
    ]);
}

#[test]
fn listeners_on_loopback_are_for_this_host_alone() {
    let node = RIGHT.replace("192.0.2.1:6443", "127.0.0.1:16443");
    let (config, warnings) = right(&node);
    assert!(warnings.is_empty(), "{warnings:?}");
    assert!(config.needs_hook() && !config.forwards_packets());
    assert_eq!(config.services[0].check.interval, Duration::from_secs(10), "there are many nodes");
    assert_eq!(config.vips(), Vec::<std::net::IpAddr>::new());
    let (config, _) = right(&RIGHT.replace("192.0.2.1:6443", "127.0.0.1:16443\", \"192.0.2.1:6443"));
    assert!(config.needs_hook() && config.forwards_packets());
    assert_eq!(config.services[0].check.interval, Duration::from_secs(1));
    assert_eq!(config.vips(), ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
    let (config, _) = right(RIGHT);
    assert!(!config.needs_hook(), "wanted, but the others are served without");
    let (config, warnings) = right(&format!("[dataplane]\ninterfaces = []\n{RIGHT}pods = true\n"));
    assert!(warnings.is_empty(), "{warnings:?}");
    assert!(config.needs_hook() && !config.forwards_packets() && config.vips().is_empty());
    let (_, warnings) = right(&format!("{node}pods = true\n"));
    assert!(warnings[0].contains("every listener of \"api\" is on loopback"), "{warnings:?}");
    let without = |rest: &str| format!("[dataplane]\ncgroup = \"none\"\n{rest}");
    assert_messages(&[
        (
            &without(&node),
            "listener 127.0.0.1:16443 is on loopback, and cgroup = \"none\" leaves the connect hook out",
        ),
        (&without(&service_with("pods = true")), "pods = true, and cgroup = \"none\""),
        (
            "[dataplane]\ninterfaces = []\ncgroup = \"none\"\n[[service]]\nname = \"api\"\nlisten = [\"192.0.2.1:6443\"]\n\
             backends = [\"10.0.0.1:6443\"]\n",
            "interfaces = [] and cgroup = \"none\": nobody would be served",
        ),
        (
            &format!("[dataplane]\ninterfaces = []\n[vip]\nmode = \"own\"\n{RIGHT}"),
            "mode = \"own\" with interfaces = []",
        ),
        (
            &format!("[dataplane]\ncgroup = \"kubepods\"\n{RIGHT}"),
            "\"kubepods\" is not the directory of a cgroup",
        ),
    ]);
}

#[test]
fn what_is_not_built_yet_says_so() {
    assert_messages(&[
        (
            &service_with("balance = \"round-robin\""),
            "balance = \"round-robin\" is not built yet\n= help: write `balance = \"maglev\"`",
        ),
        (&service_with("forward = \"dsr\""), "forward = \"dsr\" is not built yet"),
    ]);
}

#[test]
fn a_kubeconfig_says_everything_about_credentials_by_itself() {
    let (config, warnings) =
        right(&check_with("kubeconfig = \"kubelet.conf\"\nserver_name = \"kubernetes\""));
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(config.services[0].check.kubeconfig.as_deref(), Some(Path::new("/etc/sheave/kubelet.conf")));
    let with = |line: &str| check_with(&format!("kubeconfig = \"/a\"\n{line}"));
    assert_messages(&[
        (
            &with("ca_file = \"/ca.crt\""),
            "both \"kubeconfig\" and \"ca_file\" (first in line 7)\n= help: keep one: the CA and the credential of the check \
             come from \"kubeconfig\"",
        ),
        (&with("token_file = \"/token\""), "both \"kubeconfig\" and \"token_file\" (first in line 7)"),
        (
            &with("client_cert_file = \"/a\"\nclient_key_file = \"/a\""),
            "both \"kubeconfig\" and \"client_cert_file\" (first in line 7)",
        ),
        (
            &with("insecure_skip_tls_verify = true"),
            "both \"kubeconfig\" and \"insecure_skip_tls_verify\" (first in line 7)",
        ),
        (&with("type = \"http\""), "\"kubeconfig\" with a check that speaks no TLS"),
    ]);
    let (_, warnings) = right(&with("type = \"tcp\""));
    assert!(warnings[0].contains("\"kubeconfig\" is not used"), "{warnings:?}");
}

#[test]
fn the_cluster_may_list_the_backends() {
    let (config, warnings) = right(&service_with("discover = { kubeconfig = \"discover.conf\" }"));
    assert!(warnings.is_empty(), "{warnings:?}");
    let discover = Discover {
        kubeconfig: "/etc/sheave/discover.conf".into(),
        namespace: "default".to_owned(),
        service: "kubernetes".to_owned(),
        replace: false,
    };
    assert_eq!(config.services[0].discover.as_ref(), Some(&discover));
    let without = RIGHT.replace("backends = [\"10.0.0.1:6443\", \"10.0.0.2:6443\"]", "");
    let (config, warnings) =
        right(&format!("{without}[service.discover]\nkubeconfig = \"/k\"\nreplace = true"));
    assert!(warnings.is_empty() && config.services[0].backends.is_empty(), "{warnings:?}");
    assert!(config.services[0].discover.as_ref().is_some_and(|discover| discover.replace));
    let discover = |keys: &str| service_with(&format!("discover = {{ {keys} }}"));
    assert_messages(&[
        (
            &discover(""),
            "[service.discover] has no \"kubeconfig\"
             = help: add `kubeconfig = \"/etc/sheave/kubeconfig\"`",
        ),
        (
            &discover("kubeconfig = \"k\", sevice = \"a\""),
            "unknown key \"sevice\" in [service.discover]
             = help: did you mean \"service\"?",
        ),
        (
            &discover("kubeconfig = \"k\", colour = \"a\""),
            "unknown key \"colour\" in [service.discover]
             = help: known here: kubeconfig, namespace, service, replace",
        ),
        (&discover("kubeconfig = \"\""), "\"kubeconfig\" is not the name of a file"),
        (
            &discover("kubeconfig = \"k\", service = \"default/kubernetes\""),
            "\"default/kubernetes\" cannot be the name of a Service in the cluster
             = help: write `namespace = \"default\", service = \"kubernetes\"`",
        ),
        (
            &discover("kubeconfig = \"k\", namespace = \"Kube System\""),
            "\"Kube System\" cannot be the name of a namespace in the cluster
             = help: write lower-case letters, digits and '-', such as \"default\"",
        ),
        (
            &discover("kubeconfig = \"k\", replace = \"yes\""),
            "\"replace\" must be true or false, not a string
             = help: write `replace = false`, without quotes",
        ),
        (&service_with("discover = \"kubernetes\""), "\"discover\" must be a table, not a string"),
        (&service_with("[[service.discover]]\nkubeconfig = \"k\""), "there is only one [service.discover]"),
    ]);
}

#[test]
fn a_backend_may_be_a_name() {
    let (config, _) = right(&RIGHT.replace("\"10.0.0.1:6443\"", "\"master-1.example.com:6443\""));
    let service = &config.services[0];
    assert_eq!(service.backends.len(), 1);
    let named = &service.named_backends[0];
    assert_eq!((named.host.as_str(), named.port), ("master-1.example.com", 6443));
    assert_eq!(named.name, "master-1.example.com:6443");
    let (config, _) = right(
        "[[service]]\nname = \"a\"\nlisten = [\"192.0.2.1:1\", \"[fd00::1]:1\"]\n\
         [[service.backend]]\nname = \"one\"\naddress = \"master-1:6443\"\nweight = 3\n",
    );
    let named = &config.services[0].named_backends[0];
    assert_eq!((named.name.as_str(), named.weight), ("one", 3), "either family, nobody knows yet");
    let twice = |second: &str| RIGHT.replace("\"10.0.0.1:6443\"", &format!("\"master-1:6443\", {second:?}"));
    assert_messages(&[(&twice("Master-1:6443"), "backend master-1:6443 is given twice (first in line 5)")]);
}

#[test]
fn the_admin_listener_is_an_address() {
    let admin = |listen: &str| format!("[admin]\nlisten = {listen:?}\n{RIGHT}");
    assert_eq!(right(&admin("127.0.0.1:1936")).0.admin.listen, Some("127.0.0.1:1936".parse().unwrap()));
    assert_messages(&[(
        &admin(":1936"),
        "\":1936\" is not an address and port\n= help: write one such as \"127.0.0.1:1936\"",
    )]);
}

#[test]
fn too_many() {
    let many =
        |count: usize, item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
    let backends = many(256, &|n| format!("\"10.1.{}.{}:6443\"", n / 200, n % 200 + 1));
    let listeners = many(256, &|n| format!("\"192.0.2.1:{}\"", 1000 + n));
    let one_port = many(33, &|n| format!("\"192.0.2.{}:6443\"", n + 1));
    let vips = many(17, &|n| format!("\"192.0.2.{}:6443\"", n + 1));
    let prefixes = many(4097, &|n| format!("\"10.{}.{}.1\"", n / 200, n % 200));
    let snat = many(17, &|n| format!("\"198.51.100.{}\"", n + 1));
    let service = |n: usize| {
        format!(
            "[[service]]\nname = \"s{n}\"\nlisten = [\"192.0.2.1:{}\"]\nbackends = [\"10.0.0.1:1\"]\n",
            n + 1
        )
    };
    let head = "[[service]]\nname = \"a\"\n";
    let listening = |on: &str| format!("{head}listen = [{on}]\nbackends = [\"10.0.0.1:1\"]");
    assert_messages(&[
        (
            &format!("{head}listen = [\"192.0.2.1:1\"]\nbackends = [{backends}]"),
            "more than 255 backends in all",
        ),
        (&listening(&listeners), "more than 255 listeners in all"),
        (&listening(&one_port), "more than 32 listeners on port 6443 in all"),
        (&listening(&vips), "more than 16 VIPs of one family"),
        (&service_with(&format!("allow = [{prefixes}]")), "more than 4096 \"allow\" prefixes in all"),
        (
            &format!("[dataplane]\nsnat_addresses = [{snat}]\n{RIGHT}"),
            "more than 16 \"snat_addresses\" of one family",
        ),
        (&(0..65).map(service).collect::<String>(), "more than 64 services in all"),
    ]);
    right(&(0..64).map(service).collect::<String>());
    right(&format!("[dataplane]\nsnat_addresses = [\"198.51.100.1\"]\n{}", listening(&vips)));
}

#[test]
fn warnings_name_the_line() {
    let warnings = |lines: &str| right(&check_with(lines)).1.join("\n");
    assert_eq!(
        warnings("expect = [401]"),
        "/etc/sheave/sheave.toml:7: 401 or 403 counts as ready: the check is unauthenticated and proves only that TLS \
         and HTTP work; give the check a \"token_file\" or client certificate, which needs no role at all, and expect 200"
    );
    assert!(warnings("insecure_skip_tls_verify = true").contains("accepts any certificate"));
    assert!(warnings("token_file = \"t\"").contains("the token goes to whoever answers"));
    assert!(warnings("type = \"http\"\ntoken_file = \"t\"").contains("sent in the clear"));
    assert!(warnings("type = \"tcp\"\npath = \"/\"").contains("the check speaks no HTTP"));
    assert!(warnings("type = \"http\"\nca_file = \"c\"").contains("the check speaks no TLS"));
    assert!(
        right(&service_with("allow = [\"fd00::/8\"]")).1[0].contains("nobody may connect to 192.0.2.1:6443")
    );
}

#[test]
fn a_secret_in_the_wrong_place_is_not_repeated() {
    for line in [
        "token = \"s3cret\"",
        "token_file = [\"s3cret\"]",
        "client_key = \"\"\"s3cret\"\"\"",
        "password = s3cret",
        "path = { token = \"s3cret\" }",
    ] {
        let message = wrong(&check_with(line));
        assert!(!message.contains("s3cret"), "{message}");
    }
}

#[test]
fn a_long_line_is_cut_around_the_mistake() {
    let many: String = (1..100).map(|n| format!("\"10.0.0.{n}:6443\", ")).collect();
    let text = RIGHT.replace("backends = [", &format!("backends = [{many}\"10.9.9.9\", "));
    let message = wrong(&text);
    let lines: Vec<&str> = message.lines().collect();
    let (shown, marks) = (lines[3], lines[4]);
    assert!(shown.len() < 110, "{message}");
    let start = marks.find('^').expect("a mark");
    assert_eq!(&shown[start..start + 10], "\"10.9.9.9\"", "{message}");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = Config::load(&directory.path().join("none.toml")).expect_err("no such file").to_string();
    assert!(missing.contains("none.toml: No such file"), "{missing}");
    assert!(missing.contains("--config FILE"), "{missing}");

    let binary = directory.path().join("binary");
    std::fs::write(&binary, [0xff, 0xfe, 0]).expect("written");
    let message = Config::load(&binary).expect_err("not text").to_string();
    assert!(message.contains("UTF-8"), "{message}");

    assert!(Config::load(Path::new("/dev/zero")).is_err());
}

/// Files that are nearly right reach further than arbitrary text.
fn nearly_right() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("[[service]]\n".to_owned()),
        Just("[service.check]\n".to_owned()),
        Just("[[service.backend]]\n".to_owned()),
        Just("[dataplane]\n".to_owned()),
        "(name|listen|backends|address|weight|interval|expect|path|fall|snat_ports|interfaces|allow) = ",
        "\"[0-9a-f:.\\[\\]/*-]{0,20}\"\n",
        "\\[(\"[0-9.:]{0,12}\",? ?){0,3}\\]\n",
        "-?[0-9]{1,22}\n",
        "[=\\[\\]{}\"'\n#.,é\t\r]{1,6}",
    ];
    prop::collection::vec(word, 0..30).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        let _ = Config::parse(&text, "sheave.toml").map_err(|error| error.to_string());
    }

    #[test]
    fn nearly_right_text_never_panics(text in nearly_right()) {
        for whole in [text.clone(), format!("{RIGHT}{text}"), format!("{text}{RIGHT}")] {
            if let Err(error) = Config::parse(&whole, "sheave.toml") {
                prop_assert!(error.to_string().contains("sheave.toml"));
            }
        }
    }

    #[test]
    fn a_valid_file_cut_anywhere_never_panics(cut in 0..RIGHT.len()) {
        let _ = Config::parse(&RIGHT[..cut], "sheave.toml").map_err(|error| error.to_string());
    }

    #[test]
    fn durations_read_back(milliseconds in 0u64..=86_400_000) {
        let duration = Duration::from_millis(milliseconds);
        prop_assert_eq!(values::duration(&values::duration_text(duration)), Some(duration));
    }
}
