//! Promise: a change costs what it changes, at any number of Services; and one
//! Service that cannot be had leaves all others alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use fairway::service::book::{Input, Source};
use fairway::service::index::{Index, Kind};
use fairway::service::maps::{Chunk, Counts, MemoryMaps};
use fairway::service::model::{Endpoint, NodeFacts, Protocol, Service, ServiceName, ServicePort, Slice, SlicePort};
use fairway::service::problem::Reason;
use fairway::service::sync::Syncer;
use fairway_ebpf_abi as abi;

fn name(n: u32) -> ServiceName {
    ServiceName::new("default", format!("s{n:06}"))
}

fn address(net: u32, n: u32) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::from(net + n))
}

fn service(n: u32, ports: u16) -> Service {
    let port = |p| ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80 + p, node_port: None };
    Service {
        created: i64::from(n),
        cluster_ips: [address(0x0a60_0000, n)].into(),
        ports: (0..ports).map(port).collect(),
        ..Service::default()
    }
}

fn slice(n: u32, endpoints: u32) -> Slice {
    let endpoint = |e| Endpoint {
        addr: address(0x0b00_0000, n * 1000 + e),
        ready: true,
        serving: true,
        terminating: false,
        node: Some("n2".into()),
        hints: None,
    };
    Slice {
        v6: false,
        ports: [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        endpoints: (0..endpoints).map(endpoint).collect(),
    }
}

/// So many Services of so many endpoints each.
fn filled(services: u32, endpoints: u32) -> Index {
    let index = Index::default();
    index.list_begins(Kind::Services);
    index.list_begins(Kind::Slices);
    for n in 0..services {
        index.service(name(n), Some(service(n, 1)));
        index.slice(ServiceName::new("default", format!("s{n}-x")), Some((name(n), slice(n, endpoints))));
    }
    index.list_ends(Kind::Services);
    index.list_ends(Kind::Slices);
    index
}

fn synced(index: &Index, maps: MemoryMaps) -> Syncer<MemoryMaps> {
    let mut syncer = Syncer::open(maps).unwrap();
    syncer.book.set_node(Arc::new(NodeFacts { name: "n1".into(), ..NodeFacts::default() }));
    syncer.sync(index.take_dirty().names, index).unwrap();
    syncer
}

#[test]
fn one_endpoint_more_at_ten_thousand_services_is_three_entries() {
    let index = filled(10_000, 4);
    let mut syncer = synced(&index, MemoryMaps::default());
    assert_eq!(syncer.maps.counts(), Counts { frontends: 10_000, slots: 40_002, backends: 40_000, ranges: 0 });
    index.slice(ServiceName::new("default", "s5000-x"), Some((name(5000), slice(5000, 5))));
    let began = Instant::now();
    let done = syncer.sync(index.take_dirty().names, &index).unwrap();
    let took = began.elapsed();
    assert_eq!((done.compiled, done.written), (1, 3), "a backend, a slot, a count");
    // One fewer: count, slot, backend.
    index.slice(ServiceName::new("default", "s5000-x"), Some((name(5000), slice(5000, 4))));
    let done = syncer.sync(index.take_dirty().names, &index).unwrap();
    assert_eq!((done.compiled, done.written), (1, 3));
    assert_eq!(syncer.gone.len(), 1);
    println!("one endpoint at 10,000 Services: {} µs to compile, compare and write", took.as_micros());
}

fn resident_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Maps that only count: what the kernel keeps is not the agent's memory.
struct Sink(Counts, usize);

impl fairway::service::maps::ServiceMaps for Sink {
    fn read_all(&mut self) -> Result<fairway::service::maps::Tables, fairway::service::maps::ReadFailed> {
        Ok(fairway::service::maps::Tables::default())
    }
    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), fairway::service::maps::WriteFailed> {
        self.1 += chunk.len();
        Ok(())
    }
    fn capacity(&self) -> Counts {
        self.0
    }
}

