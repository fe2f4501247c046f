//! The task that follows one service's list: whom to ask, in which order, and how often.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{
    known::Known,
    visit::{End, Progress, Visit, host_of},
};
use crate::{
    config::Discover,
    health::Dialer,
    kubeconfig::{self, Kubeconfig, Server},
};

/// The first pause after nobody has told anything, or not for [`LASTING`]; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// A visit of this length was worth its list: whoever makes one after the other of them asks no more often than whoever has
/// no success. A watch that is refused, or that ends as soon as it begins, is none: where the user may list and not watch, or
/// the apiservers have too much to do for watches (429), every node would list once a second.
const LASTING: Duration = RETRY_MAX;
/// How often it is looked whether a kubeconfig is there: it costs nobody but us.
const KUBECONFIG_EVERY: Duration = Duration::from_secs(2);
/// TCP and TLS to an apiserver.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Reasons in one sentence: all apiservers have the same more often than not.
const REASONS_MAX: usize = 3;

/// Who may be asked, by service, and whether they are usable.
pub(super) type Candidates = BTreeMap<String, BTreeMap<SocketAddr, bool>>;

/// One service's list.
pub(super) struct Follower {
    /// The service's name in the configuration.
    pub(super) service: String,
    pub(super) discover: Discover,
    /// The backends of the file: asked whatever becomes of them.
    pub(super) own: Vec<SocketAddr>,
    pub(super) known: Arc<watch::Sender<BTreeMap<String, Known>>>,
    pub(super) candidates: watch::Receiver<Candidates>,
    /// Grows with every visit that was too short: among equals somebody else is asked first then.
    pub(super) turn: u32,
}

/// How long to wait, by how it went before.
struct Patience {
    next: Duration,
}

impl Patience {
    /// The pause after a round.
    fn after(&mut self, round: &Round) -> Duration {
        match round {
            Round::NoKubeconfig => return KUBECONFIG_EVERY,
            Round::Told(time) if *time >= LASTING => {
                self.next = RETRY_MIN;
                return RETRY_MIN;
            }
            Round::Told(_) | Round::Untold => {}
        }
        let pause = self.next;
        self.next = (pause * 2).min(RETRY_MAX);
        pause
    }
}

impl Follower {
    /// Asks for ever.
    pub(super) async fn run(mut self) {
        let dialer = Dialer::new(&self.discover.kubeconfig);
        let random = RandomState::new();
        let (mut progress, mut patience) = (Progress::default(), Patience { next: RETRY_MIN });
        loop {
            let round = self.round(&dialer, &mut progress, &random).await;
            if matches!(round, Round::Told(time) if time < LASTING) {
                self.turn = self.turn.wrapping_add(1);
            }
            let pause = patience.after(&round);
            self.rest(jittered(pause, &random)).await;
        }
    }

    /// Waits, but not as long when somebody has become usable meanwhile: at boot that is the first one.
    async fn rest(&mut self, pause: Duration) {
        let least = pause.min(RETRY_MIN);
        sleep(least).await;
        let news = async {
            if self.candidates.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = sleep(pause - least) => {}
            () = news => {}
        }
    }

    /// Asks one after the other until one tells, and listens to that one for as long as it does.
    async fn round(&mut self, dialer: &Dialer, progress: &mut Progress, random: &RandomState) -> Round {
        let server = match read(&self.discover.kubeconfig) {
            Ok(server) => server,
            Err(problem) => {
                self.note(|known| known.untold(problem));
                return Round::NoKubeconfig;
            }
        };
        let mut problems: Vec<String> = Vec::new();
        let (order, lookup) = self.order(&server, random).await;
        for (address, was_usable) in order {
            let begin = Instant::now();
            match self.visit(address, was_usable, &server, dialer, progress).await {
                End::Over => {
                    self.note(Known::left);
                    return Round::Told(begin.elapsed());
                }
                End::Broken(problem) => {
                    self.note(|known| known.untold(format!("{address}: {problem}")));
                    return Round::Told(begin.elapsed());
                }
                End::Failed(problem) => problems.push(format!("{address}: {problem}")),
            }
        }
        problems.extend(lookup);
        problems.truncate(REASONS_MAX);
        if problems.is_empty() {
            problems.push("there is nobody to ask".to_owned());
        }
        self.note(|known| known.untold(problems.join("; ")));
        Round::Untold
    }

