//! From the API's objects to ours, with everything in them checked.
//!
//! Pure. What the API means by an absent and by an empty list is settled here. A
//! policy that cannot be is refused whole, with a reason: what was in force before
//! stays in force.

use std::collections::BTreeSet;
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as net;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::model::{Labels, Name, NamedPort, Peer, Pod, Policy, Port, PortAt, Requirement, Rule, Selector, Test, Word};
use crate::service::convert::Refused;
use crate::service::model::Protocol;

/// More than any policy needs; fewer than would hold the others up.
const MAX_RULES: usize = 1000;
const MAX_PEERS: usize = 1000;
const MAX_PORTS: usize = 500;
const MAX_EXCEPTS: usize = 1000;
const MAX_REQUIREMENTS: usize = 100;
const MAX_VALUES: usize = 1000;
/// Of a pod.
const MAX_LABELS: usize = 1000;
const MAX_NAMED_PORTS: usize = 1000;
const MAX_ADDRESSES: usize = 2;

fn refused<T>(why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(why.into()))
}

/// Words, labels and ports that many pods have in common, kept once.
#[derive(Default)]
pub struct Shared {
    words: HashSet<Word>,
    labels: HashSet<Arc<Labels>>,
    ports: HashSet<Arc<[NamedPort]>>,
    sweep_at: usize,
}

impl Shared {
    pub fn word(&mut self, text: &str) -> Word {
        if let Some(known) = self.words.get(text) {
            return known.clone();
        }
        self.sweep();
        let new: Word = text.into();
        self.words.insert(new.clone());
        new
    }

    pub fn labels(&mut self, labels: Labels) -> Arc<Labels> {
        if let Some(known) = self.labels.get(&labels) {
            return known.clone();
        }
        let new = Arc::new(labels);
        self.labels.insert(new.clone());
        new
    }

    fn ports(&mut self, ports: Vec<NamedPort>) -> Arc<[NamedPort]> {
        if let Some(known) = self.ports.get(&*ports) {
            return known.clone();
        }
        let new: Arc<[NamedPort]> = ports.into();
        self.ports.insert(new.clone());
        new
    }

    fn len(&self) -> usize {
        self.words.len() + self.labels.len() + self.ports.len()
    }

    /// Forget what nobody uses any more, each time twice as much is known.
    fn sweep(&mut self) {
        if self.len() < self.sweep_at.max(4096) {
            return;
        }
        // They hold words.
        self.labels.retain(|l| Arc::strong_count(l) > 1);
        self.ports.retain(|p| Arc::strong_count(p) > 1);
        self.words.retain(|w| Arc::strong_count(w) > 1);
        self.sweep_at = 2 * self.len();
    }
}

/// The name of an object of a namespace, if it can have one.
pub fn name(meta: &ObjectMeta, shared: &mut Shared) -> Option<Name> {
    let sound = |s: &&String| !s.is_empty() && s.len() <= 253;
    let (namespace, name) = (meta.namespace.as_ref().filter(sound)?, meta.name.as_ref().filter(sound)?);
    // A pod's own name is nobody else's.
    Some(Name { namespace: shared.word(namespace), name: name.as_str().into() })
}

/// The labels of a pod or a namespace.
pub fn labels(meta: &ObjectMeta, shared: &mut Shared) -> Result<Arc<Labels>, Refused> {
    let labels = meta.labels.iter().flatten();
    if labels.clone().count() > MAX_LABELS {
        return refused(format!("it has more than {MAX_LABELS} labels"));
    }
    let words: Vec<(Word, Word)> = labels.map(|(key, value)| (shared.word(key), shared.word(value))).collect();
    Ok(shared.labels(Labels::new(words)))
}

