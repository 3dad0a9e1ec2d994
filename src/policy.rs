//! PolicyCompiler: NetworkPolicies, compiled for this node.
//!
//! Purpose: keeps the kernel's tables of policies saying what the cluster's
//! NetworkPolicies say of this node's pods; puts a new pod under its policies before
//! its ADD is answered; explains verdicts. The tables are pinned: while the agent is
//! away the kernel goes on judging by what it has, and a new run changes nothing
//! before it knows the cluster whole.
//!
//! How it turns: ClusterWatch writes what it sees into the [`index`]. One look at a
//! time, the worker takes what has changed, compiles it and writes the difference.
//!
//! - data: [`model`], [`convert`] (from the API), [`index`], [`tables`], [`maps`]
//! - deciding, pure: [`compile`], from [`peers`] (who rules speak of) and
//!   [`profile`] (what rules open); [`explain`]
//! - doing: [`desk`], [`memory`] (for a start without the API server); told: [`status`], [`figures`]

pub mod compile;
pub mod convert;
pub mod desk;
pub mod explain;
pub mod figures;
pub mod index;
pub mod maps;
pub mod memory;
pub mod model;
pub mod peers;
pub mod profile;
pub mod status;
pub mod tables;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::actor::{Actor, Ctx, Deadline, Handles, Message, Port, Responder, StartError, Worker, WorkerGone};
use crate::cluster::{About, RecordEvent};
use crate::model::{AttachmentId, PodKey};
use crate::pool::Leases;
use desk::{Desk, Standing};
use explain::{Judged, Question};
use index::{Index, Kind, Refusal};
use maps::PolicyMaps;
use memory::Memory;
use model::Name;
use status::PolicySnapshot;

pub use desk::Settled;

/// How long a new pod's ADD waits for the watch to show the pod.
const PATIENCE: Duration = Duration::from_secs(2);
/// What could not be written is tried again, and devices that are gone are
/// forgotten, this often.
const RETRY: Duration = Duration::from_secs(10);
/// Between two tries to learn which pods were here before.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Refusals told one by one; more at a time are only logged as a number.
const TOLD_AT_ONCE: usize = 20;

/// The `policies` section of the agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Enforce NetworkPolicies.
    pub enabled: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { enabled: true }
    }
}

/// Put a pod under its policies; answered when they are in force.
#[derive(Clone, Debug)]
pub struct Enforce {
    pub attachment: AttachmentId,
    pub pod: PodKey,
    /// Of the pod, not of an earlier one of its name; none when it is not known.
    pub uid: Option<String>,
}
impl Message for Enforce {
    const NAME: &'static str = "Enforce";
    type Reply = Enforcement;
    type Error = PolicyError;
}

/// What is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Enforcement {
    pub ingress: bool,
    pub egress: bool,
    /// Why the pod is closed until more is known.
    pub closed: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("the attachment {0} has no programs that could enforce its policies")]
    NotAttached(AttachmentId),
    #[error("policies cannot be put in force: {0}")]
    Refused(String),
    #[error("the cluster has no pod {0} with an address of its own")]
    NoSuchPod(Name),
    #[error("the policies of the cluster are not known yet: waiting for {0}")]
    NotYet(String),
}

/// Why a connection is let through or not.
#[derive(Clone, Debug)]
pub struct Judge {
    pub question: Question,
}
impl Message for Judge {
    const NAME: &'static str = "Judge";
    type Reply = Vec<Judged>;
    type Error = PolicyError;
}

/// What is in force, how often, and what is wrong.
#[derive(Clone, Debug)]
pub struct PolicyStatus {}
impl Message for PolicyStatus {
    const NAME: &'static str = "PolicyStatus";
    type Reply = PolicySnapshot;
    type Error = PolicyError;
}

/// Opens the tables, on the worker's thread, for each embodiment anew.
pub type OpenMaps = Arc<dyn Fn() -> Result<Box<dyn PolicyMaps>, String> + Send + Sync>;

