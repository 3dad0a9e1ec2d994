//! Results in every CNI version: what they say, what is refused, and that
//! chaining keeps what came before.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::model::{AttachmentId, Bandwidth, EniRef, Mac, PodKey, Subnet};

fn lease(mode: AttachMode, v6: bool) -> Lease {
    Lease {
        attachment: AttachmentId { sandbox: "s1".into(), ifname: "eth0".into() },
        pod: PodKey::new("default", "web-0"),
        pod_uid: None,
        mode,
        eni: EniRef {
            id: "eni-1".into(),
            mac: Mac([0, 0x16, 0x3e, 0, 0, 1]),
            vswitch: "vsw-1".into(),
            primary4: Ipv4Addr::new(10, 0, 1, 9),
            subnet: Subnet {
                cidr4: "10.0.1.0/24".parse().unwrap(),
                gateway4: Ipv4Addr::new(10, 0, 1, 253),
                cidr6: Some("2001:db8::/64".parse().unwrap()),
                gateway6: Some("2001:db8::fffd".parse().unwrap()),
            },
        },
        v4: Ipv4Addr::new(10, 0, 1, 10),
        v6: v6.then(|| "2001:db8::10".parse::<Ipv6Addr>().unwrap()),
        netns: "/var/run/netns/cni-1".into(),
        bandwidth: Bandwidth::default(),
        traffic: Default::default(),
    }
}

fn wired(host: bool) -> Wired {
    Wired {
        host_ifname: host.then(|| "fw1".to_owned()),
        host_mac: host.then_some(Mac([2; 6])),
        pod_mac: Mac([4; 6]),
        mtu: 1450,
    }
}

#[test]
fn a_shared_pod_gets_a_host_address_on_its_own_interface() {
    let result = CniResult::of(&lease(AttachMode::Veth, true), &wired(true));
    let want = json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "fw1", "mac": "02:02:02:02:02:02", "mtu": 1450},
            {"name": "eth0", "mac": "04:04:04:04:04:04", "mtu": 1450, "sandbox": "/var/run/netns/cni-1"},
        ],
        "ips": [{"address": "10.0.1.10/32", "interface": 1}, {"address": "2001:db8::10/128", "interface": 1}],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    });
    assert_eq!(result.write(Version::V1_1_0), want);
}

#[test]
fn an_exclusive_pod_is_on_its_vswitch() {
    let result = CniResult::of(&lease(AttachMode::Exclusive, false), &wired(false));
    let out = result.write(Version::V1_0_0);
    assert_eq!(out["ips"], json!([{"address": "10.0.1.10/24", "gateway": "10.0.1.253", "interface": 0}]));
    assert_eq!(out["routes"], json!([{"dst": "0.0.0.0/0", "gw": "10.0.1.253"}]));
    assert_eq!(out["interfaces"][0].get("mtu"), None, "1.0.0 knows no MTU");
}

#[test]
fn old_versions_carry_the_family_of_each_address() {
    let result = CniResult::of(&lease(AttachMode::Veth, true), &wired(true));
    for version in [Version::V0_3_1, Version::V0_4_0] {
        let out = result.write(version);
        assert_eq!(out["cniVersion"], json!(version.name()));
        assert_eq!(out["ips"][0]["version"], json!("4"));
        assert_eq!(out["ips"][1]["version"], json!("6"));
    }
    assert!(result.write(Version::V1_0_0)["ips"][0].get("version").is_none());
}

#[test]
fn a_second_main_plugin_for_the_same_interface_is_refused() {
    let ours = CniResult::of(&lease(AttachMode::Veth, false), &wired(true));
    let error = ours.clone().after(ours).unwrap_err();
    assert_eq!(error.code, code::INVALID_CONFIG);
}

#[test]
fn a_prev_result_that_points_nowhere_is_refused() {
    let hostile = [
        json!({"ips": [{"address": "10.0.0.1/24", "interface": 3}]}),
        json!({"ips": [{"address": "10.0.0.1/99"}]}),
        json!({"ips": [{"address": "10.0.0.1/24", "interface": -1}]}),
        json!({"interfaces": "eth0"}),
        json!([]),
        json!("x"),
    ];
    for value in hostile {
        assert_eq!(CniResult::read(&value).unwrap_err().code, code::DECODE, "{value}");
    }
}

