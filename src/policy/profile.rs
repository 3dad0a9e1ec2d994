//! All rules that isolate a pod in one direction.
//!
//! Pure. Pods that the same rules apply to share a profile; on the ingress side
//! named ports are numbers by then, so pods that name them differently do not. On
//! the egress side it is the other end that names them: its class says how.

use std::collections::BTreeSet;

use super::model::{Direction, Name, NamedPort, Port, PortAt, Rule};
use super::peers::{Class, PeerId, PeerKey, PortName};
use super::tables::{Namer, Open, ProfileId, RuleName};

#[derive(Debug)]
pub struct Profile {
    id: ProfileId,
    rules: Vec<Applied>,
    names: BTreeSet<PortName>,
}

#[derive(Debug)]
struct Applied {
    name: RuleName,
    /// `None`: everybody.
    peers: Option<Vec<(PeerId, PeerKey)>>,
    /// `None`: everything.
    ports: Option<Vec<Port>>,
}

impl Profile {
    /// From the rules of every policy that isolates a pod with these ports.
    pub fn new(direction: Direction, policies: &[(Name, Vec<Rule>)], own: &[NamedPort]) -> Self {
        let mut rules = Vec::new();
        for (policy, all) in policies {
            for (number, rule) in all.iter().enumerate() {
                let peer = |peer| {
                    let key = PeerKey::of(peer, &policy.namespace);
                    (key.id(), key)
                };
                let ports = rule.ports.as_ref().map(|ports| match direction {
                    Direction::Ingress => ports.iter().flat_map(|port| numbers(port, own)).collect(),
                    Direction::Egress => ports.to_vec(),
                });
                rules.push(Applied {
                    name: RuleName {
                        policy: policy.clone(),
                        direction,
                        number: u16::try_from(number).unwrap_or(u16::MAX),
                    },
                    peers: rule.peers.as_ref().map(|peers| peers.iter().map(peer).collect()),
                    ports,
                });
            }
        }
        let asked = rules.iter().flat_map(|rule| rule.ports.iter().flatten());
        let names = asked.filter_map(|port| match &port.at {
            PortAt::Named(name) => Some((name.clone(), port.protocol)),
            _ => None,
        });
        let names = names.collect();
        Self { id: id(direction, &rules), rules, names }
    }

    pub fn id(&self) -> ProfileId {
        self.id
    }

    pub fn peers(&self) -> impl Iterator<Item = &PeerKey> {
        self.rules.iter().flat_map(|rule| rule.peers.iter().flatten()).map(|(_, key)| key)
    }

    /// Ports whose numbers the other end has.
    pub fn names(&self) -> impl Iterator<Item = &PortName> {
        self.names.iter()
    }

    /// The ports that are open to this class, sorted, none twice.
    pub fn open_to(&self, class: &Class) -> Vec<Open> {
        let mut open = Vec::new();
        for rule in &self.rules {
            let applies = rule.peers.as_ref().is_none_or(|peers| peers.iter().any(|(id, _)| class.peers.contains(id)));
            if !applies {
                continue;
            }
            let Some(ports) = &rule.ports else {
                return vec![Open { protocol: None, from: 0, to: u16::MAX, by: rule.name.clone() }];
            };
            for port in ports.iter().flat_map(|port| numbers(port, &class.named)) {
                let (from, to) = match port.at {
                    PortAt::Range(from, to) => (from, to),
                    _ => (0, u16::MAX),
                };
                open.push(Open { protocol: Some(port.protocol), from, to, by: rule.name.clone() });
            }
        }
        disjoint(open)
    }
}

/// The port with its name resolved at a pod that has these; nothing if it has none
/// of that name.
fn numbers(port: &Port, named: &[NamedPort]) -> Vec<Port> {
    match &port.at {
        PortAt::Named(name) => {
            let meant = named.iter().filter(|n| n.name == *name && n.protocol == port.protocol);
            meant.map(|n| Port { protocol: port.protocol, at: PortAt::Range(n.port, n.port) }).collect()
        }
        _ => vec![port.clone()],
    }
}

/// No port is in two of them; the first in order keeps it.
fn disjoint(mut open: Vec<Open>) -> Vec<Open> {
    open.sort();
    let mut all: Vec<Open> = Vec::new();
    for mut next in open {
        if let Some(last) = all.last_mut().filter(|last| last.protocol == next.protocol) {
            if next.to <= last.to {
                continue;
            }
            if next.from <= last.to {
                next.from = last.to + 1;
            }
            if last.by == next.by && last.to.checked_add(1) == Some(next.from) {
                last.to = next.to;
                continue;
            }
        }
        all.push(next);
    }
    all
}

fn id(direction: Direction, rules: &[Applied]) -> ProfileId {
    let mut namer = Namer::new(if direction == Direction::Ingress { "ingress" } else { "egress" });
    namer.number(rules.len() as u64);
    for rule in rules {
        namer.text(&rule.name.policy.namespace);
        namer.text(&rule.name.policy.name);
        namer.number(rule.name.number.into());
        namer.number(rule.peers.as_ref().map_or(u64::MAX, |peers| peers.len() as u64));
        rule.peers.iter().flatten().for_each(|(id, _)| namer.number(*id));
        namer.number(rule.ports.as_ref().map_or(u64::MAX, |ports| ports.len() as u64));
        for port in rule.ports.iter().flatten() {
            namer.number(port.protocol.number().into());
            match &port.at {
                PortAt::Any => namer.number(0),
                PortAt::Range(from, to) => namer.number(1 << 32 | u64::from(*from) << 16 | u64::from(*to)),
                PortAt::Named(name) => namer.text(name),
            }
        }
    }
    namer.name()
}
