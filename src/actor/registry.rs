//! Who does what, and since when: the record behind `/debug/actors`.
//!
//! Written by gates, supervisors and responders; read by the debug endpoint and
//! the watchdog, from any thread. One short mutex per actor, never held across
//! an await or a callback.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

/// How many finished messages and restarts are remembered per actor.
const REMEMBERED: usize = 16;

/// Upper bounds of the latency histogram, in microseconds.
pub(super) const BUCKETS_US: [u64; 14] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000, 10_000_000, 60_000_000];

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum ActorState {
    /// The factory is building it.
    Starting,
    Running,
    /// Failed; rebuilt after this long.
    BackingOff {
        #[serde(rename = "for_ms")]
        millis: u64,
    },
    Stopped,
    /// Failed too often; the process ends.
    Escalated,
}

#[derive(Clone, Debug, Serialize)]
pub struct Restart {
    /// Seconds since the Unix epoch.
    pub at: u64,
    pub reason: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct MessageSnapshot {
    pub message: &'static str,
    /// Milliseconds since it was sent.
    pub age_ms: u64,
    /// Milliseconds since its handler began; absent while it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running_ms: Option<u64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct FinishedSnapshot {
    pub message: &'static str,
    pub outcome: &'static str,
    pub waited_us: u64,
    pub took_us: u64,
}

/// Counts and latencies of one message type.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TypeSnapshot {
    pub ok: u64,
    pub error: u64,
    /// The deadline had passed when its turn came.
    pub expired: u64,
    /// The handler dropped it, or the actor died.
    pub dropped: u64,
    /// Refused because the mailbox was full.
    pub busy: u64,
    pub waited_us_sum: u64,
    pub took_us_sum: u64,
    /// Not cumulative; the last one counts what is above every bound.
    pub took_us_buckets: Vec<(Option<u64>, u64)>,
}

/// One actor, as `/debug/actors` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct ActorSnapshot {
    pub name: &'static str,
    #[serde(flatten)]
    pub state: ActorState,
    pub since_ms: u64,
    pub restarts: u64,
    pub restart_reasons: Vec<Restart>,
    /// Requests waiting or in work.
    pub depth: usize,
    pub capacity: usize,
    /// Milliseconds since this actor's thread last turned its loop.
    pub silent_ms: u64,
    pub oldest_waiting: Option<MessageSnapshot>,
    pub in_work: Vec<MessageSnapshot>,
    pub by_type: BTreeMap<&'static str, TypeSnapshot>,
    /// Newest last.
    pub last: Vec<FinishedSnapshot>,
}

struct Entry {
    message: &'static str,
    sent: Instant,
    began: Option<Instant>,
}

#[derive(Default)]
struct TypeStats {
    seen: TypeSnapshot,
    buckets: [u64; BUCKETS_US.len() + 1],
}

struct Inner {
    state: ActorState,
    since: Instant,
    restarts: u64,
    reasons: VecDeque<Restart>,
    open: BTreeMap<u64, Entry>,
    next: u64,
    by_type: BTreeMap<&'static str, TypeStats>,
    last: VecDeque<FinishedSnapshot>,
}

/// The record of one actor; shared by its gate, its supervisor and its requests.
pub(super) struct Record {
    pub(super) name: &'static str,
    capacity: usize,
    epoch: Instant,
    beat_ms: AtomicU64,
    inner: Mutex<Inner>,
}

