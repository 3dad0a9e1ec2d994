//! Random clusters, small enough that everything collides with everything.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use fairway::service::book::{Input, Source};
use fairway::service::model::{
    Endpoint, Hints, NodeFacts, Protocol, Service, ServiceName, ServicePort, Slice, SlicePort,
};
use proptest::prelude::*;

/// What the API server would say.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub node: NodeFacts,
    pub services: BTreeMap<u8, Service>,
    /// By Service and slice.
    pub slices: BTreeMap<(u8, u8), Slice>,
}

pub fn name(n: u8) -> ServiceName {
    ServiceName::new("default", format!("s{n}"))
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl World {
    pub fn new() -> Self {
        Self { node: node(0), ..Self::default() }
    }
    pub fn names(&self) -> Vec<ServiceName> {
        (0..SERVICES).map(name).collect()
    }
    fn slices_of(&self, n: u8) -> Vec<Slice> {
        self.slices.iter().filter(|((of, _), _)| *of == n).map(|(_, s)| s.clone()).collect()
    }
    pub fn slices(&self, n: u8) -> Vec<Slice> {
        self.slices_of(n)
    }
    pub fn edit(&mut self, edit: &Edit) -> Vec<ServiceName> {
        match edit.clone() {
            Edit::Service(n, service) => {
                match service {
                    Some(service) => drop(self.services.insert(n, service)),
                    None => drop(self.services.remove(&n)),
                }
                vec![name(n)]
            }
            Edit::Slice(n, m, slice) => {
                match slice {
                    Some(slice) => drop(self.slices.insert((n, m), slice)),
                    None => drop(self.slices.remove(&(n, m))),
                }
                vec![name(n)]
            }
            Edit::Node(n) => {
                self.node = node(n);
                self.names()
            }
        }
    }
}

impl Source for World {
    fn get(&self, of: &ServiceName) -> Input {
        let n = (0..SERVICES).find(|n| name(*n) == *of).unwrap();
        Input {
            service: self.services.get(&n).cloned().map(Arc::new),
            slices: self.slices_of(n).into_iter().map(Arc::new).collect(),
        }
    }
}

pub const SERVICES: u8 = 4;

#[derive(Clone, Debug)]
pub enum Edit {
    Service(u8, Option<Service>),
    Slice(u8, u8, Option<Slice>),
    Node(u8),
}

fn node(n: u8) -> NodeFacts {
    let mut addresses = NODE.map(ip).to_vec();
    addresses.extend((n == 1).then(|| ip("10.0.0.2")));
    NodeFacts { name: "n1".into(), zone: (n != 2).then(|| "a".into()), addresses }
}

pub const PORTS: [u16; 2] = [80, 443];
pub const NODE_PORTS: [u16; 2] = [30_000, 30_001];
pub const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Those that the node always has.
pub const NODE: [&str; 2] = ["10.0.0.1", "fd00::1"];

pub fn frontend_addresses() -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = (0..SERVICES).flat_map(|n| [v4(100, n), v6(100, n)]).collect();
    all.extend((0..2).flat_map(|n| [v4(200, n), v6(200, n), v4(210, n), v6(210, n)]));
    all.extend(NODE.map(ip));
    all
}

fn v4(net: u8, n: u8) -> IpAddr {
    IpAddr::from([10, 1, net, n + 1])
}
fn v6(net: u8, n: u8) -> IpAddr {
    ip(&format!("fd00::{net}:{}", n + 1))
}

fn names_of(list: &[&str]) -> Box<[Arc<str>]> {
    list.iter().map(|n| Arc::from(*n)).collect()
}

fn hints() -> impl Strategy<Value = Option<Arc<Hints>>> {
    let hint =
        |zones: &[&str], nodes: &[&str]| Some(Arc::new(Hints { zones: names_of(zones), nodes: names_of(nodes) }));
    prop_oneof![
        3 => Just(None),
        3 => Just(hint(&["a"], &[])),
        2 => Just(hint(&["b"], &[])),
        1 => Just(hint(&["a", "b"], &["n1"])),
        1 => Just(hint(&["b"], &["n2"])),
        1 => Just(hint(&["a"], &["n1", "n2"])),
    ]
}

