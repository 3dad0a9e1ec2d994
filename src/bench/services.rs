//! Services: plain routing, kube-proxy's iptables and nftables rules, Fairway.
//!
//! - whose cluster: [`fleet`], [`objects`]; where: [`place`]
//! - subjects: [`kube_proxy`], [`fairway`], and `routed`, which has no Service and
//!   is what the others are compared with
//! - measuring: [`rounds`] (traffic), [`control`] and [`memory`] (the way from the
//!   cluster to the kernel)
//! - showing: [`show`], [`plot`]

mod control;
pub(super) mod fairway;
mod fleet;
mod kube_proxy;
mod memory;
mod objects;
pub(super) mod place;
pub mod plot;
mod rounds;
pub mod show;

use std::time::Duration;

use anyhow::Context as _;

use super::Plan;
use super::stats::{Row, Sample, rows};

const SIZES: [usize; 6] = [1, 100, 1000, 5000, 10_000, 30_000];
const QUICK_SIZES: [usize; 2] = [1, 1000];
const ROUNDS: usize = 16;
const QUICK_ROUNDS: usize = 3;
/// The baseline of all traffic.
pub const BASELINE: &str = "routed";

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Metric {
    /// One byte there and back over one connection: tcp_rr, tcp_rr_p99.
    #[value(name = "tcp_rr")]
    TcpRr,
    /// A connection for each byte there and back: tcp_crr, tcp_crr_p99,
    /// cpu_per_crr.
    #[value(name = "tcp_crr")]
    TcpCrr,
    /// One datagram there and back.
    #[value(name = "udp_rr")]
    UdpRr,
    /// Small datagrams that arrive, the sender at full speed.
    #[value(name = "udp_pps")]
    UdpPps,
    /// One stream at full speed.
    #[value(name = "tcp_gbps")]
    TcpGbps,
    /// From a watch event of one endpoint to its entry in the map.
    #[value(name = "endpoint_update_ms")]
    EndpointUpdate,
    /// From the end of the lists to the last entry, from empty maps.
    #[value(name = "full_sync_s")]
    FullSync,
    /// An agent's resident memory at 40,000 endpoints.
    #[value(name = "rss_mb")]
    Memory,
}

impl Metric {
    fn is_traffic(self) -> bool {
        !matches!(self, Metric::EndpointUpdate | Metric::FullSync | Metric::Memory)
    }

    fn is_bulk(self) -> bool {
        matches!(self, Metric::UdpPps | Metric::TcpGbps)
    }

    /// Of one measurement, of which a round has several.
    fn time(self) -> Duration {
        Duration::from_millis(match self {
            Metric::TcpCrr => 30,
            Metric::UdpPps | Metric::TcpGbps => 25,
            _ => 20,
        })
    }
}

#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Numbers of Services, of the suite `services`.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    services: Vec<usize>,
    /// What to measure, of the suite `services`; everything when none is named.
    #[arg(long, value_name = "METRIC,…", value_delimiter = ',', value_enum)]
    metrics: Vec<Metric>,
    /// The suite `services` in less than two minutes: a first look, no more.
    #[arg(long)]
    quick: bool,
}

/// What is to be measured, settled.
#[derive(Clone, Debug)]
struct Task {
    /// In rising order.
    sizes: Vec<usize>,
    metrics: Vec<Metric>,
    rounds: usize,
    quick: bool,
}

impl Task {
    fn new(options: &Options, rounds: Option<usize>) -> anyhow::Result<Self> {
        let mut sizes = match (options.services.is_empty(), options.quick) {
            (false, _) => options.services.clone(),
            (true, true) => QUICK_SIZES.to_vec(),
            (true, false) => SIZES.to_vec(),
        };
        sizes.sort_unstable();
        sizes.dedup();
        for size in &sizes {
            fleet::Fleet::of(*size).map_err(anyhow::Error::msg).context("--services")?;
        }
        let all = <Metric as clap::ValueEnum>::value_variants().to_vec();
        let metrics = if options.metrics.is_empty() { all } else { options.metrics.clone() };
        let rounds = rounds.unwrap_or(if options.quick { QUICK_ROUNDS } else { ROUNDS });
        Ok(Self { sizes, metrics, rounds, quick: options.quick })
    }
}

pub async fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let task = Task::new(&plan.services, plan.rounds)?;
    // What takes long comes last.
    let mut samples = memory::measure(plan, &task).await?;
    samples.extend(on_a_thread(plan, &task, control::measure).await?);
    if task.metrics.iter().any(|metric| metric.is_traffic()) {
        samples.extend(on_a_thread(plan, &task, rounds::measure).await?);
    }
    Ok(rows(&samples, |metric| match metric {
        "endpoint_update_ms" | "full_sync_s" | "rss_mb" => String::new(),
        _ => BASELINE.to_owned(),
    }))
}

type Work<T> = fn(&T, &dyn Fn(&str)) -> anyhow::Result<Vec<Sample>>;

/// On a thread that takes namespaces and is not to serve anybody else. Whoever
/// does not wait any more does not stop it; it ends with the process.
pub(super) async fn on_a_thread<T: Clone + Send + 'static>(
    plan: &Plan,
    task: &T,
    work: Work<T>,
) -> anyhow::Result<Vec<Sample>> {
    let (say, mut said) = tokio::sync::mpsc::unbounded_channel::<String>();
    let (tell, told) = tokio::sync::oneshot::channel();
    let task = task.clone();
    std::thread::Builder::new().name("bench".into()).spawn(move || {
        let samples = work(&task, &|what| drop(say.send(what.to_owned())));
        drop(say);
        drop(tell.send(samples));
    })?;
    while let Some(what) = said.recv().await {
        plan.progress.say(&what);
    }
    told.await.context("the thread that measures panicked")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_measured_from_the_fewest_on_and_impossible_ones_refused() {
        let task = |services: &[usize]| Task::new(&Options { services: services.to_vec(), ..Options::default() }, None);
        assert_eq!(task(&[1000, 1, 1000]).unwrap().sizes, [1, 1000]);
        assert_eq!(task(&[]).unwrap().sizes, SIZES);
        assert!(task(&[2]).is_err());
    }
}
