//! The metrics of policies: one scrape of what was last seen.

use std::fmt::Error;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::status::PolicySnapshot;

/// Adds the metrics of policies to a scrape.
pub fn collect(snapshot: &Arc<PolicySnapshot>, registry: &mut Registry) {
    registry.register_collector(Box::new(Figures(snapshot.clone())));
}

#[derive(Debug)]
struct Figures(Arc<PolicySnapshot>);

impl Collector for Figures {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), Error> {
        let s = &self.0;
        let settled = &s.settled;
        let gauges = [
            ("network_policies", "NetworkPolicies of the cluster", settled.policies),
            ("policy_pods_isolated", "Pods of this node that some policy isolates", settled.isolated),
            ("policy_pods_closed", "Pods of this node that are closed until they are known", settled.closed),
            ("policy_profiles", "Different ways in which pods of this node are isolated", settled.profiles),
            ("policy_rules", "Pairs of profile and class that have ports open", settled.rules),
            ("policy_addresses", "Addresses of pods that rules speak of", settled.addresses),
            ("policy_ranges", "Ranges of addresses that rules speak of", settled.ranges),
            ("policy_refused_objects", "Objects that cannot be; what was known of them stands", s.refusals.len()),
            ("policy_stale", "1 while the tables cannot be written", usize::from(s.error.is_some())),
        ];
        for (name, help, value) in gauges {
            let family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(family)?;
        }
        Ok(())
    }
}
