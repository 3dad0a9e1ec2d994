//! One pod's life on its node, as one task.
//!
//! Sandbox (again and again until it works), workload, readiness, requests from
//! outside, the grace period, DEL, removal from the API: in that order, and the
//! order is the code's.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use super::api::SinkError;
use super::cni::CniError;
use super::conf::RuntimeConfig;
use super::probe::Probes;
use super::record::PodRecord;
use super::sandbox::{Sandbox, Wanted};
use super::spec::{self, PodRef};
use super::status::{self, Known, Stage, pod_status};
use super::{Context, now};
use crate::lab::workload::{Server, Speaks};

/// What the pod's task is told.
pub(super) enum Order {
    /// The pod as the API has it now.
    Spec(Box<Pod>),
    /// The API has it no more: end at once.
    Gone,
    /// The lab goes down in good order: end at once, the API is not asked.
    Teardown,
    /// Its processes die and are started again.
    KillContainers(oneshot::Sender<()>),
    /// A new sandbox, then after the delay DEL of the old one. With `abrupt`
    /// the old namespace dies first.
    NewSandbox {
        abrupt: bool,
        late_del: Duration,
        done: oneshot::Sender<()>,
    },
    Check(oneshot::Sender<Result<(), CniError>>),
    /// Overrides what probes say; `None` lifts it.
    SetReady(Option<bool>),
}

/// Why a pod's task stops serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Asked to, with a grace period; it is reported and removed from the API.
    Graceful,
    /// At once.
    Forced,
    /// The kubelet itself is gone: everything stays as it is.
    Abandoned,
}

pub(super) struct PodTask {
    context: Arc<Context>,
    pod: Pod,
    key: PodRef,
    inbox: mpsc::UnboundedReceiver<Order>,
    known: Known,
    sandbox: Option<Sandbox>,
    server: Option<Server>,
    forced_ready: Option<bool>,
    status: watch::Sender<PodStatus>,
    since: Instant,
}

impl PodTask {
    pub(super) async fn run(context: Arc<Context>, pod: Pod, key: PodRef, inbox: mpsc::UnboundedReceiver<Order>) {
        let known = Known {
            stage: Stage::Creating { message: None },
            ips: Vec::new(),
            host_ips: context.config.host_ips.clone(),
            accepted: now(),
            restarts: 0,
            sandbox: None,
        };
        let (status, latest) = watch::channel(pod_status(&pod, &known, &now()));
        let reporter = AbortOnDropHandle::new(tokio::spawn(report(Arc::clone(&context), key.clone(), latest)));
        let task = Self {
            context,
            pod,
            key,
            inbox,
            known,
            sandbox: None,
            server: None,
            forced_ready: None,
            status,
            since: Instant::now(),
        };
        task.live(reporter).await;
    }

    async fn live(mut self, reporter: AbortOnDropHandle<()>) {
        let end = match self.start().await {
            Err(end) => end,
            Ok(()) => match self.serve(None).await {
                End::Graceful => self.linger().await,
                other => other,
            },
        };
        if end == End::Abandoned {
            return;
        }
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
        let started = match &self.known.stage {
            Stage::Running { since, .. } => Some(since.clone()),
            _ => None,
        };
        if let Some(sandbox) = self.sandbox.take() {
            let begin = Instant::now();
            disconnect(Arc::clone(&self.context), self.key.clone(), sandbox, Duration::ZERO).await;
            self.record(|r| r.phases.del = Some(begin.elapsed()));
        }
        self.record(|r| r.ended = true);
        if end == End::Forced {
            return;
        }
        self.known.stage = Stage::Ended { started, at: now() };
        self.publish();
        drop(self.status);
        let _ = reporter.await;
        let (sink, key) = (&self.context.sink, &self.key);
        self.context.insist("removing pod", || sink.pod_ended(key)).await;
    }

    /// Sandbox and workload; an error is an order to end before it got there.
    async fn start(&mut self) -> Result<(), End> {
        if self.pod.metadata.deletion_timestamp.is_some() {
            return Err(End::Graceful);
        }
        if spec::is_host_network(&self.pod) {
            self.known.ips = self.context.config.host_ips.clone();
        } else {
            let sandbox = self.new_sandbox().await?;
            self.adopt(sandbox);
        }
        self.start_workload().await;
        self.record(|r| r.phases.running = r.since_seen());
        Ok(())
    }

