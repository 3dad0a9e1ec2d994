//! From one Service and its slices to what the tables should say of it.
//!
//! Pure, and of one Service at a time: a change costs what it changes. Numbers
//! (of sets and backends) and places (of backends in a set) are not given here
//! but in `place`, which knows what is already there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use fairway_ebpf_abi as abi;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::choose::{Candidate, Choice, State, Verdict, candidates};
use super::model::{NodeFacts, Protocol, Service, ServicePort, Slice};

/// What the tables should say of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub sets: Vec<WantedSet>,
    pub frontends: Vec<WantedFrontend>,
    pub health: Option<Health>,
}

/// What a set is for; the same for as long as the Service has the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetName {
    pub protocol: Protocol,
    pub port: u16,
    pub v6: bool,
    /// Endpoints of this node alone.
    pub local: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedSet {
    pub name: SetName,
    /// By address.
    pub slots: Vec<Target>,
    /// Those of the others whose flows go on, if they have any.
    pub kept: Vec<Target>,
    pub ranges: Vec<IpNet>,
}

/// Where a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    pub addr: abi::Addr,
    /// Network byte order.
    pub port: u16,
    pub local: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedFrontend {
    pub key: abi::FrontendKey,
    /// Which of [`Wanted::sets`].
    pub set: usize,
    pub flags: u32,
    pub affinity_seconds: u32,
    pub origin: Origin,
}

/// What made an address a Service's. When two Services want the same, a cluster
/// address goes before every other: those are given by the control plane, while
/// others may be anybody's wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    ClusterIp,
    LoadBalancer,
    ExternalIp,
    NodePort,
}

/// What a health check node port answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    pub port: u16,
    /// Pods of this node that are ready, counted once whatever their families.
    pub local_ready: usize,
}

pub fn compile(service: &Service, slices: &[Arc<Slice>], node: &NodeFacts) -> Wanted {
    let mut out = Wanted::default();
    for v6 in [false, true] {
        // As the control plane has it: no cluster address, not of this family.
        if service.cluster_ips.iter().any(|ip| ip.is_ipv6() == v6) {
            for port in &service.ports {
                port_of(service, port, v6, slices, node, &mut out);
            }
        }
    }
    // An address may be there in two roles; the first one counts.
    out.frontends.sort_by_key(|f| (f.key, f.origin));
    out.frontends.dedup_by_key(|f| f.key);
    out.health = service.health_check_port.map(|port| Health { port, local_ready: local_ready(slices, node) });
    out
}

fn local_ready(slices: &[Arc<Slice>], node: &NodeFacts) -> usize {
    let of = |v6: bool| {
        let all = slices.iter().filter(|s| s.v6 == v6).flat_map(|s| &s.endpoints);
        let mut here: Vec<IpAddr> =
            all.filter(|e| e.ready && e.node.as_deref() == Some(&*node.name)).map(|e| e.addr).collect();
        here.sort_unstable();
        here.dedup();
        here.len()
    };
    of(false).max(of(true))
}

/// Add what one port is in one family.
fn port_of(service: &Service, port: &ServicePort, v6: bool, slices: &[Arc<Slice>], node: &NodeFacts, out: &mut Wanted) {
    let all = candidates(slices, port, v6, node);
    let choice = Choice::new(&all, node);
    let mut sets = Sets { service, port, v6, all: &all, choice, at: [None; 2], out };
    let affinity = if service.affinity_seconds.is_some() { abi::FRONTEND_AFFINITY } else { 0 };
    let outside = match service.external_local {
        // Where there are endpoints elsewhere, silence lets a client try there.
        true => abi::FRONTEND_LOCAL | if choice.any { abi::FRONTEND_SILENT } else { 0 },
        false => 0,
    };
    let mut exposed = |origin, addr: IpAddr, number: u16, flags: u32| {
        // Inside the cluster there is no need to go by a node that has one.
        sets.frontend(origin, addr, number, abi::SCOPE_INSIDE, false, affinity | flags);
        sets.frontend(origin, addr, number, abi::SCOPE_OUTSIDE, service.external_local, affinity | flags | outside);
    };
    let family = |ip: &&IpAddr| ip.is_ipv6() == v6;
    let restricted = service.source_ranges.iter().any(|net| is_v6(net) == v6);
    let ranges = if restricted { abi::FRONTEND_RANGES } else { 0 };
    for ip in service.load_balancer_ips.iter().filter(family) {
        exposed(Origin::LoadBalancer, *ip, port.port, ranges);
    }
    for ip in service.external_ips.iter().filter(family) {
        exposed(Origin::ExternalIp, *ip, port.port, 0);
    }
    // On whatever addresses the node has: the kernel side knows those.
    if let Some(number) = port.node_port {
        exposed(Origin::NodePort, node_addresses(v6), number, 0);
    }
    for ip in service.cluster_ips.iter().filter(family) {
        sets.frontend(Origin::ClusterIp, *ip, port.port, abi::SCOPE_INSIDE, service.internal_local, affinity);
    }
}

/// What stands for every address of the node in a frontend.
pub fn node_addresses(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

fn is_v6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

/// The sets of one port in one family, made when a frontend asks for them.
struct Sets<'a, 'n> {
    service: &'a Service,
    port: &'a ServicePort,
    v6: bool,
    all: &'a [Candidate<'a>],
    choice: Choice<'n>,
    /// The cluster's, this node's.
    at: [Option<usize>; 2],
    out: &'a mut Wanted,
}

impl Sets<'_, '_> {
    fn frontend(&mut self, origin: Origin, addr: IpAddr, number: u16, scope: u8, local: bool, flags: u32) {
        let set = match self.at[usize::from(local)] {
            Some(at) => at,
            None => self.add(local),
        };
        self.out.frontends.push(WantedFrontend {
            key: abi::FrontendKey {
                addr: addr.into(),
                port: number.to_be(),
                protocol: self.port.protocol.number(),
                scope,
            },
            set,
            flags,
            affinity_seconds: self.service.affinity_seconds.unwrap_or_default(),
            origin,
        });
        if flags & abi::FRONTEND_RANGES != 0 && self.out.sets[set].ranges.is_empty() {
            let family = self.service.source_ranges.iter().filter(|net| is_v6(net) == self.v6);
            self.out.sets[set].ranges = family.copied().collect();
        }
    }

    fn add(&mut self, local: bool) -> usize {
        let (mut slots, mut kept) = (Vec::with_capacity(self.all.len()), Vec::new());
        for c in self.all {
            let verdict = if local { self.choice.local(c) } else { self.choice.cluster(c) };
            let target = Target { addr: c.addr.into(), port: c.port.to_be(), local: c.local };
            match verdict.chosen() {
                true => slots.push(target),
                false if verdict != Verdict::OtherNode && keeps_flows(self.port.protocol, c) => kept.push(target),
                false => {}
            }
        }
        let name = SetName { protocol: self.port.protocol, port: self.port.port, v6: self.v6, local };
        let at = self.out.sets.len();
        self.out.sets.push(WantedSet { name, slots, kept, ranges: Vec::new() });
        self.at[usize::from(local)] = Some(at);
        at
    }
}

/// A connection ends with its pod; of UDP nobody hears that it has ended, so
/// those flows leave a pod that does not answer any more.
fn keeps_flows(protocol: Protocol, c: &Candidate<'_>) -> bool {
    protocol != Protocol::Udp || c.state != State::Finished
}
