//! From one roster to the next in the data path, while packets flow.
//!
//! What is new is made ready first, and touches nothing that is in use. Then selections change; only then do listeners,
//! and only then is taken out what is gone: no packet falls between.

use std::time::Duration;

use lb_common::layout::INTERFACES;

use super::{Controller, roster::Step};
use crate::{
    config::{OnIdle, Service},
    dataplane::{DataplaneError, IdlePolicy, Listener},
};

/// Of flows whose listener's service is not known any more: the idle timeout's default.
pub(super) const RETIRED_IDLE: IdlePolicy = IdlePolicy { timeout: Duration::from_secs(3 * 3600), tell: true };

/// What becomes of a service's idle flows.
pub(super) fn idle_policy(service: &Service) -> IdlePolicy {
    IdlePolicy { timeout: service.idle_timeout, tell: service.on_idle == OnIdle::Reset }
}

impl Controller {
    /// Makes ready what is new in `self.services` and among `backends` (id, address, whether it is this host).
    pub(super) fn make_ready(
        &mut self,
        steps: &[Step],
        backend: impl Fn(u8) -> Option<(std::net::SocketAddr, bool)>,
    ) -> Result<(), DataplaneError> {
        for step in steps {
            match step {
                Step::OpenService(number) => self.dataplane.clear_service_counters(*number)?,
                Step::AddBackend(id) => self.dataplane.clear_total_flows(*id)?,
                _ => {}
            }
        }
        for step in steps {
            match step {
                Step::OpenService(number) => {
                    let allow = self.services[*number].allow.clone();
                    self.dataplane.set_allowed(*number, &allow)?;
                }
                Step::AddBackend(id) => {
                    if let Some((address, local)) = backend(*id) {
                        self.dataplane.add_backend(*id, address, local);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Opens, moves and closes, once the selections are those of the new roster, which `self.roster` is. `idle` is how long
    /// the flows of a listener that is taken from its service may say nothing, where that is known. Returns what went
    /// wrong.
    pub(super) fn change_over(
        &mut self,
        steps: Vec<Step>,
        idle: impl Fn(u16) -> Option<IdlePolicy>,
    ) -> Vec<String> {
        let mut failures = Vec::new();
        for step in steps {
            match step {
                Step::OpenService(_) | Step::AddBackend(_) => {}
                Step::PlaceListener(id, service) => {
                    let address = self.roster.listeners()[&id].address;
                    // Also on ports that come later.
                    self.dataplane.place_listener(id, &Listener { address, service }, INTERFACES);
                }
                Step::MoveListener(id, service) => self.dataplane.move_listener(id, service),
                Step::RetireListener(id) => {
                    self.dataplane.retire_listener(id, idle(id).unwrap_or(RETIRED_IDLE));
                }
                Step::RetireBackend(id) => self.dataplane.set_accepts(id, false),
                Step::CloseService(number) => {
                    self.choices.retain(|(service, _), _| *service != number);
                    let closed = self.dataplane.close_service(number);
                    failures.extend(closed.err().map(|error| error.to_string()));
                }
            }
        }
        failures
    }
}
