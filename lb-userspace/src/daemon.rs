//! `sheave run`: the order in which things come up, and in which they go.
//!
//! Up: maps filled, first checks done, program attached, then the VIP. Down: nothing, for packets are forwarded without
//! the daemon; `sheave unload` takes the VIP first and the program last. The other way round the kernel would answer for
//! the VIP while the data path cannot, with RSTs.
//!
//! A daemon that finds the program of another before it puts its own in that one's place, waits until the old one has
//! ended everywhere, and only then changes maps. Until its checks have a verdict, it believes what the maps say.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout_at,
};

use crate::{
    admin::{self, BindError, ProbeListener, Unloaded},
    config::{Config, VipMode},
    controller::{self, Controller, ControllerError, Dismantled, End, Inbox, Plan},
    dataplane::{Dataplane, DataplaneError, OBJECT, PacketLog, Pins, PinsError, Previous, Settings},
    discovery::{Situation, Wanted},
    health::{self, Event},
    lock::{Lock, LockError},
    network::{Network, offloads},
    privileges,
    sources::Sources,
    systemd, vip,
};

/// How long to wait for the first result of any check. A server that takes longer is found later.
const FIRST_RESULT: Duration = Duration::from_millis(1500);
/// How long to wait for the others after the first.
const OTHER_RESULTS: Duration = Duration::from_secs(1);
/// How long to wait for the addresses of backends by name. One that takes longer is left out until it is known.
const FIRST_NAMES: Duration = Duration::from_secs(2);
/// For the last answer on the admin socket to be read.
const LAST_ANSWER: Duration = Duration::from_millis(100);

/// How often the program's log is read.
const PACKET_LOG_EVERY: Duration = Duration::from_millis(100);

/// How long a thread that has nothing to do is kept: it may have capabilities that the daemon has given up since.
const IDLE_THREADS: Duration = Duration::from_millis(100);
/// Between taking the VIP away and the program: for the packets that were on their way.
const LAST_PACKETS: Duration = Duration::from_millis(100);

/// How the daemon is to run, beside the configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Log one packet in so many.
    pub log_one_in: Option<u32>,
    /// Replace a flow table that does not fit, instead of refusing to start.
    pub replace_layout: bool,
}

/// Why the daemon did not come up, or did not go down in order.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another daemon, or no place for the admin socket.
    #[error(transparent)]
    Admin(#[from] BindError),
    /// Another daemon.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What is pinned is in the way.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// The data path could not be set up.
    #[error(transparent)]
    Controller(#[from] ControllerError),
    /// The host is short of something.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Something of ours is left on this host.
    #[error("stopped, but something is left: {}; `sheave unload` tries again", .0.join("; "))]
    Left(Vec<String>),
}

impl DaemonError {
    /// Whether the configuration must be changed, rather than the host.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Controller(error) if error.is_configuration())
    }
}

