//! Property tests of the plan, against a small model of the kernel.

use std::collections::BTreeSet;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::model::{AttachmentId, Bandwidth, EniId, PodKey, Subnet, VSwitchId};
use crate::netns::objects::{MAIN, Selector, word};

fn lease(mode: AttachMode, n: u8, host: u8, v6: bool, bandwidth: Bandwidth) -> Lease {
    Lease {
        attachment: AttachmentId { sandbox: "sandbox".into(), ifname: "eth0".into() },
        pod: PodKey::new("default", "pod"),
        pod_uid: None,
        mode,
        eni: EniRef {
            id: EniId(format!("eni-{n}")),
            mac: Mac([0, 0x16, 0x3e, 0, 0, n]),
            vswitch: VSwitchId("vsw".into()),
            primary4: Ipv4Addr::new(10, 0, n, 10),
            subnet: Subnet {
                cidr4: format!("10.0.{n}.0/24").parse().unwrap(),
                gateway4: Ipv4Addr::new(10, 0, n, 253),
                cidr6: Some(format!("fd00:0:0:{n}::/64").parse().unwrap()),
                gateway6: Some(format!("fd00:0:0:{n}::fd").parse().unwrap()),
            },
        },
        v4: Ipv4Addr::new(10, 0, n, host),
        v6: v6.then(|| format!("fd00:0:0:{n}::{host:x}").parse().unwrap()),
        netns: PathBuf::from("/var/run/netns/x"),
        bandwidth,
        traffic: Default::default(),
    }
}

fn any_lease() -> impl Strategy<Value = Lease> {
    let limit = || prop_oneof![Just(None), (8u64..100_000_000_000).prop_map(Some)];
    (any::<bool>(), 1u8..3, 20u8..23, any::<bool>(), limit(), limit()).prop_map(
        |(veth, n, host, v6, ingress_bps, egress_bps)| {
            let mode = if veth { AttachMode::Veth } else { AttachMode::Exclusive };
            lease(mode, n, host, v6, Bandwidth { ingress_bps, egress_bps })
        },
    )
}

fn any_facts() -> impl Strategy<Value = Facts> {
    (prop_oneof![Just(1400u32), Just(1500), Just(8500)], any::<bool>(), any::<bool>()).prop_map(|(mtu, has4, has6)| {
        let node4 = has4.then_some(Ipv4Addr::new(10, 0, 0, 10));
        let node6 = has6.then(|| "fd00::10".parse().unwrap());
        let node_addresses = node4.map(IpAddr::V4).into_iter().chain(node6.map(IpAddr::V6)).collect();
        Facts { mtu, node4, node6, node_addresses }
    })
}

/// Any state of the kernel an earlier life of the attachment may have left:
/// another lease's, damaged in places.
fn any_actual() -> impl Strategy<Value = State> {
    let damage = proptest::collection::vec((any::<prop::sample::Index>(), 0u8..4), 0..8);
    (any_lease(), any_facts(), damage, any::<bool>()).prop_map(|(lease, facts, damage, stray)| {
        let mut state = desired(&Config::default(), &lease, &facts);
        state.remove(&Key::Link(Dev::Eni));
        for (at, how) in damage {
            if state.is_empty() {
                break;
            }
            let key = at.get(&state.keys().cloned().collect::<Vec<_>>()).clone();
            match (how, state.get_mut(&key)) {
                (1, Some(Value::Link(link))) => link.up = false,
                (2, Some(Value::Link(link))) => link.mtu = Some(1234),
                (3, Some(Value::Link(link))) if link.kind != LinkKind::MovedEni => link.mac = Some(Mac([2; 6])),
                (1, Some(Value::Rule(table))) => *table += 1,
                (1, Some(Value::Neighbour(mac))) => *mac = Mac([2; 6]),
                (1, Some(Value::Setting(v))) => *v += 1,
                (1, Some(Value::Queue(bucket))) => bucket.rate += 1,
                _ => drop_object(&mut state, &key),
            }
        }
        if stray && !state.contains_key(&Key::Link(Dev::Pod)) {
            let mac = Some(lease.eni.mac);
            let link = Link { kind: LinkKind::MovedEni, mac, mtu: Some(1500), up: false };
            state.insert(Key::Link(Dev::Stray), Value::Link(link));
        }
        state
    })
}