fn endpoint(v6_: bool) -> impl Strategy<Value = Endpoint> {
    (0u8..6, any::<bool>(), prop::bool::weighted(0.7), prop::bool::weighted(0.3), 0u8..4, hints()).prop_map(
        move |(n, ready, serving, terminating, node, hints)| Endpoint {
            addr: if v6_ { v6(0, n) } else { v4(0, n) },
            ready: ready && !terminating,
            serving,
            terminating,
            node: [Some("n1".into()), Some("n1".into()), Some("n2".into()), None][usize::from(node)].clone(),
            hints,
        },
    )
}

fn slice() -> impl Strategy<Value = Slice> {
    (prop::bool::weighted(0.3), prop::collection::btree_map((0u8..2, 0usize..3), 8080u16..8082, 0..4)).prop_flat_map(
        |(v6, ports)| {
            let mut ports: Vec<_> = ports
                .into_iter()
                .map(|((n, p), port)| SlicePort { name: format!("p{n}").into(), protocol: PROTOCOLS[p], port })
                .collect();
            ports.sort_by(|a, b| (&a.name, a.protocol).cmp(&(&b.name, b.protocol)));
            prop::collection::vec(endpoint(v6), 0..5).prop_map(move |endpoints| Slice {
                v6,
                ports: ports.clone().into(),
                endpoints: endpoints.into(),
            })
        },
    )
}

fn some<T: Clone + std::fmt::Debug + 'static>(all: Vec<T>, most: usize) -> impl Strategy<Value = Box<[T]>> {
    prop::sample::subsequence(all.clone(), 0..=most.min(all.len())).prop_map(Vec::into)
}

fn service(n: u8) -> impl Strategy<Value = Service> {
    let ports = prop::collection::btree_map((0usize..2, 0usize..3), (0u8..2, prop::option::of(0usize..2)), 1..4);
    let addresses = (
        prop::sample::select(vec![vec![v4(100, n)], vec![v4(100, n)], vec![v4(100, n), v6(100, n)], vec![v6(100, n)]]),
        some(vec![v4(200, 0), v6(200, 0), v4(200, 1), v4(100, (n + 1) % SERVICES)], 2),
        some(vec![v4(210, 0), v6(210, 0), v4(200, 1), v4(210, 1)], 2),
        some(["192.0.2.0/24", "198.51.100.0/24", "2001:db8::/32"].map(|r| r.parse().unwrap()).to_vec(), 2),
    );
    (ports, addresses, any::<bool>(), any::<bool>(), prop::option::of(1u32..100), 0i64..3, any::<bool>()).prop_map(
        |(ports, (cluster, external, balancers, ranges), internal_local, external_local, affinity, created, health)| {
            let ports = ports.into_iter().map(|((port, protocol), (name, node_port))| ServicePort {
                name: format!("p{name}").into(),
                protocol: PROTOCOLS[protocol],
                port: PORTS[port],
                node_port: node_port.map(|p| NODE_PORTS[p]),
            });
            Service {
                uid: "u".into(),
                created,
                cluster_ips: cluster.into(),
                external_ips: external,
                load_balancer_ips: balancers,
                source_ranges: ranges,
                internal_local,
                external_local,
                affinity_seconds: affinity,
                health_check_port: (health && external_local).then_some(32_000),
                ports: ports.collect(),
            }
        },
    )
}

pub fn edit() -> impl Strategy<Value = Edit> {
    let of = 0u8..SERVICES;
    let one_service = of.clone().prop_flat_map(|n| service(n).prop_map(move |s| Edit::Service(n, Some(s))));
    prop_oneof![
        6 => one_service,
        1 => of.clone().prop_map(|n| Edit::Service(n, None)),
        9 => (of.clone(), 0u8..3, slice()).prop_map(|(n, m, s)| Edit::Slice(n, m, Some(s))),
        2 => (of, 0u8..3).prop_map(|(n, m)| Edit::Slice(n, m, None)),
        1 => (0u8..3).prop_map(Edit::Node),
    ]
}
