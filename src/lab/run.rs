//! `fairway lab run`: manifests applied to a lab, and what came of them.
//!
//! The same steps whether the lab is this process's own or another's that is up;
//! then [`control`](super::control) carries the [`Job`] there.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::demo::wait_pods;
use super::manifest;
use super::report::{Report, gather};
use super::site::Site;

/// Hears each step as it begins.
pub type Say<'a> = &'a (dyn Fn(&str) + Sync);

/// Manifests as written for a real cluster, and how long pods may take.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Name and text of each file.
    pub files: Vec<(String, String)>,
    pub patience: Duration,
}

impl Job {
    pub fn read(files: &[PathBuf], patience: Duration) -> anyhow::Result<Self> {
        let read = |path: &PathBuf| {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
            // What is wrong with a file is said before a lab is made for it.
            manifest::parse(text.as_bytes()).with_context(|| name.clone())?;
            Ok((name, text))
        };
        Ok(Self { files: files.iter().map(read).collect::<anyhow::Result<_>>()?, patience })
    }
}

pub async fn run(site: &Site, job: &Job, say: Say<'_>) -> anyhow::Result<Report> {
    let since = site.cloud.now_ms();
    let mut skipped = Vec::new();
    for (name, text) in &job.files {
        say(&format!("applying {name}"));
        skipped.extend(apply(site, text.as_bytes()).await.with_context(|| name.clone())?);
    }
    settle(site, job.patience, say).await?;
    let mut report = gather(site, since).await?;
    report.skipped = skipped;
    Ok(report)
}

/// Apply a file of manifests; returns what was skipped.
pub async fn apply(site: &Site, text: &[u8]) -> anyhow::Result<Vec<String>> {
    let manifest = manifest::parse(text)?;
    for item in manifest.objects {
        let name = format!("{}/{}", item.kind.kind, item.name);
        site.cluster.apply(item.object).await.context(name)?;
    }
    Ok(manifest.skipped.iter().map(ToString::to_string).collect())
}

/// Until the controllers have made their pods and all are ready; a pod that is
/// not ready in time is the report's to tell.
async fn settle(site: &Site, patience: Duration, say: Say<'_>) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + patience;
    // Of a server elsewhere the controllers have further to go.
    let (pause, quiet) = match site.cluster.stand_in {
        Some(_) => (Duration::from_millis(50), 10),
        None => (Duration::from_millis(250), 12),
    };
    let mut stable = 0;
    let mut last = 0;
    while stable < quiet && tokio::time::Instant::now() < deadline {
        let pods = site.pods().await?.iter().filter(|p| wants_to_run(p)).count();
        stable = if pods == last { stable + 1 } else { 0 };
        last = pods;
        tokio::time::sleep(pause).await;
    }
    say(&format!("{last} pods; waiting until they are ready"));
    if let Err(e) = wait_pods(site, last, deadline.saturating_duration_since(tokio::time::Instant::now())).await {
        say(&format!("{e}"));
    }
    Ok(())
}

fn wants_to_run(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
}
