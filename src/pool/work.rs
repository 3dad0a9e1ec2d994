//! Calls that the state asks for. Level-triggered: a call is due as long as the
//! state says so and none for the same ENI is in flight, so that after a crash
//! the interrupted ones are simply due again, with the same client token.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::cloud::Lane;

use super::plan::IPV6_PER_CALL;
use super::state::{AddressState, Eni, EniKey, HoldKey, LeasePhase, Phase, State, Time};

/// One call, or a short sequence of idempotent ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    Create {
        key: EniKey,
    },
    Attach {
        key: EniKey,
    },
    /// Wait for the device and set it up.
    Prepare {
        key: EniKey,
    },
    AssignIpv4 {
        key: EniKey,
    },
    AssignIpv6 {
        key: EniKey,
    },
    UnassignIpv4 {
        key: EniKey,
        addresses: Vec<Ipv4Addr>,
    },
    UnassignIpv6 {
        key: EniKey,
        addresses: Vec<Ipv6Addr>,
    },
    /// Remove the host side, then detach.
    Detach {
        key: EniKey,
    },
    Delete {
        key: EniKey,
    },
    /// Undo the wiring of a collected lease.
    Unwire {
        v4: Ipv4Addr,
    },
}

/// What work excludes other work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Eni(EniKey),
    Lease(Ipv4Addr),
}

impl Work {
    pub fn subject(&self) -> Subject {
        match self {
            Work::Create { key }
            | Work::Attach { key }
            | Work::Prepare { key }
            | Work::AssignIpv4 { key }
            | Work::AssignIpv6 { key }
            | Work::UnassignIpv4 { key, .. }
            | Work::UnassignIpv6 { key, .. }
            | Work::Detach { key }
            | Work::Delete { key } => Subject::Eni(*key),
            Work::Unwire { v4 } => Subject::Lease(*v4),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Work::Create { .. } => "create",
            Work::Attach { .. } => "attach",
            Work::Prepare { .. } => "prepare",
            Work::AssignIpv4 { .. } => "assign-ipv4",
            Work::AssignIpv6 { .. } => "assign-ipv6",
            Work::UnassignIpv4 { .. } => "unassign-ipv4",
            Work::UnassignIpv6 { .. } => "unassign-ipv6",
            Work::Detach { .. } => "detach",
            Work::Delete { .. } => "delete",
            Work::Unwire { .. } => "unwire",
        }
    }

    pub fn lane(&self, pods_wait: bool) -> Lane {
        match self {
            Work::UnassignIpv4 { .. } | Work::UnassignIpv6 { .. } | Work::Detach { .. } | Work::Delete { .. } => {
                Lane::Release
            }
            _ if pods_wait => Lane::PodWaiting,
            _ => Lane::Refill,
        }
    }
}

/// What is due now, leaving out subjects with work in flight and those held back.
pub fn due(
    state: &State,
    running: &BTreeSet<Subject>,
    retry_after: impl Fn(Subject) -> Option<Time>,
    now: Time,
) -> Vec<Work> {
    let free = |subject: Subject| !running.contains(&subject) && retry_after(subject).is_none_or(|t| t <= now);
    let enis = state
        .enis
        .iter()
        .filter(|(key, _)| free(Subject::Eni(**key)) && state.held_back(&HoldKey::Eni(**key), now).is_none());
    let unwire = state.leases().filter(|(v4, h)| h.phase == LeasePhase::Collecting && free(Subject::Lease(*v4)));
    enis.filter_map(|(key, eni)| of_eni(state, *key, eni)).chain(unwire.map(|(v4, _)| Work::Unwire { v4 })).collect()
}

fn of_eni(state: &State, key: EniKey, eni: &Eni) -> Option<Work> {
    match eni.phase {
        Phase::Creating { .. } => Some(Work::Create { key }),
        Phase::Attaching { accepted: false } => Some(Work::Attach { key }),
        Phase::Attaching { accepted: true } => Some(Work::Prepare { key }),
        Phase::Ready => of_ready(state, key, eni),
        Phase::Detaching { accepted: false } => Some(Work::Detach { key }),
        Phase::Deleting => Some(Work::Delete { key }),
        Phase::Draining | Phase::Detaching { accepted: true } | Phase::Lost => None,
    }
}

/// The cloud refuses two changes of one ENI at a time: those that a pod may wait
/// for go first.
fn of_ready(state: &State, key: EniKey, eni: &Eni) -> Option<Work> {
    if eni.assign4.is_some() {
        return Some(Work::AssignIpv4 { key });
    }
    if eni.assign6.is_some() {
        return Some(Work::AssignIpv6 { key });
    }
    if eni.device.is_none() {
        return Some(Work::Prepare { key });
    }
    let leaving: Vec<_> =
        state.of_eni(key).filter(|(_, a)| matches!(a.state, AddressState::Releasing { .. })).collect();
    let v6: Vec<Ipv6Addr> = leaving.iter().filter_map(|(_, a)| a.v6).take(IPV6_PER_CALL as usize).collect();
    if !v6.is_empty() {
        return Some(Work::UnassignIpv6 { key, addresses: v6 });
    }
    let v4: Vec<Ipv4Addr> = leaving.iter().map(|(ip, _)| *ip).collect();
    (!v4.is_empty()).then_some(Work::UnassignIpv4 { key, addresses: v4 })
}
