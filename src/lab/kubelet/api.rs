//! Where pods come from and where their status goes: two small traits, so that
//! kubelet runs without an API server, and their implementation over HTTP.

use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;

use super::spec::PodRef;

/// A change of the pods bound to one node.
#[derive(Clone, Debug)]
pub enum PodEvent {
    /// All of them: pods not in here are gone.
    Snapshot(Vec<Pod>),
    Applied(Box<Pod>),
    /// Gone from the API, asked to end before or not.
    Deleted(Box<Pod>),
}

/// Pods bound to this node, for as long as the stream is read.
pub trait PodSource: Send + Sync + 'static {
    fn watch(&self) -> BoxStream<'static, PodEvent>;
}

/// A node whose pods are somebody else's to run.
pub struct NoPods;

impl PodSource for NoPods {
    fn watch(&self) -> BoxStream<'static, PodEvent> {
        futures::stream::pending().boxed()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// Another pod has the name now, or none.
    #[error("the pod is gone")]
    Gone,
    #[error("{0}")]
    Failed(String),
}

/// Takes what kubelet has to say. Calls are repeated until they succeed.
pub trait PodStatusSink: Send + Sync + 'static {
    fn pod_status<'a>(&'a self, pod: &'a PodRef, status: &'a PodStatus) -> BoxFuture<'a, Result<(), SinkError>>;
    /// The pod has ended: remove it from the API.
    fn pod_ended<'a>(&'a self, pod: &'a PodRef) -> BoxFuture<'a, Result<(), SinkError>>;
    /// The node is ready, or why not.
    fn node_ready<'a>(&'a self, ready: &'a Result<(), String>) -> BoxFuture<'a, Result<(), SinkError>>;
}

/// Both traits over the Kubernetes API.
#[derive(Clone)]
pub struct KubeApi {
    client: kube::Client,
    node: String,
}

impl KubeApi {
    pub fn new(client: kube::Client, node: impl Into<String>) -> Self {
        Self { client, node: node.into() }
    }

    /// Create the Node object, or bring an old one up to date.
    pub async fn register(&self, node: &Node) -> Result<(), SinkError> {
        let api: Api<Node> = Api::all(self.client.clone());
        match api.create(&PostParams::default(), node).await {
            Err(kube::Error::Api(e)) if e.code == 409 => {}
            other => drop(other.map_err(failed)?),
        }
        // Status is a subresource: creation ignores it.
        let patch = json!({"metadata": {"labels": node.metadata.labels}, "status": node.status});
        api.patch(&self.node, &PatchParams::default(), &Patch::Merge(&patch)).await.map_err(failed)?;
        api.patch_status(&self.node, &PatchParams::default(), &Patch::Merge(&patch)).await.map_err(failed)?;
        Ok(())
    }

    fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

fn failed(e: kube::Error) -> SinkError {
    match e {
        // The uid in the patch or precondition did not match, or no such name.
        kube::Error::Api(e) if e.code == 404 || e.code == 409 => SinkError::Gone,
        other => SinkError::Failed(other.to_string()),
    }
}

impl PodSource for KubeApi {
    fn watch(&self) -> BoxStream<'static, PodEvent> {
        let config = watcher::Config::default().fields(&format!("spec.nodeName={}", self.node));
        let events = watcher(Api::<Pod>::all(self.client.clone()), config).default_backoff();
        let mut listed = Vec::new();
        let pods = events.filter_map(move |event| {
            let out = match event {
                Ok(watcher::Event::Apply(pod)) => Some(PodEvent::Applied(Box::new(pod))),
                Ok(watcher::Event::Delete(pod)) => Some(PodEvent::Deleted(Box::new(pod))),
                Ok(watcher::Event::Init) => {
                    listed.clear();
                    None
                }
                Ok(watcher::Event::InitApply(pod)) => {
                    listed.push(pod);
                    None
                }
                Ok(watcher::Event::InitDone) => Some(PodEvent::Snapshot(std::mem::take(&mut listed))),
                Err(e) => {
                    tracing::debug!(target: "lab", "watching pods: {e}");
                    None
                }
            };
            futures::future::ready(out)
        });
        pods.boxed()
    }
}

impl PodStatusSink for KubeApi {
    fn pod_status<'a>(&'a self, pod: &'a PodRef, status: &'a PodStatus) -> BoxFuture<'a, Result<(), SinkError>> {
        Box::pin(async move {
            let patch = json!({"metadata": {"uid": pod.uid}, "status": status});
            let api = self.pods(&pod.namespace);
            api.patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(&patch)).await.map_err(failed)?;
            Ok(())
        })
    }

    fn pod_ended<'a>(&'a self, pod: &'a PodRef) -> BoxFuture<'a, Result<(), SinkError>> {
        Box::pin(async move {
            let only = Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
            let params =
                DeleteParams { grace_period_seconds: Some(0), preconditions: Some(only), ..Default::default() };
            self.pods(&pod.namespace).delete(&pod.name, &params).await.map_err(failed)?;
            Ok(())
        })
    }

    fn node_ready<'a>(&'a self, ready: &'a Result<(), String>) -> BoxFuture<'a, Result<(), SinkError>> {
        Box::pin(async move {
            let now = super::now();
            let (status, reason, message) = match ready {
                Ok(()) => ("True", "KubeletReady", "kubelet is posting ready status".to_owned()),
                Err(why) => (
                    "False",
                    "KubeletNotReady",
                    format!(
                        "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:{why}"
                    ),
                ),
            };
            let condition = json!({"type": "Ready", "status": status, "reason": reason, "message": message,
                "lastHeartbeatTime": now, "lastTransitionTime": now});
            // Strategic: conditions of others, such as the agent's, stay.
            let patch = json!({"status": {"conditions": [condition]}});
            let api: Api<Node> = Api::all(self.client.clone());
            api.patch_status(&self.node, &PatchParams::default(), &Patch::Strategic(&patch)).await.map_err(failed)?;
            Ok(())
        })
    }
}

/// A Node object as a kubelet registers it.
pub fn node_object(name: &str, ips: &[std::net::IpAddr], zone: &str, provider_id: &str, max_pods: u32) -> Node {
    let addresses: Vec<_> = ips
        .iter()
        .map(|ip| json!({"type": "InternalIP", "address": ip}))
        .chain([json!({"type": "Hostname", "address": name})])
        .collect();
    let resources = json!({"cpu": "8", "memory": "32Gi", "ephemeral-storage": "100Gi", "pods": max_pods.to_string()});
    let object = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
            "topology.kubernetes.io/zone": zone}},
        "spec": {"providerID": provider_id},
        "status": {"addresses": addresses, "capacity": resources, "allocatable": resources,
            "nodeInfo": {"architecture": "amd64", "bootID": name, "containerRuntimeVersion": "lab://1.0.0",
                "kernelVersion": "", "kubeProxyVersion": "", "kubeletVersion": "v1.33.0", "machineID": name,
                "operatingSystem": "linux", "osImage": "Fairway lab", "systemUUID": name}},
    });
    serde_json::from_value(object).unwrap_or_default()
}
