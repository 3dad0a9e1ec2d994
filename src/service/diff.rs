//! From what is in the tables to what should be: the writes, in an order that
//! keeps readers safe.
//!
//! Pure. After any number of these writes, each frontend that counts backends
//! finds each of them in its slot, and its id among the backends: backends are
//! written before slots, slots before the frontends that count them; frontends
//! count less before slots go, and backends go last. The order holds for all
//! Services of a batch together, so that an address can pass from one to
//! another without a gap.

use std::collections::{HashMap, HashSet};

use fairway_ebpf_abi as abi;

use super::maps::{Chunk, Counts, Gone};
use super::model::Range;
use super::place::{Installed, InstalledSet};

/// Where the mark of backends' ids is kept, and that of sets.
pub const BACKEND_MARK: abi::SlotKey = abi::SlotKey { set: abi::SET_NONE, slot: 0 };
pub const SET_MARK: abi::SlotKey = abi::SlotKey { set: abi::SET_NONE, slot: 1 };

/// Writes by phase, in the order of the fields.
#[derive(Clone, Debug, Default)]
pub struct Writes {
    /// Which ids have been given; before any is used.
    pub marks: Vec<(abi::SlotKey, abi::Backend)>,
    pub put_backends: Vec<abi::Backend>,
    pub put_slots: Vec<(abi::SlotKey, abi::Backend)>,
    pub put_ranges: Vec<Range>,
    pub put_frontends: Vec<(abi::FrontendKey, abi::Frontend)>,
    pub delete_frontends: Vec<abi::FrontendKey>,
    pub delete_slots: Vec<abi::SlotKey>,
    pub delete_ranges: Vec<Range>,
    /// Backends that lost their slot but keep their flows.
    pub drain_backends: Vec<abi::Backend>,
    pub delete_backends: Vec<u32>,
    /// What [`Writes::delete_backends`] is about.
    pub gone: Vec<Gone>,
}

impl Writes {
    pub fn mark(&mut self, key: abi::SlotKey, mark: u32) {
        self.marks.push((key, abi::Backend { id: mark, ..abi::Backend::default() }));
    }

    /// All of it, at most `size` entries at a time.
    pub fn chunks(&self, size: usize) -> impl Iterator<Item = Chunk<'_>> {
        let puts = self.marks.chunks(size).map(Chunk::PutSlots);
        let puts = puts.chain(self.put_backends.chunks(size).map(Chunk::PutBackends));
        let puts = puts.chain(self.put_slots.chunks(size).map(Chunk::PutSlots));
        let puts = puts.chain(self.put_ranges.chunks(size).map(Chunk::PutRanges));
        let puts = puts.chain(self.put_frontends.chunks(size).map(Chunk::PutFrontends));
        let ends = self.delete_frontends.chunks(size).map(Chunk::DeleteFrontends);
        let ends = ends.chain(self.delete_slots.chunks(size).map(Chunk::DeleteSlots));
        let ends = ends.chain(self.delete_ranges.chunks(size).map(Chunk::DeleteRanges));
        let ends = ends.chain(self.drain_backends.chunks(size).map(Chunk::PutBackends));
        puts.chain(ends.chain(self.delete_backends.chunks(size).map(Chunk::DeleteBackends)))
    }

    pub fn len(&self) -> usize {
        self.chunks(usize::MAX).map(|c| c.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries that need room, new or not.
    pub fn puts(&self) -> Counts {
        Counts {
            frontends: self.put_frontends.len(),
            slots: self.put_slots.len() + self.marks.len(),
            backends: self.put_backends.len(),
            ranges: self.put_ranges.len(),
        }
    }
}

/// Add the writes that make `new` of `old`, which one Service owns. Frontends
/// that it no longer has are left to [`dismiss`]: another may have them now.
pub fn diff(old: &Installed, new: &Installed, to: &mut Writes) {
    let before: HashMap<u32, &InstalledSet> = old.sets.iter().map(|s| (s.id, s)).collect();
    let after: HashSet<u32> = new.sets.iter().map(|s| s.id).collect();
    // Ids are looked for in all sets: one may follow its backend into another.
    let had: HashMap<u32, &abi::Backend> =
        old.sets.iter().flat_map(InstalledSet::backends).map(|b| (b.id, b)).collect();
    let mut has: HashSet<u32> = HashSet::new();
    for set in &new.sets {
        let was = before.get(&set.id);
        has.extend(set.backends().map(|b| b.id));
        to.put_backends.extend(set.slots.iter().filter(|b| had.get(&b.id) != Some(b)));
        to.drain_backends.extend(set.draining.iter().filter(|b| had.get(&b.id) != Some(b)));
        slots(set, was.map_or(&[], |w| &w.slots), to);
        ranges(&set.ranges, was.map_or(&[], |w| &w.ranges), to);
    }
    for set in old.sets.iter().filter(|s| !after.contains(&s.id)) {
        to.delete_slots.extend((0..set.slots.len()).map(|slot| key(set.id, slot)));
        to.delete_ranges.extend(&set.ranges);
    }
    for set in &old.sets {
        for backend in set.backends() {
            // Two slots have one id where an earlier run was interrupted.
            if has.insert(backend.id) {
                to.delete_backends.push(backend.id);
                to.gone.push(Gone { protocol: Some(set.name.protocol), backend: *backend });
            }
        }
    }
    let known: HashMap<_, _> = old.frontends.iter().map(|(k, v)| (k, v)).collect();
    to.put_frontends.extend(new.frontends.iter().filter(|(k, v)| known.get(k) != Some(&v)));
}

fn key(set: u32, slot: usize) -> abi::SlotKey {
    abi::SlotKey { set, slot: u32::try_from(slot).unwrap_or(u32::MAX) }
}

fn slots(set: &InstalledSet, was: &[abi::Backend], to: &mut Writes) {
    let changed = set.slots.iter().enumerate().filter(|(i, b)| was.get(*i) != Some(b));
    to.put_slots.extend(changed.map(|(i, b)| (key(set.id, i), *b)));
    to.delete_slots.extend((set.slots.len()..was.len()).map(|i| key(set.id, i)));
}

fn ranges(now: &[Range], was: &[Range], to: &mut Writes) {
    if now == was {
        return;
    }
    let (now_set, was_set): (HashSet<_>, HashSet<_>) = (now.iter().collect(), was.iter().collect());
    to.put_ranges.extend(now.iter().filter(|r| !was_set.contains(r)));
    to.delete_ranges.extend(was.iter().filter(|r| !now_set.contains(r)));
}

/// Once all Services of a batch are in: delete the frontends that these had and
/// that nobody has put.
pub fn dismiss(
    dropped: impl Iterator<Item = abi::FrontendKey>,
    kept: impl Fn(&abi::FrontendKey) -> bool,
    to: &mut Writes,
) {
    let put: HashSet<abi::FrontendKey> = to.put_frontends.iter().map(|(k, _)| *k).collect();
    let mut deleted: HashSet<abi::FrontendKey> = HashSet::new();
    for key in dropped {
        if !put.contains(&key) && !kept(&key) && deleted.insert(key) {
            to.delete_frontends.push(key);
        }
    }
}
