//! One scrape: the actors' metrics, then each area's own.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, text::encode};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::Views;
use crate::actor::{ActorSnapshot, ActorState};

pub(super) fn text(views: &Views) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("fairway");
    registry.register_collector(Box::new(Actors(views.actors.snapshot())));
    registry.register_collector(Box::new(Process));
    for collect in &views.metrics {
        collect(&mut registry);
    }
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

#[derive(Debug)]
struct Actors(Vec<ActorSnapshot>);

impl Collector for Actors {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Read = fn(&ActorSnapshot) -> i64;
        let gauges: [(&str, &str, Read); 4] = [
            ("actor_running", "1 when the actor runs", |a| i64::from(a.state == ActorState::Running)),
            ("actor_mailbox_depth", "Requests waiting or in work", |a| a.depth as i64),
            ("actor_mailbox_capacity", "Requests that may wait or be in work", |a| a.capacity as i64),
            ("actor_silent_milliseconds", "Since the actor's thread last turned its loop", |a| a.silent_ms as i64),
        ];
        for (name, help, value) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for actor in &self.0 {
                ConstGauge::new(value(actor)).encode(family.encode_family(&[("actor", actor.name)])?)?;
            }
        }
        let mut family =
            encoder.encode_descriptor("actor_restarts", "Times the actor was rebuilt", None, MetricType::Counter)?;
        for actor in &self.0 {
            ConstCounter::new(actor.restarts).encode(family.encode_family(&[("actor", actor.name)])?)?;
        }
        let mut family =
            encoder.encode_descriptor("actor_messages", "Messages by type and outcome", None, MetricType::Counter)?;
        for actor in &self.0 {
            for (message, seen) in &actor.by_type {
                let outcomes = [
                    ("ok", seen.ok),
                    ("error", seen.error),
                    ("expired", seen.expired),
                    ("dropped", seen.dropped),
                    ("busy", seen.busy),
                ];
                for (outcome, count) in outcomes {
                    let labels = [("actor", actor.name), ("message", *message), ("outcome", outcome)];
                    ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        let help = "From the start of the handler to the answer";
        let mut family =
            encoder.encode_descriptor("actor_message_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for actor in &self.0 {
            for (message, seen) in &actor.by_type {
                let labels = [("actor", actor.name), ("message", *message)];
                let buckets: Vec<(f64, u64)> = seen
                    .took_us_buckets
                    .iter()
                    .map(|(bound, n)| (bound.map_or(f64::INFINITY, |us| us as f64 / 1e6), *n))
                    .collect();
                let count = buckets.iter().map(|(_, n)| n).sum();
                let mut metric = family.encode_family(&labels)?;
                metric.encode_histogram::<[(&str, &str); 0]>(seen.took_us_sum as f64 / 1e6, count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

/// The process itself, under the conventional names' meaning.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let info = [("version", env!("CARGO_PKG_VERSION"))];
        let mut family =
            encoder.encode_descriptor("build_info", "Always 1; the labels say what runs", None, MetricType::Gauge)?;
        ConstGauge::new(1i64).encode(family.encode_family(&info)?)?;
        if let Some(bytes) = resident_bytes() {
            let help = "Resident memory of the agent";
            let family =
                encoder.encode_descriptor("process_resident_memory", help, Some(&Unit::Bytes), MetricType::Gauge)?;
            ConstGauge::new(bytes).encode(family)?;
        }
        Ok(())
    }
}

/// Resident memory, from /proc/self/status.
pub fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<i64>().ok().map(|kb| kb * 1024)
}
