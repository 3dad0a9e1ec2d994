//! What the plan is asked to serve, and what it knows beside the ledger. All of
//! it is gathered afresh after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cloud::VSwitch;
use crate::model::{AttachMode, AttachmentId, PodKey, VSwitchId};

use super::Allocate;
use super::state::State;
use super::step::Step;

/// A pod bound to this node that needs an address (not one on the host's
/// network).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundPod {
    pub pod: PodKey,
    pub uid: String,
    /// What the pod or node asks for.
    pub mode: AttachMode,
    /// It has ended: its sandbox needs no address any more.
    pub terminated: bool,
    /// As its status shows them.
    pub addresses: Vec<IpAddr>,
}

/// A fact published by ClusterWatch: all pods bound to this node, or `None`
/// while that is unknown (no list yet, or the API server is away).
pub type BoundPods = Option<Arc<Vec<BoundPod>>>;

#[derive(Clone, Debug, Default)]
pub struct Demand {
    /// Requests without an address yet, oldest first.
    pub waiting: Vec<Allocate>,
    pub bound: BoundPods,
    /// As last read; `available` counts down as the plan takes from it.
    pub vswitches: BTreeMap<VSwitchId, VSwitch>,
    /// The node's own vSwitch, used when the configuration names none.
    pub own_vswitch: Option<VSwitchId>,
    /// Attachments whose sandbox or pod has been gone long enough.
    pub gone: BTreeSet<AttachmentId>,
    /// For the policies that choose at random.
    pub random: u64,
}

impl Demand {
    /// Bound pods that will ask for an address in this mode: alive, not among
    /// those waiting, without a lease, without a reserved address.
    pub fn expected(&self, state: &State, mode: AttachMode) -> u32 {
        let Some(bound) = &self.bound else { return 0 };
        let mut served: BTreeSet<&PodKey> = self.waiting.iter().map(|w| &w.pod).collect();
        let mut leased: BTreeMap<&PodKey, Vec<Option<&str>>> = BTreeMap::new();
        for address in state.addresses.values() {
            match &address.state {
                super::state::AddressState::Leased(held) if !held.going() => {
                    leased.entry(&held.lease.pod).or_default().push(held.lease.pod_uid.as_deref());
                }
                super::state::AddressState::Reserved { pod, .. } => {
                    served.insert(pod);
                }
                _ => {}
            }
        }
        let has_lease = |p: &BoundPod| {
            leased.get(&p.pod).is_some_and(|uids| uids.iter().any(|uid| uid.is_none_or(|uid| uid == p.uid)))
        };
        let wants = |p: &&BoundPod| p.mode == mode && !p.terminated && !served.contains(&p.pod) && !has_lease(p);
        bound.iter().filter(wants).count() as u32
    }

    /// Addresses that a step takes are no longer available, whatever was last
    /// read.
    pub fn note_taken(&mut self, state: &State, step: &Step) {
        let (vswitch, count) = match step {
            Step::CreateEni { vswitch, ipv4, .. } => (Some(vswitch), *ipv4),
            Step::AssignIpv4 { key, count } => (state.enis.get(key).map(|e| &e.vswitch), *count),
            _ => return,
        };
        if let Some(vswitch) = vswitch.and_then(|v| self.vswitches.get_mut(v)) {
            vswitch.available = vswitch.available.saturating_sub(count);
        }
    }
}
