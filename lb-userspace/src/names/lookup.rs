//! One look-up of one name: `/etc/hosts`, then DNS as `/etc/resolv.conf` says. Both files are read each time, so that
//! a change of either is noticed.

use std::{collections::BTreeSet, io, net::IpAddr, time::Duration};

use hickory_resolver::{
    Hosts, TokioResolver,
    config::{ResolveHosts, ResolverConfig, ResolverOpts},
    lookup::Lookup,
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::Query,
        rr::{Name, RecordType},
    },
    system_conf::read_system_conf,
};
use tokio::time::Instant;

use super::known::{Answer, Answers, Families};

/// For an answer from a file, and for the answer that there is no address.
const WITHOUT_TTL: Duration = Duration::from_secs(10);

/// Where names are looked up.
pub(super) struct Sources {
    hosts: Hosts,
    dns: Result<(ResolverConfig, ResolverOpts), String>,
}

impl Sources {
    fn of_this_host() -> Self {
        let dns = read_system_conf().map_err(|error| format!("cannot read /etc/resolv.conf: {error}"));
        // Without the file there are no names in it.
        Self { hosts: Hosts::from_system().unwrap_or_default(), dns }
    }

    async fn look_up(&self, host: &str, families: Families) -> Answers {
        let Ok(name) = Name::from_utf8(host) else {
            return families.each(|_| Err("it is not a host name".to_owned()));
        };
        let in_file = |ipv6| self.hosts.lookup_static_host(&Query::query(name.clone(), record_type(ipv6)));
        // As with glibc: a name that is in the file is not asked for elsewhere, not in the other family either.
        if in_file(false).or_else(|| in_file(true)).is_some() {
            return families.each(|ipv6| {
                let addresses = in_file(ipv6).map(|lookup| addresses(&lookup)).unwrap_or_default();
                Ok((addresses, WITHOUT_TTL))
            });
        }
        let resolver = match self.resolver() {
            Ok(resolver) => resolver,
            Err(problem) => return families.each(|_| Err(problem.clone())),
        };
        let ask = async |wanted: bool, ipv6: bool| match wanted {
            true => Some(answer(resolver.lookup(name.clone(), record_type(ipv6)).await)),
            false => None,
        };
        let (ipv4, ipv6) = tokio::join!(ask(families.ipv4, false), ask(families.ipv6, true));
        Answers { ipv4, ipv6 }
    }

    fn resolver(&self) -> Result<TokioResolver, String> {
        let (config, options) = self.dns.clone()?;
        let options = without_cache(options);
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .map_err(|error| error.to_string())
    }
}

/// Looks a name up in the families that are of use.
pub(super) async fn look_up(host: &str, families: Families) -> Answers {
    match tokio::task::spawn_blocking(Sources::of_this_host).await {
        Ok(sources) => sources.look_up(host, families).await,
        Err(error) => families.each(|_| Err(io::Error::other(error.to_string()).to_string())),
    }
}

/// The file was looked at, and what is known is kept elsewhere.
fn without_cache(mut options: ResolverOpts) -> ResolverOpts {
    options.use_hosts_file = ResolveHosts::Never;
    options.cache_size = 0;
    options
}

fn record_type(ipv6: bool) -> RecordType {
    if ipv6 { RecordType::AAAA } else { RecordType::A }
}

fn addresses(lookup: &Lookup) -> BTreeSet<IpAddr> {
    lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect()
}

