//! ClusterWatch: the only actor that talks to the Kubernetes API.
//!
//! Purpose: knows the pods of this node, the node itself, and the cluster's
//! Services with their endpoints, its NetworkPolicies with the pods and namespaces
//! that they speak of, and publishes them as facts; tells the cluster what happened (Events), how the node is (a
//! condition, an extended resource), and elects one node among all (a Lease).
//! Everything works on without it: while the API server is away the facts stay
//! as they were last seen, Events wait in a bounded buffer, and the Lease is
//! given up in time.
//!
//! Invariants: a fact is `None` until a full list has been seen once, and from
//! then on is never less than the last full list with its changes applied. A
//! deletion missed while the watch was cut is made up for by the next list.

pub mod convert;
pub mod election;
pub mod events;
pub mod index;
mod policies;
mod services;
pub mod status;
mod watches;
mod writers;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::actor::{Actor, Ctx, Handles, Message, Responder, StartError};
use crate::model::PodKey;
use crate::policy::index::{Index as PolicyIndex, Known as KnownPolicies};
use crate::service::index::Index as ServiceIndex;
use crate::service::model::ServiceName;
use events::Events;
use status::Desired;

/// The pods bound to this node; `None` while no full list has been seen.
pub type NodePods = Option<Arc<BTreeMap<PodKey, Arc<PodInfo>>>>;

/// A pod of this node, less what nobody here asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PodInfo {
    pub uid: String,
    pub phase: String,
    /// A deletion timestamp is set.
    pub terminating: bool,
    pub host_network: bool,
    /// Those of Fairway and of bandwidth.
    pub annotations: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// The controlling owner.
    pub owner: Option<Owner>,
    pub ips: Vec<IpAddr>,
    pub node: String,
}

impl PodInfo {
    pub fn owned_by(&self, kind: &str) -> bool {
        self.owner.as_ref().is_some_and(|o| o.kind == kind)
    }
    /// It will not run (again): its sandbox needs no address any more.
    pub fn finished(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Owner {
    pub kind: String,
    pub name: String,
}

/// This node, as the API server has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeInfo {
    pub name: String,
    pub uid: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub addresses: Vec<IpAddr>,
    /// Ours: as last written to the node's status, by whomever.
    pub condition: Option<NodeCondition>,
    pub exclusive_enis: Option<String>,
}

/// The node condition that says whether pods can get addresses here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeCondition {
    pub available: bool,
    pub reason: String,
    pub message: String,
}

/// What this actor publishes; valid across its restarts.
#[derive(Clone, Debug)]
pub struct Facts {
    pub pods: watch::Receiver<NodePods>,
    pub node: watch::Receiver<Option<Arc<NodeInfo>>>,
    /// True on at most one node of the cluster at a time.
    pub leader: watch::Receiver<bool>,
    /// The cluster's Services and EndpointSlices, and which have changed.
    pub services: ServiceIndex,
    /// NetworkPolicies, all pods and namespaces, and which have changed.
    pub policies: PolicyIndex,
}

/// The publishing side of [`Facts`].
#[derive(Clone, Debug)]
pub struct Publisher {
    pub pods: watch::Sender<NodePods>,
    pub node: watch::Sender<Option<Arc<NodeInfo>>>,
    pub leader: watch::Sender<bool>,
    pub services: ServiceIndex,
    pub policies: PolicyIndex,
    /// What [`SetNodeStatus`] asked for; here, so that a restart keeps it.
    desired: watch::Sender<Desired>,
}

/// Made once, before the actor: the facts outlive its embodiments.
pub fn facts() -> (Publisher, Facts) {
    let (pods, pods_seen) = watch::channel(None);
    let (node, node_seen) = watch::channel(None);
    let (leader, leader_seen) = watch::channel(false);
    let (desired, _) = watch::channel(Desired::default());
    let (services, policies) = (ServiceIndex::default(), PolicyIndex::default());
    let seen = Facts {
        pods: pods_seen,
        node: node_seen,
        leader: leader_seen,
        services: services.clone(),
        policies: policies.clone(),
    };
    (Publisher { pods, node, leader, services, policies, desired }, seen)
}

