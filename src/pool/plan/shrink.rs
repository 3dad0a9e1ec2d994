//! Shrinking: too much idle goes back to the cloud, whole ENIs preferred, in as
//! few calls as possible, and only after it has been too much for a while.

use std::net::Ipv4Addr;

use super::Planner;
use crate::pool::apply::in_use;
use crate::pool::state::{EniKey, HoldKey, Phase, Purpose, Time};
use crate::pool::step::Step;

impl Planner<'_> {
    pub(super) fn shrink(&mut self) {
        self.shrink_shared();
        self.shrink_exclusive();
        self.detach_drained();
    }

    fn shrink_shared(&mut self) {
        let demand = self.waiting(Purpose::Shared) + self.expected(Purpose::Shared);
        let kept = demand + self.config.min_idle;
        let allowed = demand + self.config.max_idle;
        let mut idle = self.supply(Purpose::Shared).idle;
        if idle <= allowed || self.waiting(Purpose::Shared) > 0 {
            return;
        }

        // Whole ENIs, large ones first, while the stock stays above its mark.
        let mut whole: Vec<(usize, EniKey)> = self
            .state
            .enis
            .iter()
            .filter(|(key, e)| e.purpose == Purpose::Shared && self.quiet(**key))
            .filter(|(key, _)| self.state.of_eni(**key).all(|(_, a)| self.aged(a.idle_since())))
            .map(|(key, _)| (self.state.of_eni(*key).count(), *key))
            .collect();
        whole.sort_by_key(|(count, key)| (std::cmp::Reverse(*count), std::cmp::Reverse(*key)));
        for (count, key) in whole {
            let count = count as u32;
            if idle > allowed && idle - count.min(idle) >= kept && self.take(Step::DrainEni { key }) {
                idle -= count;
            }
        }
        if idle <= allowed {
            return;
        }

        // Then addresses: all that are too many have been idle for long enough,
        // so that they go in one call per ENI rather than one by one.
        let surplus = (idle - allowed) as usize;
        let mut candidates: Vec<(usize, EniKey, Time, Ipv4Addr)> = Vec::new();
        for (ip, address) in &self.state.addresses {
            let Some(eni) = self.state.enis.get(&address.eni) else { continue };
            if eni.purpose == Purpose::Shared
                && !eni.is_primary_address(*ip)
                && self.quiet(address.eni)
                && let Some(since) = address.idle_since()
            {
                let leases = self.state.of_eni(address.eni).filter(|(_, a)| a.held().is_some()).count();
                candidates.push((leases, address.eni, since, *ip));
            }
        }
        candidates.retain(|(.., since, _)| self.aged(Some(*since)));
        let primaries = self.supply(Purpose::Shared).idle as usize;
        if candidates.len() < surplus.min(primaries) && !self.only_primaries_left(surplus, candidates.len()) {
            return;
        }
        // Those of the least used ENI: it may become free as a whole.
        candidates.sort();
        candidates.truncate(surplus);
        let addresses: Vec<Ipv4Addr> = candidates.into_iter().map(|(.., ip)| ip).collect();
        if !addresses.is_empty() {
            self.take(Step::ReleaseAddresses { addresses });
        }
    }

    /// Not enough can go because the rest are ENIs' own first addresses (or on
    /// ENIs that are held back), rather than because it is too early.
    fn only_primaries_left(&self, surplus: usize, ready: usize) -> bool {
        let young = self.state.addresses.iter().any(|(ip, a)| {
            let eni = self.state.enis.get(&a.eni);
            let releasable = eni.is_some_and(|e| e.purpose == Purpose::Shared && !e.is_primary_address(*ip));
            releasable && self.quiet(a.eni) && a.idle_since().is_some() && !self.aged(a.idle_since())
        });
        ready < surplus && !young
    }

    fn shrink_exclusive(&mut self) {
        let demand = self.waiting(Purpose::Exclusive) + self.expected(Purpose::Exclusive);
        let allowed = demand + self.config.idle_exclusive;
        let mut idle = self.supply(Purpose::Exclusive).idle;
        let unused: Vec<EniKey> = self
            .state
            .enis
            .iter()
            .filter(|(key, e)| e.purpose == Purpose::Exclusive && self.quiet(**key))
            .filter(|(key, _)| self.state.of_eni(**key).all(|(_, a)| self.aged(a.idle_since())))
            .map(|(key, _)| *key)
            .collect();
        for key in unused {
            if idle > allowed && self.take(Step::DrainEni { key }) {
                idle -= 1;
            }
        }
    }

    /// Draining ENIs that nobody uses any more.
    fn detach_drained(&mut self) {
        let free: Vec<EniKey> = self
            .state
            .enis
            .iter()
            .filter(|(key, e)| e.phase == Phase::Draining && !self.state.of_eni(**key).any(|(_, a)| in_use(a)))
            .map(|(key, _)| *key)
            .collect();
        for key in free {
            self.take(Step::DetachEni { key });
        }
        let empty: Vec<EniKey> = self
            .state
            .enis
            .iter()
            .filter(|(key, e)| e.phase == Phase::Lost && self.state.of_eni(**key).next().is_none())
            .map(|(key, _)| *key)
            .collect();
        for key in empty {
            self.take(Step::EniLost { key });
        }
    }

    /// Attached, and no call for it is in flight or held back.
    fn quiet(&self, key: EniKey) -> bool {
        let idle = |e: &crate::pool::state::Eni| e.ready() && e.assign4.is_none() && e.assign6.is_none();
        self.state.enis.get(&key).is_some_and(|e| idle(e)) && !self.held_back(&HoldKey::Eni(key))
    }

    fn aged(&self, idle_since: Option<Time>) -> bool {
        idle_since.is_some_and(|since| since.plus(self.config.release_delay) <= self.now)
    }
}