/// Everything the actor is built from, afresh after each failure.
#[derive(Clone)]
pub struct Deps {
    pub index: Index,
    /// Which pods were here before.
    pub leases: Port<Leases>,
    /// What is the same on every node is told by one of them.
    pub leader: watch::Receiver<bool>,
    pub record_event: Port<RecordEvent>,
    pub maps: OpenMaps,
    /// Where it is remembered which namespaces have policies.
    pub memory: Option<PathBuf>,
    /// For metrics and readiness; the newest counts.
    pub snapshots: watch::Sender<Arc<PolicySnapshot>>,
}

struct Waiting {
    ask: Enforce,
    to: Responder<Enforce>,
    number: u64,
}

pub struct PolicyCompiler {
    deps: Deps,
    worker: Worker<Desk>,
    /// The pods that were here before are known.
    adopted: bool,
    busy: bool,
    again: bool,
    /// Pods that the watch has not shown yet.
    waiting: Vec<Waiting>,
    next: u64,
    settled: Option<Settled>,
    settled_at: Option<Instant>,
    error: Option<String>,
    told: BTreeSet<(Name, Refusal)>,
}

impl PolicyCompiler {
    pub async fn open(deps: Deps) -> Result<Self, StartError> {
        let (open, index, memory) = (deps.maps.clone(), deps.index.clone(), deps.memory.clone());
        let worker =
            Worker::start("policies", 256, move || open().map(|maps| Desk::open(maps, index, Memory::open(memory))));
        let worker = worker.await.map_err(StartError::new)?;
        Ok(Self {
            deps,
            worker,
            adopted: false,
            busy: false,
            again: false,
            waiting: Vec::new(),
            next: 0,
            settled: None,
            settled_at: None,
            error: None,
            told: BTreeSet::new(),
        })
    }

