//! What bonds can do that cards cannot: members come and go, and some modes take no native program.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use lb_tests::{
    cluster::Cluster,
    daemon::{Daemon, Settings},
    lab::{eventually, run},
    load::Crowd,
};
use serde_json::Value;

use crate::{
    joints::{BOND, Base, Joint, add_member, join_bond},
    serving::{Mode, Trial, require_doctor_says, serve},
};

/// Connections that are open while members come and go, of each family.
const OPEN: usize = 20;
/// For the daemon to hear of a member, and for the bond to use it.
const LIMIT: Duration = Duration::from_secs(30);
/// Between two rounds of questions.
const PAUSE: Duration = Duration::from_millis(50);
const CARDS: [&str; 2] = ["eth0", "eth1"];

fn on_bond(mode: &'static str, asked: Mode, comes_to: Mode) -> Trial {
    Trial { comes_to, ..Trial::new(asked, Joint { base: Base::Bond(mode), vlans: &[] }) }
}

/// Every member of a bond leaves and returns, one at a time, while connections are asked all the while; one is
/// replaced by another card; and the daemon is killed. No connection may notice.
pub(crate) fn members_come_and_go(mode: &'static str) -> Result<()> {
    let trial = on_bond(mode, Mode::Auto, Mode::Native);
    let cluster = trial.cluster()?;
    let settings = patient(trial.settings(&cluster)?);
    let mut daemon = trial.start(&cluster, &settings)?;
    require_members(&cluster, &daemon, mode, &CARDS)?;
    let mut crowds = crowds(&cluster)?;

    let (lb, switch) = (cluster.lb.namespace(), cluster.lab.switch_namespace());
    for (number, other) in [(0, "eth1"), (1, "eth0"), (0, "eth1")] {
        let card = CARDS[number];
        let cable = |state: &str| switch.ip(&format!("link set lb.{number} {state}"));
        while_asking(&mut crowds, || {
            // As a broken cable does it, and an administrator who knows bonds: what comes in by a member that is let go while
            // frames arrive is for its own stack for a moment.
            cable("down")?;
            lb.ip(&format!("link set {card} down"))?;
            lb.ip(&format!("link set {card} nomaster"))?;
            require_members(&cluster, &daemon, mode, &[other])
        })
        .with_context(|| format!("{card} leaves"))?;
        while_asking(&mut crowds, || {
            join_bond(lb, card, BOND)?;
            cable("up")?;
            require_members(&cluster, &daemon, mode, &CARDS)
        })
        .with_context(|| format!("{card} returns"))?;
        cluster.require_no_own_resets().with_context(|| format!("{card} has left and returned"))?;
        println!("{card} has left and returned");
    }
    let before = index_of(&cluster, "eth1")?;
    while_asking(&mut crowds, || {
        let port = add_member(lb, switch, mode, 1)?;
        if mode == "active-backup" {
            cluster.lab.add_port(cluster.lb.link()?.segment, &port)?;
        }
        require_members(&cluster, &daemon, mode, &CARDS)
    })
    .context("another card comes for eth1")?;
    ensure!(index_of(&cluster, "eth1")? != before, "it is the same card");
    while_asking(&mut crowds, || {
        switch.ip("link set lb.0 down")?;
        lb.ip("link set eth0 down")?;
        eventually(LIMIT, "only the other card is left", || {
            let state = mii_status(&cluster, "eth0")?;
            ensure!(state == "DOWN", "eth0 is {state}");
            Ok(())
        })
    })?;
    lb.ip("link set eth0 up")?;
    switch.ip("link set lb.0 up")?;

    daemon.process().kill()?;
    while_asking(&mut crowds, || Ok(())).context("without a daemon")?;
    let daemon = trial.start(&cluster, &settings)?;
    require_members(&cluster, &daemon, mode, &CARDS)?;
    while_asking(&mut crowds, || Ok(())).context("after the next start")?;
    drop(crowds);
    self::crowds(&cluster).context("new connections at the end")?;
    cluster.require_no_own_resets()?;
    let unloaded = daemon.unload()?;
    ensure!(unloaded.status.success(), "unload: {}", String::from_utf8_lossy(&unloaded.stderr));
    Ok(())
}

