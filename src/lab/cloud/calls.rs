//! CallLog: what the cloud was asked and how it ended.
//!
//! Purpose: "cloud calls spent" and the times benchmarks compare with. Owner:
//! the API server writes, `/lab/calls` reads. Invariant: bounded; totals keep
//! counting when single calls have been forgotten.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::state::Millis;

const MAX_CALLS: usize = 50_000;

/// One call of the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    pub at_ms: Millis,
    pub duration_ms: u64,
    pub api: String,
    /// `ok`, an error code, `lost-reply` or `dropped`.
    pub outcome: String,
    pub request_id: String,
    pub access_key: String,
    /// The instance concerned: the one that was issued the key, if any.
    pub instance: Option<String>,
}

/// Counts and single calls since a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallReport {
    pub now_ms: Millis,
    pub since_ms: Millis,
    pub total: u64,
    /// API → outcome → how often.
    pub by_api: BTreeMap<String, BTreeMap<String, u64>>,
    pub metadata_reads: u64,
    pub calls: Vec<Call>,
    /// Older calls that are no longer listed one by one.
    pub forgotten: u64,
}

impl CallReport {
    /// How often this API was called, whatever the outcome.
    pub fn of(&self, api: &str) -> u64 {
        self.by_api.get(api).map_or(0, |outcomes| outcomes.values().sum())
    }

    /// Calls that change something.
    pub fn mutating(&self) -> u64 {
        let changes = self.by_api.iter().filter(|(api, _)| !api.starts_with("Describe"));
        changes.map(|(_, outcomes)| outcomes.values().sum::<u64>()).sum()
    }
}

/// The log.
#[derive(Debug, Default)]
pub struct CallLog {
    calls: VecDeque<Call>,
    totals: BTreeMap<String, BTreeMap<String, u64>>,
    forgotten: u64,
    pub metadata_reads: u64,
}

impl CallLog {
    pub fn add(&mut self, call: Call) {
        *self.totals.entry(call.api.clone()).or_default().entry(call.outcome.clone()).or_default() += 1;
        if self.calls.len() == MAX_CALLS {
            self.calls.pop_front();
            self.forgotten += 1;
        }
        self.calls.push_back(call);
    }

    /// Calls that ended at `since` or later; everything when it is 0.
    pub fn report(&self, since: Millis, now: Millis) -> CallReport {
        let calls: Vec<Call> = self.calls.iter().filter(|c| c.at_ms + c.duration_ms >= since).cloned().collect();
        let by_api = if since == 0 {
            self.totals.clone()
        } else {
            let mut counts: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
            for call in &calls {
                *counts.entry(call.api.clone()).or_default().entry(call.outcome.clone()).or_default() += 1;
            }
            counts
        };
        let total = by_api.values().flat_map(BTreeMap::values).sum();
        CallReport {
            now_ms: now,
            since_ms: since,
            total,
            by_api,
            metadata_reads: self.metadata_reads,
            calls,
            forgotten: self.forgotten,
        }
    }
}
