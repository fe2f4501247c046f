//! Who the checks are, towards apiservers that want to know, and how an operator gets there: the real daemon.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use data_encoding::BASE64;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, program},
    lab::{
        authority::{Authority, Identity},
        cgroup_of, eventually, pins_of,
        process::{Signal, said},
        run,
    },
    load::{self, Client, Report},
    stub::{AnonymousMode, Health, PORT, TOKEN},
};
use serde_json::Value;

/// For a verdict, a look-up or a rotation to be noticed, on a busy machine.
const MOMENT: Duration = Duration::from_secs(30);

/// A cluster whose apiservers know each other, and treat anonymous callers so.
fn cluster(apiservers: u8, anonymous: AnonymousMode) -> Cluster {
    let mut cluster = Cluster::start(Shape::OneArm, apiservers).unwrap();
    let endpoints: Vec<SocketAddr> = (cluster.apiservers.iter())
        .flat_map(|it| cluster.vips().map(|vip| SocketAddr::new(it.host.address(vip).unwrap(), PORT)))
        .collect();
    for apiserver in &mut cluster.apiservers {
        apiserver.stub.kill().unwrap();
        apiserver.stub.set_anonymous(anonymous);
        apiserver.stub.set_endpoints(&endpoints);
        apiserver.start().unwrap();
    }
    cluster
}

/// The IPv4 half of the usual settings.
fn settings(cluster: &Cluster, check: &[&str]) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.listen.retain(SocketAddr::is_ipv4);
    settings.backends.retain(|(_, address)| address.is_ipv4());
    settings.check = check.iter().map(ToString::to_string).collect();
    settings
}

fn start(cluster: &Cluster, settings: &Settings) -> Daemon {
    Daemon::start(&cluster.lb, cluster.lab.directory(), settings).unwrap()
}

/// Waits until a flag says this.
fn wait_flag(daemon: &Daemon, words: &str) {
    daemon.wait_flag(words, MOMENT).unwrap();
}

/// Waits until no flag says this any more.
fn wait_no_flag(daemon: &Daemon, words: &str) {
    eventually(MOMENT, &format!("no flag says {words:?}"), || {
        let flags = daemon.flags()?;
        ensure!(!flags.contains(words), "{flags}");
        Ok(())
    })
    .unwrap();
}

/// Waits until the last check of every backend had this HTTP status, and its state is this.
fn wait_checks(daemon: &Daemon, http_status: u16, state: &str) {
    eventually(MOMENT, &format!("every backend is {state} with {http_status}"), || {
        let status = daemon.status_json()?;
        let backends = status["services"][0]["backends"].as_array().context("no backends")?.clone();
        let as_wanted = |it: &Value| it["check"]["http_status"] == http_status && it["state"] == state;
        ensure!(!backends.is_empty() && backends.iter().all(as_wanted), "{backends:?}");
        Ok(())
    })
    .unwrap();
}

fn require_served(cluster: &Cluster) {
    let client = cluster.client_of(cluster.vip4).unwrap();
    load::sequential(&cluster.client, &client, 20).unwrap().require_all(20).unwrap();
}

/// Requests that are all answered, by whomever.
fn served(cluster: &Cluster, client: &Client) -> Report {
    let report = load::sequential(&cluster.client, client, 40).unwrap();
    report.require_all(40).unwrap();
    report
}

/// A directory as kubelet mounts a Secret: `token -> ..data/token`, `..data -> ..N`.
struct Mounted {
    directory: PathBuf,
    version: u32,
}

impl Mounted {
    fn new(directory: PathBuf, token: &str) -> Self {
        fs::create_dir(&directory).unwrap();
        symlink("..data/token", directory.join("token")).unwrap();
        let mut mounted = Self { directory, version: 0 };
        mounted.rotate(token);
        mounted
    }

    fn token(&self) -> PathBuf {
        self.directory.join("token")
    }

    /// The new version beside the old one, then the link in one step, then the old one away.
    fn rotate(&mut self, token: &str) {
        let version = |number: u32| format!("..{number}");
        self.version += 1;
        let new = self.directory.join(version(self.version));
        fs::create_dir(&new).unwrap();
        fs::write(new.join("token"), token).unwrap();
        symlink(version(self.version), self.directory.join("..data_tmp")).unwrap();
        fs::rename(self.directory.join("..data_tmp"), self.directory.join("..data")).unwrap();
        let _ = fs::remove_dir_all(self.directory.join(version(self.version - 1)));
    }
}

