//! Shared ENI, veth mode (pure).
//!
//! The pod has a /32 (and /128) and a default route through a link-local gateway
//! that is a permanent neighbour: the host link's address, so that no ARP is
//! spoken. On the node a host route leads to the pod, and two policy rules lead
//! its packets: those to the pod into main, before all else, and those from it
//! into its ENI's table, so that they leave by the ENI that owns the address.

use std::net::IpAddr;

use super::Config;
use super::names::{LinkNames, eni_table};
use super::objects::{Dev, Key, Link, LinkKind, MAIN, Selector, Setting, Side, State, Value};
use super::plan::{Facts, addresses, eni_routes, everywhere, token_bucket, veth_pair};
use crate::model::Lease;

pub(super) fn desired(config: &Config, lease: &Lease, facts: &Facts, names: &LinkNames) -> State {
    let mut state = State::new();
    let table = eni_table(config.table_base, lease.eni.primary4);
    veth_pair(&mut state, names, Dev::Pod, facts.mtu);
    let loopback = Link { kind: LinkKind::Given, mac: None, mtu: None, up: true };
    state.insert(Key::Link(Dev::Loopback), Value::Link(loopback));
    if lease.v6.is_some() {
        state.insert(Key::Setting(Dev::Pod, Setting::DisableIpv6), Value::Setting(0));
        state.insert(Key::Setting(Dev::Pod, Setting::AcceptRa), Value::Setting(0));
    }
    for (ip, node) in addresses(lease, facts) {
        let gateway = match ip {
            IpAddr::V4(_) => IpAddr::V4(config.gateway4),
            IpAddr::V6(_) => IpAddr::V6(config.gateway6),
        };
        state.insert(Key::Address(Dev::Pod, ip.into()), Value::Address);
        state.insert(Key::Neighbour(Dev::Pod, gateway), Value::Neighbour(names.host_mac));
        state.insert(Key::Neighbour(Dev::HostLink, ip), Value::Neighbour(names.pod_mac));
        let out = Value::Route { dev: Dev::Pod, via: Some(gateway), source: None };
        state.insert(Key::Route(Side::Pod, MAIN, everywhere(ip)), out);
        let host = Value::Route { dev: Dev::HostLink, via: None, source: node };
        state.insert(Key::Route(Side::Node, MAIN, ip.into()), host);
        state.insert(Key::Rule(config.rule_to_pod, Selector::To(ip)), Value::Rule(MAIN));
        state.insert(Key::Rule(config.rule_from_pod, Selector::From(ip)), Value::Rule(table));
    }
    // Made by PrepareEni; here too, since a link that went down lost its routes.
    eni_routes(&mut state, config, &lease.eni, lease.v6.is_some());
    // Each direction waits where it is sent: what the pod receives at the host
    // link, what it sends at its own interface.
    if let Some(bps) = lease.bandwidth.ingress_bps {
        state.insert(Key::Queue(Dev::HostLink), Value::Queue(token_bucket(bps, facts.mtu)));
    }
    if let Some(bps) = lease.bandwidth.egress_bps {
        state.insert(Key::Queue(Dev::Pod), Value::Queue(token_bucket(bps, facts.mtu)));
    }
    state
}