    /// Usable backends first; then the kubeconfig's own server, which may be a listener of ours; then whoever was ever an
    /// apiserver: a list is never the only way to a newer list. Within these anybody before anybody, so that many nodes do
    /// not all ask the same one. Where the server cannot be looked up: why.
    async fn order(
        &mut self,
        server: &Server,
        random: &RandomState,
    ) -> (Vec<(SocketAddr, bool)>, Option<String>) {
        let candidates = self.candidates.borrow_and_update().get(&self.service).cloned().unwrap_or_default();
        let known = self.known.borrow().get(&self.service).cloned();
        let listed: BTreeSet<_> = known
            .map(|known| known.former.into_iter().chain(known.list.into_iter().flatten()).collect())
            .unwrap_or_default();
        let (addresses, problem) = match server.addresses().await {
            Ok(addresses) => (addresses, None),
            Err(problem) => (Vec::new(), Some(format!("the kubeconfig's server {problem}"))),
        };
        let shuffled = |addresses: BTreeSet<SocketAddr>| {
            let mut addresses: Vec<_> = addresses.into_iter().collect();
            addresses.sort_by_key(|address| random.hash_one((address, self.turn)));
            addresses
        };
        let usable: BTreeSet<_> = usable(&candidates).collect();
        let others = candidates.keys().copied().chain(self.own.iter().copied()).chain(listed);
        let others: BTreeSet<_> =
            others.filter(|address| !usable.contains(address) && !addresses.contains(address)).collect();
        let own_server =
            addresses.into_iter().filter(|address| !usable.contains(address)).collect::<Vec<_>>();
        let mut order: Vec<_> = shuffled(usable).into_iter().map(|address| (address, true)).collect();
        order.extend(own_server.into_iter().chain(shuffled(others)).map(|address| (address, false)));
        (order, problem)
    }

    async fn visit(
        &self,
        address: SocketAddr,
        was_usable: bool,
        server: &Server,
        dialer: &Dialer,
        progress: &mut Progress,
    ) -> End {
        let dialled = match dialer.dial(address, server.host(), CONNECT_LIMIT).await {
            Ok(dialled) => dialled,
            Err(problem) => return End::Failed(problem),
        };
        let host = host_of(server.host(), address);
        let visit = match Visit::begin(dialled, (&host, &server.prefix), &self.discover).await {
            Ok(visit) => visit,
            Err(problem) => return End::Failed(problem),
        };
        let (mut told, mut candidates) = (false, self.candidates.clone());
        let before = candidates.borrow_and_update().get(&self.service).cloned().unwrap_or_default();
        let changed = |progress: &Progress| {
            told = true;
            self.note(|known| known.told(address, progress.slices().listed(), SystemTime::now()));
        };
        let ended = tokio::select! {
            end = visit.follow(progress, changed) => Some(end),
            () = overtaken(&mut candidates, &self.service, (address, was_usable), &before) => None,
        };
        match ended {
            Some(end) => end,
            None if told => End::Over,
            None => End::Failed("it is not usable any more".to_owned()),
        }
    }

    /// Changes what is known, says what is different, and tells the controller where that matters to it.
    fn note(&self, after: impl FnOnce(&Known) -> Known) {
        self.known.send_if_modified(|all| {
            let Some(known) = all.get_mut(&self.service) else { return false };
            let after = after(known);
            after.log(known);
            let matters = after.list != known.list || after.asked != known.asked;
            *known = after;
            matters
        });
    }
}

/// How a round has ended.
enum Round {
    /// Somebody has told something. How long the visit has lasted.
    Told(Duration),
    /// Nobody has.
    Untold,
    /// There is nobody to be.
    NoKubeconfig,
}

fn usable(candidates: &BTreeMap<SocketAddr, bool>) -> impl Iterator<Item = SocketAddr> {
    candidates.iter().filter(|(_, usable)| **usable).map(|(address, _)| *address)
}

