//! EndpointSlices (`discovery.k8s.io/v1`), and the addresses in them. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::api::discovery::v1::{EndpointPort, EndpointSlice};

/// The label that says which Service a slice is of.
pub(crate) const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// The port that is meant where a Service has several: that of `default/kubernetes`.
const PORT_NAME: &str = "https";
/// More backends than this are no list of apiservers, and which of them are meant is not for us to guess.
const ADDRESSES_MAX: usize = 128;
/// A slice holds up to 1,000 endpoints, so this is far more than [`ADDRESSES_MAX`] needs.
const SLICES_MAX: usize = 256;

/// What one slice says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slice {
    /// Every address with its port. Also of endpoints that are not ready: they are backends, and the checks will see.
    pub(crate) places: BTreeSet<SocketAddr>,
    /// What of it can be of no use, in words: the first of several.
    pub(crate) junk: Option<String>,
}

impl Slice {
    /// Reads a slice, whatever is in it.
    pub(crate) fn of(slice: &EndpointSlice) -> Self {
        let name = slice.metadata.name.as_deref().unwrap_or("?");
        if slice.endpoints.is_empty() {
            return Self::default();
        }
        let Some(port) = port(slice.ports.as_deref().unwrap_or_default()) else {
            let junk = format!(
                "slice {} has no TCP port that is called {PORT_NAME}, nor a single one without a name",
                printable(name)
            );
            return Self { junk: Some(junk), ..Self::default() };
        };
        let mut read = Self::default();
        for text in slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses) {
            match text.parse::<IpAddr>() {
                Ok(ip) => drop(read.places.insert(SocketAddr::new(ip, port))),
                Err(_) if read.junk.is_none() => {
                    read.junk =
                        Some(format!("{:?} in slice {} is no address", printable(text), printable(name)));
                }
                Err(_) => {}
            }
        }
        read
    }
}

/// The port called `https`, else the only one if it has no name. Another could be anything.
fn port(ports: &[EndpointPort]) -> Option<u16> {
    let is_tcp = |port: &&EndpointPort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    let tcp: Vec<_> = ports.iter().filter(is_tcp).collect();
    let named = |port: &EndpointPort| port.name.clone().unwrap_or_default();
    let called_so = tcp.iter().find(|port| named(port) == PORT_NAME);
    let only = match tcp.as_slice() {
        [only] if named(only).is_empty() => Some(only),
        _ => None,
    };
    let number = called_so.or(only)?.port?;
    u16::try_from(number).ok().filter(|port| *port > 0)
}

/// Whoever wrote it must not break a line or a terminal, nor be endless.
fn printable(text: &str) -> String {
    text.chars().take(64).map(|character| if character.is_control() { '.' } else { character }).collect()
}

/// All slices of a Service, as they are now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Slices(BTreeMap<String, Slice>);

impl Slices {
    /// A slice that is new or another than before. One that is not of this Service is as one that is not there.
    pub(super) fn put(&mut self, slice: &EndpointSlice, service: &str) {
        let Some(name) = slice.metadata.name.clone() else { return };
        let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_LABEL));
        if label.is_some_and(|label| label == service) && self.0.len() <= SLICES_MAX {
            self.0.insert(name, Slice::of(slice));
        } else {
            self.0.remove(&name);
        }
    }

    /// A slice that is gone.
    pub(super) fn remove(&mut self, slice: &EndpointSlice) {
        if let Some(name) = &slice.metadata.name {
            self.0.remove(name);
        }
    }

    /// The addresses in all of them together.
    ///
    /// # Errors
    ///
    /// Why they are not to be believed, in a sentence: a part of them would be a wrong set.
    pub(super) fn listed(&self) -> Result<Listed, String> {
        if self.0.len() > SLICES_MAX {
            return Err(format!("there are more than {SLICES_MAX} slices"));
        }
        let mut addresses = BTreeSet::new();
        for slice in self.0.values() {
            addresses.extend(&slice.places);
            if addresses.len() > ADDRESSES_MAX {
                return Err(format!("it lists more than {ADDRESSES_MAX} addresses, which no apiservers are"));
            }
        }
        let junk = self.0.values().find_map(|slice| slice.junk.clone());
        match junk {
            Some(junk) if addresses.is_empty() => Err(junk),
            junk => Ok(Listed { addresses, junk }),
        }
    }
}

/// What a Service's slices list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) addresses: BTreeSet<SocketAddr>,
    /// What was left out because it can be of no use.
    pub(super) junk: Option<String>,
}