/// The digest of a pod's uid.
pub fn uid(text: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// A pod that policies can speak of; `None` for one with the node's network and
/// for one that has finished.
pub fn pod(object: &core::Pod, shared: &mut Shared) -> Result<Option<Pod>, Refused> {
    let (spec, status) = (object.spec.as_ref(), object.status.as_ref());
    let phase = status.and_then(|s| s.phase.as_deref()).unwrap_or_default();
    if spec.and_then(|s| s.host_network) == Some(true) || matches!(phase, "Succeeded" | "Failed") {
        return Ok(None);
    }
    let all = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.as_str());
    let first = status.and_then(|s| s.pod_ip.as_deref());
    let mut ips: Vec<IpAddr> = Vec::new();
    for text in first.into_iter().chain(all).filter(|text| !text.is_empty()) {
        let Ok(ip) = text.parse::<IpAddr>() else { return refused(format!("{text:?} is no IP address")) };
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    if ips.len() > MAX_ADDRESSES {
        return refused(format!("it has {} addresses; {MAX_ADDRESSES} is the most", ips.len()));
    }
    let labels = labels(&object.metadata, shared)?;
    let ports = named_ports(spec, shared)?;
    let uid = uid(object.metadata.uid.as_deref().unwrap_or_default());
    Ok(Some(Pod { uid, ips: ips.into(), labels, ports }))
}

/// Of its containers, and of those that start first and stay (sidecars).
fn named_ports(spec: Option<&core::PodSpec>, shared: &mut Shared) -> Result<Arc<[NamedPort]>, Refused> {
    let Some(spec) = spec else { return Ok(shared.ports(Vec::new())) };
    let stays = |c: &&core::Container| c.restart_policy.as_deref() == Some("Always");
    let first = spec.init_containers.iter().flatten().filter(stays);
    let ports = first.chain(&spec.containers).flat_map(|c| c.ports.iter().flatten());
    let mut named = Vec::new();
    for port in ports {
        let Some(name) = port.name.as_ref().filter(|n| !n.is_empty()) else { continue };
        if named.len() == MAX_NAMED_PORTS {
            return refused(format!("it has more than {MAX_NAMED_PORTS} named ports"));
        }
        let Some(number) = u16::try_from(port.container_port).ok().filter(|n| *n != 0) else { continue };
        named.push(NamedPort { name: shared.word(name), protocol: protocol(port.protocol.as_deref())?, port: number });
    }
    named.sort();
    named.dedup();
    Ok(shared.ports(named))
}

fn protocol(name: Option<&str>) -> Result<Protocol, Refused> {
    name.unwrap_or("TCP").parse().map_err(|e: crate::service::model::BadProtocol| Refused(e.to_string()))
}

/// A NetworkPolicy.
pub fn policy(object: &net::NetworkPolicy, shared: &mut Shared) -> Result<Policy, Refused> {
    let Some(spec) = &object.spec else { return refused("it has no spec") };
    let types: BTreeSet<&str> = spec.policy_types.iter().flatten().map(String::as_str).collect();
    if let Some(other) = types.iter().find(|t| !matches!(**t, "Ingress" | "Egress")) {
        return refused(format!("policyTypes has {other:?}, which is neither Ingress nor Egress"));
    }
    // Without types: Ingress always, Egress when it has such rules.
    let (ingress, egress) = match types.is_empty() {
        true => (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty())),
        false => (types.contains("Ingress"), types.contains("Egress")),
    };
    let from = |r: &net::NetworkPolicyIngressRule| (r.from.clone(), r.ports.clone());
    let to = |r: &net::NetworkPolicyEgressRule| (r.to.clone(), r.ports.clone());
    let ingress = ingress.then(|| rules("ingress", spec.ingress.iter().flatten().map(from), shared)).transpose()?;
    let egress = egress.then(|| rules("egress", spec.egress.iter().flatten().map(to), shared)).transpose()?;
    let selects = match &spec.pod_selector {
        Some(wanted) => selector("podSelector", wanted, shared)?,
        None => Selector::default(),
    };
    Ok(Policy { selects, ingress, egress })
}

type Written = (Option<Vec<net::NetworkPolicyPeer>>, Option<Vec<net::NetworkPolicyPort>>);

fn rules(side: &str, all: impl Iterator<Item = Written>, shared: &mut Shared) -> Result<Box<[Rule]>, Refused> {
    let mut rules = Vec::new();
    for (number, (peers, ports)) in all.enumerate() {
        let place = format!("{side}[{number}]");
        if number == MAX_RULES {
            return refused(format!("{side} has more than {MAX_RULES} rules"));
        }
        // Empty means all, as absent does.
        let peers = peers.filter(|peers| !peers.is_empty());
        let ports = ports.filter(|ports| !ports.is_empty());
        if peers.as_ref().is_some_and(|p| p.len() > MAX_PEERS) || ports.as_ref().is_some_and(|p| p.len() > MAX_PORTS) {
            return refused(format!("{place} has more than {MAX_PEERS} peers or {MAX_PORTS} ports"));
        }
        let peers: Option<Box<[Peer]>> =
            peers.map(|peers| peers.iter().map(|p| peer(&place, p, shared)).collect()).transpose()?;
        let ports: Option<Box<[Port]>> =
            ports.map(|ports| ports.iter().map(|p| port(&place, p, shared)).collect()).transpose()?;
        rules.push(Rule { peers, ports });
    }
    Ok(rules.into())
}

