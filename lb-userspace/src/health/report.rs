//! What one check found: HAProxy's code for the people who read it, an [`Outcome`] for the state machine.

use std::{fmt, sync::Arc, time::Duration};

use super::certificate::CertificateFacts;

/// The layer a check reached and how it ended, by HAProxy's names (`check_status` of its statistics).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CheckCode {
    /// Checks are off for this backend.
    NoCheck,
    /// Not checked yet.
    Ini,
    /// The check could not be put together: a file of ours cannot be read.
    Unk,
    /// Our own host could not do the check.
    SockErr,
    /// TCP connected, and nothing more was asked for.
    L4Ok,
    /// TCP did not complete in time.
    L4Tout,
    /// TCP was refused, or the host is unreachable.
    L4Con,
    /// TLS completed, and nothing more was asked for.
    L6Ok,
    /// TLS did not complete in time.
    L6Tout,
    /// The backend speaks no TLS, broke it off, or its certificate is not to be trusted.
    L6Rsp,
    /// The expected status.
    L7Ok,
    /// No complete reply in time.
    L7Tout,
    /// No valid HTTP reply.
    L7Rsp,
    /// A status that is not the expected one.
    L7Sts,
}

impl CheckCode {
    /// The name HAProxy gives it: `L7STS`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCheck => "no check",
            Self::Ini => "INI",
            Self::Unk => "UNK",
            Self::SockErr => "SOCKERR",
            Self::L4Ok => "L4OK",
            Self::L4Tout => "L4TOUT",
            Self::L4Con => "L4CON",
            Self::L6Ok => "L6OK",
            Self::L6Tout => "L6TOUT",
            Self::L6Rsp => "L6RSP",
            Self::L7Ok => "L7OK",
            Self::L7Tout => "L7TOUT",
            Self::L7Rsp => "L7RSP",
            Self::L7Sts => "L7STS",
        }
    }

    /// The phrase HAProxy gives it: `Layer7 wrong status`.
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::NoCheck => "No check",
            Self::Ini => "Initializing",
            Self::Unk => "Unknown",
            Self::SockErr => "Socket error",
            Self::L4Ok => "Layer4 check passed",
            Self::L4Tout => "Layer4 timeout",
            Self::L4Con => "Layer4 connection problem",
            Self::L6Ok => "Layer6 check passed",
            Self::L6Tout => "Layer6 timeout",
            Self::L6Rsp => "Layer6 invalid response",
            Self::L7Ok => "Layer7 check passed",
            Self::L7Tout => "Layer7 timeout",
            Self::L7Rsp => "Layer7 invalid response",
            Self::L7Sts => "Layer7 wrong status",
        }
    }

    /// Whether the connection stood up to the layer below the answer.
    fn connected(self) -> bool {
        matches!(self, Self::L4Ok | Self::L6Ok | Self::L7Ok | Self::L7Tout | Self::L7Rsp | Self::L7Sts)
    }
}

impl fmt::Display for CheckCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a finished check means for its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The expected answer.
    Pass,
    /// Not the expected answer, or none.
    Fail(Failure),
    /// Our own host's trouble (no route, out of descriptors or ports, an unreadable file): no verdict.
    Local,
}

impl Outcome {
    /// Is nobody there, as far as can be told from below HTTP?
    #[must_use]
    pub fn finds_nobody(self) -> bool {
        matches!(self, Self::Fail(Failure::Refused | Failure::Silent))
    }
}

/// How a backend failed a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// An answer which is not the expected one: a status, garbage, a TLS alert, an untrusted certificate.
    NotExpected,
    /// Somebody is there (TLS completed, or a reply began), then nothing.
    NoAnswer,
    /// Its host lives and nobody wants us there: refused, or broken off before TLS completed.
    Refused,
    /// TCP or TLS did not complete in time, or its host is unreachable; without TLS also: not a byte of a reply came.
    Silent,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckReport {
    /// What it means.
    pub outcome: Outcome,
    /// How far it came.
    pub code: CheckCode,
    /// The status, where there was a reply.
    pub http_status: Option<u16>,
    /// From the first packet of the connection (or, on a reused one, of the request) to the verdict.
    pub duration: Duration,
    /// What more there is to say: `Connection refused`, `Unauthorized`, `failed: etcd`. Never a secret.
    pub info: String,
    /// The sub-checks that the backend names as failed: `etcd`, `shutdown`.
    pub failed: Vec<String>,
    /// The connection stood up to the layer below the answer: TLS completed, or TCP for `http` and `tcp`. `false` for
    /// who is silent on it, `true` for who refuses our certificate, which needs a living process, too.
    pub connected: bool,
    /// A connection was opened for this check; `false`: the previous one was used again.
    pub fresh_connection: bool,
    /// The backend's certificate was verified. `false` without a CA, and for checks without TLS.
    pub verified: bool,
    /// Our credential was answered with 401, and asking without it gave the expected status.
    pub credential_rejected: bool,
    /// The backend's certificate does not verify with our CA.
    pub certificate_rejected: bool,
    /// The certificate the backend showed when its connection was opened.
    pub server_certificate: Option<Arc<CertificateFacts>>,
    /// The client certificate we hold.
    pub client_certificate: Option<Arc<CertificateFacts>>,
}

impl CheckReport {
    /// A report with nothing but its code and meaning; the caller fills in the rest.
    pub(crate) fn new(outcome: Outcome, code: CheckCode) -> Self {
        Self {
            outcome,
            code,
            http_status: None,
            duration: Duration::ZERO,
            info: String::new(),
            failed: Vec::new(),
            connected: code.connected() && outcome != Outcome::Fail(Failure::Silent),
            fresh_connection: true,
            verified: false,
            credential_rejected: false,
            certificate_rejected: false,
            server_certificate: None,
            client_certificate: None,
        }
    }

    /// The report of a backend that was not checked yet.
    #[must_use]
    pub fn initializing() -> Self {
        Self::new(Outcome::Local, CheckCode::Ini)
    }

    /// HAProxy's phrase and what more there is to say: `Layer4 connection problem: Connection refused`.
    #[must_use]
    pub fn detail(&self) -> String {
        if self.info.is_empty() {
            self.code.description().to_owned()
        } else {
            format!("{}: {}", self.code.description(), self.info)
        }
    }
}

/// As on HAProxy's statistics page: `L7OK/200 in 4ms`.
impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.as_str())?;
        if matches!(self.code, CheckCode::NoCheck | CheckCode::Ini) {
            return Ok(());
        }
        if let Some(status) = self.http_status {
            write!(f, "/{status}")?;
        }
        write!(f, " in {}ms", self.duration.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_like_haproxys() {
        let mut report = CheckReport::new(Outcome::Pass, CheckCode::L7Ok);
        report.http_status = Some(200);
        report.duration = Duration::from_micros(4900);
        assert_eq!(report.to_string(), "L7OK/200 in 4ms");
        assert_eq!(report.detail(), "Layer7 check passed");

        let mut report = CheckReport::new(Outcome::Fail(Failure::Refused), CheckCode::L4Con);
        report.info = "Connection refused".to_owned();
        assert_eq!(report.to_string(), "L4CON in 0ms");
        assert_eq!(report.detail(), "Layer4 connection problem: Connection refused");

        assert_eq!(CheckReport::initializing().to_string(), "INI");
    }
}
