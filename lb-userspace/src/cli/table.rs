//! The table of `sheave status`.

use clap::builder::styling::{AnsiColor, Style};

use super::output::{Screen, printable};
use crate::admin::{BackendState, BackendStatus, DiscoveryStatus, ServiceStatus, Status};

/// Below this a DETAIL column says nothing.
const DETAIL_MIN: usize = 20;

/// The whole answer of `sheave status`; `now` in seconds since 1970-01-01.
pub(super) fn render(status: &Status, now: u64, screen: Screen) -> String {
    let mut text = String::new();
    for service in &status.services {
        text.push_str(&render_service(service, now, screen));
        text.push('\n');
    }
    text.push_str(&footer(status));
    let flags = status.services.iter().flat_map(|service| {
        service.flags.iter().map(move |flag| format!("{}: {}", service.name, printable(flag)))
    });
    let absent = status
        .vip
        .iter()
        .filter(|vip| !vip.present)
        .map(|vip| format!("the VIP {} is not on this host: it gets no packets for it", vip.address));
    for warning in absent.chain(flags).chain(status.flags.iter().map(|flag| printable(flag))) {
        let style = style(AnsiColor::Yellow.on_default(), screen);
        text.push_str(&format!("{style}warning:{style:#} {warning}\n"));
    }
    text
}

fn style(style: Style, screen: Screen) -> Style {
    if screen.colours { style } else { Style::new() }
}

fn footer(status: &Status) -> String {
    let daemon = &status.daemon;
    let interfaces: Vec<String> = status
        .interfaces
        .iter()
        .map(|interface| {
            let members: Vec<_> = interface.members.iter().map(|name| printable(name)).collect();
            let on =
                if members.is_empty() { String::new() } else { format!(" on {}", members.join(" and ")) };
            format!("{} ({}{on})", printable(&interface.name), printable(&interface.xdp_mode))
        })
        .collect();
    let hook = status.hook.as_ref().filter(|hook| hook.attached);
    let hook = hook.map(|hook| format!("connect hook on {}", printable(&hook.cgroup)));
    let attached = match interfaces.as_slice() {
        [] if hook.is_none() => Some("attached nowhere".to_owned()),
        [] => None,
        names => Some(format!("attached to {}", names.join(", "))),
    };
    let attached = attached.into_iter().chain(hook).collect::<Vec<_>>().join(", ");
    format!(
        "sheave {}, process {}, up {}, {attached}\n",
        printable(&daemon.version),
        daemon.pid,
        elapsed(daemon.uptime_seconds)
    )
}

fn render_service(service: &ServiceStatus, now: u64, screen: Screen) -> String {
    let bold = style(Style::new().bold(), screen);
    let listeners: Vec<String> = service.listen.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "{bold}{}{bold:#}  {}  {}, {}\n",
        printable(&service.name),
        listeners.join(", "),
        printable(&service.balance),
        printable(&service.forward)
    );
    if !service.selection.is_empty() {
        text.push_str(&format!("  new flows: {}\n", printable(&service.selection)));
    }
    if let Some(discovery) = &service.discovery {
        text.push_str(&format!("  cluster: {}\n", printable(&told(discovery, now))));
    }
    text.push_str(&render_backends(&service.backends, now, screen));
    text
}

