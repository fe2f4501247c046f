//! Health: asks every backend whether it is ready, and draws the conclusions.
//!
//! [`resume`] checks backends on a schedule and sends an [`Event`] for every finished check. A
//! [`Machine`] turns results into a [`State`]; [`select`] says who gets new flows, also when nobody is ready. Both
//! are pure. Nothing here knows of maps, of configuration files or of who listens.
//!
//! Ill is not dead: no new flows is cheap and may be quick, but only silence below HTTP, on fresh connections, is
//! *silent*; and what our own host could not do is no verdict at all.

mod asker;
mod certificate;
mod connect;
mod credentials;
mod dialer;
mod fallback;
mod files;
mod http;
mod probe;
mod report;
mod schedule;
mod state;
mod transition;
mod unverified;
mod validate;
mod vigil;

#[cfg(test)]
mod tests;

pub use asker::{Answer, Asker};
pub use certificate::CertificateFacts;
pub(crate) use connect::printable;
pub(crate) use dialer::{Dialer, Dialled};
pub use fallback::{Candidate, OperatorState, Selection, SelectionReason, select};
pub use report::{CheckCode, CheckReport, Failure, Outcome};
pub use schedule::{Event, Handle, STRETCH, Target, TargetId, check_once, resume};
pub use state::{Change, Machine, State, Thresholds};
pub use transition::{Fate, Transition, transition_line};
pub use validate::{HealthError, validate};
pub use vigil::{Sighting, Vigil};
