//! From what a Service wants to entries of the tables: numbers and places.
//!
//! Pure. A set keeps its number and a backend its id and its place for as long
//! as it is wanted. A backend that leaves is replaced by a new one, else by the
//! last; new ones are appended: an update changes no more entries than it must,
//! and the flows of the others are not moved.

use std::collections::{HashMap, HashSet};

use fairway_ebpf_abi as abi;

use super::compile::{SetName, Target, Wanted, WantedSet};
use super::ids::{Exhausted, Ids};
use super::maps::Counts;
use super::model::Range;

/// A Service's entries, as they are in the tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    pub sets: Vec<InstalledSet>,
    /// By key.
    pub frontends: Vec<(abi::FrontendKey, abi::Frontend)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledSet {
    pub name: SetName,
    pub id: u32,
    /// Their ids are distinct and not 0, but in tables that an interrupted run
    /// has left.
    pub slots: Vec<abi::Backend>,
    /// They have an id, and no slot.
    pub draining: Vec<abi::Backend>,
    pub ranges: Vec<Range>,
}

impl InstalledSet {
    /// All backends with an id.
    pub fn backends(&self) -> impl Iterator<Item = &abi::Backend> {
        self.slots.iter().chain(&self.draining).filter(|b| b.id != 0)
    }
}

impl Installed {
    pub fn counts(&self) -> Counts {
        let mut out = Counts { frontends: self.frontends.len(), ..Counts::default() };
        for set in &self.sets {
            out.slots += set.slots.len();
            out.backends += set.slots.len() + set.draining.len();
            out.ranges += set.ranges.len();
        }
        out
    }

    pub fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.frontends.is_empty()
    }
}

/// The entries that `new` has and `old` has not.
pub fn growth(old: &Installed, new: &Installed) -> Counts {
    let mut out = Counts::default();
    let keys: HashSet<_> = old.frontends.iter().map(|f| f.0).collect();
    out.frontends = new.frontends.iter().filter(|f| !keys.contains(&f.0)).count();
    let ids: HashSet<u32> = old.sets.iter().flat_map(InstalledSet::backends).map(|b| b.id).collect();
    let all = new.sets.iter().flat_map(InstalledSet::backends);
    out.backends = all.filter(|b| !ids.contains(&b.id)).count();
    for set in &new.sets {
        let was = old.sets.iter().find(|s| s.id == set.id);
        out.slots += set.slots.len().saturating_sub(was.map_or(0, |w| w.slots.len()));
        out.ranges += set.ranges.iter().filter(|r| !was.is_some_and(|w| w.ranges.contains(r))).count();
    }
    out
}

/// Both kinds of numbers.
pub struct Numbers {
    pub sets: Ids,
    pub backends: Ids,
}

/// What is wanted, placed where it was; `owned` says which of its frontends the
/// Service has, by their place in the list. On failure all numbers are taken back.
pub fn place(
    wanted: &Wanted,
    owned: impl Fn(usize) -> bool,
    old: &Installed,
    numbers: &mut Numbers,
) -> Result<Installed, Exhausted> {
    let mut given = Given::default();
    let placed = place_with(wanted, owned, old, numbers, &mut given);
    if placed.is_err() {
        given.sets.into_iter().for_each(|id| numbers.sets.take_back(id));
        given.backends.into_iter().for_each(|id| numbers.backends.take_back(id));
    }
    placed
}

#[derive(Default)]
struct Given {
    sets: Vec<u32>,
    backends: Vec<u32>,
}

