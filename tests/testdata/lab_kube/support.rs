//! Shared by the lab_kube tests: a running stand-in, a client for it, a kubelet
//! that says every pod is well, and waiting without sleeping.
#![allow(dead_code)]

#[path = "../../support/skip.rs"]
mod skipping;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use fairway::lab::kube::kind::named;
use fairway::lab::kube::registry::{Ctx, DeleteOptions, Filter, Registry, Sub, WatchEvent, WatchStart};
use fairway::lab::kube::{KubeConfig, KubeLab, object};
use serde_json::{Value, json};

pub fn start(config: KubeConfig) -> (KubeLab, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (KubeLab::start(config, vec![listener]).unwrap(), address)
}

/// Without controllers: what is written stays as it is written.
pub fn quiet() -> (KubeLab, SocketAddr) {
    start(KubeConfig { controllers: false, ..KubeConfig::default() })
}

pub fn client(address: SocketAddr) -> kube::Client {
    let mut config = kube::Config::new(format!("http://{address}").parse().unwrap());
    // A test wants to see the refusal, not its repetition.
    config.default_retry = false;
    kube::Client::try_from(config).unwrap()
}

pub fn ctx() -> Ctx {
    Ctx::new("test")
}

pub fn node(api: &Registry, name: &str, allocatable: Value) {
    let node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": "z1"}},
        "status": {"capacity": allocatable, "conditions": [{"type": "Ready", "status": "True"}]},
    });
    api.create(&ctx(), named("Node"), "", node).unwrap();
}

/// Runs every bound pod at once, and ends it when asked.
pub fn kubelet(api: &Arc<Registry>) -> tokio::task::JoinHandle<()> {
    let api = api.clone();
    let mut pods = api.watch(named("Pod"), Filter::default(), WatchStart::State).unwrap();
    tokio::spawn(async move {
        let mut count: u16 = 0;
        loop {
            for event in pods.next().await.unwrap() {
                let (WatchEvent::Added(pod) | WatchEvent::Modified(pod)) = event else { continue };
                let (namespace, name) = (object::namespace(&pod), object::name(&pod));
                if object::text(&pod, "/spec/nodeName").is_empty() {
                    continue;
                }
                if object::deleting(&pod) {
                    let _ = api.delete(&ctx(), named("Pod"), namespace, name, &DeleteOptions::grace(0));
                } else if object::text(&pod, "/status/phase") == "Pending" {
                    count += 1;
                    let (v4, v6) = (format!("10.1.{}.{}", count / 250, count % 250 + 1), format!("fd00:1::{count:x}"));
                    let _ = api.modify(&ctx(), named("Pod"), (namespace, name), Sub::Status, |pod| {
                        running(pod, &v4, &v6);
                        true
                    });
                }
            }
        }
    })
}

pub fn running(pod: &mut Value, v4: &str, v6: &str) {
    pod["status"]["phase"] = "Running".into();
    pod["status"]["podIP"] = v4.into();
    pod["status"]["podIPs"] = json!([{"ip": v4}, {"ip": v6}]);
    ready(pod, true);
}

pub fn ready(pod: &mut Value, ready: bool) {
    let status = if ready { "True" } else { "False" };
    pod["status"]["conditions"] = json!([{"type": "Ready", "status": status,
                                          "lastTransitionTime": "2020-01-01T00:00:00Z"}]);
}

/// Wait, by watching, until the objects of a kind in a namespace are as wanted.
pub async fn until(api: &Arc<Registry>, kind: &str, namespace: &str, what: &str, test: impl Fn(&[Arc<Value>]) -> bool) {
    let kind = named(kind);
    let filter = Filter::namespace(namespace);
    let mut watcher = api.watch(kind, filter.clone(), WatchStart::Now).unwrap();
    let found = async {
        while !test(&api.all(kind, &filter)) {
            watcher.next().await.unwrap();
        }
    };
    if tokio::time::timeout(Duration::from_secs(30), found).await.is_err() {
        let now: Vec<String> = api.all(kind, &filter).iter().map(|o| format!("{o:#}")).collect();
        panic!("never saw {what}; there is: {}", now.join("\n"));
    }
}

pub fn names(objects: &[Arc<Value>]) -> Vec<String> {
    objects.iter().map(|o| object::name(o).to_owned()).collect()
}

pub fn deployment(name: &str, replicas: i64) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}},
                 "template": {"metadata": {"labels": {"app": name}},
                              "spec": {"containers": [{"name": "main", "image": "image:1",
                                       "ports": [{"name": "http", "containerPort": 8080}]}]}}},
    })
}

/// A pod that a test handles itself.
pub fn pod(name: &str, labels: Value, node: &str) -> Value {
    json!({"metadata": {"name": name, "labels": labels},
           "spec": {"nodeName": node, "containers": [{"name": "main", "image": "image:1",
                    "ports": [{"name": "http", "containerPort": 8080}]}]}})
}

/// What is missing here, said where it is counted.
pub fn skipped(test: &str, missing: &str) {
    skipping::skip(test, missing);
}
