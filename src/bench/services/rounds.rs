//! The subjects, and their traffic in short interleaved rounds.
//!
//! For each number of Services all subjects are loaded, each probed Service is
//! proved to be answered by both its endpoints, and then rounds measure probe by
//! probe, metric by metric, one subject right after the other in many short
//! turns. `routed` is measured beside every probe, so that every ratio is
//! of the same moment. At the end the counters of the probed Services' rules must
//! have gone up.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use super::fairway::{Fairway, private_bpffs};
use super::fleet::{Fleet, Probe};
use super::kube_proxy::{self, Mode};
use super::place::Place;
use super::{Metric, Task};
use crate::bench::network::traffic::cpu::Softirqd;
use crate::bench::network::traffic::server::Seen;
use crate::bench::network::traffic::{self, Server};
use crate::bench::stats::{Params, Sample, there_and_back};

/// How often a round goes through all subjects, there and back.
const TURNS: usize = 2;
/// Before each measurement; thrown away.
const WARM_UP: Duration = Duration::from_millis(5);
/// Connections of a proof; that all go to one of two endpoints by chance is as
/// likely as nothing.
const PROOF: u64 = 32;
const PROOF_TIME: Duration = Duration::from_millis(5);

struct Subject {
    name: &'static str,
    place: Place,
    how: How,
}

enum How {
    Routed,
    KubeProxy(Mode),
    Fairway(Box<Fairway>),
}

/// On a thread of its own, which gets a mount namespace for good.
pub fn measure(task: &Task, say: &dyn Fn(&str)) -> anyhow::Result<Vec<Sample>> {
    say("routed, iptables, nftables, fairway: two nodes and five pods each");
    let bpffs = private_bpffs()?;
    let mut subjects = vec![
        Subject::new("routed", How::Routed)?,
        Subject::new(Mode::Iptables.name(), How::KubeProxy(Mode::Iptables))?,
        Subject::new(Mode::Nftables.name(), How::KubeProxy(Mode::Nftables))?,
        Subject::fairway(&bpffs)?,
    ];
    let softirqd = Softirqd::find();
    let mut samples = Vec::new();
    for services in &task.sizes {
        for fleet in Fleet::of(*services).map_err(anyhow::Error::msg)? {
            for subject in &mut subjects {
                let began = std::time::Instant::now();
                subject.load(&fleet)?;
                if !matches!(subject.how, How::Routed) {
                    let (name, took) = (subject.name, began.elapsed().as_secs_f64());
                    say(&format!("{services} Services for {name} on both nodes: {took:.1} s"));
                }
            }
            Loaded { subjects: &mut subjects, fleet: &fleet, task, softirqd: &softirqd }.rounds(&mut samples, say)?;
        }
    }
    Ok(samples)
}

impl Subject {
    fn new(name: &'static str, how: How) -> anyhow::Result<Self> {
        Ok(Self { name, place: Place::build().with_context(|| name)?, how })
    }

    fn fairway(bpffs: &Path) -> anyhow::Result<Self> {
        let place = Place::build()?;
        let fairway = Fairway::start(&place, bpffs).context("Fairway's programs")?;
        Ok(Self { name: "fairway", place, how: How::Fairway(Box::new(fairway)) })
    }

    fn load(&mut self, fleet: &Fleet) -> anyhow::Result<()> {
        match &mut self.how {
            How::Routed => Ok(()),
            How::KubeProxy(mode) => kube_proxy::load(*mode, &self.place, fleet),
            How::Fairway(fairway) => fairway.load(fleet),
        }
    }

    /// Between `true` and `false` it is this subject's turn.
    fn turn(&mut self, on: bool) -> anyhow::Result<()> {
        match &mut self.how {
            How::Fairway(fairway) => fairway.sockets(&self.place, on),
            _ => Ok(()),
        }
    }

    /// Whom the client talks to.
    fn to(&self, probe: &Probe) -> Vec<SocketAddr> {
        match self.how {
            How::Routed => probe.endpoints(),
            _ => vec![probe.service()],
        }
    }

