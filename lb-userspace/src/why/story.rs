//! From records to sentences.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::SystemTime,
};

use lb_common::{
    flight_recorder::{Refusal, ResetReason, Silence},
    meta::{Kind, Meta, SYN_ACK},
};

use super::Names;
use crate::dataplane::{Entry, What};

/// Whose connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its address.
    pub address: IpAddr,
    /// Its port; None: any.
    pub port: Option<u16>,
}

impl Client {
    /// Is it this one?
    pub fn is(&self, client: SocketAddr) -> bool {
        client.ip() == self.address && self.port.is_none_or(|port| port == client.port())
    }
}

impl FromStr for Client {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Ok(Self { address: address.to_canonical(), port: None });
        }
        match text.parse::<SocketAddr>() {
            Ok(client) => Ok(Self { address: client.ip().to_canonical(), port: Some(client.port()) }),
            Err(_) => Err("write the client's address, with its port if you know it: 10.0.0.5, \
                           10.0.0.5:43210, fd00::5 or [fd00::5]:43210"
                .to_owned()),
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// When, to a tick of the kernel's.
    pub at: SystemTime,
    /// What, in a word for programs.
    pub what: &'static str,
    /// The backend's name; None: there was none.
    pub backend: Option<String>,
    /// What, for people.
    pub words: String,
}

/// A connection from its first record to its last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Its client.
    pub client: SocketAddr,
    /// Where the client connected to, as far as is known.
    pub listener: Option<SocketAddr>,
    /// What backends saw as its client.
    pub source: Option<SocketAddr>,
    /// Whether its beginning is written.
    pub begun: bool,
    /// Whether its end is written.
    pub ended: bool,
    /// At least one.
    pub steps: Vec<Step>,
    /// What that means for now, if it is not clear from the last step.
    pub outlook: Option<String>,
}

impl Connection {
    /// Was it there between these two moments, as far as is known?
    pub fn was_there(&self, from: SystemTime, to: SystemTime) -> bool {
        let (first, last) = (self.steps.first().map(|it| it.at), self.steps.last().map(|it| it.at));
        (!self.begun || first.is_some_and(|first| first <= to))
            && (!self.ended || last.is_some_and(|last| last >= from))
    }
}

/// Tells the entries about flows, each with those of one client and listener in order, as connections: the oldest first.
pub fn connections(
    flows: BTreeMap<(SocketAddr, u8), Vec<Entry>>,
    names: &Names,
    time: impl Fn(u64) -> SystemTime,
) -> Vec<Connection> {
    let mut connections: Vec<_> =
        flows.into_values().flat_map(|entries| split(&entries, names, &time)).collect();
    connections.sort_by_key(|connection| connection.steps.first().map(|step| step.at));
    connections
}

/// A client uses its port again.
fn split(entries: &[Entry], names: &Names, time: &impl Fn(u64) -> SystemTime) -> Vec<Connection> {
    let connections = entries.chunk_by(|_, next| !next.what.begins());
    let mut before = None;
    connections
        .map(|entries| {
            let connection = tell(entries, before, names, time);
            before = entries.last().map(|entry| entry.what);
            connection
        })
        .collect()
}

/// `before` is the last that happened between the same two ends.
fn tell(
    entries: &[Entry],
    before: Option<What>,
    names: &Names,
    time: &impl Fn(u64) -> SystemTime,
) -> Connection {
    let mut previous = before;
    let steps = entries
        .iter()
        .map(|entry| {
            let telling = Telling { entry, previous, names };
            previous = Some(entry.what);
            Step {
                at: time(entry.jiffies),
                what: word(entry.what),
                backend: (entry.backend != 0).then(|| names.backend(entry.backend)),
                words: telling.words(),
            }
        })
        .collect();
    let (first, last) = (&entries[0], &entries[entries.len() - 1]);
    Connection {
        client: first.client,
        listener: names.listeners.get(&first.listener).copied(),
        source: entries.iter().find_map(|entry| names.source(entry.client, entry.slot?)),
        begun: first.what.begins(),
        ended: last.what.ends(),
        steps,
        outlook: outlook(last, names),
    }
}

