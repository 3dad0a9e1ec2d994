//! What an earlier run has left in the pinned maps, until it is somebody's.
//!
//! Pure. A Service is known by its frontends, a set by the frontends that name
//! it, a backend by its set and address: what is recognised keeps its numbers
//! and is changed in place; what nobody wants is deleted once all Services are
//! known, and not before.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use fairway_ebpf_abi as abi;

use super::claims::{Claims, Identity};
use super::compile::{Wanted, WantedSet};
use super::diff::{BACKEND_MARK, SET_MARK, Writes, dismiss};
use super::maps::{Counts, Gone, Tables};
use super::model::Range;
use super::place::{Installed, InstalledSet, Numbers};

#[derive(Debug, Default)]
pub struct Adopted {
    frontends: HashMap<abi::FrontendKey, abi::Frontend>,
    /// All frontends that named a set, whoever has them by now.
    named_by: HashMap<u32, Vec<abi::FrontendKey>>,
    slots: HashMap<u32, BTreeMap<u32, abi::Backend>>,
    backends: HashMap<u32, abi::Backend>,
    /// Of those in no slot.
    draining: HashMap<(abi::Addr, u16), Vec<u32>>,
    ranges: HashMap<u32, Vec<Range>>,
    taken: HashSet<u32>,
}

impl Adopted {
    /// Take the tables up; numbers go on where they were.
    pub fn new(tables: Tables, numbers: &mut Numbers) -> Self {
        let mut out = Self::default();
        let mark = |key| tables.slots.get(&key).map(|b: &abi::Backend| b.id).unwrap_or_default();
        let (backend_mark, set_mark) = (mark(BACKEND_MARK), mark(SET_MARK));
        for (key, value) in tables.frontends {
            out.named_by.entry(value.set).or_default().push(key);
            out.frontends.insert(key, value);
        }
        let mut slotted = HashSet::new();
        for (key, backend) in tables.slots.into_iter().filter(|(k, _)| k.set != abi::SET_NONE) {
            slotted.insert(backend.id);
            out.slots.entry(key.set).or_default().insert(key.slot, backend);
        }
        for (id, mut backend) in tables.backends {
            backend.id = id;
            if !slotted.contains(&id) {
                out.draining.entry((backend.addr, backend.port)).or_default().push(id);
            }
            out.backends.insert(id, backend);
        }
        for range in tables.ranges {
            out.ranges.entry(range.set()).or_default().push(range);
        }
        numbers.sets.resume(set_mark, out.named_by.keys().chain(out.slots.keys()).chain(out.ranges.keys()).copied());
        numbers.backends.resume(backend_mark, out.backends.keys().copied().chain(slotted));
        out
    }

    pub fn counts(&self) -> Counts {
        Counts {
            frontends: self.frontends.len(),
            slots: self.slots.values().map(BTreeMap::len).sum(),
            backends: self.backends.len(),
            ranges: self.ranges.values().map(Vec::len).sum(),
        }
    }

    /// What of it is this Service's, taken out.
    pub fn take(&mut self, wanted: &Wanted, by: &Identity, claims: &Claims, numbers: &mut Numbers) -> Installed {
        let mut out = Installed::default();
        for (i, set) in wanted.sets.iter().enumerate() {
            let own = wanted.frontends.iter().filter(|f| f.set == i && claims.owns(&f.key, by));
            let keys: BTreeSet<abi::FrontendKey> = own.map(|f| f.key).collect();
            let named: Vec<u32> = keys.iter().filter_map(|k| self.frontends.get(k)).map(|f| f.set).collect();
            let free = named.iter().find(|id| self.is_only_of(**id, &keys, claims)).copied();
            let id = match free {
                Some(id) => id,
                None if named.is_empty() => continue,
                // Someone else is named by it too: leave it, keep the backends.
                None => match numbers.sets.give() {
                    Ok(id) => id,
                    Err(_) => continue,
                },
            };
            let mut taken = InstalledSet { name: set.name, id, slots: vec![], draining: vec![], ranges: vec![] };
            match free {
                Some(id) => self.take_set(id, set, &mut taken),
                None => named.iter().for_each(|id| self.take_backends(*id, set, &mut taken)),
            }
            out.sets.push(taken);
        }
        let own = wanted.frontends.iter().filter(|f| claims.owns(&f.key, by));
        out.frontends = own.filter_map(|f| Some((f.key, self.frontends.remove(&f.key)?))).collect();
        out
    }