/// A bond that is served in generic mode stays in it with `auto`, also with a daemon that would begin in native mode, until
/// it is told otherwise. No connection notices any of it.
pub(crate) fn stays_generic() -> Result<()> {
    const MODE: &str = "active-backup";
    let generic = on_bond(MODE, Mode::Generic, Mode::Generic);
    let cluster = generic.cluster()?;
    let mut daemon = generic.start(&cluster, &patient(generic.settings(&cluster)?))?;
    serve(&cluster)?;
    let mut crowds = crowds(&cluster)?;
    for (asked, comes_to) in [(Mode::Auto, Mode::Generic), (Mode::Native, Mode::Native)] {
        daemon.process().kill()?;
        let next = on_bond(MODE, asked, comes_to);
        while_asking(&mut crowds, || {
            daemon = next.start(&cluster, &patient(next.settings(&cluster)?))?;
            Ok(())
        })
        .with_context(|| format!("from generic mode to {asked:?}"))?;
        println!("{asked:?} is {comes_to:?}");
    }
    require_members(&cluster, &daemon, MODE, &CARDS)?;
    cluster.require_no_own_resets()?;
    let unloaded = daemon.unload()?;
    ensure!(unloaded.status.success(), "unload: {}", String::from_utf8_lossy(&unloaded.stderr));
    Ok(())
}

/// In a mode that takes no native program: refused where that is asked for, by a start and by `doctor`, with the reason;
/// served in generic mode where it is not.
pub(crate) fn refused_natively() -> Result<()> {
    const REASON: &str = "bond0 is a bond in mode balance-tlb, for which the kernel takes no native program";
    let native = on_bond("balance-tlb", Mode::Native, Mode::Native);
    let cluster = native.cluster()?;
    native.require_refused(&cluster, REASON)?;
    let automatic = on_bond("balance-tlb", Mode::Auto, Mode::Generic);
    let daemon = automatic.start(&cluster, &automatic.settings(&cluster)?)?;
    ensure!(daemon.log().contains(REASON), "the log does not say why: {}", daemon.log());
    serve(&cluster)?;
    require_doctor_says(&cluster, REASON)?;
    let unloaded = daemon.unload()?;
    ensure!(unloaded.status.success(), "unload: {}", String::from_utf8_lossy(&unloaded.stderr));
    Ok(())
}

/// Emulated processors are busy with connections, and a backend that answers late is no subject here.
fn patient(mut settings: Settings) -> Settings {
    settings.check.push("timeout = \"10s\"".to_owned());
    settings
}

/// Open connections of both families.
fn crowds(cluster: &Cluster) -> Result<Vec<Crowd>> {
    let open = |vip| Crowd::open(&cluster.client, &cluster.client_of(vip)?, OPEN);
    cluster.vips().into_iter().map(open).collect()
}

/// Asks every connection, again and again until the change is done, and once more.
fn while_asking(crowds: &mut [Crowd], change: impl FnOnce() -> Result<()>) -> Result<()> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            loop {
                // Looked at first: what is asked below is asked after the change.
                let last = done.load(Ordering::SeqCst);
                thread::sleep(PAUSE);
                crowds.iter_mut().try_for_each(|crowd| crowd.ask_names().require_all(OPEN))?;
                if last {
                    return Ok(());
                }
            }
        });
        let changed = change();
        done.store(true, Ordering::SeqCst);
        let asked: Result<()> = asking.join().map_err(|_| anyhow!("the asking thread panicked"))?;
        changed.and(asked)
    })
}

/// Waits until these are the members of the bond that the kernel uses, and that the daemon says the data path knows.
fn require_members(cluster: &Cluster, daemon: &Daemon, mode: &str, members: &[&str]) -> Result<()> {
    eventually(LIMIT, &format!("the bond has the members {members:?}"), || {
        let shown = link(cluster, BOND)?;
        for member in members {
            let state = mii_status(cluster, member)?;
            ensure!(state == "UP", "{member} is not up in the bond: {state}");
        }
        if mode == "802.3ad" {
            let bundled = &shown["linkinfo"]["info_data"]["ad_info"]["num_ports"];
            ensure!(*bundled == members.len(), "{bundled} ports are bundled");
        }
        let status = daemon.status_json()?;
        let known = &status["interfaces"][0]["members"];
        ensure!(*known == serde_json::json!(members), "the data path knows {known}");
        Ok(())
    })
}

/// Whether a member can be used, as its bond sees it.
fn mii_status(cluster: &Cluster, member: &str) -> Result<String> {
    let status = &link(cluster, member)?["linkinfo"]["info_slave_data"]["mii_status"];
    Ok(status.as_str().with_context(|| format!("{member} is in no bond"))?.to_owned())
}

fn index_of(cluster: &Cluster, name: &str) -> Result<u64> {
    link(cluster, name)?["ifindex"].as_u64().context("it has no index")
}

fn link(cluster: &Cluster, name: &str) -> Result<Value> {
    let shown = run(cluster.lb.command("ip").args(["-json", "-details", "link", "show", "dev", name]))?;
    let shown: Value = serde_json::from_str(&shown)?;
    shown.get(0).cloned().with_context(|| format!("ip shows no {name}"))
}
