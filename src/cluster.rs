//! ClusterWatch: the only actor that talks to the Kubernetes API.
//!
//! Purpose: knows the pods of this node and the node itself, and publishes them
//! as facts; tells the cluster what happened (Events), how the node is (a
//! condition, an extended resource), and elects one node among all (a Lease).
//! Everything works on without it: while the API server is away the facts stay
//! as they were last seen, Events wait in a bounded buffer, and the Lease is
//! given up in time.
//!
//! Invariants: a fact is `None` until a full list has been seen once, and from
//! then on is never less than the last full list with its changes applied. A
//! deletion missed while the watch was cut is made up for by the next list.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

use crate::actor::Message;
use crate::model::PodKey;

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
}

/// The publishing side of [`Facts`].
#[derive(Clone, Debug)]
pub struct Publisher {
    pub pods: watch::Sender<NodePods>,
    pub node: watch::Sender<Option<Arc<NodeInfo>>>,
    pub leader: watch::Sender<bool>,
}

/// Made once, before the actor: the facts outlive its embodiments.
pub fn facts() -> (Publisher, Facts) {
    let (pods, pods_seen) = watch::channel(None);
    let (node, node_seen) = watch::channel(None);
    let (leader, leader_seen) = watch::channel(false);
    (Publisher { pods, node, leader }, Facts { pods: pods_seen, node: node_seen, leader: leader_seen })
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
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    #[error("this agent is configured without a Kubernetes API")]
    Disabled,
}
