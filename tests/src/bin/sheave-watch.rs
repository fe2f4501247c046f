//! An HTTP/2 client with one connection, as kubelet is one: a watch that goes on for ever, and requests beside it.
//! Prints a line for each thing that comes, and ends at the first that does not. By hand:
//! `sheave-watch --ca ca.crt --token lab-token 127.0.0.1:16443`.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http2::{self, SendRequest},
    header::AUTHORIZATION,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lb_tests::stub::credentials::{provider, roots};
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};

/// Watches and asks on one connection.
#[derive(Parser)]
struct Arguments {
    /// PEM certificates that the server must chain to.
    #[arg(long)]
    ca: PathBuf,
    /// A bearer token: whoever has none is sent away after each answer.
    #[arg(long)]
    token: String,
    /// Where to.
    address: SocketAddr,
}

/// An event or an answer that has taken this long is lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two requests.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone)]
struct Client {
    sender: SendRequest<Empty<Bytes>>,
    token: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Arguments { ca, token, address } = Arguments::parse();
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(&ca)?)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(address).await?;
    println!("peer {}", tcp.peer_addr()?);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let tls = connector.connect(ServerName::try_from("localhost")?, tcp).await?;
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await?;
    let client = Client { sender, token };
    tokio::select! {
        ended = connection => bail!("the connection ended: {ended:?}"),
        ended = client.clone().keep_asking() => ended,
        ended = client.watch() => ended,
    }
}

impl Client {
    async fn get(&mut self, path: &str) -> Result<Response<Incoming>> {
        let request = Request::get(format!("https://localhost{path}"));
        let request = request.header(AUTHORIZATION, format!("Bearer {}", self.token)).body(Empty::new())?;
        let response = timeout(PATIENCE, self.sender.send_request(request)).await.context("waiting")??;
        ensure!(response.status() == StatusCode::OK, "GET {path}: {}", response.status());
        Ok(response)
    }

    async fn keep_asking(mut self) -> Result<()> {
        loop {
            let body = self.get("/name").await?.into_body();
            let body = timeout(PATIENCE, body.collect()).await.context("reading")??;
            println!("answer {}", String::from_utf8(body.to_bytes().into())?);
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Every event has the number after the last one's.
    async fn watch(mut self) -> Result<()> {
        let mut body = self.get("/watch").await?.into_body();
        let (mut text, mut expected) = (String::new(), 0u64);
        while let Some(frame) = timeout(PATIENCE, body.frame()).await.context("an event is missing")? {
            let Ok(data) = frame?.into_data() else { continue };
            text.push_str(std::str::from_utf8(&data)?);
            while let Some((line, rest)) = text.split_once('\n') {
                let (server, number) = line.split_once(' ').context("no event")?;
                ensure!(number.parse() == Ok(expected), "event {number} came instead of {expected}");
                println!("event {server} {number}");
                expected += 1;
                text = rest.to_owned();
            }
        }
        bail!("the watch ended")
    }
}
