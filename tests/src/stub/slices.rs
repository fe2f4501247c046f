//! The EndpointSlices of the namespace `default`: list and watch, as the watch cache of a kube-apiserver serves them.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Channel, Full};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, interval_at},
};

use super::responses::Body;

/// The real server sends one a minute.
const BOOKMARK_EVERY: Duration = Duration::from_millis(500);

/// What there is, and what became of it.
#[derive(Debug, Default)]
pub(super) struct Slices {
    state: watch::Sender<State>,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    /// Older versions are compacted.
    oldest: u64,
    items: BTreeMap<String, Value>,
    /// Every change, and the version it brought about.
    log: Vec<(u64, Value)>,
    /// Instead of an answer.
    refuses_with: Option<StatusCode>,
    /// Instead of an answer to a watch.
    refuses_watches_with: Option<StatusCode>,
    lists: u64,
    watches: u64,
}

impl Slices {
    /// These, and no others, from now on. Items are known by `metadata.name`.
    pub(super) fn replace(&self, items: Vec<Value>) {
        self.state.send_modify(|state| {
            let name = |item: &Value| item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let mut after: BTreeMap<_, _> = items.into_iter().map(|item| (name(&item), item)).collect();
            let before = std::mem::take(&mut state.items);
            for (name, item) in &before {
                if !after.contains_key(name) {
                    state.note("DELETED", item.clone());
                }
            }
            for (name, item) in &mut after {
                let kind = match before.get(name) {
                    None => "ADDED",
                    Some(old) if bare(old) == bare(item) => {
                        *item = old.clone();
                        continue;
                    }
                    Some(_) => "MODIFIED",
                };
                *item = state.note(kind, item.clone());
            }
            state.items = after;
        });
    }

    /// Forgets all versions but the present one; watches are told so, whatever they have seen.
    pub(super) fn compact(&self) {
        self.state.send_modify(|state| {
            state.version += 1;
            state.oldest = state.version;
            state.log.clear();
        });
    }

    /// Answers lists and watches with this status; `OK`: as it should.
    pub(super) fn refuse_with(&self, status: StatusCode) {
        self.state.send_modify(|state| state.refuses_with = Some(status).filter(|it| *it != StatusCode::OK));
    }

    /// Answers new watches with this status; `OK`: as it should.
    pub(super) fn refuse_watches_with(&self, status: StatusCode) {
        let status = Some(status).filter(|it| *it != StatusCode::OK);
        self.state.send_modify(|state| state.refuses_watches_with = status);
    }

    /// How many lists and watches there were.
    pub(super) fn asked(&self) -> Value {
        let state = self.state.borrow();
        json!({"lists": state.lists, "watches": state.watches})
    }

    /// The answer to a request with this query.
    pub(super) fn answer(&self, query: &str) -> Result<Response<Body>, StatusCode> {
        if let Some(status) = self.state.borrow().refuses_with {
            return Err(status);
        }
        let parameter = |name: &str| {
            query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
        };
        if ["1", "true"].contains(&parameter("watch")) {
            let bookmarks = parameter("allowWatchBookmarks") == "true";
            self.state.send_modify(|state| state.watches += 1);
            if let Some(status) = self.state.borrow().refuses_watches_with {
                return Err(status);
            }
            return Ok(Response::new(
                self.watch(parameter("resourceVersion").parse().unwrap_or(0), bookmarks),
            ));
        }
        self.state.send_modify(|state| state.lists += 1);
        let state = self.state.borrow();
        let list = json!({
            "kind": "EndpointSliceList",
            "apiVersion": "discovery.k8s.io/v1",
            "metadata": {"resourceVersion": state.version.to_string()},
            "items": state.items.values().collect::<Vec<_>>(),
        });
        Ok(Response::new(Full::from(list.to_string()).map_err(|never| match never {}).boxed()))
    }

    fn watch(&self, from: u64, bookmarks: bool) -> Body {
        let (mut sender, body) = Channel::<Bytes, hyper::Error>::new(1);
        let mut states = self.state.subscribe();
        tokio::spawn(async move {
            let mut seen = from;
            let mut ticks = interval_at(Instant::now() + BOOKMARK_EVERY, BOOKMARK_EVERY);
            loop {
                let (lines, over) = states.borrow_and_update().since(&mut seen);
                for line in lines {
                    if sender.send_data(format!("{line}\n").into()).await.is_err() {
                        return;
                    }
                }
                if over {
                    return;
                }
                tokio::select! {
                    changed = states.changed() => if changed.is_err() { return },
                    _ = ticks.tick() => {
                        let line = event("BOOKMARK", json!({
                            "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
                            "metadata": {"resourceVersion": seen.to_string(), "creationTimestamp": null},
                            "endpoints": null, "ports": null, "addressType": "",
                        }));
                        if bookmarks && sender.send_data(format!("{line}\n").into()).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        body.boxed()
    }
}

impl State {
    /// Puts an object under the next version.
    fn note(&mut self, kind: &str, mut object: Value) -> Value {
        self.version += 1;
        object["kind"] = "EndpointSlice".into();
        object["apiVersion"] = "discovery.k8s.io/v1".into();
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.log.push((self.version, event(kind, object.clone())));
        object
    }

    /// What a watch has not seen yet, and whether it ends with it.
    fn since(&self, seen: &mut u64) -> (Vec<Value>, bool) {
        if *seen < self.oldest || *seen > self.version {
            let message = format!("too old resource version: {seen} ({})", self.oldest);
            let gone = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": message, "reason": "Expired", "code": 410,
            });
            return (vec![event("ERROR", gone)], true);
        }
        let new = self.log.iter().filter(|(version, _)| version > seen);
        let lines = new.map(|(_, event)| event.clone()).collect();
        *seen = self.version;
        (lines, false)
    }
}

fn event(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

/// An item as a test writes it, without what the server adds.
fn bare(item: &Value) -> Value {
    let mut item = item.clone();
    if let Some(object) = item.as_object_mut() {
        object.remove("kind");
        object.remove("apiVersion");
    }
    item["metadata"]["resourceVersion"] = Value::Null;
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &str, address: &str) -> Value {
        json!({"metadata": {"name": name}, "endpoints": [{"addresses": [address]}]})
    }

    fn kinds(state: &State, seen: &mut u64) -> Vec<String> {
        let (lines, _) = state.since(seen);
        lines.iter().map(|line| line["type"].as_str().unwrap_or_default().to_owned()).collect()
    }

    #[test]
    fn a_watch_sees_what_changes_and_no_more() {
        let slices = Slices::default();
        let mut seen = 0;
        slices.replace(vec![item("a", "10.0.0.1"), item("b", "10.0.0.2")]);
        assert_eq!(kinds(&slices.state.borrow(), &mut seen), ["ADDED", "ADDED"]);
        slices.replace(vec![item("a", "10.0.0.3"), item("b", "10.0.0.2")]);
        assert_eq!(kinds(&slices.state.borrow(), &mut seen), ["MODIFIED"]);
        slices.replace(vec![item("a", "10.0.0.3")]);
        assert_eq!(kinds(&slices.state.borrow(), &mut seen), ["DELETED"]);
        slices.compact();
        assert_eq!(kinds(&slices.state.borrow(), &mut seen), ["ERROR"]);
    }
}
