//! Pool: the actor that owns the address ledger.
//!
//! Purpose: leases addresses that the cloud really assigned to an ENI of this
//! node, keeps a stock of idle ones, and accounts for every address and ENI
//! through any crash. What to do is decided by `plan` (pure); what was decided
//! is written to `ledger` (sled) before it is done and after.

mod apply;
pub mod audit;
pub mod config;
pub mod demand;
pub mod ledger;
pub mod outcome;
pub mod plan;
pub mod reconcile;
pub mod snapshot;
pub mod state;
pub mod step;
mod why;
pub mod work;

use std::time::Duration;

use crate::actor::Message;
use crate::cloud::CloudError;
use crate::model::{AttachMode, AttachmentId, Bandwidth, Lease, PodKey};
use std::path::PathBuf;

/// Lease an address for an attachment. Asked again for the same attachment it
/// answers the same lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocate {
    pub attachment: AttachmentId,
    pub pod: PodKey,
    pub pod_uid: Option<String>,
    pub mode: AttachMode,
    pub netns: PathBuf,
    pub bandwidth: Bandwidth,
    /// Keep the address for the same pod name this long after release
    /// (StatefulSet pods); it is also taken from a reservation when one exists.
    pub reserve: Option<Duration>,
}
impl Message for Allocate {
    const NAME: &'static str = "Allocate";
    type Reply = Lease;
    type Error = PoolError;
}

/// The attachment is wired: the lease is in use from here on.
#[derive(Clone, Debug)]
pub struct Confirm {
    pub attachment: AttachmentId,
}
impl Message for Confirm {
    const NAME: &'static str = "Confirm";
    type Reply = ();
    type Error = PoolError;
}

/// First half of a release: marks the lease as being unwired and returns it, or
/// `None` when this attachment holds nothing (the DEL is already done).
#[derive(Clone, Debug)]
pub struct BeginRelease {
    pub attachment: AttachmentId,
}
impl Message for BeginRelease {
    const NAME: &'static str = "BeginRelease";
    type Reply = Option<Lease>;
    type Error = PoolError;
}

/// Second half: the namespace no longer uses the addresses; they cool down, or
/// stay reserved for the pod's name.
#[derive(Clone, Debug)]
pub struct FinishRelease {
    pub attachment: AttachmentId,
}
impl Message for FinishRelease {
    const NAME: &'static str = "FinishRelease";
    type Reply = ();
    type Error = PoolError;
}

/// The lease an attachment holds, if any.
#[derive(Clone, Debug)]
pub struct Lookup {
    pub attachment: AttachmentId,
}
impl Message for Lookup {
    const NAME: &'static str = "Lookup";
    type Reply = Option<Lease>;
    type Error = PoolError;
}

/// Every lease of this node (for GC and audits).
#[derive(Clone, Debug)]
pub struct Leases {}
impl Message for Leases {
    const NAME: &'static str = "Leases";
    type Reply = Vec<Lease>;
    type Error = PoolError;
}

/// Why an address could not be leased or released.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error(
        "this node's ENIs hold as many addresses as its instance type allows ({in_use} in use of {limit}); schedule fewer pods here or use a larger instance type"
    )]
    NodeFull { in_use: usize, limit: usize },
    #[error("no address could be had from the cloud: {0}")]
    Cloud(CloudError),
    #[error("waiting for an address: {reason}")]
    Waiting { reason: String },
    #[error(
        "the address ledger cannot be written: {0}; free disk space or repair the state folder, nothing was handed out"
    )]
    Ledger(String),
    #[error("the pool is reconciling its ledger with the cloud and the kernel; try again")]
    Reconciling,
    #[error("attachment {0} is being released; try again")]
    BeingReleased(AttachmentId),
}
