//! Promise: flows of the packet path are forgotten when they have ended, at a
//! bounded cost, sooner when room is short; a map that fills up is told.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use fairway::actor::{Actor, ChildPolicy, Ctx, Handle, Handles, Placement, Registry, Responder, Tree};
use fairway::cluster::{self, About, RecordEvent};
use fairway::service::ages::{SECOND, partner};
use fairway::service::maps::{Gone, MemoryMaps};
use fairway::service::status::ServiceSnapshot;
use fairway::service::tend::{EndedSockets, FlowTables, Tended, Tender, Use};
use fairway::service::{Deps, ServiceMap};
use fairway_ebpf_abi::{Addr, EVENT_COUNT, EVENT_TABLE_FULL, FLOW_FORWARD, Flow, FlowKey, Sample};
use parking_lot::Mutex;

const UDP: u8 = 17;
const TCP: u8 = 6;
const BACKEND: u32 = 7;

#[derive(Default)]
struct World {
    flows: BTreeMap<FlowKey, Flow>,
    at: Option<FlowKey>,
    dead: BTreeSet<u32>,
    now: u64,
    full: u64,
    capacity: usize,
    /// Entries read since this was last set to 0.
    read: usize,
    other: usize,
    broken: bool,
}

/// Tables in memory, with a clock that the test turns.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<World>>);

impl FlowTables for Fake {
    fn look(&mut self, room: usize, found: &mut Vec<(FlowKey, Flow)>) -> io::Result<bool> {
        let mut w = self.0.lock();
        if w.broken {
            return Err(io::Error::other("broken"));
        }
        let from = w.at.map_or(Bound::Unbounded, Bound::Excluded);
        found.extend(w.flows.range((from, Bound::Unbounded)).take(room).map(|(k, f)| (*k, *f)));
        w.read += found.len();
        w.at = found.last().map(|(k, _)| *k).filter(|_| found.len() == room);
        Ok(w.at.is_none())
    }
    fn flow(&mut self, key: &FlowKey) -> io::Result<Option<Flow>> {
        Ok(self.0.lock().flows.get(key).copied())
    }
    fn backend_lives(&mut self, id: u32) -> io::Result<bool> {
        Ok(!self.0.lock().dead.contains(&id))
    }
    fn forget(&mut self, keys: &[FlowKey]) -> io::Result<()> {
        self.0.lock().flows.retain(|k, _| !keys.contains(k));
        Ok(())
    }
    fn now(&self) -> u64 {
        self.0.lock().now * SECOND
    }
    fn capacity(&self) -> usize {
        self.0.lock().capacity
    }
    fn events(&mut self) -> io::Result<Vec<u64>> {
        let mut counts = vec![0; EVENT_COUNT as usize];
        counts[EVENT_TABLE_FULL as usize] = self.0.lock().full;
        Ok(counts)
    }
    fn samples(&mut self, _: usize) -> Vec<Sample> {
        Vec::new()
    }
    fn uses(&mut self) -> io::Result<Vec<Use>> {
        let other = self.0.lock().other;
        Ok(vec![Use { map: "namespaces".to_owned(), entries: other, capacity: 100 }])
    }
    fn end_sockets(&mut self, gone: &[Gone]) -> EndedSockets {
        EndedSockets { ended: gone.len() as u64, ..EndedSockets::default() }
    }
}

impl Fake {
    fn of(capacity: usize) -> (Self, Tender) {
        let fake = Self::default();
        fake.0.lock().capacity = capacity;
        (fake.clone(), Tender::new(Box::new(fake)))
    }

