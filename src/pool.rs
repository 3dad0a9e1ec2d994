//! Pool: the actor that owns the address ledger.
//!
//! Purpose: leases addresses that the cloud really assigned to an ENI of this
//! node, keeps a stock of idle ones, and accounts for every address and ENI
//! through any crash. What to do is decided by `plan` (pure); what was decided
//! is written to `ledger` (sled) before it is done and after.
//!
//! How it turns: requests, answers of calls and changed facts are queued. A turn
//! takes all of them, applies them and the plan's steps to a copy of the state,
//! and writes the difference in one batch. Only when that is written does the
//! copy become the state, are answers given and the calls started that the new
//! state asks for. What arrives meanwhile waits for the next turn, so batches
//! grow with the load and nothing ever sleeps to form one.
//!
//! - data: [`state`], [`demand`], [`config`]; [`step`]: the transitions
//! - deciding: [`plan`], [`work`], [`outcome`], [`reconcile`], [`audit`]
//! - doing: `turn`, `calls`, `duties`; on disk: [`ledger`]; seen: [`snapshot`]

mod apply;
pub mod audit;
mod calls;
pub mod config;
pub mod demand;
mod desk;
mod duties;
pub mod ledger;
pub mod outcome;
pub mod plan;
pub mod reconcile;
pub mod snapshot;
mod start;
pub mod state;
pub mod step;
mod turn;
mod why;
pub use why::{Why, why};
pub mod work;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::actor::{Actor, Ctx, Handles, Message, Port, Responder, StartError};
use crate::cloud::{self, CloudError};
use crate::model::{AttachMode, AttachmentId, Bandwidth, Lease, PodKey, SecurityGroupId, Traffic};
use crate::netns;

pub use audit::AuditReport;
pub use config::{Config, VSwitchPolicy};
pub use demand::{BoundPod, BoundPods};
pub use desk::die;
pub use ledger::LedgerReport;
pub use snapshot::PoolSnapshot;

use demand::Demand;
use state::{EniKey, State, Time};
use work::Subject;

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
    pub traffic: Traffic,
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

/// Compare ledger, cloud, kernel and cluster by fresh readings; changes nothing.
#[derive(Clone, Debug)]
pub struct Audit {}
impl Message for Audit {
    const NAME: &'static str = "Audit";
    type Reply = AuditReport;
    type Error = PoolError;
}

/// Why an address could not be leased or released.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error(
        "this node's ENIs hold as many addresses as its instance type allows ({in_use} in use of {limit}); schedule fewer pods here or use a larger instance type"
    )]
    NodeFull { in_use: usize, limit: usize },
    #[error(
        "this node has no place for an ENI of the pod's own: all {limit} that its instance type or max_enis allows are taken, {shared} of them by ENIs that pods share; schedule fewer pods with fairway.io/eni: exclusive here or use a larger instance type"
    )]
    NoPlace { shared: usize, limit: usize },
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

/// What the pool asks of CloudApi.
#[derive(Clone, Debug)]
pub struct CloudPorts {
    pub who_am_i: Port<cloud::WhoAmI>,
    pub instance_type: Port<cloud::DescribeInstanceType>,
    pub vswitches: Port<cloud::DescribeVSwitches>,
    pub enis: Port<cloud::DescribeEnis>,
    pub create: Port<cloud::CreateEni>,
    pub attach: Port<cloud::AttachEni>,
    pub detach: Port<cloud::DetachEni>,
    pub delete: Port<cloud::DeleteEni>,
    pub assign4: Port<cloud::AssignIpv4>,
    pub unassign4: Port<cloud::UnassignIpv4>,
    pub assign6: Port<cloud::AssignIpv6>,
    pub unassign6: Port<cloud::UnassignIpv6>,
}

/// What the pool asks of NetnsWirer.
#[derive(Clone, Debug)]
pub struct NetnsPorts {
    pub prepare: Port<netns::PrepareEni>,
    pub forget: Port<netns::ForgetEni>,
    pub unwire: Port<netns::Unwire>,
    pub inventory: Port<netns::Inventory>,
}

/// Everything the pool is built from, afresh after each failure.
#[derive(Clone)]
pub struct Deps {
    pub config: Config,
    /// The ledger's folder, or another place to keep it (tests).
    pub ledger: LedgerPlace,
    pub cloud: CloudPorts,
    pub netns: NetnsPorts,
    pub bound: watch::Receiver<BoundPods>,
    /// This node reclaims the cluster's orphaned ENIs.
    pub elected: watch::Receiver<bool>,
    pub snapshots: watch::Sender<Arc<PoolSnapshot>>,
}

#[derive(Clone)]
pub enum LedgerPlace {
    Folder(PathBuf),
    Memory(ledger::MemoryStore),
}

struct Waiting {
    request: Allocate,
    to: Responder<Allocate>,
}

