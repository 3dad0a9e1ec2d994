//! CniServer: the actor behind kubelet's CNI calls.
//!
//! Purpose: the shim `fairway-cni` hands each call over a Unix socket; here it
//! becomes a conversation with the pool and the wirer, and its outcome a CNI
//! result or error. ADD asks nothing of the Kubernetes API: what a pod wishes
//! comes from the runtime, else from ClusterWatch's cache.
//!
//! Where to start: [`conversation`] has ADD, DEL, CHECK, GC and STATUS.
//! - [`wire`]: the envelope, shared with the shim; [`spool`]: releases left by it
//! - [`spec`], [`result`], [`wishes`]: what CNI says, pure
//! - [`server`]: the socket; [`intake`]: takes up the spool; [`turns`]: one
//!   conversation at a time per attachment
//!
//! After a restart nothing is remembered: conversations in flight have failed
//! with "try again later", and the ledger makes the repeated ADD get the same
//! address.

pub mod conversation;
mod errors;
mod intake;
pub mod result;
mod server;
pub mod spec;
pub mod spool;
pub mod stats;
mod turns;
pub mod wire;
pub mod wishes;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::actor::{Actor, Ctx, Handles, Message, Port, Responder, StartError};
use crate::cluster::{Facts, RecordEvent};
use crate::model::AttachMode;
use crate::netns::{Unwire, Verify, Wire};
use crate::policy::Enforce;
use crate::pool::{Allocate, BeginRelease, Confirm, FinishRelease, Leases, Lookup};
use conversation::Desk;
use intake::SpoolWorker;
use server::Bound;
use stats::{CniSnapshot, Stats};

/// The `cni` section of the agent's configuration. The conflist names the same
/// socket and spool when they are not the default ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "snake_case")]
pub struct Config {
    pub socket: PathBuf,
    pub spool_dir: PathBuf,
    /// Conversations at a time; one more is told to try again.
    pub max_conversations: usize,
    /// For pods that do not say, on nodes that do not say.
    pub default_mode: AttachMode,
    /// How long a StatefulSet pod's address is kept for it; 0 for not at all.
    pub stateful_reserve_seconds: u64,
    /// Users that may use the socket.
    pub peer_uids: Vec<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: wire::DEFAULT_SOCKET.into(),
            spool_dir: wire::DEFAULT_SPOOL.into(),
            max_conversations: 256,
            default_mode: AttachMode::Veth,
            stateful_reserve_seconds: 300,
            peer_uids: vec![0],
        }
    }
}

impl Config {
    pub fn stateful_reserve(&self) -> Option<Duration> {
        Some(Duration::from_secs(self.stateful_reserve_seconds)).filter(|d| !d.is_zero())
    }
}

/// Whom a conversation asks.
#[derive(Clone, Debug)]
pub struct Ports {
    pub allocate: Port<Allocate>,
    pub confirm: Port<Confirm>,
    pub begin_release: Port<BeginRelease>,
    pub finish_release: Port<FinishRelease>,
    pub lookup: Port<Lookup>,
    pub leases: Port<Leases>,
    pub wire: Port<Wire>,
    pub unwire: Port<Unwire>,
    pub verify: Port<Verify>,
    /// None where policies are not enforced.
    pub enforce: Option<Port<Enforce>>,
    pub record_event: Port<RecordEvent>,
}

/// How the socket fares: open conversations, counts, the last ones.
#[derive(Clone, Debug)]
pub struct CniStatus {}
impl Message for CniStatus {
    const NAME: &'static str = "CniStatus";
    type Reply = CniSnapshot;
    type Error = std::convert::Infallible;
}

pub struct CniServer {
    desk: Arc<Desk>,
    stats: Arc<Stats>,
    bound: Option<Bound>,
}

impl CniServer {
    /// Bind the socket and open the spool. Calls are answered from `started` on.
    pub async fn open(config: Config, ports: Ports, facts: Facts) -> Result<Self, StartError> {
        let spool = SpoolWorker::start(config.spool_dir.clone()).await?;
        let bound = Bound::bind(&config.socket)
            .map_err(|e| StartError::new(format!("CNI socket {}: {e}", config.socket.display())))?;
        let (ready, _) = watch::channel(false);
        let desk = Desk { config, ports, facts, spool, turns: turns::Turns::default(), ready };
        Ok(Self { desk: Arc::new(desk), stats: Arc::default(), bound: Some(bound) })
    }
}

impl Actor for CniServer {
    const NAME: &'static str = "CniServer";

    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        let bound = self.bound.take().ok_or_else(|| StartError::new("started twice"))?;
        ctx.spawn(server::serve(bound, self.desk.clone(), self.stats.clone()), |_, error, ctx| {
            ctx.fail(format!("CNI socket: {error}"));
        });
        ctx.spawn(intake::take_up(self.desk.clone()), |_, error, ctx| {
            ctx.fail(format!("CNI spool: {error}"));
        });
        Ok(())
    }
}

impl Handles<CniStatus> for CniServer {
    fn handle(&mut self, _: CniStatus, to: Responder<CniStatus>, _: &mut Ctx<'_, Self>) {
        to.ok(self.stats.snapshot(*self.desk.ready.borrow()));
    }
}
