//! The router's packet filter: who may send what, and the two kinds of
//! translation at the VPC's edge. Text is made by pure functions; `apply` hands
//! it to the `nft` program inside the router's namespace.
//!
//! Invariants: a packet from an ENI whose source the cloud has not assigned to
//! that ENI is dropped and counted; traffic inside the VPC is not tracked
//! unless a load balancer has part in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::ns::{Netns, NsError};

/// Router-side devices of ENIs start with this.
pub const PORT_PREFIX: &str = "eni";
/// The router's device towards the outside.
pub const NAT_DEVICE: &str = "nat0";

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error(transparent)]
    Ns(#[from] NsError),
    #[error("the lab's router needs the `nft` program: apt-get install nftables")]
    Missing,
    #[error("nft: {0}")]
    Run(io::Error),
    #[error("nft refused the router's rules: {0}; does the kernel have nftables with fib and nat?")]
    Refused(String),
    #[error("nft printed counters that cannot be read: {0}")]
    Unreadable(String),
}

/// Packets the router refused, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Source not assigned to the ENI that sent it.
    pub spoofed4: u64,
    pub spoofed6: u64,
    /// Destination that no ENI has.
    pub unassigned4: u64,
    pub unassigned6: u64,
    /// From outside, and no reply to anything.
    pub uninvited: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Tcp,
    Udp,
}

/// Load balancer listeners: address, port and protocol to backends.
pub type Listeners = BTreeMap<(IpAddr, u16, Transport), BTreeSet<SocketAddr>>;

/// The table as it is when the router starts.
pub fn base() -> String {
    format!(
        r#"table inet vpc {{
	counter spoofed4 {{ }}
	counter spoofed6 {{ }}
	counter unassigned4 {{ }}
	counter unassigned6 {{ }}
	counter uninvited {{ }}
	set cidr4 {{ type ipv4_addr; flags interval; auto-merge; }}
	set cidr6 {{ type ipv6_addr; flags interval; auto-merge; }}
	set tracked4 {{ type ipv4_addr; }}
	set tracked6 {{ type ipv6_addr; }}
	chain arrive {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{PORT_PREFIX}*" jump source
		meta nfproto ipv4 fib daddr type unicast fib daddr oif missing counter name unassigned4 drop
		meta nfproto ipv6 fib daddr type blackhole counter name unassigned6 drop
		ip saddr @cidr4 ip daddr @cidr4 ip saddr != @tracked4 ip daddr != @tracked4 notrack
		ip6 saddr @cidr6 ip6 daddr @cidr6 ip6 saddr != @tracked6 ip6 daddr != @tracked6 notrack
	}}
	chain source {{
		icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert, mld-listener-report, mld2-listener-report }} return
		meta nfproto ipv4 fib saddr . iif oif missing counter name spoofed4 drop
		meta nfproto ipv6 fib saddr . iif oif missing counter name spoofed6 drop
	}}
	chain balance {{
		type nat hook prerouting priority dstnat; policy accept;
	}}
	chain edge {{
		type nat hook postrouting priority srcnat; policy accept;
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname "{NAT_DEVICE}" ct state established,related accept
		iifname "{NAT_DEVICE}" ct status dnat accept
		iifname "{NAT_DEVICE}" counter name uninvited drop
	}}
}}
"#
    )
}

/// The block belongs to the VPC.
pub fn add_cidr(net: IpNet) -> String {
    let set = if net.addr().is_ipv4() { "cidr4" } else { "cidr6" };
    format!("add element inet vpc {set} {{ {} }}\n", net.trunc())
}

/// IPv4 leaves the VPC with the NAT gateway's address.
pub fn source_nat(address: Ipv4Addr) -> String {
    format!(
        "flush chain inet vpc edge\nadd rule inet vpc edge oifname \"{NAT_DEVICE}\" ip saddr @cidr4 snat ip to {address}\n"
    )
}

