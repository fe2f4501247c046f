//! How a stub comes up, as a kube-apiserver was measured to: TCP is accepted long before anything is answered, and
//! `/readyz` is the last to say so.

use std::{fmt, str::FromStr, time::Duration};

/// How a stub comes up. Durations count from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Startup {
    /// It is ready as soon as it listens.
    #[default]
    AtOnce,
    /// In the steps of [`Stage`].
    Gradual {
        /// TLS handshakes complete; before that they are left unanswered.
        tls: Duration,
        /// Roles are known; before that everybody is refused with 403.
        roles: Duration,
        /// `/readyz` says 200; before that 500.
        ready: Duration,
    },
    /// etcd cannot be reached: no TLS handshake is ever answered, and the process gives up after this long.
    WithoutEtcd(Duration),
}

/// How far a start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// TCP is accepted, nothing is answered.
    TlsSilent,
    /// 403 for everybody but `system:masters`, whatever they ask for.
    WithoutRoles,
    /// Everything works; the health endpoints say 500 and name the hook that has not run.
    BeforeHooks,
    /// Up.
    Started,
}

/// The hook that the real server waits for last.
pub(super) const LAST_HOOK: &str = "poststarthook/rbac/bootstrap-roles";

impl Startup {
    /// When which stage begins; the first one at once.
    pub(super) fn stages(self) -> Vec<(Duration, Stage)> {
        match self {
            Self::AtOnce => vec![(Duration::ZERO, Stage::Started)],
            Self::WithoutEtcd(_) => vec![(Duration::ZERO, Stage::TlsSilent)],
            Self::Gradual { tls, roles, ready } => vec![
                (Duration::ZERO, Stage::TlsSilent),
                (tls, Stage::WithoutRoles),
                (roles, Stage::BeforeHooks),
                (ready, Stage::Started),
            ],
        }
    }

    /// When the process ends by itself, if it does.
    pub(super) fn gives_up(self) -> Option<Duration> {
        match self {
            Self::WithoutEtcd(after) => Some(after),
            _ => None,
        }
    }
}

impl fmt::Display for Startup {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtOnce => formatter.write_str("at-once"),
            Self::Gradual { tls, roles, ready } => {
                write!(formatter, "{},{},{}", tls.as_millis(), roles.as_millis(), ready.as_millis())
            }
            Self::WithoutEtcd(after) => write!(formatter, "without-etcd:{}", after.as_millis()),
        }
    }
}

impl FromStr for Startup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let duration =
            |text: &str| text.parse().map(Duration::from_millis).map_err(|error| format!("{text}: {error}"));
        if text == "at-once" {
            return Ok(Self::AtOnce);
        }
        if let Some(after) = text.strip_prefix("without-etcd:") {
            return duration(after).map(Self::WithoutEtcd);
        }
        let times: Vec<_> = text.split(',').map(duration).collect::<Result<_, _>>()?;
        match times[..] {
            [tls, roles, ready] if tls <= roles && roles <= ready => Ok(Self::Gradual { tls, roles, ready }),
            _ => Err(format!("{text}: at-once, TLS,ROLES,READY or without-etcd:END, in milliseconds")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Startup;

    #[test]
    fn every_startup_survives_its_word() {
        let [tls, roles, ready] = [700, 2060, 2380].map(Duration::from_millis);
        for startup in [
            Startup::AtOnce,
            Startup::Gradual { tls, roles, ready },
            Startup::WithoutEtcd(Duration::from_secs(20)),
        ] {
            assert_eq!(startup.to_string().parse(), Ok(startup));
        }
        assert!("2380,700,2060".parse::<Startup>().is_err(), "steps in their order");
        assert!("slowly".parse::<Startup>().is_err());
    }
}