/// How a kubeconfig holds certificates and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// By the names of their files.
    AsFiles,
    /// In itself, as base64, as kubeadm's `admin.conf` does.
    Inline,
}

/// A kubeconfig that names files.
fn kubeconfig(path: &Path, server: SocketAddr, ca: &Path, identity: &Identity) -> PathBuf {
    kubeconfig_holding(Held::AsFiles, path, server, ca, identity)
}

fn kubeconfig_holding(
    held: Held,
    path: &Path,
    server: SocketAddr,
    ca: &Path,
    identity: &Identity,
) -> PathBuf {
    let line = |key: &str, file: &Path| match held {
        Held::AsFiles => format!("{key}: {}", file.display()),
        Held::Inline => format!("{key}-data: {}", BASE64.encode(&fs::read(file).unwrap())),
    };
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         contexts:\n- name: lab\n  context: {{cluster: lab, user: checker}}\n\
         clusters:\n- name: lab\n  cluster:\n    server: https://{server}\n    {}\n\
         users:\n- name: checker\n  user:\n    {}\n    {}\n",
        line("certificate-authority", ca),
        line("client-certificate", &identity.certificate),
        line("client-key", &identity.key),
    );
    // As `kubeadm certs renew` does it: whole.
    fs::write(path.with_extension("new"), text).unwrap();
    fs::rename(path.with_extension("new"), path).unwrap();
    path.to_owned()
}

