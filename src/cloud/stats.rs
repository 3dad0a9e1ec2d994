//! What CloudApi has done so far, for `/metrics` and `fairway status`.
//!
//! The handle outlives the actor: a restart does not reset the counters.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use serde::Serialize;
use tokio::time::Instant;

use super::provider::Api;
use super::throttle::Cut;
use super::{CloudErrorKind, Lane};

/// Upper bounds of the latency buckets, in milliseconds.
pub const BUCKETS_MS: [u64; 12] = [5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 20_000];

/// A cheap handle on the counters.
#[derive(Clone, Default)]
pub struct CloudStats(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    counted: CloudSnapshot,
    rates: Option<Rates>,
}

/// What the rates follow from; they change with time alone.
pub(super) struct Rates {
    pub(super) began: Instant,
    pub(super) held_until: Duration,
    /// By [`Api::index`]: the configured calls per minute, the last cut.
    pub(super) apis: Vec<(u32, Option<Cut>)>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CloudSnapshot {
    /// By API, those called so far.
    pub apis: BTreeMap<Api, ApiStats>,
    /// Calls waiting for their rate or a slot, by lane.
    pub waiting: BTreeMap<Lane, usize>,
    pub in_flight: usize,
    /// What is left of an account-wide back-off.
    pub held_ms: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ApiStats {
    /// Attempts by outcome: `ok`, or the kind of the error.
    pub calls: BTreeMap<&'static str, u64>,
    pub throttled: u64,
    /// Calls that gave up while waiting for their turn, unsent.
    pub unsent: u64,
    /// The rate in force, per minute: the configured one or less.
    pub rate_per_minute: f64,
    pub took_ms_sum: u64,
    /// One count per bound of [`BUCKETS_MS`] and one beyond.
    pub took_buckets: [u64; BUCKETS_MS.len() + 1],
}

impl CloudStats {
    pub fn snapshot(&self) -> CloudSnapshot {
        let inner = self.0.lock();
        let mut snapshot = inner.counted.clone();
        if let Some(rates) = &inner.rates {
            let now = rates.began.elapsed();
            snapshot.held_ms = rates.held_until.saturating_sub(now).as_millis() as u64;
            for (api, stats) in &mut snapshot.apis {
                let (limit, cut) = &rates.apis[api.index()];
                stats.rate_per_minute = f64::from(*limit) * cut.map_or(1.0, |cut| cut.factor(now));
            }
        }
        snapshot
    }

    pub(super) fn attempt(&self, api: Api, outcome: Option<&CloudErrorKind>, took: Duration) {
        let mut inner = self.0.lock();
        let stats = inner.counted.apis.entry(api).or_default();
        *stats.calls.entry(outcome.map_or("ok", label)).or_default() += 1;
        if matches!(outcome, Some(CloudErrorKind::Throttled { .. })) {
            stats.throttled += 1;
        }
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        stats.took_ms_sum = stats.took_ms_sum.saturating_add(ms);
        let bucket = BUCKETS_MS.iter().position(|bound| ms <= *bound).unwrap_or(BUCKETS_MS.len());
        stats.took_buckets[bucket] += 1;
    }

    pub(super) fn unsent(&self, api: Api) {
        self.0.lock().counted.apis.entry(api).or_default().unsent += 1;
    }

    pub(super) fn queue(&self, waiting: impl Fn(Lane) -> usize, in_flight: usize, rates: Rates) {
        let mut inner = self.0.lock();
        for lane in [Lane::PodWaiting, Lane::Refill, Lane::Release] {
            inner.counted.waiting.insert(lane, waiting(lane));
        }
        inner.counted.in_flight = in_flight;
        inner.rates = Some(rates);
    }

    /// Add the counters to one scrape.
    pub fn collect(&self, registry: &mut prometheus_client::registry::Registry) {
        registry.register_collector(Box::new(self.snapshot()));
    }
}

/// The error kind as metric label.
pub fn label(kind: &CloudErrorKind) -> &'static str {
    match kind {
        CloudErrorKind::VSwitchExhausted => "vswitch-exhausted",
        CloudErrorKind::InstanceEniLimit => "instance-eni-limit",
        CloudErrorKind::InstanceIpLimit => "instance-ip-limit",
        CloudErrorKind::QuotaExceeded => "quota-exceeded",
        CloudErrorKind::Forbidden => "forbidden",
        CloudErrorKind::Throttled { .. } => "throttled",
        CloudErrorKind::NotFound => "not-found",
        CloudErrorKind::Conflict => "conflict",
        CloudErrorKind::InvalidState => "invalid-state",
        CloudErrorKind::TokenMismatch => "token-mismatch",
        CloudErrorKind::Transport => "transport",
        CloudErrorKind::Deadline => "deadline",
        CloudErrorKind::Rejected => "rejected",
    }
}

pub(super) fn lane_label(lane: Lane) -> &'static str {
    match lane {
        Lane::PodWaiting => "pod-waiting",
        Lane::Refill => "refill",
        Lane::Release => "release",
    }
}

