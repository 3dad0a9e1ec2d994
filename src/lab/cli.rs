//! `fairway lab …`: arguments and the commands behind them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Subcommand;

use super::cloud::{self, RegisterInstance, ServeConfig};
use super::demo::{self, Progress, wait_pods};
use super::manifest;
use super::node::down;
use super::report::{self, gather};
use super::site::{Site, SiteConfig};
use super::vpc::name::LabId;
use super::vpc::{Vpc, VpcConfig};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  fairway lab demo\n  fairway lab run deployment.yaml --nodes 3\n  fairway lab up --nodes 2 &   # then: kubectl --kubeconfig /run/fairway-lab/lab/kubeconfig get pods -o wide\n  fairway lab down"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Shape {
    /// The lab's name: several run side by side.
    #[arg(long, default_value = "lab")]
    id: LabId,
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    /// An instance type of the simulated cloud.
    #[arg(long, default_value = "ecs.g7.2xlarge")]
    instance_type: String,
    /// 1 is as slow as the real cloud, 0 does not wait at all.
    #[arg(long, default_value_t = 0.2)]
    latency_scale: f64,
    /// IPv4 and IPv6.
    #[arg(long)]
    dual: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a lab up and keep it until Ctrl-C.
    Up(Shape),
    /// Run Kubernetes manifests in a lab of their own and report.
    Run {
        #[command(flatten)]
        shape: Shape,
        /// Manifests as written for a real cluster.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[arg(long)]
        json: bool,
        /// How long pods may take to become ready.
        #[arg(long, default_value_t = 120)]
        patience: u64,
    },
    /// Remove everything of a lab, also of one that crashed.
    Down {
        #[arg(long, default_value = "lab")]
        id: LabId,
        /// Every lab of this machine.
        #[arg(long)]
        all: bool,
    },
    /// Two nodes, pods on both, a killed agent, and what it changed.
    Demo {
        #[arg(long, default_value = "demo")]
        id: LabId,
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        #[arg(long, default_value_t = 0.2)]
        latency_scale: f64,
        #[arg(long)]
        json: bool,
    },
    /// The simulated cloud alone: API, metadata service and VPC, for agents that somebody else runs.
    Cloud {
        #[arg(long, default_value = "cloud")]
        id: LabId,
        /// What to serve and where (YAML); without it two zones on loopback.
        #[arg(long)]
        config: Option<PathBuf>,
        /// A network namespace that is a node, by its `ip netns` name; more can be
        /// registered over HTTP (POST /lab/instances).
        #[arg(long = "node")]
        nodes: Vec<String>,
        #[arg(long, default_value = "ecs.g7.2xlarge")]
        instance_type: String,
        /// 1 is as slow as the real cloud, 0 does not wait at all.
        #[arg(long)]
        latency_scale: Option<f64>,
    },
    /// The Kubernetes API stand-in alone.
    KubeApi {
        #[arg(long, default_value = "127.0.0.1:6443")]
        listen: SocketAddr,
        /// Write a kubeconfig for it here.
        #[arg(long)]
        kubeconfig: Option<PathBuf>,
    },
}

/// SIGINT or SIGTERM.
pub async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
        return std::future::pending().await;
    };
    tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
}

pub async fn run(args: Args) -> anyhow::Result<bool> {
    crate::telemetry::init(&crate::telemetry::Config { filter: "warn".to_owned(), ..Default::default() });
    if !matches!(args.command, Command::KubeApi { .. }) && !nix::unistd::geteuid().is_root() {
        bail!("the lab makes network namespaces and devices: run it as root (sudo)");
    }
    match args.command {
        Command::Up(shape) => up(shape).await,
        Command::Run { shape, files, json, patience } => run_files(shape, &files, json, patience).await,
        Command::Down { id, all } => {
            let ids = if all { down::labs() } else { vec![id] };
            for id in ids {
                let swept = tokio::task::spawn_blocking({
                    let id = id.clone();
                    move || down::sweep(&id)
                })
                .await??;
                println!("lab {id}: {}", if swept.is_empty() { "nothing to remove" } else { "removed" });
            }
            Ok(true)
        }
        Command::Demo { id, nodes, latency_scale, json } => demo::run(id, nodes, latency_scale, json).await,
        Command::Cloud { id, config, nodes, instance_type, latency_scale } => {
            let mut config = match config {
                Some(path) => {
                    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                    serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?
                }
                None => ServeConfig::default(),
            };
            config.cloud.latency_scale = latency_scale.unwrap_or(config.cloud.latency_scale);
            serve_cloud(id, config, &nodes, &instance_type).await
        }
        Command::KubeApi { listen, kubeconfig } => {
            if let Some(path) = kubeconfig {
                std::fs::write(&path, super::kube::kubeconfig(listen)).with_context(|| path.display().to_string())?;
            }
            println!("Kubernetes API at http://{listen}; Ctrl-C ends it");
            super::kube::serve(Default::default(), listen, interrupted()).await?;
            Ok(true)
        }
    }
}