    /// A set may be changed in place when nobody else reads it.
    fn is_only_of(&self, id: u32, keys: &BTreeSet<abi::FrontendKey>, claims: &Claims) -> bool {
        let named = self.named_by.get(&id).map_or(&[][..], Vec::as_slice);
        id != abi::SET_NONE
            && !self.taken.contains(&id)
            && named.iter().all(|k| keys.contains(k) || claims.owner(k).is_none())
    }

    fn take_set(&mut self, id: u32, wanted: &WantedSet, to: &mut InstalledSet) {
        self.taken.insert(id);
        let slots = self.slots.remove(&id).unwrap_or_default();
        for (slot, backend) in slots {
            // Slots beyond a hole cannot be counted; a hole is a place to fill.
            let slot = usize::try_from(slot).unwrap_or(usize::MAX);
            if slot > 2 * (to.slots.len() + 1024) {
                self.slots.entry(id).or_default().insert(u32::try_from(slot).unwrap_or(u32::MAX), backend);
                continue;
            }
            to.slots.resize(slot, abi::Backend::default());
            // Only one that flows can go on with is known by its id; where the
            // two tables disagree the slot is written anew.
            let same = |b: &abi::Backend| (b.addr, b.port) == (backend.addr, backend.port);
            let known = self.backends.get(&backend.id).copied().filter(same);
            if let Some(known) = known {
                self.backends.remove(&known.id);
                to.draining.extend((known != backend).then_some(known));
            }
            to.slots.push(if known == Some(backend) { backend } else { abi::Backend::default() });
        }
        to.ranges = self.ranges.remove(&id).unwrap_or_default();
        self.take_draining(wanted, to);
    }

    fn take_draining(&mut self, wanted: &WantedSet, to: &mut InstalledSet) {
        let known: HashSet<(abi::Addr, u16)> = to.backends().map(|b| (b.addr, b.port)).collect();
        let others = wanted.slots.iter().chain(&wanted.kept).filter(|t| !known.contains(&(t.addr, t.port)));
        for target in others {
            let Some(ids) = self.draining.get_mut(&(target.addr, target.port)) else { continue };
            while let Some(id) = ids.pop() {
                if let Some(backend) = self.backends.remove(&id) {
                    to.draining.push(backend);
                    break;
                }
            }
        }
    }

    /// The ids of backends that are wanted still, for a set with a new number.
    fn take_backends(&mut self, id: u32, wanted: &WantedSet, to: &mut InstalledSet) {
        let slots = self.slots.get(&id).cloned().unwrap_or_default();
        let targets: HashSet<(abi::Addr, u16)> = wanted.slots.iter().map(|t| (t.addr, t.port)).collect();
        for backend in slots.into_values().filter(|b| targets.contains(&(b.addr, b.port))) {
            if let Some(known) = self.backends.remove(&backend.id) {
                to.draining.push(known);
            }
        }
        self.take_draining(wanted, to);
    }

    /// Nobody's: to be deleted. Sets that a frontend still names are left alone:
    /// its Service could not be moved off them.
    pub fn leave(&self, named: &HashSet<u32>, kept: impl Fn(&abi::FrontendKey) -> bool, to: &mut Writes) {
        dismiss(self.frontends.keys().copied(), kept, to);
        let mut used: HashSet<u32> = HashSet::new();
        let own: HashSet<abi::SlotKey> = to.put_slots.iter().map(|(k, _)| *k).collect();
        for (set, slots) in &self.slots {
            if named.contains(set) && !self.taken.contains(set) {
                used.extend(slots.values().map(|b| b.id));
                continue;
            }
            let keys = slots.keys().map(|slot| abi::SlotKey { set: *set, slot: *slot });
            to.delete_slots.extend(keys.filter(|k| !own.contains(k)));
        }
        let ranges = self.ranges.iter().filter(|(set, _)| !named.contains(set));
        to.delete_ranges.extend(ranges.flat_map(|(_, ranges)| ranges));
        for (id, backend) in self.backends.iter().filter(|(id, _)| !used.contains(id)) {
            to.delete_backends.push(*id);
            to.gone.push(Gone { protocol: None, backend: *backend });
        }
    }

    /// The numbers of what has been deleted.
    pub fn take_back(self, named: &HashSet<u32>, numbers: &mut Numbers) {
        let sets = self.named_by.keys().chain(self.slots.keys()).chain(self.ranges.keys());
        sets.filter(|id| !self.taken.contains(id) && !named.contains(id)).for_each(|id| numbers.sets.take_back(*id));
        let slots = self.slots.iter().filter(|(set, _)| named.contains(set));
        let used: HashSet<u32> = slots.flat_map(|(_, slots)| slots.values().map(|b| b.id)).collect();
        let gone = self.backends.keys().filter(|id| !used.contains(id));
        gone.for_each(|id| numbers.backends.take_back(*id));
    }
}
