//! From the API's objects to ours, with everything in them checked.
//!
//! Pure. The API server has validated what it stores, yet an aggregated or
//! older one may not have: an object that cannot be is refused with a reason,
//! alone, and nothing of it gets any further.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::model::{Endpoint, Hints, Protocol, Service, ServiceName, ServicePort, Slice, SlicePort};

/// More than any Service needs; fewer than would hold the others up.
const MAX_SERVICE_PORTS: usize = 1000;
const MAX_SERVICE_ADDRESSES: usize = 256;
const MAX_SOURCE_RANGES: usize = 4096;
/// As the API allows.
const MAX_ENDPOINTS: usize = 1000;
const MAX_SLICE_PORTS: usize = 20_000;
const MAX_HINTS: usize = 8;
/// As `sessionAffinityConfig` defaults and is bounded.
const AFFINITY_SECONDS: u32 = 10_800;
const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// Someone else carries Services with this label.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// An object that cannot be, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

fn refused<T>(why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(why.into()))
}

/// Strings and hints that many endpoints have in common, kept once.
#[derive(Default)]
pub struct Names {
    names: HashSet<Arc<str>>,
    hints: HashSet<Arc<Hints>>,
    sweep_at: usize,
}

impl Names {
    pub fn name(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.names.get(text) {
            return known.clone();
        }
        self.sweep();
        let new: Arc<str> = text.into();
        self.names.insert(new.clone());
        new
    }

    fn hints(&mut self, hints: Hints) -> Arc<Hints> {
        if let Some(known) = self.hints.get(&hints) {
            return known.clone();
        }
        let new = Arc::new(hints);
        self.hints.insert(new.clone());
        new
    }

    /// Forget what nobody uses any more, each time twice as much is known.
    fn sweep(&mut self) {
        if self.names.len() + self.hints.len() < self.sweep_at.max(4096) {
            return;
        }
        self.hints.retain(|h| Arc::strong_count(h) > 1);
        self.names.retain(|n| Arc::strong_count(n) > 1);
        self.sweep_at = 2 * (self.names.len() + self.hints.len());
    }
}

/// The name of an object of ours, if it can have one.
pub fn name(meta: &ObjectMeta, names: &mut Names) -> Option<ServiceName> {
    let sound = |s: &&String| !s.is_empty() && s.len() <= 253;
    let (namespace, name) = (meta.namespace.as_ref().filter(sound)?, meta.name.as_ref().filter(sound)?);
    Some(ServiceName { namespace: names.name(namespace), name: names.name(name) })
}

