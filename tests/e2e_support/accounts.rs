//! Is every address, ENI, link, route and rule accounted for exactly once?
//!
//! Answered twice: by the agents' own audits, and by comparing the cloud's state,
//! the agents' snapshots, the kubelets' pods and what `ip` shows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use fairway::lab::cloud::{Eni, EniKind, EniStatus};
use fairway::lab::site::SiteNode;
use fairway::pool::{AuditReport, PoolSnapshot};
use serde_json::Value;

use super::Lab;

impl Lab {
    /// Until nothing is leaked, doubled or lost on any node.
    pub async fn settled(&self) {
        for index in 0..self.site.nodes.len() {
            self.node_settled(index).await;
        }
        assert_eq!(self.site.cloud.audit(), Vec::<String>::new(), "the cloud's own audit");
    }

    pub async fn node_settled(&self, index: usize) {
        self.node_settled_within(index, Duration::from_secs(30)).await;
    }

    pub async fn node_settled_within(&self, index: usize, patience: Duration) {
        let name = format!("the accounts of {} to balance", self.node(index).name);
        self.until(&name, patience, async || {
            let found = self.accounts(index).await?;
            match found.is_empty() {
                true => Ok(()),
                false => Err(found.join("; ")),
            }
        })
        .await;
        // Its own audit reads twice when it finds something: asked last, once
        // there should be nothing.
        self.until(&name, patience, async || {
            let audit: AuditReport = match serde_json::from_value(self.view(index, "/debug/audit").await?) {
                Ok(audit) => audit,
                Err(e) => return Err(e.to_string()),
            };
            match audit.clean() {
                true => Ok(()),
                false => Err(format!("{audit:?}")),
            }
        })
        .await;
    }

    /// What does not add up on a node, in words.
    async fn accounts(&self, index: usize) -> Result<Vec<String>, String> {
        let node = self.node(index);
        let snapshot = self.view(index, "/debug/pool").await?;
        let pool: PoolSnapshot = serde_json::from_value(snapshot).map_err(|e| e.to_string())?;
        let kernel = Kernel::read(node)?;
        let cloud: Vec<Eni> = self
            .site
            .cloud
            .state()
            .enis
            .into_iter()
            .filter(|e| e.kind != EniKind::Primary && e.tags.get("fairway.io/node") == Some(&node.instance))
            .collect();
        let pods: Vec<_> = node.kubelet.records().into_iter().filter(|r| !r.ended && r.netns.is_some()).collect();
        let mut found = Vec::new();
        let mut wrong = |what: String| found.push(what);

        // Ledger and cloud: the same ENIs, each address once on both sides.
        let ids: BTreeSet<String> = cloud.iter().map(|e| e.id.clone()).collect();
        let known: BTreeSet<String> = pool.enis.iter().filter_map(|e| e.id.as_ref().map(ToString::to_string)).collect();
        if ids != known {
            wrong(format!("ENIs: cloud {ids:?}, ledger {known:?}"));
        }
        for eni in cloud.iter().filter(|e| e.status != EniStatus::InUse) {
            wrong(format!("{} is {}", eni.id, eni.status.as_str()));
        }
        for eni in pool.enis.iter().filter(|e| e.phase != "ready") {
            wrong(format!("ledger: ENI {:?} is {}", eni.id, eni.phase));
        }
        for call in &pool.in_flight {
            wrong(format!("{} of {} is in flight", call.call, call.subject));
        }
        let mut theirs: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for eni in &cloud {
            let addresses = eni.v4.iter().map(|ip| IpAddr::V4(*ip)).chain(eni.v6.iter().map(|ip| IpAddr::V6(*ip)));
            addresses.for_each(|ip| *theirs.entry(ip).or_default() += 1);
        }
        let ours: BTreeSet<IpAddr> =
            pool.addresses.iter().flat_map(|a| std::iter::once(IpAddr::V4(a.v4)).chain(a.v6.map(IpAddr::V6))).collect();
        theirs.iter().filter(|(_, n)| **n > 1).for_each(|(ip, n)| wrong(format!("{ip} is assigned {n} times")));
        theirs
            .keys()
            .filter(|ip| !ours.contains(ip))
            .for_each(|ip| wrong(format!("{ip}: in the cloud, not in the ledger")));
        ours.iter()
            .filter(|ip| !theirs.contains_key(ip))
            .for_each(|ip| wrong(format!("{ip}: in the ledger, not in the cloud")));

        // Leases and pods: one to one.
        let mut leased: BTreeMap<IpAddr, String> = BTreeMap::new();
        for address in &pool.addresses {
            match address.state.as_str() {
                "wired" => {
                    let pod = address.pod.as_ref().map(ToString::to_string).unwrap_or_default();
                    leased.insert(IpAddr::V4(address.v4), pod.clone());
                    address.v6.map(|v6| leased.insert(IpAddr::V6(v6), pod));
                }
                "idle" | "cooling" | "reserved" => {}
                other => wrong(format!("{} is {other}", address.v4)),
            }
        }
        let mut held: BTreeMap<IpAddr, String> = BTreeMap::new();
        for pod in &pods {
            for ip in &pod.ips {
                if let Some(other) = held.insert(*ip, pod.pod.to_string()) {
                    wrong(format!("{ip} is both {other}'s and {}'s", pod.pod));
                }
            }
        }
        if leased != held {
            wrong(format!("leases {leased:?}, pods {held:?}"));
        }

        // The kernel: nothing but what these leases need.
        let devices: BTreeSet<String> = cloud.iter().map(|e| e.mac.to_string()).collect();
        let exclusive: Vec<&Eni> =
            cloud.iter().filter(|e| e.tags.get("fairway.io/purpose").is_some_and(|p| p == "exclusive")).collect();
        let of_exclusive: BTreeSet<IpAddr> = exclusive
            .iter()
            .flat_map(|e| e.v4.iter().map(|ip| IpAddr::V4(*ip)).chain(e.v6.iter().map(|ip| IpAddr::V6(*ip))))
            .collect();
        let in_pods: BTreeSet<String> = exclusive
            .iter()
            .filter(|e| e.v4.iter().any(|ip| held.contains_key(&IpAddr::V4(*ip))))
            .map(|e| e.mac.to_string())
            .collect();
        let expected: BTreeSet<String> = devices.difference(&in_pods).cloned().collect();
        if kernel.enis != expected {
            wrong(format!("ENI devices on the node {:?}, expected {expected:?}", kernel.enis));
        }
        if kernel.links.len() != pods.len() {
            wrong(format!("host links {:?} for {} pods", kernel.links, pods.len()));
        }
        let want_rules: BTreeSet<IpAddr> = held.keys().filter(|ip| !of_exclusive.contains(ip)).copied().collect();
        if kernel.ruled != want_rules {
            wrong(format!("rules for {:?}, pods in veth mode {want_rules:?}", kernel.ruled));
        }
        let allowed: BTreeSet<IpAddr> = held.keys().copied().collect();
        kernel
            .routed
            .iter()
            .filter(|ip| !allowed.contains(ip))
            .for_each(|ip| wrong(format!("a host route to {ip} leads nowhere")));
        want_rules
            .iter()
            .filter(|ip| !kernel.routed.contains(ip))
            .for_each(|ip| wrong(format!("no host route to {ip}")));
        Ok(found)
    }
}

