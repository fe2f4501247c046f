//! The ways in which a stub apiserver can be ill, and the one-line form in which it is told so.

use std::{fmt, str::FromStr, time::Duration};

/// How the health endpoints answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// As a healthy server would.
    #[default]
    Normal,
    /// With this status at once, whoever asks.
    Status(u16),
    /// As a healthy server, but late.
    Late(Duration),
    /// Never.
    Never,
    /// As with a hanging etcd: 500, which takes 4 s when the server has to ask etcd for both its checks, 2 s when
    /// one of them is still held back by its rate limit. Strictly alternating here.
    EtcdHang,
}

/// What happens to new connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Door {
    /// They are served.
    #[default]
    Open,
    /// TCP is accepted, the TLS handshake is left unanswered until the door opens.
    TlsSilent,
    /// They are refused: nobody listens. Open connections stay.
    Refusing,
}

/// One order to a stub, sent over its control socket as a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Change how health endpoints answer.
    Health(Health),
    /// Change what happens to new connections.
    Door(Door),
    /// Report the connections that carried anything but health checks, by source address, as JSON.
    Connections,
    /// Report how many of them there were before the server had started.
    EarlyConnections,
    /// Have these EndpointSlices, a JSON array on one line.
    Slices(String),
    /// Forget old versions of EndpointSlices.
    Compact,
    /// Answer lists and watches of EndpointSlices with this status; 200: as it should.
    ListStatus(u16),
    /// Answer new watches of EndpointSlices, and only those, with this status; 200: as it should.
    WatchStatus(u16),
    /// Report how many lists and watches of EndpointSlices there were, as JSON.
    Listed,
}

impl fmt::Display for Order {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Health(Health::Normal) => write!(formatter, "health normal"),
            Self::Health(Health::Status(status)) => write!(formatter, "health status {status}"),
            Self::Health(Health::Late(delay)) => write!(formatter, "health late {}", delay.as_millis()),
            Self::Health(Health::Never) => write!(formatter, "health never"),
            Self::Health(Health::EtcdHang) => write!(formatter, "health etcd-hang"),
            Self::Door(Door::Open) => write!(formatter, "door open"),
            Self::Door(Door::TlsSilent) => write!(formatter, "door tls-silent"),
            Self::Door(Door::Refusing) => write!(formatter, "door refusing"),
            Self::Connections => write!(formatter, "connections"),
            Self::EarlyConnections => write!(formatter, "early-connections"),
            Self::Slices(json) => write!(formatter, "slices {json}"),
            Self::Compact => write!(formatter, "compact"),
            Self::ListStatus(status) => write!(formatter, "list-status {status}"),
            Self::WatchStatus(status) => write!(formatter, "watch-status {status}"),
            Self::Listed => write!(formatter, "listed"),
        }
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        if let Some(json) = line.strip_prefix("slices ") {
            return Ok(Self::Slices(json.to_owned()));
        }
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |text: &str| text.parse::<u16>().map_err(|error| format!("{text}: {error}"));
        Ok(match words.as_slice() {
            ["health", "normal"] => Self::Health(Health::Normal),
            ["health", "status", status] => Self::Health(Health::Status(number(status)?)),
            ["health", "late", milliseconds] => {
                Self::Health(Health::Late(Duration::from_millis(number(milliseconds)?.into())))
            }
            ["health", "never"] => Self::Health(Health::Never),
            ["health", "etcd-hang"] => Self::Health(Health::EtcdHang),
            ["door", "open"] => Self::Door(Door::Open),
            ["door", "tls-silent"] => Self::Door(Door::TlsSilent),
            ["door", "refusing"] => Self::Door(Door::Refusing),
            ["connections"] => Self::Connections,
            ["early-connections"] => Self::EarlyConnections,
            ["compact"] => Self::Compact,
            ["list-status", status] => Self::ListStatus(number(status)?),
            ["watch-status", status] => Self::WatchStatus(number(status)?),
            ["listed"] => Self::Listed,
            _ => return Err(format!("{line:?} is no order: {ORDERS}")),
        })
    }
}

/// The orders there are, for messages.
pub const ORDERS: &str = "health normal | health status CODE | health late MILLISECONDS | health never | \
                          health etcd-hang | door open | door tls-silent | door refusing | connections | \
                          early-connections | slices JSON | compact | list-status CODE | watch-status CODE | \
                          listed";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Door, Health, Order};

    #[test]
    fn every_order_survives_its_line() {
        let health = [
            Health::Normal,
            Health::Status(500),
            Health::Late(Duration::from_millis(1500)),
            Health::Never,
            Health::EtcdHang,
        ];
        let doors = [Door::Open, Door::TlsSilent, Door::Refusing];
        let orders = health.map(Order::Health).into_iter().chain(doors.map(Order::Door));
        let more = [
            Order::Connections,
            Order::EarlyConnections,
            Order::Slices("[{\"a\": 1}]".to_owned()),
            Order::Compact,
            Order::ListStatus(503),
            Order::WatchStatus(429),
            Order::Listed,
        ];
        for order in orders.chain(more) {
            assert_eq!(order.to_string().parse(), Ok(order));
        }
        assert!("door ajar".parse::<Order>().is_err());
    }
}
