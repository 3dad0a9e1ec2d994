//! Facts carried from the actor that knows them to those that act on them.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::sync::watch;

use super::programs::Programs;
use crate::actor::{Deadline, Port};
use crate::cloud::CloudStats;
use crate::cluster::{Facts, NodeCondition, PodInfo, SetNodeStatus};
use crate::cni::wishes;
use crate::debug::Collect;
use crate::model::{AttachMode, PodKey};
use crate::pool::Leases;
use crate::pool::demand::{BoundPod, BoundPods};
use crate::pool::snapshot::{PoolSnapshot, Totals};

/// From the pods of this node, as the API server shows them, to what the pool
/// prepares for. Ends when nobody publishes or nobody listens any more.
pub async fn bound_pods(mut facts: Facts, default_mode: AttachMode, to: watch::Sender<BoundPods>) {
    loop {
        let pods = facts.pods.borrow_and_update().clone();
        let node = facts.node.borrow_and_update().clone();
        let labels = node.as_deref().map(|n| &n.labels);
        let bound = pods.map(|pods| {
            let of_interest = pods.iter().filter(|(_, pod)| !pod.host_network);
            Arc::new(of_interest.map(|(key, pod)| bound_pod(key, pod, labels, default_mode)).collect::<Vec<_>>())
        });
        to.send_if_modified(|was| {
            let changed = *was != bound;
            *was = bound;
            changed
        });
        let changed = tokio::select! {
            changed = facts.pods.changed() => changed,
            changed = facts.node.changed() => changed,
        };
        if changed.is_err() || to.is_closed() {
            return;
        }
    }
}

fn bound_pod(
    key: &PodKey,
    pod: &PodInfo,
    node_labels: Option<&std::collections::BTreeMap<String, String>>,
    default_mode: AttachMode,
) -> BoundPod {
    // A wish that cannot be read is refused at ADD, with its reason.
    let mode = wishes::mode(Some(&pod.annotations), node_labels, default_mode).unwrap_or(default_mode);
    BoundPod { pod: key.clone(), uid: pod.uid.clone(), mode, terminated: pod.finished(), addresses: pod.ips.clone() }
}

/// The pool's capacity to the Node: a condition when addresses run short, an
/// extended resource for exclusive ENIs.
pub async fn node_status(mut snapshot: watch::Receiver<Arc<PoolSnapshot>>, to: Port<SetNodeStatus>) {
    let mut said: Option<(bool, u32)> = None;
    loop {
        let (reconciled, totals) = {
            let seen = snapshot.borrow_and_update();
            (seen.reconciled, seen.totals)
        };
        let status = (totals.short, u32::try_from(totals.exclusive_capacity).unwrap_or(u32::MAX));
        if reconciled && said != Some(status) {
            let message = SetNodeStatus { condition: Some(condition(&totals)), exclusive_enis: Some(status.1) };
            if to.ask(message, Deadline::after(Duration::from_secs(5))).await.is_ok() {
                said = Some(status);
            }
        }
        if snapshot.changed().await.is_err() {
            return;
        }
    }
}

fn condition(totals: &Totals) -> NodeCondition {
    let counts = format!("{} leased, {} idle, room for {} pods", totals.leased, totals.idle, totals.capacity);
    match totals.short {
        false => NodeCondition { available: true, reason: "AddressesAvailable".into(), message: counts },
        true => NodeCondition {
            available: false,
            reason: "AddressesExhausted".into(),
            message: format!("no address is idle and none can be had from the cloud now: {counts}"),
        },
    }
}

/// Devices inside pods that an earlier process has put programs on: this one's
/// take their place once it is known who has which device. Where tcx links do
/// that by themselves there is nothing to do.
pub async fn programs_inside_pods(
    mut snapshot: watch::Receiver<Arc<PoolSnapshot>>,
    leases: Port<Leases>,
    programs: Arc<Programs>,
) {
    if programs.dated() == 0 || snapshot.wait_for(|s| s.reconciled).await.is_err() {
        return;
    }
    let leases = loop {
        match leases.ask(Leases {}, Deadline::after(Duration::from_secs(10))).await {
            Ok(leases) => break leases,
            Err(error) => tracing::warn!(%error, "Cannot learn whose the programs inside pods are yet"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    // System calls, of which each may wait for the kernel's network lock.
    let work = tokio::task::spawn_blocking(move || programs.take_up(&leases));
    for problem in work.await.unwrap_or_default() {
        tracing::warn!(problem, "A pod goes on with the programs of an earlier process");
    }
}

/// The metrics of the cloud's API and of the pool.
pub fn metrics(stats: &CloudStats, snapshot: &watch::Receiver<Arc<PoolSnapshot>>) -> Vec<Collect> {
    let pool = snapshot.clone();
    let stats = stats.clone();
    vec![
        Arc::new(move |registry| registry.register_collector(Box::new(PoolMetrics(pool.borrow().totals)))),
        Arc::new(move |registry| stats.collect(registry)),
    ]
}

#[derive(Debug)]
struct PoolMetrics(Totals);

impl Collector for PoolMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let t = self.0;
        let states = [
            ("idle", t.idle),
            ("leased", t.leased),
            ("cooling", t.cooling),
            ("reserved", t.reserved),
            ("releasing", t.releasing),
        ];
        let mut family = encoder.encode_descriptor("pool_addresses", "Addresses by state", None, MetricType::Gauge)?;
        for (state, count) in states {
            ConstGauge::new(count as i64).encode(family.encode_family(&[("state", state)])?)?;
        }
        let family = encoder.encode_descriptor(
            "pool_capacity",
            "Pods with a shared ENI's address this node can hold",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(t.capacity as i64).encode(family)?;
        let family = encoder.encode_descriptor(
            "pool_short",
            "1 when no address is idle and none can be had",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(i64::from(t.short)).encode(family)
    }
}
