//! A node with a kubelet, an API in memory, and a plugin that writes down how
//! it was called.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fairway::lab::kubelet::api::{PodEvent, PodSource, PodStatusSink, SinkError};
use fairway::lab::kubelet::record::PodRecord;
use fairway::lab::kubelet::spec::PodRef;
use fairway::lab::kubelet::{Kubelet, KubeletConfig};
use fairway::lab::node::Node;
use fairway::lab::vpc::name::LabId;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// The API server's part, in memory.
#[derive(Default)]
pub struct Api {
    pub statuses: Mutex<BTreeMap<String, Vec<PodStatus>>>,
    pub changed: watch::Sender<u64>,
    pub ended: Mutex<Vec<PodRef>>,
    pub node: Mutex<Vec<Result<(), String>>>,
}

impl PodStatusSink for Api {
    fn pod_status<'a>(&'a self, pod: &'a PodRef, status: &'a PodStatus) -> BoxFuture<'a, Result<(), SinkError>> {
        Box::pin(async move {
            self.statuses.lock().entry(pod.uid.clone()).or_default().push(status.clone());
            self.changed.send_modify(|n| *n += 1);
            Ok(())
        })
    }
    fn pod_ended<'a>(&'a self, pod: &'a PodRef) -> BoxFuture<'a, Result<(), SinkError>> {
        Box::pin(async move {
            self.ended.lock().push(pod.clone());
            self.changed.send_modify(|n| *n += 1);
            Ok(())
        })
    }
    fn node_ready<'a>(&'a self, ready: &'a Result<(), String>) -> BoxFuture<'a, Result<(), SinkError>> {
        Box::pin(async move {
            self.node.lock().push(ready.clone());
            self.changed.send_modify(|n| *n += 1);
            Ok(())
        })
    }
}

impl Api {
    /// Until what the API was told satisfies `f`.
    pub async fn until<T>(&self, what: &str, f: impl Fn(&Self) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        let wait = async {
            loop {
                if let Some(found) = f(self) {
                    return found;
                }
                changed.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("{what}: waited in vain"))
    }

    pub fn last(&self, uid: &str) -> Option<PodStatus> {
        self.statuses.lock().get(uid).and_then(|s| s.last().cloned())
    }

    pub async fn running(&self, uid: &str) -> PodStatus {
        self.until(&format!("{uid} runs"), |api| api.last(uid).filter(|s| s.phase.as_deref() == Some("Running"))).await
    }
}

pub fn is_ready(status: &PodStatus) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

struct Events(Mutex<Option<mpsc::UnboundedReceiver<PodEvent>>>);

impl PodSource for Events {
    fn watch(&self) -> BoxStream<'static, PodEvent> {
        let rx = self.0.lock().take().unwrap();
        futures::stream::unfold(rx, |mut rx| async { rx.recv().await.map(|e| (e, rx)) }).boxed()
    }
}

pub struct Rig {
    // Dropped in this order: kubelet, node, what is left.
    pub kubelet: Kubelet,
    pub events: mpsc::UnboundedSender<PodEvent>,
    pub api: Arc<Api>,
    pub node: Node,
    pub plugins: tempfile::TempDir,
}

impl Rig {
    /// A node with the conflist and its plugins, in place before kubelet starts.
    pub async fn start(id: &LabId, conflist: Option<Value>, plugins: &[&str]) -> Self {
        let node = Node::create(id, "n1").await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        for name in plugins {
            let program = write_plugin(folder.path(), name);
            node.install_plugin(name, &program).unwrap();
        }
        if let Some(conf) = conflist {
            std::fs::write(node.dirs().net_d.join("10-test.conflist"), conf.to_string()).unwrap();
        }
        let mut config = KubeletConfig::new("n1", vec!["127.0.0.1".parse().unwrap()], node.dirs().clone());
        config.status_interval = Duration::from_millis(100);
        config.backoff = (Duration::from_millis(50), Duration::from_millis(200));
        let (events, rx) = mpsc::unbounded_channel();
        let api = Arc::new(Api::default());
        let sink: Arc<dyn PodStatusSink> = api.clone();
        let source = Events(Mutex::new(Some(rx)));
        let kubelet = Kubelet::start(config, node.ns(), node.spawner(), &source, sink);
        Self { kubelet, events, api, node, plugins: folder }
    }

    pub fn apply(&self, pod: Value) {
        self.events.send(PodEvent::Applied(Box::new(serde_json::from_value(pod).unwrap()))).unwrap();
    }