/// What an apiserver means that refuses a list, in words that follow its address.
pub(crate) fn refusal(status: u16, verb: &str, namespace: &str) -> String {
    match status {
        401 => {
            "the apiserver does not know the kubeconfig's user (401): has its certificate or token expired?"
                .to_owned()
        }
        403 => format!(
            "the kubeconfig's user may not {verb} endpointslices in the namespace {namespace} (403): use one \
             that may, such as kubeadm's /etc/kubernetes/admin.conf or that of `sheave rbac --discover {namespace}`"
        ),
        404 => "the server has no discovery.k8s.io/v1 (404): is it an apiserver of 1.21 or newer?".to_owned(),
        other => format!("the apiserver answered {other}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    pub(in crate::discovery) fn slice(name: &str, ports: Value, addresses: &[&str]) -> EndpointSlice {
        let endpoints: Vec<_> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {SERVICE_LABEL: "kubernetes"}},
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": ports,
        }))
        .unwrap()
    }

    fn https() -> Value {
        json!([{"name": "https", "protocol": "TCP", "port": 6443}])
    }

    fn listed(slices: &[EndpointSlice]) -> Result<Vec<String>, String> {
        let mut all = Slices::default();
        slices.iter().for_each(|slice| all.put(slice, "kubernetes"));
        all.listed().map(|listed| listed.addresses.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn slices_come_change_and_go() {
        let mut all = Slices::default();
        all.put(&slice("a", https(), &["10.0.0.2", "10.0.0.1", "10.0.0.1"]), "kubernetes");
        all.put(&slice("b", https(), &["fd00::1"]), "kubernetes");
        let texts = |all: &Slices| -> Vec<String> {
            all.listed().unwrap().addresses.iter().map(ToString::to_string).collect()
        };
        assert_eq!(texts(&all), ["10.0.0.1:6443", "10.0.0.2:6443", "[fd00::1]:6443"]);
        all.put(&slice("a", https(), &["10.0.0.3"]), "kubernetes");
        all.remove(&slice("b", https(), &[]));
        assert_eq!(texts(&all), ["10.0.0.3:6443"]);
        all.put(&slice("a", https(), &["10.0.0.3"]), "other");
        assert!(texts(&all).is_empty(), "its label is another now");
    }

    #[test]
    fn the_port_is_https_or_the_only_one_without_a_name() {
        for (ports, expected) in [
            (json!([{"name": "metrics", "port": 9}, {"name": "https", "port": 6443}]), Some(6443)),
            (json!([{"name": "https", "protocol": "UDP", "port": 9}, {"port": 443}]), Some(443)),
            (json!([{"name": "", "port": 443}]), Some(443)),
            (json!([{"name": "metrics", "port": 9}]), None),
            (json!([{"port": 1}, {"port": 2}]), None),
            (json!([{"name": "https", "port": 70_000}]), None),
            (json!([{"name": "https", "port": -1}]), None),
            (json!([{"name": "https", "port": 0}]), None),
            (json!([{"name": "https"}]), None),
            (json!(null), None),
        ] {
            let read = Slice::of(&slice("a", ports.clone(), &["10.0.0.1"]));
            let ports: Vec<_> = read.places.iter().map(SocketAddr::port).collect();
            assert_eq!(ports, Vec::from_iter(expected), "{read:?}");
            assert_eq!(read.junk.is_some(), expected.is_none(), "{read:?}");
        }
    }

    #[test]
    fn junk_is_left_out_and_named_and_nothing_but_junk_is_no_list() {
        let mut all = Slices::default();
        all.put(&slice("a", https(), &["master-1", "10.0.0.1"]), "kubernetes");
        let some = all.listed().unwrap();
        assert_eq!(some.addresses.len(), 1);
        assert_eq!(some.junk.as_deref(), Some("\"master-1\" in slice a is no address"));
        assert!(listed(&[slice("a", https(), &["\u{1b}[31m", ""])]).unwrap_err().contains("no address"));
        assert!(listed(&[slice("a", json!([]), &["10.0.0.1"])]).unwrap_err().contains("no TCP port"));
        assert_eq!(listed(&[slice("a", json!([]), &[])]), Ok(vec![]), "empty is what it says");
        assert_eq!(listed(&[]), Ok(vec![]));
    }

    #[test]
    fn far_too_many_are_none() {
        let many: Vec<_> = (0..3000).map(|n| format!("10.1.{}.{}", n / 250, n % 250 + 1)).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(listed(&[slice("a", https(), &many[..128])]).unwrap().len(), 128);
        assert!(listed(&[slice("a", https(), &many)]).unwrap_err().contains("more than 128 addresses"));
        let slices: Vec<_> = (0..1000).map(|n| slice(&format!("s{n}"), https(), &["10.0.0.1"])).collect();
        assert!(listed(&slices).unwrap_err().contains("more than 256 slices"));
    }

    prop_compose! {
        fn junk()(
            name in proptest::option::of(".{0,9}"),
            label in prop_oneof![Just("kubernetes".to_owned()), ".{0,5}"],
            ports in proptest::collection::vec(
                (proptest::option::of(prop_oneof![Just("https".to_owned()), ".{0,5}"]), any::<Option<i32>>(),
                 proptest::option::of(prop_oneof![Just("TCP".to_owned()), ".{0,4}"])), 0..4),
            addresses in proptest::collection::vec(
                prop_oneof![any::<IpAddr>().prop_map(|ip| ip.to_string()), ".{0,20}"], 0..9),
        ) -> EndpointSlice {
            let ports: Vec<_> = ports.into_iter()
                .map(|(name, port, protocol)| json!({"name": name, "port": port, "protocol": protocol}))
                .collect();
            serde_json::from_value(json!({
                "metadata": {"name": name, "labels": {SERVICE_LABEL: label}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": addresses}],
                "ports": ports,
            })).unwrap()
        }
    }

    proptest! {
        #[test]
        fn whatever_is_listed_was_written_with_a_port_that_was_meant(
            slices in proptest::collection::vec(junk(), 0..6)
        ) {
            let mut all = Slices::default();
            for slice in &slices {
                all.put(slice, "kubernetes");
            }
            if let Ok(listed) = all.listed() {
                for place in listed.addresses {
                    let says = |slice: &EndpointSlice| {
                        let written = slice.endpoints.iter().flat_map(|it| &it.addresses);
                        let port = slice.ports.iter().flatten().any(|port| {
                            port.port == Some(place.port().into())
                                && ["", "https"].contains(&port.name.as_deref().unwrap_or_default())
                        });
                        port && written.filter_map(|it| it.parse::<IpAddr>().ok()).any(|ip| ip == place.ip())
                    };
                    prop_assert!(slices.iter().any(says), "{place}");
                }
            }
        }
    }
}
