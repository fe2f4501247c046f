//! A link that its driver takes down for a moment: many network cards start anew when an offload is switched or an XDP
//! program is attached, and have no carrier for some seconds (e1000e, igb, tg3, most of them at some speed).

use std::time::Duration;

use futures_util::TryStreamExt;
use tokio::time::{Instant, sleep};

use super::{Interface, Network, NetworkError, io_error};

/// Longer than any link takes to be negotiated: 3 s at 1000BASE-T, a second or two more with a slow partner.
pub const CARRIER_WAIT: Duration = Duration::from_secs(10);
/// Between two questions. The kernel's notification can be a second late.
const POLL: Duration = Duration::from_millis(50);

impl Network {
    /// The interface as it is now, asked for anew.
    ///
    /// # Errors
    /// When there is no such interface, or the kernel does not answer.
    pub async fn interface_now(&self, index: u32) -> Result<Interface, NetworkError> {
        let mut links = self.requests().link().get().match_index(index).execute();
        let gone = || NetworkError::NoInterface(format!("with index {index}"));
        match links.try_next().await {
            Ok(message) => message.and_then(|message| Interface::from_message(&message)).ok_or_else(gone),
            Err(error) => match io_error(error) {
                source if source.raw_os_error() == Some(libc::ENODEV) => Err(gone()),
                source => Err(NetworkError::Kernel { doing: "ask for an interface", source }),
            },
        }
    }

    /// The interface once it has a carrier, or as it is after `patience`. One that is switched off is not waited for: it
    /// will not come up by itself.
    ///
    /// # Errors
    /// When there is no such interface, or the kernel does not answer.
    pub async fn await_carrier(&self, index: u32, patience: Duration) -> Result<Interface, NetworkError> {
        let begin = Instant::now();
        let mut told = false;
        loop {
            let interface = self.interface_now(index).await?;
            let waited = begin.elapsed();
            if !interface.up || interface.carrier || waited >= patience {
                if told && interface.carrier {
                    tracing::info!(
                        "{}: the carrier is there after {} ms",
                        interface.name,
                        waited.as_millis()
                    );
                }
                return Ok(interface);
            }
            if !told {
                tracing::info!(
                    "{}: no carrier, waiting for it for up to {} s: many network cards start anew when offloads or \
                     programs change",
                    interface.name,
                    patience.as_secs()
                );
                told = true;
            }
            sleep(POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{Peer, in_namespace, ip};

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_carrier_that_comes_back_is_waited_for() {
        in_namespace(async || {
            let peer = Peer::behind("lan", "far");
            let (network, _changes) = Network::open().await.unwrap();
            let index = network.interface_named("lan").unwrap().index;
            peer.ip("link set far down");
            // What the kernel has not told yet is not believed.
            network.stop_following();
            let comes_back = async {
                let before = network.interface_now(index).await.unwrap();
                assert!(before.up && !before.carrier);
                peer.ip("link set far up");
            };
            let (interface, ()) = tokio::join!(network.await_carrier(index, PATIENCE), comes_back);
            assert!(interface.unwrap().carrier);
        });
    }

    #[test]
    fn a_link_without_a_partner_is_not_waited_for_for_ever_and_one_that_is_off_not_at_all() {
        in_namespace(async || {
            let peer = Peer::behind("lan", "far");
            let (network, _changes) = Network::open().await.unwrap();
            let index = network.interface_named("lan").unwrap().index;
            peer.ip("link set far down");
            let begin = Instant::now();
            let interface = network.await_carrier(index, Duration::from_millis(300)).await.unwrap();
            assert!(interface.up && !interface.carrier);
            assert!(begin.elapsed() >= Duration::from_millis(300));
            ip("link set lan down");
            let begin = Instant::now();
            assert!(!network.await_carrier(index, PATIENCE).await.unwrap().up);
            assert!(begin.elapsed() < PATIENCE);
            ip("link del lan");
            let error = network.await_carrier(index, PATIENCE).await.unwrap_err();
            assert!(matches!(error, NetworkError::NoInterface(_)), "{error}");
        });
    }
}