fn has_label(meta: &ObjectMeta, label: &str) -> bool {
    meta.labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

/// A Service; `None` when it is not for us: headless, without a cluster
/// address, a mere name, or another proxy's.
pub fn service(object: core::Service, names: &mut Names) -> Result<Option<Service>, Refused> {
    let meta = object.metadata;
    let spec = object.spec.unwrap_or_default();
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    if has_label(&meta, PROXY_NAME) || has_label(&meta, HEADLESS) || kind == "ExternalName" {
        return Ok(None);
    }
    let cluster_ips = spec.cluster_ips.unwrap_or_default();
    let cluster_ips = if cluster_ips.is_empty() { spec.cluster_ip.into_iter().collect() } else { cluster_ips };
    if cluster_ips.first().is_none_or(|ip| ip.is_empty() || ip == "None") {
        return Ok(None);
    }
    let external_ips = spec.external_ips.unwrap_or_default();
    // Only these may be reached from outside at all.
    let exposed = kind != "ClusterIP" || !external_ips.is_empty();
    let external_local = exposed && spec.external_traffic_policy.as_deref() == Some("Local");
    let ingress = object.status.and_then(|s| s.load_balancer).and_then(|l| l.ingress).unwrap_or_default();
    let balancers = ingress
        .into_iter()
        .filter(|i| i.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|i| i.ip.filter(|ip| !ip.is_empty()))
        .collect();
    let timeout = spec.session_affinity_config.and_then(|c| c.client_ip).and_then(|c| c.timeout_seconds);
    let health = spec.health_check_node_port.filter(|p| *p != 0);
    let health = health.map(|p| port("healthCheckNodePort", p)).transpose()?;
    Ok(Some(Service {
        uid: meta.uid.unwrap_or_default().into(),
        created: meta.creation_timestamp.map(|t| t.0.as_second()).unwrap_or_default(),
        cluster_ips: addresses("clusterIPs", cluster_ips)?,
        external_ips: addresses("externalIPs", external_ips)?,
        load_balancer_ips: addresses("status.loadBalancer.ingress", balancers)?,
        source_ranges: ranges(spec.load_balancer_source_ranges.unwrap_or_default())?,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local,
        affinity_seconds: match spec.session_affinity.as_deref() {
            Some("ClientIP") => Some(affinity(timeout)?),
            _ => None,
        },
        health_check_port: health.filter(|_| kind == "LoadBalancer" && external_local),
        ports: service_ports(spec.ports.unwrap_or_default(), names)?,
    }))
}

fn affinity(timeout: Option<i32>) -> Result<u32, Refused> {
    let Some(seconds) = timeout else { return Ok(AFFINITY_SECONDS) };
    match u32::try_from(seconds) {
        Ok(seconds @ 1..=MAX_AFFINITY_SECONDS) => Ok(seconds),
        _ => refused(format!("the affinity timeout is {seconds} s; it must be 1 to {MAX_AFFINITY_SECONDS}")),
    }
}

fn service_ports(ports: Vec<core::ServicePort>, names: &mut Names) -> Result<Box<[ServicePort]>, Refused> {
    if ports.len() > MAX_SERVICE_PORTS {
        return refused(format!("it has {} ports; {MAX_SERVICE_PORTS} is the most", ports.len()));
    }
    let mut seen = BTreeSet::new();
    let mut out = Vec::with_capacity(ports.len());
    for p in ports {
        let protocol = protocol(p.protocol.as_deref())?;
        let number = port("port", p.port)?;
        if !seen.insert((protocol, number)) {
            return refused(format!("port {number}/{protocol} is there twice"));
        }
        let node_port = p.node_port.filter(|p| *p != 0).map(|p| port("nodePort", p)).transpose()?;
        let name = names.name(p.name.as_deref().unwrap_or_default());
        out.push(ServicePort { name, protocol, port: number, node_port });
    }
    Ok(out.into())
}

fn port(what: &str, number: i32) -> Result<u16, Refused> {
    match u16::try_from(number) {
        Ok(number) if number != 0 => Ok(number),
        _ => refused(format!("{what} {number} is no port (1 to 65535)")),
    }
}

fn protocol(name: Option<&str>) -> Result<Protocol, Refused> {
    name.unwrap_or("TCP").parse().map_err(|e: super::model::BadProtocol| Refused(e.to_string()))
}

fn addresses(what: &str, texts: Vec<String>) -> Result<Box<[IpAddr]>, Refused> {
    if texts.len() > MAX_SERVICE_ADDRESSES {
        return refused(format!("{what} has {} addresses; {MAX_SERVICE_ADDRESSES} is the most", texts.len()));
    }
    let mut out: Vec<IpAddr> = Vec::with_capacity(texts.len());
    for text in texts {
        let ip = address(&text).map_err(|why| Refused(format!("{what}: {text:?} {why}")))?;
        if !out.contains(&ip) {
            out.push(ip);
        }
    }
    Ok(out.into())
}

/// An address that something can be behind.
fn address(text: &str) -> Result<IpAddr, &'static str> {
    let ip: IpAddr = text.parse().map_err(|_| "is no IP address")?;
    let mapped = matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    match () {
        () if mapped => Err("is an IPv4 address in IPv6 clothes"),
        () if ip.is_unspecified() => Err("is the unspecified address"),
        () if ip.is_loopback() => Err("is a loopback address"),
        () if ip.is_multicast() || broadcast => Err("is not the address of one host"),
        () => Ok(ip),
    }
}

