//! Who the apiservers are: the EndpointSlices of the service `default/kubernetes` (`discovery.k8s.io/v1`).

use std::{collections::BTreeSet, net::SocketAddr};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::ObjectList;

use crate::{
    discovery::{Slice, refusal},
    health::Answer,
};

/// Every apiserver's address and port, each once, sorted. Also of those that are not ready: they are backends, and the
/// checks will see.
pub(super) fn read(answer: &Answer) -> Result<Vec<SocketAddr>, String> {
    if answer.status != 200 {
        return Err(refusal(answer.status, "list", "default"));
    }
    if answer.cut {
        return Err("the apiserver's answer is far too long".to_owned());
    }
    let list: ObjectList<EndpointSlice> = serde_json::from_slice(&answer.body)
        .map_err(|_| "the server's answer is no list of EndpointSlices".to_owned())?;
    let places: BTreeSet<SocketAddr> = list.items.iter().flat_map(|slice| Slice::of(slice).places).collect();
    match places.is_empty() {
        true => Err("the service default/kubernetes has no endpoints".to_owned()),
        false => Ok(places.into_iter().collect()),
    }
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