/// What happened, for programs.
fn word(what: What) -> &'static str {
    match what {
        What::Claimed => "claimed",
        What::Established => "established",
        What::SecondChance { .. } => "second_chance",
        What::RefusedByBackend => "refused_by_backend",
        What::Moved { .. } => "moved",
        What::Refused(Refusal::NoBackend) => "refused_no_backend",
        What::Refused(Refusal::NotAllowed) => "refused_not_allowed",
        What::Refused(Refusal::TableFull) => "dropped_table_full",
        What::Refused(Refusal::SourceBudget) => "dropped_source_budget",
        What::Refused(Refusal::Doubted) => "dropped_syn_doubted",
        What::Refused(Refusal::Race) => "dropped_syn_race",
        What::Refused(Refusal::NoNextHop) => "dropped_next_hop_unknown",
        What::Closed { by_client: true } => "closed_by_client",
        What::Closed { by_client: false } => "closed_by_backend",
        What::Reset { by_client: true, .. } => "reset_by_client",
        What::Reset { by_client: false, .. } => "reset_by_backend",
        What::Reclaimed { .. } => "reclaimed",
        What::Killed { reason: ResetReason::Dead, .. } => "reset_backend_dead",
        What::Killed { .. } => "reset_on_request",
        What::Asked(_) => "asked",
        What::Forgotten { .. } => "forgotten",
    }
}

/// What to make of a last entry that is no end.
fn outlook(last: &Entry, names: &Names) -> Option<String> {
    let backend = |id| names.backend(id);
    Some(match last.what {
        What::Claimed => {
            format!("{} has not answered since, or the client has not gone on", backend(last.backend))
        }
        What::Moved { next } | What::SecondChance { next } => {
            format!("{} has not answered since, or the client has not tried again", backend(next))
        }
        What::Refused(Refusal::NoNextHop) => {
            "nothing since; `sheave status` and `ip neigh` say whether the backend is reached now".to_owned()
        }
        What::Established | What::Asked(_) => "nothing since: as far as sheave knows, it is open".to_owned(),
        _ => return None,
    })
}

/// What is told, and what was told before it.
struct Telling<'a> {
    entry: &'a Entry,
    previous: Option<What>,
    names: &'a Names,
}

