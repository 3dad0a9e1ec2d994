//! What is kept of Services and EndpointSlices, and what is known of the node.
//!
//! Pure, plain data: everything else of the objects is dropped by `convert`,
//! so that tens of thousands of endpoints cost megabytes, not gigabytes.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use fairway_ebpf_abi as abi;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A Service, by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ServiceName {
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for ServiceName {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ServiceName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let (namespace, name) = text.split_once('/').ok_or_else(|| serde::de::Error::custom("want namespace/name"))?;
        Ok(Self::new(namespace, name))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// As in the IP header.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
    pub fn of_number(number: u8) -> Option<Self> {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| p.number() == number)
    }
}

/// The name is none of a protocol that Services know.
#[derive(Debug, thiserror::Error)]
#[error("protocol {0:?} is none of TCP, UDP and SCTP")]
pub struct BadProtocol(pub String);

impl std::str::FromStr for Protocol {
    type Err = BadProtocol;
    fn from_str(s: &str) -> Result<Self, BadProtocol> {
        match s.to_ascii_uppercase().as_str() {
            "TCP" => Ok(Protocol::Tcp),
            "UDP" => Ok(Protocol::Udp),
            "SCTP" => Ok(Protocol::Sctp),
            _ => Err(BadProtocol(s.to_owned())),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// A Service that this node carries: not headless, not ExternalName, not left to
/// another proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    pub uid: Box<str>,
    /// Seconds since the epoch; the older of two that collide wins.
    pub created: i64,
    pub cluster_ips: Box<[IpAddr]>,
    pub external_ips: Box<[IpAddr]>,
    /// Those that may be short-cut (ipMode VIP).
    pub load_balancer_ips: Box<[IpAddr]>,
    pub source_ranges: Box<[IpNet]>,
    pub internal_local: bool,
    pub external_local: bool,
    /// Session affinity by client address.
    pub affinity_seconds: Option<u32>,
    pub health_check_port: Option<u16>,
    pub ports: Box<[ServicePort]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty when it has none.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

/// One EndpointSlice of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    pub v6: bool,
    /// Sorted by name, then protocol.
    pub ports: Box<[SlicePort]>,
    pub endpoints: Box<[Endpoint]>,
}

impl Slice {
    /// The port that a Service's port of this name means here.
    pub fn port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        let at = self.ports.binary_search_by(|p| (&*p.name, p.protocol).cmp(&(name, protocol)));
        at.ok().map(|i| self.ports[i].port)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<Arc<str>>,
    pub hints: Option<Arc<Hints>>,
}

/// Whom the control plane means an endpoint for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    pub zones: Box<[Arc<str>]>,
    pub nodes: Box<[Arc<str>]>,
}

/// What the compiler knows of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    pub name: Arc<str>,
    pub zone: Option<Arc<str>>,
    /// Where its node ports are.
    pub addresses: Vec<IpAddr>,
}

impl NodeFacts {
    pub const ZONE: &'static str = "topology.kubernetes.io/zone";
}

/// A client range of a load balancer, as the kernel matches it: `prefix` counts
/// the bits of the set's number too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    pub prefix: u32,
    pub key: abi::RangeKey,
}

impl Range {
    pub fn new(set: u32, net: &IpNet) -> Self {
        let (bits, addr) = match net {
            IpNet::V4(net) => (96 + u32::from(net.prefix_len()), IpAddr::from(net.network())),
            IpNet::V6(net) => (u32::from(net.prefix_len()), IpAddr::from(net.network())),
        };
        Self { prefix: 32 + bits, key: abi::RangeKey { set: set.to_be(), addr: addr.into() } }
    }
    pub fn set(&self) -> u32 {
        u32::from_be(self.key.set)
    }
    pub fn contains(&self, addr: abi::Addr) -> bool {
        let bits = self.prefix.saturating_sub(32).min(128);
        let mask = if bits == 0 { 0 } else { u128::MAX << (128 - bits) };
        let number = |a: abi::Addr| u128::from_be_bytes(a.octets6());
        (number(addr) ^ number(self.key.addr)) & mask == 0
    }
}

/// An address, port and protocol in words.
pub fn words(key: &abi::FrontendKey) -> String {
    let addr = std::net::SocketAddr::new(key.addr.into(), u16::from_be(key.port));
    match Protocol::of_number(key.protocol) {
        Some(protocol) => format!("{addr}/{protocol}"),
        None => format!("{addr}/{}", key.protocol),
    }
}