/// The cloud with a VPC of its own for its packets.
async fn serve_cloud(
    id: LabId,
    mut config: ServeConfig,
    nodes: &[String],
    instance_type: &str,
) -> anyhow::Result<bool> {
    let claim = down::claim(&id)?;
    let vpc = Vpc::up(VpcConfig::new(id.clone())).await?;
    let vswitches: Vec<String> = config.cloud.vswitches.iter().map(|v| v.id.clone()).collect();
    for (n, netns) in nodes.iter().enumerate() {
        config.nodes.push(RegisterInstance {
            instance_id: format!("i-{netns}"),
            instance_type: instance_type.to_owned(),
            vswitch: vswitches.get(n % vswitches.len().max(1)).cloned().unwrap_or_default(),
            zone: None,
            netns: Some(netns.clone()),
            security_groups: Vec::new(),
            primary_ip: None,
            ipv6_count: 0,
        });
    }
    config.ca_file.get_or_insert_with(|| id.state_dir().join("ca.pem"));
    let ca_file = config.ca_file.clone();
    let served = cloud::serve(config, Arc::new(vpc.clone()), |running| {
        let at = |what: &str, url: &str, address: Option<SocketAddr>| {
            if let Some(address) = address {
                println!("{what:<10} {url}://{address}");
            }
        };
        at("API", "https", running.https);
        at("API", "http", running.http);
        at("metadata", "http", running.metadata);
        at("admin", "http", running.admin);
        if let Some(ca) = &ca_file {
            println!("CA         {}", ca.display());
        }
        for instance in running.cloud.instances() {
            println!("instance   {} of type {}", instance.id, instance.instance_type);
        }
        println!("Ctrl-C ends it.");
    })
    .await;
    vpc.down().await?;
    drop(claim);
    tokio::task::spawn_blocking(move || down::sweep(&id)).await??;
    served?;
    Ok(true)
}

fn site_config(shape: &Shape) -> anyhow::Result<SiteConfig> {
    let mut config = SiteConfig::new(shape.id.clone(), shape.nodes, &shape.instance_type)?;
    config.cloud.latency_scale = shape.latency_scale;
    config.dual = shape.dual;
    Ok(config)
}

async fn up(shape: Shape) -> anyhow::Result<bool> {
    let progress = Progress::start();
    let site = Site::up(site_config(&shape)?, &|step| progress.say(step)).await?;
    let state = site.id().state_dir();
    println!("kubectl --kubeconfig {} get nodes", state.join("kubeconfig").display());
    for node in &site.nodes {
        println!("fairway status --endpoint {}", node.debug_socket().display());
    }
    if let Some(admin) = site.admin {
        println!("curl http://{admin}/lab/state");
    }
    println!("Ctrl-C takes it down.");
    interrupted().await;
    progress.say("taking everything down");
    site.down().await?;
    Ok(true)
}

async fn run_files(shape: Shape, files: &[PathBuf], json: bool, patience: u64) -> anyhow::Result<bool> {
    let mut texts = Vec::new();
    for file in files {
        texts.push(std::fs::read(file).with_context(|| file.display().to_string())?);
    }
    let progress = Progress::start();
    let site = Site::up(site_config(&shape)?, &|step| progress.say(step)).await?;
    let work = async {
        let since = site.cloud.now_ms();
        let mut skipped = Vec::new();
        for (file, text) in files.iter().zip(&texts) {
            progress.say(&format!("applying {}", file.display()));
            skipped.extend(apply(&site, text)?);
        }
        settle(&site, Duration::from_secs(patience), &progress).await?;
        let mut report = gather(&site, since).await?;
        report.skipped = skipped;
        match json {
            true => println!("{}", serde_json::to_string_pretty(&report)?),
            false => println!("\n{}", report::text(&report)),
        }
        Ok(report.ok())
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        _ = interrupted() => Ok(false),
    };
    progress.say("taking everything down");
    site.down().await?;
    outcome
}

/// Apply a file of manifests; returns what was skipped.
pub fn apply(site: &Site, text: &[u8]) -> anyhow::Result<Vec<String>> {
    let manifest = manifest::parse(text)?;
    for item in manifest.objects {
        let name = format!("{}/{}", item.kind.kind, item.name);
        site.kube.apply(item.object).with_context(|| name)?;
    }
    Ok(manifest.skipped.iter().map(ToString::to_string).collect())
}

/// Until the controllers have made their pods and all are ready; a pod that is
/// not ready in time is the report's to tell.
async fn settle(site: &Site, patience: Duration, progress: &Progress) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + patience;
    let mut stable = 0;
    let mut last = 0;
    while stable < 10 && tokio::time::Instant::now() < deadline {
        let pods = site.kube.list("Pod").len();
        stable = if pods == last && pods > 0 { stable + 1 } else { 0 };
        last = pods;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    progress.say(&format!("{last} pods; waiting until they are ready"));
    if let Err(e) = wait_pods(site, last, deadline.saturating_duration_since(tokio::time::Instant::now())).await {
        progress.say(&format!("{e}"));
    }
    Ok(())
}