/// Runs until a signal or `sheave unload` ends it. `config_file` is read again by a reload.
pub fn run(config: Config, config_file: PathBuf, options: Options) -> Result<(), DaemonError> {
    let began = Instant::now();
    controller::check_files(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(IDLE_THREADS)
        .build()
        .map_err(|source| DaemonError::System { doing: "start the runtime", source })?;
    runtime.block_on(serve(config, config_file, options, began))
}

async fn serve(
    config: Config,
    config_file: PathBuf,
    options: Options,
    began: Instant,
) -> Result<(), DaemonError> {
    let (mut stop, reload) =
        signals().map_err(|source| DaemonError::System { doing: "listen for signals", source })?;
    // Before anything is touched: another daemon may be at work here.
    let _lock = Lock::take(&config.dataplane.state_dir)?;
    let admin = admin::bind(&config.admin.socket)?;
    let probes = config
        .admin
        .listen
        .map(ProbeListener::bind)
        .transpose()
        .map_err(|source| DaemonError::System { doing: "listen on admin.listen", source })?;
    if let Some(group) = &config.admin.group {
        admin.share_with(group)?;
    }
    let pins = Pins::open(&config.dataplane.pin_dir, options.replace_layout)?;
    let started = tokio::select! {
        started = start(config.clone(), config_file, pins.clone(), options) => Some(started),
        _ = stop.recv() => None,
    };
    let (mut controller, checks, network) = match started {
        Some(Ok(started)) => started,
        Some(Err(error)) => {
            tidy(&config, &pins).await;
            return Err(error.into());
        }
        None => {
            tracing::info!("stopped before it was ready");
            tidy(&config, &pins).await;
            return Ok(());
        }
    };
    let (questions, requests) = mpsc::channel(16);
    let server = tokio::spawn(admin.serve(questions));
    if let Err(error) = privileges::drop_unneeded() {
        tracing::warn!("keeps capabilities that it does not need: {error}");
    }
    let probes = probes.map(|probes| tokio::spawn(probes.serve(controller.watch_probe_targets())));
    tracing::info!("ready after {} ms: {}", began.elapsed().as_millis(), controller.summary());
    systemd::ready(&controller.short_summary());
    let end = controller.run(Inbox { checks, network, requests, stop, reload }).await;
    let result = match end {
        End::Stop => {
            leave(&controller);
            Ok(())
        }
        End::Unload(answer) => unload(controller, answer).await,
    };
    if let Some(probes) = probes {
        probes.abort();
    }
    // Its end removes the socket's file.
    server.abort();
    let _ = server.await;
    result
}

/// What is said to who stops the daemon: that this stops nothing.
fn leave(controller: &Controller) {
    let places = controller.places();
    tracing::info!(
        "stopped, and packets still flow: {places} goes on with the backends as they are, and nobody checks them. \
         `sheave run` takes over again; `sheave unload` takes everything away, and HAProxy or whoever listens there \
         serves again"
    );
    systemd::stopping(&format!("stopped; packets still flow, by {places}, until `sheave unload`"));
}

async fn unload(
    controller: Controller,
    answer: tokio::sync::oneshot::Sender<Result<Unloaded, String>>,
) -> Result<(), DaemonError> {
    tracing::info!("unloading");
    systemd::stopping("unloading");
    let Dismantled { removed, failures } = controller.dismantle().await;
    for what in &removed {
        tracing::info!("removed {what}");
    }
    let result = if failures.is_empty() { Ok(Unloaded { removed }) } else { Err(failures.join("; ")) };
    if answer.send(result).is_ok() {
        tokio::time::sleep(LAST_ANSWER).await;
    }
    if failures.is_empty() { Ok(()) } else { Err(DaemonError::Left(failures)) }
}

type Started = (Controller, mpsc::Receiver<Event>, mpsc::Receiver<crate::network::Change>);

/// Everything up to the VIP.
async fn start(
    config: Config,
    config_file: PathBuf,
    pins: Pins,
    options: Options,
) -> Result<Started, ControllerError> {
    let key_file = config.dataplane.hash_key_file.as_deref();
    let key_is_given = key_file.is_some();
    let secret = controller::load_hash_key(key_file).map_err(ControllerError::HashKey)?;
    let (network, changes) = Network::open().await?;
    let programs = async |interface| match network.xdp_programs(interface).await {
        Ok(there) => there.unwrap_or_default().iter().map(|it| it.program).collect(),
        Err(_) => Vec::new(),
    };
    pins.check_namespace(programs).await.map_err(DataplaneError::from)?;
    let mut sources = Sources::watch_remembered(&config, &config.dataplane.state_dir);
    sources.first_answers(FIRST_NAMES).await;
    let (config, mut plan) = plan_with(&sources, &network).await?;
    if let Some(previous) = Previous::read(&pins) {
        plan.keep_source(&previous, &config, &network, options.replace_layout);
    }
    let settings = plan.settings(secret, options.log_one_in);
    let loading = tokio::task::spawn_blocking(move || load(&settings, key_is_given, pins));
    let mut dataplane = loading.await.map_err(|error| ControllerError::System {
        doing: "load the program",
        source: io::Error::other(error),
    })??;
    if dataplane.adopted() {
        plan.adopt(&config, &dataplane.known(), dataplane.unattended())?;
        tracing::info!("goes on with the flow table that is in the kernel");
    }
    if options.log_one_in.is_some() {
        read_packet_log(dataplane.take_packet_log());
    }
    let targets = plan.targets();
    let count = targets.len();
    let (sender, mut events) = mpsc::channel(256);
    let checks = health::resume(targets, |target| plan.state(target), sender);
    let results = first_results(&mut events, count).await;
    let mut controller = Controller::new(config, config_file, network, dataplane, plan, checks).await?;
    controller.follow_sources(sources);
    controller.begin(results).await;
    controller.attach().await?;
    controller.place_vips().await?;
    Ok((controller, events, changes))
}

/// What is to be done, with the backends that the cluster listed last. They may not keep the file's from being served:
/// where they cannot be used, it begins without them.
async fn plan_with(sources: &Sources, network: &Network) -> Result<(Config, Plan), ControllerError> {
    let here = network.local_addresses().iter().map(|local| local.address).collect();
    let Wanted { config, problems, .. } = sources.apply(&Situation { here, ..Situation::default() });
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
    let file = sources.without_the_cluster();
    match Plan::make(&config, network).await {
        Ok(plan) => Ok((config, plan)),
        Err(error) if file != config => {
            tracing::warn!("what the cluster listed last cannot be used, and is left out for now: {error}");
            let plan = Plan::make(&file, network).await?;
            Ok((file, plan))
        }
        Err(error) => Err(error),
    }
}

fn load(settings: &Settings, key_is_given: bool, pins: Pins) -> Result<Dataplane, ControllerError> {
    let mut dataplane = Dataplane::load_pinned(OBJECT, settings, key_is_given, pins)?;
    dataplane.calibrate()?;
    // Maps that are in use are written to by what the controller does next.
    if dataplane.adopted() {
        dataplane.take_over()?;
    }
    Ok(dataplane)
}

/// The results up to the moment when every one of `count` backends has its first, or has had time enough.
async fn first_results(events: &mut mpsc::Receiver<Event>, count: usize) -> Vec<Event> {
    let mut deadline = tokio::time::Instant::now() + FIRST_RESULT;
    let mut answered = HashSet::new();
    let mut results = Vec::new();
    while answered.len() < count {
        let Ok(Some(event)) = timeout_at(deadline, events.recv()).await else { break };
        if answered.is_empty() {
            deadline = deadline.min(tokio::time::Instant::now() + OTHER_RESULTS);
        }
        answered.insert(event.id);
        results.push(event);
    }
    results
}

/// Undoes what a start that failed has changed on this host, unless packets were forwarded before it.
async fn tidy(config: &Config, pins: &Pins) {
    lower_guard().await;
    let abandoned = pins.abandon();
    if pins.inherited() {
        tracing::warn!("what forwarded packets before goes on doing so");
        abandoned.unwrap_or_else(|error| tracing::error!("{error}"));
        return;
    }
    let state_dir = &config.dataplane.state_dir;
    if config.vip.mode == VipMode::Own
        && let Ok((network, _)) = Network::open().await
        && let Err(error) = vip::remove_leftovers(&network, state_dir).await
    {
        tracing::error!("{error}");
    }
    if let Err(error) = pins.remove() {
        tracing::error!("{error}");
    }
    if let Err(error) = offloads::restore(state_dir) {
        tracing::error!("{error}");
    }
}

/// Removes the routing rules of a daemon that was killed while the program was off an interface.
async fn lower_guard() {
    if let Ok((network, _)) = Network::open().await
        && let Err(error) = network.lower_guard().await
    {
        tracing::error!("{error}: see `ip rule`");
    }
}

/// Takes away what a daemon has left that does not run any more. What was removed, in words.
pub async fn unload_leftovers(config: Option<&Config>) -> Result<Vec<String>, DaemonError> {
    type Defaults = crate::config::Dataplane;
    let dataplane = config.map(|config| &config.dataplane);
    let state_dir = dataplane.map_or(Path::new(Defaults::STATE_DIR), |it| &it.state_dir);
    let pin_dir = dataplane.map_or(Path::new(Defaults::PIN_DIR), |it| &it.pin_dir);
    let _lock = if state_dir.is_dir() { Some(Lock::take(state_dir)?) } else { None };
    // Of any layout: it is all to go.
    let pins = if pin_dir.is_dir() { Some(Pins::open(pin_dir, true)?) } else { None };
    let (network, _) = Network::open().await.map_err(ControllerError::from)?;
    let placed = vip::remove_leftovers(&network, state_dir).await.map_err(ControllerError::from)?;
    let mut removed: Vec<_> =
        placed.iter().map(|it| format!("the VIP {} from {}", it.vip, it.interface)).collect();
    if !placed.is_empty() {
        tokio::time::sleep(LAST_PACKETS).await;
    }
    if let Some(pins) = pins {
        let pinned = pins.remove()?;
        let name = |index: &u32| {
            network.interface(*index).map_or_else(|_| format!("interface {index}"), |found| found.name)
        };
        removed.extend(pinned.hook.then(|| controller::HOOK.to_owned()));
        removed.extend(pinned.interfaces.iter().map(|index| format!("the program from {}", name(index))));
        removed.extend(pinned.maps.then(|| controller::PINS.to_owned()));
    }
    network.lower_guard().await.map_err(ControllerError::from)?;
    let restored = offloads::restore(state_dir).map_err(ControllerError::from)?;
    removed.extend(restored.iter().map(|it| format!("its changes to the offloads of {it}")));
    Ok(removed)
}

/// SIGTERM and SIGINT, of which the second ends the process at once; and SIGHUP.
fn signals() -> io::Result<(mpsc::Receiver<()>, mpsc::Receiver<()>)> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let (stop, stops) = mpsc::channel(1);
    let (reload, reloads) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut stopping = false;
        loop {
            let number = tokio::select! {
                _ = terminate.recv() => libc::SIGTERM,
                _ = interrupt.recv() => libc::SIGINT,
                _ = hangup.recv() => {
                    // One that waits to be served reads the file as it is then: it stands for all others.
                    let _ = reload.try_send(());
                    continue;
                }
            };
            if stopping {
                tracing::warn!("told twice: ends at once");
                std::process::exit(128 + number);
            }
            stopping = true;
            // Nobody receives once the daemon is stopping anyway. This task goes on: a closed channel would read as a
            // signal.
            let _ = stop.try_send(());
        }
    });
    Ok((stops, reloads))
}