    /// What the kernel has counted of each probed Service since `before`; nothing
    /// where there is none. Fairway's packet path counts its flows together, and
    /// connections are resolved before there is a packet.
    fn translated(&self, probes: &[Probe], before: &[u64]) -> anyhow::Result<Vec<u64>> {
        Ok(match &self.how {
            How::Routed => Vec::new(),
            How::KubeProxy(mode) => kube_proxy::translated(*mode, &self.place, probes, before)?,
            How::Fairway(fairway) => vec![fairway.translated()? - before.first().unwrap_or(&0)],
        })
    }

    /// Connections and datagrams to the probed Service reach its endpoints, each
    /// of them, and nobody else.
    fn prove(&self, probe: &Probe) -> anyhow::Result<()> {
        let (client, to) = (self.place.client(), self.to(probe));
        let servers = self.place.servers(probe.nodes);
        let counts = |of: fn(&Seen) -> &std::sync::atomic::AtomicU64| -> Vec<u64> {
            servers.iter().map(|s| of(&s.seen).load(std::sync::atomic::Ordering::Relaxed)).collect()
        };
        let before = counts(|seen| &seen.connections);
        // This one gives up when nobody answers.
        traffic::tcp_rr(&client, to[0], PROOF_TIME)?;
        let mut made = 1;
        while made < PROOF {
            made += traffic::tcp_crr(&client, to.clone(), PROOF_TIME)?.count;
        }
        let each: Vec<u64> = counts(|seen| &seen.connections).iter().zip(&before).map(|(a, b)| a - b).collect();
        let all_answer = each.iter().sum::<u64>() == made && each.iter().all(|n| *n > 0);
        anyhow::ensure!(all_answer, "{made} connections arrived as {each:?} at the two endpoints");
        let before: u64 = counts(|seen| &seen.echoed).iter().sum();
        let count = traffic::udp_rr(&client, to[0], PROOF_TIME)?.count;
        let echoed = counts(|seen| &seen.echoed).iter().sum::<u64>() - before;
        anyhow::ensure!(echoed == count, "{count} datagrams were answered, {echoed} of them by the endpoints");
        Ok(())
    }
}

/// All subjects with the same Services.
struct Loaded<'a> {
    subjects: &'a mut [Subject],
    fleet: &'a Fleet,
    task: &'a Task,
    softirqd: &'a Softirqd,
}

impl Loaded<'_> {
    fn rounds(&mut self, samples: &mut Vec<Sample>, say: &dyn Fn(&str)) -> anyhow::Result<()> {
        let counted = self.prove()?;
        for round in 0..self.task.rounds {
            if round % 4 == 0 {
                say(&format!("{} Services, round {} of {}", self.fleet.services, round + 1, self.task.rounds));
            }
            for probe in &self.fleet.probes {
                for metric in self.task.metrics.iter().filter(|m| m.is_traffic()) {
                    if self.worth(probe, *metric) {
                        self.one(round, probe, *metric, samples)?;
                    }
                }
            }
        }
        self.check_counters(&counted)
    }

    /// Bytes and packets of a flow that is under way do not depend on where its
    /// Service is: they are measured with the fewest and the most Services.
    fn worth(&self, probe: &Probe, metric: Metric) -> bool {
        let ends = [self.task.sizes.first(), self.task.sizes.last()];
        !metric.is_bulk() || (ends.contains(&Some(&self.fleet.services)) && probe.positions.contains(&"last"))
    }

    fn one(&mut self, round: usize, probe: &Probe, metric: Metric, samples: &mut Vec<Sample>) -> anyhow::Result<()> {
        let count = self.subjects.len();
        let mut all: Vec<Measured> = vec![Vec::new(); count];
        let order = (0..TURNS).flat_map(|turn| there_and_back(round + turn, count).map(move |which| (turn, which)));
        for (turn, which) in order {
            let subject = &mut self.subjects[which];
            subject.turn(true)?;
            let measured = measured(subject, probe, metric, round + turn, self.softirqd);
            subject.turn(false)?;
            let measured = measured.with_context(|| {
                let (services, position) = (self.fleet.services, probe.positions.join("/"));
                format!("{metric:?} of {}, {services} Services, the {position} one", subject.name)
            })?;
            all[which].extend(measured);
        }
        for (subject, measured) in self.subjects.iter().zip(&all) {
            for (metric, unit, value) in means(measured) {
                samples.extend(probe.positions.iter().map(|position| Sample {
                    metric,
                    unit,
                    subject: subject.name.to_owned(),
                    params: params(self.fleet.services, position, probe.nodes),
                    round,
                    value,
                }));
            }
        }
        Ok(())
    }

    /// By subject, what its rules have counted of the proofs.
    fn prove(&mut self) -> anyhow::Result<Vec<Vec<u64>>> {
        let mut counted = Vec::new();
        for subject in self.subjects.iter_mut() {
            for probe in &self.fleet.probes {
                let about = format!("{} does not carry {}", subject.name, probe.service());
                subject.turn(true)?;
                let proved = subject.prove(probe);
                subject.turn(false)?;
                proved.context(about)?;
            }
            let counts = subject.translated(&self.fleet.probes, &[])?;
            anyhow::ensure!(counts.iter().all(|n| *n > 0), "{}: rules counted nothing: {counts:?}", subject.name);
            counted.push(counts);
        }
        Ok(counted)
    }

    fn check_counters(&self, before: &[Vec<u64>]) -> anyhow::Result<()> {
        let udp = self.task.metrics.iter().any(|m| matches!(m, Metric::UdpRr | Metric::UdpPps));
        for (subject, before) in self.subjects.iter().zip(before) {
            if matches!(subject.how, How::Fairway(_)) && !udp {
                continue;
            }
            let more = subject.translated(&self.fleet.probes, before)?;
            let name = subject.name;
            anyhow::ensure!(more.iter().all(|n| *n > 0), "{name}: rules of a probed Service carried nothing: {more:?}");
        }
        Ok(())
    }
}