/// All listeners, in place of what was there. The client's address is kept.
pub fn balance(listeners: &Listeners) -> String {
    let mut text =
        String::from("flush chain inet vpc balance\nflush set inet vpc tracked4\nflush set inet vpc tracked6\n");
    let mut tracked = BTreeSet::new();
    for ((vip, port, transport), backends) in listeners {
        // A backend of the other family cannot be reached without a proxy.
        let backends: Vec<_> = backends.iter().filter(|b| b.is_ipv4() == vip.is_ipv4()).collect();
        if backends.is_empty() {
            continue;
        }
        let family = if vip.is_ipv4() { "ip" } else { "ip6" };
        let choices: Vec<String> =
            backends.iter().enumerate().map(|(i, b)| format!("{i} : {} . {}", b.ip(), b.port())).collect();
        let protocol = if *transport == Transport::Tcp { "tcp" } else { "udp" };
        let _ = writeln!(
            text,
            "add rule inet vpc balance {family} daddr {vip} {protocol} dport {port} dnat {family} addr . port to numgen random mod {} map {{ {} }}",
            choices.len(),
            choices.join(", ")
        );
        tracked.insert(*vip);
        tracked.extend(backends.iter().map(|b| b.ip()));
    }
    for address in tracked {
        let set = if address.is_ipv4() { "tracked4" } else { "tracked6" };
        let _ = writeln!(text, "add element inet vpc {set} {{ {address} }}");
    }
    text
}

/// Run `nft` on these commands in the namespace, all or nothing.
pub fn apply(ns: &Netns, commands: &str) -> Result<(), NftError> {
    run(ns, &["-f", "-"], commands).map(drop)
}

pub fn counters(ns: &Netns) -> Result<Counters, NftError> {
    parse_counters(&run(ns, &["-j", "list", "counters", "table", "inet", "vpc"], "")?)
}

pub(crate) fn parse_counters(json: &str) -> Result<Counters, NftError> {
    let bad = |e: &dyn std::fmt::Display| NftError::Unreadable(e.to_string());
    let document: serde_json::Value = serde_json::from_str(json).map_err(|e| bad(&e))?;
    let items = document["nftables"].as_array().ok_or_else(|| bad(&"no list"))?;
    let values: serde_json::Map<String, serde_json::Value> = items
        .iter()
        .filter_map(|item| item.get("counter"))
        .filter_map(|c| Some((c["name"].as_str()?.to_owned(), c["packets"].clone())))
        .collect();
    serde_json::from_value(serde_json::Value::Object(values)).map_err(|e| bad(&e))
}

fn run(ns: &Netns, args: &[&str], input: &str) -> Result<String, NftError> {
    let output = ns.run(|| {
        let mut child = Command::new("nft")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    })?;
    match output {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(NftError::Missing),
        Err(e) => Err(NftError::Run(e)),
        Ok(output) if !output.status.success() => {
            Err(NftError::Refused(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
        Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_name() {
        let json = r#"{"nftables": [{"metainfo": {}},
            {"counter": {"name": "spoofed4", "packets": 3, "bytes": 90}},
            {"counter": {"name": "spoofed6", "packets": 0}}, {"counter": {"name": "unassigned4", "packets": 2}},
            {"counter": {"name": "unassigned6", "packets": 0}}, {"counter": {"name": "uninvited", "packets": 1}}]}"#;
        let counters = parse_counters(json).unwrap();
        assert_eq!((counters.spoofed4, counters.unassigned4, counters.uninvited), (3, 2, 1));
        assert!(parse_counters("{}").is_err());
    }

    #[test]
    fn a_listener_without_backends_of_its_family_translates_nothing() {
        let mut listeners = Listeners::new();
        listeners.insert(
            ("10.0.0.9".parse().unwrap(), 80, Transport::Tcp),
            BTreeSet::from(["[fd00::1]:80".parse().unwrap()]),
        );
        assert!(!balance(&listeners).contains("dnat"));
        listeners.insert(
            ("10.0.0.9".parse().unwrap(), 81, Transport::Tcp),
            BTreeSet::from(["10.0.1.1:8080".parse().unwrap()]),
        );
        let text = balance(&listeners);
        assert!(text.contains("tcp dport 81 dnat ip addr . port to numgen random mod 1 map { 0 : 10.0.1.1 . 8080 }"));
        assert!(text.contains("tracked4 { 10.0.1.1 }"));
    }
}