/// Hands what the program logs to our own log, for as long as the daemon runs.
fn read_packet_log(log: Option<PacketLog>) {
    let Some(mut log) = log else {
        tracing::warn!("this build's program logs no packets");
        return;
    };
    tokio::spawn(async move {
        let mut look = tokio::time::interval(PACKET_LOG_EVERY);
        loop {
            look.tick().await;
            log.flush();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Config,
        health::{State, Target, TargetId},
    };

    fn targets(addresses: &[&str]) -> Vec<Target> {
        let text = format!(
            "[[service]]\nname = \"api\"\nlisten = [\"10.0.0.100:6443\"]\nbackends = {addresses:?}\n\
             [service.check]\ntype = \"none\""
        );
        let (config, _) = Config::parse(&text, "test.toml").unwrap();
        let service = &config.services[0];
        let target = |(backend, it): (usize, &crate::config::Backend)| Target {
            id: TargetId { service: 0, backend },
            address: it.address,
            host: None,
            check: service.check.clone(),
        };
        service.backends.iter().enumerate().map(target).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_backend_that_does_not_answer() {
        let (sender, mut events) = mpsc::channel(8);
        let _checks =
            health::resume(targets(&["10.0.0.1:6443", "10.0.0.2:6443"]), |_| State::Unknown, sender);
        let begin = tokio::time::Instant::now();
        let results = first_results(&mut events, 2).await;
        assert_eq!(results.len(), 2);
        assert!(results.iter().all(|event| event.state == State::Ready));
        assert_eq!(begin.elapsed(), Duration::ZERO, "all have answered");
        let (sender, mut events) = mpsc::channel(8);
        let _checks = health::resume(targets(&["10.0.0.1:6443"]), |_| State::Unknown, sender);
        assert_eq!(first_results(&mut events, 2).await.len(), 1);
        assert_eq!(begin.elapsed(), OTHER_RESULTS, "the other has had its time");
        let (_sender, mut events) = mpsc::channel(8);
        assert!(first_results(&mut events, 2).await.is_empty());
        assert_eq!(begin.elapsed(), OTHER_RESULTS + FIRST_RESULT);
    }
}