fn peer(place: &str, written: &net::NetworkPolicyPeer, shared: &mut Shared) -> Result<Peer, Refused> {
    match (&written.ip_block, &written.namespace_selector, &written.pod_selector) {
        (Some(block), None, None) => {
            let net = range(place, &block.cidr)?;
            let excepts = block.except.iter().flatten();
            if excepts.clone().count() > MAX_EXCEPTS {
                return refused(format!("{place}: a block has more than {MAX_EXCEPTS} exceptions"));
            }
            let except = excepts
                .map(|text| match range(place, text)? {
                    out if net.contains(&out) => Ok(out),
                    out => refused(format!("{place}: the exception {out} does not lie in {net}")),
                })
                .collect::<Result<Box<[_]>, _>>()?;
            Ok(Peer::Block { net, except })
        }
        (Some(_), ..) => refused(format!("{place}: a peer with ipBlock has selectors as well")),
        (None, None, None) => refused(format!("{place}: a peer has neither ipBlock nor a selector")),
        (None, namespaces, pods) => {
            let namespaces =
                namespaces.as_ref().map(|s| selector(&format!("{place}: namespaceSelector"), s, shared)).transpose()?;
            let pods = match pods {
                Some(pods) => selector(&format!("{place}: podSelector"), pods, shared)?,
                None => Selector::default(),
            };
            Ok(Peer::Pods { namespaces, pods })
        }
    }
}

fn range(place: &str, text: &str) -> Result<IpNet, Refused> {
    match text.parse::<IpNet>() {
        Ok(IpNet::V6(net)) if net.network().to_ipv4_mapped().is_some() => {
            refused(format!("{place}: {text:?} is an IPv4 range in IPv6 clothes"))
        }
        Ok(net) => Ok(net.trunc()),
        Err(_) => refused(format!("{place}: {text:?} is no range (want address/bits)")),
    }
}

fn port(place: &str, written: &net::NetworkPolicyPort, shared: &mut Shared) -> Result<Port, Refused> {
    let protocol = protocol(written.protocol.as_deref()).map_err(|e| Refused(format!("{place}: {e}")))?;
    let number = |n: i32| match u16::try_from(n) {
        Ok(n) if n != 0 => Ok(n),
        _ => refused(format!("{place}: {n} is no port (1 to 65535)")),
    };
    let at = match (&written.port, written.end_port) {
        (None, None) => PortAt::Any,
        (Some(IntOrString::Int(n)), None) => PortAt::Range(number(*n)?, number(*n)?),
        (Some(IntOrString::Int(n)), Some(end)) => match (number(*n)?, number(end)?) {
            (from, to) if from <= to => PortAt::Range(from, to),
            (from, to) => return refused(format!("{place}: endPort {to} is below port {from}")),
        },
        (Some(IntOrString::String(name)), None) if !name.is_empty() && name.len() <= 63 => {
            PortAt::Named(shared.word(name))
        }
        (Some(IntOrString::String(name)), None) => return refused(format!("{place}: {name:?} is no name of a port")),
        (_, Some(_)) => return refused(format!("{place}: endPort needs a port by number")),
    };
    Ok(Port { protocol, at })
}

fn selector(place: &str, written: &LabelSelector, shared: &mut Shared) -> Result<Selector, Refused> {
    let equal = written.match_labels.iter().flatten();
    let expressions = written.match_expressions.iter().flatten();
    if equal.clone().count() + expressions.clone().count() > MAX_REQUIREMENTS {
        return refused(format!("{place} has more than {MAX_REQUIREMENTS} requirements"));
    }
    let mut requirements = BTreeSet::new();
    for (key, value) in equal {
        let test = Test::In(BTreeSet::from([shared.word(value)]));
        requirements.insert(Requirement { key: shared.word(key), test });
    }
    for wanted in expressions {
        let values = wanted.values.iter().flatten();
        if values.clone().count() > MAX_VALUES {
            return refused(format!("{place}: {:?} has more than {MAX_VALUES} values", wanted.key));
        }
        let values: BTreeSet<Word> = values.map(|value| shared.word(value)).collect();
        let test = match (wanted.operator.as_str(), values.is_empty()) {
            ("In", false) => Test::In(values),
            ("NotIn", false) => Test::NotIn(values),
            ("Exists", true) => Test::Exists,
            ("DoesNotExist", true) => Test::DoesNotExist,
            ("In" | "NotIn", true) => return refused(format!("{place}: {:?} has no values", wanted.key)),
            ("Exists" | "DoesNotExist", false) => {
                return refused(format!(
                    "{place}: {:?} has values, which {} does not take",
                    wanted.key, wanted.operator
                ));
            }
            (other, _) => {
                return refused(format!("{place}: operator {other:?} is none of In, NotIn, Exists, DoesNotExist"));
            }
        };
        requirements.insert(Requirement { key: shared.word(&wanted.key), test });
    }
    Ok(Selector(requirements.into_iter().collect()))
}

#[cfg(test)]
#[path = "convert/tests.rs"]
mod tests;
