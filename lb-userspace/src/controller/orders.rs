//! What the operator has ordered: kept in the state directory, because a drained master must stay drained whatever
//! happens to the daemon meanwhile.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Backend, Config},
    health::OperatorState,
    state,
};

/// An order about one backend of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Order {
    /// The service's name.
    pub(super) service: String,
    /// The backend's address: its name may change.
    pub(super) backend: SocketAddr,
    /// The host name that had this address, if the backend is one by name: the order stays with it when it moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) host: Option<String>,
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

    /// None, where those that were kept cannot be read. Their file is set aside under another name, for the operator to
    /// look at: the next order would take its place.
    pub(super) fn none(state_dir: &Path) -> Self {
        let path = state_dir.join("orders.json");
        let aside = path.with_extension("json.broken");
        match fs::rename(&path, &aside) {
            Ok(()) => tracing::error!("the file is kept as {}", aside.display()),
            Err(error) => tracing::error!("{}: cannot be set aside: {error}", path.display()),
        }
        Self { path, orders: Vec::new() }
    }

    /// The order about a backend; the empty one where there is none.
    pub(super) fn about(&self, service: &str, backend: SocketAddr) -> Order {
        let found = self.orders.iter().find(|order| order.service == service && order.backend == backend);
        found.cloned().unwrap_or_else(|| Order {
            service: service.to_owned(),
            backend,
            host: None,
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

    /// Gives orders about a backend by name to the address that the name stands for now. They stand at once, also where
    /// that cannot be kept.
    pub(super) fn carry_over(&mut self, config: &Config) -> Result<(), OrdersError> {
        let before = self.orders.clone();
        for service in &config.services {
            for backend in service.backends.iter().filter(|backend| backend.host.is_some()) {
                let of_service = |order: &Order| order.service == service.name;
                let is_about = |order: &Order| {
                    // One of an earlier version knows no names.
                    let same_name = order.host.is_none() || order.host == backend.host;
                    of_service(order) && order.backend == backend.address && same_name
                };
                let moved = |order: &Order| {
                    let stays = |it: &Backend| it.address == order.backend && it.host == order.host;
                    of_service(order) && order.host == backend.host && !service.backends.iter().any(stays)
                };
                let place = self.orders.iter().position(is_about);
                if let Some(place) = place.or_else(|| self.orders.iter().position(moved)) {
                    self.orders[place].backend = backend.address;
                    self.orders[place].host.clone_from(&backend.host);
                }
            }
        }
        if self.orders == before { Ok(()) } else { self.replace(self.orders.clone()) }
    }

    /// Forgets the orders about backends that a configuration does not have. A name that stands for nothing, or for other
    /// addresses, may have its old ones back in a moment; and the cluster's list drops every apiserver that restarts: what was
    /// ordered about one stands when it comes back.
    pub(super) fn forget_others(&mut self, config: &Config) -> Result<(), OrdersError> {
        let exists = |order: &Order| {
            config.services.iter().filter(|service| service.name == order.service).any(|service| {
                let mut names = service.named_backends.iter();
                service.discover.is_some()
                    || service.backends.iter().any(|it| it.address == order.backend)
                    || names.any(|named| Some(&named.host) == order.host.as_ref())
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
            host: None,
            state,
            weight,
            reset_at: None,
        }
    }

    #[test]
    fn orders_are_there_after_a_crash_and_gone_when_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let drain = Order { reset_at: Some(1_800_000_000), ..order(1, OperatorState::Drain, None) };
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

    /// A service with one backend by name, which stands for these addresses, and one by address.
    fn named(last_octets: &[u8]) -> Config {
        let mut config = super::super::backends::tests::config(&["master-1:6443", "10.0.0.9:6443"]);
        config.services[0].backends.extend(last_octets.iter().map(|octet| crate::config::Backend {
            name: format!("master-1@10.0.0.{octet}"),
            address: ([10, 0, 0, *octet], 6443).into(),
            weight: 1,
            host: Some("master-1".to_owned()),
            discovered: false,
        }));
        config
    }

    #[test]
    fn an_order_about_a_name_stays_with_it_wherever_it_moves() {
        let directory = tempfile::tempdir().unwrap();
        let mut orders = Orders::load(directory.path()).unwrap();
        orders
            .take(&[order(1, OperatorState::Drain, Some(3)), order(9, OperatorState::Maint, None)])
            .unwrap();
        // Of an earlier version: the host is not in the file yet.
        orders.carry_over(&named(&[1])).unwrap();
        for addresses in [&[1][..], &[], &[1], &[2], &[], &[3, 4]] {
            let config = named(addresses);
            orders.carry_over(&config).unwrap();
            orders.forget_others(&config).unwrap();
            let state = |octet: u8| orders.about("api", ([10, 0, 0, octet], 6443).into()).state;
            let drained: Vec<_> =
                addresses.iter().copied().filter(|octet| state(*octet) == OperatorState::Drain).collect();
            assert_eq!(drained, addresses.iter().copied().take(1).collect::<Vec<_>>(), "{addresses:?}");
            assert_eq!(state(9), OperatorState::Maint);
            orders = Orders::load(directory.path()).unwrap();
        }
        assert_eq!(orders.about("api", ([10, 0, 0, 3], 6443).into()).weight, Some(3));
        // Two names exchange their addresses: a name is what the operator knows.
        orders
            .take(&[Order { host: Some("master-2".to_owned()), ..order(2, OperatorState::Maint, None) }])
            .unwrap();
        let mut exchanged = named(&[2]);
        let mut other = exchanged.services[0].backends[1].clone();
        (other.address, other.host) = (([10, 0, 0, 3], 6443).into(), Some("master-2".to_owned()));
        exchanged.services[0].backends.push(other);
        orders.carry_over(&exchanged).unwrap();
        assert_eq!(orders.about("api", ([10, 0, 0, 2], 6443).into()).weight, Some(3), "of master-1");
        assert_eq!(orders.about("api", ([10, 0, 0, 3], 6443).into()).state, OperatorState::Maint);
        // The names are not configured any more.
        let without = super::super::backends::tests::config(&["10.0.0.9:6443"]);
        orders.forget_others(&without).unwrap();
        assert_eq!(orders.orders, [order(9, OperatorState::Maint, None)]);
    }

    #[test]
    fn a_broken_file_is_said_and_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("orders.json"), "{").unwrap();
        let error = Orders::load(directory.path()).unwrap_err().to_string();
        assert!(error.contains("orders.json") && error.contains("drain"), "{error}");
        let drain = order(1, OperatorState::Drain, None);
        Orders::none(directory.path()).take(std::slice::from_ref(&drain)).unwrap();
        assert_eq!(std::fs::read(directory.path().join("orders.json.broken")).unwrap(), b"{");
        assert_eq!(Orders::load(directory.path()).unwrap().orders, [drain]);
    }
}