/// Tell the cluster. Answered when buffered, not when delivered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RecordEvent {
    pub about: About,
    pub warning: bool,
    /// Why, in CamelCase: `AddressAssigned`.
    pub reason: String,
    /// What was done: `Add`.
    pub action: String,
    /// For people; longer than 1 kB it is cut.
    pub note: String,
}
impl Message for RecordEvent {
    const NAME: &'static str = "RecordEvent";
    type Reply = ();
    type Error = ClusterError;
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum About {
    Pod { key: PodKey, uid: Option<String> },
    Node,
    Service { name: ServiceName, uid: String },
    NetworkPolicy { name: ServiceName, uid: String },
    EndpointSlice { name: ServiceName, uid: String },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    #[error("this agent is configured without a Kubernetes API")]
    Disabled,
}

/// Make the node's status say this, and keep it so. The last one counts.
#[derive(Clone, Debug)]
pub struct SetNodeStatus {
    pub condition: Option<NodeCondition>,
    /// ENIs that pods can have for themselves on this node.
    pub exclusive_enis: Option<u32>,
}
impl Message for SetNodeStatus {
    const NAME: &'static str = "SetNodeStatus";
    type Reply = ();
    type Error = ClusterError;
}

/// How the conversation with the Kubernetes API fares.
#[derive(Clone, Debug)]
pub struct ClusterStatus {}
impl Message for ClusterStatus {
    const NAME: &'static str = "ClusterStatus";
    type Reply = ClusterSnapshot;
    type Error = std::convert::Infallible;
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ClusterSnapshot {
    pub enabled: bool,
    /// Absent while no full list has been seen.
    pub pods: Option<usize>,
    pub node_seen: bool,
    /// Absent when Services are not watched.
    pub services: Option<crate::service::index::Known>,
    /// Absent when policies are not watched.
    pub policies: Option<KnownPolicies>,
    pub leader: bool,
    pub events: events::EventStats,
    /// Seconds since a watch last said something.
    pub heard_seconds_ago: Option<u64>,
    /// The last fault, by what was asked for.
    pub faults: BTreeMap<&'static str, String>,
}

/// Where the Kubernetes API is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The service account of the agent's pod.
    #[default]
    InCluster,
    Kubeconfig(PathBuf),
    /// None: pods are known by what the runtime says alone.
    Disabled,
}

/// The `cluster` section of the agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "snake_case")]
pub struct Config {
    pub source: Source,
    pub node_name: String,
    /// Take part in electing the one node that tidies up for the cluster.
    pub election: bool,
    pub lease_namespace: String,
    pub lease_name: String,
    pub lease_seconds: u64,
    /// Events that wait while the API is away.
    pub events_buffered: usize,
    /// One watch instead of a paged list and a watch; needs a server that can.
    pub streaming_lists: bool,
    /// Watch Services and EndpointSlices; from `services.enabled`.
    #[serde(skip)]
    pub services: bool,
    /// Watch NetworkPolicies, all pods and namespaces; from `policies.enabled`.
    #[serde(skip)]
    pub policies: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            source: Source::InCluster,
            node_name: String::new(),
            election: true,
            lease_namespace: "kube-system".into(),
            lease_name: "fairway-leader".into(),
            lease_seconds: 15,
            events_buffered: 1024,
            streaming_lists: false,
            services: false,
            policies: false,
        }
    }
}

/// What the loops have heard, for [`ClusterSnapshot`].
#[derive(Default)]
pub(crate) struct Health {
    inner: Mutex<(Option<Instant>, BTreeMap<&'static str, String>)>,
}

impl Health {
    /// Note an item of a watch; its error is logged, and the watch goes on.
    fn seen<T, E: std::fmt::Display>(&self, what: &'static str, item: Result<T, E>) -> Option<T> {
        match item {
            Ok(item) => {
                let mut inner = self.inner.lock();
                inner.0 = Some(Instant::now());
                inner.1.remove(what);
                Some(item)
            }
            Err(e) => {
                self.fault(what, &e.to_string());
                None
            }
        }
    }

