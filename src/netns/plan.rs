//! What the kernel should look like, and the way there (pure).
//!
//! `desired` turns a lease and a few facts about the node into the objects of
//! both namespaces; each mode is one file. `diff` turns two states into the
//! operations between them. Invariants, held by property tests: applying
//! `diff(desired, actual)` to `actual` gives `desired`; done again it is empty;
//! `diff(nothing, actual)` leaves nothing of ours.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::names::{self, LinkNames};
use super::objects::{Dev, Key, Link, LinkKind, Setting, Side, State, TokenBucket, Value, on, points_at};
use super::{Config, exclusive, veth};
use crate::model::{AttachMode, EniRef, Lease, Mac};

/// What a plan needs to know of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The ENI's MTU, or the configured one.
    pub mtu: u32,
    /// The node's own address towards the VPC: the source of its probes.
    pub node4: Option<Ipv4Addr>,
    pub node6: Option<Ipv6Addr>,
    /// Every address of the node's primary device.
    pub node_addresses: Vec<IpAddr>,
}

/// One step. `Put` makes or corrects, `Delete` removes; both do nothing when the
/// kernel is already as wished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Delete(Key, Value),
    Put(Key, Value),
}

/// A device of somebody else is where ours should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is already another device in the place of {0:?}")]
pub struct Conflict(pub Dev);

/// The objects of an attachment, in both namespaces.
pub fn desired(config: &Config, lease: &Lease, facts: &Facts) -> State {
    let names = names::link_names(&config.link_prefix, &lease.attachment);
    match lease.mode {
        AttachMode::Veth => veth::desired(config, lease, facts, &names),
        AttachMode::Exclusive => exclusive::desired(config, lease, facts, &names),
    }
}

/// The node's side of a shared ENI.
///
/// `primary` is the node's own network device: its addresses and its router
/// advertisements belong to the node's OS. None of the ENI's addresses is the
/// node's: the first one, too, is leased to pods. The device carries `node4`
/// instead, for reverse-path checks want an address on it, and so that ARP for
/// the gateway does not carry one that a pod has.
pub fn desired_eni(config: &Config, eni: &EniRef, primary: bool, dual: bool, node4: Option<Ipv4Addr>) -> State {
    let mut state = State::new();
    let link = Link { kind: LinkKind::Given, mac: None, mtu: config.mtu, up: true };
    state.insert(Key::Link(Dev::Eni), Value::Link(link));
    // Loose: the reverse path of a pod's packet is a policy route.
    state.insert(Key::Setting(Dev::Eni, Setting::RpFilter), Value::Setting(2));
    state.insert(Key::Setting(Dev::Eni, Setting::Forwarding4), Value::Setting(1));
    if !primary {
        if dual {
            state.insert(Key::Setting(Dev::Eni, Setting::DisableIpv6), Value::Setting(0));
            // The cloud assigns addresses; a second check only delays the
            // link-local address that neighbour discovery needs.
            state.insert(Key::Setting(Dev::Eni, Setting::AcceptDad), Value::Setting(0));
        }
        state.insert(Key::Setting(Dev::Eni, Setting::AcceptRa), Value::Setting(0));
        if let Some(node4) = node4 {
            state.insert(Key::Address(Dev::Eni, IpAddr::V4(node4).into()), Value::Address);
        }
    }
    eni_routes(&mut state, config, eni, dual);
    state
}

/// The default routes of an ENI's own table.
pub(super) fn eni_routes(state: &mut State, config: &Config, eni: &EniRef, dual: bool) {
    let table = names::eni_table(config.table_base, eni.primary4);
    let mut default = |gateway: IpAddr| {
        let value = Value::Route { dev: Dev::Eni, via: Some(gateway), source: None };
        state.insert(Key::Route(Side::Node, table, everywhere(gateway)), value);
    };
    default(eni.subnet.gateway4.into());
    if let (true, Some(gateway)) = (dual, eni.subnet.gateway6) {
        default(gateway.into());
        // `put` says why.
        let link = Value::Route { dev: Dev::Eni, via: None, source: None };
        state.insert(Key::Route(Side::Node, table, IpAddr::V6(gateway).into()), link);
    }
}

