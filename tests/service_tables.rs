//! Promise: the tables say what the rules of Services say, after any history of
//! changes, restarts and interruptions, and a reader is safe between any two
//! writes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "service_support/mod.rs"]
mod support;

use std::collections::BTreeSet;

use fairway::service::maps::{Chunk, Counts, MemoryMaps, Tables};
use fairway::service::problem::Reason;
use fairway::service::sync::Syncer;
use fairway_ebpf_abi as abi;
use proptest::prelude::*;
use support::oracle::{Answer, Question, ask};
use support::reader::{Ids, Op, Recorder, key, places, resolve};
use support::world::{Edit, NODE_PORTS, PORTS, PROTOCOLS, World, edit, frontend_addresses};

fn questions() -> impl Iterator<Item = Question> {
    let ports = PORTS.into_iter().chain(NODE_PORTS);
    frontend_addresses().into_iter().flat_map(move |addr| {
        ports.clone().flat_map(move |port| {
            PROTOCOLS
                .into_iter()
                .flat_map(move |protocol| [false, true].map(|outside| Question { outside, addr, port, protocol }))
        })
    })
}

/// What the tables answer, in the oracle's words; the Service is not in them.
fn read(t: &Tables, q: &Question) -> Option<Answer> {
    let backends = resolve(t, &key(q)).unwrap()?;
    let f = t.frontends[&key(q)];
    let local: Vec<_> = backends.iter().copied().filter(|b| b.flags & abi::BACKEND_LOCAL != 0).collect();
    let has = |flag| f.flags & flag != 0;
    let ranges = t.ranges.iter().filter(|r| r.set() == f.set).map(|r| {
        let bits = if r.key.addr.is_v4() { r.prefix - 128 } else { r.prefix - 32 };
        format!("{}/{bits}", std::net::IpAddr::from(r.key.addr))
    });
    assert_eq!(places(&backends).len(), backends.len(), "a backend is there twice: {q:?}");
    Some(Answer {
        service: String::new(),
        backends: places(&backends),
        local_here: places(&local),
        silent: has(abi::FRONTEND_SILENT),
        keeps_source: has(abi::FRONTEND_LOCAL),
        affinity: has(abi::FRONTEND_AFFINITY).then_some(f.affinity_seconds),
        ranges: has(abi::FRONTEND_RANGES).then(|| ranges.collect()),
    })
}

#[track_caller]
fn agree(w: &World, t: &Tables) {
    let mut known = 0;
    for q in questions() {
        let wanted = ask(w, &q).map(|a| Answer { service: String::new(), ..a });
        assert_eq!(read(t, &q), wanted, "{q:?}");
        known += usize::from(wanted.is_some());
    }
    assert_eq!(t.frontends.len(), known, "frontends that nobody asks for: {:?}", t.frontends);
    // Nothing is left over.
    for slot in t.slots.keys().filter(|k| k.set != abi::SET_NONE) {
        assert!(t.frontends.values().any(|f| f.set == slot.set && slot.slot < f.count), "{slot:?} is nobody's");
    }
    for range in &t.ranges {
        assert!(t.frontends.values().any(|f| f.set == range.set()), "{range:?} is nobody's");
    }
    let slotted: BTreeSet<u32> = t.slots.values().map(|b| b.id).collect();
    for (id, b) in &t.backends {
        assert_eq!(b.flags & abi::BACKEND_DRAINING == 0, slotted.contains(id), "{b:?}");
    }
}

fn open(maps: MemoryMaps, w: &World) -> Syncer<Recorder> {
    let mut syncer = Syncer::open(Recorder { maps, log: Vec::new() }).unwrap();
    syncer.book.set_node(w.node.clone().into());
    syncer.sync(w.names(), w).unwrap();
    syncer
}

/// Between any two writes a reader finds a backend of before or of after.
#[track_caller]
fn readers_are_safe(before: &Tables, log: &[Op], after: &Tables) {
    let was: Vec<_> = questions().map(|q| resolve(before, &key(&q)).unwrap()).collect();
    let will: Vec<_> = questions().map(|q| resolve(after, &key(&q)).unwrap()).collect();
    let mut t = before.clone();
    for (i, op) in log.iter().enumerate() {
        op.apply(&mut t);
        for (n, q) in questions().enumerate() {
            let now = resolve(&t, &key(&q)).unwrap_or_else(|e| panic!("after write {i}, {op:?}: {e}"));
            let (Some(was), Some(will)) = (&was[n], &will[n]) else { continue };
            if was.is_empty() || will.is_empty() {
                continue;
            }
            let now = now.unwrap_or_else(|| panic!("after write {i}, {op:?}: {q:?} is gone for a moment"));
            assert!(!now.is_empty(), "after write {i}, {op:?}: {q:?} is empty for a moment");
        }
    }
    assert_eq!(t, *after);
}