/// What `ip` shows in a node's namespace.
struct Kernel {
    links: BTreeSet<String>,
    /// Hardware addresses of ENIs other than the primary.
    enis: BTreeSet<String>,
    ruled: BTreeSet<IpAddr>,
    routed: BTreeSet<IpAddr>,
}

impl Kernel {
    fn read(node: &SiteNode) -> Result<Self, String> {
        let ns = node.node.ns().name().to_owned();
        let mut kernel =
            Kernel { links: BTreeSet::new(), enis: BTreeSet::new(), ruled: BTreeSet::new(), routed: BTreeSet::new() };

        for link in ip(&ns, &["link", "show"])? {
            let name = text(&link, "ifname");
            if name.len() == 14 && name.starts_with("fw") {
                kernel.links.insert(name);
            } else if name.starts_with("eth") || name.starts_with("eni") {
                // The first is the node's own.
                if name != "eth0" {
                    kernel.enis.insert(text(&link, "address"));
                }
            } else if name != "lo" {
                return Err(format!("what is link {name}?"));
            }
        }
        for family in ["-4", "-6"] {
            for rule in ip(&ns, &[family, "rule", "show"])? {
                let ours = [512, 1536].contains(&rule["priority"].as_u64().unwrap_or_default());
                let addresses = [text(&rule, "src"), text(&rule, "dst")];
                kernel.ruled.extend(addresses.iter().filter(|_| ours).filter_map(|a| a.parse::<IpAddr>().ok()));
            }
            for route in ip(&ns, &[family, "route", "show", "table", "main"])? {
                if text(&route, "dev").starts_with("fw") {
                    kernel.routed.extend(text(&route, "dst").parse::<IpAddr>());
                }
            }
        }
        Ok(kernel)
    }
}

fn text(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or_default().to_owned()
}

/// `ip -j` in a namespace.
pub fn ip(ns: &str, args: &[&str]) -> Result<Vec<Value>, String> {
    let out = Command::new("ip").args(["-n", ns, "-j"]).args(args).output().map_err(|e| e.to_string())?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    if out.stdout.iter().all(u8::is_ascii_whitespace) {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&out.stdout).map_err(|e| format!("ip {args:?}: {e}"))
}
