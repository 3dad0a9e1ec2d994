//! Objects to netlink messages.
//!
//! Purpose: the one place that knows how each object is made and removed on the
//! wire. Owner: the wiring threads. Every addition replaces what is in its place
//! and every removal takes "already gone" for done, so that any of them can be
//! repeated.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind, InfoVeth, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};

use super::nl::{GONE, Request, THERE};
use super::objects::{Dev, Key, Link, LinkKind, MAIN, PROTOCOL, Selector, Setting, Side, TokenBucket, Value, word};
use crate::model::Mac;

/// Which device plays which role, by index and name. Index 0: not there yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Devices {
    map: BTreeMap<Dev, (u32, String)>,
}

impl Devices {
    pub(super) fn set(&mut self, dev: Dev, index: u32, name: &str) {
        self.map.insert(dev, (index, name.to_owned()));
    }
    pub(super) fn index(&self, dev: Dev) -> u32 {
        self.map.get(&dev).map_or(0, |(index, _)| *index)
    }
    pub(super) fn name(&self, dev: Dev) -> &str {
        self.map.get(&dev).map_or("?", |(_, name)| name)
    }
    /// Who has an index; each namespace counts for itself.
    pub(super) fn role(&self, side: Side, index: u32) -> Option<Dev> {
        self.map.iter().find(|(dev, (i, _))| *i == index && index != 0 && dev.side() == side).map(|(dev, _)| *dev)
    }
}

const PUT: u16 = NLM_F_CREATE | NLM_F_REPLACE;

fn request(what: impl Into<String>, message: Rtnl, flags: u16, fine: &'static [i32]) -> Request {
    Request { what: what.into(), message, flags, fine }
}

pub(super) fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// An object in words, for errors and findings.
pub(super) fn describe(key: &Key, value: &Value, devices: &Devices) -> String {
    let kind = word(key);
    match (key, value) {
        (Key::Link(dev), _) => format!("{kind} {}", devices.name(*dev)),
        (Key::Setting(dev, setting), Value::Setting(v)) => format!("{kind} {}={v}", setting.path(devices.name(*dev))),
        (Key::Address(dev, net), _) => format!("{kind} {net} on {}", devices.name(*dev)),
        (Key::Neighbour(dev, ip), Value::Neighbour(mac)) => {
            format!("{kind} {ip} at {mac} on {}", devices.name(*dev))
        }
        (Key::Route(_, table, to), Value::Route { dev, via, .. }) => {
            let via = via.map(|ip| format!(" via {ip}")).unwrap_or_default();
            format!("{kind} {to}{via} dev {} table {table}", devices.name(*dev))
        }
        (Key::Rule(priority, Selector::To(ip)), Value::Rule(t)) => format!("{kind} {priority} to {ip} lookup {t}"),
        (Key::Rule(priority, Selector::From(ip)), Value::Rule(t)) => format!("{kind} {priority} from {ip} lookup {t}"),
        (Key::Queue(dev), Value::Queue(tb)) => format!("{kind} tbf {} bit/s on {}", tb.rate * 8, devices.name(*dev)),
        (Key::Redirect(dev), _) => format!("{kind} redirect on {}", devices.name(*dev)),
        (key, value) => format!("{kind} {key:?} {value:?}"),
    }
}

/// Make or correct an object on devices that are there.
pub(super) fn put(key: &Key, value: &Value, devices: &Devices, out: &mut Vec<Request>) {
    let what = describe(key, value, devices);
    match (key, value) {
        (Key::Link(dev), Value::Link(link)) => out.push(set_link(what, devices.index(*dev), link)),
        (Key::Address(dev, net), _) => {
            out.push(request(what, Rtnl::NewAddress(address(devices.index(*dev), *net)), PUT, &[]));
        }
        (Key::Neighbour(dev, ip), Value::Neighbour(mac)) => {
            let message = neighbour(devices.index(*dev), *ip, Some(*mac));
            out.push(request(what, Rtnl::NewNeighbour(message), PUT, &[]));
        }
        (Key::Route(_, table, to), Value::Route { dev, via, source }) => {
            // The kernel refuses an IPv6 gateway as "on link" of one device when
            // the main table reaches it by another, as it does where ENIs share
            // a vSwitch. It looks into the route's own table first.
            if let (Some(gateway @ IpAddr::V6(_)), true) = (*via, *table != MAIN) {
                let message = route(*table, gateway.into(), devices.index(*dev), None, None);
                out.push(request(&*what, Rtnl::NewRoute(message), PUT, &[]));
            }
            let message = route(*table, *to, devices.index(*dev), *via, *source);
            out.push(request(what, Rtnl::NewRoute(message), PUT, &[]));
        }
        (Key::Rule(priority, selector), Value::Rule(table)) => {
            // Whatever table an earlier life of the address pointed at.
            out.push(request(&*what, Rtnl::DelRule(rule(*priority, *selector, 0)), 0, GONE));
            let message = rule(*priority, *selector, *table);
            out.push(request(what, Rtnl::NewRule(message), NLM_F_CREATE | NLM_F_EXCL, THERE));
        }
        (Key::Queue(dev), Value::Queue(bucket)) => {
            let message = token_bucket(devices.index(*dev), bucket);
            out.push(request(what, Rtnl::NewQueueDiscipline(message), PUT, &[]));
        }
        (Key::Redirect(dev), Value::Redirect(to)) => redirect(what, devices.index(*dev), devices.index(*to), out),
        // Settings are files.
        _ => {}
    }
}

