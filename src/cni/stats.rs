//! What the CNI socket sees: for `/debug`, metrics and `fairway status`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;

use super::wire::{CniError, Command};

const REMEMBERED: usize = 32;
/// Upper bounds of the durations' histogram, in milliseconds.
pub const BUCKETS_MS: [u64; 12] = [1, 2, 5, 10, 25, 50, 100, 250, 1_000, 5_000, 30_000, 120_000];

#[derive(Default)]
pub struct Stats {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    open: BTreeMap<u64, (Command, String, String, Instant)>,
    next: u64,
    refused: u64,
    calls: BTreeMap<Command, CallStats>,
    last: VecDeque<Finished>,
}

/// Calls of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CallStats {
    pub ok: u64,
    /// Failures by CNI error code.
    pub failed: BTreeMap<u32, u64>,
    /// Durations up to each of [`BUCKETS_MS`], not cumulative; the last is the rest.
    pub buckets: [u64; BUCKETS_MS.len() + 1],
    pub total_us: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OpenCall {
    pub command: &'static str,
    pub pod: String,
    pub container: String,
    pub age_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finished {
    pub command: &'static str,
    pub pod: String,
    pub container: String,
    /// Seconds since the Unix epoch.
    pub at: u64,
    pub took_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CniSnapshot {
    pub ready: bool,
    pub open: Vec<OpenCall>,
    /// Connections turned away: too many, not root, or no request.
    pub refused: u64,
    pub calls: BTreeMap<&'static str, CallStats>,
    pub last: Vec<Finished>,
}

impl Stats {
    pub fn refused(&self) {
        self.inner.lock().refused += 1;
    }

    pub fn open(self: &Arc<Self>, command: Command, pod: &str, container: &str) -> OpenGuard {
        let mut inner = self.inner.lock();
        inner.next += 1;
        let key = inner.next;
        inner.open.insert(key, (command, pod.to_owned(), container.to_owned(), Instant::now()));
        OpenGuard { stats: self.clone(), key, error: Some((0, "cut short".to_owned())) }
    }

    pub fn snapshot(&self, ready: bool) -> CniSnapshot {
        let inner = self.inner.lock();
        let open = inner.open.values().map(|(command, pod, container, began)| OpenCall {
            command: command.name(),
            pod: pod.clone(),
            container: container.clone(),
            age_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        CniSnapshot {
            ready,
            open: open.collect(),
            refused: inner.refused,
            calls: inner.calls.iter().map(|(c, s)| (c.name(), s.clone())).collect(),
            last: inner.last.iter().cloned().collect(),
        }
    }

    fn close(&self, key: u64, error: Option<(u32, String)>) {
        let mut inner = self.inner.lock();
        let Some((command, pod, container, began)) = inner.open.remove(&key) else { return };
        let took = began.elapsed();
        let calls = inner.calls.entry(command).or_default();
        match &error {
            None => calls.ok += 1,
            Some((code, _)) => *calls.failed.entry(*code).or_default() += 1,
        }
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        calls.total_us = calls.total_us.saturating_add(took_us);
        let bucket = BUCKETS_MS.iter().position(|ms| took <= Duration::from_millis(*ms)).unwrap_or(BUCKETS_MS.len());
        calls.buckets[bucket] += 1;
        // STATUS comes every few seconds and would push all else out.
        if command == Command::Status && error.is_none() {
            return;
        }
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or(0);
        let error = error.map(|(_, text)| text);
        inner.last.push_back(Finished { command: command.name(), pod, container, at, took_us, error });
        if inner.last.len() > REMEMBERED {
            inner.last.pop_front();
        }
    }
}

/// An open conversation; counted as cut short unless closed.
pub struct OpenGuard {
    stats: Arc<Stats>,
    key: u64,
    error: Option<(u32, String)>,
}

impl OpenGuard {
    pub fn close(mut self, error: Option<&CniError>) {
        self.error = error.map(|e| (e.code, e.to_string()));
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.stats.close(self.key, self.error.take());
    }
}
