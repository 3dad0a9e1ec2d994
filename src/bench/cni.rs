//! What a pod's network costs its node: CNI calls, a burst, memory.
//!
//! The calls are made as a runtime makes them: a process each, timed from
//! outside. Fairway's node has a warm pool; its agent keeps its ledger on the
//! same disk as the reference plugins' `host-local` keeps its files. Every
//! subject has a node namespace of its own. `fairway_no_ebpf` is an agent that
//! was given no BPF file system and so puts no programs on pods' devices; the
//! difference is what they add to an ADD.

pub mod burst;
pub mod driver;

pub use burst::rss_mb;

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::Plan;
use super::stats::{Params, Row, Sample, rows, there_and_back};
use crate::lab::site::{Site, SiteConfig};
use crate::lab::vpc::name::LabId;
use crate::lab::vpc::ns::OwnedNetns;
use crate::pool::snapshot::PoolSnapshot;
use driver::{Batch, Sandbox, Sandboxes, Subject, batch, reference};

/// Where Debian's containernetworking-plugins puts them.
const PLUGINS: &str = "/usr/lib/cni";
/// 8 ENIs of 30 addresses, the primary one included.
pub(super) const INSTANCE_TYPE: &str = "ecs.g7.4xlarge";
/// Calls at a time, calls of a batch, and how often a round goes through all
/// subjects, there and back: many short turns, between which the machine has
/// little time to change.
const BATCHES: [(usize, usize, usize); 2] = [(1, 10, 3), (16, 32, 2)];
const ROUNDS: usize = 24;
/// Before each batch: what the kernel still does for the one before is not its.
const PAUSE: Duration = Duration::from_millis(150);
/// Of the pool, so that it is warm again for the next round.
const QUARANTINE: Duration = Duration::from_secs(2);
const WARM_WITHIN: Duration = Duration::from_secs(60);

pub async fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let mut samples = steady(plan).await?;
    samples.extend(burst::measure(plan).await?);
    Ok(rows(&samples, |metric| match metric {
        "burst_calls" | "burst_seconds" => "ideal".to_owned(),
        "rss_mb" | "ebpf_adds_ms" => String::new(),
        _ => "ptp".to_owned(),
    }))
}

/// ADD and DEL of one pod after another and of many at a time.
async fn steady(plan: &Plan) -> anyhow::Result<Vec<Sample>> {
    let progress = &plan.progress;
    let plugins = Path::new(PLUGINS);
    for name in ["ptp", "bridge", "host-local"] {
        let there = plugins.join(name).exists();
        anyhow::ensure!(there, "no {name} in {PLUGINS}: apt-get install containernetworking-plugins");
    }
    let most = BATCHES.iter().map(|(_, count, _)| *count).max().unwrap_or(1);
    let agent = json!({ "pool": {
        // Of three batches some are still in quarantine.
        "min_idle": most * 4,
        "max_idle": 210,
        "quarantine": format!("{}s", QUARANTINE.as_secs()),
    }});
    let without = json!({ "bpffs": null, "services": { "enabled": false } });
    let sites = [
        site(plan, &plan.id, 0.2, agent.clone(), 1).await?,
        site(plan, &beside(&plan.id)?, 0.2, merged(agent, without), 1).await?,
    ];
    let measured = async {
        let prefix = plan.id.name("");
        let nodes = [OwnedNetns::create(&plan.id.name("ptp"))?, OwnedNetns::create(&plan.id.name("bridge"))?];
        let state = plan.id.state_dir();
        let subjects = [
            fairway(&sites[0], "fairway"),
            fairway(&sites[1], WITHOUT_EBPF),
            reference("ptp", plugins, nodes[0].path(), &state.join("ptp")),
            reference("bridge", plugins, nodes[1].path(), &state.join("bridge")),
        ];
        for site in &sites {
            bind_pods(site, most).await?;
        }
        let sandboxes = Sandboxes::create(&format!("{prefix}p"), most)?;
        let rounds = plan.rounds.unwrap_or(ROUNDS);
        let mut samples = Vec::new();
        for round in 0..rounds {
            progress.say(&format!("ADD and DEL, round {} of {rounds}", round + 1));
            for (parallel, count, turns) in BATCHES {
                let mut calls = vec![(Batch::default(), Batch::default()); subjects.len()];
                let order = (0..turns).flat_map(|turn| there_and_back(round + turn, subjects.len()));
                for (turn, whose) in order.enumerate() {
                    let subject = &subjects[whose];
                    if let Some(site) = sites.get(which(subject.name)) {
                        warm(site, count).await?;
                    }
                    tokio::time::sleep(PAUSE).await;
                    let which = sandboxes.of(&format!("{}{round}x{parallel}x{turn}", subject.name), count);
                    let (add, del) = add_and_del(subject.clone(), which, parallel).await?;
                    calls[whose].0.extend(add);
                    calls[whose].1.extend(del);
                }
                for (subject, (add, del)) in subjects.iter().zip(&calls) {
                    sample(&mut samples, subject.name, parallel, round, add, del);
                }
                added_by_ebpf(&mut samples, round);
            }
        }
        drop(sandboxes);
        Ok(samples)
    };
    let measured = measured.await;
    for site in sites {
        site.down().await?;
    }
    measured
}