    /// Try until there is a sandbox, each time a new one, with back-off.
    async fn new_sandbox(&mut self) -> Result<Sandbox, End> {
        let (mut pause, longest) = self.context.config.backoff;
        loop {
            self.network_ready().await?;
            self.record(|r| r.phases.network = r.phases.network.or(r.since_seen()));
            let annotations = spec::annotations(&self.pod);
            let seen = self.known.accepted.0.to_string();
            let runtime = RuntimeConfig::of(&annotations, &spec::host_ports(&self.pod), &seen);
            let wanted = Wanted {
                pod: &self.key,
                runtime,
                notes: &self.context.config.dirs.sandboxes,
                live: &self.context.live,
            };
            let mut log = Vec::new();
            let made = Sandbox::create(&self.context.runner, wanted, &mut log).await;
            self.record(|r| {
                r.calls.append(&mut log);
                r.attempts += 1;
            });
            match made {
                Ok(sandbox) => return Ok(sandbox),
                Err(failed) => {
                    let message = failed.error.to_string();
                    tracing::info!(target: "lab", pod = %self.key, "{message}; again in {pause:?}");
                    self.record(|r| r.failed(&message));
                    if let Some(leftover) = failed.leftover {
                        self.context.del_later(self.key.clone(), *leftover, pause);
                    }
                    self.known.stage = Stage::Creating { message: Some(message) };
                    self.publish();
                }
            }
            if let Ok(end) = tokio::time::timeout(pause, self.told_to_end()).await {
                return Err(end);
            }
            pause = (pause * 2).min(longest);
        }
    }

    async fn network_ready(&mut self) -> Result<(), End> {
        let mut network = self.context.network.subscribe();
        tokio::select! {
            biased;
            end = self.told_to_end() => Err(end),
            ready = network.wait_for(|n| n.is_ok()) => ready.map(|_| ()).map_err(|_| End::Abandoned),
        }
    }

    /// Take orders while there is no workload; returns with the one that ends.
    async fn told_to_end(&mut self) -> End {
        loop {
            match self.inbox.recv().await {
                None => return End::Abandoned,
                Some(Order::Gone | Order::Teardown) => return End::Forced,
                Some(Order::Spec(pod)) => {
                    self.pod = status::keep_own_conditions(*pod, &self.pod);
                    if self.pod.metadata.deletion_timestamp.is_some() {
                        return End::Graceful;
                    }
                }
                Some(Order::SetReady(ready)) => self.forced_ready = ready,
                // Nothing to do it to: the asker sees its reply dropped.
                Some(Order::KillContainers(_) | Order::NewSandbox { .. } | Order::Check(_)) => {}
            }
        }
    }

    fn adopt(&mut self, sandbox: Sandbox) {
        self.known.ips = sandbox.ips.clone();
        self.known.sandbox = Some(sandbox.id.clone());
        self.record(|r| {
            r.phases.namespace = Some(sandbox.made_in.0);
            r.phases.add = Some(sandbox.made_in.1);
            r.netns = Some(sandbox.ns_path().to_owned());
            r.ips = sandbox.ips.clone();
            r.result = sandbox.result().cloned();
            r.sandboxes.push(sandbox.id.clone());
        });
        self.sandbox = Some(sandbox);
    }

    /// Open the pod's ports in its sandbox and say it runs.
    async fn start_workload(&mut self) {
        let ports = spec::ports(&self.pod);
        let (ns, addresses): (_, &[IpAddr]) = match &self.sandbox {
            Some(sandbox) => (sandbox.ns(), &[]),
            None => (Some(&self.context.node_ns), &self.context.config.host_ips),
        };
        if let Some(ns) = ns {
            match Server::start(ns, &self.key.name, addresses, &ports, Speaks::Name).await {
                Ok(server) => self.server = Some(server),
                Err(e) => {
                    let message = format!("workload: ports {ports:?}: {e}");
                    self.record(|r| r.failed(&message));
                }
            }
        }
        let count = spec::containers(&self.pod).len();
        self.known.stage = Stage::Running { since: now(), ready: vec![false; count] };
    }

    /// Answer orders and probe until told to end, or until the deadline.
    async fn serve(&mut self, until: Option<tokio::time::Instant>) -> End {
        let node = self.context.node_ns.clone();
        let mut probes = self.probes();
        self.show_ready(&probes);
        loop {
            let ip = self.known.ips.first().copied();
            let probing = async {
                match ip {
                    Some(ip) => probes.changed(&node, ip).await,
                    None => std::future::pending().await,
                }
            };
            let order = tokio::select! {
                order = self.inbox.recv() => order,
                () = probing => {
                    self.show_ready(&probes);
                    continue;
                }
                () = sleep_until(until) => return End::Graceful,
            };
            match order {
                None => return End::Abandoned,
                Some(Order::Gone | Order::Teardown) => return End::Forced,
                Some(Order::Spec(pod)) => {
                    self.pod = status::keep_own_conditions(*pod, &self.pod);
                    if self.pod.metadata.deletion_timestamp.is_some() {
                        return End::Graceful;
                    }
                }
                Some(Order::SetReady(ready)) => {
                    self.forced_ready = ready;
                    self.show_ready(&probes);
                }
                Some(Order::KillContainers(done)) => {
                    if let Some(server) = self.server.take() {
                        server.stop().await;
                    }
                    self.known.restarts += 1;
                    self.start_workload().await;
                    probes = self.probes();
                    self.show_ready(&probes);
                    let _ = done.send(());
                }
                Some(Order::NewSandbox { abrupt, late_del, done }) => {
                    if let Err(end) = self.replace_sandbox(abrupt, late_del).await {
                        return end;
                    }
                    probes = self.probes();
                    self.show_ready(&probes);
                    let _ = done.send(());
                }
                Some(Order::Check(reply)) => {
                    let mut log = Vec::new();
                    if let Some(sandbox) = &self.sandbox {
                        let _ = reply.send(sandbox.check(&self.context.runner, &mut log).await);
                    }
                    self.record(|r| r.calls.append(&mut log));
                }
            }
        }
    }