/// Remove an object.
pub(super) fn delete(key: &Key, value: &Value, devices: &Devices, out: &mut Vec<Request>) {
    let what = format!("remove {}", describe(key, value, devices));
    let message = match (key, value) {
        (Key::Link(dev), _) => Rtnl::DelLink(link_message(devices.index(*dev))),
        (Key::Address(dev, net), _) => Rtnl::DelAddress(address(devices.index(*dev), *net)),
        (Key::Neighbour(dev, ip), _) => Rtnl::DelNeighbour(neighbour(devices.index(*dev), *ip, None)),
        (Key::Route(_, table, to), Value::Route { dev, .. }) => {
            let mut message = route(*table, *to, devices.index(*dev), None, None);
            // Whatever its scope.
            message.header.scope = RouteScope::NoWhere;
            Rtnl::DelRoute(message)
        }
        (Key::Rule(priority, selector), Value::Rule(table)) => Rtnl::DelRule(rule(*priority, *selector, *table)),
        (Key::Queue(dev), _) => Rtnl::DelQueueDiscipline(qdisc(devices.index(*dev), TcHandle::ROOT)),
        (Key::Redirect(dev), _) => {
            out.push(request(&*what, Rtnl::DelTrafficFilter(redirect_filter(devices.index(*dev))), 0, NO_FILTER));
            // A clsact hook may carry the pod's programs and goes with the device;
            // the plain one was made by an earlier version.
            let mut hook = qdisc(devices.index(*dev), TcHandle::INGRESS);
            hook.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
            out.push(request(what, Rtnl::DelQueueDiscipline(hook), 0, NO_FILTER));
            return;
        }
        _ => return,
    };
    out.push(request(what, message, 0, GONE));
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

pub(super) fn remove_link(index: u32) -> Request {
    request(format!("remove link {index}"), Rtnl::DelLink(link_message(index)), 0, GONE)
}

/// These links in one removal, by a group that has no other members.
pub(super) fn remove_links(indexes: &[u32], group: u32) -> Vec<Request> {
    let mut requests: Vec<Request> = indexes
        .iter()
        .map(|index| {
            let mut message = link_message(*index);
            message.attributes.push(LinkAttribute::Group(group));
            request(format!("put link {index} into group {group}"), Rtnl::SetLink(message), 0, GONE)
        })
        .collect();
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(group));
    requests.push(request(format!("remove links of group {group}"), Rtnl::DelLink(message), 0, GONE));
    requests
}

fn set_link(what: String, index: u32, link: &Link) -> Request {
    let mut message = link_message(index);
    if link.up {
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
    }
    if let (Some(mac), false) = (link.mac, link.kind == LinkKind::MovedEni) {
        message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    }
    if let Some(mtu) = link.mtu {
        message.attributes.push(LinkAttribute::Mtu(mtu));
    }
    request(what, Rtnl::SetLink(message), 0, &[])
}

/// Only set up: for a device that was made with everything else right. An alias
/// cannot be given when a device is made, so it comes with this.
pub(super) fn link_up(name: &str, index: u32, alias: Option<&str>) -> Request {
    let link = Link { kind: LinkKind::Given, mac: None, mtu: None, up: true };
    let mut request = set_link(format!("link {name} up"), index, &link);
    if let (Some(alias), Rtnl::SetLink(message)) = (alias, &mut request.message) {
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
    }
    request
}

/// Whether [`settings`] can say it; 0 is not said on the wire.
pub(super) fn is_link_setting(setting: Setting, value: u32) -> bool {
    value != 0 && matches!(setting, Setting::Forwarding4 | Setting::RpFilter)
        || setting == Setting::AddrGenMode && value == 1
}

