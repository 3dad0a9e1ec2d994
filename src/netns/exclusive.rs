//! Exclusive ENI mode (pure).
//!
//! The ENI itself is the pod's interface: its packets meet no stack of the node.
//! A host link (veth) serves the node alone: kubelet's probes come over it, and
//! the pod reaches the node's addresses and link-local listeners over it. Other
//! pods of the same node are reached through the VPC, in both directions, so
//! that no path is asymmetric.

use std::net::IpAddr;

use fairway_ebpf_abi::HAIRPIN4;
use ipnet::IpNet;

use super::Config;
use super::names::LinkNames;
use super::objects::{Dev, Key, Link, LinkKind, MAIN, Setting, Side, State, Value};
use super::plan::{Facts, addresses, everywhere, token_bucket, veth_pair};
use crate::model::Lease;

pub(super) fn desired(config: &Config, lease: &Lease, facts: &Facts, names: &LinkNames) -> State {
    let mut state = State::new();
    let eni = Link { kind: LinkKind::MovedEni, mac: Some(lease.eni.mac), mtu: Some(facts.mtu), up: true };
    state.insert(Key::Link(Dev::Pod), Value::Link(eni));
    let loopback = Link { kind: LinkKind::Given, mac: None, mtu: None, up: true };
    state.insert(Key::Link(Dev::Loopback), Value::Link(loopback));
    veth_pair(&mut state, names, Dev::NodeLink, facts.mtu);
    // Loose: clients that the node brings to the pod come by this link, and the
    // pod's route to them is another.
    state.insert(Key::Setting(Dev::NodeLink, Setting::RpFilter), Value::Setting(2));
    if lease.v6.is_some() {
        for dev in [Dev::Pod, Dev::NodeLink] {
            state.insert(Key::Setting(dev, Setting::DisableIpv6), Value::Setting(0));
        }
        state.insert(Key::Setting(Dev::Pod, Setting::AcceptDad), Value::Setting(0));
    }
    // The pod has the addresses the cloud assigned and no others, in a cluster
    // without IPv6 too.
    state.insert(Key::Setting(Dev::Pod, Setting::AcceptRa), Value::Setting(0));
    let subnet = &lease.eni.subnet;
    for (ip, node) in addresses(lease, facts) {
        let (vpc_gateway, node_gateway) = match ip {
            IpAddr::V4(_) => (Some(IpAddr::V4(subnet.gateway4)), IpAddr::V4(config.gateway4)),
            IpAddr::V6(_) => (subnet.gateway6.map(IpAddr::V6), IpAddr::V6(config.gateway6)),
        };
        state.insert(Key::Address(Dev::Pod, ip.into()), Value::Address);
        if let Some(gateway) = vpc_gateway {
            let out = Value::Route { dev: Dev::Pod, via: Some(gateway), source: None };
            state.insert(Key::Route(Side::Pod, MAIN, everywhere(ip)), out.clone());
            // Who a pod seems to talk to when it talks to itself through a Service:
            // the programs are on the ENI, not on the link to the node.
            if ip.is_ipv4() {
                state.insert(Key::Route(Side::Pod, MAIN, IpAddr::from(HAIRPIN4).into()), out);
            }
        }
        // Nobody is heard whom the link has no address for, loose filter or not.
        if ip.is_ipv4() {
            state.insert(Key::Address(Dev::NodeLink, ip.into()), Value::Address);
        }
        // The way to the node, and back.
        state.insert(Key::Neighbour(Dev::NodeLink, node_gateway), Value::Neighbour(names.host_mac));
        state.insert(Key::Neighbour(Dev::HostLink, ip), Value::Neighbour(names.pod_mac));
        let host = Value::Route { dev: Dev::HostLink, via: None, source: node };
        state.insert(Key::Route(Side::Node, MAIN, ip.into()), host);
        for to in node_destinations(config, facts).filter(|to| to.addr().is_ipv4() == ip.is_ipv4()) {
            let route = Value::Route { dev: Dev::NodeLink, via: Some(node_gateway), source: Some(ip) };
            state.insert(Key::Route(Side::Pod, MAIN, to), route);
        }
    }
    if let Some(bps) = lease.bandwidth.egress_bps {
        state.insert(Key::Queue(Dev::Pod), Value::Queue(token_bucket(bps, facts.mtu)));
    }
    // Nobody but the cloud sends towards the ENI: what arrives is led through
    // the queue of a block device in between.
    if let Some(bps) = lease.bandwidth.ingress_bps {
        let shaper = Link { kind: LinkKind::Ifb, mac: None, mtu: None, up: true };
        state.insert(Key::Link(Dev::Shaper), Value::Link(shaper));
        state.insert(Key::Queue(Dev::Shaper), Value::Queue(token_bucket(bps, facts.mtu)));
        state.insert(Key::Redirect(Dev::Pod), Value::Redirect(Dev::Shaper));
    }
    state
}

/// What an exclusive pod reaches over its host link.
fn node_destinations<'a>(config: &'a Config, facts: &'a Facts) -> impl Iterator<Item = IpNet> + 'a {
    let own = facts.node_addresses.iter().map(|ip| IpNet::from(*ip));
    own.chain(config.node_local.iter().map(IpNet::trunc))
}
