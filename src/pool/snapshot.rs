//! The pool as others see it: `/debug/pool`, `fairway status`, metrics, the
//! Node's condition and extended resource.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::{EniId, Mac, PodKey, VSwitchId};

use super::plan::Supply;
use super::state::{AddressState, HoldKey, Phase, Purpose, State, Time};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSnapshot {
    /// False until ledger, cloud and kernel have been compared after the start.
    pub reconciled: bool,
    pub instance: String,
    pub enis: Vec<EniSnapshot>,
    pub addresses: Vec<AddressSnapshot>,
    pub totals: Totals,
    /// Requests without an address yet.
    pub waiting: usize,
    pub waiting_reason: Option<String>,
    pub in_flight: Vec<CallSnapshot>,
    pub holds: Vec<HoldSnapshot>,
    /// How often each journalled step was taken since the start.
    pub steps: BTreeMap<String, u64>,
    /// What opening the ledger found.
    pub ledger: super::ledger::LedgerReport,
    /// The last failed write, until one succeeds.
    pub ledger_error: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub idle: usize,
    pub leased: usize,
    pub cooling: usize,
    pub reserved: usize,
    pub releasing: usize,
    /// Addresses on their way.
    pub coming: usize,
    /// Pods in veth mode this node can hold at most.
    pub capacity: usize,
    /// Exclusive pods this node can hold at most, those it holds included: the
    /// value of the extended resource.
    pub exclusive_capacity: usize,
    pub exclusive_leased: usize,
    /// Nothing idle, nothing coming, no room: the Node's condition.
    pub short: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniSnapshot {
    pub key: u64,
    pub id: Option<EniId>,
    pub mac: Option<Mac>,
    pub purpose: Purpose,
    pub phase: String,
    pub vswitch: VSwitchId,
    pub ifname: Option<String>,
    pub rx_queues: u32,
    /// The cores each receive queue is spread over.
    pub receive_cores: Vec<String>,
    pub addresses: usize,
    pub leased: usize,
    /// Leases per receive queue, in thousandths.
    pub load_per_queue_milli: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressSnapshot {
    pub v4: std::net::Ipv4Addr,
    pub v6: Option<std::net::Ipv6Addr>,
    pub eni: u64,
    pub state: String,
    pub pod: Option<PodKey>,
    pub attachment: Option<String>,
    pub until: Option<Time>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallSnapshot {
    pub call: String,
    pub subject: String,
    pub age_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldSnapshot {
    /// `vswitch/vsw-…`, `create`, `eni/…`.
    pub what: String,
    pub for_ms: u64,
    pub failures: u32,
    pub reason: String,
}

/// The part that follows from the state alone.
pub fn of_state(state: &State, max_enis: Option<u32>, now: Time) -> PoolSnapshot {
    let mut totals = Totals::default();
    let mut addresses = Vec::with_capacity(state.addresses.len());
    for (v4, address) in &state.addresses {
        let (name, pod, attachment, until) = match &address.state {
            AddressState::Idle { .. } => ("idle", None, None, None),
            AddressState::Cooling { until } => ("cooling", None, None, Some(*until)),
            AddressState::Reserved { pod, until } => ("reserved", Some(pod.clone()), None, Some(*until)),
            AddressState::Releasing { .. } => ("releasing", None, None, None),
            AddressState::Leased(held) => {
                let name = match held.phase {
                    super::state::LeasePhase::Wiring => "wiring",
                    super::state::LeasePhase::Wired => "wired",
                    super::state::LeasePhase::Unwiring => "unwiring",
                    super::state::LeasePhase::Collecting => "collecting",
                };
                (name, Some(held.lease.pod.clone()), Some(held.lease.attachment.to_string()), None)
            }
        };
        *match name {
            "idle" => &mut totals.idle,
            "cooling" => &mut totals.cooling,
            "reserved" => &mut totals.reserved,
            "releasing" => &mut totals.releasing,
            _ => &mut totals.leased,
        } += 1;
        addresses.push(AddressSnapshot {
            v4: *v4,
            v6: address.v6,
            eni: address.eni.0,
            state: name.to_owned(),
            pod,
            attachment,
            until,
        });
    }

    let mut enis = Vec::with_capacity(state.enis.len());
    let mut shared_in_use = 0;
    for (key, eni) in &state.enis {
        let count = state.of_eni(*key).count();
        let leased = state.of_eni(*key).filter(|(_, a)| a.held().is_some()).count();
        let in_use = state.of_eni(*key).any(|(_, a)| super::apply::in_use(a));
        match eni.purpose {
            Purpose::Shared if in_use && eni.occupies_place() => shared_in_use += 1,
            Purpose::Exclusive => totals.exclusive_leased += leased,
            Purpose::Shared => {}
        }
        enis.push(EniSnapshot {
            key: key.0,
            id: eni.eni.as_ref().map(|e| e.id.clone()),
            mac: eni.eni.as_ref().map(|e| e.mac),
            purpose: eni.purpose,
            phase: phase_name(eni.phase).to_owned(),
            vswitch: eni.vswitch.clone(),
            ifname: eni.device.as_ref().map(|d| d.ifname.clone()),
            rx_queues: eni.queues(),
            receive_cores: eni.device.as_ref().map(|d| d.receive_cores.clone()).unwrap_or_default(),
            addresses: count,
            leased,
            load_per_queue_milli: (leased as u64) * 1000 / u64::from(eni.queues()),
        });
    }
    let places = state.places(max_enis) as usize;
    let shared = Supply::of(state, Purpose::Shared);
    totals.coming = shared.coming as usize;
    let exclusive_places =
        state.enis.values().filter(|e| e.purpose == Purpose::Exclusive && e.occupies_place()).count();
    totals.capacity = places.saturating_sub(exclusive_places) * state.per_eni() as usize;
    totals.exclusive_capacity = places.saturating_sub(shared_in_use);
    let blocked = state.held_back(&HoldKey::Create, now).is_some() || state.occupied_places() as usize >= places;
    let full = state.enis.iter().filter(|(_, e)| e.purpose == Purpose::Shared && e.serves()).all(|(key, e)| {
        state.count_of(*key) >= state.per_eni()
            || state.held_back(&HoldKey::VSwitch(e.vswitch.clone()), now).is_some()
            || state.held_back(&HoldKey::Eni(*key), now).is_some()
    });
    totals.short = shared.idle + shared.coming == 0 && blocked && full;
    let holds = state.holds.iter().filter(|(_, h)| h.until > now).map(|(key, hold)| HoldSnapshot {
        what: key.to_string(),
        for_ms: hold.until.0.saturating_sub(now.0),
        failures: hold.failures,
        reason: hold.reason.clone(),
    });
    PoolSnapshot {
        instance: state.meta.instance.to_string(),
        holds: holds.collect(),
        enis,
        addresses,
        totals,
        ..PoolSnapshot::default()
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Creating { .. } => "creating",
        Phase::Attaching { .. } => "attaching",
        Phase::Ready => "ready",
        Phase::Draining => "draining",
        Phase::Detaching { .. } => "detaching",
        Phase::Deleting => "deleting",
        Phase::Lost => "lost",
    }
}