    /// Serve on for as long as the pod lingers; a shorter grace period given
    /// meanwhile counts.
    async fn linger(&mut self) -> End {
        let asked = tokio::time::Instant::now();
        loop {
            let until = asked + spec::lingers(&self.pod);
            match self.serve(Some(until)).await {
                End::Graceful if tokio::time::Instant::now() < asked + spec::lingers(&self.pod) => {}
                end => return end,
            }
        }
    }

    /// The new sandbox's ADD comes before the old one's DEL.
    async fn replace_sandbox(&mut self, abrupt: bool, late_del: Duration) -> Result<(), End> {
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
        let Some(mut old) = self.sandbox.take() else { return Ok(()) };
        if abrupt && let Err(e) = old.lose_namespace() {
            self.record(|r| r.failed(&e.to_string()));
        }
        self.known.stage = Stage::Creating { message: None };
        self.publish();
        match self.new_sandbox().await {
            Ok(new) => {
                self.context.del_later(self.key.clone(), old, late_del);
                self.adopt(new);
                self.known.restarts += 1;
                self.start_workload().await;
                Ok(())
            }
            Err(end) => {
                self.sandbox = Some(old);
                Err(end)
            }
        }
    }

    fn probes(&self) -> Probes {
        Probes::start(spec::containers(&self.pod).iter().map(spec::readiness).collect())
    }

    fn show_ready(&mut self, probes: &Probes) {
        let mut now_ready = probes.ready();
        if let Some(forced) = self.forced_ready {
            now_ready.fill(forced);
        }
        let all = now_ready.iter().all(|r| *r);
        if let Stage::Running { ready, .. } = &mut self.known.stage {
            *ready = now_ready;
        }
        self.record(|r| {
            r.ready = all;
            if all {
                r.phases.ready = r.phases.ready.or(r.since_seen());
            }
        });
        self.publish();
    }

    fn publish(&mut self) {
        let status = pod_status(&self.pod, &self.known, &now());
        // The next one builds on this, whether or not the API has echoed it.
        self.pod.status = Some(status.clone());
        self.status.send_replace(status);
    }

    fn record(&self, change: impl FnOnce(&mut PodRecord)) {
        let mut records = self.context.records.lock();
        let fresh = || PodRecord::new(self.key.clone(), self.since);
        change(records.entry(self.key.clone()).or_insert_with(fresh));
    }
}

async fn sleep_until(until: Option<tokio::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// DEL until it succeeds, then the namespace goes.
pub(super) async fn disconnect(context: Arc<Context>, key: PodRef, mut sandbox: Sandbox, after: Duration) {
    tokio::time::sleep(after).await;
    let (mut pause, longest) = context.config.backoff;
    loop {
        let mut log = Vec::new();
        let done = sandbox.disconnect(&context.runner, &context.live, &mut log).await;
        if let Some(record) = context.records.lock().get_mut(&key) {
            record.calls.append(&mut log);
            if let Err(e) = &done {
                record.failed(&e.to_string());
            }
        }
        match done {
            Ok(()) => break,
            Err(e) => tracing::info!(target: "lab", pod = %key, "{e}; again in {pause:?}"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
    if let Err(e) = sandbox.remove() {
        tracing::warn!(target: "lab", pod = %key, "removing sandbox: {e}");
    }
}

/// Tell the API the latest status; older ones that it has not taken are skipped.
async fn report(context: Arc<Context>, key: PodRef, mut latest: watch::Receiver<PodStatus>) {
    latest.mark_changed();
    while latest.changed().await.is_ok() {
        let status = latest.borrow_and_update().clone();
        let mut pause = Duration::from_millis(100);
        loop {
            match context.sink.pod_status(&key, &status).await {
                Ok(()) => break,
                Err(SinkError::Gone) => return,
                Err(SinkError::Failed(e)) => tracing::debug!(target: "lab", pod = %key, "status: {e}"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
            if latest.has_changed().unwrap_or(false) {
                break;
            }
        }
    }
}
