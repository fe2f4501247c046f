//! Where each VIP is, and whether somebody else answers for it.

use super::{Finding, failure, listeners, note, ok};
use crate::{
    config::{Config, VipMode},
    network::{Network, display_mac},
    vip,
};

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for vip in listeners(config) {
        let subject = format!("VIP {vip}");
        if let Some(interface) = network.interface_carrying(vip).and_then(|it| network.interface(it).ok()) {
            let is_address = network.local_addresses().iter().any(|local| local.address == vip);
            let how = if is_address { "" } else { ", by a route (`ip route show table local`)" };
            findings.push(ok(subject, format!("is here, on {}{how}", interface.name)));
            continue;
        }
        findings.push(match (vip::holder(network, vip).await, config.vip.mode) {
            (Ok(Some(mac)), VipMode::Follow) => note(
                subject,
                format!("is on another host now ({}); sheave works when it comes here", display_mac(&mac)),
            ),
            (Ok(Some(mac)), VipMode::Own) => {
                failure(subject, format!("{} answers for it; sheave will refuse to start", display_mac(&mac)))
                    .fix("stop its owner, or set vip.mode = \"follow\"")
            }
            (Ok(None), VipMode::Follow) => failure(
                subject,
                "is nowhere: nobody answers for it, and vip.mode = \"follow\" leaves it to others",
            )
            .fix("start keepalived or kube-vip, or set vip.mode = \"own\""),
            (Ok(None), VipMode::Own) => ok(subject, "is free; sheave will put it here"),
            (Err(error), VipMode::Follow) => {
                note(subject, format!("is not here, and nobody can be asked for it: {error}"))
            }
            (Err(error), VipMode::Own) => failure(subject, error.to_string()),
        });
    }
    findings
}