/// Places of ids that flows may know: those that are wanted before and after.
fn stable(before: &Tables, after: &Tables, q: &Question) {
    let (Ok(Some(was)), Ok(Some(is))) = (resolve(before, &key(q)), resolve(after, &key(q))) else { return };
    let (f, g) = (before.frontends[&key(q)], after.frontends[&key(q)]);
    if f.set != g.set {
        return;
    }
    for b in &was {
        for c in is.iter().filter(|c| (c.addr, c.port) == (b.addr, b.port)) {
            assert_eq!(b.id, c.id, "{q:?}: a backend that stays has another id");
        }
    }
    // Of those that stay, none moves but into a gap.
    let moved = was.iter().zip(&is).filter(|(b, c)| b.id != c.id && was.iter().any(|d| d.id == c.id)).count();
    let removed = was.iter().filter(|b| !is.iter().any(|c| c.id == b.id)).count();
    assert!(moved <= removed, "{q:?}: {moved} moved for {removed} that went");
}

#[derive(Clone, Debug)]
enum Step {
    Edits(Vec<Edit>),
    /// The agent starts anew, with edits that it has not seen.
    Restart(Vec<Edit>),
    /// It died while writing these; so much of it was done.
    Crash(Vec<Edit>, prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let edits = || prop::collection::vec(edit(), 1..4);
    let step = prop_oneof![
        6 => edits().prop_map(Step::Edits),
        1 => edits().prop_map(Step::Restart),
        1 => (edits(), any::<prop::sample::Index>()).prop_map(|(e, i)| Step::Crash(e, i)),
    ];
    let first = prop::collection::vec(edit(), 5..20).prop_map(Step::Edits);
    (first, prop::collection::vec(step, 0..10)).prop_map(|(first, rest)| [vec![first], rest].concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, ..ProptestConfig::default() })]

    #[test]
    fn the_tables_say_what_the_rules_say_whatever_happened(steps in steps()) {
        let mut w = World::new();
        let mut syncer = open(MemoryMaps::default(), &w);
        let mut ids = Ids::default();
        for step in steps {
            let before = syncer.maps.maps.tables.clone();
            syncer.maps.log.clear();
            let (edits, restart, crash) = match step {
                Step::Edits(edits) => (edits, false, None),
                Step::Restart(edits) => (edits, true, None),
                Step::Crash(edits, at) => (edits, false, Some(at)),
            };
            let dirty: BTreeSet<_> = edits.iter().flat_map(|e| w.edit(e)).collect();
            if restart {
                let maps = std::mem::take(&mut syncer.maps.maps);
                syncer = open(maps, &w);
            } else {
                syncer.book.set_node(w.node.clone().into());
                syncer.sync(dirty, &w).unwrap();
            }
            agree(&w, &syncer.maps.maps.tables);
            readers_are_safe(&before, &syncer.maps.log, &syncer.maps.maps.tables);
            if crash.is_none() {
                ids.check(&syncer.maps.maps.tables);
            }
            questions().for_each(|q| stable(&before, &syncer.maps.maps.tables, &q));
            if let Some(at) = crash {
                let mut torn = before.clone();
                let log = &syncer.maps.log;
                let done = if log.is_empty() { 0 } else { at.index(log.len()) };
                log[..done].iter().for_each(|op| op.apply(&mut torn));
                let maps = MemoryMaps { tables: torn.clone(), ..MemoryMaps::default() };
                syncer = open(maps, &w);
                agree(&w, &syncer.maps.maps.tables);
                readers_are_safe(&torn, &syncer.maps.log, &syncer.maps.maps.tables);
                ids.check(&torn);
                ids.check(&syncer.maps.maps.tables);
            }
            // From scratch it is the same, in as many entries.
            let fresh = open(MemoryMaps::default(), &w);
            agree(&w, &fresh.maps.maps.tables);
            prop_assert_eq!(syncer.book.claims().len(), fresh.book.claims().len());
            prop_assert_eq!(syncer.book.used(), counts(&syncer.maps.maps));
        }
    }

    /// Too little room, and a kernel that does not take one of the addresses.
    #[test]
    fn those_that_cannot_be_had_leave_the_others_whole(
        steps in steps(),
        room in (4usize..40, 4usize..60, 4usize..60, 1usize..6),
        picky in any::<bool>(),
    ) {
        let mut w = World::new();
        let capacity = Counts { frontends: room.0, slots: room.1, backends: room.2, ranges: room.3 };
        let refuse: fn(&Chunk<'_>, usize) -> bool =
            |chunk, i| matches!(chunk, Chunk::PutBackends(c) if c[i].addr.octets6()[15] == 3);
        let refuse = picky.then_some(refuse);
        let mut syncer = open(MemoryMaps { capacity, refuse, ..MemoryMaps::default() }, &w);
        for step in steps {
            let mut t = syncer.maps.maps.tables.clone();
            syncer.maps.log.clear();
            let (edits, restart) = match step {
                Step::Edits(edits) => (edits, false),
                Step::Restart(edits) | Step::Crash(edits, _) => (edits, true),
            };
            let dirty: BTreeSet<_> = edits.iter().flat_map(|e| w.edit(e)).collect();
            if restart {
                let maps = std::mem::take(&mut syncer.maps.maps);
                syncer = open(maps, &w);
            } else {
                syncer.book.set_node(w.node.clone().into());
                syncer.sync(dirty, &w).unwrap();
            }
            let unwell: BTreeSet<String> = syncer
                .book
                .problems()
                .filter(|p| p.reason != Reason::Conflict)
                .map(|p| p.about.to_string())
                .collect();
            for q in questions() {
                match ask(&w, &q) {
                    Some(wanted) if unwell.contains(&wanted.service) => {}
                    wanted => {
                        let wanted = wanted.map(|a| Answer { service: String::new(), ..a });
                        prop_assert_eq!(read(&syncer.maps.maps.tables, &q), wanted, "{:?}", q);
                    }
                }
            }
            // The kernel may have refused an entry that is in the log.
            if !picky {
                prop_assert!(syncer.book.problems().all(|p| p.reason != Reason::Refused));
                for op in &syncer.maps.log {
                    op.apply(&mut t);
                    questions().for_each(|q| drop(resolve(&t, &key(&q)).unwrap()));
                }
            }
        }
    }

    #[test]
    fn from_any_tables_the_wanted_ones_are_reached(
        edits in prop::collection::vec(edit(), 0..12),
        garbage in prop::collection::vec((0usize..1000, 0u32..6, 0u32..4, 0u32..6, 0u16..4, 0u8..6), 0..40),
    ) {
        let mut w = World::new();
        edits.iter().for_each(|e| drop(w.edit(e)));
        let all: Vec<_> = questions().collect();
        let mut tables = Tables::default();
        for (n, set, slot, id, flags, addr) in garbage {
            let backend = abi::Backend {
                addr: std::net::IpAddr::from([10, 1, 0, addr + 1]).into(),
                port: 8080u16.to_be(),
                flags,
                id,
            };
            match n % 4 {
                0 => drop(tables.frontends.insert(key(&all[n % all.len()]), abi::Frontend { set, count: slot, flags: 0, affinity_seconds: 0 })),
                1 => drop(tables.slots.insert(abi::SlotKey { set: set + 1, slot }, backend)),
                2 => drop(tables.backends.insert(id + 1, backend)),
                _ => drop(tables.ranges.insert(fairway::service::model::Range::new(set, &"10.0.0.0/8".parse().unwrap()))),
            }
        }
        let maps = MemoryMaps { tables, ..MemoryMaps::default() };
        let mut syncer = open(maps, &w);
        agree(&w, &syncer.maps.maps.tables);
        prop_assert_eq!(syncer.book.used(), counts(&syncer.maps.maps));
        syncer.maps.log.clear();
        syncer.sync(w.names(), &w).unwrap();
        prop_assert!(syncer.maps.log.is_empty(), "nothing has changed: {:?}", syncer.maps.log);
    }
}

/// Less the marks, which are not counted.
fn counts(maps: &MemoryMaps) -> fairway::service::maps::Counts {
    let mut counts = maps.counts();
    counts.slots -= maps.tables.slots.keys().filter(|k| k.set == abi::SET_NONE).count();
    counts
}
