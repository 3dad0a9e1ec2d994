//! What is seen of ServiceMap: for `fairway status services` and for metrics.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};

use super::index::Known;
use super::maps::Counts;
use super::problem::{Problem, Reason};
use super::sync::Done;

/// Problems shown; all are counted.
const SHOWN: usize = 200;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSnapshot {
    /// Why nothing has been written yet.
    pub awaited: Option<String>,
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
    pub written: u64,
    pub problems: Vec<Problem>,
    pub problem_counts: BTreeMap<Reason, usize>,
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
        self.written += done.written as u64;
    }

    pub(super) fn set_problems(&mut self, all: &[Problem]) {
        self.problems = all.iter().take(SHOWN).cloned().collect();
        self.problem_counts.clear();
        for problem in all {
            *self.problem_counts.entry(problem.reason).or_default() += 1;
        }
    }
}

/// Adds the metrics of Services to a scrape.
pub fn collect(snapshot: &Arc<ServiceSnapshot>, registry: &mut Registry) {
    registry.register_collector(Box::new(Figures(snapshot.clone())));
}

#[derive(Debug)]
struct Figures(Arc<ServiceSnapshot>);

impl Collector for Figures {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let s = &self.0;
        let gauge = MetricType::Gauge;
        let tables = |c: &Counts| {
            [("frontends", c.frontends), ("slots", c.slots), ("backends", c.backends), ("source_ranges", c.ranges)]
        };
        let mut family = to.encode_descriptor("service_map_entries", "Entries of the service maps", None, gauge)?;
        for (map, count) in tables(&s.used) {
            ConstGauge::new(count as i64).encode(family.encode_family(&[("map", map)])?)?;
        }
        let help = "How many entries the service maps can hold";
        let mut family = to.encode_descriptor("service_map_capacity", help, None, gauge)?;
        for (map, count) in tables(&s.capacity) {
            ConstGauge::new(count as i64).encode(family.encode_family(&[("map", map)])?)?;
        }
        let family = to.encode_descriptor("services", "Services carried by this node", None, gauge)?;
        ConstGauge::new(s.services as i64).encode(family)?;
        let help = "Services that cannot be carried as they should, by reason";
        let mut family = to.encode_descriptor("service_problems", help, None, gauge)?;
        for reason in Reason::ALL {
            let count = s.problem_counts.get(&reason).copied().unwrap_or_default();
            ConstGauge::new(count as i64).encode(family.encode_family(&[("reason", reason.name())])?)?;
        }
        let help = "Entries of the service maps written or deleted";
        let family = to.encode_descriptor("service_map_writes", help, None, MetricType::Counter)?;
        ConstCounter::new(s.written).encode(family)?;
        let family =
            to.encode_descriptor("service_sync_last_seconds", "What the last change took to write", None, gauge)?;
        ConstGauge::new(s.last_us as f64 / 1e6).encode(family)
    }
}