/// The veth pair of an attachment.
pub(super) fn veth_pair(state: &mut State, names: &LinkNames, peer: Dev, mtu: u32) {
    let mut link = |dev, kind, mac: Mac| {
        let link = Link { kind, mac: Some(mac), mtu: Some(mtu), up: true };
        state.insert(Key::Link(dev), Value::Link(link));
    };
    link(Dev::HostLink, LinkKind::Veth { peer }, names.host_mac);
    link(peer, LinkKind::Peer, names.pod_mac);
    // Strict: the only way back to the pod's address is this link, so a pod
    // cannot send IPv4 packets with another's source.
    state.insert(Key::Setting(Dev::HostLink, Setting::RpFilter), Value::Setting(1));
    state.insert(Key::Setting(Dev::HostLink, Setting::Forwarding4), Value::Setting(1));
    // Neighbours are permanent: nothing on this link needs a link-local address,
    // its duplicate detection, its multicast reports or its search for routers.
    for end in [Dev::HostLink, peer] {
        state.insert(Key::Setting(end, Setting::AddrGenMode), Value::Setting(1));
    }
}

/// The lease's addresses with the node's source address of the same family.
pub(super) fn addresses(lease: &Lease, facts: &Facts) -> Vec<(IpAddr, Option<IpAddr>)> {
    let v4 = (IpAddr::V4(lease.v4), facts.node4.map(IpAddr::V4));
    let v6 = lease.v6.map(|ip| (IpAddr::V6(ip), facts.node6.map(IpAddr::V6)));
    std::iter::once(v4).chain(v6).collect()
}

/// The default destination in an address's family.
pub(super) fn everywhere(like: IpAddr) -> ipnet::IpNet {
    match like {
        IpAddr::V4(_) => ipnet::Ipv4Net::default().into(),
        IpAddr::V6(_) => ipnet::Ipv6Net::default().into(),
    }
}

/// The token bucket for a limit. The burst is 10 ms worth, at least two packets;
/// the queue holds 50 ms more, at least one unsegmented packet of TCP.
pub fn token_bucket(bits_per_second: u64, mtu: u32) -> TokenBucket {
    let rate = (bits_per_second / 8).max(1);
    let frame = u64::from(mtu) + 18;
    let burst = (rate / 100).clamp(2 * frame, 64 << 20);
    let limit = burst + (rate / 20).clamp((64 << 10) + frame, 256 << 20);
    TokenBucket { rate, burst: burst as u32, limit: limit as u32 }
}

/// The operations that turn `actual` into `desired`, in an order that works.
///
/// Addresses are removed after new ones are there: with its last IPv4 address a
/// device loses its routes and neighbours.
pub fn diff(desired: &State, actual: &State) -> Result<Vec<Op>, Conflict> {
    let doomed = doomed(desired, actual)?;
    let gone = |dev: Option<Dev>| dev.is_some_and(|dev| doomed.contains(&dev));
    let stays = |key: &Key, value: &Value| match key {
        Key::Link(dev) => !doomed.contains(dev),
        // A device that gets another hardware address forgets its neighbours.
        Key::Neighbour(dev, _) if new_mac(*dev, desired, actual) => false,
        _ => !gone(on(key, value)),
    };
    let mut ops = Vec::new();
    let mut addresses = Vec::new();
    for (key, value) in actual.iter().rev() {
        match (key, value) {
            (Key::Link(dev), Value::Link(link)) => {
                let goes_with_another = matches!(link.kind, LinkKind::Peer | LinkKind::Foreign | LinkKind::Given);
                if doomed.contains(dev) && !goes_with_another {
                    ops.push(Op::Delete(key.clone(), value.clone()));
                }
            }
            // A device that is given keeps its settings: what they were before
            // nobody knows.
            (Key::Setting(..), _) => {}
            _ if desired.contains_key(key) || !stays(key, value) => {}
            (Key::Address(..), _) => addresses.push(Op::Delete(key.clone(), value.clone())),
            _ => ops.push(Op::Delete(key.clone(), value.clone())),
        }
    }
    let first_after_addresses = |key: &Key| !matches!(key, Key::Link(_) | Key::Setting(..) | Key::Address(..));
    let mut addresses = Some(addresses);
    for (key, wanted) in desired {
        if first_after_addresses(key) {
            ops.extend(addresses.take().unwrap_or_default());
        }
        let there = actual.get(key).filter(|value| stays(key, value) && !gone(points_at(value)));
        if !there.is_some_and(|value| matches_wish(value, wanted)) {
            ops.push(Op::Put(key.clone(), change(wanted, there)));
        }
    }
    ops.extend(addresses.take().unwrap_or_default());
    Ok(ops)
}

