//! The lab's kubelet: runs the pods bound to one node.
//!
//! Purpose: does to a CNI plugin what kubelet and containerd do, as recorded
//! from them: the pod's namespace, the whole conflist with results passed on,
//! STATUS every five seconds (a failing one makes the node NotReady and holds
//! back every ADD), GC, retries with back-off, ADD of a new sandbox before a
//! late DEL of the old one. Workloads answer in the pod's namespace.
//!
//! Owner of: one task per pod. It knows the API only through
//! [`api::PodSource`] and [`api::PodStatusSink`].
//!
//! Invariants: a sandbox whose DEL has not succeeded is DELed again and named
//! to GC; a pod leaves the API only after its DEL.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::lab::node::NodeDirs;
use crate::lab::vpc::ns::{Netns, NsThread};

/// Where pods come from and statuses go.
pub mod api;
/// Runs plugins.
pub mod cni;
/// What plugins are told (pure).
pub mod conf;
/// Is the network ready? STATUS and GC.
mod network;
/// One pod's life.
mod pod;
/// Readiness probes.
mod probe;
/// What happened, for reports.
pub mod record;
/// Namespace and attachment.
mod sandbox;
/// What a pod's specification asks for (pure).
pub mod spec;
/// The status that is written (pure).
pub mod status;

use api::{PodEvent, PodSource, PodStatusSink, SinkError};
use cni::{CniError, Runner};
use pod::{Order, PodTask};
use record::PodRecord;
use sandbox::{Live, Sandbox};
use spec::PodRef;

#[derive(Clone, Debug)]
pub struct KubeletConfig {
    pub node: String,
    /// The node's own addresses, IPv4 first.
    pub host_ips: Vec<IpAddr>,
    pub dirs: NodeDirs,
    /// STATUS is called this often; containerd: five seconds.
    pub status_interval: Duration,
    pub gc_interval: Duration,
    /// First and longest pause between tries of a sandbox or a DEL.
    pub backoff: (Duration, Duration),
    /// A plugin is killed after this.
    pub cni_timeout: Duration,
}

impl KubeletConfig {
    pub fn new(node: impl Into<String>, host_ips: Vec<IpAddr>, dirs: NodeDirs) -> Self {
        Self {
            node: node.into(),
            host_ips,
            dirs,
            status_interval: Duration::from_secs(5),
            gc_interval: Duration::from_secs(60),
            backoff: (Duration::from_secs(1), Duration::from_secs(10)),
            cni_timeout: Duration::from_secs(120),
        }
    }
}

/// Why a request about a pod was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("pod {0}/{1} does not run on this node")]
    NoPod(String, String),
    #[error("pod {0}/{1} ended, or is not that far yet")]
    NotRunning(String, String),
    #[error(transparent)]
    Cni(#[from] CniError),
}

/// What the pods' tasks share.
struct Context {
    config: KubeletConfig,
    runner: Runner,
    node_ns: Netns,
    sink: Arc<dyn PodStatusSink>,
    network: watch::Sender<Result<(), String>>,
    records: Mutex<BTreeMap<PodRef, PodRecord>>,
    live: Live,
    late: TaskTracker,
    crashed: CancellationToken,
}

impl Context {
    fn del_later(self: &Arc<Self>, key: PodRef, sandbox: Sandbox, after: Duration) {
        let context = Arc::clone(self);
        self.late.spawn(async move {
            let crashed = context.crashed.clone();
            crashed.run_until_cancelled(pod::disconnect(context, key, sandbox, after)).await
        });
    }

