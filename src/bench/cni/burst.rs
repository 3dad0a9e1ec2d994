//! 200 pods at once on a node that has no address yet.
//!
//! Measured against `ideal`. Its calls are the fewest that the API's limits
//! allow: an ENI holds 30 addresses and comes with all of them, so a create and
//! an attach for each 30 pods. Its time is what the simulated cloud itself
//! spent on the slowest of those ENIs, all of them asked for at once.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use super::driver::{Sandboxes, batch};
use crate::bench::Plan;
use crate::bench::stats::{Params, Sample};
use crate::lab::cloud::EniKind;

const PODS: usize = 200;
const PER_ENI: usize = 30;
const ROUNDS: usize = 3;

pub async fn measure(plan: &Plan) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let rounds = plan.rounds.unwrap_or(ROUNDS).min(ROUNDS);
    for round in 0..rounds {
        plan.progress.say(&format!("{PODS} pods on a cold node, round {} of {rounds}", round + 1));
        one(plan, round, &mut samples).await?;
    }
    Ok(samples)
}

async fn one(plan: &Plan, round: usize, samples: &mut Vec<Sample>) -> anyhow::Result<()> {
    // No stock: the node is as cold as one that has just booted.
    let agent = json!({ "pool": { "min_idle": 0, "max_idle": 0 } });
    let site = super::site(plan, &plan.id, 1.0, agent, round as u64 + 1).await?;
    let params: Params = [("pods".to_owned(), PODS.to_string())].into();
    let mut push = |metric, unit, subject: &str, value| {
        samples.push(Sample { metric, unit, subject: subject.to_owned(), params: params.clone(), round, value });
    };
    let measured = async {
        let sandboxes = Sandboxes::create(&plan.id.name("b"), PODS)?;
        let which = sandboxes.of(&format!("burst{round}"), PODS);
        let subject = super::fairway(&site, "fairway");
        let since = site.cloud.now_ms();
        super::bind_pods(&site, PODS).await?;
        let (added, undo) = tokio::task::spawn_blocking({
            let (subject, which) = (subject.clone(), which.clone());
            move || (batch(&subject, "ADD", &which, PODS), (subject, which))
        })
        .await?;
        let rss = rss_mb(&site).await?;
        let calls = site.cloud.calls(since);
        let state = site.cloud.state();
        let secondary = || state.enis.iter().filter(|e| e.instance.is_some() && e.kind == EniKind::Secondary);
        let took = secondary().map(|e| e.latency_ms).max().unwrap_or(0);
        let reads = calls.total - calls.mutating();
        // Before the site goes down, whatever came of it.
        let (subject, which) = undo;
        let deleted = tokio::task::spawn_blocking(move || batch(&subject, "DEL", &which, 8)).await?;
        drop(sandboxes);
        let added = added?;
        deleted?;
        plan.progress.say(&format!(
            "{:.2} s, of which the cloud {:.2} s; {} calls, {reads} reads",
            added.wall.as_secs_f64(),
            took as f64 / 1e3,
            calls.mutating()
        ));
        push("burst_calls", "calls", "fairway", calls.mutating() as f64);
        push("burst_calls", "calls", "ideal", (2 * PODS.div_ceil(PER_ENI)) as f64);
        push("burst_seconds", "s", "fairway", added.wall.as_secs_f64());
        push("burst_seconds", "s", "ideal", Duration::from_millis(took).as_secs_f64());
        push("rss_mb", "MB", "fairway", rss);
        Ok(())
    };
    let measured = measured.await;
    site.down().await?;
    measured
}

/// The agent's resident memory.
pub async fn rss_mb(site: &crate::lab::site::Site) -> anyhow::Result<f64> {
    let pid = site.nodes[0].node.agent_pid().await.context("the agent does not run")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024.0 / 1e6)
}