impl Collector for CloudSnapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut family =
            encoder.encode_descriptor("cloud_calls", "Attempts by API and outcome", None, MetricType::Counter)?;
        for (api, stats) in &self.apis {
            for (outcome, count) in &stats.calls {
                let labels = [("api", api.name()), ("outcome", *outcome)];
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Calls that gave up while waiting for their turn";
        let mut family = encoder.encode_descriptor("cloud_calls_unsent", help, None, MetricType::Counter)?;
        for (api, stats) in &self.apis {
            ConstCounter::new(stats.unsent).encode(family.encode_family(&[("api", api.name())])?)?;
        }
        let help = "Calls per minute this node allows itself now";
        let mut family = encoder.encode_descriptor("cloud_rate_per_minute", help, None, MetricType::Gauge)?;
        for (api, stats) in &self.apis {
            ConstGauge::new(stats.rate_per_minute).encode(family.encode_family(&[("api", api.name())])?)?;
        }
        let help = "Calls waiting for their turn, by lane";
        let mut family = encoder.encode_descriptor("cloud_calls_waiting", help, None, MetricType::Gauge)?;
        for lane in [Lane::PodWaiting, Lane::Refill, Lane::Release] {
            let waiting = self.waiting.get(&lane).copied().unwrap_or(0);
            ConstGauge::new(waiting as i64).encode(family.encode_family(&[("lane", lane_label(lane))])?)?;
        }
        let metric = encoder.encode_descriptor(
            "cloud_calls_in_flight",
            "Calls without an answer yet",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(self.in_flight as i64).encode(metric)?;
        let help = "From sending an attempt to its answer";
        let unit = Some(&Unit::Seconds);
        let mut family = encoder.encode_descriptor("cloud_call_duration", help, unit, MetricType::Histogram)?;
        for (api, stats) in &self.apis {
            let bounds = BUCKETS_MS.iter().map(|ms| *ms as f64 / 1e3).chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(stats.took_buckets).collect();
            let count = stats.took_buckets.iter().sum();
            let labels = [("api", api.name())];
            let mut metric = family.encode_family(&labels)?;
            metric.encode_histogram::<[(&str, &str); 0]>(stats.took_ms_sum as f64 / 1e3, count, &buckets, None)?;
        }
        Ok(())
    }
}

impl fmt::Debug for CloudStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.snapshot().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_names_api_outcome_rate_and_latency() {
        let stats = CloudStats::default();
        stats.attempt(Api::AttachNetworkInterface, None, Duration::from_millis(30));
        let throttled = CloudErrorKind::Throttled { retry_after: Duration::ZERO };
        stats.attempt(Api::AttachNetworkInterface, Some(&throttled), Duration::from_secs(90));
        let rates = Rates { began: Instant::now(), held_until: Duration::ZERO, apis: vec![(60, None); Api::ALL.len()] };
        stats.queue(|lane| if lane == Lane::Release { 3 } else { 0 }, 0, rates);
        let mut registry = prometheus_client::registry::Registry::with_prefix("fairway");
        stats.collect(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"fairway_cloud_calls_total{api="AttachNetworkInterface",outcome="ok"} 1"#,
            r#"fairway_cloud_calls_total{api="AttachNetworkInterface",outcome="throttled"} 1"#,
            r#"fairway_cloud_calls_waiting{lane="release"} 3"#,
            r#"fairway_cloud_rate_per_minute{api="AttachNetworkInterface"} 60"#,
            r#"fairway_cloud_call_duration_seconds_bucket{le="0.05",api="AttachNetworkInterface"} 1"#,
            r#"fairway_cloud_call_duration_seconds_count{api="AttachNetworkInterface"} 2"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