    /// Until the API takes it, or says that it is moot.
    async fn insist<'a>(&self, what: &str, call: impl Fn() -> BoxFuture<'a, Result<(), SinkError>>) {
        let mut pause = Duration::from_millis(100);
        while let Err(SinkError::Failed(e)) = call().await {
            tracing::debug!(target: "lab", "{what}: {e}; again in {pause:?}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }
}

type Pods = BTreeMap<PodRef, mpsc::UnboundedSender<Order>>;

/// A running kubelet. Dropping it is its crash: workloads stop, sandboxes stay.
pub struct Kubelet {
    context: Arc<Context>,
    pods: Arc<Mutex<Pods>>,
    main: JoinHandle<()>,
    network: JoinHandle<()>,
    end: Option<oneshot::Sender<Ending>>,
}

/// How a kubelet is told to end.
enum Ending {
    /// Pods are ended first, DEL included.
    Teardown,
    /// At once; sandboxes stay.
    Halt,
}

impl Kubelet {
    pub fn start(
        config: KubeletConfig,
        node_ns: &Netns,
        spawner: &NsThread,
        source: &dyn PodSource,
        sink: Arc<dyn PodStatusSink>,
    ) -> Self {
        let runner = Runner {
            at: spawner.clone(),
            net_d: config.dirs.net_d.clone(),
            bin: config.dirs.cni_bin.clone(),
            timeout: config.cni_timeout,
        };
        let context = Arc::new(Context {
            config,
            runner,
            node_ns: node_ns.clone(),
            sink,
            network: watch::Sender::new(Err("not asked yet".into())),
            records: Mutex::default(),
            live: Live::default(),
            late: TaskTracker::new(),
            crashed: CancellationToken::new(),
        });
        let pods = Arc::<Mutex<Pods>>::default();
        let (end, ending) = oneshot::channel();
        let events = source.watch();
        let main = tokio::spawn(run(Arc::clone(&context), Arc::clone(&pods), events, ending));
        let network = tokio::spawn(network::keep(Arc::clone(&context)));
        Self { context, pods, main, network, end: Some(end) }
    }

    /// What happened to every pod so far.
    pub fn records(&self) -> Vec<PodRecord> {
        self.context.records.lock().values().cloned().collect()
    }

    /// The record of the pod that has this name now, or had it last: of several
    /// the one seen last, for an old one may still be ending.
    pub fn record(&self, namespace: &str, name: &str) -> Option<PodRecord> {
        let records = self.context.records.lock();
        let named = records.values().filter(|r| r.pod.namespace == namespace && r.pod.name == name);
        named.min_by_key(|r| (r.ended, r.since_seen())).cloned()
    }

    /// Whether ADDs are let through, or why not.
    pub fn network(&self) -> watch::Receiver<Result<(), String>> {
        self.context.network.subscribe()
    }

    /// The pod's processes die and are started again.
    pub async fn kill_containers(&self, namespace: &str, name: &str) -> Result<(), RequestError> {
        self.ask(namespace, name, Order::KillContainers).await
    }

    /// A new sandbox for the pod; DEL of the old one follows `late_del` later.
    pub async fn restart_sandbox(&self, namespace: &str, name: &str, late_del: Duration) -> Result<(), RequestError> {
        self.ask(namespace, name, |done| Order::NewSandbox { abrupt: false, late_del, done }).await
    }

    /// The pod's namespace dies with all that is in it; then as
    /// [`Self::restart_sandbox`].
    pub async fn kill_sandbox(&self, namespace: &str, name: &str, late_del: Duration) -> Result<(), RequestError> {
        self.ask(namespace, name, |done| Order::NewSandbox { abrupt: true, late_del, done }).await
    }

    /// CHECK.
    pub async fn check(&self, namespace: &str, name: &str) -> Result<(), RequestError> {
        Ok(self.ask(namespace, name, Order::Check).await??)
    }

    /// Make the pod ready or not, whatever its probes say; `None` lifts it.
    pub fn set_ready(&self, namespace: &str, name: &str, ready: Option<bool>) -> Result<(), RequestError> {
        let sent = self.find(namespace, name)?.send(Order::SetReady(ready));
        sent.map_err(|_| RequestError::NotRunning(namespace.into(), name.into()))
    }

    /// GC now.
    pub async fn gc(&self) -> Result<(), CniError> {
        network::gc(&self.context).await
    }

    /// End every pod at once, DEL included, without telling the API.
    pub async fn teardown(mut self) {
        self.tell(Ending::Teardown).await;
        self.context.late.close();
        self.context.late.wait().await;
    }

    /// End at once. Sandboxes stay, but when this returns no more are made: not
    /// even by a task that was about to.
    pub async fn stop(mut self) {
        self.context.crashed.cancel();
        self.tell(Ending::Halt).await;
        self.context.late.close();
        self.context.late.wait().await;
    }

    async fn tell(&mut self, ending: Ending) {
        if let Some(end) = self.end.take() {
            let _ = end.send(ending);
        }
        let _ = (&mut self.main).await;
    }

    fn find(&self, namespace: &str, name: &str) -> Result<mpsc::UnboundedSender<Order>, RequestError> {
        let pods = self.pods.lock();
        let records = self.context.records.lock();
        let mut named = pods.iter().filter(|(key, _)| key.namespace == namespace && key.name == name);
        // An old pod of the same name may still be ending.
        let last = named.clone().next_back();
        let found = named.find(|(key, _)| records.get(*key).is_some_and(|r| !r.ended)).or(last);
        found.map(|(_, tx)| tx.clone()).ok_or_else(|| RequestError::NoPod(namespace.into(), name.into()))
    }

    async fn ask<T>(
        &self,
        namespace: &str,
        name: &str,
        order: impl FnOnce(oneshot::Sender<T>) -> Order,
    ) -> Result<T, RequestError> {
        let gone = || RequestError::NotRunning(namespace.into(), name.into());
        let (reply, answer) = oneshot::channel();
        self.find(namespace, name)?.send(order(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.context.crashed.cancel();
        self.main.abort();
        self.network.abort();
    }
}

/// Hand each change to its pod's task; a pod seen first gets one.
async fn run(
    context: Arc<Context>,
    pods: Arc<Mutex<Pods>>,
    mut events: futures::stream::BoxStream<'static, PodEvent>,
    mut ending: oneshot::Receiver<Ending>,
) {
    let mut tasks: JoinSet<PodRef> = JoinSet::new();
    let mut watching = true;
    loop {
        tokio::select! {
            event = events.next(), if watching => match event {
                Some(event) => take(&context, &pods, &mut tasks, event),
                None => watching = false,
            },
            Some(done) = tasks.join_next() => {
                match done {
                    Ok(key) => drop(pods.lock().remove(&key)),
                    Err(e) => tracing::error!(target: "lab", "a pod's task ended: {e}"),
                }
            }
            told = &mut ending => {
                match told {
                    Ok(Ending::Teardown) => {
                        for tx in pods.lock().values() {
                            let _ = tx.send(Order::Teardown);
                        }
                        while tasks.join_next().await.is_some() {}
                    }
                    Ok(Ending::Halt) => tasks.shutdown().await,
                    Err(_) => {}
                }
                return;
            }
        }
    }
}

fn take(context: &Arc<Context>, pods: &Mutex<Pods>, tasks: &mut JoinSet<PodRef>, event: PodEvent) {
    let mut pods = pods.lock();
    match event {
        PodEvent::Snapshot(all) => {
            let present: std::collections::BTreeSet<PodRef> = all.iter().filter_map(spec::pod_ref).collect();
            for (_, tx) in pods.iter().filter(|(key, _)| !present.contains(key)) {
                let _ = tx.send(Order::Gone);
            }
            for pod in all {
                apply(context, &mut pods, tasks, pod);
            }
        }
        PodEvent::Applied(pod) => apply(context, &mut pods, tasks, *pod),
        PodEvent::Deleted(pod) => {
            if let Some(tx) = spec::pod_ref(&pod).and_then(|key| pods.get(&key)) {
                let _ = tx.send(Order::Gone);
            }
        }
    }
}

fn apply(context: &Arc<Context>, pods: &mut Pods, tasks: &mut JoinSet<PodRef>, pod: Pod) {
    let Some(key) = spec::pod_ref(&pod) else { return };
    if let Some(tx) = pods.get(&key) {
        let _ = tx.send(Order::Spec(Box::new(pod)));
        return;
    }
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    if matches!(phase, Some("Succeeded" | "Failed")) && pod.metadata.deletion_timestamp.is_none() {
        return;
    }
    let (tx, inbox) = mpsc::unbounded_channel();
    pods.insert(key.clone(), tx);
    let context = Arc::clone(context);
    tasks.spawn(async move {
        PodTask::run(context, pod, key.clone(), inbox).await;
        key
    });
}

/// Now, as the API writes it.
fn now() -> Time {
    Time(k8s_openapi::jiff::Timestamp::now())
}
