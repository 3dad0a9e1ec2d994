//! Kubelet and the Kubernetes stand-in together: a manifest becomes pods that
//! answer, and a deleted pod is gone after its DEL.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab_vpc_support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fairway::lab::kube::{KubeConfig, KubeLab};
use fairway::lab::kubelet::api::{KubeApi, node_object};
use fairway::lab::kubelet::{Kubelet, KubeletConfig};
use fairway::lab::node::Node;
use fairway::lab::vpc::ns::Netns;
use fairway::lab::workload::client::Ask;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use lab_vpc_support::{Cleanup, lab_id, missing, skip};
use serde_json::json;

fn is_ready(pod: Option<&Pod>) -> bool {
    let conditions = pod.and_then(|p| p.status.as_ref()).and_then(|s| s.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

#[tokio::test]
async fn a_statefulset_runs_and_is_replaced_in_order() {
    const NAME: &str = "a_statefulset_runs_and_is_replaced_in_order";
    if let Some(missing) = missing() {
        return skip(NAME, missing);
    }
    let loopback = Path::new("/usr/lib/cni/loopback");
    if !loopback.exists() {
        return skip(NAME, "reference plugins (apt-get install containernetworking-plugins)");
    }
    let id = lab_id('y');
    let _cleanup = Cleanup(id.clone());
    let node = Node::create(&id, "n1").await.unwrap();
    node.install_plugin("loopback", loopback).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let _server = KubeLab::start(KubeConfig::default(), vec![listener]).unwrap();
    let client = kube::Client::try_from(kube::Config::new(url.parse().unwrap())).unwrap();

    let api = KubeApi::new(client.clone(), "n1");
    let object = node_object("n1", &["127.0.0.1".parse().unwrap()], "cn-lab-a", "cn-lab.i-1", 110);
    api.register(&object).await.unwrap();
    api.register(&object).await.unwrap();
    let config = KubeletConfig::new("n1", vec!["127.0.0.1".parse().unwrap()], node.dirs().clone());
    let kubelet = Kubelet::start(config, node.ns(), node.spawner(), &api.clone(), Arc::new(api));

    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), "default");
    let set = json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "web"},
        "spec": {"serviceName": "web", "replicas": 2, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"terminationGracePeriodSeconds": 1,
                "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 8080}]}]}}}});
    sets.create(&PostParams::default(), &serde_json::from_value(set).unwrap()).await.unwrap();

    // NotReady without a network: the pods wait, and say so.
    let nodes: Api<NodeObject> = Api::all(client.clone());
    let not_ready = |n: Option<&NodeObject>| {
        let conditions = n.and_then(|n| n.status.as_ref()).and_then(|s| s.conditions.as_ref());
        conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "False")
    };
    within(await_condition(nodes.clone(), "n1", not_ready)).await.unwrap();
    let conf = json!({"cniVersion": "1.0.0", "name": "lo", "plugins": [{"type": "loopback"}]});
    std::fs::write(node.dirs().net_d.join("10-lo.conflist"), conf.to_string()).unwrap();

    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    for name in ["web-0", "web-1"] {
        let pod = within(await_condition(pods.clone(), name, is_ready)).await.unwrap().unwrap();
        assert_eq!(pod.status.unwrap().pod_ip.as_deref(), Some("127.0.0.1"));
        let ns = Netns::open(&kubelet.record("default", name).unwrap().netns.unwrap()).unwrap();
        assert_eq!(Ask::new("127.0.0.1:8080".parse().unwrap()).tcp(&ns).await.unwrap().text, name);
    }
    // Deleted, it comes back under its name with another uid and sandbox.
    let old = pods.get("web-0").await.unwrap().metadata.uid.unwrap();
    let before = kubelet.record("default", "web-0").unwrap();
    pods.delete("web-0", &DeleteParams::default()).await.unwrap();
    let fresh = |p: Option<&Pod>| is_ready(p) && p.is_some_and(|p| p.metadata.uid.as_ref() != Some(&old));
    within(await_condition(pods.clone(), "web-0", fresh)).await.unwrap();
    let after = kubelet.record("default", "web-0").unwrap();
    assert_ne!(after.sandboxes, before.sandboxes);
    assert!(!before.netns.unwrap().exists() && after.netns.unwrap().exists());

    // Nothing left when it is scaled away.
    let none = json!({"spec": {"replicas": 0}});
    sets.patch("web", &PatchParams::default(), &Patch::Merge(&none)).await.unwrap();
    for name in ["web-0", "web-1"] {
        within(await_condition(pods.clone(), name, |p: Option<&Pod>| p.is_none())).await.unwrap();
    }
    assert_eq!(std::fs::read_dir(&node.dirs().sandboxes).unwrap().count(), 0);
    kubelet.teardown().await;
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work).await.expect("waited in vain")
}
