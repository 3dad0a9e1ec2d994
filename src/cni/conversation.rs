//! ADD, DEL, CHECK, GC and STATUS: each one a function that reads as what it
//! does.
//!
//! Owner: CniServer; each runs as a task of its own. Invariants: for one
//! attachment they run one after the other; an ADD that fails leaves nothing
//! behind, or leaves its release in the spool; a release that was spooled is
//! done before the same attachment is added again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tracing::Instrument as _;

use super::errors::{Unreleased, cni, differs};
use super::result::CniResult;
use super::spec::Call;
use super::spool::Entry;
use super::turns::{Turn, Turns};
use super::wire::{CniError, Command, code};
use super::wishes::{self, Known, Wishes};
use super::{Config, Ports, SpoolWorker};

use crate::actor::{AskError, Deadline};
use crate::cluster::{About, Facts, PodInfo, RecordEvent};
use crate::model::{AttachmentId, Lease, PodKey, Traffic};
use crate::netns::{Unwire, Verify, Wire};
use crate::policy::Enforce;
use crate::pool::{Allocate, BeginRelease, Confirm, FinishRelease, Leases, Lookup, PoolError};

/// What is kept of the caller's time for undoing a failed ADD.
const UNDO_RESERVE: Duration = Duration::from_secs(5);
/// A pod's sandbox may be made before our watch has shown the pod.
const CACHE_WAIT: Duration = Duration::from_millis(100);
const EVENT_PATIENCE: Duration = Duration::from_secs(2);
/// STATUS is answered fast or not at all.
const STATUS_PATIENCE: Duration = Duration::from_secs(3);

/// What every conversation needs; shared by all of them.
pub struct Desk {
    pub config: Config,
    pub ports: Ports,
    pub facts: Facts,
    pub spool: SpoolWorker,
    pub turns: Turns,
    /// The releases found at start have been taken up.
    pub ready: tokio::sync::watch::Sender<bool>,
}

type Answer = Result<Option<Value>, CniError>;

impl Desk {
    pub async fn answer(&self, call: Call, deadline: Deadline) -> Answer {
        match (call.command, call.attachment.clone()) {
            (Command::Add, Some(id)) => self.add(call, id, deadline).await.map(Some),
            (Command::Del, Some(id)) => self.del(id, deadline).await.map(|()| None),
            (Command::Check, Some(id)) => self.check(call, id, deadline).await.map(|()| None),
            (Command::Gc, _) => self.gc(call, deadline).await.map(|()| None),
            (Command::Status, _) => self.status(deadline).await.map(|()| None),
            // The shim answers VERSION, and `Call::parse` wants the rest's attachment.
            (other, _) => Err(CniError::new(code::DECODE, format!("{} is not for the agent", other.name()))),
        }
    }

