//! The metrics of Services: one scrape of what was last seen.

use std::fmt::Error;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::problem::Reason;
use super::status::{ServiceSnapshot, Took};

/// Adds the metrics of Services to a scrape.
pub fn collect(snapshot: &Arc<ServiceSnapshot>, registry: &mut Registry) {
    registry.register_collector(Box::new(Figures(snapshot.clone())));
}

#[derive(Debug)]
struct Figures(Arc<ServiceSnapshot>);

const GAUGE: MetricType = MetricType::Gauge;
const COUNTER: MetricType = MetricType::Counter;

impl Collector for Figures {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), Error> {
        self.maps(&mut to)?;
        self.syncs(&mut to)?;
        self.flows(&mut to)
    }
}

impl Figures {
    fn maps(&self, to: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let s = &self.0;
        let uses = s.uses();
        let mut family = to.encode_descriptor("bpf_map_entries", "Entries of the kernel's maps", None, GAUGE)?;
        for u in &uses {
            ConstGauge::new(u.entries as i64).encode(family.encode_family(&[("map", name(&u.map))])?)?;
        }
        let help = "How many entries the kernel's maps can hold";
        let mut family = to.encode_descriptor("bpf_map_max_entries", help, None, GAUGE)?;
        for u in &uses {
            ConstGauge::new(u.capacity as i64).encode(family.encode_family(&[("map", name(&u.map))])?)?;
        }
        let help = "1 when the map is more than four fifths full, until it is less than 70 % full";
        let mut family = to.encode_descriptor("bpf_map_nearly_full", help, None, GAUGE)?;
        for u in &uses {
            let nearly = i64::from(s.nearly_full.contains(&u.map));
            ConstGauge::new(nearly).encode(family.encode_family(&[("map", name(&u.map))])?)?;
        }
        Ok(())
    }

    fn syncs(&self, to: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let s = &self.0;
        let family = to.encode_descriptor("services", "Services carried by this node", None, GAUGE)?;
        ConstGauge::new(s.services as i64).encode(family)?;
        let help = "Services that cannot be carried as they should, by reason";
        let mut family = to.encode_descriptor("service_problems", help, None, GAUGE)?;
        for reason in Reason::ALL {
            let count = s.problem_counts.get(&reason).copied().unwrap_or_default();
            ConstGauge::new(count as i64).encode(family.encode_family(&[("reason", reason.name())])?)?;
        }
        let help = "Entries of the service maps written or deleted";
        let family = to.encode_descriptor("service_map_writes", help, None, COUNTER)?;
        ConstCounter::new(s.written).encode(family)?;
        let help = "From a look at what has changed to the last entry written";
        let mut metric =
            to.encode_descriptor("service_sync_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let buckets: Vec<(f64, u64)> = s.took.buckets().collect();
        metric.encode_histogram::<[(&str, &str); 0]>(s.took.sum_us as f64 / 1e6, s.syncs, &buckets, None)
    }

    fn flows(&self, to: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let t = &self.0.tended;
        let help = "Flows translated packet by packet, when their table was last seen whole";
        let mut family = to.encode_descriptor("service_flows", help, None, GAUGE)?;
        for protocol in ["tcp", "udp", "sctp"] {
            let count = t.flows.get(protocol).copied().unwrap_or_default();
            ConstGauge::new(count as i64).encode(family.encode_family(&[("protocol", protocol)])?)?;
        }
        let help = "Entries of the flow table collected: silent for too long, or of a backend that is gone";
        let mut family = to.encode_descriptor("service_flow_entries_collected", help, None, COUNTER)?;
        for (reason, count) in [("silent", t.expired), ("backend_gone", t.orphaned)] {
            ConstCounter::new(count).encode(family.encode_family(&[("reason", reason)])?)?;
        }
        let help = "Looks through the whole flow table";
        let family = to.encode_descriptor("service_flow_table_passes", help, None, COUNTER)?;
        ConstCounter::new(t.passes).encode(family)?;
        let help = "Flows are forgotten after their normal time divided by two to the power of this";
        let family = to.encode_descriptor("service_flow_squeeze", help, None, GAUGE)?;
        ConstGauge::new(i64::from(t.squeeze)).encode(family)?;
        let help = "What the packet path of Services has done";
        let mut family = to.encode_descriptor("service_events", help, None, COUNTER)?;
        for (event, count) in &t.events {
            ConstCounter::new(*count).encode(family.encode_family(&[("event", event.as_str())])?)?;
        }
        let help = "Packets that were dropped or refused, by whether each was told of by itself";
        let mut family = to.encode_descriptor("service_samples", help, None, COUNTER)?;
        for (outcome, count) in [("told", t.told.read), ("untold", t.told.untold)] {
            ConstCounter::new(count).encode(family.encode_family(&[("outcome", outcome)])?)?;
        }
        let help = "Connected UDP sockets whose backend has gone, by what became of them";
        let mut family = to.encode_descriptor("service_sockets", help, None, COUNTER)?;
        for (outcome, count) in [("ended", t.sockets_ended), ("failed", t.sockets_not_ended)] {
            ConstCounter::new(count).encode(family.encode_family(&[("outcome", outcome)])?)?;
        }
        Ok(())
    }
}

/// As a label.
fn name(map: &str) -> String {
    map.replace(' ', "_")
}

impl Took {
    /// Upper bound in seconds, and how many fell in.
    fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = Self::BOUNDS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        bounds.zip(self.counts)
    }
}