/// The agent that attaches no programs.
const WITHOUT_EBPF: &str = "fairway_no_ebpf";

/// Which of the two sites is a subject's; none for the reference plugins.
fn which(subject: &str) -> usize {
    ["fairway", WITHOUT_EBPF].iter().position(|name| *name == subject).unwrap_or(usize::MAX)
}

/// A second lab beside that of this id.
fn beside(id: &LabId) -> anyhow::Result<LabId> {
    let short: String = id.as_str().chars().take(11).collect();
    Ok(format!("{short}w").parse()?)
}

fn merged(mut config: Value, more: Value) -> Value {
    if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
        config.extend(more);
    }
    config
}

/// The difference of the last two ADD medians of a round, one with programs and
/// one without.
fn added_by_ebpf(samples: &mut Vec<Sample>, round: usize) {
    let last = |name: &str| samples.iter().rev().find(|s| s.metric == "add_p50" && s.subject == name).cloned();
    if let (Some(with), Some(without)) = (last("fairway"), last(WITHOUT_EBPF)) {
        let value = with.value - without.value;
        samples.push(Sample { metric: "ebpf_adds_ms", value, round, ..with });
    }
}

fn sample(samples: &mut Vec<Sample>, subject: &str, parallel: usize, round: usize, add: &Batch, del: &Batch) {
    let params: Params = [("parallel".to_owned(), parallel.to_string())].into();
    let mut push = |metric, unit, value| {
        samples.push(Sample { metric, unit, subject: subject.to_owned(), params: params.clone(), round, value });
    };
    push("add_p50", "ms", add.milliseconds(0.5));
    push("add_p99", "ms", add.milliseconds(0.99));
    push("del_p50", "ms", del.milliseconds(0.5));
    push("del_p99", "ms", del.milliseconds(0.99));
    push("pods_per_second", "1/s", add.per_second());
}

async fn add_and_del(subject: Subject, sandboxes: Vec<Sandbox>, parallel: usize) -> anyhow::Result<(Batch, Batch)> {
    let calls = move || -> std::io::Result<(Batch, Batch)> {
        // After a pause the first call finds everything out of the caches.
        if let Some(first) = sandboxes.first() {
            let warm_up = [Sandbox { id: format!("{}w", first.id), ..first.clone() }];
            batch(&subject, "ADD", &warm_up, 1)?;
            batch(&subject, "DEL", &warm_up, 1)?;
        }
        let add = batch(&subject, "ADD", &sandboxes, parallel)?;
        let del = batch(&subject, "DEL", &sandboxes, parallel)?;
        Ok((add, del))
    };
    Ok(tokio::task::spawn_blocking(calls).await??)
}

/// A lab of one node whose pods are this suite's to start, not a kubelet's.
async fn site(plan: &Plan, id: &LabId, latency_scale: f64, agent: Value, seed: u64) -> anyhow::Result<Site> {
    let mut config = SiteConfig::new(id.clone(), 1, INSTANCE_TYPE)?;
    config.cloud.latency_scale = latency_scale;
    config.cloud.seed = seed;
    config.agent = agent;
    config.runs_pods = false;
    Site::up(config, &|step| plan.progress.say(step)).await
}

/// The shim as the site's conflist has it, for a runtime that runs one plugin.
fn fairway(site: &Site, name: &'static str) -> Subject {
    let node = &site.nodes[0].node;
    let root = &node.dirs().root;
    let config = json!({
        "cniVersion": "1.0.0",
        "name": "fairway",
        "type": "fairway-cni",
        "socket": root.join("cni.sock"),
        "spoolDir": root.join("spool"),
    });
    Subject {
        name,
        node: node.ns().path().to_owned(),
        plugin: node.dirs().cni_bin.join("fairway-cni"),
        config: config.to_string(),
    }
}

/// The pods as the API server has them once they are bound to the node.
async fn bind_pods(site: &Site, count: usize) -> anyhow::Result<()> {
    let node = &site.nodes[0].name;
    for n in 0..count {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "namespace": "default", "name": driver::pod_name(n) },
            "spec": { "nodeName": node, "containers": [{ "name": "c", "image": "registry.example/c:1" }] },
        });
        site.cluster.apply(pod).await?;
    }
    Ok(())
}

async fn snapshot(site: &Site) -> anyhow::Result<PoolSnapshot> {
    let socket = crate::debug::Listen::Unix(site.nodes[0].debug_socket());
    let view = crate::status::client::get(&socket, "/debug/pool").await?;
    serde_json::from_value(view).context("the pool's view")
}

/// Until this many addresses may be leased at once.
async fn warm(site: &Site, count: usize) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + WARM_WITHIN;
    loop {
        let pool = snapshot(site).await?;
        if pool.totals.idle >= count {
            return Ok(());
        }
        let now = tokio::time::Instant::now();
        anyhow::ensure!(now < deadline, "the pool is not warm: {:?}", pool.totals);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
