//! Events on their way to the cluster: a bounded buffer that folds repetitions.
//!
//! Pure. Invariants: what does not fit pushes the oldest out, and how many were
//! lost is told once the way is free again; the same thing said again is one
//! event with a count, in the buffer and in the cluster.

use std::collections::{HashMap, VecDeque};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{About, RecordEvent};

const CONTROLLER: &str = "fairway.io/agent";
/// Repetitions within this time belong to one series.
const SERIES: SignedDuration = SignedDuration::from_mins(6);
/// The API's limit of a note, in bytes.
const NOTE: usize = 1024;

/// Where one event goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Delivery {
    Create {
        namespace: String,
        body: Value,
    },
    /// Patch of an event that exists.
    Repeat {
        namespace: String,
        name: String,
        body: Value,
    },
}

#[derive(Clone, Debug)]
struct Waiting {
    event: RecordEvent,
    first: Timestamp,
    last: Timestamp,
    count: u64,
    name: String,
    /// Its delivery has been handed out: it is neither counted up nor pushed out.
    under_way: bool,
}

#[derive(Clone, Debug)]
struct Told {
    name: String,
    count: u64,
    last: Timestamp,
}

/// How the events fare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct EventStats {
    pub waiting: usize,
    pub delivered: u64,
    /// Pushed out of the full buffer.
    pub dropped: u64,
    /// Refused by the API for good.
    pub refused: u64,
}

pub struct Events {
    node: String,
    capacity: usize,
    waiting: VecDeque<Waiting>,
    told: HashMap<RecordEvent, Told>,
    stats: EventStats,
    unreported: u64,
    serial: u64,
}

impl Events {
    pub fn new(node: impl Into<String>, capacity: usize) -> Self {
        Self {
            node: node.into(),
            capacity: capacity.max(2),
            waiting: VecDeque::new(),
            told: HashMap::new(),
            stats: EventStats::default(),
            unreported: 0,
            serial: 0,
        }
    }

    pub fn stats(&self) -> EventStats {
        EventStats { waiting: self.waiting.len(), ..self.stats }
    }

    pub fn push(&mut self, mut event: RecordEvent, now: Timestamp) {
        event.note = cut(&event.note, NOTE);
        if let Some(same) = self.waiting.iter_mut().find(|w| !w.under_way && w.event == event) {
            same.count += 1;
            same.last = now;
            return;
        }
        if self.waiting.len() >= self.capacity {
            let oldest = usize::from(self.waiting.front().is_some_and(|w| w.under_way));
            self.waiting.remove(oldest);
            self.stats.dropped += 1;
            self.unreported += 1;
        }
        self.serial += 1;
        let name = event_name(&event.about, &self.node, now, self.serial);
        self.waiting.push_back(Waiting { event, first: now, last: now, count: 1, name, under_way: false });
    }

    /// The next delivery. Asked again before its outcome is known, it is the
    /// same one: an event has its name from the start.
    pub fn next(&mut self, now: Timestamp, node_uid: &str) -> Option<Delivery> {
        self.waiting.front_mut()?.under_way = true;
        let w = self.waiting.front()?;
        let namespace = namespace(&w.event.about);
        let told = self.told.get(&w.event).filter(|t| now.duration_since(t.last) < SERIES);
        Some(match told {
            Some(t) => {
                let body = json!({"series": series(t.count + w.count, w.last)});
                Delivery::Repeat { namespace, name: t.name.clone(), body }
            }
            None => Delivery::Create { namespace, body: self.body(w, node_uid) },
        })
    }

