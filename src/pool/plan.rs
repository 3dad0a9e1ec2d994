//! The plan: what the pool decides, as a pure function of plain data.
//!
//! `plan(&State, &Config, &Demand, now)` returns the steps to journal, in order.
//! Cloud calls are not steps: they follow from the state the steps lead to (see
//! [`super::work`]), so that a restart and ordinary operation are the same thing.
//! Called again in the state its steps lead to, with the same demand, it returns
//! nothing.
//!
//! - [`grant`]: waiting requests take addresses; cool-downs end; leases whose
//!   sandbox is gone are collected
//! - [`grow`]: addresses for those who wait, are expected, and for the stock
//! - [`shrink`]: what is too much goes back, whole ENIs first

mod grant;
mod grow;
mod shrink;

use std::collections::BTreeMap;
use std::time::Duration;

use super::config::Config;
use super::demand::Demand;
use super::state::{AddressState, Eni, EniKey, HoldKey, Phase, Purpose, State, Time};
use super::step::Step;

/// Limits of the cloud's API, per call.
pub const IPV4_PER_CREATE: u32 = 50;
pub const IPV6_PER_CALL: u32 = 10;

pub fn plan(state: &State, config: &Config, demand: &Demand, now: Time) -> Vec<Step> {
    let mut planner = Planner { state: state.clone(), config, demand, now, steps: Vec::new(), taken: BTreeMap::new() };
    planner.settle();
    planner.collect();
    planner.grant();
    planner.grow();
    planner.shrink();
    planner.steps
}

/// When the plan may have something to do although nothing has happened.
pub fn wake(state: &State, config: &Config, now: Time) -> Option<Time> {
    let addresses = state.addresses.values().filter_map(|a| match &a.state {
        AddressState::Cooling { until } | AddressState::Reserved { until, .. } => Some(*until),
        AddressState::Idle { since } => Some(since.plus(config.release_delay)),
        _ => None,
    });
    let holds = state.holds.values().map(|h| h.until);
    // What lies in the past has been considered already.
    addresses.chain(holds).filter(|t| *t > now).min()
}

/// The work in progress of one call of `plan`.
struct Planner<'a> {
    /// With the steps so far applied.
    state: State,
    config: &'a Config,
    demand: &'a Demand,
    now: Time,
    steps: Vec<Step>,
    /// Addresses planned from each vSwitch, beyond what was last read.
    taken: BTreeMap<crate::model::VSwitchId, u32>,
}

impl Planner<'_> {
    /// Decide a step. False when it does not fit, which is a mistake in the plan
    /// and therefore loud in tests and harmless otherwise.
    fn take(&mut self, step: Step) -> bool {
        match self.state.apply(&step, self.now) {
            Ok(()) => {
                self.steps.push(step);
                true
            }
            Err(refused) => {
                debug_assert!(false, "{refused}: {step:?}");
                false
            }
        }
    }

    fn held_back(&self, key: &HoldKey) -> bool {
        self.state.held_back(key, self.now).is_some()
    }

    /// No calls for this ENI, or none that take from its vSwitch.
    fn may_grow(&self, key: EniKey) -> bool {
        !self.held_back(&HoldKey::Eni(key)) && self.state.enis.get(&key).is_some_and(|e| self.vswitch_gives(e))
    }

    fn vswitch_gives(&self, eni: &Eni) -> bool {
        !self.held_back(&HoldKey::VSwitch(eni.vswitch.clone()))
    }

    fn free_places(&self) -> u32 {
        self.state.places(self.config.max_enis).saturating_sub(self.state.occupied_places())
    }

    fn waiting(&self, purpose: Purpose) -> u32 {
        let unserved = |w: &&super::Allocate| self.state.lease_of(&w.attachment).is_none();
        self.demand.waiting.iter().filter(|w| Purpose::from(w.mode) == purpose).filter(unserved).count() as u32
    }

    fn expected(&self, purpose: Purpose) -> u32 {
        self.demand.expected(&self.state, purpose.mode())
    }

    fn supply(&self, purpose: Purpose) -> Supply {
        Supply::of(&self.state, purpose)
    }
}

/// What of one kind is there or on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Supply {
    /// May be leased now.
    pub idle: u32,
    /// On ENIs that are coming up, in calls in flight, or waiting for IPv6.
    pub coming: u32,
    /// Idle again when their time has come.
    pub cooling: u32,
}

impl Supply {
    pub(super) fn of(state: &State, purpose: Purpose) -> Self {
        let mut supply = Supply::default();
        for (key, eni) in state.enis.iter().filter(|(_, e)| e.purpose == purpose && e.serves()) {
            if let Phase::Creating { ipv4, .. } = eni.phase {
                supply.coming += ipv4;
            }
            supply.coming += eni.assign4.as_ref().map_or(0, |a| a.count);
            let (mut paired, mut unpaired) = (0, 0);
            for (_, address) in state.of_eni(*key) {
                let whole = !state.dual() || address.v6.is_some();
                paired += u32::from(address.v6.is_some());
                match address.state {
                    AddressState::Idle { .. } if !whole => unpaired += 1,
                    AddressState::Idle { .. } if eni.ready() => supply.idle += 1,
                    AddressState::Idle { .. } => supply.coming += 1,
                    AddressState::Cooling { .. } => supply.cooling += 1,
                    _ => {}
                }
            }
            // What can never be paired serves nobody.
            supply.coming += unpaired.min(state.meta.limits.ipv6_per_eni.saturating_sub(paired));
        }
        supply
    }

    /// How many to ask for so that `demand` is served and a stock remains;
    /// nothing while the stock is above its lower mark.
    fn shortage(self, demand: u32, low: u32, refill_to: u32) -> u32 {
        let soon = self.idle + self.coming;
        let later = soon + self.cooling;
        if soon >= demand && later >= demand + low {
            return 0;
        }
        let now = demand.saturating_sub(soon);
        let stock = (demand + refill_to).saturating_sub(later);
        now.max(stock)
    }
}

/// Back-off after `failures` in a row: 1 s, 2 s, … 1 min.
pub fn back_off(failures: u32) -> Duration {
    Duration::from_secs(1u64 << failures.saturating_sub(1).min(6)).min(Duration::from_secs(60))
}
