//! Pods on different nodes talk over the VPC with addresses that the cloud
//! really assigned; checked with real packets.

mod e2e_support;

use e2e_support::pods::{all_ask_all, asks};
use e2e_support::{Lab, lab, missing, skip};
use fairway::lab::kubelet::record::PodRecord;

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
