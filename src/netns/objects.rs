//! Kernel objects of an attachment as plain data (pure).
//!
//! A [`State`] is a set of objects: keys say which object, values what it is
//! like. Devices are roles, not names or indexes: the shell knows which device
//! plays which role. The order of the keys is the order in which objects can be
//! made; the reverse is the order in which they can be removed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::Mac;

/// The routing protocol number that marks routes and rules as Fairway's.
pub const PROTOCOL: u8 = 70;
/// The main routing table.
pub const MAIN: u32 = 254;

/// Which namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    Node,
    Pod,
}

/// The role of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dev {
    /// A shared ENI, in the node's namespace.
    Eni,
    /// The node's side of the veth pair.
    HostLink,
    /// The pod's interface: a veth or its own ENI.
    Pod,
    /// Exclusive mode: the pod's side of the host link.
    NodeLink,
    /// Exclusive mode: the queue for incoming traffic.
    Shaper,
    /// An exclusive ENI that is in the pod under another name than it should.
    Stray,
    /// The pod's loopback.
    Loopback,
}

impl Dev {
    pub fn side(self) -> Side {
        match self {
            Dev::Eni | Dev::HostLink => Side::Node,
            Dev::Pod | Dev::NodeLink | Dev::Shaper | Dev::Stray | Dev::Loopback => Side::Pod,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// The node's side of a veth pair; made together with its peer.
    Veth { peer: Dev },
    /// The pod's side of it.
    Peer,
    /// An ENI moved into the pod; taken away it goes home.
    MovedEni,
    /// A device that is there anyway: never made, never removed.
    Given,
    /// An intermediate functional block, for shaping what comes in.
    Ifb,
    /// Something of somebody else in this role's place.
    Foreign,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub kind: LinkKind,
    /// `None`: as it is.
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
    pub up: bool,
}

/// A per-device setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Setting {
    DisableIpv6,
    AcceptRa,
    AcceptDad,
    /// 1: no link-local address of its own.
    AddrGenMode,
    RpFilter,
    Forwarding4,
}

impl Setting {
    /// The file below `/proc/sys/net`, for a device.
    pub fn path(self, device: &str) -> String {
        let (family, leaf) = match self {
            Setting::DisableIpv6 => ("ipv6", "disable_ipv6"),
            Setting::AcceptRa => ("ipv6", "accept_ra"),
            Setting::AcceptDad => ("ipv6", "accept_dad"),
            Setting::AddrGenMode => ("ipv6", "addr_gen_mode"),
            Setting::RpFilter => ("ipv4", "rp_filter"),
            Setting::Forwarding4 => ("ipv4", "forwarding"),
        };
        format!("{family}/conf/{device}/{leaf}")
    }
}

/// Whose packets a policy rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    To(IpAddr),
    From(IpAddr),
}

impl Selector {
    pub fn address(self) -> IpAddr {
        match self {
            Selector::To(ip) | Selector::From(ip) => ip,
        }
    }
}

/// A token bucket: bytes per second, bytes at once, bytes waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    pub rate: u64,
    pub burst: u32,
    pub limit: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    Link(Dev),
    Setting(Dev, Setting),
    Address(Dev, IpNet),
    Neighbour(Dev, IpAddr),
    Route(Side, u32, IpNet),
    /// Rules are in the node's namespace only; the number is the priority.
    Rule(u32, Selector),
    /// The root queue.
    Queue(Dev),
    /// Everything that comes in by the device goes through another's queue.
    Redirect(Dev),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Link(Link),
    Setting(u32),
    Address,
    Neighbour(Mac),
    Route {
        dev: Dev,
        via: Option<IpAddr>,
        source: Option<IpAddr>,
    },
    /// The table to look up.
    Rule(u32),
    Queue(TokenBucket),
    Redirect(Dev),
}

pub type State = BTreeMap<Key, Value>;

/// The device an object is on: it goes with it.
pub fn on(key: &Key, value: &Value) -> Option<Dev> {
    match (key, value) {
        (Key::Route(..), Value::Route { dev, .. }) => Some(*dev),
        (
            Key::Setting(dev, _) | Key::Address(dev, _) | Key::Neighbour(dev, _) | Key::Queue(dev) | Key::Redirect(dev),
            _,
        ) => Some(*dev),
        _ => None,
    }
}

/// Another device an object is useless without, but outlives.
pub fn points_at(value: &Value) -> Option<Dev> {
    match value {
        Value::Redirect(to) => Some(*to),
        _ => None,
    }
}

/// The word for an object's kind in findings and errors.
pub fn word(key: &Key) -> &'static str {
    match key {
        Key::Link(_) => "link",
        Key::Setting(..) => "sysctl",
        Key::Address(..) => "address",
        Key::Neighbour(..) => "neighbour",
        Key::Route(..) => "route",
        Key::Rule(..) => "rule",
        Key::Queue(_) | Key::Redirect(_) => "qdisc",
    }
}