/// The kernel: an object goes, and what is on it.
fn drop_object(state: &mut State, key: &Key) {
    let Some(value) = state.remove(key) else { return };
    let Key::Link(dev) = key else { return };
    let mut gone = vec![*dev];
    match value {
        Value::Link(Link { kind: LinkKind::Veth { peer }, .. }) => {
            state.remove(&Key::Link(peer));
            gone.push(peer);
        }
        Value::Link(Link { kind: LinkKind::Peer, .. }) => {
            state.remove(&Key::Link(Dev::HostLink));
            gone.push(Dev::HostLink);
        }
        _ => {}
    }
    state.retain(|key, value| !on(key, value).is_some_and(|d| gone.contains(&d)));
}

fn exists(state: &State, dev: Dev) -> bool {
    matches!(dev, Dev::Eni | Dev::Loopback) || state.contains_key(&Key::Link(dev))
}

/// The kernel takes the steps one by one, and refuses what it would refuse.
fn apply(mut state: State, ops: &[Op]) -> State {
    for op in ops {
        match op {
            Op::Delete(key @ Key::Address(dev, net), _) => {
                state.remove(key);
                let more = |k: &Key| matches!(k, Key::Address(d, n) if d == dev && n.addr().is_ipv4());
                if net.addr().is_ipv4() && !state.keys().any(more) {
                    state.retain(|k, v| match k {
                        Key::Neighbour(d, ip) => d != dev || ip.is_ipv6(),
                        Key::Route(_, _, to) => on(k, v) != Some(*dev) || to.addr().is_ipv6(),
                        _ => true,
                    });
                }
            }
            Op::Delete(key, value) => {
                assert!(
                    !matches!(value, Value::Link(l) if matches!(l.kind, LinkKind::Foreign | LinkKind::Given)),
                    "never removes {key:?} {value:?}"
                );
                drop_object(&mut state, key);
            }
            Op::Put(key @ Key::Link(dev), Value::Link(new)) => match state.get_mut(key) {
                Some(Value::Link(there)) => {
                    assert_eq!(there.kind, new.kind, "a device does not change its kind");
                    there.mtu = new.mtu.or(there.mtu);
                    there.up |= new.up;
                    if let Some(mac) = new.mac.filter(|mac| there.mac != Some(*mac)) {
                        there.mac = Some(mac);
                        state.retain(|k, _| !matches!(k, Key::Neighbour(d, _) if d == dev));
                    }
                }
                _ => {
                    let peer = match new.kind {
                        LinkKind::Peer => panic!("a peer is made with its pair"),
                        LinkKind::Veth { peer } => Some(peer),
                        _ => None,
                    };
                    state.insert(key.clone(), Value::Link(new.clone()));
                    if let Some(peer) = peer {
                        assert!(!exists(&state, peer), "the peer's name is free");
                        let link = Link { kind: LinkKind::Peer, mac: None, mtu: None, up: false };
                        state.insert(Key::Link(peer), Value::Link(link));
                    }
                }
            },
            Op::Put(key, value) => {
                let needed = on(key, value).into_iter().chain(points_at(value));
                needed.for_each(|dev| assert!(exists(&state, dev), "{key:?} before its device {dev:?}"));
                if let Value::Route { source: Some(source), dev, .. } = value
                    && dev.side() == Side::Pod
                {
                    let has = |k: &Key| matches!(k, Key::Address(_, n) if n.addr() == *source);
                    assert!(state.keys().any(has), "{key:?} before its source");
                }
                state.insert(key.clone(), value.clone());
            }
        }
    }
    state
}

