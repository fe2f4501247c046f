//! Firewall rules that no longer see the clients' packets: XDP runs before netfilter.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::{process::Command, time::timeout};

use super::{Finding, note, warning};
use crate::config::Config;

const FIX: &str = "put the prefixes that may connect into the service's `allow`";

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let ports: BTreeSet<u16> = listeners(config).map(|listener| listener.port()).collect();
    let mut findings = Vec::new();
    if let Some(ruleset) = output_of("nft", &["-j", "list", "ruleset"]).await
        && let Ok(ruleset) = serde_json::from_str(&ruleset)
    {
        findings.extend(nftables(&ruleset, &ports));
    }
    for program in ["iptables-save", "ip6tables-save"] {
        if let Some(rules) = output_of(program, &[]).await {
            findings.extend(iptables(program, &rules, &ports));
        }
    }
    findings
}

fn listeners(config: &Config) -> impl Iterator<Item = &SocketAddr> {
    config.services.iter().flat_map(|service| &service.listen)
}

/// What a program prints; None when it is not installed, fails or hangs.
async fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let command = Command::new(program).args(arguments).kill_on_drop(true).output();
    let output = timeout(Duration::from_secs(5), command).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The findings for the output of `nft -j list ruleset`.
fn nftables(ruleset: &Value, ports: &BTreeSet<u16>) -> Vec<Finding> {
    let items = ruleset["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    items
        .iter()
        .filter_map(|item| dropping_chain(&item["chain"]).or_else(|| bypassed_rule(&item["rule"], ports)))
        .collect()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("?")
}

fn dropping_chain(chain: &Value) -> Option<Finding> {
    if chain["hook"] != "input" || chain["policy"] != "drop" {
        return None;
    }
    let name = [text(chain, "family"), text(chain, "table"), text(chain, "name")].join(" ");
    let what = format!(
        "the nftables chain {name} drops what no rule accepts, but clients of a listener no longer pass it"
    );
    Some(note("firewall", what).fix(FIX))
}

fn bypassed_rule(rule: &Value, ports: &BTreeSet<u16>) -> Option<Finding> {
    let names_port = |expression: &Value| {
        let matched = &expression["match"];
        let field = &matched["left"]["payload"];
        let is_port = field["field"] == "dport" && matches!(field["protocol"].as_str(), Some("tcp" | "th"));
        is_port && ports.iter().any(|port| holds(&matched["right"], *port))
    };
    rule["expr"].as_array()?.iter().any(names_port).then(|| {
        let name = [text(rule, "family"), text(rule, "table"), text(rule, "chain")].join(" ");
        let what = format!(
            "the nftables rule {name} handle {} is about a listener's port, but XDP takes these packets before it",
            rule["handle"]
        );
        warning("firewall", what).fix(FIX)
    })
}

/// Whether the right-hand side of a match contains a port: a number, a range, or a set of either.
fn holds(right: &Value, port: u16) -> bool {
    if let Some([low, high]) = right["range"].as_array().map(Vec::as_slice) {
        return low.as_u64() <= Some(port.into()) && high.as_u64() >= Some(port.into());
    }
    match right["set"].as_array() {
        Some(members) => members.iter().any(|member| holds(member, port)),
        None => right.as_u64() == Some(port.into()),
    }
}

/// The findings for the output of `iptables-save`.
fn iptables(program: &str, rules: &str, ports: &BTreeSet<u16>) -> Vec<Finding> {
    let names_port = |rule: &str| {
        let mut words = rule.split_whitespace();
        let mut lists = std::iter::from_fn(|| {
            words.find(|word| matches!(*word, "--dport" | "--dports"))?;
            words.next()
        });
        lists.any(|list| ports.iter().any(|port| list_holds(list, *port)))
    };
    let is_bypassed =
        |rule: &&str| rule.starts_with("-A INPUT") && rule.contains("-p tcp") && names_port(rule);
    let finding = |rule| {
        let what = format!(
            "the {} rule `{rule}` is about a listener's port, but XDP takes these packets before it",
            program.trim_end_matches("-save")
        );
        warning("firewall", what).fix(FIX)
    };
    rules.lines().filter(is_bypassed).map(finding).collect()
}

/// Whether `80,443,6000:6999` contains a port.
fn list_holds(list: &str, port: u16) -> bool {
    list.split(',').any(|part| {
        let (low, high) = part.split_once(':').unwrap_or((part, part));
        let bound = |text: &str, open: u16| if text.is_empty() { Ok(open) } else { text.parse() };
        matches!((bound(low, 0), bound(high, u16::MAX)), (Ok(low), Ok(high)) if (low..=high).contains(&port))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iptables_rules_about_a_listener_are_found() {
        let rules = "*filter\n:INPUT DROP [0:0]\n\
            -A INPUT -p tcp -m tcp --dport 6443 -j ACCEPT\n\
            -A INPUT -p tcp -m multiport --dports 80,6000:7000 -j DROP\n\
            -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n\
            -A INPUT -p udp -m udp --dport 6443 -j ACCEPT\n\
            -A FORWARD -p tcp -m tcp --dport 6443 -j ACCEPT\nCOMMIT\n";
        let findings = iptables("iptables-save", rules, &[6443].into());
        let found: Vec<_> = findings.iter().map(|finding| finding.what.split('`').nth(1).unwrap()).collect();
        assert_eq!(
            found,
            [
                "-A INPUT -p tcp -m tcp --dport 6443 -j ACCEPT",
                "-A INPUT -p tcp -m multiport --dports 80,6000:7000 -j DROP"
            ]
        );
    }
}
