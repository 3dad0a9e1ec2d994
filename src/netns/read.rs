//! What the kernel looks like, as objects.
//!
//! Purpose: reads back what is ours on the devices of one attachment or ENI.
//! Ours are: routes and rules with our protocol number, permanent neighbours and
//! global addresses on our devices, token buckets at their roots. What other
//! plugins of the chain or the pod itself put there is not seen.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::Nla as _;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::tc::{
    TcActionAttribute, TcActionMirrorOption, TcActionOption, TcAttribute, TcFilterU32Option, TcHandle, TcMessage,
    TcOption,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};

use super::message::{Devices, INGRESS_CHAIN, TBF_PARMS, TBF_RATE64, all_links};
use super::nl::{Nl, NlError};
use super::objects::{Dev, Key, MAIN, PROTOCOL, Selector, Side, State, TokenBucket, Value};
use crate::model::Mac;

/// A network device as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: String,
    /// What somebody noted on it.
    pub(super) alias: Option<String>,
    pub(super) mac: Option<Mac>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) kind: Option<InfoKind>,
    /// The other end of a veth pair, in whichever namespace.
    pub(super) peer: Option<u32>,
    pub(super) rx_queues: u32,
}

pub(super) fn device(message: &LinkMessage) -> Device {
    let mut out = Device {
        index: message.header.index,
        name: String::new(),
        alias: None,
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
        peer: None,
        rx_queues: 1,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => out.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => out.alias = Some(alias.clone()),
            LinkAttribute::Address(bytes) => out.mac = <[u8; 6]>::try_from(&bytes[..]).ok().map(Mac),
            LinkAttribute::Mtu(mtu) => out.mtu = *mtu,
            LinkAttribute::Link(peer) => out.peer = Some(*peer),
            LinkAttribute::NumRxQueues(n) => out.rx_queues = *n,
            LinkAttribute::LinkInfo(infos) => {
                out.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    out
}

pub(super) fn first_device(answer: &[Rtnl]) -> Option<Device> {
    answer.iter().find_map(|m| match m {
        Rtnl::NewLink(link) => Some(device(link)),
        _ => None,
    })
}

pub(super) fn devices(nl: &mut Nl) -> Result<Vec<Device>, NlError> {
    let links = nl.dump("list links", all_links())?;
    Ok(links.iter().filter_map(|m| first_device(std::slice::from_ref(m))).collect())
}

/// Whether a device may be an ENI: hardware, or a veth in a lab; not what others
/// stack on an ENI with the ENI's own hardware address.
pub(super) fn may_be_eni(device: &Device) -> bool {
    device.mac.is_some_and(|m| m.0 != [0; 6]) && matches!(device.kind, None | Some(InfoKind::Veth))
}

/// An address with what the plan wants to know of it.
pub(super) struct Addr {
    pub(super) net: IpNet,
    pub(super) global: bool,
    pub(super) permanent: bool,
}

/// A device's addresses.
pub(super) fn addresses(nl: &mut Nl, index: u32) -> Result<Vec<Addr>, NlError> {
    Ok(list_addresses(nl, index)?.into_iter().filter(|(on, _)| *on == index).map(|(_, a)| a).collect())
}

/// The addresses of every device in the namespace.
pub(super) fn all_addresses(nl: &mut Nl) -> Result<Vec<IpAddr>, NlError> {
    Ok(list_addresses(nl, 0)?.into_iter().map(|(_, a)| a.net.addr()).collect())
}

/// Addresses with the index of their device; 0 asks for all devices.
fn list_addresses(nl: &mut Nl, index: u32) -> Result<Vec<(u32, Addr)>, NlError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = AddressMessage::default();
        message.header.family = family;
        message.header.index = index;
        for reply in nl.dump("list addresses", Rtnl::GetAddress(message))? {
            let Rtnl::NewAddress(a) = reply else { continue };
            found.extend(addr(&a).map(|found| (a.header.index, found)));
        }
    }
    Ok(found)
}

