//! `fairway bench`: comparisons on one machine in one run, as ratios.
//!
//! A suite measures its subjects in short interleaved rounds and writes
//! `<out>/<suite>.json`, a list of [`stats::Row`], `services` a plot beside it. Absolute values say little
//! about another machine; a ratio within a round does.

pub mod cni;
pub mod network;
pub mod policy;
pub mod services;
pub mod stats;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::lab::cli::interrupted;
use crate::lab::demo::Progress;
use crate::lab::vpc::name::LabId;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  fairway bench cni
  fairway bench network --rounds 40
  fairway bench services --quick                      # a first look, two minutes
  fairway bench services --services 1,1000 --metrics tcp_crr,udp_rr
  fairway bench services                              # about twenty minutes
  fairway bench policy
  fairway bench                                       # all")]
pub struct Args {
    /// Which comparisons to run; all when none is named.
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// Rounds of each comparison; more rounds, narrower quartiles.
    #[arg(long)]
    rounds: Option<usize>,
    /// Where `<suite>.json` goes.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// The name of the labs it brings up.
    #[arg(long, default_value = "bench")]
    id: LabId,
    #[command(flatten)]
    services: services::Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// ADD and DEL beside the reference plugins, and a burst on a cold node.
    Cni,
    /// Traffic between pods on two nodes, beside node to node and an overlay.
    Network,
    /// Services beside kube-proxy's iptables and nftables rules.
    Services,
    /// NetworkPolicies: their cost to traffic and to the agent.
    Policy,
}

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Suite::Cni => "cni",
            Suite::Network => "network",
            Suite::Services => "services",
            Suite::Policy => "policy",
        }
    }
}

/// What every suite is told.
pub struct Plan {
    pub id: LabId,
    pub rounds: Option<usize>,
    pub progress: Progress,
    pub services: services::Options,
}

pub async fn run(args: Args) -> anyhow::Result<bool> {
    crate::telemetry::init(&crate::telemetry::Config { filter: "warn".to_owned(), ..Default::default() });
    if !nix::unistd::geteuid().is_root() {
        bail!("the comparisons make network namespaces and devices: run them as root (sudo)");
    }
    if cfg!(debug_assertions) {
        eprintln!("This is a debug build: its figures mean nothing; build with --release.");
    }
    let suites = match args.suites.is_empty() {
        true => <Suite as clap::ValueEnum>::value_variants().to_vec(),
        false => args.suites,
    };
    let plan = Plan { id: args.id, rounds: args.rounds, progress: Progress::start(), services: args.services };
    for suite in suites {
        let measured = async {
            match suite {
                Suite::Cni => cni::measure(&plan).await,
                Suite::Network => network::measure(&plan).await,
                Suite::Services => services::measure(&plan).await,
                Suite::Policy => policy::measure(&plan).await,
            }
        };
        let rows = tokio::select! {
            rows = measured => rows?,
            _ = interrupted() => return Ok(false),
        };
        let table = match suite {
            Suite::Services => services::show::table(&rows),
            _ => stats::table(&rows),
        };
        println!("{table}");
        put(&args.out, &format!("{}.json", suite.name()), &format!("{:#}\n", serde_json::json!(rows)))?;
        if suite == Suite::Services
            && let Some(plot) = services::plot::svg(&rows)
        {
            put(&args.out, "services.svg", &plot)?;
        }
    }
    Ok(true)
}

fn put(out: &Path, file: &str, text: &str) -> anyhow::Result<()> {
    let path = out.join(file);
    std::fs::create_dir_all(out)
        .and_then(|()| std::fs::write(&path, text))
        .with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    Ok(())
}
