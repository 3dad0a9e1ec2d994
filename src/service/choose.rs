//! Which endpoints of a Service's port may be chosen on this node, and why not
//! the others.
//!
//! Pure. All slices are merged: an endpoint that is in several (as it is while
//! the control plane moves it from one to another) counts once, the readiest
//! mention wins. Two selections are made, from all nodes and from this node
//! alone; which frontend takes which is for `compile` to say.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::model::{Endpoint, Hints, NodeFacts, ServicePort, Slice};

/// An endpoint of one Service port.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub addr: IpAddr,
    pub port: u16,
    pub state: State,
    /// It runs on this node.
    pub local: bool,
    pub node: Option<&'a str>,
    hints: Option<&'a Hints>,
}

/// Readiest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ready,
    /// Being deleted, and still answers: for want of a better one.
    ServingTerminating,
    /// Not now; its flows go on.
    Unready,
    /// Being deleted, and answers no more.
    Finished,
}

fn state(e: &Endpoint) -> State {
    match (e.ready, e.serving, e.terminating) {
        (true, ..) => State::Ready,
        (false, true, true) => State::ServingTerminating,
        (false, false, true) => State::Finished,
        (false, _, false) => State::Unready,
    }
}

/// The endpoints of a port in one family, merged, by address.
pub fn candidates<'a>(slices: &'a [Arc<Slice>], port: &ServicePort, v6: bool, node: &NodeFacts) -> Vec<Candidate<'a>> {
    let mut found = Vec::new();
    for slice in slices.iter().filter(|s| s.v6 == v6) {
        let Some(number) = slice.port(&port.name, port.protocol) else { continue };
        found.extend(slice.endpoints.iter().map(|e| Candidate {
            addr: e.addr,
            port: number,
            state: state(e),
            local: e.node.as_deref() == Some(&*node.name),
            node: e.node.as_deref(),
            hints: e.hints.as_deref(),
        }));
    }
    // Stable: of equals the first slice's counts, and slices come in the order
    // of their names.
    found.sort_by_key(|c| (c.addr, c.port, c.state, !c.local));
    found.dedup_by_key(|c| (c.addr, c.port));
    found
}

/// Whether an endpoint takes new flows, or why it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Chosen,
    /// None is ready: those that still serve while they end stand in.
    ChosenTerminating,
    NotReady,
    Terminating,
    /// Only endpoints of this node are asked for.
    OtherNode,
    /// The control plane means it for others, and has others for us.
    HintedElsewhere,
}

impl Verdict {
    pub fn chosen(self) -> bool {
        matches!(self, Verdict::Chosen | Verdict::ChosenTerminating)
    }
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Chosen => "takes new connections",
            Verdict::ChosenTerminating => "terminating, but no endpoint is ready",
            Verdict::NotReady => "not ready",
            Verdict::Terminating => "terminating",
            Verdict::OtherNode => "not on this node",
            Verdict::HintedElsewhere => "hinted for another zone or node",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Everywhere,
    SameNode,
    SameZone,
}

/// How to choose among the candidates of a port.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'n> {
    node: &'n NodeFacts,
    topology: Topology,
    ready: bool,
    ready_here: bool,
    /// Some endpoint, wherever, could be used.
    pub any: bool,
}

impl<'n> Choice<'n> {
    pub fn new(all: &[Candidate<'_>], node: &'n NodeFacts) -> Self {
        let usable = |c: &&Candidate<'_>| matches!(c.state, State::Ready | State::ServingTerminating);
        let ready = || all.iter().filter(|c| c.state == State::Ready);
        Self {
            node,
            topology: topology(ready(), node),
            ready: ready().next().is_some(),
            ready_here: ready().any(|c| c.local),
            any: all.iter().any(|c| usable(&c)),
        }
    }

    pub fn cluster(&self, c: &Candidate<'_>) -> Verdict {
        match c.state {
            State::Ready if fits(self.topology, c, self.node) => Verdict::Chosen,
            State::Ready => Verdict::HintedElsewhere,
            State::ServingTerminating if !self.ready => Verdict::ChosenTerminating,
            State::ServingTerminating | State::Finished => Verdict::Terminating,
            State::Unready => Verdict::NotReady,
        }
    }

    pub fn local(&self, c: &Candidate<'_>) -> Verdict {
        match c.state {
            _ if !c.local => Verdict::OtherNode,
            State::Ready => Verdict::Chosen,
            State::ServingTerminating if !self.ready_here => Verdict::ChosenTerminating,
            State::ServingTerminating | State::Finished => Verdict::Terminating,
            State::Unready => Verdict::NotReady,
        }
    }
}

/// Hints count when every ready endpoint has one and some are for us; those for
/// nodes before those for zones. The Service's trafficDistribution tells the
/// control plane which hints to give; what they say is all a node needs.
fn topology<'a>(ready: impl Iterator<Item = &'a Candidate<'a>>, node: &NodeFacts) -> Topology {
    let (mut all_node, mut any_node, mut all_zone, mut any_zone) = (true, false, true, false);
    for c in ready {
        let (nodes, zones) = c.hints.map_or((&[][..], &[][..]), |h| (&h.nodes[..], &h.zones[..]));
        all_node &= !nodes.is_empty();
        all_zone &= !zones.is_empty();
        any_node |= fits(Topology::SameNode, c, node);
        any_zone |= fits(Topology::SameZone, c, node);
    }
    match () {
        () if all_node && any_node => Topology::SameNode,
        () if all_zone && any_zone => Topology::SameZone,
        () => Topology::Everywhere,
    }
}

fn fits(topology: Topology, c: &Candidate<'_>, node: &NodeFacts) -> bool {
    match topology {
        Topology::Everywhere => true,
        Topology::SameNode => c.hints.is_some_and(|h| h.nodes.contains(&node.name)),
        Topology::SameZone => node.zone.as_ref().is_some_and(|zone| c.hints.is_some_and(|h| h.zones.contains(zone))),
    }
}