    fn body(&self, w: &Waiting, node_uid: &str) -> Value {
        let regarding = match &w.event.about {
            About::Pod { key, uid } => {
                json!({"apiVersion": "v1", "kind": "Pod", "namespace": key.namespace, "name": key.name, "uid": uid})
            }
            About::Node => json!({"apiVersion": "v1", "kind": "Node", "name": self.node, "uid": node_uid}),
            About::Service { name, uid } => {
                json!({"apiVersion": "v1", "kind": "Service", "namespace": name.namespace, "name": name.name, "uid": uid})
            }
            About::NetworkPolicy { name, uid } => json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "namespace": name.namespace, "name": name.name, "uid": uid,
            }),
            About::EndpointSlice { name, uid } => json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "namespace": name.namespace, "name": name.name, "uid": uid,
            }),
        };
        let mut body = json!({
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"namespace": namespace(&w.event.about), "name": w.name},
            "eventTime": micros(w.first),
            "type": if w.event.warning { "Warning" } else { "Normal" },
            "reason": cut(&w.event.reason, 128),
            "action": cut(&w.event.action, 128),
            "note": w.event.note,
            "regarding": regarding,
            "related": {"apiVersion": "v1", "kind": "Node", "name": self.node},
            "reportingController": CONTROLLER,
            "reportingInstance": cut(&self.node, 128),
        });
        if w.count > 1 {
            body["series"] = series(w.count, w.last);
        }
        body
    }

    /// The first in line has arrived.
    pub fn delivered(&mut self, now: Timestamp) {
        let Some(w) = self.waiting.pop_front() else { return };
        self.stats.delivered += 1;
        self.told.retain(|_, t| now.duration_since(t.last) < SERIES);
        // Bounded by forgetting: the next repetition begins a new series.
        if self.told.len() >= self.capacity {
            self.told.clear();
        }
        let told = self.told.entry(w.event).or_insert(Told { name: w.name, count: 0, last: w.last });
        told.count += w.count;
        told.last = w.last;
        if self.unreported > 0 {
            let lost = std::mem::take(&mut self.unreported);
            let note = format!(
                "{lost} events were lost: the Kubernetes API was not reached for too long; the agent's log has them all"
            );
            let (reason, action) = ("EventsLost".into(), "Report".into());
            self.push(RecordEvent { about: About::Node, warning: true, reason, action, note }, now);
        }
    }

    /// The event that the first in line repeats is gone from the cluster.
    pub fn series_gone(&mut self) {
        if let Some(w) = self.waiting.front() {
            self.told.remove(&w.event);
        }
    }

    /// The API will never take the first in line.
    pub fn refused(&mut self) {
        if self.waiting.pop_front().is_some() {
            self.stats.refused += 1;
        }
    }
}

/// Events about objects without a namespace live in `default`.
fn namespace(about: &About) -> String {
    match about {
        About::Pod { key, .. } => key.namespace.clone(),
        About::Node => "default".into(),
        About::Service { name, .. } | About::NetworkPolicy { name, .. } | About::EndpointSlice { name, .. } => {
            name.namespace.to_string()
        }
    }
}

fn event_name(about: &About, node: &str, now: Timestamp, serial: u64) -> String {
    let object = match about {
        About::Pod { key, .. } => &key.name,
        About::Node => node,
        About::Service { name, .. } | About::NetworkPolicy { name, .. } | About::EndpointSlice { name, .. } => {
            &name.name
        }
    };
    let base = cut(object, 200);
    format!("{}.{:x}{:x}", base.trim_end_matches(['.', '-']), now.as_microsecond(), serial & 0xfff)
}

fn series(count: u64, last: Timestamp) -> Value {
    json!({"count": i32::try_from(count).unwrap_or(i32::MAX), "lastObservedTime": micros(last)})
}

fn micros(at: Timestamp) -> String {
    format!("{at:.6}")
}

