//! What the service manager is told, if there is one: `sd_notify(3)`.

use sd_notify::NotifyState;

/// Packets are forwarded, and by whom is decided here.
pub(crate) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// In a line of `systemctl status`.
pub(crate) fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// The daemon ends; what it leaves is said in `status`.
pub(crate) fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// The controller turns. To be called from its own loop and from nowhere else: a controller that is stuck must be
/// found out.
pub(crate) fn turning() {
    if sd_notify::watchdog_enabled().is_some() {
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(state: &[NotifyState<'_>]) {
    // Without NOTIFY_SOCKET nothing is sent.
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("cannot tell the service manager: {error}");
    }
}