impl Telling<'_> {
    fn words(&self) -> String {
        let backend = self.names.backend(self.entry.backend);
        match self.entry.what {
            What::Claimed => self.claimed(),
            What::Established => format!("{backend} answered: the connection is established"),
            What::SecondChance { next } => format!(
                "{backend} refused the SYN; the client was not told, its next SYN goes to {}",
                self.names.backend_and_address(next)
            ),
            What::RefusedByBackend => self.refused_by_backend(),
            What::Moved { next } => format!(
                "{backend} did not answer the SYN and gets no new connections any more; the client's next SYN went to {}",
                self.names.backend_and_address(next)
            ),
            What::Refused(refusal) => self.refused(refusal),
            What::Closed { by_client: true } => "the client closed the connection (FIN)".to_owned(),
            What::Closed { by_client: false } => format!("{backend} closed the connection (FIN)"),
            What::Reset { by_client: true, before } if !answered(before) => {
                format!("the client gave up (RST), before {backend} had answered its SYN")
            }
            What::Reset { by_client: true, .. } => "the client reset the connection (RST)".to_owned(),
            What::Reset { by_client: false, .. } => format!("{backend} reset the connection (RST)"),
            What::Reclaimed { before } => self.reclaimed(before),
            What::Killed { reason, silence, seconds } => self.killed(reason, silence, seconds),
            What::Asked(reason) => format!(
                "sheave asked {backend} whether it still has the connection, because {}; if it has not, it answers \
                 with a RST",
                match reason {
                    ResetReason::Refuses => "it refuses connections",
                    ResetReason::Returned => "it answers again after a silence",
                    ResetReason::Doubt => "a RST was seen whose numbers prove nothing",
                    ResetReason::HalfClosed =>
                        "one end had closed it, and for more than a minute no segment was seen",
                    ResetReason::Dead | ResetReason::Operator | ResetReason::Drained | ResetReason::Idle =>
                        "its flows were ended",
                }
            ),
            What::Forgotten { before } => self.forgotten(before),
        }
    }

    fn listener(&self) -> String {
        let listener = self.names.listeners.get(&self.entry.listener);
        listener.map_or_else(|| format!("listener {}", self.entry.listener), ToString::to_string)
    }

    fn claimed(&self) -> String {
        let again = match self.previous {
            None => "",
            Some(what) if what.ends() => " (the same client port again)",
            Some(_) => " (the same client port again, and no end of the one before was seen)",
        };
        let backend = self.names.backend_and_address(self.entry.backend);
        format!("new connection to {} went to {backend}{again}", self.listener())
    }

    fn refused_by_backend(&self) -> String {
        let backend = self.names.backend(self.entry.backend);
        let why = if matches!(self.previous, Some(What::SecondChance { .. })) {
            "it was the second backend that did"
        } else {
            "there was no other backend to try"
        };
        format!("{backend} refused the SYN and the client was told (RST): {why}")
    }

    fn refused(&self, refusal: Refusal) -> String {
        let listener = self.listener();
        match refusal {
            Refusal::NoBackend => {
                format!("connection to {listener} refused by sheave (RST): no backend was usable")
            }
            Refusal::NotAllowed => format!(
                "connection to {listener} refused by sheave (RST): the client is in none of the service's `allow` prefixes"
            ),
            Refusal::TableFull => format!(
                "SYN to {listener} dropped: every slot that it could have had was taken; the client sends it again, \
                 more `snat_addresses` make room"
            ),
            Refusal::SourceBudget => format!(
                "SYN to {listener} dropped: the client's address, or its /64, has as many slots as one source may have; the \
                 client sends it again, `source_share` and `half_open_share` make room"
            ),
            Refusal::Doubted => format!(
                "SYN to {listener} dropped: the connection before may have ended by a RST whose numbers prove nothing, and its \
                 backend is asked first; the client sends it again"
            ),
            Refusal::Race => format!(
                "SYN to {listener} dropped: its own copy was being worked on by another CPU; the client sends it again"
            ),
            Refusal::NoNextHop => format!(
                "SYN dropped: the way to {} is not known (no route, or nobody answers ARP or neighbour discovery)",
                self.names.backend_and_address(self.entry.backend)
            ),
        }
    }

    fn reclaimed(&self, before: Meta) -> String {
        let backend = self.names.backend(self.entry.backend);
        let state = if before.is(Kind::Established) {
            "it had been reset, and silent since".to_owned()
        } else if !answered(before) {
            format!("{backend} had not answered its SYN")
        } else {
            "its client had not finished the handshake".to_owned()
        };
        format!("its slot was given to another connection, as all candidates were taken: {state}")
    }

    fn killed(&self, reason: ResetReason, silence: Option<Silence>, seconds: u8) -> String {
        let backend = self.names.backend(self.entry.backend);
        let why = match reason {
            ResetReason::Dead => {
                let what = match silence {
                    Some(Silence::Connect) => "connect timeout",
                    Some(Silence::Handshake) => "TLS timeout",
                    Some(Silence::Unreachable) => "host unreachable",
                    Some(Silence::Other) | None => "silence",
                };
                let long =
                    if seconds == u8::MAX { "more than 4 minutes".into() } else { format!("{seconds} s") };
                format!("because {backend} was declared dead ({what} for {long})")
            }
            ResetReason::Operator => "because an operator said so".to_owned(),
            ResetReason::Drained => format!("because {backend} was drained and its time was over"),
            ResetReason::Refuses => format!("because {backend} refuses connections"),
            ResetReason::Returned => format!("because {backend} came back after a silence"),
            ResetReason::Idle => "because neither end had sent anything for its idle timeout".to_owned(),
            ResetReason::Doubt => "because a RST was seen whose numbers prove nothing".to_owned(),
            ResetReason::HalfClosed => {
                "because one end had closed it, and for more than a minute no segment was seen".to_owned()
            }
        };
        format!("reset by sheave, {why}")
    }

    fn forgotten(&self, before: Meta) -> String {
        let backend = self.names.backend(self.entry.backend);
        if before.is(Kind::Established) {
            return "forgotten by sheave: neither side had sent anything for the whole idle timeout; a further segment \
                    is answered with a RST"
                .to_owned();
        }
        if answered(before) {
            return "forgotten by sheave: the handshake was not finished within four minutes".to_owned();
        }
        format!("forgotten by sheave: {backend} never answered the SYN, and the client did not go on")
    }
}