fn cut(s: &str, limit: usize) -> String {
    let mut end = s.len().min(limit);
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    s[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::PodKey;

    fn event(n: u32) -> RecordEvent {
        RecordEvent {
            about: About::Pod { key: PodKey::new("default", format!("web-{n}")), uid: Some(format!("u{n}")) },
            warning: false,
            reason: "AddressAssigned".into(),
            action: "Add".into(),
            note: format!("address 10.0.0.{n} from ENI eni-1 in 3 ms"),
        }
    }
    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    #[test]
    fn an_auditor_finds_pod_address_and_time() {
        let mut events = Events::new("n1", 8);
        events.push(event(7), at(0));
        let Some(Delivery::Create { namespace, body }) = events.next(at(1), "") else { panic!() };
        assert_eq!(namespace, "default");
        assert_eq!(body["regarding"]["name"], "web-7");
        assert_eq!(body["regarding"]["uid"], "u7");
        assert_eq!(body["eventTime"], "2027-01-15T08:00:00.000000Z");
        assert!(body["note"].as_str().unwrap().contains("10.0.0.7"));
        serde_json::from_value::<k8s_openapi::api::events::v1::Event>(body).unwrap();
    }

    #[test]
    fn repetitions_are_one_event_with_a_count() {
        let mut events = Events::new("n1", 8);
        for second in 0..3 {
            events.push(event(1), at(second));
        }
        assert_eq!(events.stats().waiting, 1);
        let Some(Delivery::Create { body, .. }) = events.next(at(3), "") else { panic!() };
        assert_eq!(body["series"]["count"], 3);
        events.delivered(at(3));
        events.push(event(1), at(10));
        let Some(Delivery::Repeat { name, body: patch, .. }) = events.next(at(10), "") else { panic!() };
        assert_eq!((&json!(name), &patch["series"]["count"]), (&body["metadata"]["name"], &json!(4)));
        events.series_gone();
        assert!(matches!(events.next(at(10), ""), Some(Delivery::Create { .. })));
    }

    #[test]
    fn a_flood_while_the_api_is_away_keeps_the_newest_and_reports_the_loss() {
        let mut events = Events::new("n1", 4);
        for n in 0..10 {
            events.push(event(n), at(0));
        }
        assert_eq!(events.stats(), EventStats { waiting: 4, delivered: 0, dropped: 6, refused: 0 });
        let mut notes = Vec::new();
        while let Some(Delivery::Create { body, .. }) = events.next(at(1), "") {
            notes.push(body["note"].as_str().unwrap().to_owned());
            events.delivered(at(1));
        }
        assert!(notes[0].contains("10.0.0.6") && notes[3].contains("10.0.0.9"), "{notes:?}");
        assert_eq!(notes.iter().filter(|n| n.starts_with("6 events were lost")).count(), 1);
    }

    #[test]
    fn what_comes_while_a_delivery_is_under_way_is_not_mistaken_for_delivered() {
        let mut events = Events::new("n1", 2);
        events.push(event(1), at(0));
        let first = events.next(at(0), "");
        events.push(event(1), at(1));
        events.push(event(2), at(2));
        assert_eq!(events.next(at(2), ""), first, "the one under way was not pushed out");
        events.delivered(at(3));
        let Some(Delivery::Create { body, .. }) = events.next(at(3), "") else { panic!() };
        assert_eq!(body["regarding"]["name"], "web-2");
    }

    #[test]
    fn a_note_too_long_is_cut_at_a_character() {
        let mut events = Events::new("n1", 4);
        events.push(RecordEvent { note: "ä".repeat(2000), ..event(1) }, at(0));
        let Some(Delivery::Create { body, .. }) = events.next(at(0), "") else { panic!() };
        assert_eq!(body["note"].as_str().unwrap().len(), 1024);
    }

    proptest! {
        #[test]
        fn every_event_is_delivered_or_counted(pushed in proptest::collection::vec((0u32..6, 0u8..4), 0..80)) {
            let mut events = Events::new("n1", 5);
            let mut repeats = 0;
            for (second, (n, step)) in pushed.iter().enumerate() {
                let now = at(second as i64);
                match step {
                    0 => if events.next(now, "").is_some() { events.delivered(now) },
                    1 => events.refused(),
                    _ => {
                        let before = events.stats();
                        events.push(event(*n), now);
                        let after = events.stats();
                        if after.waiting == before.waiting && after.dropped == before.dropped { repeats += 1; }
                    }
                }
                prop_assert!(events.stats().waiting <= 5 && events.told.len() <= 5);
            }
            let s = events.stats();
            let asked = pushed.iter().filter(|(_, step)| *step > 1).count() as u64;
            let own_reports = (s.waiting as u64 + s.delivered + s.dropped + s.refused + repeats).checked_sub(asked);
            prop_assert!(own_reports.is_some(), "an event vanished: {:?}", s);
        }
    }
}