#[test]
fn a_hundred_thousand_endpoints_are_compiled_and_compared_within_a_second() {
    // The larger one says nothing of code that is not optimised, slowly.
    let sizes = [(10_000, 4), (25_000, 4)];
    for (services, endpoints) in sizes.into_iter().take(if cfg!(debug_assertions) { 1 } else { 2 }) {
        let empty = resident_mb();
        let index = filled(services, endpoints);
        let known = resident_mb();
        let mut syncer = Syncer::open(Sink(Counts::CAPACITY, 0)).unwrap();
        let dirty = index.take_dirty().names;
        let began = Instant::now();
        syncer.sync(dirty, &index).unwrap();
        let took = began.elapsed();
        let after = resident_mb();
        println!(
            "{services} Services x {endpoints}: {} ms to compile and compare, {} entries; {:.1} MB of objects, {:.1} MB of books",
            took.as_millis(),
            syncer.maps.1,
            known - empty,
            after - known,
        );
        assert!(cfg!(debug_assertions) || took.as_millis() < 1000);
    }
}

/// A world that is edited in place.
#[derive(Default)]
struct Small(RefCell<BTreeMap<ServiceName, Input>>);

impl Small {
    fn put(&self, n: u32, ports: u16, endpoints: u32) -> ServiceName {
        let input = Input { service: Some(Arc::new(service(n, ports))), slices: vec![Arc::new(slice(n, endpoints))] };
        self.0.borrow_mut().insert(name(n), input);
        name(n)
    }
    fn names(&self) -> Vec<ServiceName> {
        self.0.borrow().keys().cloned().collect()
    }
}

impl Source for Small {
    fn get(&self, name: &ServiceName) -> Input {
        self.0.borrow().get(name).cloned().unwrap_or_default()
    }
}

fn slots_of(maps: &MemoryMaps, n: u32) -> Option<u32> {
    let frontends = maps.tables.frontends.iter();
    frontends.filter(|(k, _)| IpAddr::from(k.addr) == address(0x0a60_0000, n)).map(|(_, f)| f.count).next()
}

#[test]
fn a_full_table_is_a_problem_of_the_service_that_does_not_fit() {
    let capacity = Counts { frontends: 10, slots: 12, backends: 10, ranges: 10 };
    let w = Small::default();
    (0..3).for_each(|n| drop(w.put(n, 1, 3)));
    let mut syncer = Syncer::open(MemoryMaps { capacity, ..MemoryMaps::default() }).unwrap();
    syncer.sync(w.names(), &w).unwrap();
    // Nine of ten: two more do not fit, neither as a new Service nor as an old one's.
    let before = syncer.maps.tables.clone();
    let dirty = [w.put(3, 1, 2), w.put(0, 1, 5)];
    syncer.sync(dirty, &w).unwrap();
    let problems: Vec<_> = syncer.book.problems().map(|p| (p.about.clone(), p.reason)).collect();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems.iter().all(|(_, reason)| *reason == Reason::TableFull));
    assert_eq!(syncer.maps.tables.frontends, before.frontends, "the others, and what there was, are untouched");
    // Room comes free, and is taken.
    let dirty = [w.put(1, 1, 0)];
    syncer.sync(dirty, &w).unwrap();
    assert_eq!(slots_of(&syncer.maps, 1), Some(0));
    let served = [slots_of(&syncer.maps, 0), slots_of(&syncer.maps, 3)];
    assert!(served == [Some(5), Some(2)] || served.contains(&Some(5)) || served.contains(&Some(2)), "{served:?}");
    w.0.borrow_mut().remove(&name(2));
    syncer.sync([name(2)], &w).unwrap();
    assert_eq!([slots_of(&syncer.maps, 0), slots_of(&syncer.maps, 3)], [Some(5), Some(2)]);
    assert_eq!(syncer.book.problems().count(), 0);
}

#[test]
fn when_numbers_run_out_the_others_go_on() {
    let w = Small::default();
    (0..2).for_each(|n| drop(w.put(n, 1, 2)));
    let mut syncer = Syncer::with_limit(MemoryMaps::default(), 5).unwrap();
    syncer.sync(w.names(), &w).unwrap();
    let dirty = w.put(2, 1, 3);
    syncer.sync([dirty.clone()], &w).unwrap();
    assert_eq!(syncer.book.problems_of(&dirty)[0].reason, Reason::IdsExhausted);
    assert_eq!([0, 1, 2].map(|n| slots_of(&syncer.maps, n)), [Some(2), Some(2), None]);
    let smaller = w.put(2, 1, 1);
    syncer.sync([smaller], &w).unwrap();
    assert_eq!(slots_of(&syncer.maps, 2), Some(1), "the numbers of the failed try were taken back");
    assert_eq!(syncer.book.problems().count(), 0);
}

