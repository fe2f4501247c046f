//! One connection to one apiserver: the list where it is needed, then a watch for as long as it lasts.

use std::{fmt, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use http_body_util::{LengthLimitError, Limited};
use hyper::{
    Request, Uri,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Client, Resource as _,
    client::Body,
    core::params::{ListParams, WatchParams},
    core::{ObjectList, WatchEvent, request::Request as ApiRequest},
};
use tokio::{sync::Mutex, time::timeout};
use tower::BoxError;

use super::slices::{SERVICE_LABEL, Slices, refusal};
use crate::{
    config::Discover,
    health::{Dialled, printable},
};

/// A list of apiservers takes a few milliseconds, and this where etcd is slow.
const LIST_LIMIT: Duration = Duration::from_secs(10);
/// How long a watch is asked to last: as client-go's shortest. Ends are spread by who began when.
const WATCH_SECONDS: u32 = 290;
/// A watch that says nothing for this long is over, whether its connection knows or not.
const WATCH_LIMIT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);
/// All that a server may send in one answer, a watch included: a slice of 1,000 endpoints has some 200 kB. Afterwards
/// there is another visit.
const BODY_MAX: usize = 8 << 20;
/// hyper's least, and enough for an answer's head.
const HEAD_MAX: usize = 16 << 10;
/// As long as a watch is told that its version is gone, it lists again; but not for ever on one visit.
const LISTS_MAX: u32 = 3;

const LIST: &str = "list";
const WATCH: &str = "watch";

const NO_SLICE: &str = "it sends what is no EndpointSlice";
const USER_AGENT_VALUE: &str = concat!("sheave/", env!("CARGO_PKG_VERSION"), " (discovery)");

/// What is known of the slices from one visit to the next.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    slices: Slices,
    /// From where a watch goes on. None: a list is needed.
    version: Option<String>,
}

impl Progress {
    pub(super) fn slices(&self) -> &Slices {
        &self.slices
    }
}

/// Why a visit has ended.
#[derive(Debug)]
pub(super) enum End {
    /// As watches do: the time was over, or the server has closed it.
    Over,
    /// Before it told anything.
    Failed(String),
    /// In the middle of it, for a reason that the operator should know.
    Broken(String),
}

/// What went wrong with one request.
enum Trouble {
    /// The version is too old for a watch (410): a list is needed.
    Gone,
    Other(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => out.write_str("its watches begin with a version that is gone"),
            Self::Other(text) => out.write_str(text),
        }
    }
}

/// An apiserver that is asked.
pub(super) struct Visit<'d> {
    client: Client,
    discover: &'d Discover,
}

