//! Growing: as few calls as the API allows, all of them started at once.
//!
//! Addresses come from attached ENIs first, one call per ENI; what those cannot
//! hold comes with new ENIs, created with their addresses. An ENI with a call in
//! flight takes no second one: those who come meanwhile are counted, and one
//! call serves them when the first is answered.

use super::{IPV4_PER_CREATE, IPV6_PER_CALL, Planner};
use crate::model::VSwitchId;
use crate::pool::config::VSwitchPolicy;
use crate::pool::state::{AddressState, EniKey, HoldKey, Phase, Purpose};
use crate::pool::step::Step;

impl Planner<'_> {
    pub(super) fn grow(&mut self) {
        self.grow_exclusive(None);
        self.grow_shared();
        self.grow_exclusive(Some(self.config.idle_exclusive));
        self.pair();
    }

    /// Pods come first, the stock last: for it no other ENI has to go.
    fn grow_exclusive(&mut self, stock: Option<u32>) {
        let waiting = self.waiting(Purpose::Exclusive);
        let demand = waiting + self.expected(Purpose::Exclusive);
        let low = stock.unwrap_or(0);
        let need = self.supply(Purpose::Exclusive).shortage(demand, low, low);
        for _ in 0..need {
            if self.free_places() == 0 {
                if waiting > 0 && stock.is_none() {
                    self.make_room(Purpose::Shared);
                }
                return;
            }
            if self.create(Purpose::Exclusive, 1, 1).is_none() {
                return;
            }
        }
    }

    fn grow_shared(&mut self) {
        let waiting = self.waiting(Purpose::Shared);
        let demand = waiting + self.expected(Purpose::Shared);
        let (low, refill_to) = (self.config.min_idle, self.config.refill_to());
        let need = self.supply(Purpose::Shared).shortage(demand, low, refill_to);
        self.assign_to_attached(need);
        // What is still short after those calls; a stock that is merely not
        // full is no reason for another ENI.
        let mut need = self.supply(Purpose::Shared).shortage(demand, low, refill_to);
        need -= self.count_on_latent_room(need);
        // A create costs the same call with all of an ENI's addresses as with
        // one: a node that has pods takes them all, and the next pods cost
        // nothing. What stays unused goes back after the release delay.
        let has_pods = demand > 0 || self.state.leases().next().is_some();
        let full = if has_pods { self.state.per_eni() } else { 0 };
        while need > 0 {
            if self.free_places() == 0 {
                if waiting > 0 {
                    self.make_room(Purpose::Exclusive);
                }
                return;
            }
            let least = need.min(self.state.per_eni());
            let Some(count) = self.create(Purpose::Shared, least, least.max(full)) else { return };
            need = need.saturating_sub(count);
        }
    }

    /// One call for each attached ENI that is needed, those with most room
    /// first: that makes the fewest calls.
    fn assign_to_attached(&mut self, need: u32) {
        let per_eni = self.state.per_eni();
        let mut rooms: Vec<(u32, EniKey)> = Vec::new();
        for (key, eni) in &self.state.enis {
            if eni.purpose == Purpose::Shared && eni.ready() && eni.assign4.is_none() && self.may_grow(*key) {
                let room = per_eni.saturating_sub(self.state.count_of(*key));
                rooms.push((room, *key));
            }
        }
        rooms.retain(|(room, _)| *room > 0);
        rooms.sort_by_key(|(room, key)| (std::cmp::Reverse(*room), *key));
        let mut got = 0;
        for (room, key) in rooms {
            if got >= need {
                break;
            }
            let vswitch = self.state.enis.get(&key).map(|e| e.vswitch.clone());
            let offered = vswitch.as_ref().map_or(0, |v| self.available(v).unwrap_or(u32::MAX));
            let count = room.min(need - got).min(offered);
            if count > 0 && self.take(Step::AssignIpv4 { key, count }) {
                self.note_taken(vswitch, count);
                got += count;
            }
        }
    }

    /// Up to `need` addresses for which ENIs that are busy now can be asked when
    /// they are not: a call there is cheaper than another ENI. They are set aside
    /// in the vSwitch, so that no new ENI takes what was counted on.
    ///
    /// A call that is held back is one to be repeated (what an ENI itself fails
    /// at gives the call up): the cloud does not answer, and would not for
    /// another ENI either, which took a place that a pod may come to need.
    fn count_on_latent_room(&mut self, need: u32) -> u32 {
        let per_eni = self.state.per_eni();
        let busy = self.state.enis.iter().filter(|(key, e)| {
            let comes = if e.assign4.is_some() { self.vswitch_gives(e) } else { !e.ready() && self.may_grow(**key) };
            e.purpose == Purpose::Shared && e.serves() && comes
        });
        let rooms = busy.map(|(key, eni)| {
            let creating = if let Phase::Creating { ipv4, .. } = eni.phase { ipv4 } else { 0 };
            let coming = creating + eni.assign4.as_ref().map_or(0, |a| a.count);
            (eni.vswitch.clone(), per_eni.saturating_sub(self.state.count_of(*key) + coming))
        });
        let mut counted = 0;
        for (vswitch, room) in rooms.collect::<Vec<_>>() {
            let count = room.min(need - counted).min(self.available(&vswitch).unwrap_or(u32::MAX));
            self.note_taken(Some(vswitch), count);
            counted += count;
        }
        counted
    }

    /// IPv6 addresses for the IPv4 addresses that lack one.
    fn pair(&mut self) {
        if !self.state.dual() {
            return;
        }
        let mut calls = Vec::new();
        for (key, eni) in &self.state.enis {
            if !eni.ready() || eni.assign6.is_some() || eni.assign4.is_some() || self.held_back(&HoldKey::Eni(*key)) {
                continue;
            }
            let lacking = |s: &AddressState| !matches!(s, AddressState::Leased(_) | AddressState::Releasing { .. });
            let unpaired = self.state.of_eni(*key).filter(|(_, a)| a.v6.is_none() && lacking(&a.state)).count() as u32;
            let present = self.state.of_eni(*key).filter(|(_, a)| a.v6.is_some()).count() + eni.spare6.len();
            let room = self.state.meta.limits.ipv6_per_eni.saturating_sub(present as u32);
            let count = unpaired.min(room).min(IPV6_PER_CALL);
            if count > 0 {
                calls.push((*key, count));
            }
        }
        for (key, count) in calls {
            self.take(Step::AssignIpv6 { key, count });
        }
    }

    /// Let go of an ENI of the other kind that nobody uses, for a pod that
    /// waits. Its place is free when the cloud has detached it.
    fn make_room(&mut self, of: Purpose) {
        // One at a time is on its way out already.
        let leaving = |p: Phase| matches!(p, Phase::Draining | Phase::Detaching { .. });
        if self.state.enis.values().any(|e| leaving(e.phase)) {
            return;
        }
        let spare = self.supply(of).idle.saturating_sub(self.waiting(of) + self.expected(of));
        let unused = self.state.enis.iter().find(|(key, e)| {
            let mut count = 0;
            let idle = self.state.of_eni(**key).all(|(_, a)| {
                count += 1;
                a.idle_since().is_some()
            });
            e.purpose == of && e.ready() && e.assign4.is_none() && e.assign6.is_none() && idle && count <= spare
        });
        if let Some(key) = unused.map(|(key, _)| *key) {
            self.take(Step::DrainEni { key });
        }
    }

    /// Create an ENI with `wished` addresses, or as few as `least` when the
    /// vSwitch is running short. Returns how many will come.
    fn create(&mut self, purpose: Purpose, least: u32, wished: u32) -> Option<u32> {
        if self.held_back(&HoldKey::Create) {
            return None;
        }
        let (vswitch, available) = self.choose_vswitch()?;
        let scarce = available.is_some_and(|n| n < wished.saturating_mul(4));
        let wanted = if scarce { least } else { wished };
        let ipv4 = wanted.min(available.unwrap_or(u32::MAX)).clamp(1, IPV4_PER_CREATE);
        let ipv6 = if self.state.dual() { ipv4.min(IPV6_PER_CALL) } else { 0 };
        let key = EniKey(self.state.meta.next);
        let done = self.take(Step::CreateEni { key, purpose, vswitch: vswitch.clone(), ipv4, ipv6 });
        self.note_taken(Some(vswitch), ipv4);
        done.then_some(ipv4)
    }

    fn note_taken(&mut self, vswitch: Option<VSwitchId>, count: u32) {
        if let Some(vswitch) = vswitch {
            *self.taken.entry(vswitch).or_default() += count;
        }
    }

    /// Free addresses of a vSwitch; `None` when not known.
    fn available(&self, vswitch: &VSwitchId) -> Option<u32> {
        let read = self.demand.vswitches.get(vswitch)?.available;
        Some(read.saturating_sub(self.taken.get(vswitch).copied().unwrap_or(0)))
    }

    fn choose_vswitch(&self) -> Option<(VSwitchId, Option<u32>)> {
        let own: Vec<VSwitchId> = self.demand.own_vswitch.iter().cloned().collect();
        let configured = if self.config.vswitches.is_empty() { &own } else { &self.config.vswitches };
        let candidates: Vec<(VSwitchId, Option<u32>)> = configured
            .iter()
            .filter(|v| !self.held_back(&HoldKey::VSwitch((*v).clone())))
            .map(|v| (v.clone(), self.available(v)))
            .filter(|(_, n)| *n != Some(0))
            .collect();
        match self.config.vswitch_policy {
            VSwitchPolicy::Ordered => candidates.into_iter().next(),
            VSwitchPolicy::MostAvailable => {
                // The first of those with the most.
                candidates.into_iter().rev().max_by_key(|(_, n)| n.unwrap_or(0))
            }
            VSwitchPolicy::Random => {
                let count = candidates.len() as u64;
                // Another pick for each ENI of the same plan.
                let draw = self.demand.random.wrapping_add(self.state.meta.next.wrapping_mul(0x9E37_79B9_7F4A_7C15));
                candidates.into_iter().nth((draw.checked_rem(count)?) as usize)
            }
        }
    }
}
