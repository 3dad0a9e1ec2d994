//! What the rules of Services say, one question at a time and as slowly as can
//! be: written from the rules, sharing nothing with the compiler.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use fairway::service::model::{Endpoint, Protocol, Service, ServicePort};

use super::world::{World, name};

/// Who asks, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    pub outside: bool,
    pub addr: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub service: String,
    pub backends: BTreeSet<(IpAddr, u16)>,
    pub local_here: BTreeSet<(IpAddr, u16)>,
    /// Says nothing rather than refuses.
    pub silent: bool,
    pub keeps_source: bool,
    pub affinity: Option<u32>,
    /// Which clients may come, if not all.
    pub ranges: Option<BTreeSet<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Cluster,
    Balancer,
    External,
    NodePort,
}

fn role(w: &World, s: &Service, p: &ServicePort, q: &Question) -> Option<Role> {
    let family = s.cluster_ips.iter().any(|c| c.is_ipv4() == q.addr.is_ipv4());
    if !family || p.protocol != q.protocol {
        return None;
    }
    if p.port == q.port {
        if s.cluster_ips.contains(&q.addr) && !q.outside {
            return Some(Role::Cluster);
        }
        if s.load_balancer_ips.contains(&q.addr) {
            return Some(Role::Balancer);
        }
        if s.external_ips.contains(&q.addr) {
            return Some(Role::External);
        }
    }
    (p.node_port == Some(q.port) && w.node.addresses.contains(&q.addr)).then_some(Role::NodePort)
}

pub fn ask(w: &World, q: &Question) -> Option<Answer> {
    let mut best: Option<((bool, i64, String), u8, ServicePort, Role)> = None;
    for (n, s) in &w.services {
        for p in &s.ports {
            let Some(role) = role(w, s, p, q) else { continue };
            let rank = (role != Role::Cluster, s.created, name(*n).to_string());
            if best.as_ref().is_none_or(|b| rank < b.0 || (rank == b.0 && p.port == q.port && role != Role::NodePort)) {
                best = Some((rank, *n, p.clone(), role));
            }
        }
    }
    let (_, n, port, role) = best?;
    let service = &w.services[&n];
    let all = endpoints(w, n, &port, q.addr.is_ipv6());
    let only_local = match (role, q.outside) {
        (Role::Cluster, _) => service.internal_local,
        (_, true) => service.external_local,
        (_, false) => false,
    };
    let chosen = if only_local { of_this_node(w, &all) } else { of_the_cluster(w, &all) };
    let usable = all.values().any(|e| e.ready || (e.serving && e.terminating));
    let ranges: BTreeSet<String> = service
        .source_ranges
        .iter()
        .filter(|r| r.network().is_ipv4() == q.addr.is_ipv4())
        .map(|r| r.to_string())
        .collect();
    Some(Answer {
        service: name(n).to_string(),
        local_here: chosen.iter().filter(|at| here(w, &all[at])).copied().collect(),
        backends: chosen,
        silent: only_local && q.outside && usable,
        keeps_source: only_local && q.outside,
        affinity: service.affinity_seconds,
        ranges: (role == Role::Balancer && !ranges.is_empty()).then_some(ranges),
    })
}

fn here(w: &World, e: &Endpoint) -> bool {
    e.node.as_ref().is_some_and(|n| *n == w.node.name)
}

/// Each address and port once, the best mention of it.
fn endpoints(w: &World, n: u8, port: &ServicePort, v6: bool) -> BTreeMap<(IpAddr, u16), Endpoint> {
    let mut out: BTreeMap<(IpAddr, u16), Endpoint> = BTreeMap::new();
    let score = |e: &Endpoint| {
        let state = if e.ready {
            0
        } else if e.serving && e.terminating {
            1
        } else if !e.terminating {
            2
        } else {
            3
        };
        (state, !here(w, e))
    };
    for slice in w.slices(n).into_iter().filter(|s| s.v6 == v6) {
        for p in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            for e in &slice.endpoints {
                let at = (e.addr, p.port);
                if out.get(&at).is_none_or(|known| score(e) < score(known)) {
                    out.insert(at, e.clone());
                }
            }
        }
    }
    out
}

type All = BTreeMap<(IpAddr, u16), Endpoint>;

fn keys<'a>(of: impl Iterator<Item = (&'a (IpAddr, u16), &'a Endpoint)>) -> BTreeSet<(IpAddr, u16)> {
    of.map(|(at, _)| *at).collect()
}

fn of_this_node(w: &World, all: &All) -> BTreeSet<(IpAddr, u16)> {
    let ready = keys(all.iter().filter(|(_, e)| here(w, e) && e.ready));
    match ready.is_empty() {
        false => ready,
        true => keys(all.iter().filter(|(_, e)| here(w, e) && e.serving && e.terminating)),
    }
}

fn of_the_cluster(w: &World, all: &All) -> BTreeSet<(IpAddr, u16)> {
    let ready: Vec<_> = all.iter().filter(|(_, e)| e.ready).collect();
    if ready.is_empty() {
        return keys(all.iter().filter(|(_, e)| e.serving && e.terminating));
    }
    let zones = |e: &Endpoint| e.hints.as_ref().map(|h| h.zones.to_vec()).unwrap_or_default();
    let nodes = |e: &Endpoint| e.hints.as_ref().map(|h| h.nodes.to_vec()).unwrap_or_default();
    let for_node = keys(ready.iter().copied().filter(|(_, e)| nodes(e).contains(&w.node.name)));
    if ready.iter().all(|(_, e)| !nodes(e).is_empty()) && !for_node.is_empty() {
        return for_node;
    }
    let zone = w.node.zone.clone();
    let for_zone = keys(ready.iter().copied().filter(|(_, e)| zone.as_ref().is_some_and(|z| zones(e).contains(z))));
    if ready.iter().all(|(_, e)| !zones(e).is_empty()) && !for_zone.is_empty() {
        return for_zone;
    }
    keys(ready.into_iter())
}
