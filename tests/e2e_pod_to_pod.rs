//! Pods on different nodes talk over the VPC with addresses that the cloud
//! really assigned; checked with real packets.

mod e2e_support;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use e2e_support::pods::{all_ask_all, asks, first4, ns, pod};
use e2e_support::{Lab, lab, missing, skip};
use fairway::lab::cloud::Eni;
use fairway::lab::kubelet::record::PodRecord;
use fairway::lab::vpc::edge::{ECHO_PORT, NAT_ADDRESS, OUTSIDE4};
use fairway::lab::workload::client::Ask;
use serde_json::json;

macro_rules! needs {
    ($test:literal) => {
        if let Some(missing) = missing() {
            return skip($test, missing);
        }
    };
}

/// Two pods in veth mode and one with an ENI of its own on each of two nodes.
async fn six(lab: &Lab) -> Vec<PodRecord> {
    for node in 0..2 {
        for n in 0..3 {
            lab.create(node, &format!("p{node}{n}"), n == 2);
        }
    }
    let mut pods = Vec::new();
    for node in 0..2 {
        for n in 0..3 {
            pods.push(lab.ready(&format!("p{node}{n}")).await);
        }
    }
    pods
}

async fn reach(lab: &Lab) {
    let pods = six(lab).await;
    assert!(all_ask_all(&pods).await.unwrap() >= 60);
    // Between pods and nodes, their own node and the other one.
    for node in &lab.site.nodes {
        for pod in &pods {
            asks(node.node.ns(), pod).await.unwrap();
        }
    }
    lab.settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_pod_reaches_every_pod_and_node_with_ipv4() {
    needs!("every_pod_reaches_every_pod_and_node_with_ipv4");
    let lab = lab("pa", 2, |_| ()).await;
    reach(&lab).await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_pod_reaches_every_pod_and_node_with_both_families() {
    needs!("every_pod_reaches_every_pod_and_node_with_both_families");
    let lab = lab("pb", 2, |config| config.dual = true).await;
    reach(&lab).await;
    let dual = lab.living().iter().filter(|r| r.ips.len() == 2).count();
    assert_eq!(dual, 6, "every pod has both families");
    lab.down().await;
}

/// What a machine with an echo server sees as the pod's address.
async fn seen_from(pod: &PodRecord, at: SocketAddr) -> IpAddr {
    let text = Ask::peer(at).tcp(&ns(pod)).await.unwrap().text;
    let word = text.split_whitespace().last().unwrap_or_default();
    word.parse().or_else(|_| word.parse::<SocketAddr>().map(|a| a.ip())).unwrap_or_else(|_| panic!("{text:?}"))
}

fn eni_of(lab: &Lab, ip: IpAddr) -> Eni {
    lab.site.cloud.state().enis.into_iter().find(|e| e.v4.iter().any(|a| IpAddr::V4(*a) == ip)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_address_is_its_own_until_the_edge_of_the_vpc() {
    needs!("a_pods_address_is_its_own_until_the_edge_of_the_vpc");
    let lab = lab("pc", 2, |_| ()).await;
    let vm = SocketAddr::from(([10, 0, 240, 10], ECHO_PORT));
    let pods = six(&lab).await;
    for pod in &pods {
        assert_eq!(seen_from(pod, vm).await, first4(pod), "the VM sees the pod");
        assert_eq!(
            seen_from(pod, (OUTSIDE4, ECHO_PORT).into()).await,
            IpAddr::V4(NAT_ADDRESS),
            "outside sees the gateway"
        );
        asks(&lab.site.vm, pod).await.unwrap();
    }
    // What the cloud does not assign, the VPC does not carry: taken away behind
    // the agent's back, the address is dead, although the node has it still.
    let victim = pods.iter().find(|p| eni_of(&lab, first4(p)).v4[0] != first4(p)).unwrap();
    let ip = first4(victim);
    let eni = eni_of(&lab, ip);
    let text = ip.to_string();
    let params = [("NetworkInterfaceId", &*eni.id), ("PrivateIpAddress.1", &*text)];
    let other = pods.iter().find(|p| eni_of(&lab, first4(p)).instance != eni.instance).unwrap();
    lab.site.cloud.operate("UnassignPrivateIpAddresses", &params).await.unwrap();
    let at = SocketAddr::new(ip, 8080);
    assert!(Ask::new(at).within(Duration::from_millis(700)).tcp(&ns(other)).await.is_err());
    lab.site.cloud.operate("AssignPrivateIpAddresses", &params).await.unwrap();
    asks(&ns(other), victim).await.unwrap();
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stateful_pod_keeps_its_address_and_a_new_sandbox_meets_a_late_release() {
    needs!("a_stateful_pod_keeps_its_address_and_a_new_sandbox_meets_a_late_release");
    let lab = lab("pd", 1, |_| ()).await;
    let spec = pod("x", &lab.node(0).name, false)["spec"].clone();
    let labels = json!({"app": "db"});
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db", "namespace": "default"},
        "spec": {"serviceName": "db", "replicas": 2, "selector": {"matchLabels": labels},
                 "template": {"metadata": {"labels": labels}, "spec": spec}},
    });
    lab.kube().apply(set).unwrap();
    let before = [lab.ready("db-0").await, lab.ready("db-1").await];
    for _ in 0..2 {
        for was in &before {
            let name = &was.pod.name;
            let uid = lab.record(name).unwrap().pod.uid;
            lab.delete(name);
            let now = lab
                .until("the pod's successor", Duration::from_secs(20), async || match lab.record(name) {
                    Some(r) if r.ready && !r.ended && r.pod.uid != uid => Ok(r),
                    other => Err(format!("{other:?}")),
                })
                .await;
            assert_eq!(now.ips, was.ips, "{name} has its address back");
        }
    }

    // A new sandbox: its ADD comes before the old one's DEL.
    lab.create(0, "a", false);
    lab.create(0, "alone", true);
    lab.ready("a").await;
    lab.ready("alone").await;
    let kubelet = &lab.node(0).kubelet;
    kubelet.restart_sandbox("default", "a", Duration::from_millis(800)).await.unwrap();
    kubelet.restart_sandbox("default", "alone", Duration::from_millis(300)).await.unwrap();
    let pods = [lab.ready("a").await, lab.ready("alone").await];
    all_ask_all(&pods).await.unwrap();
    // The namespace dies with the ENI in it: the ENI comes home.
    kubelet.kill_sandbox("default", "alone", Duration::from_millis(300)).await.unwrap();
    kubelet.kill_sandbox("default", "a", Duration::ZERO).await.unwrap();
    let pods = [lab.ready("a").await, lab.ready("alone").await];
    all_ask_all(&pods).await.unwrap();
    for pod in ["a", "alone"] {
        kubelet.check("default", pod).await.unwrap();
    }
    lab.settled().await;
    lab.down().await;
}

/// Bits per second from one pod to another, over TCP.
fn throughput(from: &PodRecord, to: &PodRecord) -> f64 {
    let at = SocketAddr::new(first4(to), 9999);
    let listener = ns(to).run(|| std::net::TcpListener::bind(("0.0.0.0", 9999))).unwrap().unwrap();
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut bytes, began) = (vec![0; 64 << 10], 0, Instant::now());
        // The buckets' bursts and the sender's buffers are not counted.
        let (mut counted, mut since) = (0, None);
        while let Ok(n) = stream.read(&mut buffer) {
            if n == 0 {
                break;
            }
            bytes += n;
            if began.elapsed() > Duration::from_millis(700) {
                let (start, base) = *since.get_or_insert((Instant::now(), bytes));
                if start.elapsed() < Duration::from_millis(1500) {
                    counted = bytes - base;
                } else {
                    return counted as f64 * 8.0 / 1.5;
                }
            }
        }
        0.0
    });
    let mut stream = ns(from).run(move || std::net::TcpStream::connect(at)).unwrap().unwrap();
    let block = [0; 16 << 10];
    while stream.write_all(&block).is_ok() && !reader.is_finished() {}
    reader.join().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bandwidth_is_as_the_annotations_say() {
    needs!("bandwidth_is_as_the_annotations_say");
    for fast_path in [true, false] {
        bandwidth(fast_path).await;
    }
}

/// From another node and from next door, where the short way would pass by a queue.
async fn bandwidth(fast_path: bool) {
    let letter = if fast_path { "pe" } else { "pf" };
    let lab = lab(letter, 2, |config| config.agent["fast_path"] = json!(fast_path)).await;
    let limited = |name: &str, node: usize, exclusive: bool| {
        let mut pod = pod(name, &lab.node(node).name, exclusive);
        pod["metadata"]["annotations"]["kubernetes.io/ingress-bandwidth"] = json!("20M");
        pod["metadata"]["annotations"]["kubernetes.io/egress-bandwidth"] = json!("10M");
        lab.kube().apply(pod).unwrap();
    };
    limited("shared", 0, false);
    limited("alone", 0, true);
    lab.create(1, "far", false);
    lab.create(0, "next", false);
    for name in ["shared", "alone"] {
        let pod = lab.ready(name).await;
        for other in ["far", "next"] {
            let free = lab.ready(other).await;
            let (egress, ingress) = tokio::task::block_in_place(|| (throughput(&pod, &free), throughput(&free, &pod)));
            let who = format!("{name} with {other}, fast path {fast_path}");
            println!("{who}: {:.1} Mbit/s out of 10, {:.1} in of 20", egress / 1e6, ingress / 1e6);
            assert!((8e6..11e6).contains(&egress), "{who}: sends {egress}");
            assert!((16e6..22e6).contains(&ingress), "{who}: receives {ingress}");
        }
    }
    lab.settled().await;
    lab.down().await;
}