/// Settings of a device without the files of /proc/sys: a write there that
/// meets a busy rtnetlink lock is not put to sleep but tried again and again,
/// and with several pods at once the processors do little else.
pub(super) fn settings(name: &str, index: u32, wanted: &[(Setting, u32)]) -> Vec<Request> {
    let mut v4 = InetDevConf::default();
    let mut out = Vec::new();
    let ask = |family: AfSpecUnspec, fine| {
        let mut message = link_message(index);
        message.attributes.push(LinkAttribute::AfSpecUnspec(vec![family]));
        request(format!("settings of {name}"), Rtnl::SetLink(message), 0, fine)
    };
    for (setting, value) in wanted {
        let value = i32::try_from(*value).unwrap_or(i32::MAX);
        match setting {
            Setting::Forwarding4 => v4.forwarding = value,
            Setting::RpFilter => v4.rp_filter = value,
            Setting::AddrGenMode => {
                let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
                // A kernel without IPv6 makes no such address either.
                out.push(ask(AfSpecUnspec::Inet6(vec![none]), &[libc::EAFNOSUPPORT]));
            }
            _ => {}
        }
    }
    if v4 != InetDevConf::default() {
        out.push(ask(AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(v4)]), &[]));
    }
    out
}

pub(super) fn link_down(name: &str, index: u32) -> Request {
    let mut message = link_message(index);
    message.header.change_mask = LinkFlags::Up;
    request(format!("link {name} down"), Rtnl::SetLink(message), 0, GONE)
}

/// Take a device down and give it a name.
pub(super) fn rename_down(from: &str, index: u32, to: &str) -> [Request; 2] {
    let mut message = link_message(index);
    message.attributes.push(LinkAttribute::IfName(to.to_owned()));
    [link_down(from, index), request(format!("rename {from} to {to}"), Rtnl::SetLink(message), 0, &[])]
}

/// A new veth pair: one end here, its peer born in the namespace `pod`.
pub(super) fn new_veth(host: &str, host_mac: Mac, peer: &str, peer_mac: Mac, mtu: u32, pod: BorrowedFd<'_>) -> Request {
    let end = |name: &str, mac: Mac| {
        let mut end = LinkMessage::default();
        end.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.0.to_vec()),
            LinkAttribute::Mtu(mtu),
        ];
        end
    };
    let mut other = end(peer, peer_mac);
    other.attributes.push(LinkAttribute::NetNsFd(pod.as_raw_fd()));
    let mut message = end(host, host_mac);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
    ]));
    request(format!("create link {host} with {peer}"), Rtnl::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, &[])
}

pub(super) fn new_ifb(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes =
        vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)])];
    request(format!("create link {name} (ifb)"), Rtnl::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, THERE)
}

/// Move a device into another namespace and name it, in one step.
pub(super) fn move_link(from: &str, index: u32, to: BorrowedFd<'_>, name: &str) -> Request {
    let mut message = link_message(index);
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::NetNsFd(to.as_raw_fd()), LinkAttribute::IfName(name.to_owned())];
    request(format!("move link {from} as {name}"), Rtnl::SetLink(message), 0, &[])
}

/// Everything about one link but its statistics.
pub(super) fn get_link(name: &str, fine: &'static [i32]) -> Request {
    let mut message = LinkMessage::default();
    message.attributes =
        vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    request(format!("look up link {name}"), Rtnl::GetLink(message), 0, fine)
}

pub(super) fn get_link_by_index(index: u32, fine: &'static [i32]) -> Request {
    let mut message = link_message(index);
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    request(format!("look up link {index}"), Rtnl::GetLink(message), 0, fine)
}

pub(super) fn all_links() -> Rtnl {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    Rtnl::GetLink(message)
}

fn address(index: u32, net: ipnet::IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.attributes.push(AddressAttribute::Local(net.addr()));
    message.attributes.push(AddressAttribute::Address(net.addr()));
    if net.addr().is_ipv6() {
        // The cloud has assigned it: no second on the wire to ask around.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn neighbour(index: u32, ip: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::Destination(match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }));
    if let Some(mac) = mac {
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    }
    message
}

fn route_address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

fn route(table: u32, to: ipnet::IpNet, dev: u32, via: Option<IpAddr>, source: Option<IpAddr>) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(to.addr());
    header.destination_prefix_length = to.prefix_len();
    header.table = u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    header.protocol = RouteProtocol::Other(PROTOCOL);
    header.scope = if via.is_none() && to.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    header.kind = RouteType::Unicast;
    let attributes = &mut message.attributes;
    if to.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(route_address(to.addr())));
    }
    attributes.push(RouteAttribute::Table(table));
    attributes.push(RouteAttribute::Oif(dev));
    if let Some(via) = via {
        // The gateway is in no subnet of the device's /32.
        if via.is_ipv4() || table == MAIN {
            header.flags = RouteFlags::Onlink;
        }
        attributes.push(RouteAttribute::Gateway(route_address(via)));
    }
    if let Some(source) = source {
        attributes.push(RouteAttribute::PrefSource(route_address(source)));
    }
    message
}