#[test]
fn a_token_that_rotates_under_a_mounted_secret_is_read_again() {
    let cluster = cluster(2, AnonymousMode::Off);
    let mut mounted = Mounted::new(cluster.lab.directory().join("secret"), "an-old-token");
    let token_file = format!("token_file = {:?}", mounted.token());
    let daemon = start(&cluster, &settings(&cluster, &[&token_file]));
    wait_checks(&daemon, 401, "draining");
    wait_flag(&daemon, "credential");
    require_served(&cluster);

    mounted.rotate(TOKEN);
    wait_checks(&daemon, 200, "ready");
    mounted.rotate("a-wrong-token");
    wait_checks(&daemon, 401, "draining");
    require_served(&cluster);
    mounted.rotate(TOKEN);
    wait_checks(&daemon, 200, "ready");
    for secret in ["an-old-token", TOKEN, "a-wrong-token"] {
        assert!(!daemon.log().contains(secret), "{}", daemon.log());
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_kubeconfig_is_all_the_check_needs_and_is_read_again() {
    let cluster = cluster(2, AnonymousMode::Off);
    let directory = cluster.lab.directory();
    let stranger = Authority::new(&directory.join("other")).unwrap().client("checker", &[]).unwrap();
    let checker = cluster.authority.client("checker", &[]).unwrap();
    let nowhere: SocketAddr = "192.0.2.1:6443".parse().unwrap();
    let path = kubeconfig(&directory.join("kubelet.conf"), nowhere, &cluster.ca_file(), &stranger);
    let kubeconfig_line = format!("kubeconfig = {path:?}");
    let settings = Settings { ca_file: PathBuf::new(), ..settings(&cluster, &[&kubeconfig_line]) };
    let daemon = start(&cluster, &settings);
    // A foreign certificate is answered with 401, after a handshake that completes.
    wait_checks(&daemon, 401, "draining");
    wait_flag(&daemon, "credential");
    kubeconfig(&path, nowhere, &cluster.ca_file(), &checker);
    wait_checks(&daemon, 200, "ready");
    require_served(&cluster);
    // Broken: what it said holds.
    fs::write(&path, "current-context: [").unwrap();
    eventually(MOMENT, "the daemon says that it is broken", || {
        ensure!(daemon.log().contains("wrong YAML"), "{}", daemon.log());
        Ok(())
    })
    .unwrap();
    wait_checks(&daemon, 200, "ready");
}

#[test]
fn a_kubeconfig_of_no_use_is_refused_at_the_start() {
    let cluster = cluster(1, AnonymousMode::Off);
    let directory = cluster.lab.directory();
    for (text, said) in [
        ("apiVersion: v1\nkind: Config\n", "no current-context"),
        (
            "current-context: a\ncontexts: [{name: a, context: {cluster: a, user: a}}]\n\
             clusters: [{name: a, cluster: {certificate-authority: ca.crt}}]\n\
             users: [{name: a, user: {exec: {command: hunter2}}}]\n",
            "exec plugin",
        ),
    ] {
        let path = directory.join("broken.conf");
        fs::write(&path, text).unwrap();
        let line = format!("kubeconfig = {path:?}");
        let settings = Settings { ca_file: PathBuf::new(), ..settings(&cluster, &[&line]) };
        let mut daemon = start(&cluster, &settings);
        let ended = daemon.process().wait(MOMENT).unwrap();
        assert_eq!(ended.code(), Some(2), "{}", daemon.log());
        assert!(daemon.log().contains(said) && !daemon.log().contains("hunter2"), "{}", daemon.log());
    }
}

/// From an apiserver's being told to stop until its port closes: its draining is noticed and used meanwhile.
const STOPPING: Duration = Duration::from_secs(8);

#[test]
fn a_ca_that_is_rotated_master_by_master_cuts_nobody_off() {
    let mut cluster = cluster(3, AnonymousMode::Allowed);
    let directory = cluster.lab.directory().to_owned();
    let next = Authority::new(&directory.join("next")).unwrap();
    let [old, new] = [cluster.ca_file(), next.file()].map(|path| fs::read_to_string(path).unwrap());
    // The clients were told first, this load balancer was forgotten.
    let (both, configured) = (directory.join("both.crt"), directory.join("configured.crt"));
    fs::write(&both, format!("{old}{new}")).unwrap();
    fs::write(&configured, &old).unwrap();
    let client = Client::new(&both, SocketAddr::new(cluster.vip4, PORT), MOMENT).unwrap();
    for (apiserver, vips) in cluster.apiservers.iter_mut().map(|it| (it, [cluster.vip4, cluster.vip6])) {
        let [own4, own6] = vips.map(|vip| apiserver.host.address(vip).unwrap());
        let addresses = [vips[0], vips[1], own4, own6];
        apiserver.stub.kill().unwrap();
        apiserver.stub.set_shutdown_delay(STOPPING);
        apiserver.start().unwrap();
        apiserver.stub.set_identity(next.server(apiserver.host.name(), &addresses).unwrap());
    }
    let check = ["interval = \"500ms\"", "fast_interval = \"100ms\""];
    let settings = Settings { ca_file: configured.clone(), ..settings(&cluster, &check) };
    let mut daemon = start(&cluster, &settings);
    daemon.wait_ready(3).unwrap();

    for (index, rotated) in [(0, "api-1"), (1, "api-1, api-2")] {
        let apiserver = &mut cluster.apiservers[index];
        apiserver.stub.kill().unwrap();
        apiserver.start().unwrap();
        wait_flag(&daemon, &format!("the certificate of {rotated} does not verify"));
        daemon.wait_state(rotated.rsplit(' ').next().unwrap(), "draining", MOMENT).unwrap();
        let report = served(&cluster, &client);
        assert_eq!(report.by_server().len(), 2 - index, "{:?}", report.by_server());
    }
    // The last one that verifies is told to stop: it does not get everything until its port closes, nor is anybody
    // refused then.
    let last = &mut cluster.apiservers[2];
    last.stub.process().unwrap().signal(Signal::SIGTERM).unwrap();
    wait_flag(&daemon, "no backend is ready");
    let report = served(&cluster, &client);
    assert!(["api-1", "api-2"].iter().all(|name| report.by_server().contains_key(name)), "{report:?}");
    cluster.apiservers[2].stub.process().unwrap().wait(MOMENT).unwrap();
    served(&cluster, &client);
    cluster.apiservers[2].start().unwrap();
    wait_flag(&daemon, "no backend's certificate verifies");
    wait_flag(&daemon, "the certificate of api-1, api-2, api-3 does not verify");
    daemon.wait_state("api-3", "draining", MOMENT).unwrap();
    eventually(MOMENT, "all three serve", || {
        let report = served(&cluster, &client);
        ensure!(report.by_server().len() == 3, "{:?}", report.by_server());
        Ok(())
    })
    .unwrap();

    let mended = configured.with_extension("new");
    fs::write(&mended, format!("{old}{new}")).unwrap();
    fs::rename(&mended, &configured).unwrap();
    wait_checks(&daemon, 200, "ready");
    wait_no_flag(&daemon, "does not verify");
    assert_eq!(served(&cluster, &client).by_server().len(), 3);
    cluster.require_no_own_resets().unwrap();
}

/// Of a client certificate that is used before it expires.
const VALIDITY: Duration = Duration::from_secs(15);

/// A daemon whose checks present a certificate that will soon have expired.
fn with_a_certificate_that_expires(cluster: &Cluster) -> Daemon {
    let Identity { certificate, key } =
        cluster.authority.client_until("checker", SystemTime::now() + VALIDITY).unwrap();
    let check = [format!("client_cert_file = {certificate:?}"), format!("client_key_file = {key:?}")];
    let mut daemon = start(cluster, &settings(cluster, &check.each_ref().map(String::as_str)));
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    assert!(!daemon.flags().unwrap().contains("401"));
    daemon
}

/// As `kubeadm certs renew` does it: a new pair in place of the old one.
fn renew_certificate(cluster: &Cluster) {
    cluster.authority.client("checker", &[]).unwrap();
}

#[test]
fn a_certificate_that_expires_is_only_flagged_where_anonymous_checks_pass() {
    let cluster = cluster(2, AnonymousMode::Allowed);
    let daemon = with_a_certificate_that_expires(&cluster);
    wait_flag(&daemon, "api-1, api-2 answered our credential with 401");
    wait_flag(&daemon, "our client certificate has expired");
    wait_checks(&daemon, 200, "ready");
    require_served(&cluster);
    renew_certificate(&cluster);
    wait_no_flag(&daemon, "answered our credential with 401");
    wait_no_flag(&daemon, "has expired");
    wait_checks(&daemon, 200, "ready");
    assert!(!daemon.log().contains("ready -> "), "ready all along: {}", daemon.log());
}

#[test]
fn a_certificate_that_expires_cuts_nobody_off_where_anonymous_checks_do_not_pass() {
    let cluster = cluster(2, AnonymousMode::Off);
    let daemon = with_a_certificate_that_expires(&cluster);
    wait_checks(&daemon, 401, "draining");
    wait_flag(&daemon, "some answer 401 or 403");
    wait_flag(&daemon, "our client certificate has expired");
    let report = served(&cluster, &cluster.client_of(cluster.vip4).unwrap());
    assert_eq!(report.by_server().len(), 2, "{:?}", report.by_server());
    renew_certificate(&cluster);
    wait_checks(&daemon, 200, "ready");
    wait_no_flag(&daemon, "401");
    wait_no_flag(&daemon, "has expired");
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn an_empty_token_file_is_an_error_at_the_start_and_changes_nothing_later() {
    let mut cluster = cluster(2, AnonymousMode::Off);
    let token = cluster.lab.directory().join("token");
    let settings = settings(&cluster, &[&format!("token_file = {token:?}")]);
    fs::write(&token, "\n").unwrap();
    let mut daemon = start(&cluster, &settings);
    let ended = daemon.process().wait(MOMENT).unwrap();
    assert_eq!(ended.code(), Some(2), "{}", daemon.log());
    for said in ["bearer token", token.to_str().unwrap(), "it is empty"] {
        assert!(daemon.log().contains(said), "{said}: {}", daemon.log());
    }

    fs::write(&token, TOKEN).unwrap();
    let mut daemon = start(&cluster, &settings);
    daemon.wait_ready(2).unwrap();
    // By accident, with `>` in a shell.
    fs::write(&token, "").unwrap();
    eventually(MOMENT, "the daemon says that it is empty now", || {
        ensure!(daemon.log().contains("the last good one is used"), "{}", daemon.log());
        Ok(())
    })
    .unwrap();
    // The apiserver that is started now has never seen it.
    cluster.apiservers[0].stub.kill().unwrap();
    daemon.wait_state("api-1", "draining", MOMENT).unwrap();
    cluster.apiservers[0].start().unwrap();
    wait_checks(&daemon, 200, "ready");
    require_served(&cluster);
}

#[test]
fn where_anonymous_callers_may_ask_for_health_alone_the_check_needs_no_credential() {
    let cluster = cluster(2, AnonymousMode::Conditions);
    let mut daemon = start(&cluster, &settings(&cluster, &[]));
    daemon.wait_ready(2).unwrap();
    wait_checks(&daemon, 200, "ready");
    let apiserver = SocketAddr::new(cluster.apiservers[0].host.address(cluster.vip4).unwrap(), PORT);
    let asked = |path: &str| get(&cluster, &format!("https://{apiserver}{path}")).0;
    assert_eq!(
        [asked("/readyz"), asked("/version"), asked("/api")],
        ["200", "401", "401"],
        "and nobody else"
    );
    let flags = daemon.flags().unwrap();
    assert!(!flags.contains("401") && !flags.contains("unauthenticated"), "{flags}");
    // What failed is named all the same: the reply to the check itself says it.
    cluster.apiservers[0].stub.health(Health::Status(500)).unwrap();
    daemon.wait_state("api-1", "draining", MOMENT).unwrap();
    let status = daemon.status_json().unwrap();
    assert_eq!(status["services"][0]["backends"][0]["check"]["failed"], serde_json::json!(["informer-sync"]));
    require_served(&cluster);
}

#[test]
fn where_anonymous_callers_have_lost_their_role_all_are_used_and_a_token_puts_it_right() {
    let cluster = cluster(2, AnonymousMode::Forbidden);
    let daemon = start(&cluster, &settings(&cluster, &[]));
    wait_checks(&daemon, 403, "draining");
    wait_flag(&daemon, "some answer 401 or 403");
    let report = served(&cluster, &cluster.client_of(cluster.vip4).unwrap());
    assert_eq!(report.by_server().len(), 2, "{:?}", report.by_server());

    let token = cluster.lab.directory().join("token");
    fs::write(&token, TOKEN).unwrap();
    let reloaded = daemon.reload(&settings(&cluster, &[&format!("token_file = {token:?}")])).unwrap();
    assert!(reloaded.status.success(), "{reloaded:?}");
    wait_checks(&daemon, 200, "ready");
    wait_no_flag(&daemon, "401 or 403");
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn counting_401_as_ready_works_and_stays_flagged() {
    let cluster = cluster(1, AnonymousMode::Off);
    let mut daemon = start(&cluster, &settings(&cluster, &["expect = [401]"]));
    daemon.wait_ready(1).unwrap();
    wait_checks(&daemon, 401, "ready");
    wait_flag(&daemon, "unauthenticated: api-1");
    assert!(daemon.status_table().unwrap().contains("unauthenticated"));
    assert!(daemon.log().contains("the check is unauthenticated"), "{}", daemon.log());
    require_served(&cluster);
}

#[test]
fn what_failed_is_named() {
    let cluster = cluster(1, AnonymousMode::Allowed);
    let mut daemon = start(&cluster, &settings(&cluster, &[]));
    daemon.wait_ready(1).unwrap();
    cluster.apiservers[0].stub.health(Health::Status(500)).unwrap();
    wait_checks(&daemon, 500, "draining");
    let status = daemon.status_json().unwrap();
    let check = &status["services"][0]["backends"][0]["check"];
    assert_eq!(check["failed"], serde_json::json!(["informer-sync"]));
    assert_eq!(check["detail"], "Layer7 wrong status: failed: informer-sync");
    assert!(daemon.log().contains("info: \"failed: informer-sync\""), "{}", daemon.log());
}

/// Status and body of a GET on the load balancer itself.
fn get(cluster: &Cluster, url: &str) -> (String, String) {
    let mut curl = cluster.lb.command("curl");
    curl.args([
        "--silent",
        "--max-time",
        "20",
        "--insecure",
        "--globoff",
        "--write-out",
        "\n%{http_code}",
        url,
    ]);
    let text = String::from_utf8(curl.output().unwrap().stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.to_owned(), body.to_owned())
}

#[test]
fn whoever_has_no_credential_may_ask_through_the_probe() {
    let cluster = cluster(2, AnonymousMode::Off);
    let token = cluster.lab.directory().join("token");
    fs::write(&token, TOKEN).unwrap();
    let settings = settings(&cluster, &[&format!("token_file = {token:?}")]);
    let listening = |directory: &Path| {
        settings.to_toml(directory).replace("[admin]\n", "[admin]\nlisten = \"127.0.0.1:1936\"\n")
    };
    let command = cluster.lb.command(program().unwrap());
    let mut daemon = Daemon::start_with(&cluster.lb, cluster.lab.directory(), listening, command).unwrap();
    daemon.wait_ready(2).unwrap();

    let apiserver = SocketAddr::new(cluster.apiservers[0].host.address(cluster.vip4).unwrap(), PORT);
    assert_eq!(get(&cluster, &format!("https://{apiserver}/livez")).0, "401", "why there is a probe");
    let probe = |rest: &str| get(&cluster, &format!("http://127.0.0.1:1936/probe/kube-apiserver/{rest}"));
    for path in ["api-1/livez", "api-2/readyz"] {
        assert_eq!(probe(path), ("200".to_owned(), "ok".to_owned()), "{path}");
    }
    for path in ["api-1/metrics", "api-1/readyz?verbose", "api-3/readyz", "self/livez"] {
        assert_eq!(probe(path).0, "404", "{path}");
    }
    cluster.apiservers[0].stub.health(Health::Status(500)).unwrap();
    eventually(MOMENT, "the probe says 500 for api-1", || {
        let (status, body) = probe("api-1/readyz");
        ensure!(status == "500" && body.contains("[-]informer-sync failed"), "{status} {body}");
        Ok(())
    })
    .unwrap();
    assert_eq!(probe("api-2/livez").0, "200");
    // Neither outside this host, nor for anything else.
    let mut outside = cluster.client.command("curl");
    outside.args(["--silent", "--max-time", "5", &format!("http://{}:1936/", cluster.vip4)]);
    assert!(!outside.output().unwrap().status.success());
}

/// `sheave init` on the load balancer.
fn init(cluster: &Cluster, kubeconfig: &Path, vip: IpAddr, output: &Path) -> Output {
    let mut command = cluster.lb.command(program().unwrap());
    command.arg("init").arg("--kubeconfig").arg(kubeconfig).arg("--output").arg(output);
    command.args(["--vip", &vip.to_string()]).output().unwrap()
}

#[test]
fn init_writes_a_configuration_that_balances() {
    let cluster = cluster(3, AnonymousMode::Allowed);
    let directory = cluster.lab.directory();
    let server = SocketAddr::new(cluster.apiservers[1].host.address(cluster.vip4).unwrap(), PORT);
    let admin = cluster.authority.client("admin", &["system:masters"]).unwrap();
    let admin = kubeconfig(&directory.join("admin.conf"), server, &cluster.ca_file(), &admin);
    let output = directory.join("init/sheave.toml");

    let written = init(&cluster, &admin, cluster.vip4, &output);
    assert!(written.status.success(), "{}", said(&written));
    assert!(said(&written).contains("What remains to do:"), "{}", said(&written));
    let text = fs::read_to_string(&output).unwrap();
    assert!(!text.contains("token_file"), "anonymous checks pass here:\n{text}");

    // The same cluster, from its own file.
    let here = |directory: &Path| {
        let places = format!(
            "interfaces = \"auto\"\nstate_dir = {:?}\npin_dir = {:?}\ncgroup = {:?}",
            directory.join("state"),
            pins_of(directory),
            cgroup_of(directory).unwrap_or_else(|| "none".into())
        );
        text.replace("interfaces = \"auto\"", &places)
            + &format!("\n[admin]\nsocket = {:?}\n", directory.join("admin.sock"))
    };
    let command = cluster.lb.command(program().unwrap());
    let mut daemon = Daemon::start_with(&cluster.lb, directory, here, command).unwrap();
    daemon.wait_ready(3).unwrap();
    require_served(&cluster);

    let again = init(&cluster, &admin, cluster.vip4, &output);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("exists and is not overwritten"), "{}", said(&again));
    assert_eq!(fs::read_to_string(&output).unwrap(), text);
}

#[test]
fn init_writes_the_ca_of_a_kubeconfig_that_holds_it_and_overwrites_no_other() {
    let cluster = cluster(2, AnonymousMode::Allowed);
    let directory = cluster.lab.directory();
    let server = SocketAddr::new(cluster.apiservers[0].host.address(cluster.vip4).unwrap(), PORT);
    let identity = cluster.authority.client("admin", &["system:masters"]).unwrap();
    let ca = cluster.ca_file();
    let admin = kubeconfig_holding(Held::Inline, &directory.join("admin.conf"), server, &ca, &identity);
    let place = directory.join("init");
    let (output, written_ca) = (place.join("sheave.toml"), place.join("ca.crt"));

    let written = init(&cluster, &admin, cluster.vip4, &output);
    assert!(written.status.success(), "{}", said(&written));
    assert_eq!(fs::read(&written_ca).unwrap(), fs::read(&ca).unwrap());
    let text = fs::read_to_string(&output).unwrap();
    assert!(text.contains(&format!("ca_file = {written_ca:?}")), "{text}");
    // The key stays where it is: nothing that is written holds it.
    let mut names: Vec<_> = fs::read_dir(&place).unwrap().map(|it| it.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["ca.crt", "sheave.toml"]);

    // The same one, from an earlier attempt: it is used.
    let next = place.join("next.toml");
    let again = init(&cluster, &admin, cluster.vip4, &next);
    assert!(again.status.success() && next.exists(), "{}", said(&again));
    // Another one is somebody's, and stays.
    fs::write(&written_ca, "another").unwrap();
    fs::remove_file(&next).unwrap();
    let refused = init(&cluster, &admin, cluster.vip4, &next);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    let exists = format!("{} exists and is not overwritten", written_ca.display());
    assert!(said(&refused).contains(&exists), "{}", said(&refused));
    assert_eq!(fs::read_to_string(&written_ca).unwrap(), "another");
    assert!(!next.exists());
}

#[test]
fn init_says_what_it_cannot_do_and_writes_nothing_then() {
    let cluster = cluster(1, AnonymousMode::Off);
    let directory = cluster.lab.directory();
    let address = cluster.apiservers[0].host.address(cluster.vip4).unwrap();
    let server = SocketAddr::new(address, PORT);
    let output = directory.join("init/sheave.toml");
    let as_user = |user: &str, groups: &[&str], server: SocketAddr| {
        let identity = cluster.authority.client(user, groups).unwrap();
        kubeconfig(&directory.join(format!("{user}.conf")), server, &cluster.ca_file(), &identity)
    };
    let nobody = as_user("nobody", &[], server);
    let admin = as_user("admin", &["system:masters"], server);
    let elsewhere = as_user("elsewhere", &["system:masters"], SocketAddr::new(address, 1));
    for (kubeconfig, vip, words) in [
        (&nobody, cluster.vip4, "may not list endpointslices"),
        (&elsewhere, cluster.vip4, "Connection refused"),
        (&admin, address, "the address of one of the apiservers"),
        (&directory.join("none.conf"), cluster.vip4, "cannot read"),
    ] {
        let refused = init(&cluster, kubeconfig, vip, &output);
        assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
        assert!(said(&refused).contains(words), "{words}: {}", said(&refused));
        assert!(!output.exists());
    }
    let written = init(&cluster, &admin, cluster.vip4, &output);
    assert!(written.status.success() && said(&written).contains("sheave rbac"), "{}", said(&written));
    assert!(fs::read_to_string(&output).unwrap().contains("token_file = \"/etc/sheave/token\""));
}

/// The program, for which these are the load balancer's `/etc/hosts` and `/etc/resolv.conf`: for nobody else.
fn with_files(cluster: &Cluster, hosts: &Path, resolv: &Path) -> Command {
    let mut command = cluster.lb.command("unshare");
    let script =
        "mount --bind \"$0\" /etc/hosts && mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script]).arg(hosts).arg(resolv).arg(program().unwrap());
    command
}

#[test]
fn a_backend_by_name_is_looked_up_and_a_name_nobody_knows_delays_nothing() {
    let cluster = cluster(2, AnonymousMode::Allowed);
    let directory = cluster.lab.directory();
    let address = |index: usize| cluster.apiservers[index].host.address(cluster.vip4).unwrap();
    let hosts = directory.join("hosts");
    fs::write(&hosts, format!("{} master-1\n", address(0))).unwrap();
    let resolv = directory.join("resolv.conf");
    // Nobody answers there: look-ups of other names take their time.
    fs::write(&resolv, "nameserver 192.0.2.53\n").unwrap();

    let named = |directory: &Path| {
        let mut settings = settings(&cluster, &[]);
        settings.backends.clear();
        settings.service = vec![format!("backends = [\"master-1:{PORT}\", \"master-2:{PORT}\"]")];
        // Its certificate is for its address, not for this name of ours.
        settings.check = vec!["server_name = \"kubernetes\"".to_owned()];
        settings.to_toml(directory)
    };
    let command = with_files(&cluster, &hosts, &resolv);
    let mut daemon = Daemon::start_with(&cluster.lb, directory, named, command).unwrap();
    daemon.wait_ready(1).unwrap();
    assert_eq!(daemon.status().unwrap().states(&format!("master-1:{PORT}")), ["ready"]);
    wait_flag(&daemon, "master-2");
    require_served(&cluster);

    // In place: a bind mount stays with its file.
    fs::write(&hosts, format!("{} master-1\n{} master-2\n", address(0), address(1))).unwrap();
    daemon.wait_ready(2).unwrap();
    assert_eq!(daemon.status().unwrap().states(&format!("master-2:{PORT}")), ["ready"]);
    require_served(&cluster);
    // One that moves: its old address gets no new flows any more, and what was ordered stays with the name.
    run(daemon.command("drain").unwrap().arg(format!("master-1:{PORT}"))).unwrap();
    fs::write(&hosts, format!("{} master-1\n{} master-2\n", address(1), address(1))).unwrap();
    eventually(MOMENT, "master-1 is elsewhere", || {
        let status = daemon.status_table()?;
        ensure!(!status.contains(&SocketAddr::new(address(0), PORT).to_string()), "{status}");
        Ok(())
    })
    .unwrap();
    assert_eq!(daemon.status().unwrap().states(&format!("master-1:{PORT}")), ["drain"]);
    require_served(&cluster);
}

#[test]
fn with_names_that_nobody_knows_clients_are_refused_at_once_and_not_left_hanging() {
    let cluster = cluster(1, AnonymousMode::Allowed);
    let directory = cluster.lab.directory();
    let resolv = directory.join("resolv.conf");
    fs::write(&resolv, "nameserver 192.0.2.53\n").unwrap();
    let hosts = directory.join("hosts");
    fs::write(&hosts, "").unwrap();
    let named = |directory: &Path| {
        let mut settings = settings(&cluster, &[]);
        settings.backends.clear();
        settings.service = vec![format!("backends = [\"nobody-knows:{PORT}\"]")];
        settings.check = vec!["server_name = \"kubernetes\"".to_owned()];
        settings.to_toml(directory)
    };
    let start = || {
        let command = with_files(&cluster, &hosts, &resolv);
        Daemon::start_with(&cluster.lb, directory, named, command).unwrap()
    };
    let mut daemon = start();
    wait_flag(&daemon, "nobody-knows");
    assert!(daemon.is_alive().unwrap(), "{}", daemon.log());
    // curl's code for a connection that failed; a timeout would be 28.
    assert_eq!(cluster.curl(cluster.vip4, "/name").output().unwrap().status.code(), Some(7));
    let status = daemon.command("status").unwrap().output().unwrap().status;
    assert_eq!(status.code(), Some(3), "no backend is ready");

    // Found at last, as on a host that boots before its resolver.
    let address = cluster.apiservers[0].host.address(cluster.vip4).unwrap();
    fs::write(&hosts, format!("{address} nobody-knows\n")).unwrap();
    daemon.wait_ready(1).unwrap();
    require_served(&cluster);

    // A daemon that starts while nobody can say what the name stands for goes on with what it stood for.
    drop(daemon);
    fs::write(&hosts, "").unwrap();
    let mut daemon = start();
    daemon.wait_ready(1).unwrap();
    require_served(&cluster);
    wait_flag(&daemon, "its last addresses are used");
}