    /// Which pods were here before: until that is known nothing is changed.
    fn adopt(&mut self, ctx: &mut Ctx<'_, Self>) {
        let leases = self.deps.leases.clone();
        let ask = async move {
            loop {
                match leases.ask(Leases {}, Deadline::after(RETRY)).await {
                    Ok(leases) => return leases,
                    Err(error) => tracing::debug!(%error, "The pods of this node are not known yet"),
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
        };
        ctx.spawn(ask, |actor, leases, ctx| {
            let pods = leases.into_iter().map(|lease| (lease.attachment, name(&lease.pod))).collect::<Vec<_>>();
            let work = actor.worker.call(move |desk| desk.adopt(&pods));
            ctx.spawn(work, |actor, adopted, ctx| match adopted {
                Ok(Ok(())) => {
                    actor.adopted = true;
                    actor.turn(ctx);
                }
                Ok(Err(why)) => ctx.fail(why),
                Err(gone) => ctx.fail(gone.to_string()),
            });
        });
    }

    /// Look at what has changed, unless a look is in work (its end looks again).
    fn turn(&mut self, ctx: &mut Ctx<'_, Self>) {
        if std::mem::replace(&mut self.busy, true) {
            self.again = true;
            return;
        }
        if !self.adopted {
            self.busy = false;
            return;
        }
        let work = self.worker.call(Desk::settle);
        ctx.spawn(work, |actor, outcome, ctx| {
            actor.busy = false;
            match outcome {
                Ok(settled) => actor.took_effect(settled, ctx),
                Err(WorkerGone::Full) => actor.again = true,
                Err(gone) => return ctx.fail(gone.to_string()),
            }
            actor.retry_waiting(ctx);
            if std::mem::take(&mut actor.again) {
                actor.turn(ctx);
            }
        });
    }

    fn took_effect(&mut self, settled: Result<Option<Settled>, String>, ctx: &mut Ctx<'_, Self>) {
        match settled {
            Ok(None) => {}
            Ok(Some(settled)) => {
                if self.settled_at.is_none() {
                    let Settled { policies, writes, took_us, isolated, .. } = settled;
                    tracing::info!(policies, isolated, writes, took_us, "Policies are enforced");
                }
                if self.error.take().is_some() {
                    tracing::info!("Policies can be written again");
                }
                self.settled_at = Some(Instant::now());
                self.settled = Some(settled);
            }
            Err(why) => {
                if self.error.as_ref() != Some(&why) {
                    tracing::error!(error = %why, "Policies cannot be written; what was in force stays so");
                    let note = format!("{why}; what was in force before stays so, and it is tried again");
                    self.record(About::Node, "PolicyNotInstalled", note, ctx);
                }
                self.error = Some(why);
            }
        }
        self.tell_refusals(ctx);
        self.publish(Vec::new());
    }

    fn publish(&self, hits: Vec<(String, u64)>) {
        self.deps.snapshots.send_replace(Arc::new(self.snapshot(hits)));
    }

    fn snapshot(&self, hits: Vec<(String, u64)>) -> PolicySnapshot {
        let ago = self.settled_at.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        PolicySnapshot {
            awaited: self.awaited(),
            known: self.deps.index.known(),
            settled: self.settled.clone().unwrap_or_default(),
            settled_ms_ago: ago,
            waiting: self.waiting.len(),
            error: self.error.clone(),
            refusals: self.deps.index.refusals().iter().map(|(name, r)| format!("{name}: {}", r.why)).collect(),
            hits,
        }
    }

    /// What is still awaited before anything can be written.
    fn awaited(&self) -> Option<String> {
        if self.settled_at.is_some() {
            return None;
        }
        let missing = self.deps.index.missing();
        Some(match () {
            () if !self.adopted => "the pods of this node".to_owned(),
            () => match missing.first() {
                Some(kind) => format!("the first full list of {}", kind.words()),
                None => "the first writing of the tables".to_owned(),
            },
        })
    }

    fn enforce(&mut self, waiting: Waiting, now: bool, ctx: &mut Ctx<'_, Self>) {
        let Enforce { attachment, pod, uid } = waiting.ask.clone();
        let work = self.worker.call(move |desk| {
            let (pod, uid) = (name(&pod), uid.map(|uid| convert::uid(&uid)));
            if now { desk.enforce_now(&attachment, &pod) } else { desk.try_enforce(&attachment, &pod, uid) }
        });
        ctx.spawn(work, move |actor, outcome, ctx| match outcome {
            Ok(Ok(Standing::Unknown)) => {
                actor.waiting.push(waiting);
            }
            Ok(Ok(Standing::Missing)) => {
                let attachment = waiting.ask.attachment.clone();
                waiting.to.fail(PolicyError::NotAttached(attachment));
            }
            Ok(Ok(Standing::Enforced(how))) => {
                let closed = [how.ingress, how.egress].contains(&Some(tables::CLOSED));
                let why = || match actor.awaited() {
                    Some(what) => format!("waiting for {what}"),
                    None => "the watch has not shown the pod yet, and policies of its namespace may be meant for it"
                        .to_owned(),
                };
                let closed = closed.then(why);
                waiting.to.ok(Enforcement { ingress: how.ingress.is_some(), egress: how.egress.is_some(), closed });
            }
            Ok(Err(why)) => waiting.to.fail(PolicyError::Refused(why)),
            Err(WorkerGone::Full) => waiting.to.fail(PolicyError::Refused("the worker is busy; try again".to_owned())),
            Err(gone) => ctx.fail(gone.to_string()),
        });
    }

    fn retry_waiting(&mut self, ctx: &mut Ctx<'_, Self>) {
        for waiting in std::mem::take(&mut self.waiting) {
            self.enforce(waiting, false, ctx);
        }
    }

    /// Say which policies cannot be, once each.
    fn tell_refusals(&mut self, ctx: &mut Ctx<'_, Self>) {
        let now: BTreeSet<(Name, Refusal)> = self.deps.index.refusals().into_iter().collect();
        let new: Vec<(Name, Refusal)> = now.difference(&self.told).cloned().collect();
        let leads = *self.deps.leader.borrow();
        for (name, refusal) in new.iter().take(TOLD_AT_ONCE) {
            tracing::warn!(%name, kind = refusal.kind.words(), why = refusal.why, "An object that cannot be; what was known of it stands");
            if leads && refusal.kind == Kind::Policies {
                let about = About::NetworkPolicy { name: name.clone(), uid: refusal.uid.clone() };
                self.record(about, "InvalidPolicy", format!("{}; what was in force before stays so", refusal.why), ctx);
            }
        }
        if let Some(more) = new.len().checked_sub(TOLD_AT_ONCE).filter(|n| *n > 0) {
            tracing::warn!(more, "More objects that cannot be");
        }
        self.told = now;
    }

    fn record(&self, about: About, reason: &str, note: String, ctx: &mut Ctx<'_, Self>) {
        let port = self.deps.record_event.clone();
        let event =
            RecordEvent { about, warning: true, reason: reason.to_owned(), action: "EnforcePolicy".to_owned(), note };
        let work = async move { port.ask(event, Deadline::after(Duration::from_secs(5))).await };
        ctx.spawn(work, |_, told, _| {
            if let Err(error) = told {
                tracing::debug!(%error, "An Event was not recorded");
            }
        });
    }
}

fn name(pod: &PodKey) -> Name {
    Name::new(pod.namespace.as_str(), pod.name.as_str())
}

impl Actor for PolicyCompiler {
    const NAME: &'static str = "PolicyCompiler";
    const CAPACITY: usize = 512;

    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        self.adopt(ctx);
        ctx.on_change(self.deps.index.changed(), |actor: &mut Self, _, ctx| actor.turn(ctx));
        ctx.every(RETRY, |actor, ctx| {
            if actor.settled_at.is_none() {
                return;
            }
            let work = actor.worker.call(Desk::sweep);
            ctx.spawn(work, |actor, outcome, ctx| match outcome {
                Ok(settled) => actor.took_effect(settled, ctx),
                Err(WorkerGone::Full) => {}
                Err(gone) => ctx.fail(gone.to_string()),
            });
        });
        Ok(())
    }
}

impl Handles<Enforce> for PolicyCompiler {
    fn handle(&mut self, ask: Enforce, to: Responder<Enforce>, ctx: &mut Ctx<'_, Self>) {
        self.next += 1;
        let number = self.next;
        self.enforce(Waiting { ask, to, number }, false, ctx);
        ctx.after(PATIENCE, move |actor, ctx| {
            if let Some(at) = actor.waiting.iter().position(|w| w.number == number) {
                let waiting = actor.waiting.swap_remove(at);
                actor.enforce(waiting, true, ctx);
            }
        });
    }
}

impl Handles<Judge> for PolicyCompiler {
    fn handle(&mut self, ask: Judge, to: Responder<Judge>, ctx: &mut Ctx<'_, Self>) {
        if let Some(what) = self.awaited() {
            return to.fail(PolicyError::NotYet(what));
        }
        let work = self.worker.call(move |desk| desk.judge(&ask.question));
        ctx.spawn(work, |_, judged, ctx| match judged {
            Ok(Ok(judged)) => to.ok(judged),
            Ok(Err(pod)) => to.fail(PolicyError::NoSuchPod(pod)),
            Err(WorkerGone::Full) => to.fail(PolicyError::Refused("the worker is busy; try again".to_owned())),
            Err(gone) => ctx.fail(gone.to_string()),
        });
    }
}

impl Handles<PolicyStatus> for PolicyCompiler {
    fn handle(&mut self, _: PolicyStatus, to: Responder<PolicyStatus>, ctx: &mut Ctx<'_, Self>) {
        let work = self.worker.call(Desk::hits);
        ctx.spawn(work, |actor, hits, ctx| match hits {
            Ok(Ok(hits)) => {
                let hits = hits.into_iter().map(|(rule, count)| (rule.to_string(), count)).collect::<Vec<_>>();
                actor.publish(hits.clone());
                to.ok(actor.snapshot(hits));
            }
            Ok(Err(why)) => to.fail(PolicyError::Refused(why)),
            Err(WorkerGone::Full) => to.fail(PolicyError::Refused("the worker is busy; try again".to_owned())),
            Err(gone) => ctx.fail(gone.to_string()),
        });
    }
}