/// Waits until there is somebody better to ask: a frozen server keeps its connections.
async fn overtaken(
    candidates: &mut watch::Receiver<Candidates>,
    service: &str,
    (address, was_usable): (SocketAddr, bool),
    before: &BTreeMap<SocketAddr, bool>,
) {
    let better = |all: &Candidates| {
        let Some(now) = all.get(service) else { return false };
        let here = now.get(&address).copied().unwrap_or(false);
        let mut others = usable(now).filter(|other| *other != address);
        match was_usable {
            true => !here && others.next().is_some(),
            // One that was usable when this one was chosen has failed before.
            false => !here && others.any(|other| !before.get(&other).copied().unwrap_or(false)),
        }
    };
    if candidates.wait_for(better).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// The server of a kubeconfig.
fn read(path: &Path) -> Result<Server, String> {
    let contents = match kubeconfig::read_file(path) {
        Ok(contents) => contents,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(format!("the kubeconfig {} does not exist yet", path.display()));
        }
        Err(error) => return Err(format!("cannot read the kubeconfig {}: {error}", path.display())),
    };
    let wrong = |reason: &dyn std::fmt::Display| format!("kubeconfig {}: {reason}", path.display());
    let directory = path.parent().unwrap_or(Path::new(""));
    let kubeconfig = Kubeconfig::parse(&contents, directory).map_err(|error| wrong(&error))?;
    Server::of(&kubeconfig).map_err(|reason| wrong(&format!("its server {reason}")))
}

