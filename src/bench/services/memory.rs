//! The resident memory of a whole agent that carries 10,000 Services of 4
//! endpoints: a process of its own on a node of the lab, told by the lab's API
//! server.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use super::control::{self, MEMORY_SERVICES};
use super::fleet::NAMESPACE;
use super::{Metric, Task};
use crate::bench::Plan;
use crate::bench::cni::rss_mb;
use crate::bench::stats::Sample;
use crate::debug::Listen;
use crate::lab::site::{Site, SiteConfig};

const INSTANCE_TYPE: &str = "ecs.g7.2xlarge";
const PATIENCE: Duration = Duration::from_secs(60);

pub async fn measure(plan: &Plan, task: &Task) -> anyhow::Result<Vec<Sample>> {
    if !task.metrics.contains(&Metric::Memory) {
        return Ok(Vec::new());
    }
    let mut config = SiteConfig::new(plan.id.clone(), 1, INSTANCE_TYPE)?;
    config.cloud.latency_scale = 0.1;
    config.runs_pods = false;
    let site = Site::up(config, &|step| plan.progress.say(step)).await?;
    let measured = carried(plan, &site).await;
    site.down().await?;
    Ok(vec![control::sample("rss_mb", "MB", MEMORY_SERVICES, 0, measured?)])
}

async fn carried(plan: &Plan, site: &Site) -> anyhow::Result<f64> {
    plan.progress.say(&format!("{MEMORY_SERVICES} Services of 4 endpoints for an agent of the lab"));
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    site.cluster.apply(namespace).await?;
    for objects in control::objects() {
        for object in objects? {
            site.cluster.apply(object).await?;
        }
    }
    let socket = Listen::Unix(site.nodes[0].debug_socket());
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let view = crate::status::client::get(&socket, "/debug/services").await?;
        let carried = view["services"].as_u64().context("the agent's view of Services")?;
        if carried >= MEMORY_SERVICES as u64 {
            return rss_mb(site).await;
        }
        anyhow::ensure!(tokio::time::Instant::now() < deadline, "the agent carries {carried} Services only");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