fn addr(message: &AddressMessage) -> Option<Addr> {
    let mut local = None;
    let mut address = None;
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(f) => flags = *f,
            _ => {}
        }
    }
    Some(Addr {
        net: local.or(address).and_then(|ip| IpNet::new(ip, message.header.prefix_len).ok())?,
        global: message.header.scope == AddressScope::Universe,
        permanent: flags.contains(AddressFlags::Permanent),
    })
}

/// A route as far as the plan knows it.
#[derive(Clone, Debug)]
pub(super) struct Path {
    pub(super) table: u32,
    pub(super) to: IpNet,
    pub(super) index: u32,
    pub(super) via: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    pub(super) ours: bool,
    pub(super) protocol: RouteProtocol,
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

pub(super) fn path(message: &RouteMessage) -> Option<Path> {
    let v4 = message.header.address_family == AddressFamily::Inet;
    let anywhere: IpAddr =
        if v4 { std::net::Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let mut out = Path {
        table: u32::from(message.header.table),
        to: IpNet::new(anywhere, message.header.destination_prefix_length).ok()?,
        index: 0,
        via: None,
        source: None,
        ours: message.header.protocol == RouteProtocol::Other(PROTOCOL),
        protocol: message.header.protocol,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => out.to = IpNet::new(ip_of(ip)?, out.to.prefix_len()).ok()?,
            RouteAttribute::Table(table) => out.table = *table,
            RouteAttribute::Oif(index) => out.index = *index,
            RouteAttribute::Gateway(ip) => out.via = ip_of(ip),
            RouteAttribute::PrefSource(ip) => out.source = ip_of(ip),
            _ => {}
        }
    }
    Some(out)
}

pub(super) fn first_path(answer: &[Rtnl]) -> Option<Path> {
    answer.iter().find_map(|m| match m {
        Rtnl::NewRoute(route) => path(route),
        _ => None,
    })
}

/// Routes of one table, optionally of one device.
pub(super) fn routes(nl: &mut Nl, table: u32, index: Option<u32>) -> Result<Vec<Path>, NlError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.attributes.push(RouteAttribute::Table(table));
        if let Some(index) = index {
            message.attributes.push(RouteAttribute::Oif(index));
        }
        match nl.dump("list routes", Rtnl::GetRoute(message)) {
            Ok(replies) => found.extend(replies.iter().filter_map(|m| first_path(std::slice::from_ref(m)))),
            // A table is made by its first route.
            Err(e) if e.errno == libc::ENOENT => {}
            Err(e) => return Err(e),
        }
    }
    found.retain(|p| p.table == table && index.is_none_or(|i| p.index == i));
    Ok(found)
}

/// A policy rule of ours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) priority: u32,
    pub(super) selector: Selector,
    pub(super) table: u32,
}

pub(super) fn rule(message: &RuleMessage) -> Option<Rule> {
    let mut priority = 0;
    let mut table = u32::from(message.header.table);
    let mut selector = None;
    let mut ours = false;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(p) => priority = *p,
            RuleAttribute::Table(t) => table = *t,
            RuleAttribute::Destination(ip) => selector = Some(Selector::To(*ip)),
            RuleAttribute::Source(ip) => selector = Some(Selector::From(*ip)),
            RuleAttribute::Protocol(p) => ours = *p == RouteProtocol::Other(PROTOCOL),
            _ => {}
        }
    }
    selector.filter(|_| ours).map(|selector| Rule { priority, selector, table })
}

pub(super) fn rules(nl: &mut Nl) -> Result<Vec<Rule>, NlError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RuleMessage::default();
        message.header.family = family;
        let replies = match nl.dump("list rules", Rtnl::GetRule(message)) {
            Ok(replies) => replies,
            // A kernel without IPv6.
            Err(e) if e.errno == libc::EAFNOSUPPORT || e.errno == libc::EOPNOTSUPP => continue,
            Err(e) => return Err(e),
        };
        found.extend(replies.iter().filter_map(|m| match m {
            Rtnl::NewRule(r) => rule(r),
            _ => None,
        }));
    }
    Ok(found)
}

