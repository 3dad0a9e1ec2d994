//! What is seen of ServiceMap: for `fairway status services` and for metrics
//! ([`figures`](super::figures)).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::index::Known;
use super::maps::Counts;
use super::problem::{Problem, Reason};
use super::sync::Done;
use super::tend::{Tended, Use};

/// Problems shown; all are counted.
const SHOWN: usize = 200;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSnapshot {
    /// Why nothing has been written yet.
    pub awaited: Option<String>,
    /// The maps held what an earlier run wrote: until the cluster is known again,
    /// Services go on as they were.
    #[serde(default)]
    pub adopted: bool,
    pub known: Known,
    /// Services with entries in the maps.
    pub services: usize,
    pub sets: usize,
    pub used: Counts,
    pub capacity: Counts,
    pub health_check_ports: Vec<u16>,
    pub synced_ms_ago: Option<u64>,
    pub last: Done,
    pub last_us: u64,
    /// The longest look since the start, the first one left out.
    pub longest_us: u64,
    pub syncs: u64,
    pub took: Took,
    pub written: u64,
    pub problems: Vec<Problem>,
    pub problem_counts: BTreeMap<Reason, usize>,
    /// Maps that are nearly full.
    pub nearly_full: BTreeSet<String>,
    /// What the programs have filled.
    pub tended: Tended,
    #[serde(skip)]
    pub(super) retry: bool,
}

impl ServiceSnapshot {
    pub(super) fn count_sync(&mut self, done: Done, took: Duration) {
        self.last = done;
        self.last_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if self.syncs > 0 {
            self.longest_us = self.longest_us.max(self.last_us);
        }
        self.syncs += 1;
        self.took.count(self.last_us);
        self.written += done.written as u64;
    }

    /// Whether the maps say what the cluster says or lately said, or what is
    /// awaited. Once they did they are kept so: neither trouble with single Services
    /// nor an API server that is away is a reason to send pods elsewhere.
    pub fn ready(&self) -> Result<(), String> {
        match (&self.awaited, self.syncs) {
            _ if self.adopted => Ok(()),
            (None, 0) => Err("waiting for the start of ServiceMap".to_owned()),
            (None, _) => Ok(()),
            (Some(what), _) => Err(format!("waiting for {what}")),
        }
    }

    /// How full every map is.
    pub fn uses(&self) -> Vec<Use> {
        let (used, of) = (&self.used, &self.capacity);
        let tables = [
            ("frontends", used.frontends, of.frontends),
            ("slots", used.slots, of.slots),
            ("backends", used.backends, of.backends),
            ("source ranges", used.ranges, of.ranges),
        ];
        let tables = tables.into_iter().map(|(map, entries, capacity)| Use { map: map.to_owned(), entries, capacity });
        tables.chain(self.tended.uses.iter().cloned()).collect()
    }

    pub(super) fn set_problems(&mut self, all: &[Problem]) {
        self.problems = all.iter().take(SHOWN).cloned().collect();
        self.problem_counts.clear();
        for problem in all {
            *self.problem_counts.entry(problem.reason).or_default() += 1;
        }
    }
}

/// How long the looks took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Took {
    pub sum_us: u64,
    /// Up to each of the bounds, and beyond the last.
    pub counts: [u64; Took::BOUNDS_US.len() + 1],
}

impl Took {
    pub const BOUNDS_US: [u64; 8] = [100, 500, 1_000, 5_000, 10_000, 50_000, 250_000, 1_000_000];

    fn count(&mut self, us: u64) {
        self.sum_us += us;
        let at = Self::BOUNDS_US.iter().position(|bound| us <= *bound).unwrap_or(Self::BOUNDS_US.len());
        self.counts[at] += 1;
    }
}