fn answered(before: Meta) -> bool {
    before.is(Kind::Established) || before.has(SYN_ACK)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lb_common::meta::RESET;

    use super::*;

    fn names() -> Names {
        let address = |last: u8| SocketAddr::from(([172, 16, 0, 10 + last], 6443));
        Names {
            backends: (1..=3).map(|id| (id, address(id))).collect(),
            listeners: BTreeMap::from([(1, "10.0.0.100:6443".parse().unwrap())]),
            snat: [vec![Some("172.16.0.1".parse().unwrap())], vec![]],
            called: (1..=3).map(|id| (address(id), format!("master-{id}"))).collect(),
        }
    }

    fn second(jiffies: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(jiffies)
    }

    /// Each happens a second after the one before.
    fn told(entries: &[(u8, What)]) -> Vec<Connection> {
        let client: SocketAddr = "10.0.0.5:43210".parse().unwrap();
        let entries = (100..).zip(entries).map(|(jiffies, (backend, what))| Entry {
            jiffies,
            client,
            listener: 1,
            backend: *backend,
            slot: (*backend != 0).then_some((0, 23_456)),
            what: *what,
        });
        connections(BTreeMap::from([((client, 1), entries.collect())]), &names(), second)
    }

    fn words(entries: &[(u8, What)]) -> Vec<String> {
        told(entries).into_iter().flat_map(|it| it.steps).map(|step| step.words).collect()
    }

    const OPEN: Meta = Meta::new(Kind::Established, 0, 0);

    #[test]
    fn a_normal_connection() {
        let story = [(2, What::Claimed), (2, What::Established), (2, What::Closed { by_client: true })];
        let connections = told(&story);
        let [connection] = &connections[..] else { panic!("{connections:?}") };
        let words: Vec<_> = connection.steps.iter().map(|step| step.words.as_str()).collect();
        let expected = [
            "new connection to 10.0.0.100:6443 went to master-2 (172.16.0.12:6443)",
            "master-2 answered: the connection is established",
            "the client closed the connection (FIN)",
        ];
        assert_eq!(words, expected);
        assert!(connection.begun && connection.ended && connection.outlook.is_none());
        assert_eq!(connection.source, Some("172.16.0.1:23456".parse().unwrap()));
        assert_eq!(connection.listener, Some("10.0.0.100:6443".parse().unwrap()));
    }

    #[test]
    fn a_second_chance_that_succeeds_and_one_that_does_not() {
        let chance = [(2, What::Claimed), (2, What::SecondChance { next: 3 })];
        let good = words(&[&chance[..], &[(3, What::Established)]].concat());
        assert_eq!(
            good[1],
            "master-2 refused the SYN; the client was not told, its next SYN goes to master-3 (172.16.0.13:6443)"
        );
        assert_eq!(good[2], "master-3 answered: the connection is established");
        let bad = words(&[&chance[..], &[(3, What::RefusedByBackend)]].concat());
        assert_eq!(
            bad[2],
            "master-3 refused the SYN and the client was told (RST): it was the second backend that did"
        );
        let only = words(&[(2, What::Claimed), (2, What::RefusedByBackend)]);
        assert!(only[1].ends_with("there was no other backend to try"), "{only:?}");
    }

    #[test]
    fn a_silent_backend_and_the_next_syn() {
        let story = [(2, What::Claimed), (2, What::Moved { next: 3 })];
        assert_eq!(
            words(&story)[1],
            "master-2 did not answer the SYN and gets no new connections any more; the client's next SYN went to \
             master-3 (172.16.0.13:6443)"
        );
        let outlook = told(&story)[0].outlook.clone().unwrap();
        assert!(outlook.starts_with("master-3 has not answered"), "{outlook}");
    }

    #[test]
    fn a_refusal_says_why_and_what_helps() {
        for (refusal, expected) in [
            (Refusal::NoBackend, "refused by sheave (RST): no backend was usable"),
            (Refusal::NotAllowed, "none of the service's `allow` prefixes"),
            (Refusal::TableFull, "more `snat_addresses` make room"),
            (Refusal::SourceBudget, "`source_share` and `half_open_share` make room"),
            (Refusal::Doubted, "its backend is asked first; the client sends it again"),
            (Refusal::Race, "the client sends it again"),
        ] {
            let connections = told(&[(0, What::Refused(refusal)), (0, What::Refused(refusal))]);
            assert_eq!(connections.len(), 2, "each SYN for itself");
            let step = &connections[1].steps[0];
            assert!(step.words.contains(expected), "{}", step.words);
            assert!(connections[1].ended && step.backend.is_none());
        }
        let lost = told(&[(1, What::Claimed), (1, What::Refused(Refusal::NoNextHop))]);
        let [lost] = &lost[..] else { panic!("one connection: {lost:?}") };
        assert!(lost.steps[1].words.contains("the way to master-1 (172.16.0.11:6443) is not known"));
        assert!(!lost.ended && lost.outlook.is_some());
    }

    #[test]
    fn a_dead_backends_connection_says_which_reason() {
        let dead =
            |silence, seconds| What::Killed { reason: ResetReason::Dead, silence: Some(silence), seconds };
        let story = [(2, What::Claimed), (2, What::Established), (2, dead(Silence::Connect, 7))];
        assert_eq!(
            words(&story)[2],
            "reset by sheave, because master-2 was declared dead (connect timeout for 7 s)"
        );
        for (what, expected) in [
            (dead(Silence::Handshake, 255), "declared dead (TLS timeout for more than 4 minutes)"),
            (dead(Silence::Unreachable, 5), "declared dead (host unreachable for 5 s)"),
            (
                What::Killed { reason: ResetReason::Operator, silence: None, seconds: 0 },
                "an operator said so",
            ),
            (What::Asked(ResetReason::Returned), "because it answers again after a silence"),
            (What::Asked(ResetReason::Refuses), "because it refuses connections"),
        ] {
            let words = words(&[(2, what)]);
            assert!(words[0].contains(expected), "{words:?}");
        }
    }

    #[test]
    fn a_slot_that_was_taken_says_what_the_connection_had_come_to() {
        for (before, expected) in [
            (Meta::new(Kind::HalfOpen, 0, 0), "master-1 had not answered its SYN"),
            (Meta::new(Kind::HalfOpen, 0, 0).with(SYN_ACK), "its client had not finished the handshake"),
            (OPEN.with(RESET), "it had been reset"),
        ] {
            let connections = told(&[(1, What::Claimed), (1, What::Reclaimed { before })]);
            assert!(connections[0].steps[1].words.ends_with(expected) || expected.starts_with("it had"));
            assert!(connections[0].steps[1].words.contains(expected), "{:?}", connections[0].steps[1]);
            assert!(connections[0].ended);
        }
    }

    #[test]
    fn a_connection_that_is_forgotten_says_after_what() {
        for (before, expected) in [
            (Meta::new(Kind::HalfOpen, 0, 0), "master-1 never answered the SYN"),
            (Meta::new(Kind::HalfOpen, 0, 0).with(SYN_ACK), "not finished within four minutes"),
            (OPEN, "the whole idle timeout"),
        ] {
            assert!(words(&[(1, What::Forgotten { before })])[0].contains(expected));
        }
    }

    #[test]
    fn a_client_port_that_is_used_again_begins_another_connection() {
        let ended = [(1, What::Claimed), (1, What::Closed { by_client: false }), (3, What::Claimed)];
        let connections = told(&ended);
        assert_eq!(connections.len(), 2);
        assert_eq!(connections[0].steps[1].words, "master-1 closed the connection (FIN)");
        assert!(connections[1].steps[0].words.ends_with("(the same client port again)"));
        let lost = words(&[(1, What::Claimed), (3, What::Claimed)]);
        assert!(lost[1].contains("no end of the one before was seen"), "{lost:?}");
    }

    #[test]
    fn a_reset_says_by_whom() {
        let reset = |by_client, before| words(&[(2, What::Reset { by_client, before })])[0].clone();
        assert_eq!(reset(true, OPEN), "the client reset the connection (RST)");
        assert_eq!(reset(false, OPEN), "master-2 reset the connection (RST)");
        let unanswered = Meta::new(Kind::HalfOpen, 0, 0);
        assert_eq!(reset(true, unanswered), "the client gave up (RST), before master-2 had answered its SYN");
    }

    #[test]
    fn a_story_without_its_beginning_is_told_and_was_there_before() {
        let connections = told(&[(2, What::Closed { by_client: true })]);
        let connection = &connections[0];
        assert!(!connection.begun && connection.ended);
        assert!(connection.was_there(second(1), second(2)), "it may have been");
        assert!(!connection.was_there(second(101), second(200)));
    }

    #[test]
    fn a_connection_was_there_from_its_beginning_to_its_end() {
        let connection = &told(&[(2, What::Claimed), (2, What::Established)])[0];
        assert!(connection.was_there(second(500), second(600)), "it is open");
        assert!(!connection.was_there(second(1), second(99)));
        let connection = &told(&[(2, What::Claimed), (2, What::Closed { by_client: true })])[0];
        assert!(connection.was_there(second(101), second(600)));
        assert!(!connection.was_there(second(102), second(600)));
    }

    #[test]
    fn names_that_are_not_known_are_numbers() {
        let client: SocketAddr = "[fd00::5]:43210".parse().unwrap();
        let entry =
            Entry { jiffies: 1, client, listener: 9, backend: 8, slot: Some((0, 1)), what: What::Claimed };
        let told = connections(BTreeMap::from([((client, 9), vec![entry])]), &names(), second);
        assert_eq!(told[0].steps[0].words, "new connection to listener 9 went to backend 8");
        assert_eq!((told[0].listener, told[0].source), (None, None));
    }

    #[test]
    fn a_client_is_an_address_with_or_without_a_port() {
        for (text, expected) in [
            ("10.0.0.5", "10.0.0.5"),
            ("10.0.0.5:43210", "10.0.0.5:43210"),
            ("fd00::5", "fd00::5"),
            ("[fd00::5]", "fd00::5"),
            ("[fd00::5]:43210", "[fd00::5]:43210"),
            ("::ffff:10.0.0.5", "10.0.0.5"),
        ] {
            assert_eq!(text.parse::<Client>().unwrap().to_string(), expected);
        }
        for text in ["", "master-1", "10.0.0.5:", "10.0.0.5:99999", "10.0.0.0/24"] {
            assert!(text.parse::<Client>().unwrap_err().contains("10.0.0.5:43210"), "{text}");
        }
        let client: Client = "10.0.0.5".parse().unwrap();
        assert!(client.is("10.0.0.5:1".parse().unwrap()) && !client.is("10.0.0.6:1".parse().unwrap()));
    }
}
