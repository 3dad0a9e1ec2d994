//! Cool-downs end, dead leases are collected, waiting requests are served.

use std::net::Ipv4Addr;

use super::Planner;
use crate::model::Lease;
use crate::pool::Allocate;
use crate::pool::state::{AddressState, EniKey, Purpose};
use crate::pool::step::Step;

impl Planner<'_> {
    /// Cool-downs, reservations and holds whose time has come.
    pub(super) fn settle(&mut self) {
        let now = self.now;
        let over = |s: &AddressState| match s {
            AddressState::Cooling { until } | AddressState::Reserved { until, .. } => *until <= now,
            _ => false,
        };
        let settled: Vec<Ipv4Addr> =
            self.state.addresses.iter().filter(|(_, a)| over(&a.state)).map(|(ip, _)| *ip).collect();
        for v4 in settled {
            // The pod a reservation was made for may be the one that waits.
            if !self.is_awaited(v4) {
                self.take(Step::Settle { v4 });
            }
        }
        // A hold's count of failures is remembered for a while after its end.
        let forgotten = |until: crate::pool::state::Time| until.plus(std::time::Duration::from_secs(60)) <= now;
        let ended: Vec<_> =
            self.state.holds.iter().filter(|(_, h)| forgotten(h.until)).map(|(k, _)| k.clone()).collect();
        for key in ended {
            self.take(Step::Unhold { key });
        }
    }

    fn is_awaited(&self, v4: Ipv4Addr) -> bool {
        match self.state.addresses.get(&v4).map(|a| &a.state) {
            Some(AddressState::Reserved { pod, .. }) => self.demand.waiting.iter().any(|w| w.pod == *pod),
            _ => false,
        }
    }

    /// Leases whose sandbox or pod has been gone long enough.
    pub(super) fn collect(&mut self) {
        let dead: Vec<Ipv4Addr> = self
            .state
            .leases()
            .filter(|(_, h)| h.phase != crate::pool::state::LeasePhase::Collecting)
            .filter(|(_, h)| self.demand.gone.contains(&h.lease.attachment))
            .map(|(ip, _)| ip)
            .collect();
        for v4 in dead {
            self.take(Step::Unwire { v4, collect: true });
        }
    }

    /// First come, first served.
    pub(super) fn grant(&mut self) {
        let demand = self.demand;
        for request in &demand.waiting {
            if self.state.lease_of(&request.attachment).is_some() {
                continue;
            }
            let Some(v4) = self.reserved_for(request).or_else(|| self.choose(request.mode.into())) else { continue };
            if let Some(lease) = self.lease(request, v4) {
                self.take(Step::Lease { lease: Box::new(lease), reserve: request.reserve });
            }
        }
    }

    fn reserved_for(&self, request: &Allocate) -> Option<Ipv4Addr> {
        let purpose = Purpose::from(request.mode);
        let fits = |key: EniKey| self.state.enis.get(&key).is_some_and(|e| e.ready() && e.purpose == purpose);
        self.state.addresses.iter().find_map(|(ip, a)| match &a.state {
            AddressState::Reserved { pod, .. } if *pod == request.pod && fits(a.eni) => Some(*ip),
            _ => None,
        })
    }

    /// From the ENI with the fewest leases per receive queue, the address that
    /// has been idle for longest.
    fn choose(&self, purpose: Purpose) -> Option<Ipv4Addr> {
        let state = &self.state;
        let usable = state
            .addresses
            .iter()
            .filter(|(_, a)| state.usable(a) && state.enis.get(&a.eni).is_some_and(|e| e.purpose == purpose));
        let mut load: std::collections::BTreeMap<EniKey, (u32, u32)> = Default::default();
        for address in state.addresses.values().filter(|a| a.held().is_some()) {
            load.entry(address.eni).or_default().0 += 1;
        }
        for (key, eni) in &state.enis {
            load.entry(*key).or_default().1 = eni.queues();
        }
        // Leases per queue, compared without fractions: a/b < c/d as a·d < c·b.
        let heavier =
            |x: (u32, u32), y: (u32, u32)| (u64::from(x.0) * u64::from(y.1)).cmp(&(u64::from(y.0) * u64::from(x.1)));
        let load_of = |key: &EniKey| load.get(key).copied().unwrap_or((0, 1));
        usable
            .min_by(|(_, a), (_, b)| {
                heavier(load_of(&a.eni), load_of(&b.eni))
                    .then(a.eni.cmp(&b.eni))
                    .then(a.idle_since().cmp(&b.idle_since()))
            })
            .map(|(ip, _)| *ip)
    }

    fn lease(&self, request: &Allocate, v4: Ipv4Addr) -> Option<Lease> {
        let address = self.state.addresses.get(&v4)?;
        let eni = self.state.enis.get(&address.eni)?.eni.clone()?;
        Some(Lease {
            attachment: request.attachment.clone(),
            pod: request.pod.clone(),
            pod_uid: request.pod_uid.clone(),
            mode: request.mode,
            eni,
            v4,
            v6: address.v6,
            netns: request.netns.clone(),
            bandwidth: request.bandwidth,
            traffic: request.traffic,
        })
    }
}