    async fn add(&self, call: Call, id: AttachmentId, deadline: Deadline) -> Result<Value, CniError> {
        let began = Instant::now();
        let steps = deadline.leaving(UNDO_RESERVE.min(deadline.remaining() / 4));
        let _turn = self.turn(&id, steps).await?;
        let named = call.pod.key();
        let known = match &named {
            Some(pod) => self.pod_info(pod, call.pod.uid.as_deref()).await,
            // A sandbox that is no pod's: the watch will never show it.
            None => None,
        };
        let pod = named.unwrap_or_else(|| PodKey::new("", id.sandbox.as_str()));
        let about =
            About::Pod { key: pod.clone(), uid: call.pod.uid.clone().or(known.as_ref().map(|k| k.uid.clone())) };
        let wired = match self.wishes(&call, known.as_deref()) {
            Err(e) => Err(e),
            Ok(wishes) => self.lease_and_wire(&call, &id, pod, known.as_deref(), wishes, steps, deadline).await,
        };
        match wired {
            Ok((lease, result)) => {
                let note = format!("{} in {} ms", addresses(&lease), began.elapsed().as_millis());
                // Kubelet does not wait for the log.
                let (said, mode) = (note.clone(), lease.mode);
                let log = async move { tracing::info!(note = said, %mode, "Pod has its address") };
                tokio::spawn(log.in_current_span());
                self.tell(about, false, "AddressAssigned", "Add", note);
                Ok(result.write(call.version))
            }
            Err(e) => {
                self.tell(about, true, "AddressFailed", "Add", e.to_string());
                Err(e)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what one ADD is about")]
    async fn lease_and_wire(
        &self,
        call: &Call,
        id: &AttachmentId,
        pod: PodKey,
        known: Option<&PodInfo>,
        wishes: Wishes,
        steps: Deadline,
        deadline: Deadline,
    ) -> Result<(Lease, CniResult), CniError> {
        let request = Allocate {
            attachment: id.clone(),
            pod,
            pod_uid: call.pod.uid.clone(),
            mode: wishes.mode,
            netns: call.netns.clone(),
            bandwidth: wishes.bandwidth,
            traffic: Traffic { host_ports: call.config.host_ports, per_packet: wishes.per_packet },
            reserve: wishes.reserve,
        };
        let done = async {
            let lease = self.allocate(id, request, steps).await?;
            let wire = Wire { lease: lease.clone() };
            let wired =
                self.ports.wire.ask(wire, steps).await.map_err(|e| cni("the pod's network cannot be set up", e))?;
            let result = CniResult::of(&lease, &wired);
            let result = match call.config.previous.clone() {
                Some(previous) => result.after(previous)?,
                None => result,
            };
            let confirm = Confirm { attachment: id.clone() };
            let confirmed = self.ports.confirm.ask(confirm, steps);
            let (confirmed, enforced) = futures::join!(confirmed, self.enforce(&lease, known, steps));
            enforced?;
            confirmed.map_err(|e| cni("the address cannot be recorded as in use", e))?;
            Ok((lease, result))
        };
        match done.await {
            Ok(out) => Ok(out),
            Err(e) => {
                self.undo(call, id, deadline).await;
                Err(e)
            }
        }
    }

    /// Before anything in the pod runs, its policies are in force.
    async fn enforce(&self, lease: &Lease, known: Option<&PodInfo>, deadline: Deadline) -> Result<(), CniError> {
        let Some(port) = &self.ports.enforce else { return Ok(()) };
        // A sandbox that is no pod's is in no policy.
        if lease.pod.namespace.is_empty() {
            return Ok(());
        }
        // A static pod has another uid in the API, by which it is known there.
        let uid = known.map(|pod| pod.uid.clone()).or_else(|| lease.pod_uid.clone());
        let ask = Enforce { attachment: lease.attachment.clone(), pod: lease.pod.clone(), uid };
        let enforced =
            port.ask(ask, deadline).await.map_err(|e| cni("the pod's policies cannot be put in force", e))?;
        if let Some(why) = enforced.closed {
            tracing::warn!(pod = %lease.pod, why, "The pod is closed until its policies are known");
            let about = About::Pod { key: lease.pod.clone(), uid: lease.pod_uid.clone() };
            let note = format!("nothing passes to or from the pod until its policies are known: {why}");
            self.tell(about, true, "PolicyPending", "EnforcePolicy", note);
        }
        Ok(())
    }

    /// What was to be released of this attachment is, before it is leased anew.
    async fn allocate(&self, id: &AttachmentId, request: Allocate, deadline: Deadline) -> Result<Lease, CniError> {
        // A release in the spool is rare, and would be of the lease that is
        // answered here: looking for one need not come first.
        let asked = self.ports.allocate.ask(request.clone(), deadline);
        let (spooled, mut allocated) = futures::join!(self.spool.holds(id), asked);
        let spooled = spooled.map_err(spool_fault)?;
        if spooled || matches!(allocated, Err(AskError::Domain(PoolError::BeingReleased(_)))) {
            self.release(id, deadline).await?;
            if spooled {
                self.spool.remove(id).await.map_err(spool_fault)?;
            }
            allocated = self.ports.allocate.ask(request, deadline).await;
        }
        allocated.map_err(|e| cni("no address for the pod", e))
    }

    /// Also after an `Allocate` whose answer did not come: it may have worked.
    async fn undo(&self, call: &Call, id: &AttachmentId, deadline: Deadline) {
        let Err(e) = self.release(id, deadline).await else { return };
        tracing::warn!(error = %e, "A failed ADD cannot be undone now; its release is spooled");
        let entry = Entry {
            wire: super::wire::WIRE_VERSION,
            container_id: id.sandbox.0.clone(),
            ifname: id.ifname.clone(),
            netns: call.netns.to_string_lossy().into_owned(),
            args: String::new(),
        };
        if let Err(e) = self.spool.store(entry).await {
            tracing::error!(error = %e, "The release cannot be spooled either; the runtime's DEL or GC will do it");
        }
    }

    async fn del(&self, id: AttachmentId, deadline: Deadline) -> Result<(), CniError> {
        let turn = self.turn(&id, deadline).await?;
        self.release(&id, deadline).await?;
        // Kubelet does not wait for this, but the attachment's next call does.
        let spool = self.spool.clone();
        tokio::spawn(async move {
            forget_spooled(&spool, &id).await;
            drop(turn);
        });
        Ok(())
    }

    /// Give an attachment's address back. What is gone already is success; any
    /// failure is to be repeated.
    pub async fn release(&self, id: &AttachmentId, deadline: Deadline) -> Result<(), Unreleased> {
        let ports = &self.ports;
        let begun = ports.begin_release.ask(BeginRelease { attachment: id.clone() }, deadline).await;
        let Some(lease) = begun.map_err(|e| Unreleased::because("the address cannot be released", e))? else {
            tracing::debug!(attachment = %id, "Nothing to release");
            return Ok(());
        };
        let unwired = ports.unwire.ask(Unwire { lease: lease.clone() }, deadline).await;
        unwired.map_err(|e| Unreleased::because("the pod's network cannot be taken down", e))?;
        let finished = ports.finish_release.ask(FinishRelease { attachment: id.clone() }, deadline).await;
        finished.map_err(|e| Unreleased::because("the address cannot be released", e))?;
        let note = addresses(&lease);
        tracing::info!(%note, pod = %lease.pod, "Address released");
        let about = About::Pod { key: lease.pod, uid: lease.pod_uid };
        self.tell(about, false, "AddressReleased", "Delete", format!("{note} is free again"));
        Ok(())
    }

    async fn check(&self, call: Call, id: AttachmentId, deadline: Deadline) -> Result<(), CniError> {
        let Some(previous) = call.config.previous else {
            let msg = "invalid network configuration: CHECK without prevResult";
            return Err(CniError::new(code::INVALID_CONFIG, msg).remedy("the runtime passes the result of ADD"));
        };
        let _turn = self.turn(&id, deadline).await?;
        let found = self.ports.lookup.ask(Lookup { attachment: id.clone() }, deadline).await;
        let Some(lease) = found.map_err(|e| cni("the lease cannot be looked up", e))? else {
            let msg = format!("container {} holds no address on this node", id.sandbox);
            return Err(CniError::new(code::UNKNOWN_CONTAINER, msg).remedy("it was never added, or is already deleted"));
        };
        if let Some(why) = disagreement(&previous, &lease) {
            let msg = format!("prevResult and the lease disagree: {why}");
            return Err(CniError::new(code::CHECK_FAILED, msg).remedy("delete the pod, it will be made anew"));
        }
        let verified = self.ports.verify.ask(Verify { lease }, deadline).await;
        let findings = verified.map_err(|e| cni("the pod's network cannot be read", e))?;
        if findings.is_empty() { Ok(()) } else { Err(differs(&findings)) }
    }

    /// Release what the runtime does not know. All are tried; the first error
    /// and the number of errors are reported.
    async fn gc(&self, call: Call, deadline: Deadline) -> Result<(), CniError> {
        let valid = call.config.valid.unwrap_or_default();
        let leases = self.ports.leases.ask(Leases {}, deadline).await;
        let leases = leases.map_err(|e| cni("the leases cannot be listed", e))?;
        let mut failed = Vec::new();
        let mut released = 0usize;
        // A made-up name is in no list of the runtime's, and its pod may run.
        let stale = |l: &Lease| !valid.contains(&l.attachment) && !crate::pool::state::made_up(&l.attachment);
        for lease in leases.into_iter().filter(stale) {
            // One that is being added now was not made when the list was.
            let Some(_turn) = self.turns.take_if_free(&lease.attachment) else { continue };
            match self.release(&lease.attachment, deadline).await {
                Ok(()) => released += 1,
                Err(e) => failed.push(format!("{}: {e}", lease.attachment)),
            }
        }
        tracing::info!(released, failed = failed.len(), "Stale attachments collected");
        match failed.first() {
            None => Ok(()),
            Some(first) => {
                let msg = format!("{} stale attachments cannot be released now, {released} were", failed.len());
                Err(CniError::new(code::TRY_AGAIN, msg).remedy(first.clone()))
            }
        }
    }

    /// Ready to serve ADD: what was left behind has been taken up, and the
    /// pool knows its addresses.
    async fn status(&self, deadline: Deadline) -> Result<(), CniError> {
        let not_yet = |why: String| CniError::new(code::NOT_AVAILABLE, "the fairway agent is not ready").remedy(why);
        if !*self.ready.borrow() {
            return Err(not_yet("it is taking up releases that came while it was away; wait".into()));
        }
        let asked = self.ports.leases.ask(Leases {}, deadline.within(STATUS_PATIENCE)).await;
        asked.map(drop).map_err(|e| not_yet(e.to_string()))
    }

    async fn turn(&self, id: &AttachmentId, deadline: Deadline) -> Result<Turn, CniError> {
        self.turns.take(id, deadline).await.ok_or_else(|| {
            let msg = format!("another call for {id} is still at work, try again later");
            CniError::new(code::TRY_AGAIN, msg).remedy("its own deadline ends it")
        })
    }

    /// A spooled DEL is older than the ADD at hand. The caller has the turn.
    pub async fn finish_spooled(&self, id: &AttachmentId, deadline: Deadline) -> Result<(), Unreleased> {
        let fault = |e| Unreleased { error: spool_fault(e), actor_away: false };
        if !self.spool.holds(id).await.map_err(fault)? {
            return Ok(());
        }
        self.release(id, deadline).await?;
        self.spool.remove(id).await.map_err(fault)
    }

    /// What the watch cache knows; waits a moment for a pod that is new.
    async fn pod_info(&self, pod: &PodKey, uid: Option<&str>) -> Option<Arc<PodInfo>> {
        let mut pods = self.facts.pods.clone();
        let current = |known: &PodInfo| {
            // The API's UID of a static pod is its mirror's, not kubelet's.
            uid.is_none_or(|uid| known.uid == uid) || known.annotations.contains_key(MIRROR)
        };
        let found = |pod_map: &crate::cluster::NodePods| match pod_map {
            None => Some(None),
            Some(map) => map.get(pod).filter(|p| current(p)).map(|p| Some(p.clone())),
        };
        let settled = pods.wait_for(|map| found(map).is_some());
        let settled = tokio::time::timeout(CACHE_WAIT, settled).await;
        settled.ok()?.ok().and_then(|map| found(&map).flatten())
    }

    fn wishes(&self, call: &Call, pod: Option<&PodInfo>) -> Result<Wishes, CniError> {
        let node = self.facts.node.borrow().clone();
        wishes::decide(&Known {
            runtime_bandwidth: call.config.bandwidth.as_ref(),
            annotations: call.config.annotations.as_ref().or(pod.map(|p| &p.annotations)),
            node_labels: node.as_ref().map(|n| &n.labels),
            stateful: pod.is_some_and(|p| p.owned_by("StatefulSet")),
            default_mode: self.config.default_mode,
            stateful_reserve: self.config.stateful_reserve(),
        })
    }

    /// Kubelet does not wait for Events.
    pub fn tell(&self, about: About, warning: bool, reason: &str, action: &str, note: String) {
        // A sandbox that is no pod's has nothing that an Event could be about.
        if matches!(&about, About::Pod { key, .. } if key.namespace.is_empty()) {
            return;
        }
        let event = RecordEvent { about, warning, reason: reason.into(), action: action.into(), note };
        let asked = self.ports.record_event.clone();
        tokio::spawn(async move {
            if let Err(error) = asked.ask(event, Deadline::after(EVENT_PATIENCE)).await {
                tracing::debug!(%error, "No Event for this");
            }
        });
    }
}

const MIRROR: &str = "kubernetes.io/config.mirror";

async fn forget_spooled(spool: &SpoolWorker, id: &AttachmentId) {
    if let Err(error) = spool.remove(id).await {
        // Taken up again it finds nothing to release.
        tracing::warn!(%error, "A spooled release stays behind");
    }
}

fn spool_fault(e: std::io::Error) -> CniError {
    let msg = "releases left in the spool cannot be read";
    CniError::new(code::IO, msg).remedy(format!("{e}; free or repair the disk below the agent's state folder"))
}

/// `address 10.0.0.5 from ENI eni-1`, both families.
fn addresses(lease: &Lease) -> String {
    let v6 = lease.v6.map(|a| format!(" and {a}")).unwrap_or_default();
    format!("address {}{v6} from ENI {}", lease.v4, lease.eni.id)
}

/// Later plugins may add to the result, but not take ours away.
fn disagreement(previous: &CniResult, lease: &Lease) -> Option<String> {
    let name = &lease.attachment.ifname;
    let link = previous.interfaces.iter().position(|i| i.name == *name && !i.sandbox.is_empty());
    let Some(link) = link else {
        return Some(format!("interface {name} is not in prevResult"));
    };
    let held = [Some(lease.v4.into()), lease.v6.map(std::net::IpAddr::from)];
    let missing = held.into_iter().flatten().find(|address: &std::net::IpAddr| {
        !previous.ips.iter().any(|ip| ip.address.addr() == *address && ip.interface.is_none_or(|i| i == link))
    });
    missing.map(|address| format!("the lease's address {address} is not in prevResult"))
}