#[test]
fn what_the_kernel_refuses_leaves_the_others_whole() {
    let w = Small::default();
    (0..3).for_each(|n| drop(w.put(n, 1, 3)));
    let mut syncer = Syncer::open(MemoryMaps::default()).unwrap();
    syncer.sync(w.names(), &w).unwrap();
    let before = syncer.maps.counts();
    // No memory for the fourth endpoint of Service 1.
    for table in ["backends", "slots"] {
        syncer.maps.refuse = Some(match table {
            "backends" => {
                |chunk, i| matches!(chunk, Chunk::PutBackends(c) if IpAddr::from(c[i].addr) == address(0x0b00_0000, 1003))
            }
            _ => {
                |chunk, i| matches!(chunk, Chunk::PutSlots(c) if IpAddr::from(c[i].1.addr) == address(0x0b00_0000, 1003))
            }
        });
        let dirty = [w.put(0, 1, 4), w.put(1, 1, 4), w.put(2, 1, 2)];
        syncer.sync(dirty, &w).unwrap();
        assert_eq!([0, 1, 2].map(|n| slots_of(&syncer.maps, n)), [Some(4), Some(3), Some(2)]);
        let problems: Vec<_> = syncer.book.problems().collect();
        assert_eq!((problems.len(), problems[0].reason), (1, Reason::Refused));
        assert!(problems[0].message.contains(table), "{}", problems[0].message);
        assert_eq!(syncer.maps.counts(), before, "nothing of the refused change stays");
        // The kernel thinks better of it.
        syncer.maps.refuse = None;
        syncer.retry(&w).unwrap();
        assert_eq!(slots_of(&syncer.maps, 1), Some(4));
        assert_eq!(syncer.book.problems().count(), 0);
        let back = [w.put(0, 1, 3), w.put(1, 1, 3), w.put(2, 1, 3)];
        syncer.sync(back, &w).unwrap();
    }
}

#[test]
fn the_last_takes_the_place_of_one_that_leaves_and_a_new_one_before_it() {
    let w = Small::default();
    let mut syncer = Syncer::open(MemoryMaps::default()).unwrap();
    let mut order = |endpoints: &[u32]| -> Vec<u32> {
        let mut slice = slice(0, 10);
        slice.endpoints = endpoints.iter().map(|e| slice.endpoints[*e as usize].clone()).collect();
        let input = Input { service: Some(Arc::new(service(0, 1))), slices: vec![Arc::new(slice)] };
        w.0.borrow_mut().insert(name(0), input);
        syncer.sync([name(0)], &w).unwrap();
        let slots = syncer.maps.tables.slots.iter().filter(|(k, _)| k.set != abi::SET_NONE);
        let number = |b: &abi::Backend| (0..10).find(|e| address(0x0b00_0000, *e) == IpAddr::from(b.addr)).unwrap();
        slots.map(|(_, b)| number(b)).collect()
    };
    assert_eq!(order(&[0, 1, 2, 3, 4]), [0, 1, 2, 3, 4]);
    assert_eq!(order(&[0, 2, 3, 4]), [0, 4, 2, 3], "the last fills the gap");
    assert_eq!(order(&[0, 3, 4, 7]), [0, 4, 7, 3], "a new one fills it");
    assert_eq!(order(&[0, 3, 4, 7, 8]), [0, 4, 7, 3, 8], "or is appended");
    assert_eq!(order(&[8]), [8]);
    assert_eq!(order(&[]), [0; 0]);
}