/// Longer by up to a half, so that many nodes do not all come at once.
fn jittered(pause: Duration, random: &RandomState) -> Duration {
    let chance = random.hash_one(SystemTime::now()) % 500;
    pause + pause * u32::try_from(chance).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(last: u8) -> SocketAddr {
        ([10, 0, 0, last], 6443).into()
    }

    fn follower(candidates: &[(u8, bool)], list: &[u8]) -> (Follower, watch::Sender<Candidates>) {
        let mut known =
            Known::remembered("default/kubernetes".to_owned(), Some(list.iter().map(|it| at(*it)).collect()));
        known.asked = true;
        let candidates = candidates.iter().map(|(last, usable)| (at(*last), *usable)).collect();
        let (sender, receiver) = watch::channel(BTreeMap::from([("api".to_owned(), candidates)]));
        let follower = Follower {
            service: "api".to_owned(),
            discover: Discover {
                kubeconfig: "/k".into(),
                namespace: "default".to_owned(),
                service: "kubernetes".to_owned(),
                replace: true,
            },
            own: vec![at(1)],
            known: Arc::new(watch::Sender::new(BTreeMap::from([("api".to_owned(), known)]))),
            candidates: receiver,
            turn: 0,
        };
        (follower, sender)
    }

    fn server(url: &str) -> Server {
        let text = format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: c}}}}]\n\
             clusters: [{{name: c, cluster: {{server: '{url}', insecure-skip-tls-verify: true}}}}]\n"
        );
        Server::of(&Kubeconfig::parse(text.as_bytes(), Path::new("/")).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn usable_ones_are_asked_then_the_server_then_whoever_was_an_apiserver() {
        let (mut follower, _sender) = follower(&[(2, false), (3, true), (4, true)], &[5]);
        let (order, problem) = follower.order(&server("https://127.0.0.1:16443"), &RandomState::new()).await;
        assert_eq!(problem, None);
        let part = |range: std::ops::Range<usize>| -> BTreeSet<SocketAddr> {
            order[range].iter().map(|(address, _)| *address).collect()
        };
        assert_eq!(part(0..2), BTreeSet::from([at(3), at(4)]));
        assert_eq!(order[2], ("127.0.0.1:16443".parse().unwrap(), false));
        assert_eq!(part(3..6), BTreeSet::from([at(1), at(2), at(5)]));
        assert_eq!(order.len(), 6);
        let (order, _) = follower.order(&server("https://10.0.0.4:6443"), &RandomState::new()).await;
        assert_eq!(order.len(), 5, "nobody twice");
    }

    #[tokio::test(start_paused = true)]
    async fn a_visit_ends_when_there_is_somebody_better() {
        let (_follower, sender) = follower(&[(2, true), (3, true)], &[]);
        let mut receiver = sender.subscribe();
        let before = receiver.borrow()["api"].clone();
        let is_over = async |receiver: &mut watch::Receiver<Candidates>, who: (SocketAddr, bool)| {
            let waiting = overtaken(receiver, "api", who, &before);
            tokio::time::timeout(Duration::from_secs(1), waiting).await.is_ok()
        };
        let set = |now: &[(u8, bool)]| {
            let now = now.iter().map(|(last, usable)| (at(*last), *usable)).collect();
            sender.send_replace(BTreeMap::from([("api".to_owned(), now)]));
        };
        assert!(!is_over(&mut receiver, (at(2), true)).await);
        assert!(!is_over(&mut receiver, (at(9), false)).await, "those were asked before");
        set(&[(2, false), (3, false)]);
        assert!(!is_over(&mut receiver, (at(2), true)).await, "nobody is better");
        set(&[(2, false), (3, true)]);
        assert!(is_over(&mut receiver, (at(2), true)).await);
        set(&[(9, true), (4, true)]);
        assert!(!is_over(&mut receiver, (at(9), false)).await, "nobody is better than it is now");
        set(&[(9, false), (4, true)]);
        assert!(is_over(&mut receiver, (at(9), false)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_when_somebody_becomes_usable() {
        let (mut follower, sender) = follower(&[(2, false)], &[]);
        drop(follower.order(&server("https://10.0.0.4:6443"), &RandomState::new()).await);
        let start = tokio::time::Instant::now();
        follower.rest(RETRY_MAX).await;
        assert_eq!(start.elapsed(), RETRY_MAX);
        sender.send_replace(BTreeMap::from([("api".to_owned(), BTreeMap::from([(at(2), true)]))]));
        follower.rest(RETRY_MAX).await;
        assert_eq!(start.elapsed(), RETRY_MAX + RETRY_MIN, "no sooner than this");
    }

    #[test]
    fn only_a_watch_that_lasts_ends_the_waiting() {
        let pauses = |rounds: &[Round]| -> Vec<u64> {
            let mut patience = Patience { next: RETRY_MIN };
            rounds.iter().map(|round| patience.after(round).as_secs()).collect()
        };
        let refused = || Round::Told(Duration::from_millis(20));
        let lasted = || Round::Told(Duration::from_secs(290));
        // The user may list and not watch.
        assert_eq!(pauses(&std::array::from_fn::<_, 8, _>(|_| refused())), [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(pauses(&[Round::Untold, refused(), Round::Untold, refused()]), [1, 2, 4, 8]);
        assert_eq!(
            pauses(&[refused(), refused(), refused(), lasted(), lasted(), refused()]),
            [1, 2, 4, 1, 1, 1]
        );
        assert_eq!(pauses(&[refused(), Round::NoKubeconfig, refused()]), [1, 2, 2], "nobody was asked");
        let almost = || Round::Told(LASTING - Duration::from_millis(1));
        assert_eq!(pauses(&[almost(), almost()]), [1, 2]);
    }

    #[tokio::test]
    async fn after_a_short_visit_anybody_else_may_be_first() {
        let (mut follower, _sender) = follower(&[(2, true), (3, true), (4, true)], &[]);
        let (server, random) = (server("https://10.0.0.2:6443"), RandomState::new());
        let mut first = async |turn| {
            follower.turn = turn;
            follower.order(&server, &random).await.0[0].0
        };
        let same = first(0).await;
        assert_eq!(first(0).await, same, "as long as all is well the same one is asked");
        let mut firsts = BTreeSet::new();
        for turn in 0..100 {
            firsts.insert(first(turn).await);
        }
        assert_eq!(firsts, BTreeSet::from([at(2), at(3), at(4)]));
    }

    #[test]
    fn a_kubeconfig_may_come_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        assert!(read(&path).unwrap_err().ends_with("does not exist yet"));
        std::fs::write(&path, "hunter2").unwrap();
        let error = read(&path).unwrap_err();
        assert!(error.contains("wrong YAML") && !error.contains("hunter2"), "{error}");
    }
}
