//! The rules of the iptables mode, for `iptables-restore`.
//!
//! A new connection walks `KUBE-SERVICES` rule by rule until one names its
//! address, or all of them when none does.

use std::fmt::Write as _;

use anyhow::Context as _;

use super::names::hash;
use crate::bench::services::fleet::{ENDPOINTS, Fleet, NAMESPACE, PORT_NAME, Probe, SERVICE_PORT, ServicePort, name};
use crate::bench::services::place::{POD_CIDR, tool};

/// Above so many endpoints the rules of Services go without comments.
const LARGE_CLUSTER: usize = 1000;

/// The iptables of the kernel's own tables, not the one that speaks nftables.
const PROGRAM: &str = "iptables-legacy";

const NAT_BASE: &str = "\
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";
const NAT_JUMPS: &str = "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";
const NAT_LAST: &str = "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";
const FILTER: &str = "\
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
";

fn port_name(index: usize) -> String {
    format!("{NAMESPACE}/{}:{PORT_NAME}", name(index))
}

fn service_chain(index: usize, protocol: &str) -> String {
    format!("KUBE-SVC-{}", hash(&format!("{}{protocol}", port_name(index)), 16))
}

pub fn rules(fleet: &Fleet) -> String {
    let large = fleet.services * ENDPOINTS > LARGE_CLUSTER;
    let mut chains = String::from(NAT_BASE);
    let mut services = String::new();
    let mut rest = String::new();
    for port in fleet.ports() {
        one(&port, large, &mut chains, &mut services, &mut rest);
    }
    let canary = ":KUBE-PROXY-CANARY - [0:0]\n";
    format!("{FILTER}*nat\n{canary}{chains}{NAT_JUMPS}{services}{rest}{NAT_LAST}COMMIT\n")
}

fn one(port: &ServicePort, large: bool, chains: &mut String, services: &mut String, rest: &mut String) {
    let ServicePort { vip, protocol, endpoint_port, .. } = *port;
    let full_name = port_name(port.index);
    let chain = service_chain(port.index, protocol);
    let comment = |text: String| if large { String::new() } else { format!("-m comment --comment \"{text}\" ") };
    let at = format!("-m {protocol} -p {protocol} -d {vip} --dport {SERVICE_PORT}");
    let of_ip = comment(format!("{full_name} cluster IP"));
    // Writing to a String cannot fail.
    let _ = writeln!(chains, ":{chain} - [0:0]");
    let _ = writeln!(services, "-A KUBE-SERVICES {of_ip}{at} -j {chain}");
    let _ = writeln!(rest, "-A {chain} {of_ip}{at} ! -s {POD_CIDR} -j KUBE-MARK-MASQ");
    let endpoint_chains = port.endpoints.map(|endpoint| {
        let of = format!("{full_name}{protocol}{endpoint}:{endpoint_port}");
        (endpoint, format!("KUBE-SEP-{}", hash(&of, 16)))
    });
    for (n, (endpoint, to)) in endpoint_chains.iter().enumerate() {
        let of_jump = comment(format!("{full_name} -> {endpoint}:{endpoint_port}"));
        let left = endpoint_chains.len() - n;
        let chance = match left {
            1 => String::new(),
            _ => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
        };
        let _ = writeln!(chains, ":{to} - [0:0]");
        let _ = writeln!(rest, "-A {chain} {of_jump}{chance}-j {to}");
    }
    for (endpoint, chain) in &endpoint_chains {
        let of_name = comment(full_name.clone());
        let _ = writeln!(rest, "-A {chain} {of_name}-s {endpoint} -j KUBE-MARK-MASQ");
        let to = format!("--to-destination {endpoint}:{endpoint_port}");
        let _ = writeln!(rest, "-A {chain} {of_name}-m {protocol} -p {protocol} -j DNAT {to}");
    }
}

/// In the calling thread's namespace.
pub fn restore(text: &str) -> anyhow::Result<()> {
    tool(&format!("{PROGRAM}-restore"), "-w 60 --counters", text).map(drop)
}

/// Read once for all: there is no way to ask the kernel for less than a table.
pub fn translated(probes: &[Probe]) -> anyhow::Result<Vec<u64>> {
    let saved = tool(&format!("{PROGRAM}-save"), "-t nat -c", "")?;
    let of = |probe: &Probe| {
        let starts = ["tcp", "udp"].map(|protocol| format!("-A {} ", service_chain(probe.index, protocol)));
        // Every rule of its chains that leads to an endpoint.
        let counted = saved.lines().filter_map(|line| line.strip_prefix('[')?.split_once("] "));
        let rules =
            counted.filter(|(_, rule)| rule.contains("-j KUBE-SEP-") && starts.iter().any(|s| rule.starts_with(s)));
        let packets = rules.map(|(count, rule)| {
            let packets = count.split(':').next().and_then(|n| n.parse::<u64>().ok());
            packets.with_context(|| format!("no count at {rule:?}"))
        });
        packets.sum()
    };
    probes.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_cluster_goes_without_comments_and_has_eight_rules_a_port() {
        let small = Fleet::of(100).unwrap().remove(0);
        let text = rules(&small);
        assert!(text.contains("--comment \"bench/svc00001:p80 -> 10.128.2.3:7007\" -m statistic --mode random --probability 0.5000000000 -j KUBE-SEP-"));
        let large = Fleet::of(1000).unwrap().remove(0);
        let text = rules(&large);
        assert!(!text.contains("bench/svc"));
        let of_ports = text.lines().filter(|l| l.starts_with("-A KUBE-SVC-") || l.starts_with("-A KUBE-SEP-"));
        assert_eq!(of_ports.count(), 7 * large.ports().count());
        let services: Vec<_> = text.lines().filter(|l| l.starts_with("-A KUBE-SERVICES -m tcp")).collect();
        assert!(services[0].contains("-d 172.21.16.0 "), "in the fleet's order");
        assert_eq!(services.len(), 1000);
    }
}