    pub fn force_delete(&self, pod: Value) {
        self.events.send(PodEvent::Deleted(Box::new(serde_json::from_value(pod).unwrap()))).unwrap();
    }

    /// Calls of the recording plugins so far: (plugin, verb, call).
    pub fn calls(&self) -> Vec<Call> {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(self.plugins.path().join("calls")).unwrap().map(|e| e.unwrap().path()).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "json"));
        files.sort();
        files.iter().map(|f| serde_json::from_str(&std::fs::read_to_string(f).unwrap()).unwrap()).collect()
    }

    /// The calls without STATUS, as `plugin verb`.
    pub fn order(&self) -> Vec<String> {
        let calls = self.calls();
        calls.iter().filter(|c| c.verb() != "STATUS").map(|c| format!("{} {}", c.plugin, c.verb())).collect()
    }

    /// Make a plugin fail a verb, or not any more.
    pub fn fail(&self, plugin: &str, verb: &str, on: bool) {
        let switch = self.plugins.path().join(format!("fail-{plugin}-{verb}"));
        if on { std::fs::write(switch, "").unwrap() } else { std::fs::remove_file(switch).unwrap() }
    }

    pub fn record(&self, name: &str) -> PodRecord {
        self.kubelet.record("default", name).unwrap()
    }

    pub async fn until_calls(&self, what: &str, f: impl Fn(&[String]) -> bool) -> Vec<String> {
        for _ in 0..1000 {
            let order = self.order();
            if f(&order) {
                return order;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: {:?}", self.order());
    }
}

#[derive(Clone, Debug, serde::Deserialize)]
pub struct Call {
    pub plugin: String,
    pub env: BTreeMap<String, String>,
    pub netns: String,
    pub stdin: Value,
}

impl Call {
    pub fn verb(&self) -> &str {
        &self.env["CNI_COMMAND"]
    }
}

/// A plugin in shell: records environment, stdin and its own namespace, and on
/// ADD makes a dummy of an address out of the sandbox's id. It adds itself to
/// the previous result, so that the chain can be seen in it.
fn write_plugin(dir: &Path, name: &str) -> PathBuf {
    let calls = dir.join("calls");
    std::fs::create_dir_all(&calls).unwrap();
    let script = format!(
        r#"#!/bin/sh
set -e
stdin=$(cat)
file="{calls}/$(date +%s%N)-$$"
printf '{{"plugin":"{name}","netns":"%s","env":{{"CNI_COMMAND":"%s","CNI_CONTAINERID":"%s","CNI_NETNS":"%s","CNI_IFNAME":"%s","CNI_ARGS":"%s","CNI_PATH":"%s"}},"stdin":%s}}' \
  "$(readlink /proc/self/ns/net)" "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_NETNS" "$CNI_IFNAME" "$CNI_ARGS" "$CNI_PATH" "$stdin" > "$file.new"
mv "$file.new" "$file.json"
if [ -e "{dir}/fail-{name}-$CNI_COMMAND" ]; then
  echo '{{"cniVersion":"1.1.0","code":50,"msg":"told to fail","details":"try later"}}'
  exit 1
fi
if [ "$CNI_COMMAND" = ADD ]; then
  last=$(printf '%d' "0x$(printf %.2s "$CNI_CONTAINERID")")
  echo '{{"cniVersion":"1.1.0","interfaces":[{{"name":"{name}"}},{{"name":"eth0","sandbox":"'"$CNI_NETNS"'"}}],"ips":[{{"address":"10.8.0.'"$last"'/24","interface":1}},{{"address":"10.8.1.1/24","interface":0}}]}}'
fi
"#,
        calls = calls.display(),
        dir = dir.display(),
    );
    let path = dir.join(name);
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

pub fn chain(version: &str) -> Value {
    json!({"cniVersion": version, "name": "test", "plugins": [
        {"type": "first", "own": 1, "capabilities": {"bandwidth": true, "io.kubernetes.cri.pod-annotations": true}},
        {"type": "second", "capabilities": {"portMappings": true}}]})
}

pub fn pod(name: &str, uid: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "default", "name": name, "uid": uid},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 8080}]}]}})
}

/// The pod as the API shows it after `kubectl delete`.
pub fn deleting(mut pod: Value, grace: u64) -> Value {
    pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
    pod
}

/// Used by whole-pod assertions.
pub type PodObject = Pod;