#[test]
fn flows_stay_with_an_endpoint_that_is_merely_unready() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let w = Small::default();
        let put = |change: fn(&mut Endpoint)| {
            let (mut service, mut slice) = (service(0, 1), slice(0, 2));
            service.ports[0].protocol = protocol;
            slice.ports[0].protocol = protocol;
            change(&mut slice.endpoints[0]);
            let input = Input { service: Some(Arc::new(service)), slices: vec![Arc::new(slice)] };
            w.0.borrow_mut().insert(name(0), input);
        };
        let first = |maps: &MemoryMaps| {
            let of = maps.tables.backends.values().find(|b| IpAddr::from(b.addr) == address(0x0b00_0000, 0));
            of.map(|b| (b.id, b.flags & abi::BACKEND_DRAINING != 0))
        };
        put(|_| ());
        let mut syncer = Syncer::open(MemoryMaps::default()).unwrap();
        syncer.sync([name(0)], &w).unwrap();
        let (id, _) = first(&syncer.maps).unwrap();
        let mut step = |change: fn(&mut Endpoint)| {
            put(change);
            syncer.sync([name(0)], &w).unwrap();
            (first(&syncer.maps), slots_of(&syncer.maps, 0), std::mem::take(&mut syncer.gone).len())
        };
        assert_eq!(step(|e| e.ready = false), (Some((id, true)), Some(1), 0), "unready");
        assert_eq!(step(|_| ()), (Some((id, false)), Some(2), 0), "and ready again");
        let finished = step(|e| (e.ready, e.serving, e.terminating) = (false, false, true));
        match protocol {
            // Nobody says that a UDP flow has ended: it must not stay.
            Protocol::Udp => assert_eq!(finished, (None, Some(1), 1)),
            _ => assert_eq!(finished, (Some((id, true)), Some(1), 0), "connections end with the pod"),
        }
        // An agent that starts anew knows whose the id is, although it has no slot.
        put(|e| e.ready = false);
        syncer.sync([name(0)], &w).unwrap();
        let known = first(&syncer.maps);
        let mut anew = Syncer::open(std::mem::take(&mut syncer.maps)).unwrap();
        anew.sync([name(0)], &w).unwrap();
        assert_eq!(first(&anew.maps), known);
    }
}

#[test]
fn a_deletion_that_was_missed_is_made_up_for_by_the_next_list() {
    let index = filled(3, 2);
    let mut syncer = synced(&index, MemoryMaps::default());
    index.list_begins(Kind::Services);
    index.list_begins(Kind::Slices);
    index.service(name(0), Some(service(0, 1)));
    index.service(name(2), Some(service(2, 1)));
    index.slice(ServiceName::new("default", "s0-x"), Some((name(0), slice(0, 2))));
    index.list_ends(Kind::Services);
    index.list_ends(Kind::Slices);
    let dirty = index.take_dirty();
    let mut names: Vec<_> = dirty.names.iter().map(|n| n.name.to_string()).collect();
    names.sort();
    assert_eq!(names, ["s000001", "s000002"], "one lost itself, one its endpoints");
    syncer.sync(dirty.names, &index).unwrap();
    assert_eq!([0, 1, 2].map(|n| slots_of(&syncer.maps, n)), [Some(2), None, Some(0)]);
}

#[test]
fn nothing_is_said_to_have_changed_before_both_lists_are_complete() {
    let index = Index::default();
    index.list_begins(Kind::Services);
    index.list_begins(Kind::Slices);
    index.service(name(0), Some(service(0, 1)));
    index.list_ends(Kind::Services);
    assert!(!index.take_dirty().complete && index.take_dirty().names.is_empty());
    index.list_ends(Kind::Slices);
    let dirty = index.take_dirty();
    assert!(dirty.complete && dirty.names.len() == 1);
}

#[test]
fn an_object_that_cannot_be_leaves_what_was_known_of_it() {
    let index = filled(2, 2);
    let _ = index.take_dirty();
    index.refused(Reason::InvalidService, name(0), "u", "port 0 is no port");
    assert_eq!(index.problems().len(), 1);
    assert!(index.take_dirty().names.is_empty());
    // Also through a new list.
    index.list_begins(Kind::Services);
    index.refused(Reason::InvalidService, name(0), "u", "port 0 is no port");
    index.service(name(1), Some(service(1, 1)));
    index.list_ends(Kind::Services);
    assert!(index.take_dirty().names.is_empty());
    assert!(index.get(&name(0)).service.is_some());
    index.service(name(0), Some(service(0, 1)));
    assert!(index.problems().is_empty());
    // Gone with the object.
    index.refused(Reason::InvalidService, name(1), "u", "port 0 is no port");
    index.list_begins(Kind::Services);
    index.list_ends(Kind::Services);
    assert!(index.problems().is_empty());
    assert_eq!(index.take_dirty().names.len(), 2);
}
