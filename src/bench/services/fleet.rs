//! The cluster that every subject carries: so many Services of two endpoints,
//! some of them probed.
//!
//! Every Service has one TCP port; a probed one has the same port for UDP too.
//! The endpoints of a probed Service are real pods, those of the others nobody's
//! addresses. Services are in one order for all subjects, and a subject that
//! looks through them one by one does so in this order.

use std::net::{Ipv4Addr, SocketAddr};

use super::place;
use crate::bench::network::traffic::PORT;

/// The Services' own port.
pub const SERVICE_PORT: u16 = 80;
/// The name of it, in every Service.
pub const PORT_NAME: &str = "p80";
pub const NAMESPACE: &str = "bench";
pub const ENDPOINTS: usize = 2;

/// A Service whose endpoints answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Place in the order of Services.
    pub index: usize,
    /// What that place is called: the only one of one Service is all of these.
    pub positions: &'static [&'static str],
    /// How many nodes the client and its servers are on.
    pub nodes: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    pub services: usize,
    pub probes: Vec<Probe>,
}

/// A port of a Service and what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub index: usize,
    pub protocol: &'static str,
    pub vip: Ipv4Addr,
    pub endpoints: [Ipv4Addr; ENDPOINTS],
    pub endpoint_port: u16,
    pub probed: bool,
}

/// Where a probed Service may be.
pub const POSITIONS: &[&str] = &["first", "middle", "last"];
/// So that no Service is in two positions.
const FEWEST: usize = 7;

impl Fleet {
    /// All that must be loaded to probe every position over one node and over
    /// two: of one Service, whose endpoints cannot be on both, twice.
    pub fn of(services: usize) -> Result<Vec<Self>, String> {
        let probe = |index, positions, nodes| Probe { index, positions, nodes };
        match services {
            1 => {
                let one = |nodes| Self { services, probes: vec![probe(0, POSITIONS, nodes)] };
                Ok(vec![one(1), one(2)])
            }
            FEWEST.. => {
                let (middle, last) = (services / 2, services - 1);
                let probes = vec![
                    probe(0, &POSITIONS[..1], 1),
                    probe(1, &POSITIONS[..1], 2),
                    probe(middle, &POSITIONS[1..2], 1),
                    probe(middle + 1, &POSITIONS[1..2], 2),
                    probe(last - 1, &POSITIONS[2..], 2),
                    probe(last, &POSITIONS[2..], 1),
                ];
                Ok(vec![Self { services, probes }])
            }
            _ => Err(format!("{services} Services: want 1, or {FEWEST} or more")),
        }
    }

    /// Every port, in order.
    pub fn ports(&self) -> impl Iterator<Item = ServicePort> + '_ {
        let mut probes = self.probes.iter().peekable();
        (0..self.services).flat_map(move |index| {
            let probe = probes.next_if(|probe| probe.index == index);
            let endpoints = match probe {
                Some(probe) => place::backends(probe.nodes),
                None => [0, 1].map(|n| nth(Ipv4Addr::new(10, 129, 0, 0), index * ENDPOINTS + n)),
            };
            let port = move |protocol| ServicePort {
                index,
                protocol,
                vip: vip(index),
                endpoints,
                endpoint_port: PORT,
                probed: probe.is_some(),
            };
            let udp = probe.map(|_| port("udp"));
            [Some(port("tcp")), udp].into_iter().flatten()
        })
    }
}

pub fn vip(index: usize) -> Ipv4Addr {
    nth(Ipv4Addr::new(172, 21, 16, 0), index)
}

pub fn name(index: usize) -> String {
    format!("svc{index:05}")
}

fn nth(base: Ipv4Addr, n: usize) -> Ipv4Addr {
    // Fleets are far smaller than the range.
    Ipv4Addr::from(u32::from(base).wrapping_add(n as u32))
}

impl Probe {
    pub fn service(&self) -> SocketAddr {
        (vip(self.index), SERVICE_PORT).into()
    }

    /// Past the Service, straight to those behind it.
    pub fn endpoints(&self) -> Vec<SocketAddr> {
        place::backends(self.nodes).map(|ip| (ip, PORT).into()).to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_probed_over_one_node_and_over_two() {
        for services in [1, 7, 100, 1001] {
            let fleets = Fleet::of(services).unwrap();
            let mut seen: Vec<_> = fleets
                .iter()
                .flat_map(|f| &f.probes)
                .flat_map(|p| p.positions.iter().map(move |position| (*position, p.nodes)))
                .collect();
            seen.sort_unstable();
            let want = ["first", "last", "middle"].iter().flat_map(|p| [(*p, 1), (*p, 2)]);
            assert_eq!(seen, want.collect::<Vec<_>>());
            for fleet in &fleets {
                let ports: Vec<_> = fleet.ports().collect();
                assert_eq!(ports.len(), services + fleet.probes.len(), "one port, two of a probed Service");
                assert_eq!(ports.iter().filter(|p| p.probed).count(), 2 * fleet.probes.len());
                assert_eq!((ports[0].index, ports[ports.len() - 1].index), (0, services - 1));
            }
        }
        assert!(Fleet::of(3).is_err());
    }
}