    /// Both entries of a flow, last used now.
    fn flow(&self, n: u32, protocol: u8, backend: u32) -> FlowKey {
        let mut w = self.0.lock();
        let v4 = |a, n: u32| Addr::from_octets4([a, (n >> 16) as u8, (n >> 8) as u8, n as u8]);
        let key =
            FlowKey { src: v4(10, n), dst: v4(96, 1), sport: 9, dport: 80, protocol, kind: FLOW_FORWARD, _pad: 0 };
        let to = Flow { last_used: w.now * SECOND, addr: v4(11, backend), port: 8080, backend, ..Flow::default() };
        w.flows.insert(key, to);
        w.flows.insert(partner(&key, &to).unwrap(), Flow { addr: key.dst, port: key.dport, ..to });
        key
    }

    fn len(&self) -> usize {
        self.0.lock().flows.len()
    }
}

/// Turns until the table has been seen whole so many times.
fn pass(tender: &mut Tender, passes: u64) -> Tended {
    loop {
        let tended = tender.turn();
        if tended.passes == passes {
            return tended;
        }
    }
}

#[test]
fn both_entries_of_a_flow_go_when_it_has_ended() {
    let (fake, mut tender) = Fake::of(1000);
    fake.flow(1, UDP, BACKEND);
    fake.flow(2, TCP, BACKEND);
    for (n, now) in [(1, 0), (2, 29)] {
        fake.0.lock().now = now;
        assert_eq!(
            pass(&mut tender, n).flows,
            BTreeMap::from([("tcp".to_owned(), 1), ("udp".to_owned(), 1)]),
            "at {now} s"
        );
    }
    fake.0.lock().now = 30;
    let tended = pass(&mut tender, 3);
    assert_eq!((fake.len(), tended.expired, tended.uses[0].entries), (2, 2, 2));
    fake.0.lock().now = 7440;
    assert_eq!((pass(&mut tender, 4).expired, fake.len()), (4, 0));
}

#[test]
fn datagrams_leave_a_backend_that_is_gone_and_connections_do_not() {
    let (fake, mut tender) = Fake::of(1000);
    fake.flow(1, UDP, BACKEND);
    fake.flow(2, UDP, BACKEND + 1);
    fake.flow(3, TCP, BACKEND);
    fake.0.lock().dead.insert(BACKEND);
    assert_eq!(tender.turn().orphaned, 0, "an answer may be on its way");
    fake.0.lock().now = 3;
    let tended = pass(&mut tender, 2);
    assert_eq!((tended.orphaned, tended.expired), (2, 0));
    assert_eq!(tended.flows, BTreeMap::from([("tcp".to_owned(), 1), ("udp".to_owned(), 1)]));
}

#[test]
fn a_turn_looks_at_a_part_of_the_table_unless_room_is_short() {
    let (fake, mut tender) = Fake::of(32_000);
    for n in 0..6_000 {
        fake.flow(n, TCP, BACKEND);
    }
    // Nothing is known of it before it was seen once.
    assert_eq!(tender.turn().passes, 1);
    let read = || std::mem::take(&mut fake.0.lock().read);
    assert_eq!(read(), 12_000);
    // Half a minute later, in parts.
    for _ in 1..32 {
        tender.turn();
        assert_eq!(read(), 0);
    }
    for _ in 0..3 {
        tender.turn();
        assert_eq!(read(), 1_000);
    }
    // Something found no room: all of it.
    fake.0.lock().full += 1;
    assert_eq!(tender.turn().passes, 2);
    assert_eq!(read(), 9_000, "what was left of the table");
}

#[test]
fn when_room_is_short_what_is_silent_longest_goes_before_its_time() {
    let (fake, mut tender) = Fake::of(1000);
    for n in 0..200 {
        fake.flow(n, TCP, BACKEND);
    }
    fake.0.lock().now = 600;
    for n in 200..450 {
        fake.flow(n, TCP, BACKEND);
    }
    let mut turns = 0;
    while fake.len() == 900 {
        fake.0.lock().now += 1;
        tender.turn();
        turns += 1;
        assert!(turns < 20, "nothing goes");
    }
    assert_eq!(fake.len(), 500, "those of ten minutes ago, and none of the younger ones");
    for _ in 0..20 {
        fake.0.lock().now += 1;
        tender.turn();
    }
    assert_eq!((tender.turn().squeeze, fake.len()), (0, 500), "and no more once there is room");
}

