//! NetnsWirer: the actor that owns links, addresses, routes and rules.
//!
//! Purpose: makes a pod's namespace match its lease and undoes it. What the
//! kernel should look like is decided by `plan` (pure); each mode is one file.
//! Idempotent, parallel across pods, no shelling out.
//!
//! The way of a request: the actor gives it to the wiring thread with the least
//! to do; its [`desk`](self) opens the namespaces, reads what is there, asks
//! [`plan`] for the steps and takes them, one system call for many. Nothing is
//! remembered between requests: names, hardware addresses and table numbers
//! follow from the attachment and the ENI (`names`).
//!
//! Routes and rules of ours carry the protocol number 70. The node's network
//! manager must leave them and our devices alone (systemd-networkd:
//! `ManageForeignRoutes=no`, `ManageForeignRoutingPolicyRules=no`).
//!
//! A new mode (ipvlan, netkit) is a file with its `desired` beside `veth` and
//! `exclusive`, and a [`LinkKind`](objects::LinkKind) for how its device is made.

mod config;
mod desk;
mod eni;
mod exclusive;
mod message;
mod monitor;
pub mod names;
pub(crate) mod nl;
pub mod note;
pub mod objects;
pub mod plan;
mod programs;
pub(crate) mod queues;
pub(crate) mod read;
mod site;
mod undo;
mod unlink;
mod veth;
mod wirer;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::actor::Message;
use crate::model::{AttachmentId, Bandwidth, EniId, EniRef, Lease, Mac, PodKey, Traffic};

pub use config::{BadConfig, Config, SpreadReceive};
pub use programs::{Attachment, NoPrograms, Placed, PodPrograms};
pub use wirer::{NetnsWirer, Wiring};

/// Make the namespace match the lease. Done again it changes nothing.
#[derive(Clone, Debug)]
pub struct Wire {
    pub lease: Lease,
}
impl Message for Wire {
    const NAME: &'static str = "Wire";
    type Reply = Wired;
    type Error = WireError;
}

/// What the kernel looks like now, for the CNI result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wired {
    pub host_ifname: Option<String>,
    pub host_mac: Option<Mac>,
    pub pod_mac: Mac,
    pub mtu: u32,
}

/// Undo `Wire`. A namespace, link or ENI that is already gone is success; an
/// exclusive ENI is back in the node's namespace afterwards.
#[derive(Clone, Debug)]
pub struct Unwire {
    pub lease: Lease,
}
impl Message for Unwire {
    const NAME: &'static str = "Unwire";
    type Reply = ();
    type Error = WireError;
}

/// Compare the kernel with the lease; an empty list means it matches.
#[derive(Clone, Debug)]
pub struct Verify {
    pub lease: Lease,
}
impl Message for Verify {
    const NAME: &'static str = "Verify";
    type Reply = Vec<Finding>;
    type Error = WireError;
}

/// Host side of a shared ENI: link up, MTU, sysctls, routing table. The device
/// may appear some time after the attach call: waits for it until the deadline.
#[derive(Clone, Debug)]
pub struct PrepareEni {
    pub eni: EniRef,
    /// Exclusive ENIs are only waited for, not configured in the host.
    pub shared: bool,
}
impl Message for PrepareEni {
    const NAME: &'static str = "PrepareEni";
    type Reply = PreparedEni;
    type Error = WireError;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedEni {
    pub ifname: String,
    pub ifindex: u32,
    pub rx_queues: u32,
    pub mtu: u32,
    /// The cores that serve each receive queue; empty when nothing was spread.
    #[serde(default)]
    pub receive_cores: Vec<String>,
}

/// Remove the host side of an ENI that is about to be detached.
#[derive(Clone, Debug)]
pub struct ForgetEni {
    pub eni: EniRef,
}
impl Message for ForgetEni {
    const NAME: &'static str = "ForgetEni";
    type Reply = ();
    type Error = WireError;
}

/// What this agent has in the kernel, read afresh.
#[derive(Clone, Debug)]
pub struct Inventory {}
impl Message for Inventory {
    const NAME: &'static str = "Inventory";
    type Reply = KernelInventory;
    type Error = WireError;
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInventory {
    /// ENI devices in the node's own namespace, by hardware address.
    pub enis: Vec<(Mac, String)>,
    /// Host links of attachments, by name.
    pub host_links: Vec<String>,
    /// Host links that say whose they are.
    #[serde(default)]
    pub attached: Vec<Attached>,
    /// Addresses with a host route of ours.
    pub routed: Vec<std::net::IpAddr>,
    /// Addresses with a policy rule of ours.
    pub ruled: Vec<std::net::IpAddr>,
    /// Attachments with a pinned program of ours.
    pub pinned: Vec<String>,
    /// ENI devices whose receive queues are spread, with the cores per queue.
    #[serde(default)]
    pub receive: Vec<(String, Vec<String>)>,
}

/// A host link with what it says of its attachment. Outside input: whoever may
/// change links on the node may have written it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    pub link: String,
    pub note: Note,
    /// Addresses with a host route of ours over it.
    pub addresses: Vec<std::net::IpAddr>,
}

/// What a host link says; as much as fitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub attachment: AttachmentId,
    pub netns: Option<PathBuf>,
    pub bandwidth: Bandwidth,
    pub traffic: Traffic,
    pub pod: Option<PodKey>,
    pub pod_uid: Option<String>,
}

/// One difference between the kernel and a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `link`, `address`, `route`, `rule`, `neighbour`, `program`, `namespace`,
    /// `qdisc`, `sysctl`.
    pub what: String,
    pub detail: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("network namespace {0} is gone; kubelet will make a new sandbox")]
    NamespaceGone(PathBuf),
    #[error("ENI {0} has no device on this node yet; the cloud may still be attaching it")]
    DeviceMissing(EniId),
    #[error("{attachment}: {step}: {cause}")]
    Kernel { attachment: AttachmentId, step: String, cause: String },
    #[error("the wiring threads are stopped; the agent is restarting them")]
    Unavailable,
}