fn new_mac(dev: Dev, desired: &State, actual: &State) -> bool {
    let mac = |state: &State| match state.get(&Key::Link(dev)) {
        Some(Value::Link(link)) => link.mac,
        _ => None,
    };
    matches!((mac(desired), mac(actual)), (Some(wanted), Some(there)) if wanted != there)
}

/// What to ask for: of a device that stays, only what is not so already.
fn change(wanted: &Value, there: Option<&Value>) -> Value {
    match (wanted, there) {
        (Value::Link(wanted), Some(Value::Link(there))) => Value::Link(Link {
            mac: wanted.mac.filter(|_| wanted.mac != there.mac),
            mtu: wanted.mtu.filter(|_| wanted.mtu != there.mtu),
            ..wanted.clone()
        }),
        _ => wanted.clone(),
    }
}

/// Devices of `actual` that have to go, with their peers.
fn doomed(desired: &State, actual: &State) -> Result<BTreeSet<Dev>, Conflict> {
    let mut doomed = BTreeSet::new();
    for (key, value) in actual {
        let (Key::Link(dev), Value::Link(link)) = (key, value) else { continue };
        let wanted = match desired.get(key) {
            Some(Value::Link(wanted)) => Some(wanted),
            _ => None,
        };
        if link.kind == LinkKind::Foreign {
            if wanted.is_some() {
                return Err(Conflict(*dev));
            }
            continue;
        }
        // A pair whose other end is not in this pod is from another life.
        let widowed = matches!(link.kind, LinkKind::Veth { peer }
            if !matches!(actual.get(&Key::Link(peer)), Some(Value::Link(l)) if l.kind == LinkKind::Peer));
        if widowed || wanted.is_none_or(|w| w.kind != link.kind) && link.kind != LinkKind::Given {
            doomed.insert(*dev);
            if let LinkKind::Veth { peer } = link.kind {
                doomed.insert(peer);
            }
        }
    }
    // The other way round: a peer that has to go takes its pair with it.
    let pairs = actual.iter().filter_map(|(key, value)| match (key, value) {
        (Key::Link(dev), Value::Link(Link { kind: LinkKind::Veth { peer }, .. })) => Some((*dev, *peer)),
        _ => None,
    });
    for (dev, peer) in pairs {
        if doomed.contains(&peer) {
            doomed.insert(dev);
        }
    }
    Ok(doomed)
}

/// Whether what is there needs no correction.
fn matches_wish(there: &Value, wanted: &Value) -> bool {
    match (there, wanted) {
        (Value::Link(there), Value::Link(wanted)) => {
            there.kind == wanted.kind
                && (wanted.mac.is_none() || wanted.mac == there.mac)
                && (wanted.mtu.is_none() || wanted.mtu == there.mtu)
                && (!wanted.up || there.up)
        }
        // The kernel keeps the burst as a time and rounds.
        (Value::Queue(there), Value::Queue(wanted)) => {
            there.rate == wanted.rate
                && there.limit == wanted.limit
                && there.burst.abs_diff(wanted.burst) <= wanted.burst / 50 + 1
        }
        (there, wanted) => there == wanted,
    }
}

#[cfg(test)]
mod tests;