impl<'d> Visit<'d> {
    /// Begins to speak HTTP. `host` is what requests name; `prefix` is before every path.
    pub(super) async fn begin(
        dialled: Dialled,
        (host, prefix): (&str, &str),
        discover: &'d Discover,
    ) -> Result<Self, String> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(HEAD_MAX)
            .handshake::<_, Body>(TokioIo::new(dialled.transport))
            .await
            .map_err(|error| printable(&error.to_string()))?;
        // Ends with its sender. Its errors are seen by whoever waits for an answer.
        tokio::spawn(async move { drop(connection.await) });
        let headers = Headers {
            host: HeaderValue::from_str(host).map_err(|_| "the server's name is no name".to_owned())?,
            authorization: dialled.authorization,
            prefix: prefix.to_owned(),
        };
        let (sender, headers) = (Arc::new(Mutex::new(sender)), Arc::new(headers));
        let service = tower::service_fn(move |request: Request<Body>| {
            send(Arc::clone(&sender), Arc::clone(&headers), request)
        });
        Ok(Self { client: Client::new(service, &discover.namespace), discover })
    }

    /// Lists if it must, then watches, and says so after every change. Ends when the server, time or `overtaken` does.
    pub(super) async fn follow(&self, progress: &mut Progress, mut changed: impl FnMut(&Progress)) -> End {
        let mut told = false;
        for _ in 0..LISTS_MAX {
            if progress.version.is_none() {
                match self.list().await {
                    Ok(listed) => *progress = listed,
                    Err(trouble) if told => return End::Broken(trouble.to_string()),
                    Err(trouble) => return End::Failed(trouble.to_string()),
                }
                told = true;
                changed(progress);
            }
            match self.watch(progress, &mut told, &mut changed).await {
                Ok(()) => return End::Over,
                Err(Trouble::Gone) => progress.version = None,
                Err(Trouble::Other(text)) if told => {
                    progress.version = None;
                    return End::Broken(text);
                }
                Err(Trouble::Other(text)) => return End::Failed(text),
            }
        }
        End::Failed(Trouble::Gone.to_string())
    }

    fn path(&self) -> String {
        EndpointSlice::url_path(&(), Some(&self.discover.namespace))
    }

    fn selector(&self) -> String {
        format!("{SERVICE_LABEL}={}", self.discover.service)
    }

    async fn list(&self) -> Result<Progress, Trouble> {
        let parameters = ListParams::default().labels(&self.selector());
        let request = ApiRequest::new(self.path()).list(&parameters).map_err(not_built)?;
        let text = match timeout(LIST_LIMIT, self.client.request_text(request)).await {
            Ok(answer) => answer.map_err(|error| self.trouble(LIST, &error))?,
            Err(_) => return Err(Trouble::Other("no answer in time".to_owned())),
        };
        let list: ObjectList<EndpointSlice> = serde_json::from_str(&text)
            .map_err(|_| Trouble::Other("its answer is no list of EndpointSlices".to_owned()))?;
        let mut slices = Slices::default();
        list.items.iter().for_each(|slice| slices.put(slice, &self.discover.service));
        Ok(Progress { slices, version: Some(list.metadata.resource_version.unwrap_or_default()) })
    }

    async fn watch(
        &self,
        progress: &mut Progress,
        told: &mut bool,
        changed: &mut impl FnMut(&Progress),
    ) -> Result<(), Trouble> {
        let parameters = WatchParams::default().labels(&self.selector()).timeout(WATCH_SECONDS);
        let version = progress.version.clone().unwrap_or_default();
        let request = ApiRequest::new(self.path()).watch(&parameters, &version).map_err(not_built)?;
        let opening = timeout(LIST_LIMIT, self.client.request_events::<EndpointSlice>(request));
        let Ok(opened) = opening.await else {
            return Err(Trouble::Other("no answer in time".to_owned()));
        };
        let mut events = pin!(opened.map_err(|error| match &error {
            // Also a version that is yet to come: etcd was restored from a backup.
            kube::Error::Api(status) if [400, 410, 504].contains(&status.code) => Trouble::Gone,
            error => self.trouble(WATCH, error),
        })?);
        *told = true;
        changed(progress);
        loop {
            let event = match timeout(WATCH_LIMIT, events.next()).await {
                Ok(Some(Ok(event))) => event,
                // Whoever ends in the middle of a watch is restarted, or gone: no news that another cannot tell.
                Ok(Some(Err(kube::Error::ReadEvents(error)))) if !is_too_long(&error) => return Ok(()),
                Ok(Some(Err(error))) => return Err(self.trouble(WATCH, &error)),
                Ok(None) => return Ok(()),
                Err(_) => return Err(Trouble::Other("its watch fell silent".to_owned())),
            };
            let version = match event {
                WatchEvent::Added(slice) | WatchEvent::Modified(slice) => {
                    progress.slices.put(&slice, &self.discover.service);
                    slice.metadata.resource_version
                }
                WatchEvent::Deleted(slice) => {
                    progress.slices.remove(&slice);
                    slice.metadata.resource_version
                }
                WatchEvent::Bookmark(bookmark) => Some(bookmark.metadata.resource_version),
                WatchEvent::Error(status) => return Err(self.refused(WATCH, status.code)),
            };
            if version.is_some() {
                progress.version = version;
            }
            changed(progress);
        }
    }

    /// `verb` is what was asked for.
    fn refused(&self, verb: &str, status: u16) -> Trouble {
        match status {
            410 => Trouble::Gone,
            // kube takes whatever is an object for a status without a code.
            0 => Trouble::Other(NO_SLICE.to_owned()),
            status => Trouble::Other(refusal(status, verb, &self.discover.namespace)),
        }
    }

    fn trouble(&self, verb: &str, error: &kube::Error) -> Trouble {
        match error {
            kube::Error::Api(status) => self.refused(verb, status.code),
            kube::Error::SerdeError(_) => Trouble::Other(NO_SLICE.to_owned()),
            error if is_too_long(error) => {
                Trouble::Other(format!("it sends more than {} MiB", BODY_MAX >> 20))
            }
            error => Trouble::Other(printable(&root(error).to_string())),
        }
    }
}