fn answer(result: Result<Lookup, NetError>) -> Answer {
    match result {
        Ok(lookup) => {
            let good_for = lookup.valid_until().saturating_duration_since(Instant::now().into_std());
            Ok((addresses(&lookup), good_for))
        }
        Err(error) if error.is_nx_domain() => Err("no such host".to_owned()),
        Err(error) if error.is_no_records_found() => Ok((BTreeSet::new(), WITHOUT_TTL)),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use hickory_resolver::config::{ConnectionConfig, NameServerConfig};
    use tokio::net::UdpSocket;

    use super::*;

    const BOTH: Families = Families { ipv4: true, ipv6: true };

    /// A DNS server on loopback with A and AAAA records for `master-1.example.`, none for `empty.example.`, and
    /// NXDOMAIN for everything else.
    async fn dns_server(ttl: u32) -> Sources {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut query = [0; 512];
            loop {
                let (_, client) = socket.recv_from(&mut query).await.unwrap();
                socket.send_to(&reply(&query, ttl), client).await.unwrap();
            }
        });
        let mut connection = ConnectionConfig::udp();
        connection.port = address.port();
        let server = NameServerConfig::new(address.ip(), true, vec![connection]);
        let config = ResolverConfig::from_parts(None, vec![], vec![server]);
        Sources { hosts: Hosts::default(), dns: Ok((config, ResolverOpts::default())) }
    }

    /// RFC 1035, section 4.
    fn reply(query: &[u8], ttl: u32) -> Vec<u8> {
        let mut end = 12;
        let mut labels = Vec::new();
        while query[end] != 0 {
            let length = usize::from(query[end]);
            labels.push(String::from_utf8(query[end + 1..=end + length].to_vec()).unwrap().to_lowercase());
            end += length + 1;
        }
        let kind = query[end + 2];
        let question = &query[12..end + 5];
        let known = labels == ["master-1", "example"];
        let (code, answers) = match labels[0].as_str() {
            _ if known => (0, 1),
            "empty" => (0, 0),
            _ => (3, 0),
        };
        let mut reply = vec![query[0], query[1], 0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, 0];
        reply.extend_from_slice(question);
        if known {
            reply.extend_from_slice(&[0xc0, 12, 0, kind, 0, 1]);
            reply.extend_from_slice(&ttl.to_be_bytes());
            match kind {
                1 => reply.extend_from_slice(&[0, 4, 10, 0, 0, 1]),
                _ => {
                    reply.extend_from_slice(&[0, 16]);
                    reply.extend_from_slice(&"fd00::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
                }
            }
        }
        reply
    }

    fn texts(answer: &Option<Answer>) -> Vec<String> {
        let (addresses, _) = answer.as_ref().unwrap().as_ref().unwrap();
        addresses.iter().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn dns_gives_both_families_and_a_time_to_live() {
        let sources = dns_server(77).await;
        let answers = sources.look_up("master-1.example.", BOTH).await;
        assert_eq!(
            (texts(&answers.ipv4), texts(&answers.ipv6)),
            (vec!["10.0.0.1".into()], vec!["fd00::1".into()])
        );
        let (_, good_for) = answers.ipv4.unwrap().unwrap();
        assert!(
            (1..=77).contains(&good_for.as_secs()) || good_for == Duration::from_secs(77),
            "{good_for:?}"
        );
        let only = sources.look_up("master-1.example.", Families { ipv4: false, ipv6: true }).await;
        assert!(only.ipv4.is_none() && only.ipv6.is_some());
    }

    #[tokio::test]
    async fn no_address_is_an_answer_and_no_such_name_a_failure() {
        let sources = dns_server(60).await;
        let answers = sources.look_up("empty.example.", BOTH).await;
        assert_eq!((texts(&answers.ipv4), texts(&answers.ipv6)), (vec![], vec![]));
        let answers = sources.look_up("nobody.example.", BOTH).await;
        assert_eq!(answers.ipv4.unwrap().unwrap_err(), "no such host");
    }

    #[tokio::test]
    async fn the_hosts_file_goes_before_dns_and_alone() {
        let mut sources = dns_server(60).await;
        sources.hosts.read_hosts_conf(&b"10.9.9.9 master-1.example master-1\n"[..]).unwrap();
        for host in ["master-1.example", "master-1"] {
            let answers = sources.look_up(host, BOTH).await;
            assert_eq!(
                (texts(&answers.ipv4), texts(&answers.ipv6)),
                (vec!["10.9.9.9".into()], vec![]),
                "{host}"
            );
        }
    }

    #[tokio::test]
    async fn without_dns_the_hosts_file_still_works() {
        let mut sources = Sources { hosts: Hosts::default(), dns: Err("no resolv.conf".to_owned()) };
        sources.hosts.read_hosts_conf(&b"fd00::9 master-1\n"[..]).unwrap();
        assert_eq!(texts(&sources.look_up("master-1", BOTH).await.ipv6), ["fd00::9"]);
        assert_eq!(sources.look_up("other", BOTH).await.ipv4.unwrap().unwrap_err(), "no resolv.conf");
    }
}