#[test]
fn results_of_real_runtimes_are_read_and_written_unchanged() {
    for text in [
        include_str!("../../../tests/testdata/cni/containerd-1.6.20.json"),
        include_str!("../../../tests/testdata/cni/containerd-2.3.4.json"),
    ] {
        let recorded: Value = serde_json::from_str(text).unwrap();
        let mut seen = 0;
        for call in recorded["calls"].as_array().unwrap() {
            let Some(result) = call["stdout"].as_object() else { continue };
            let version = Version::parse(result["cniVersion"].as_str().unwrap()).unwrap();
            let mut want = call["stdout"].clone();
            // An empty `dns` says nothing.
            want.as_object_mut().unwrap().retain(|_, v| *v != json!({}));
            assert_eq!(CniResult::read(&call["stdout"]).unwrap().write(version), want);
            seen += 1;
        }
        assert!(seen >= 2);
    }
}

fn net() -> impl Strategy<Value = IpNet> {
    (any::<IpAddr>(), 0u8..=128).prop_map(|(a, len)| IpNet::new_assert(a, if a.is_ipv4() { len % 33 } else { len }))
}

fn word() -> impl Strategy<Value = String> {
    "[a-z0-9/.:-]{0,12}"
}

fn results() -> impl Strategy<Value = CniResult> {
    let interface = (word(), word(), any::<Option<u32>>(), word(), word(), word())
        .prop_map(|(name, mac, mtu, sandbox, s, p)| Interface { name, mac, mtu, sandbox, socket_path: s, pci_id: p });
    let route = (net(), any::<Option<IpAddr>>(), any::<[Option<u32>; 5]>())
        .prop_map(|(dst, gw, [mtu, advmss, priority, table, scope])| Route {
            dst,
            gw,
            mtu,
            advmss,
            priority,
            table,
            scope,
        })
        .boxed();
    let dns = (proptest::collection::vec(word(), 0..3), word())
        .prop_map(|(nameservers, domain)| Dns { nameservers, domain, ..Dns::default() })
        .boxed();
    let several = proptest::collection::vec(interface, 0..4);
    several.prop_flat_map(move |interfaces| {
        let count = interfaces.len();
        let index = proptest::option::of(0..count.max(1)).prop_map(move |i| i.filter(|i| *i < count));
        let ip = (net(), any::<Option<IpAddr>>(), index);
        let ip = ip.prop_map(|(address, gateway, interface)| Ip { address, gateway, interface });
        let routes = proptest::collection::vec(route.clone(), 0..4);
        (Just(interfaces), proptest::collection::vec(ip, 0..4), routes, dns.clone())
            .prop_map(|(interfaces, ips, routes, dns)| CniResult { interfaces, ips, routes, dns })
    })
}

proptest! {
    #[test]
    fn what_is_written_in_a_version_reads_back_as_that_version_says_it(result in results(), v in 0usize..4) {
        let version = Version::ALL[v];
        let written = result.write(version);
        prop_assert_eq!(CniResult::read(&written).unwrap(), result.limited_to(version));
    }

    #[test]
    fn a_chain_keeps_what_came_before_and_points_to_the_same_interfaces(before in results(), ours in results()) {
        let merged = ours.clone().after(before.clone());
        prop_assume!(merged.is_ok());
        let merged = merged.unwrap();
        prop_assert_eq!(&merged.interfaces[..before.interfaces.len()], &before.interfaces[..]);
        prop_assert_eq!(&merged.ips[..before.ips.len()], &before.ips[..]);
        let name = |r: &CniResult, ip: &Ip| ip.interface.map(|i| r.interfaces[i].clone());
        for (was, is) in ours.ips.iter().zip(&merged.ips[before.ips.len()..]) {
            prop_assert_eq!(name(&ours, was), name(&merged, is));
        }
    }

    #[test]
    fn no_json_makes_the_reader_panic(text in "\\PC{0,80}") {
        if let Ok(value) = serde_json::from_str::<Value>(&text) {
            let _ = CniResult::read(&value);
        }
    }
}