/// What was wrong in the first place: layers above repeat it.
fn root<'e>(error: &'e (dyn std::error::Error + 'static)) -> &'e (dyn std::error::Error + 'static) {
    /// No error is wrapped so often.
    const DEPTH_MAX: usize = 16;
    let mut error = error;
    for _ in 0..DEPTH_MAX {
        match error.source() {
            Some(source) => error = source,
            None => break,
        }
    }
    error
}

fn is_too_long(error: &(dyn std::error::Error + 'static)) -> bool {
    root(error).is::<LengthLimitError>()
}

fn not_built(error: kube::core::request::Error) -> Trouble {
    Trouble::Other(format!("cannot be asked: {error}"))
}

/// What every request carries.
struct Headers {
    host: HeaderValue,
    authorization: Option<HeaderValue>,
    prefix: String,
}

/// kube's transport: one connection, one request at a time.
async fn send(
    sender: Arc<Mutex<SendRequest<Body>>>,
    headers: Arc<Headers>,
    mut request: Request<Body>,
) -> Result<hyper::Response<Limited<Incoming>>, BoxError> {
    let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    *request.uri_mut() = format!("{}{path}", headers.prefix).parse::<Uri>()?;
    let all = request.headers_mut();
    all.insert(HOST, headers.host.clone());
    all.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
    all.insert(ACCEPT, HeaderValue::from_static("application/json"));
    if let Some(authorization) = &headers.authorization {
        all.insert(AUTHORIZATION, authorization.clone());
    }
    let mut sender = sender.lock().await;
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    Ok(response.map(|body| Limited::new(body, BODY_MAX)))
}

/// `host:port`, as requests name a server.
pub(super) fn host_of(host: &str, address: SocketAddr) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{}", address.port()),
        false => format!("{host}:{}", address.port()),
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, sync::Mutex as StdMutex};

    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::{Response, service::service_fn};
    use serde_json::{Value, json};

    use super::*;

    /// Answers each request with the next of some statuses and bodies, and remembers what it was asked.
    fn server(answers: Vec<(u16, String)>) -> (Dialled, Arc<StdMutex<Vec<String>>>) {
        let (client, server) = tokio::io::duplex(1 << 16);
        let asked: Arc<StdMutex<Vec<String>>> = Arc::default();
        let seen = Arc::clone(&asked);
        let answers = StdMutex::new(answers.into_iter());
        let service = service_fn(move |request: Request<Incoming>| {
            let header =
                |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
            let line = format!("{:?} {:?} {}", header(HOST), header(AUTHORIZATION), request.uri());
            seen.lock().unwrap().push(line);
            let (status, body) = answers.lock().unwrap().next().expect("no more questions");
            let response = Response::builder().status(status).body(Full::new(Bytes::from(body)));
            async { Ok::<_, Infallible>(response.unwrap()) }
        });
        tokio::spawn(async move {
            let serving =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service);
            drop(serving.await);
        });
        let authorization = Some(HeaderValue::from_static("Bearer lab"));
        (Dialled { transport: Box::new(client), authorization }, asked)
    }

    fn discover() -> Discover {
        Discover {
            kubeconfig: "/k".into(),
            namespace: "default".to_owned(),
            service: "kubernetes".to_owned(),
            replace: false,
        }
    }

    fn slice(version: u64, address: &str) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "kubernetes", "resourceVersion": version.to_string(), "managedFields": [{"junk": 1}],
                         "labels": {SERVICE_LABEL: "kubernetes"}},
            "endpoints": [{"addresses": [address], "conditions": {}}], "ports": [{"name": "https", "port": 6443}],
        })
    }

    fn list(version: u64, address: &str) -> (u16, String) {
        let items = [slice(version, address)];
        let kind = "EndpointSliceList";
        let version = version.to_string();
        let list = json!({"apiVersion": "discovery.k8s.io/v1", "kind": kind, "metadata": {"resourceVersion": version}, "items": items});
        (200, list.to_string())
    }

    fn events(events: &[(&str, Value)]) -> (u16, String) {
        let line = |(kind, object): &(&str, Value)| format!("{}\n", json!({"type": kind, "object": object}));
        (200, events.iter().map(line).collect())
    }

    fn bookmark(version: u64) -> Value {
        json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": {"resourceVersion": version.to_string()}})
    }

    fn gone() -> Value {
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "too old",
               "reason": "Expired", "code": 410})
    }

    /// The lists that were told, how it ended, and what was asked for.
    async fn follow(progress: &mut Progress, answers: Vec<(u16, String)>) -> (Vec<String>, End, Vec<String>) {
        let (dialled, asked) = server(answers);
        let discover = discover();
        let visit = Visit::begin(dialled, ("kubernetes:6443", "/prefix"), &discover).await.unwrap();
        let mut told: Vec<String> = Vec::new();
        let end = visit
            .follow(progress, |progress| {
                let listed = progress.slices().listed().map(|listed| {
                    listed.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
                });
                let text = listed.unwrap_or_else(|problem| problem);
                if told.last() != Some(&text) {
                    told.push(text);
                }
            })
            .await;
        let asked = asked.lock().unwrap().clone();
        (told, end, asked)
    }

    #[tokio::test]
    async fn a_list_then_a_watch_and_the_next_visit_goes_on_from_there() {
        let mut progress = Progress::default();
        let watched = events(&[
            ("MODIFIED", slice(8, "10.0.0.2")),
            ("DELETED", slice(9, "10.0.0.2")),
            ("ADDED", slice(10, "10.0.0.3")),
            ("BOOKMARK", bookmark(12)),
        ]);
        let (told, end, asked) = follow(&mut progress, vec![list(7, "10.0.0.1"), watched]).await;
        assert_eq!(told, ["10.0.0.1:6443", "10.0.0.2:6443", "", "10.0.0.3:6443"]);
        assert!(matches!(end, End::Over), "{end:?}");
        let path = "/prefix/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?";
        for line in &asked {
            assert!(
                line.starts_with(&format!("Some(\"kubernetes:6443\") Some(\"Bearer lab\") {path}")),
                "{line}"
            );
            assert!(line.contains("labelSelector=kubernetes.io%2Fservice-name%3Dkubernetes"), "{line}");
        }
        assert!(!asked[0].contains("watch=") && asked[1].contains("watch=true"), "{asked:?}");
        assert!(
            asked[1].contains("resourceVersion=7") && asked[1].contains("allowWatchBookmarks=true"),
            "{asked:?}"
        );
        let (_, _, asked) = follow(&mut progress, vec![events(&[])]).await;
        assert!(asked.len() == 1 && asked[0].contains("resourceVersion=12"), "{asked:?}");
    }

    #[tokio::test]
    async fn a_version_that_is_gone_asks_for_a_list_and_not_for_ever() {
        let answers = || {
            vec![
                list(7, "10.0.0.1"),
                events(&[("ERROR", gone())]),
                list(20, "10.0.0.2"),
                (410, gone().to_string()),
                list(30, "10.0.0.3"),
                (504, String::new()),
            ]
        };
        let (told, end, asked) = follow(&mut Progress::default(), answers()).await;
        assert_eq!(told, ["10.0.0.1:6443", "10.0.0.2:6443", "10.0.0.3:6443"]);
        assert!(matches!(&end, End::Failed(text) if text.contains("gone")), "{end:?}");
        assert_eq!(asked.len(), 6);
    }

    #[tokio::test]
    async fn what_is_no_list_and_what_is_no_event_says_so() {
        for (answer, said) in [
            ((403, String::new()), "may not list endpointslices in the namespace default (403)"),
            ((401, String::new()), "has its certificate or token expired?"),
            ((500, "<html>".to_owned()), "answered 500"),
            ((200, "<html>".to_owned()), "no list of EndpointSlices"),
            ((200, "{\"items\": [{\"endpoints\": 3}]}".to_owned()), "no list of EndpointSlices"),
            ((200, " ".repeat(BODY_MAX + 1)), "more than 8 MiB"),
        ] {
            let (told, end, _) = follow(&mut Progress::default(), vec![answer]).await;
            assert!(matches!(&end, End::Failed(text) if text.contains(said)), "{said}: {end:?}");
            assert_eq!(told, Vec::<String>::new());
        }
        let mut junk = slice(8, "10.0.0.2");
        junk["ports"] = "https".into();
        for (lines, said) in [
            ((403, String::new()), "may not watch endpointslices in the namespace default (403)"),
            ((429, String::new()), "answered 429"),
            (events(&[("MODIFIED", junk)]), "no EndpointSlice"),
            ((200, "junk\n".to_owned()), "no EndpointSlice"),
            ((200, "a".repeat(BODY_MAX + 1)), "more than 8 MiB"),
        ] {
            let (told, end, _) = follow(&mut Progress::default(), vec![list(7, "10.0.0.1"), lines]).await;
            assert!(matches!(&end, End::Broken(text) if text.contains(said)), "{said}: {end:?}");
            assert_eq!(told, ["10.0.0.1:6443"]);
        }
    }
}
