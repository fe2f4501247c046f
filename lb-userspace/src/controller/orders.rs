//! What the operator has ordered: kept in the state directory, because a drained master must stay drained whatever
//! happens to the daemon meanwhile.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{config::Config, health::OperatorState, state};

/// An order about one backend of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Order {
    /// The service's name.
    pub(super) service: String,
    /// The backend's address: its name may change.
    pub(super) backend: SocketAddr,
    /// Whether it may have new flows.
    #[serde(default)]
    pub(super) state: OperatorState,
    /// Instead of the configured weight.
    #[serde(default)]
    pub(super) weight: Option<u16>,
    /// When its flows are reset, in seconds since 1970; None: never.
    #[serde(default)]
    pub(super) reset_at: Option<u64>,
}

/// All orders that stand.
#[derive(Debug)]
pub(super) struct Orders {
    path: PathBuf,
    orders: Vec<Order>,
}

impl Orders {
    /// Those that were kept.
    pub(super) fn load(state_dir: &Path) -> Result<Self, OrdersError> {
        let path = state_dir.join("orders.json");
        match state::load(&path) {
            Ok(orders) => Ok(Self { path, orders }),
            Err(source) => Err(OrdersError { path, source }),
        }
    }

    /// None, where those that were kept cannot be read.
    pub(super) fn none(state_dir: &Path) -> Self {
        Self { path: state_dir.join("orders.json"), orders: Vec::new() }
    }

    /// The order about a backend; the empty one where there is none.
    pub(super) fn about(&self, service: &str, backend: SocketAddr) -> Order {
        let found = self.orders.iter().find(|order| order.service == service && order.backend == backend);
        found.cloned().unwrap_or_else(|| Order {
            service: service.to_owned(),
            backend,
            state: OperatorState::None,
            weight: None,
            reset_at: None,
        })
    }

    /// Takes orders, in place of earlier ones about the same backends. They stand once they are on the disk: on an
    /// error nothing has changed.
    pub(super) fn take(&mut self, taken: &[Order]) -> Result<(), OrdersError> {
        let mut orders = self.orders.clone();
        orders.retain(|order| {
            !taken.iter().any(|it| (&it.service, it.backend) == (&order.service, order.backend))
        });
        orders.extend(taken.iter().filter(|order| !order.is_empty()).cloned());
        self.replace(orders)
    }

    /// Forgets the orders about backends that a configuration does not have. The cluster's list drops every apiserver
    /// that restarts: what was ordered about one stands when it comes back.
    pub(super) fn forget_others(&mut self, config: &Config) -> Result<(), OrdersError> {
        let exists = |order: &Order| {
            config.services.iter().any(|service| {
                let has_it = || service.backends.iter().any(|it| it.address == order.backend);
                service.name == order.service && (service.discover.is_some() || has_it())
            })
        };
        let orders: Vec<_> = self.orders.iter().filter(|order| exists(order)).cloned().collect();
        if orders == self.orders { Ok(()) } else { self.replace(orders) }
    }

    fn replace(&mut self, orders: Vec<Order>) -> Result<(), OrdersError> {
        let content = (!orders.is_empty()).then_some(&orders);
        state::save(&self.path, content).map_err(|source| OrdersError { path: self.path.clone(), source })?;
        self.orders = orders;
        Ok(())
    }
}

impl Order {
    fn is_empty(&self) -> bool {
        self.state == OperatorState::None && self.weight.is_none()
    }
}

/// The orders could not be read or kept.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}: operator states (drain, maint, weight) are kept there", .path.display())]
pub(super) struct OrdersError {
    path: PathBuf,
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(backend: u8, state: OperatorState, weight: Option<u16>) -> Order {
        Order {
            service: "api".to_owned(),
            backend: ([10, 0, 0, backend], 6443).into(),
            state,
            weight,
            reset_at: None,
        }
    }

    #[test]
    fn orders_are_there_after_a_crash_and_gone_when_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let drain = order(1, OperatorState::Drain, None);
        let heavy = order(2, OperatorState::None, Some(7));
        Orders::load(directory.path()).unwrap().take(&[drain.clone(), heavy.clone()]).unwrap();

        let mut orders = Orders::load(directory.path()).unwrap();
        assert_eq!(orders.about("api", drain.backend), drain);
        assert_eq!(orders.about("api", heavy.backend), heavy);
        assert_eq!(orders.about("other", heavy.backend).weight, None);

        orders.take(&[order(1, OperatorState::None, None)]).unwrap();
        assert_eq!(Orders::load(directory.path()).unwrap().orders, [heavy]);
        orders.take(&[order(2, OperatorState::None, None)]).unwrap();
        assert!(!directory.path().join("orders.json").exists(), "nothing is ordered");
    }

    #[test]
    fn an_order_about_a_backend_that_is_gone_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let mut orders = Orders::load(directory.path()).unwrap();
        orders.take(&[order(1, OperatorState::Maint, None), order(3, OperatorState::Maint, None)]).unwrap();
        let config = super::super::backends::tests::config(&["10.0.0.1:6443", "10.0.0.2:6443"]);
        orders.forget_others(&config).unwrap();
        assert_eq!(Orders::load(directory.path()).unwrap().orders, [order(1, OperatorState::Maint, None)]);
    }

    #[test]
    fn a_broken_file_is_said_and_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("orders.json"), "{").unwrap();
        let error = Orders::load(directory.path()).unwrap_err().to_string();
        assert!(error.contains("orders.json") && error.contains("drain"), "{error}");
    }
}