impl Record {
    pub(super) fn new(name: &'static str, capacity: usize) -> Self {
        Self {
            name,
            capacity,
            epoch: Instant::now(),
            beat_ms: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                state: ActorState::Starting,
                since: Instant::now(),
                restarts: 0,
                reasons: VecDeque::new(),
                open: BTreeMap::new(),
                next: 0,
                by_type: BTreeMap::new(),
                last: VecDeque::new(),
            }),
        }
    }

    pub(super) fn set_state(&self, state: ActorState) {
        let mut inner = self.inner.lock();
        inner.state = state;
        inner.since = Instant::now();
    }

    pub(super) fn state(&self) -> ActorState {
        self.inner.lock().state.clone()
    }

    pub(super) fn restarted(&self, reason: String) {
        let mut inner = self.inner.lock();
        inner.restarts += 1;
        if inner.reasons.len() == REMEMBERED {
            inner.reasons.pop_front();
        }
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        inner.reasons.push_back(Restart { at, reason });
    }

    pub(super) fn beat(&self) {
        self.beat_ms.store(millis(self.epoch.elapsed()), Ordering::Relaxed);
    }

    pub(super) fn silent(&self) -> Duration {
        self.epoch.elapsed().saturating_sub(Duration::from_millis(self.beat_ms.load(Ordering::Relaxed)))
    }

    pub(super) fn busy(&self, message: &'static str) {
        self.inner.lock().by_type.entry(message).or_default().seen.busy += 1;
    }

    pub(super) fn snapshot(&self) -> ActorSnapshot {
        let now = Instant::now();
        let inner = self.inner.lock();
        let describe = |e: &Entry| MessageSnapshot {
            message: e.message,
            age_ms: millis(now - e.sent),
            running_ms: e.began.map(|b| millis(now - b)),
        };
        ActorSnapshot {
            name: self.name,
            state: inner.state.clone(),
            since_ms: millis(now - inner.since),
            restarts: inner.restarts,
            restart_reasons: inner.reasons.iter().cloned().collect(),
            depth: inner.open.len(),
            capacity: self.capacity,
            silent_ms: millis(self.silent()),
            oldest_waiting: inner.open.values().find(|e| e.began.is_none()).map(describe),
            in_work: inner.open.values().filter(|e| e.began.is_some()).map(describe).collect(),
            by_type: inner
                .by_type
                .iter()
                .map(|(name, t)| {
                    let bounds = BUCKETS_US.iter().copied().map(Some).chain([None]);
                    let took_us_buckets = bounds.zip(t.buckets).collect();
                    (*name, TypeSnapshot { took_us_buckets, ..t.seen.clone() })
                })
                .collect(),
            last: inner.last.iter().cloned().collect(),
        }
    }
}

/// One request's entry in its actor's record, with its mailbox permit.
pub(super) struct Ticket {
    record: Arc<Record>,
    id: u64,
    outcome: &'static str,
    _permit: OwnedSemaphorePermit,
}

impl Ticket {
    pub(super) fn new(record: Arc<Record>, message: &'static str, permit: OwnedSemaphorePermit) -> Self {
        let id = {
            let mut inner = record.inner.lock();
            let id = inner.next;
            inner.next += 1;
            inner.open.insert(id, Entry { message, sent: Instant::now(), began: None });
            id
        };
        Self { record, id, outcome: "dropped", _permit: permit }
    }

    pub(super) fn begin(&mut self) {
        if let Some(entry) = self.record.inner.lock().open.get_mut(&self.id) {
            entry.began = Some(Instant::now());
        }
    }

    pub(super) fn finish(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut inner = self.record.inner.lock();
        let Some(entry) = inner.open.remove(&self.id) else { return };
        let began = entry.began.unwrap_or(now);
        let waited_us = micros(began - entry.sent);
        let took_us = micros(now - began);
        let stats = inner.by_type.entry(entry.message).or_default();
        match self.outcome {
            "ok" => stats.seen.ok += 1,
            "error" => stats.seen.error += 1,
            "expired" => stats.seen.expired += 1,
            _ => stats.seen.dropped += 1,
        }
        stats.seen.waited_us_sum += waited_us;
        stats.seen.took_us_sum += took_us;
        stats.buckets[BUCKETS_US.partition_point(|bound| *bound < took_us)] += 1;
        if inner.last.len() == REMEMBERED {
            inner.last.pop_front();
        }
        inner.last.push_back(FinishedSnapshot { message: entry.message, outcome: self.outcome, waited_us, took_us });
    }
}

/// Every actor of the process, in start order.
#[derive(Clone, Default)]
pub struct Registry {
    records: Arc<Mutex<Vec<Arc<Record>>>>,
}

impl Registry {
    pub(super) fn add(&self, record: Arc<Record>) {
        self.records.lock().push(record);
    }

    pub(super) fn records(&self) -> Vec<Arc<Record>> {
        self.records.lock().clone()
    }

    pub fn snapshot(&self) -> Vec<ActorSnapshot> {
        self.records().iter().map(|r| r.snapshot()).collect()
    }

    /// The actors that are not well: not running, or silent for too long.
    pub fn unwell(&self, silent: Duration) -> Vec<String> {
        self.records()
            .iter()
            .filter_map(|r| match r.state() {
                ActorState::Running if r.silent() <= silent => None,
                ActorState::Running => Some(format!("{}: silent for {} ms", r.name, millis(r.silent()))),
                other => Some(format!("{}: {other:?}", r.name)),
            })
            .collect()
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}