/// What is there is what is wished, but for settings of given devices, which
/// nobody takes back, and for what no wish is about.
fn same(there: &State, wish: &State) -> bool {
    let keys = |s: &State| -> Vec<Key> { s.keys().filter(|k| !matches!(k, Key::Setting(..))).cloned().collect() };
    keys(there) == keys(wish) && keys(wish).iter().all(|k| matches_wish(&there[k], &wish[k]))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn applying_the_difference_gives_the_wish_and_then_nothing_is_left(
        lease in any_lease(), facts in any_facts(), actual in any_actual()
    ) {
        let wish = desired(&Config::default(), &lease, &facts);
        let ops = diff(&wish, &actual).unwrap();
        let mut after = apply(actual, &ops);
        // Made as given; the model starts without them.
        for dev in [Dev::Eni, Dev::Loopback] {
            if let Some(v) = wish.get(&Key::Link(dev)) {
                after.entry(Key::Link(dev)).or_insert_with(|| v.clone());
            }
        }
        after.retain(|k, _| !matches!(k, Key::Link(Dev::Loopback)) || wish.contains_key(k));
        prop_assert!(same(&after, &wish), "{after:#?}\n!=\n{wish:#?}");
        prop_assert_eq!(diff(&wish, &after).unwrap(), []);
    }

    #[test]
    fn from_nothing_to_the_wish_and_back(lease in any_lease(), facts in any_facts()) {
        let wish = desired(&Config::default(), &lease, &facts);
        let made = apply(State::new(), &diff(&wish, &State::new()).unwrap());
        prop_assert!(same(&made, &wish));
        prop_assert_eq!(diff(&wish, &wish).unwrap(), []);
    }

    #[test]
    fn undoing_leaves_nothing_of_ours(actual in any_actual()) {
        let after = apply(actual.clone(), &diff(&State::new(), &actual).unwrap());
        let ours = |k: &Key, v: &Value| match (k, v) {
            (Key::Setting(..), _) => false,
            (_, Value::Link(l)) => l.kind != LinkKind::Given,
            _ => true,
        };
        prop_assert!(!after.iter().any(|(k, v)| ours(k, v)), "{after:#?}");
    }

    #[test]
    fn a_foreign_device_is_never_touched(lease in any_lease(), facts in any_facts()) {
        let wish = desired(&Config::default(), &lease, &facts);
        let foreign = Link { kind: LinkKind::Foreign, mac: None, mtu: None, up: true };
        let actual = State::from([(Key::Link(Dev::Pod), Value::Link(foreign))]);
        prop_assert_eq!(diff(&wish, &actual), Err(Conflict(Dev::Pod)));
        prop_assert_eq!(diff(&State::new(), &actual), Ok(vec![]));
    }

    #[test]
    fn a_burst_holds_two_packets_and_the_queue_a_segment(bps in any::<u64>(), mtu in 576u32..65536) {
        let bucket = token_bucket(bps, mtu);
        prop_assert!(bucket.rate >= 1);
        prop_assert!(bucket.burst >= 2 * mtu && bucket.limit > bucket.burst + (64 << 10));
    }
}

#[test]
fn each_pod_of_an_eni_leaves_by_that_enis_table() {
    let config = Config::default();
    let mut tables = BTreeSet::new();
    for n in [1, 2] {
        let lease = lease(AttachMode::Veth, n, 20, true, Bandwidth::default());
        let state = desired(&config, &lease, &Facts { mtu: 1500, ..Facts::default() });
        let table = names::eni_table(config.table_base, lease.eni.primary4);
        tables.insert(table);
        let from = Key::Rule(config.rule_from_pod, Selector::From(lease.v4.into()));
        assert_eq!(state[&from], Value::Rule(table));
        let to = Key::Rule(config.rule_to_pod, Selector::To(lease.v4.into()));
        assert_eq!(state[&to], Value::Rule(MAIN));
        let is_default = |k: &&Key| matches!(k, Key::Route(Side::Node, t, to) if *t == table && to.prefix_len() == 0);
        assert_eq!(state.keys().filter(is_default).count(), 2, "one per family");
    }
    assert_eq!(tables.len(), 2);
}

#[test]
fn an_exclusive_pod_needs_no_policy_rule() {
    let lease = lease(AttachMode::Exclusive, 1, 10, true, Bandwidth::default());
    let state = desired(&Config::default(), &lease, &Facts { mtu: 1500, ..Facts::default() });
    assert!(!state.keys().any(|k| word(k) == "rule"));
}

#[test]
fn the_nodes_primary_device_keeps_its_addresses() {
    let eni = lease(AttachMode::Veth, 1, 20, true, Bandwidth::default()).eni;
    let config = Config::default();
    let touches = |primary| {
        let state = desired_eni(&config, &eni, primary, true, Some("10.0.0.5".parse().unwrap()));
        state.keys().filter(|k| matches!(k, Key::Address(..) | Key::Setting(_, Setting::AcceptRa))).count()
    };
    assert_eq!((touches(true), touches(false)), (0, 2));
}
