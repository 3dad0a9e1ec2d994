//! The VPC's other inhabitants: VM, NAT gateway, load balancer.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab_vpc_support;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fairway::lab::vpc::edge::{ECHO_PORT, NAT_ADDRESS, OUTSIDE4, OUTSIDE6, VmSpec};
use fairway::lab::vpc::link::{Links, Via};
use fairway::lab::workload::client::{Ask, Source, Target, matrix};
use fairway::lab::workload::{Server, Speaks};
use lab_vpc_support::*;

#[tokio::test]
async fn a_vm_answers_nodes_and_sees_their_own_address() {
    if let Some(missing) = missing() {
        return skip("a_vm_answers_nodes_and_sees_their_own_address", missing);
    }
    let (_cleanup, vpc) = vpc('g').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1", "fd09::1"])).await;
    let spec = VmSpec {
        name: "vm".into(),
        subnet4: "10.9.5.0/24".parse().unwrap(),
        gateway4: v4("10.9.5.253"),
        v4: v4("10.9.5.1"),
        subnet6: Some("fd09:5::/64".parse().unwrap()),
        gateway6: Some(v6("fd09:5::fffd")),
        v6: Some(v6("fd09:5::1")),
    };
    let vm = vpc.add_vm(spec).await.unwrap();
    for (vm, me) in [("10.9.5.1", "10.9.0.1"), ("fd09:5::1", "fd09::1")] {
        let to = SocketAddr::new(ip(vm), ECHO_PORT);
        assert_eq!(Ask::new(to).tcp(&a).await.unwrap().text, format!("vm {me}"));
        assert_eq!(Ask::new(to).udp(&a).await.unwrap().text, format!("vm {me}"));
    }
    // And the other way round, as a matrix.
    let _server = Server::start(&a, "a", &[], &[80], Speaks::Name).await.unwrap();
    let sources = [Source { name: "vm".into(), ns: vm }, Source { name: "a".into(), ns: a.clone() }];
    let targets = ["10.9.0.1:80", "[fd09::1]:80", "10.9.0.1:81"]
        .map(|t| Target { name: "a".into(), address: t.parse().unwrap() });
    let cells = matrix(&sources, &targets, Duration::from_secs(2)).await;
    let good: Vec<bool> = cells.iter().map(|c| c.outcome.is_ok()).collect();
    assert_eq!(good, [true, true, false, true, true, false], "{cells:?}");
}

#[tokio::test]
async fn the_outside_sees_the_nat_gateway_and_cannot_come_in_uninvited() {
    if let Some(missing) = missing() {
        return skip("the_outside_sees_the_nat_gateway_and_cannot_come_in_uninvited", missing);
    }
    let (_cleanup, vpc) = vpc('h').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1", "fd09::1"])).await;
    let out = vpc.add_outside().await.unwrap();
    let to = SocketAddr::new(OUTSIDE4.into(), ECHO_PORT);
    assert_eq!(Ask::new(to).tcp(&a).await.unwrap().text, format!("out {NAT_ADDRESS}"));
    assert_eq!(Ask::new(to).udp(&a).await.unwrap().text, format!("out {NAT_ADDRESS}"));
    // IPv6 is routed, not translated.
    let to = SocketAddr::new(OUTSIDE6.into(), ECHO_PORT);
    assert_eq!(Ask::new(to).tcp(&a).await.unwrap().text, "out fd09::1");

    let _server = Server::start(&a, "a", &[], &[80], Speaks::Name).await.unwrap();
    let eth0 = Links::open(&out).await.unwrap().find("eth0").await.unwrap().index;
    let via = Via::Gateway(eth0, IpAddr::V4(NAT_ADDRESS));
    Links::open(&out).await.unwrap().add_route("10.9.0.0/24".parse().unwrap(), via).await.unwrap();
    for to in ["10.9.0.1:80", "[fd09::1]:80"] {
        let ask = Ask::new(to.parse().unwrap()).within(Duration::from_millis(400));
        assert!(ask.tcp(&out).await.is_err(), "{to}");
    }
    assert!(vpc.counters().await.unwrap().uninvited >= 2);
}

#[tokio::test]
async fn a_load_balancer_spreads_over_its_backends_and_keeps_the_clients_address() {
    if let Some(missing) = missing() {
        return skip("a_load_balancer_spreads_over_its_backends_and_keeps_the_clients_address", missing);
    }
    let (_cleanup, vpc) = vpc('i').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1", "fd09::1"])).await;
    let b = machine(&vpc, "b", eni("eni-b", "i-b", 2, &["10.9.0.2", "fd09::2"])).await;
    let c = machine(&vpc, "c", eni("eni-c", "i-c", 3, &["10.9.0.3", "fd09::3"])).await;
    let out = vpc.add_outside().await.unwrap();
    let _a = Server::start(&a, "a", &[], &[8080], Speaks::Name).await.unwrap();
    let _b = Server::start(&b, "b", &[], &[8080], Speaks::Name).await.unwrap();
    for (vip, backends, me) in [
        ("203.0.113.10", ["10.9.0.1:8080", "10.9.0.2:8080"], ("10.9.0.3", OUTSIDE4.to_string())),
        ("2001:db8:5::10", ["[fd09::1]:8080", "[fd09::2]:8080"], ("fd09::3", OUTSIDE6.to_string())),
    ] {
        let to = SocketAddr::new(ip(vip), 80);
        vpc.publish(ip(vip)).await.unwrap();
        vpc.set_lb(ip(vip), 80, backends.iter().map(|s| s.parse().unwrap()).collect()).await.unwrap();
        for (client, address) in [(&*c, me.0.to_owned()), (&out, me.1)] {
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..40 {
                seen.insert(Ask::new(to).tcp(client).await.unwrap().text);
            }
            assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["a", "b"]);
            assert_eq!(Ask::peer(to).tcp(client).await.unwrap().text, address);
            assert_eq!(Ask::peer(to).udp(client).await.unwrap().text, address);
        }
        // One backend left, then none.
        vpc.set_lb(ip(vip), 80, vec![backends[1].parse().unwrap()]).await.unwrap();
        for _ in 0..10 {
            assert_eq!(Ask::new(to).tcp(&c).await.unwrap().text, "b");
        }
        vpc.set_lb(ip(vip), 80, vec![]).await.unwrap();
        assert!(Ask::new(to).within(Duration::from_millis(400)).tcp(&c).await.is_err());
    }
}