pub struct Pool {
    config: Config,
    cloud: CloudPorts,
    netns: NetnsPorts,
    bound: watch::Receiver<BoundPods>,
    elected: watch::Receiver<bool>,
    snapshots: watch::Sender<Arc<PoolSnapshot>>,
    desk: desk::DeskHandle,
    clock: Clock,

    /// Equal to what is on disk.
    state: State,
    report: LedgerReport,
    ledger_error: Option<String>,
    reconciled: bool,

    // Turning.
    jobs: Vec<turn::Job>,
    waiting: Vec<Waiting>,
    committing: bool,
    /// Something came while a turn could not be taken.
    again: bool,
    waker: Option<crate::actor::Timer>,
    expiry: Option<crate::actor::Timer>,
    publishing: bool,
    /// A flush of the ledger is due.
    settling: bool,
    steps: step::StepCounts,

    // Calls.
    running: BTreeMap<Subject, (&'static str, Instant)>,
    /// When a call for this ENI last began or ended.
    touched: BTreeMap<EniKey, Instant>,
    /// Failures of work that no hold in the state covers.
    retries: BTreeMap<Subject, (Time, u32)>,
    last_error: Option<CloudError>,

    // Knowledge of the outside, read again after each start.
    demand: Demand,
    security_groups: Vec<SecurityGroupId>,
    looking: duties::Looking,
    gone_since: BTreeMap<(AttachmentId, reconcile::Gone), Time>,
    orphans: BTreeMap<crate::model::EniId, Time>,
    reclaiming: bool,
}

/// Wall time that never jumps while the process lives.
#[derive(Clone, Copy, Debug)]
struct Clock {
    began: Instant,
    wall_ms: u64,
}

impl Clock {
    fn start() -> Self {
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self { began: Instant::now(), wall_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX) }
    }
    fn now(&self) -> Time {
        Time(self.wall_ms).plus(Instant::now() - self.began)
    }
}

impl Actor for Pool {
    const NAME: &'static str = "Pool";
    const CAPACITY: usize = 2048;

    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        ctx.on_change(self.bound.clone(), |pool, bound, ctx| {
            pool.demand.bound = bound;
            pool.turn(ctx);
        });
        let sweep = (self.config.sandbox_gone_after / 2).clamp(Duration::from_secs(1), Duration::from_secs(30));
        ctx.every(sweep, |pool, ctx| pool.sweep(ctx));
        ctx.every(self.config.resync, |pool, ctx| pool.look(duties::Scope::Everything, ctx));
        let reclaim = (self.config.orphan_delay / 3).clamp(Duration::from_secs(1), Duration::from_secs(120));
        ctx.every(reclaim, |pool, ctx| pool.reclaim(ctx));
        self.publish(ctx);
        self.reconcile(ctx);
        Ok(())
    }
}

impl Handles<Allocate> for Pool {
    fn handle(&mut self, request: Allocate, to: Responder<Allocate>, ctx: &mut Ctx<'_, Self>) {
        self.waiting.push(Waiting { request, to });
        self.expire_waiting(ctx);
        self.turn(ctx);
    }
}

impl Handles<Confirm> for Pool {
    fn handle(&mut self, message: Confirm, to: Responder<Confirm>, ctx: &mut Ctx<'_, Self>) {
        self.jobs.push(turn::Job::Confirm(message.attachment, to));
        self.turn(ctx);
    }
}

impl Handles<BeginRelease> for Pool {
    fn handle(&mut self, message: BeginRelease, to: Responder<BeginRelease>, ctx: &mut Ctx<'_, Self>) {
        // A DEL ends an ADD that still waits.
        let (ended, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition(|w| w.request.attachment == message.attachment);
        self.waiting = waiting;
        let ended: Vec<Waiting> = ended;
        for waiting in ended {
            waiting.to.fail(PoolError::BeingReleased(message.attachment.clone()));
        }
        self.jobs.push(turn::Job::Begin(message.attachment, to));
        self.turn(ctx);
    }
}

impl Handles<FinishRelease> for Pool {
    fn handle(&mut self, message: FinishRelease, to: Responder<FinishRelease>, ctx: &mut Ctx<'_, Self>) {
        self.jobs.push(turn::Job::Finish(message.attachment, to));
        self.turn(ctx);
    }
}

impl Handles<Lookup> for Pool {
    fn handle(&mut self, message: Lookup, to: Responder<Lookup>, ctx: &mut Ctx<'_, Self>) {
        self.jobs.push(turn::Job::Lookup(message.attachment, to));
        self.turn(ctx);
    }
}

impl Handles<Leases> for Pool {
    fn handle(&mut self, _: Leases, to: Responder<Leases>, ctx: &mut Ctx<'_, Self>) {
        self.jobs.push(turn::Job::Leases(to));
        self.turn(ctx);
    }
}

impl Handles<Audit> for Pool {
    fn handle(&mut self, _: Audit, to: Responder<Audit>, ctx: &mut Ctx<'_, Self>) {
        self.audit(to, ctx);
    }
}