/// Which way a packet to `ip` would go, and with which source.
pub(super) fn route_lookup(ip: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(ip);
    message.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
    message.attributes.push(RouteAttribute::Destination(route_address(ip)));
    const NO_WAY: &[i32] = &[libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL, libc::EAFNOSUPPORT];
    request(format!("route lookup for {ip}"), Rtnl::GetRoute(message), 0, NO_WAY)
}

/// Table 0 stands for any, when removing.
pub(super) fn rule(priority: u32, selector: Selector, table: u32) -> RuleMessage {
    let ip = selector.address();
    let length = if ip.is_ipv4() { 32 } else { 128 };
    let mut message = RuleMessage::default();
    message.header.family = family(ip);
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(table).unwrap_or(0);
    message.attributes.push(match selector {
        Selector::To(ip) => {
            message.header.dst_len = length;
            RuleAttribute::Destination(ip)
        }
        Selector::From(ip) => {
            message.header.src_len = length;
            RuleAttribute::Source(ip)
        }
    });
    message.attributes.push(RuleAttribute::Priority(priority));
    message.attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    if table != 0 {
        message.attributes.push(RuleAttribute::Table(table));
    }
    message
}

fn qdisc(index: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = parent;
    message
}

/// Attribute numbers of the token bucket filter (linux/pkt_sched.h).
pub(super) const TBF_PARMS: u16 = 1;
pub(super) const TBF_RATE64: u16 = 4;
pub(super) const TBF_BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`: the kernel computes the rate itself, no table.
const ETHERNET: u8 = 1;

fn token_bucket(index: u32, bucket: &TokenBucket) -> TcMessage {
    // struct tc_tbf_qopt: two tc_ratespec (12 bytes each: cell_log, linklayer,
    // overhead u16, cell_align i16, mpu u16, rate u32), limit, buffer, mtu.
    let mut options = [0u8; 36];
    options[1] = ETHERNET;
    options[8..12].copy_from_slice(&u32::try_from(bucket.rate).unwrap_or(u32::MAX).to_ne_bytes());
    options[24..28].copy_from_slice(&bucket.limit.to_ne_bytes());
    let mut nested = vec![
        TcOption::Other(DefaultNla::new(TBF_PARMS, options.to_vec())),
        TcOption::Other(DefaultNla::new(TBF_BURST, bucket.burst.to_ne_bytes().to_vec())),
    ];
    if bucket.rate > u64::from(u32::MAX) {
        nested.push(TcOption::Other(DefaultNla::new(TBF_RATE64, bucket.rate.to_ne_bytes().to_vec())));
    }
    let mut message = qdisc(index, TcHandle::ROOT);
    message.attributes = vec![TcAttribute::Kind("tbf".to_owned()), TcAttribute::Options(nested)];
    message
}

/// Errors that mean there is no such filter or hook.
const NO_FILTER: &[i32] = &[libc::ENOENT, libc::EINVAL, libc::ENODEV, libc::EOPNOTSUPP];

/// What arrives, of a clsact hook; a plain ingress hook has no other chain.
pub(super) const INGRESS_CHAIN: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };

/// The place of our filter: last in line, whatever else hangs there; for every
/// protocol (`ETH_P_ALL`).
fn redirect_filter(index: u32) -> TcMessage {
    const PRIORITY: u16 = 49_000;
    let mut filter = qdisc(index, INGRESS_CHAIN);
    filter.header.info = u32::from(TcHandle { major: PRIORITY, minor: 3u16.to_be() });
    filter
}

/// A clsact hook and one filter that sends everything through `to`. Where the
/// kernel has no tcx the hook is there already, with the pod's programs on it:
/// they run first.
fn redirect(what: String, index: u32, to: u32, out: &mut Vec<Request>) {
    // One that led to a device that is gone would be found first.
    out.push(request(&*what, Rtnl::DelTrafficFilter(redirect_filter(index)), 0, NO_FILTER));
    let mut ingress = qdisc(index, TcHandle::INGRESS);
    ingress.header.handle = TcHandle { major: 0xffff, minor: 0 };
    ingress.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    out.push(request(&*what, Rtnl::NewQueueDiscipline(ingress), NLM_F_CREATE | NLM_F_EXCL, THERE));
    let mut filter = redirect_filter(index);
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    out.push(request(what, Rtnl::NewTrafficFilter(filter), NLM_F_CREATE | NLM_F_EXCL, THERE));
}