fn place_with(
    wanted: &Wanted,
    owned: impl Fn(usize) -> bool,
    old: &Installed,
    numbers: &mut Numbers,
    given: &mut Given,
) -> Result<Installed, Exhausted> {
    let mut out = Installed::default();
    // A set that no frontend names need not be.
    let mut at: Vec<Option<usize>> = vec![None; wanted.sets.len()];
    for (_, frontend) in wanted.frontends.iter().enumerate().filter(|(i, _)| owned(*i)) {
        let place = match at[frontend.set] {
            Some(place) => place,
            None => {
                let set = &wanted.sets[frontend.set];
                let before = old.sets.iter().find(|s| s.name == set.name);
                out.sets.push(place_set(set, before, numbers, given)?);
                at[frontend.set] = Some(out.sets.len() - 1);
                out.sets.len() - 1
            }
        };
        let set = &out.sets[place];
        let value = abi::Frontend {
            set: set.id,
            count: u32::try_from(set.slots.len()).unwrap_or(u32::MAX),
            flags: frontend.flags,
            affinity_seconds: frontend.affinity_seconds,
        };
        out.frontends.push((frontend.key, value));
    }
    Ok(out)
}

fn place_set(
    wanted: &WantedSet,
    old: Option<&InstalledSet>,
    numbers: &mut Numbers,
    given: &mut Given,
) -> Result<InstalledSet, Exhausted> {
    let id = match old {
        Some(old) => old.id,
        None => {
            let id = numbers.sets.give()?;
            given.sets.push(id);
            id
        }
    };
    let mut ids: HashMap<(abi::Addr, u16), u32> = HashMap::new();
    if let Some(old) = old {
        ids.extend(old.backends().map(|b| ((b.addr, b.port), b.id)));
    }
    let slots = arrange(&wanted.slots, old.map_or(&[], |o| &o.slots), |target| {
        let id = match ids.get(&(target.addr, target.port)) {
            Some(id) => *id,
            None => {
                let id = numbers.backends.give()?;
                given.backends.push(id);
                id
            }
        };
        Ok(backend(target, id, 0))
    })?;
    let kept = wanted.kept.iter().filter_map(|target| {
        let id = ids.get(&(target.addr, target.port))?;
        Some(backend(target, *id, abi::BACKEND_DRAINING))
    });
    Ok(InstalledSet {
        name: wanted.name,
        id,
        slots,
        draining: kept.collect(),
        ranges: wanted.ranges.iter().map(|net| Range::new(id, net)).collect(),
    })
}

fn backend(target: &Target, id: u32, flags: u16) -> abi::Backend {
    let local = if target.local { abi::BACKEND_LOCAL } else { 0 };
    abi::Backend { addr: target.addr, port: target.port, flags: local | flags, id }
}

/// The targets in the places that they had; the others fill the gaps, then the
/// end; a gap that is left takes the last.
fn arrange(
    targets: &[Target],
    old: &[abi::Backend],
    mut make: impl FnMut(&Target) -> Result<abi::Backend, Exhausted>,
) -> Result<Vec<abi::Backend>, Exhausted> {
    if old.is_empty() {
        return targets.iter().map(make).collect();
    }
    let mut waiting: HashMap<(abi::Addr, u16), &Target> = targets.iter().map(|t| ((t.addr, t.port), t)).collect();
    let mut places: Vec<Option<abi::Backend>> = Vec::with_capacity(old.len().max(targets.len()));
    for before in old {
        // Taken out, so that one that is there twice has one place.
        let still = waiting.remove(&(before.addr, before.port));
        places.push(still.map(&mut make).transpose()?);
    }
    let mut fresh = targets.iter().filter(|t| waiting.contains_key(&(t.addr, t.port)));
    for place in places.iter_mut().filter(|p| p.is_none()) {
        let Some(target) = fresh.next() else { break };
        *place = Some(make(target)?);
    }
    for target in fresh {
        places.push(Some(make(target)?));
    }
    let mut out: Vec<abi::Backend> = Vec::with_capacity(targets.len());
    let mut at = 0;
    while at < places.len() {
        match places[at] {
            Some(backend) => out.push(backend),
            None => {
                while places.len() > at && places[places.len() - 1].is_none() {
                    places.pop();
                }
                let Some(last) = places.pop().flatten().filter(|_| places.len() >= at) else { break };
                out.push(last);
            }
        }
        at += 1;
    }
    Ok(out)
}