    fn fault(&self, what: &'static str, why: &str) {
        let mut inner = self.inner.lock();
        // Once per change: the API may be away for hours.
        if inner.1.get(what).is_none_or(|before| before != why) {
            tracing::warn!(what, error = why, "The Kubernetes API does not do as asked; trying again");
            inner.1.insert(what, why.to_owned());
        }
    }
}

pub struct ClusterWatch {
    config: Arc<Config>,
    /// Absent when disabled.
    client: Option<Client>,
    publisher: Publisher,
    facts: Facts,
    health: Arc<Health>,
    events: Arc<Mutex<Events>>,
    more_events: Arc<Notify>,
}

impl ClusterWatch {
    /// Connects to nothing yet: the API may be away.
    pub async fn open(config: Config, publisher: Publisher, facts: Facts) -> Result<Self, StartError> {
        let client = match &config.source {
            Source::Disabled => None,
            Source::InCluster => Some(kube::Config::incluster().map_err(|e| {
                StartError::new(format!("no service account of a pod: {e}; name a kubeconfig or disable the cluster"))
            })?),
            Source::Kubeconfig(path) => {
                let bad = |e: &dyn std::fmt::Display| StartError::new(format!("kubeconfig {}: {e}", path.display()));
                let read = Kubeconfig::read_from(path).map_err(|e| bad(&e))?;
                let options = KubeConfigOptions::default();
                Some(kube::Config::from_custom_kubeconfig(read, &options).await.map_err(|e| bad(&e))?)
            }
        };
        if client.is_some() && config.node_name.is_empty() {
            return Err(StartError::new("cluster.node_name is empty; set it to this node's name in the cluster"));
        }
        let client = client.map(Client::try_from).transpose().map_err(StartError::new)?;
        let events = Events::new(&config.node_name, config.events_buffered);
        Ok(Self {
            config: Arc::new(config),
            client,
            publisher,
            facts,
            health: Arc::default(),
            events: Arc::new(Mutex::new(events)),
            more_events: Arc::default(),
        })
    }
}

impl Actor for ClusterWatch {
    const NAME: &'static str = "ClusterWatch";
    /// A burst of pods says more than it asks.
    const CAPACITY: usize = 1024;

    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        let Some(client) = self.client.clone() else { return Ok(()) };
        let (config, publisher, facts) = (self.config.clone(), self.publisher.clone(), self.facts.clone());
        let health = self.health.clone();
        let ended =
            |what: &'static str| move |_: &mut Self, (), ctx: &mut Ctx<'_, Self>| ctx.fail(format!("{what} ended"));
        ctx.spawn(
            watches::pods(client.clone(), config.clone(), publisher.clone(), health.clone()),
            ended("the watch of pods"),
        );
        ctx.spawn(
            watches::node(client.clone(), config.clone(), publisher.clone(), health.clone()),
            ended("the watch of the node"),
        );
        if config.services {
            let index = publisher.services.clone();
            ctx.spawn(
                services::services(client.clone(), config.clone(), index.clone(), health.clone()),
                ended("the watch of services"),
            );
            ctx.spawn(
                services::slices(client.clone(), config.clone(), index, health.clone()),
                ended("the watch of endpoint slices"),
            );
        }
        if config.policies {
            let (index, words) = (publisher.policies.clone(), policies::Words::default());
            ctx.spawn(
                policies::policies(client.clone(), config.clone(), index.clone(), words.clone(), health.clone()),
                ended("the watch of network policies"),
            );
            ctx.spawn(
                policies::pods(client.clone(), config.clone(), index.clone(), words.clone(), health.clone()),
                ended("the watch of all pods"),
            );
            ctx.spawn(
                policies::namespaces(client.clone(), config.clone(), index, words, health.clone()),
                ended("the watch of namespaces"),
            );
        }
        let (buffer, more) = (self.events.clone(), self.more_events.clone());
        ctx.spawn(
            writers::events(client.clone(), buffer, more, facts.clone(), health.clone()),
            ended("the delivery of events"),
        );
        ctx.spawn(
            writers::node_status(
                client.clone(),
                config.clone(),
                self.publisher.desired.subscribe(),
                facts,
                health.clone(),
            ),
            ended("the writing of the node's status"),
        );
        if config.election {
            ctx.spawn(writers::election(client, config, publisher, health), ended("the election"));
        }
        Ok(())
    }
}

impl Handles<RecordEvent> for ClusterWatch {
    fn handle(&mut self, event: RecordEvent, to: Responder<RecordEvent>, _: &mut Ctx<'_, Self>) {
        if self.client.is_none() {
            return to.fail(ClusterError::Disabled);
        }
        self.events.lock().push(event, Timestamp::now());
        self.more_events.notify_one();
        to.ok(());
    }
}

impl Handles<SetNodeStatus> for ClusterWatch {
    fn handle(&mut self, set: SetNodeStatus, to: Responder<SetNodeStatus>, _: &mut Ctx<'_, Self>) {
        if self.client.is_none() {
            return to.fail(ClusterError::Disabled);
        }
        let desired = Desired { condition: set.condition, exclusive_enis: set.exclusive_enis };
        self.publisher.desired.send_replace(desired);
        to.ok(());
    }
}

impl Handles<ClusterStatus> for ClusterWatch {
    fn handle(&mut self, _: ClusterStatus, to: Responder<ClusterStatus>, _: &mut Ctx<'_, Self>) {
        let (heard, faults) = self.health.inner.lock().clone();
        to.ok(ClusterSnapshot {
            enabled: self.client.is_some(),
            pods: self.facts.pods.borrow().as_ref().map(|p| p.len()),
            node_seen: self.facts.node.borrow().is_some(),
            services: self.config.services.then(|| self.facts.services.known()),
            policies: self.config.policies.then(|| self.facts.policies.known()),
            leader: *self.facts.leader.borrow(),
            events: self.events.lock().stats(),
            heard_seconds_ago: heard.map(|at| at.elapsed().as_secs()),
            faults,
        });
    }
}
