//! `make demo`: two nodes, pods on both, a killed agent, and what it changed.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::report::{self, Report, gather};
use super::site::{Site, SiteConfig};
use super::vpc::name::LabId;
use super::workload::client::{Ask, Reach};
use crate::pool::audit::AuditReport;

const MANIFEST: &str = include_str!("demo.yaml");
const PODS: usize = 8;

/// Prints each step with the time it came at.
pub struct Progress {
    began: Instant,
}

impl Progress {
    pub fn start() -> Self {
        Self { began: Instant::now() }
    }
    pub fn say(&self, what: &str) {
        let mut out = std::io::stderr().lock();
        let (dim, plain) = if out.is_terminal() { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
        let _ = writeln!(out, "{dim}{:>6.1} s{plain}  {what}", self.began.elapsed().as_secs_f64());
    }
}

/// True when everything the demo shows is as it should be.
pub async fn run(id: LabId, nodes: usize, latency_scale: f64, json: bool) -> anyhow::Result<bool> {
    let progress = Progress::start();
    let mut config = SiteConfig::new(id, nodes, "ecs.g7.2xlarge")?;
    config.cloud.latency_scale = latency_scale;
    super::cli::notice_dead(&config.id, &progress);
    let mut interrupt = super::cli::Interrupt::listen()?;
    let Some(site) = Site::up_unless(interrupt.wait(), config, &|step| progress.say(step)).await? else {
        progress.say("interrupted; nothing is left behind");
        return Ok(false);
    };
    let outcome = tokio::select! {
        outcome = show(&site, &progress, json) => outcome,
        () = interrupt.wait() => {
            progress.say("interrupted");
            Ok(false)
        }
    };
    progress.say("taking everything down");
    site.down().await?;
    progress.say("nothing is left behind");
    outcome
}

async fn show(site: &Site, progress: &Progress, json: bool) -> anyhow::Result<bool> {
    progress.say(&format!("applying the demo's manifest: {PODS} pods, one of them with an ENI of its own"));
    let skipped = super::run::apply(site, MANIFEST.as_bytes()).await?;
    wait_pods(site, PODS, Duration::from_secs(120)).await?;
    progress.say("every pod is ready; asking every pod from every pod");
    let mut before = gather(site, 0).await?;
    before.skipped = skipped;

    let victim = &site.nodes[0];
    progress.say(&format!("kill -9 of the agent on {}, while its pods are being asked", victim.name));
    let kept = survive(site, &before).await;
    site.wait_ready(Duration::from_secs(30)).await?;
    progress.say("the agent is back; comparing ledger, cloud, kernel and cluster");
    let after = gather(site, 0).await?;
    let mut audits = Vec::new();
    for (node, view) in super::site::agent_views(site, "/debug/audit").await {
        let audit: AuditReport = serde_json::from_value(view).context("the audit's answer")?;
        audits.push((node, audit));
    }
    let changed = differences(&before, &after);
    let clean = audits.len() == site.nodes.len() && audits.iter().all(|(_, a)| a.clean());
    let ok = before.ok() && after.ok() && kept.is_ok() && changed.is_empty() && clean;
    if json {
        println!("{}", serde_json::to_string_pretty(&before)?);
        return Ok(ok);
    }
    println!("\n{}", report::text(&before));
    println!("kill -9 of the agent on {}:", victim.name);
    match &kept {
        Ok(lost) => println!("  traffic through the node: {lost}"),
        Err(e) => println!("  traffic through the node: FAILED: {e}"),
    }
    match changed.as_slice() {
        [] => println!("  pods, addresses and ENIs: nothing changed"),
        all => all.iter().for_each(|c| println!("  CHANGED: {c}")),
    }
    for (node, audit) in &audits {
        println!(
            "  audit of {node}: {} ENIs, {} addresses, {} leases, {} findings",
            audit.enis,
            audit.addresses,
            audit.leases,
            audit.findings.len()
        );
        audit.findings.iter().for_each(|f| println!("    {:?} {} {}", f.kind, f.what, f.detail));
        audit.unknown.iter().for_each(|u| println!("    not compared: {u}"));
    }
    println!("\n{}\n", if ok { "All is as it should be." } else { "NOT as it should be: see above." });
    Ok(ok)
}

/// Keep asking a pod on the first node from one elsewhere while the agent of
/// the first is killed and comes back.
async fn survive(site: &Site, report: &Report) -> anyhow::Result<String> {
    let victim = &site.nodes[0];
    let on = |here: bool| {
        report.pods.iter().find(move |p| (p.node == victim.name) == here && p.port.is_some() && !p.addresses.is_empty())
    };
    let (server, client) = (on(true).context("no pod on the first node")?, on(false).context("no pod elsewhere")?);
    let to = (server.addresses[0], server.port.unwrap_or_default()).into();
    let from = super::vpc::ns::Netns::open(client.netns.as_ref().context("no namespace")?)?;
    let asking = async {
        let (mut asked, mut lost) = (0u32, 0u32);
        let until = tokio::time::Instant::now() + Duration::from_secs(3);
        while tokio::time::Instant::now() < until {
            asked += 1;
            lost += u32::from(Ask::new(to).within(Duration::from_millis(500)).tcp(&from).await.is_err());
        }
        (asked, lost)
    };
    let killing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        victim.node.kill_agent().await
    };
    let ((asked, lost), killed) = tokio::join!(asking, killing);
    anyhow::ensure!(killed.is_some(), "there was no agent to kill");
    anyhow::ensure!(lost == 0, "{lost} of {asked} requests got no answer");
    Ok(format!("{asked} connections made meanwhile, none refused or lost"))
}

/// What is not as it was, in words.
fn differences(before: &Report, after: &Report) -> Vec<String> {
    let mut found = Vec::new();
    for pod in &before.pods {
        match after.pods.iter().find(|p| p.namespace == pod.namespace && p.name == pod.name) {
            None => found.push(format!("pod {} is gone", pod.name)),
            Some(now) if now.addresses != pod.addresses || now.eni != pod.eni => {
                found.push(format!(
                    "pod {}: {:?} on {} was {:?} on {}",
                    pod.name, now.addresses, now.eni, pod.addresses, pod.eni
                ));
            }
            Some(_) => {}
        }
    }
    let ids = |r: &Report| r.enis.iter().map(|e| (e.id.clone(), e.addresses)).collect::<Vec<_>>();
    if ids(before) != ids(after) {
        found.push(format!("ENIs: {:?} was {:?}", ids(after), ids(before)));
    }
    let failed = |r: &&Reach| r.outcome.is_err();
    found.extend(after.reach.iter().filter(failed).map(|r| format!("{} no longer reaches {}", r.from, r.to)));
    found
}

/// Until this many pods are ready.
pub async fn wait_pods(site: &Site, count: usize, patience: Duration) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let records: Vec<_> = site.nodes.iter().flat_map(|n| n.kubelet.records()).filter(|r| !r.ended).collect();
        let ready = records.iter().filter(|r| r.ready).count();
        if ready >= count {
            return Ok(());
        }
        if tokio::time::Instant::now() > deadline {
            let why: Vec<String> =
                records.iter().filter_map(|r| Some(format!("{}: {}", r.pod, r.failures.last()?))).collect();
            anyhow::bail!("{ready} of {count} pods are ready after {} s\n{}", patience.as_secs(), why.join("\n"));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