/// What the cluster lists, and who says so.
fn told(discovery: &DiscoveryStatus, now: u64) -> String {
    let listed = match &discovery.addresses {
        None => "no list yet".to_owned(),
        Some(addresses) if addresses.len() == 1 => "1 address".to_owned(),
        Some(addresses) => format!("{} addresses", addresses.len()),
    };
    let held = (!discovery.held.is_empty()).then(|| format!("{} more held", discovery.held.len()));
    let who = discovery.through.map_or("nobody tells".to_owned(), |through| format!("told by {through}"));
    let heard = discovery.heard.map(|heard| format!("heard of {} ago", elapsed(now.saturating_sub(heard))));
    let parts = [Some(listed), held, Some(who), heard];
    format!("{}: {}", discovery.service, parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

/// A column: its header, and whether numbers stand at its right.
struct Column {
    header: &'static str,
    right: bool,
    cells: Vec<String>,
}

impl Column {
    fn new(header: &'static str, right: bool, cells: impl Iterator<Item = String>) -> Self {
        Self { header, right, cells: cells.collect() }
    }

    fn width(&self) -> usize {
        let widest = self.cells.iter().map(|cell| cell.chars().count()).max();
        widest.unwrap_or(0).max(self.header.len())
    }

    fn pad(&self, cell: &str) -> String {
        let width = self.width();
        if self.right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
    }
}

fn render_backends(backends: &[BackendStatus], now: u64, screen: Screen) -> String {
    let columns = columns(backends, now);
    let widths: usize = columns.iter().map(Column::width).sum();
    // As narrow as the screen asks for: first the gaps, then the column of details.
    let with_gap = |gap: usize| 2 + widths + gap * (columns.len() - 1);
    let gap = match screen.width {
        Some(width) if with_gap(2) > width => 1,
        _ => 2,
    };
    let detail_room = screen.width.map(|width| width.saturating_sub(with_gap(gap) + gap));
    let details_beside = detail_room.is_none_or(|room| room >= DETAIL_MIN);

    let separator = " ".repeat(gap);
    let line = |cells: Vec<String>| format!("  {}", cells.join(&separator)).trim_end().to_owned() + "\n";

    let mut header: Vec<String> = columns.iter().map(|column| column.pad(column.header)).collect();
    if details_beside {
        header.push("DETAIL".to_owned());
    }
    let mut text = line(header);
    for (row, backend) in backends.iter().enumerate() {
        let mut cells: Vec<String> =
            columns.iter().map(|column| cell(column, row, backend, screen)).collect();
        let detail = printable(&backend.check.detail);
        if details_beside {
            cells.push(shorten(&detail, detail_room));
            text.push_str(&line(cells));
        } else {
            text.push_str(&line(cells));
            if backend.state != BackendState::Ready && !detail.is_empty() {
                text.push_str(&format!("    {detail}\n"));
            }
        }
    }
    text
}

fn columns(backends: &[BackendStatus], now: u64) -> Vec<Column> {
    let column = |header, right, cell: &dyn Fn(&BackendStatus) -> String| {
        Column::new(header, right, backends.iter().map(cell))
    };
    let mut columns = vec![column("BACKEND", false, &|backend| printable(&backend.name))];
    if backends.iter().any(|backend| backend.name != backend.address.to_string()) {
        columns.push(column("ADDRESS", false, &|backend| backend.address.to_string()));
    }
    if backends.iter().any(|backend| backend.discovered) {
        columns.push(column("FROM", false, &|backend| {
            if backend.discovered { "cluster" } else { "file" }.to_owned()
        }));
    }
    columns.extend([
        column(STATE, false, &|backend| backend.state.to_string()),
        column("WEIGHT", true, &|backend| backend.weight.to_string()),
        column("FLOWS", true, &|backend| backend.active_flows.to_string()),
        column("TOTAL", true, &|backend| backend.total_flows.to_string()),
        column("LAST CHECK", false, &|backend| printable(&backend.check.to_string())),
        column("SINCE", true, &|backend| match backend.check.last_change {
            Some(change) => elapsed(now.saturating_sub(change)),
            None => "-".to_owned(),
        }),
    ]);
    columns
}

const STATE: &str = "STATE";

fn cell(column: &Column, row: usize, backend: &BackendStatus, screen: Screen) -> String {
    let padded = column.pad(&column.cells[row]);
    if column.header != STATE {
        return padded;
    }
    let style = style(colour(backend.state), screen);
    format!("{style}{padded}{style:#}")
}

fn colour(state: BackendState) -> Style {
    match state {
        BackendState::Ready => AnsiColor::Green.on_default(),
        BackendState::Draining | BackendState::Drain => AnsiColor::Yellow.on_default(),
        BackendState::Silent | BackendState::Dead => AnsiColor::Red.on_default(),
        BackendState::Maint | BackendState::Unknown => Style::new().dimmed(),
    }
}

fn shorten(text: &str, room: Option<usize>) -> String {
    match room {
        Some(room) if text.chars().count() > room => {
            text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
        }
        _ => text.to_owned(),
    }
}

/// The two largest units: `4s`, `3m12s`, `5h02m`, `12d3h`.
fn elapsed(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{CheckStatus, DaemonStatus, InterfaceStatus, VipStatus};

    const NOW: u64 = 1_000_000;
    const PAPER: Screen = Screen { colours: false, width: None };

    fn backend(name: &str, last: u8, state: BackendState, check: CheckStatus) -> BackendStatus {
        BackendStatus {
            name: name.to_owned(),
            address: ([192, 168, 2, last], 6443).into(),
            discovered: false,
            state,
            weight: 1,
            active_flows: 40,
            total_flows: 12_345,
            check,
        }
    }

    fn check(code: &str, http_status: Option<u16>, milliseconds: u64, detail: &str) -> CheckStatus {
        CheckStatus {
            code: code.to_owned(),
            http_status,
            duration_ms: Some(milliseconds),
            detail: detail.to_owned(),
            failed: Vec::new(),
            last_change: Some(NOW - 192),
            certificate_days: Some(89),
            credential_days: None,
        }
    }

    fn three_masters() -> Status {
        Status {
            services: vec![ServiceStatus {
                name: "kube-apiserver".to_owned(),
                listen: vec![([192, 168, 2, 140], 6443).into()],
                balance: "maglev".to_owned(),
                forward: "nat".to_owned(),
                backends: vec![
                    backend(
                        "master-1",
                        151,
                        BackendState::Ready,
                        check("L7OK", Some(200), 4, "Layer7 check passed"),
                    ),
                    backend(
                        "master-2",
                        152,
                        BackendState::Draining,
                        check("L7STS", Some(500), 7, "Layer7 wrong status"),
                    ),
                    backend("master-3", 153, BackendState::Unknown, CheckStatus::default()),
                ],
                selection: "ready backends".to_owned(),
                flags: vec!["the credential was refused (401)".to_owned()],
                discovery: None,
            }],
            vip: vec![VipStatus { address: [192, 168, 2, 140].into(), present: false }],
            interfaces: vec![InterfaceStatus {
                name: "eth0".to_owned(),
                xdp_mode: "native".to_owned(),
                members: Vec::new(),
            }],
            daemon: DaemonStatus { pid: 77, uptime_seconds: 18_120, version: "0.1.0".to_owned() },
            ..Status::default()
        }
    }

    #[test]
    fn on_paper() {
        assert_eq!(
            render(&three_masters(), NOW, PAPER),
            "\
kube-apiserver  192.168.2.140:6443  maglev, nat
  new flows: ready backends
  BACKEND   ADDRESS             STATE     WEIGHT  FLOWS  TOTAL  LAST CHECK        SINCE  DETAIL
  master-1  192.168.2.151:6443  ready          1     40  12345  L7OK/200 in 4ms   3m12s  Layer7 check passed
  master-2  192.168.2.152:6443  draining       1     40  12345  L7STS/500 in 7ms  3m12s  Layer7 wrong status
  master-3  192.168.2.153:6443  unknown        1     40  12345  -                     -

sheave 0.1.0, process 77, up 5h02m, attached to eth0 (native)
warning: the VIP 192.168.2.140 is not on this host: it gets no packets for it
warning: kube-apiserver: the credential was refused (401)
"
        );
    }

    #[test]
    fn on_eighty_columns_nothing_is_wider_and_details_stand_below() {
        let text = render(&three_masters(), NOW, Screen { colours: false, width: Some(80) });
        let rows: Vec<&str> = text.lines().skip(2).take(5).collect();
        assert!(rows.iter().all(|row| row.chars().count() <= 80), "{text}");
        assert_eq!(rows[3], "    Layer7 wrong status", "{text}");
    }

    #[test]
    fn a_bond_names_the_members_that_the_program_is_on() {
        let mut status = three_masters();
        status.interfaces[0].members = vec!["eth1".to_owned(), "eth2".to_owned()];
        let text = render(&status, NOW, PAPER);
        assert!(text.contains("attached to eth0 (native on eth1 and eth2)\n"), "{text}");
    }

    #[test]
    fn without_names_the_address_stands_once() {
        let mut status = three_masters();
        for backend in &mut status.services[0].backends {
            backend.name = backend.address.to_string();
        }
        let text = render(&status, NOW, PAPER);
        assert!(!text.contains("ADDRESS"), "{text}");
        assert_eq!(text.matches("192.168.2.151:6443").count(), 1, "{text}");
    }

    #[test]
    fn what_the_cluster_lists_is_said_and_marked() {
        let mut status = three_masters();
        let service = &mut status.services[0];
        service.backends[2].discovered = true;
        service.discovery = Some(DiscoveryStatus {
            service: "default/kubernetes".to_owned(),
            addresses: Some(vec![service.backends[0].address, service.backends[1].address]),
            held: vec![service.backends[2].address],
            through: Some(service.backends[0].address),
            heard: Some(NOW - 61),
            problem: None,
        });
        let text = render(&status, NOW, PAPER);
        let expected = "  cluster: default/kubernetes: 2 addresses, 1 more held, told by 192.168.2.151:6443, heard of 1m01s ago\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("192.168.2.152:6443  file     draining"), "{text}");
        assert!(text.contains("192.168.2.153:6443  cluster  unknown"), "{text}");
        let discovery = status.services[0].discovery.as_mut().unwrap();
        (discovery.addresses, discovery.through, discovery.heard) = (None, None, None);
        assert!(render(&status, NOW, PAPER).contains("no list yet, 1 more held, nobody tells\n"));
    }

    #[test]
    fn colours_do_not_move_columns_and_are_ours_alone() {
        let mut status = three_masters();
        status.services[0].backends[1].check.detail = "\u{1b}]0;owned\u{7}".to_owned();
        let coloured = render(&status, NOW, Screen { colours: true, width: None });
        assert!(!coloured.contains("\u{1b}]"), "{coloured:?}");
        assert!(coloured.contains("\u{1b}[32mready   \u{1b}[0m"), "{coloured:?}");
    }

    #[test]
    fn elapsed_time_is_short() {
        let texts = [0, 59, 60, 3599, 3600, 86_399, 86_400, 1_000_000].map(elapsed);
        assert_eq!(texts, ["0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d0h", "11d13h"]);
    }

    #[test]
    fn a_service_without_ready_backend_is_noticed() {
        let mut status = three_masters();
        assert!(!status.lacks_ready_backend());
        status.services[0].backends.remove(0);
        assert!(status.lacks_ready_backend());
    }
}