#[test]
fn an_error_is_told_and_the_next_turn_tries_again() {
    let (fake, mut tender) = Fake::of(1000);
    fake.flow(1, UDP, BACKEND);
    fake.0.lock().broken = true;
    assert_eq!(tender.turn().error.as_deref(), Some("broken"));
    fake.0.lock().broken = false;
    let tended = tender.turn();
    assert_eq!((tended.error, tended.passes), (None, 1));
}

/// Takes Events down.
struct Recorder(Arc<Mutex<Vec<RecordEvent>>>);

impl Actor for Recorder {
    const NAME: &'static str = "Recorder";
}

impl Handles<RecordEvent> for Recorder {
    fn handle(&mut self, event: RecordEvent, to: Responder<RecordEvent>, _: &mut Ctx<'_, Self>) {
        self.0.lock().push(event);
        to.ok(());
    }
}

#[test]
fn a_map_that_fills_up_is_an_event_of_the_node_and_a_metric_before_services_are_known() {
    let fake = Fake::default();
    (fake.0.lock().capacity, fake.0.lock().other) = (10, 80);
    for n in 0..4 {
        fake.flow(n, TCP, BACKEND);
    }
    fake.0.lock().now = 1;
    let events = Arc::new(Mutex::new(Vec::new()));
    let (snapshots, mut seen) = tokio::sync::watch::channel(Arc::new(ServiceSnapshot::default()));
    let told = events.clone();
    fairway::actor::run(async move {
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
        let (_publisher, facts) = cluster::facts();
        let recorder: Handle<Recorder> = tree.child({
            let told = told.clone();
            move || {
                let told = told.clone();
                async move { Ok(Recorder(told)) }
            }
        });
        let open = fake.clone();
        let deps = Deps {
            node_name: "n1".to_owned(),
            index: facts.services.clone(),
            node: facts.node.clone(),
            pods: facts.pods.clone(),
            leader: facts.leader.clone(),
            record_event: recorder.port(),
            maps: Arc::new(|| Ok(Box::new(MemoryMaps::default()))),
            flows: Some(Arc::new(move || Ok(Box::new(open.clone())))),
            snapshots,
        };
        let _services: Handle<ServiceMap> = tree.child(move || ServiceMap::open(deps.clone()));
        let both = |s: &Arc<ServiceSnapshot>| s.nearly_full.len() == 2 && told.lock().len() == 2;
        while !both(&seen.borrow_and_update()) {
            tokio::select! {
                changed = seen.changed() => changed.unwrap(),
                () = tokio::time::sleep(Duration::from_millis(20)) => assert!(told.lock().len() <= 2),
            }
        }
        let mut registry = prometheus_client::registry::Registry::with_prefix("fairway");
        fairway::service::figures::collect(&seen.borrow(), &mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "fairway_bpf_map_entries{map=\"flows\"} 8",
            "fairway_bpf_map_max_entries{map=\"flows\"} 10",
            "fairway_bpf_map_nearly_full{map=\"flows\"} 1",
            "fairway_bpf_map_nearly_full{map=\"frontends\"} 0",
            "fairway_service_flows{protocol=\"tcp\"} 4",
            "fairway_service_events_total{event=\"flow_table_full\"} 0",
            "fairway_service_sync_duration_seconds_count 0",
            "fairway_service_sync_duration_seconds_bucket{le=\"+Inf\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        tree.shutdown(Duration::from_secs(5)).await;
    });
    let events = events.lock();
    let said: Vec<_> = events.iter().map(|e| (e.about == About::Node, e.warning, e.reason.as_str())).collect();
    assert_eq!(said, [(true, true, "ServiceMapNearlyFull"); 2]);
    assert!(events.iter().any(|e| e.note.contains("flows") && e.note.contains("80 % full (8 of 10")), "{events:?}");
}
