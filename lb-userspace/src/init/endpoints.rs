//! Who the apiservers are: the EndpointSlices of the service `default/kubernetes` (`discovery.k8s.io/v1`).

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use crate::health::Answer;

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<Slice>,
}

/// Lists that are empty are `null` in Go's JSON.
#[derive(Deserialize)]
struct Slice {
    endpoints: Option<Vec<Endpoint>>,
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
struct Endpoint {
    #[serde(default)]
    addresses: Vec<String>,
}

#[derive(Deserialize)]
struct Port {
    name: Option<String>,
    port: Option<u16>,
}

/// Every apiserver's address and port, each once, sorted. Also of those that are not ready: they are backends, and the
/// checks will see.
pub(super) fn read(answer: &Answer) -> Result<Vec<SocketAddr>, String> {
    match answer.status {
        200 => {}
        401 => return Err(
            "the apiserver does not know the kubeconfig's user (401): has its certificate or token expired?"
                .to_owned(),
        ),
        403 => {
            return Err(
                "the kubeconfig's user may not list endpointslices in the namespace default (403): use one \
                        that may, such as kubeadm's /etc/kubernetes/admin.conf"
                    .to_owned(),
            );
        }
        404 => {
            return Err("the server has no discovery.k8s.io/v1 (404): is it an apiserver of 1.21 or newer?"
                .to_owned());
        }
        other => return Err(format!("the apiserver answered {other}")),
    }
    if answer.cut {
        return Err("the apiserver's answer is far too long".to_owned());
    }
    let list: List = serde_json::from_slice(&answer.body)
        .map_err(|_| "the server's answer is no list of EndpointSlices".to_owned())?;
    let mut places: Vec<SocketAddr> = list.items.iter().flat_map(places).collect();
    places.sort_unstable();
    places.dedup();
    match places.is_empty() {
        true => Err("the service default/kubernetes has no endpoints".to_owned()),
        false => Ok(places),
    }
}

fn places(slice: &Slice) -> Vec<SocketAddr> {
    let ports = slice.ports.as_deref().unwrap_or_default();
    let https = ports.iter().find(|port| port.name.as_deref() == Some("https"));
    let Some(port) = https.or(ports.first()).and_then(|port| port.port) else { return Vec::new() };
    let endpoints = slice.endpoints.as_deref().unwrap_or_default();
    let addresses = endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
    addresses.filter_map(|text| Some(SocketAddr::new(text.parse::<IpAddr>().ok()?, port))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer { status, body: body.as_bytes().to_vec(), cut: false }
    }

    #[test]
    fn slices_of_both_families_become_addresses() {
        let body = r#"{"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1", "metadata": {}, "items": [
            {"metadata": {"name": "kubernetes"}, "addressType": "IPv4",
             "endpoints": [{"addresses": ["10.0.0.2"], "conditions": {"ready": true}},
                           {"addresses": ["10.0.0.1"], "conditions": {"ready": false}}],
             "ports": [{"name": "other", "port": 9}, {"name": "https", "protocol": "TCP", "port": 6443}]},
            {"metadata": {"name": "kubernetes-ipv6"}, "addressType": "IPv6",
             "endpoints": [{"addresses": ["fd00::1"]}], "ports": [{"name": "https", "port": 6443}]},
            {"metadata": {"name": "empty"}, "addressType": "IPv4", "endpoints": null, "ports": null}]}"#;
        let places = read(&answer(200, body)).unwrap();
        let texts: Vec<_> = places.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.0.0.1:6443", "10.0.0.2:6443", "[fd00::1]:6443"]);
    }

    #[test]
    fn what_cannot_be_used_says_what_to_do() {
        for (status, body, said) in [
            (401, "", "has its certificate or token expired?"),
            (403, "", "admin.conf"),
            (404, "", "1.21 or newer"),
            (500, "", "answered 500"),
            (200, "<html>", "no list of EndpointSlices"),
            (200, "{\"items\": []}", "has no endpoints"),
            (
                200,
                "{\"items\": [{\"endpoints\": [{\"addresses\": [\"a\"]}], \"ports\": [{\"port\": 1}]}]}",
                "no endpoints",
            ),
        ] {
            let error = read(&answer(status, body)).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        assert!(read(&Answer { cut: true, ..answer(200, "{") }).unwrap_err().contains("too long"));
    }
}