fn ranges(texts: Vec<String>) -> Result<Box<[IpNet]>, Refused> {
    if texts.len() > MAX_SOURCE_RANGES {
        return refused(format!("it has {} source ranges; {MAX_SOURCE_RANGES} is the most", texts.len()));
    }
    let parsed: Result<BTreeSet<IpNet>, Refused> = texts
        .iter()
        .map(|text| match text.trim().parse::<IpNet>() {
            Ok(IpNet::V6(net)) if net.network().to_ipv4_mapped().is_some() => {
                refused(format!("loadBalancerSourceRanges: {text:?} is an IPv4 range in IPv6 clothes"))
            }
            Ok(net) => Ok(net.trunc()),
            Err(_) => refused(format!("loadBalancerSourceRanges: {text:?} is no range (want address/bits)")),
        })
        .collect();
    Ok(parsed?.into_iter().collect())
}

/// The Service that a slice is of; `None` when we need not know it.
pub fn slice_owner(meta: &ObjectMeta, names: &mut Names) -> Option<ServiceName> {
    if has_label(meta, PROXY_NAME) || has_label(meta, HEADLESS) {
        return None;
    }
    let sound = |s: &&String| !s.is_empty() && s.len() <= 253;
    let service = meta.labels.as_ref()?.get(SERVICE_NAME).filter(sound)?;
    Some(ServiceName { namespace: names.name(meta.namespace.as_deref()?), name: names.name(service) })
}

/// An EndpointSlice; `None` when it is not of addresses.
pub fn slice(object: discovery::EndpointSlice, names: &mut Names) -> Result<Option<Slice>, Refused> {
    let v6 = match object.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        "FQDN" => return Ok(None),
        other => return refused(format!("addressType {other:?} is none of IPv4, IPv6 and FQDN")),
    };
    let (endpoints, ports) = (object.endpoints, object.ports.unwrap_or_default());
    if endpoints.len() > MAX_ENDPOINTS || ports.len() > MAX_SLICE_PORTS {
        return refused(format!(
            "it has {} endpoints and {} ports; {MAX_ENDPOINTS} and {MAX_SLICE_PORTS} are the most",
            endpoints.len(),
            ports.len()
        ));
    }
    let mut known = Vec::with_capacity(ports.len());
    for p in ports {
        // Without a number it means every port, which no Service can use.
        let Some(number) = p.port else { continue };
        let name = names.name(p.name.as_deref().unwrap_or_default());
        known.push(SlicePort { name, protocol: protocol(p.protocol.as_deref())?, port: port("port", number)? });
    }
    known.sort_by(|a, b| (&a.name, a.protocol).cmp(&(&b.name, b.protocol)));
    if let Some(pair) = known.windows(2).find(|w| (&w[0].name, w[0].protocol) == (&w[1].name, w[1].protocol)) {
        return refused(format!("port {:?}/{} is there twice", pair[0].name, pair[0].protocol));
    }
    let endpoints = endpoints.into_iter().map(|e| endpoint(e, v6, names)).collect::<Result<Box<[_]>, _>>()?;
    Ok(Some(Slice { v6, ports: known.into(), endpoints }))
}

fn endpoint(e: discovery::Endpoint, v6: bool, names: &mut Names) -> Result<Endpoint, Refused> {
    // All addresses of an endpoint are the same pod's: the first stands for it.
    let Some(text) = e.addresses.first() else { return refused("an endpoint has no address") };
    let addr = address(text).map_err(|why| Refused(format!("endpoint {text:?} {why}")))?;
    if addr.is_ipv6() != v6 {
        return refused(format!("endpoint {text:?} is not of the slice's address type"));
    }
    let link_local = match addr {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if link_local {
        return refused(format!("endpoint {text:?} is a link-local address"));
    }
    let conditions = e.conditions.unwrap_or_default();
    let hints = e.hints.and_then(|h| {
        let zones = h.for_zones.unwrap_or_default().into_iter().map(|z| z.name);
        let nodes = h.for_nodes.unwrap_or_default().into_iter().map(|n| n.name);
        let hints = Hints {
            zones: zones.take(MAX_HINTS).map(|n| names.name(&n)).collect(),
            nodes: nodes.take(MAX_HINTS).map(|n| names.name(&n)).collect(),
        };
        let any = !hints.zones.is_empty() || !hints.nodes.is_empty();
        any.then(|| names.hints(hints))
    });
    Ok(Endpoint {
        addr,
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        node: e.node_name.map(|n| names.name(&n)),
        hints,
    })
}

#[cfg(test)]
#[path = "convert/tests.rs"]
mod tests;