/// Addresses, permanent neighbours and token buckets of a device.
pub(super) fn on_device(nl: &mut Nl, dev: Dev, devices: &Devices, state: &mut State) -> Result<(), NlError> {
    let index = devices.index(dev);
    for a in addresses(nl, index)? {
        if a.global && a.permanent {
            state.insert(Key::Address(dev, a.net), Value::Address);
        }
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        message.attributes.push(NeighbourAttribute::IfIndex(index));
        for reply in nl.dump("list neighbours", Rtnl::GetNeighbour(message))? {
            let Rtnl::NewNeighbour(n) = reply else { continue };
            if let (Some((ip, mac)), true) = (neighbour(&n), n.header.ifindex == index) {
                state.insert(Key::Neighbour(dev, ip), Value::Neighbour(mac));
            }
        }
    }
    let mut message = TcMessage::default();
    message.header.index = index as i32;
    for reply in nl.dump("list qdiscs", Rtnl::GetQueueDiscipline(message))? {
        let Rtnl::NewQueueDiscipline(q) = reply else { continue };
        if q.header.index != index as i32 {
            continue;
        }
        if q.header.parent == TcHandle::ROOT
            && let Some(bucket) = token_bucket(&q)
        {
            state.insert(Key::Queue(dev), Value::Queue(bucket));
        }
        let hook = |a: &TcAttribute| matches!(a, TcAttribute::Kind(kind) if kind == "ingress" || kind == "clsact");
        if q.attributes.iter().any(hook)
            && let Some(to) = redirect_target(nl, index)?.and_then(|to| devices.role(dev.side(), to))
        {
            state.insert(Key::Redirect(dev), Value::Redirect(to));
        }
    }
    Ok(())
}