fn params(services: usize, position: &str, nodes: usize) -> Params {
    let pairs = [("services", services.to_string()), ("position", position.to_owned()), ("nodes", nodes.to_string())];
    pairs.map(|(key, value)| (key.to_owned(), value)).into()
}

type Measured = Vec<(&'static str, &'static str, f64)>;

/// Of what was measured of each metric.
fn means(measured: &Measured) -> Measured {
    let mut means = Measured::new();
    for (metric, unit, _) in measured {
        if means.iter().all(|(known, ..)| known != metric) {
            let values: Vec<f64> = measured.iter().filter(|(m, ..)| m == metric).map(|(.., value)| *value).collect();
            means.push((metric, unit, values.iter().sum::<f64>() / values.len() as f64));
        }
    }
    means
}

fn measured(
    subject: &Subject,
    probe: &Probe,
    metric: Metric,
    round: usize,
    softirqd: &Softirqd,
) -> anyhow::Result<Measured> {
    let (client, all) = (subject.place.client(), subject.to(probe));
    let to = all[round % all.len()];
    let servers = subject.place.servers(probe.nodes);
    let time = metric.time();
    let cpu = || softirqd.used() + servers.iter().map(|s: &&Server| s.cpu()).sum::<Duration>();
    Ok(match metric {
        Metric::TcpRr => {
            traffic::tcp_rr(&client, to, WARM_UP)?;
            let seen = traffic::tcp_rr(&client, to, time)?;
            vec![("tcp_rr", "1/s", seen.per_second), ("tcp_rr_p99", "µs", seen.p99_us)]
        }
        Metric::TcpCrr => {
            traffic::tcp_crr(&client, all.clone(), WARM_UP)?;
            let before = cpu();
            let seen = traffic::tcp_crr(&client, all, time)?;
            let used = seen.cpu + cpu().saturating_sub(before);
            vec![
                ("tcp_crr", "1/s", seen.per_second),
                ("tcp_crr_p99", "µs", seen.p99_us),
                ("cpu_per_crr", "µs", used.as_secs_f64() * 1e6 / seen.count as f64),
            ]
        }
        Metric::UdpRr => {
            traffic::udp_rr(&client, to, WARM_UP)?;
            vec![("udp_rr", "1/s", traffic::udp_rr(&client, to, time)?.per_second)]
        }
        Metric::UdpPps => {
            traffic::udp_pps(&client, to, &servers, WARM_UP)?;
            vec![("udp_pps", "1/s", traffic::udp_pps(&client, to, &servers, time)?)]
        }
        Metric::TcpGbps => {
            traffic::tcp_gbps(&client, to, &servers, WARM_UP)?;
            vec![("tcp_gbps", "Gbit/s", traffic::tcp_gbps(&client, to, &servers, time)?)]
        }
        _ => Vec::new(),
    })
}
