//! The rules of the nftables mode as of 1.36, for `nft -f`.
//!
//! A new connection finds its Service's chain by one look-up in a map. Service
//! rules have no counters there; the probed Services have one, so that it can be
//! proved that they are what carried the traffic.

use std::fmt::Write as _;

use anyhow::Context as _;

use super::names::hash;
use crate::bench::services::fleet::{Fleet, NAMESPACE, PORT_NAME, Probe, SERVICE_PORT, ServicePort, name};
use crate::bench::services::place::{POD_CIDR, SERVICE_CIDR, tool};

/// Service ports in one transaction. The kernel looks through a whole transaction
/// for each anonymous map in it: with all in one the time is in its square.
const AT_ONCE: usize = 500;
const TABLE: &str = "ip kube-proxy";

fn base() -> String {
    format!(
        r#"add table {TABLE} {{ comment "rules for kube-proxy" ; }}
delete table {TABLE}
table {TABLE} {{
  comment "rules for kube-proxy"
  set cluster-ips {{ type ipv4_addr; comment "Active ClusterIPs"; }}
  set nodeport-ips {{ type ipv4_addr; comment "IPs that accept NodePort traffic"; elements = {{ 10.8.0.1 }}; }}
  set hairpin-connections {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; comment "service hairpin connections"; }}
  map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; comment "destinations that are subject to LoadBalancerSourceRanges"; }}
  map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; comment "vmap to drop or reject packets to service nodeports with no endpoints"; }}
  map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; comment "vmap to drop or reject packets to services with no endpoints"; }}
  map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; comment "ClusterIP, ExternalIP and LoadBalancer IP traffic"; }}
  map service-nodeports {{ type inet_proto . inet_service : verdict; comment "NodePort traffic"; }}
  chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
  chain reject-chain {{ comment "helper for @no-endpoint-services / @no-endpoint-nodeports"; reject; }}
  chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
  chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
  chain cluster-ips-check {{
    ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
    ip daddr {{ {SERVICE_CIDR} }} drop comment "Drop traffic to unallocated ClusterIPs"
  }}
  chain services {{
    ip daddr @cluster-ips ip saddr != {POD_CIDR} mark set mark or 0x4000 comment "masquerade clusterIP traffic from outside cluster"
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }}
  chain masquerading {{
    mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random
    ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
  }}
  chain filter-prerouting-pre-dnat {{ type filter hook prerouting priority -110; ct state new jump firewall-check; }}
  chain filter-output-pre-dnat {{ type filter hook output priority -110; ct state new jump firewall-check; }}
  chain filter-input {{
    type filter hook input priority 0
    ct state new jump nodeport-endpoints-check
    ct state new jump service-endpoints-check
  }}
  chain filter-forward {{
    type filter hook forward priority 0
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }}
  chain filter-output {{
    type filter hook output priority 0
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }}
  chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
  chain nat-output {{ type nat hook output priority -100; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
"#
    )
}

fn chain(index: usize, protocol: &str) -> String {
    let of = format!("{NAMESPACE}/{}/{protocol}/{PORT_NAME}", name(index));
    format!("service-{}-{of}", hash(&of, 8))
}

/// The counter that a probed Service's rule has.
fn counter(index: usize, protocol: &str) -> String {
    format!("{}-{protocol}", name(index))
}

/// One transaction after the other.
pub fn rules(fleet: &Fleet) -> Vec<String> {
    let ports: Vec<ServicePort> = fleet.ports().collect();
    let mut texts = vec![base()];
    texts.extend(ports.chunks(AT_ONCE).map(|ports| {
        let mut text = String::new();
        let (mut ips, mut services, mut hairpins) = (Vec::new(), Vec::new(), Vec::new());
        for port in ports {
            let ServicePort { vip, protocol, endpoint_port, .. } = *port;
            let chain = chain(port.index, protocol);
            let to: Vec<String> =
                port.endpoints.iter().enumerate().map(|(n, ip)| format!("{n} : {ip} . {endpoint_port}")).collect();
            // Writing to a String cannot fail.
            let _ = writeln!(text, "add chain {TABLE} {chain}");
            let mut counted = String::new();
            if port.probed {
                let counter = counter(port.index, protocol);
                let _ = writeln!(text, "add counter {TABLE} {counter}");
                counted = format!("counter name {counter} ");
            }
            let _ = writeln!(
                text,
                "add rule {TABLE} {chain} meta l4proto {protocol} {counted}dnat ip addr . port to numgen random mod {} map {{ {} }}",
                to.len(),
                to.join(" , ")
            );
            services.push(format!("{vip} . {protocol} . {SERVICE_PORT} : goto {chain}"));
            // One Service, two ports, one address.
            if protocol == "tcp" {
                ips.push(vip.to_string());
            }
            // Several probes have the same endpoints.
            hairpins.extend(port.endpoints.map(|ip| format!("{ip} . {ip} . {protocol} . {endpoint_port}")));
        }
        hairpins.sort_unstable();
        hairpins.dedup();
        let sets = [("service-ips", services), ("cluster-ips", ips), ("hairpin-connections", hairpins)];
        for (set, elements) in sets.iter().filter(|(_, elements)| !elements.is_empty()) {
            let _ = writeln!(text, "add element {TABLE} {set} {{ {} }}", elements.join(" , "));
        }
        text
    }));
    texts
}

/// In the calling thread's namespace.
pub fn apply(text: &str) -> anyhow::Result<()> {
    tool("nft", "-f -", text).map(drop)
}

/// Reads the counters by setting them back: to list them, `nft` would first fetch
/// every chain and map there is, which takes minutes with the most Services.
pub fn translated(probes: &[Probe]) -> anyhow::Result<Vec<u64>> {
    let listed = tool("nft", &format!("reset counters table {TABLE}"), "")?;
    let packets = |index, protocol| {
        let (_, rest) = listed.split_once(&format!("counter {} {{", counter(index, protocol)))?;
        rest.split_once("packets ")?.1.split(' ').next()?.parse::<u64>().ok()
    };
    let of = |probe: &Probe| {
        let both = ["tcp", "udp"].map(|protocol| packets(probe.index, protocol));
        both.into_iter().sum::<Option<u64>>().with_context(|| format!("no counters of {}", name(probe.index)))
    };
    probes.iter().map(of).collect()
}