fn neighbour(message: &NeighbourMessage) -> Option<(IpAddr, Mac)> {
    let mut ip = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => ip = Some(IpAddr::V4(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => ip = Some(IpAddr::V6(*a)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(&bytes[..]).ok().map(Mac),
            _ => {}
        }
    }
    (message.header.state == NeighbourState::Permanent).then_some(())?;
    Some((ip?, mac?))
}

/// The parameters of a token bucket filter, parsed by hand.
fn token_bucket(message: &TcMessage) -> Option<TokenBucket> {
    if !message.attributes.contains(&TcAttribute::Kind("tbf".to_owned())) {
        return None;
    }
    let options = message.attributes.iter().find_map(|a| match a {
        TcAttribute::Options(options) => options.first(),
        _ => None,
    })?;
    let TcOption::Other(nested) = options else { return None };
    let mut bytes = vec![0; nested.value_len()];
    nested.emit_value(&mut bytes);
    let u32_at = |b: &[u8], at: usize| b.get(at..at + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let (mut rate, mut limit, mut burst) = (None, None, None);
    let mut rest = &bytes[..];
    while rest.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
        let value = rest.get(4..len)?;
        match kind {
            TBF_PARMS => {
                rate = rate.or(u32_at(value, 8).map(u64::from));
                limit = u32_at(value, 24);
                // The kernel gives the burst back as time, in ticks of 64 ns.
                burst = u32_at(value, 28);
            }
            TBF_RATE64 => rate = value.try_into().ok().map(u64::from_ne_bytes),
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    let rate = rate?;
    let ticks = u64::from(burst?);
    let bytes = u128::from(ticks) * 64 * u128::from(rate) / 1_000_000_000;
    Some(TokenBucket { rate, burst: u32::try_from(bytes).unwrap_or(u32::MAX), limit: limit? })
}

/// Where the ingress filter of a device sends packets.
fn redirect_target(nl: &mut Nl, index: u32) -> Result<Option<u32>, NlError> {
    let mut message = TcMessage::default();
    message.header.index = index as i32;
    message.header.parent = INGRESS_CHAIN;
    let replies = nl.dump("list filters", Rtnl::GetTrafficFilter(message))?;
    Ok(replies.iter().find_map(|m| match m {
        Rtnl::NewTrafficFilter(f) => mirrored_to(f),
        _ => None,
    }))
}

fn mirrored_to(filter: &TcMessage) -> Option<u32> {
    for attribute in &filter.attributes {
        let TcAttribute::Options(options) = attribute else { continue };
        for option in options {
            let TcOption::U32(TcFilterU32Option::Action(actions)) = option else { continue };
            for attribute in actions.iter().flat_map(|a| &a.attributes) {
                let TcActionAttribute::Options(options) = attribute else { continue };
                for option in options {
                    if let TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) = option {
                        return Some(mirror.ifindex);
                    }
                }
            }
        }
    }
    None
}

/// All that this module reads from a message, for fuzzing.
pub(crate) fn everything(message: &Rtnl) {
    match message {
        Rtnl::NewLink(m) => drop(may_be_eni(&device(m))),
        Rtnl::NewAddress(m) => drop(addr(m)),
        Rtnl::NewRoute(m) => drop(path(m)),
        Rtnl::NewRule(m) => drop(rule(m)),
        Rtnl::NewNeighbour(m) => drop(neighbour(m)),
        Rtnl::NewQueueDiscipline(m) => drop(token_bucket(m)),
        Rtnl::NewTrafficFilter(m) => drop(mirrored_to(m)),
        _ => {}
    }
}

/// Our routes of a pod's namespace, and the addresses they serve.
pub(super) fn pod_routes(nl: &mut Nl, devices: &Devices, state: &mut State) -> Result<(), NlError> {
    for p in routes(nl, MAIN, None)?.into_iter().filter(|p| p.ours) {
        if let Some(dev) = devices.role(Side::Pod, p.index) {
            let value = Value::Route { dev, via: p.via, source: p.source };
            state.insert(Key::Route(Side::Pod, MAIN, p.to), value);
        }
    }
    Ok(())
}

/// Our routes and rules of the node's namespace: those over the host link, those
/// for `addresses`, and those that `desired` names.
pub(super) fn node_routes_and_rules(
    nl: &mut Nl,
    devices: &Devices,
    desired: &State,
    addresses: &[IpAddr],
    state: &mut State,
) -> Result<(), NlError> {
    let mut addresses: BTreeSet<IpAddr> = addresses.iter().copied().collect();
    let link = devices.index(Dev::HostLink);
    if link != 0 {
        for p in routes(nl, MAIN, Some(link))?.into_iter().filter(|p| p.ours) {
            addresses.insert(p.to.addr());
            let value = Value::Route { dev: Dev::HostLink, via: p.via, source: p.source };
            state.insert(Key::Route(Side::Node, MAIN, p.to), value);
        }
    }
    let tables: BTreeSet<u32> = desired
        .keys()
        .filter_map(|key| match key {
            Key::Route(Side::Node, table, _) if *table != MAIN => Some(*table),
            _ => None,
        })
        .collect();
    for table in tables {
        for p in routes(nl, table, None)?.into_iter().filter(|p| p.ours) {
            let key = Key::Route(Side::Node, table, p.to);
            // The table belongs to all pods of the ENI.
            if let (true, Some(dev)) = (desired.contains_key(&key), devices.role(Side::Node, p.index)) {
                state.insert(key, Value::Route { dev, via: p.via, source: p.source });
            }
        }
    }
    for r in rules(nl)? {
        if addresses.contains(&r.selector.address()) {
            state.insert(Key::Rule(r.priority, r.selector), Value::Rule(r.table));
        }
    }
    Ok(())
}
