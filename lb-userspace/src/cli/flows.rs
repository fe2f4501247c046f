//! `sheave flows`

use std::{
    io::{self, BufWriter, Write},
    net::IpAddr,
    process::ExitCode,
    time::Duration,
};

use super::{SocketArgument, block_on, output};
use crate::admin::{Client, Flow, FlowFilter, FlowsError};

const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Read from the flow table while packets flow, and printed as it is read: a table of any size. Flows that both sides have
closed are left out.

  half-open    the handshake is under way; of a backend on this host, also later
  established  proven by the backend
  closing      one side has closed, or a RST was seen
  killed       reset on purpose; both sides are answered with a RST

IDLE is the time since either side's last segment. FROM is what the backend sees as its client.

Examples:
  sheave flows --backend master-1
  sheave flows --client 192.168.2.77
  sheave flows --min-age 1h                 silent for an hour
  sheave flows --json | jq -r .client       one JSON object a line

Exit codes: 0 listed, 1 failed, 2 no such backend or service.")]
pub(super) struct Arguments {
    /// Only those of a client
    #[arg(long, value_name = "ADDRESS")]
    client: Option<IpAddr>,
    /// Only those of a backend: its name, or its address and port
    #[arg(long, value_name = "BACKEND")]
    backend: Option<String>,
    /// Only those of a service
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Only those without a segment for at least so long, such as `10m`
    #[arg(long, value_name = "DURATION", value_parser = super::duration)]
    min_age: Option<Duration>,
    /// The same facts as JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgument,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let filter = FlowFilter {
        client: arguments.client,
        backend: arguments.backend,
        service: arguments.service,
        min_age: arguments.min_age.unwrap_or_default().as_secs(),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let client = Client::new(&arguments.socket.socket, LIMIT);
    let mut any = false;
    let listed = block_on(client.flows(&filter, |flow| {
        if !any && !arguments.json {
            out.write_all(line(["CLIENT", "LISTENER", "BACKEND", "FROM", "STATE", "IDLE"]).as_bytes())?;
        }
        any = true;
        write_flow(&mut out, &flow, arguments.json)?;
        Ok(true)
    }))?;
    match listed.and_then(|()| Ok(out.flush()?)) {
        // Whoever reads has enough (`| head`).
        Err(FlowsError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(FlowsError::Output(error)) => Err(error.into()),
        Err(FlowsError::Client(error)) => Err(error.into()),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

fn write_flow(out: &mut impl Write, flow: &Flow, json: bool) -> io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, flow)?;
        return out.write_all(b"\n");
    }
    let backend = match (&flow.backend, flow.backend_address) {
        (Some(name), _) => output::printable(name),
        (None, Some(address)) => format!("{address} (removed)"),
        (None, None) => "?".to_owned(),
    };
    let listener = flow.listener.map_or_else(|| "?".to_owned(), |listener| listener.to_string());
    let cells = [
        &flow.client.to_string(),
        &listener,
        &backend,
        &flow.source.to_string(),
        &output::printable(&flow.state),
        &format!("{}s", flow.idle_seconds),
    ];
    out.write_all(line(cells.map(String::as_str)).as_bytes())
}

/// Columns of fixed width, as the next flow is not known yet: IPv4 fits, IPv6 moves what follows.
fn line([client, listener, backend, from, state, idle]: [&str; 6]) -> String {
    format!("{client:<21}  {listener:<21}  {backend:<21}  {from:<21}  {state:<11}  {idle}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_is_a_line() {
        let flow = Flow {
            client: ([10, 0, 0, 5], 40_000).into(),
            listener: Some(([10, 0, 0, 100], 6443).into()),
            service: Some("api".to_owned()),
            backend: None,
            backend_address: Some(([10, 0, 0, 1], 6443).into()),
            source: ([10, 0, 0, 100], 1234).into(),
            state: "established".to_owned(),
            answered: true,
            idle_seconds: 7,
        };
        let written = |json| {
            let mut out = Vec::new();
            write_flow(&mut out, &flow, json).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(
            written(false),
            "10.0.0.5:40000         10.0.0.100:6443        10.0.0.1:6443 (removed)  10.0.0.100:1234        \
             established  7s\n"
        );
        let json = written(true);
        assert_eq!(serde_json::from_str::<Flow>(&json).unwrap(), flow);
        assert_eq!(json.matches('\n').count(), 1);
    }
}
