//! Why a request waits, in the sentence its caller, the pod's Event and the log
//! will show. Pure.

use super::config::Config;
use super::demand::Demand;
use super::plan::Supply;
use super::state::{AddressState, HoldKey, Phase, Purpose, State, Time};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It will be served, or may be: for what it waits.
    Waiting(String),
    /// The node holds as much as it can.
    Full { in_use: usize, limit: usize },
    /// The node can hold no more ENIs, where the pod wants one of its own.
    NoPlace { shared: usize, limit: usize },
    /// The cloud refuses, and will until an operator acts.
    Refused(String),
}

pub fn why(state: &State, config: &Config, demand: &Demand, purpose: Purpose, now: Time) -> Why {
    let supply = Supply::of(state, purpose);
    let held = |key: HoldKey| state.held_back(&key, now);
    let enis = || state.enis.iter().filter(|(_, e)| e.purpose == purpose);

    if supply.coming > 0 {
        let mut parts = Vec::new();
        for (key, eni) in enis() {
            let name = eni.eni.as_ref().map_or_else(|| format!("ENI {}", key.0), |e| e.id.to_string());
            let doing = match eni.phase {
                Phase::Creating { .. } => "is being created",
                Phase::Attaching { .. } => "is being attached",
                Phase::Ready if eni.assign4.is_some() => "is being assigned addresses",
                Phase::Ready if eni.assign6.is_some() => "is being assigned IPv6 addresses",
                _ => continue,
            };
            let trouble = held(HoldKey::Eni(*key)).map(|h| format!(" (last attempt: {})", h.reason));
            parts.push(format!("{name} {doing}{}", trouble.unwrap_or_default()));
        }
        return Why::Waiting(parts.join("; "));
    }
    if supply.idle > 0 {
        return Why::Waiting("an address is being handed over".to_owned());
    }

    let per_eni = state.per_eni();
    let places = state.places(config.max_enis);
    let has_place = state.occupied_places() < places;
    let room = enis().any(|(key, e)| e.ready() && purpose == Purpose::Shared && state.count_of(*key) < per_eni);
    let vswitches = if config.vswitches.is_empty() { demand.own_vswitch.as_slice() } else { &config.vswitches };
    let holds = has_place.then(|| held(HoldKey::Create)).flatten().into_iter();
    let holds = holds.chain(vswitches.iter().filter_map(|v| held(HoldKey::VSwitch(v.clone()))));
    let holds = holds.chain(enis().filter_map(|(key, _)| held(HoldKey::Eni(*key))));
    let holds: Vec<_> = holds.collect();
    if (has_place || room) && !holds.is_empty() {
        let hopeless = holds.iter().all(|h| h.hopeless) && supply.cooling == 0;
        let reason = holds[0].reason.clone();
        return if hopeless { Why::Refused(reason) } else { Why::Waiting(reason) };
    }
    if has_place || room {
        let empty = vswitches.iter().all(|v| demand.vswitches.get(v).is_some_and(|v| v.available == 0));
        if empty {
            let names: Vec<&str> = vswitches.iter().map(|v| v.as_str()).collect();
            return Why::Waiting(format!("no free address in vSwitch {}; add a vSwitch to the pool", names.join(", ")));
        }
        return Why::Waiting("the next call to the cloud is being prepared".to_owned());
    }

    if supply.cooling > 0 {
        return Why::Waiting(format!(
            "the node is full; {} released addresses are still in quarantine",
            supply.cooling
        ));
    }
    let leaving = state.enis.values().any(|e| matches!(e.phase, Phase::Draining | Phase::Detaching { .. }));
    let releasing = state.addresses.values().any(|a| match &a.state {
        AddressState::Releasing { .. } => true,
        AddressState::Leased(held) => held.going(),
        _ => false,
    });
    if leaving || releasing {
        return Why::Waiting("the node is full; an ENI or address is being given back first".to_owned());
    }
    if purpose == Purpose::Exclusive {
        let shared = state.enis.values().filter(|e| e.occupies_place() && e.purpose == Purpose::Shared).count();
        return Why::NoPlace { shared, limit: places as usize };
    }
    let in_use = state.addresses.values().filter(|a| super::apply::in_use(a)).count();
    Why::Full { in_use, limit: (places * per_eni) as usize }
}
