//! The VPC's router forwards what the API assigned, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab_vpc_support;

use std::net::SocketAddr;
use std::time::Duration;

use fairway::lab::fabric::{Fabric, FabricError};
use fairway::lab::vpc::link::Links;
use fairway::lab::vpc::ns::{Netns, OwnedNetns};
use fairway::lab::workload::client::{Ask, AskError, ping};
use fairway::lab::workload::{Server, Speaks};
use lab_vpc_support::*;

const SHORT: Duration = Duration::from_millis(400);

macro_rules! needs_kernel {
    ($name:literal) => {
        if let Some(missing) = missing() {
            return skip($name, missing);
        }
    };
}

fn at(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

#[tokio::test]
async fn machines_reach_each_other_and_their_gateway_in_both_families() {
    needs_kernel!("machines_reach_each_other_and_their_gateway_in_both_families");
    let (_cleanup, vpc) = vpc('a').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1", "fd09::1"])).await;
    let b = machine(&vpc, "b", eni("eni-b", "i-b", 2, &["10.9.0.2", "fd09::2"])).await;
    let _server = Server::start(&b, "b", &[], &[80], Speaks::Name).await.unwrap();
    for to in ["10.9.0.2:80", "[fd09::2]:80"] {
        assert_eq!(Ask::new(at(to)).tcp(&a).await.unwrap().text, "b");
        assert_eq!(Ask::new(at(to)).udp(&a).await.unwrap().text, "b");
    }
    for to in ["10.9.0.253", "fd09::fffd", "10.9.0.2", "fd09::2"] {
        ping(&a, ip(to), Duration::from_secs(2)).await.unwrap_or_else(|e| panic!("{to}: {e}"));
    }
    assert_eq!(vpc.counters().await.unwrap(), Default::default());
}

#[tokio::test]
async fn an_eni_is_a_device_with_its_queues_mtu_and_address() {
    needs_kernel!("an_eni_is_a_device_with_its_queues_mtu_and_address");
    let (_cleanup, vpc) = vpc('b').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1"])).await;
    vpc.attach(eni("eni-a2", "i-a", 9, &["10.9.0.9", "10.9.0.10"])).await.unwrap();
    let eth1 = Links::open(&a).await.unwrap().find("eth1").await.unwrap();
    assert_eq!(eth1.mac, Some(eni("", "", 9, &[]).mac));
    assert_eq!((eth1.mtu, eth1.tx_queues, eth1.rx_queues, eth1.up), (1500, 4, 4, false));
    // Asked again it is the same device.
    vpc.attach(eni("eni-a2", "i-a", 9, &["10.9.0.9"])).await.unwrap();
    assert_eq!(Links::open(&a).await.unwrap().find("eth1").await.unwrap().index, eth1.index);
    vpc.detach("eni-a2").await.unwrap();
    assert!(Links::open(&a).await.unwrap().find("eth1").await.is_err());
    vpc.detach("eni-a2").await.unwrap();
    assert_eq!(
        vpc.attach(eni("eni-x", "i-nowhere", 7, &[])).await,
        Err(FabricError::UnknownInstance("i-nowhere".into()))
    );
}

#[tokio::test]
async fn an_address_is_reachable_exactly_while_it_is_assigned() {
    needs_kernel!("an_address_is_reachable_exactly_while_it_is_assigned");
    let (_cleanup, vpc) = vpc('c').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1", "fd09::1"])).await;
    let b = machine(&vpc, "b", eni("eni-b", "i-b", 2, &["10.9.0.2", "fd09::2"])).await;
    // The node has the addresses; the cloud has not assigned them yet.
    sh(&b, "ip addr add 10.9.0.77/32 dev eth0; ip addr add fd09::77/128 dev eth0 nodad");
    let _server = Server::start(&b, "b", &[], &[80], Speaks::Name).await.unwrap();
    for to in ["10.9.0.77:80", "[fd09::77]:80"] {
        let outcome = Ask::new(at(to)).within(SHORT).tcp(&a).await;
        assert!(outcome.is_err(), "{to}: {outcome:?}");
    }
    // Nobody answers ARP for it; sent through the gateway it is counted.
    sh(&a, "ip route replace 10.9.0.77/32 via 10.9.0.253 dev eth0");
    assert!(ping(&a, ip("10.9.0.77"), SHORT).await.is_err());
    let counters = vpc.counters().await.unwrap();
    assert!(counters.unassigned4 > 0 && counters.unassigned6 > 0, "{counters:?}");

    vpc.set_addresses("eni-b", vec![v4("10.9.0.2"), v4("10.9.0.77")], vec![v6("fd09::2"), v6("fd09::77")])
        .await
        .unwrap();
    for to in ["10.9.0.77:80", "[fd09::77]:80"] {
        assert_eq!(Ask::new(at(to)).tcp(&a).await.unwrap().text, "b", "{to}");
    }
    vpc.set_addresses("eni-b", vec![v4("10.9.0.2")], vec![v6("fd09::2")]).await.unwrap();
    for to in ["10.9.0.77:80", "[fd09::77]:80"] {
        assert!(Ask::new(at(to)).within(SHORT).tcp(&a).await.is_err(), "{to}");
    }
    assert_eq!(Ask::new(at("10.9.0.2:80")).tcp(&a).await.unwrap().text, "b");
    assert_eq!(vpc.set_addresses("eni-none", vec![], vec![]).await, Err(FabricError::UnknownEni("eni-none".into())));
}

#[tokio::test]
async fn a_source_that_is_not_the_senders_is_dropped_and_counted() {
    needs_kernel!("a_source_that_is_not_the_senders_is_dropped_and_counted");
    let (_cleanup, vpc) = vpc('d').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1", "fd09::1"])).await;
    let b = machine(&vpc, "b", eni("eni-b", "i-b", 2, &["10.9.0.2", "fd09::2"])).await;
    machine_c_has(&vpc).await;
    let _server = Server::start(&b, "b", &[], &[80], Speaks::Name).await.unwrap();
    // One that nobody has, one that another ENI has; the second family too.
    sh(&a, "ip addr add 10.9.0.88/32 dev eth0; ip addr add 10.9.0.3/32 dev eth0");
    sh(&a, "ip addr add fd09::88/128 dev eth0 nodad; ip addr add fd09::3/128 dev eth0 nodad");
    let mut seen = 0;
    for from in ["10.9.0.88", "10.9.0.3"] {
        let ask = Ask::new(at("10.9.0.2:80")).from(ip(from)).within(SHORT);
        assert!(matches!(ask.udp(&a).await, Err(AskError::Timeout(_))), "{from}");
        let now = vpc.counters().await.unwrap().spoofed4;
        assert!(now > seen, "{from} was not counted");
        seen = now;
    }
    for from in ["fd09::88", "fd09::3"] {
        let ask = Ask::new(at("[fd09::2]:80")).from(ip(from)).within(SHORT);
        assert!(matches!(ask.udp(&a).await, Err(AskError::Timeout(_))), "{from}");
    }
    assert!(vpc.counters().await.unwrap().spoofed6 >= 2);
    assert_eq!(Ask::new(at("10.9.0.2:80")).from(ip("10.9.0.1")).udp(&a).await.unwrap().text, "b");
}

/// Another instance that really has 10.9.0.3 and fd09::3.
async fn machine_c_has(vpc: &fairway::lab::vpc::Vpc) {
    let ns = OwnedNetns::create(&vpc.id().name("c")).unwrap();
    vpc.register_instance("i-c", &ns).await;
    vpc.attach(eni("eni-c", "i-c", 3, &["10.9.0.3", "fd09::3"])).await.unwrap();
}

#[tokio::test]
async fn an_eni_comes_back_to_its_node_when_a_pods_namespace_dies_with_it() {
    needs_kernel!("an_eni_comes_back_to_its_node_when_a_pods_namespace_dies_with_it");
    let (_cleanup, vpc) = vpc('e').await;
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1"])).await;
    let b = machine(&vpc, "b", eni("eni-b", "i-b", 2, &["10.9.0.2"])).await;
    let _server = Server::start(&b, "b", &[], &[80], Speaks::Name).await.unwrap();
    vpc.attach(eni("eni-pod", "i-a", 8, &["10.9.0.8"])).await.unwrap();
    let pod = OwnedNetns::create(&vpc.id().name("pod")).unwrap();
    // As an agent does for a pod with an ENI of its own.
    sh(&a, &format!("ip link set eth1 netns {} name eth0", pod.name()));
    let setup =
        "ip link set lo up; ip link set eth0 up; ip addr add 10.9.0.8/24 dev eth0; ip route add default via 10.9.0.253";
    sh(&pod, setup);
    assert_eq!(Ask::new(at("10.9.0.2:80")).tcp(&pod).await.unwrap().text, "b");

    // Watch the node, then let the pod's namespace die.
    let (_links, mut events) = Links::watch(&a).await.unwrap();
    drop(pod);
    let back = async {
        use futures::StreamExt;
        while events.next().await.is_some() {
            if let Ok(link) = Links::open(&a).await.unwrap().find("eth1").await {
                return link;
            }
        }
        panic!("the watch ended");
    };
    let back = tokio::time::timeout(Duration::from_secs(10), back).await.expect("the device did not come back");
    assert_eq!(back.mac, Some(eni("", "", 8, &[]).mac));
    // And it carries packets again.
    let pod = OwnedNetns::create(&vpc.id().name("pod2")).unwrap();
    sh(&a, &format!("ip link set eth1 netns {} name eth0", pod.name()));
    sh(&pod, setup);
    assert_eq!(Ask::new(at("10.9.0.2:80")).tcp(&pod).await.unwrap().text, "b");
    // Detached while in the pod it is gone for good.
    vpc.detach("eni-pod").await.unwrap();
    assert!(Links::open(&pod).await.unwrap().find("eth0").await.is_err());
}

#[tokio::test]
async fn nothing_is_left_after_down_and_after_drop() {
    needs_kernel!("nothing_is_left_after_down_and_after_drop");
    let (cleanup, vpc) = vpc('f').await;
    let prefix = cleanup.0.prefix();
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1"])).await;
    vpc.down().await.unwrap();
    assert!(Links::open(&a).await.unwrap().find("eth0").await.is_err());
    drop(a);
    assert_eq!(fairway::lab::vpc::ns::list(&prefix).unwrap(), Vec::<std::path::PathBuf>::new());
    assert!(Netns::named(&cleanup.0.name("vpc")).is_err());
}

#[tokio::test]
async fn services_in_the_router_are_reached_and_jumbo_frames_pass() {
    needs_kernel!("services_in_the_router_are_reached_and_jumbo_frames_pass");
    let id = lab_id('z');
    let _cleanup = Cleanup(id.clone());
    let mut config = fairway::lab::vpc::VpcConfig::new(id);
    config.mtu = 8500;
    let vpc = fairway::lab::vpc::Vpc::up(config).await.unwrap();
    let a = machine(&vpc, "a", eni("eni-a", "i-a", 1, &["10.9.0.1"])).await;
    let b = machine(&vpc, "b", eni("eni-b", "i-b", 2, &["10.9.0.2"])).await;
    let metadata = ip("100.100.100.200");
    vpc.add_service_address(metadata).await.unwrap();
    vpc.add_service_address(metadata).await.unwrap();
    let listener = vpc.listen_tcp(SocketAddr::new(metadata, 80)).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let serve = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        let (mut stream, peer) = listener.accept().await.unwrap();
        stream.write_all(format!("hello {}\n", peer.ip()).as_bytes()).await.unwrap();
    });
    assert_eq!(Ask::new(SocketAddr::new(metadata, 80)).tcp(&a).await.unwrap().text, "hello 10.9.0.1");
    serve.await.unwrap();
    // 8472 and 28 bytes of headers fill a frame; it must not be cut.
    let (from, to) = (at("10.9.0.1:0"), at("10.9.0.2:9"));
    let sink = b.run(|| std::net::UdpSocket::bind(to).unwrap()).unwrap();
    sink.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    a.run(|| std::net::UdpSocket::bind(from).unwrap().send_to(&[7; 8472], to).unwrap()).unwrap();
    let mut buffer = vec![0; 9000];
    assert_eq!(sink.recv(&mut buffer).unwrap(), 8472);
}

#[tokio::test]
async fn the_cloud_registers_and_forgets_instances_by_namespace() {
    needs_kernel!("the_cloud_registers_and_forgets_instances_by_namespace");
    let (_cleanup, vpc) = vpc('0').await;
    let ns = OwnedNetns::create(&vpc.id().name("a")).unwrap();
    let place =
        |netns: &str| fairway::lab::fabric::InstancePlace { instance_id: "i-a".into(), netns: Some(netns.to_owned()) };
    assert!(vpc.instance_added(place("fwl-none-none")).await.is_err());
    vpc.instance_added(place(ns.name())).await.unwrap();
    vpc.attach(eni("eni-a", "i-a", 1, &["10.9.0.1"])).await.unwrap();
    let links = Links::open(&ns).await.unwrap();
    links.find("eth0").await.unwrap();
    vpc.instance_removed("i-a").await.unwrap();
    assert!(links.find("eth0").await.is_err());
    assert!(vpc.attach(eni("eni-a", "i-a", 1, &[])).await.is_err());
}
