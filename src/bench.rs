//! `fairway bench`: comparisons on one machine in one run, as ratios.
//!
//! A suite measures its subjects in short interleaved rounds and writes
//! `<out>/<suite>.json`, a list of [`stats::Row`]. Absolute values say little
//! about another machine; a ratio within a round does.

pub mod cni;
pub mod network;
pub mod stats;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::lab::cli::interrupted;
use crate::lab::demo::Progress;
use crate::lab::vpc::name::LabId;
use stats::Row;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  fairway bench cni\n  fairway bench network --rounds 40\n  fairway bench        # all"
)]
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// ADD and DEL beside the reference plugins, and a burst on a cold node.
    Cni,
    /// Traffic between pods on two nodes, beside node to node and an overlay.
    Network,
}

/// What every suite is told.
pub struct Plan {
    pub id: LabId,
    pub rounds: Option<usize>,
    pub progress: Progress,
}

pub async fn run(args: Args) -> anyhow::Result<bool> {
    crate::telemetry::init(&crate::telemetry::Config { filter: "warn".to_owned(), ..Default::default() });
    if !nix::unistd::geteuid().is_root() {
        bail!("the comparisons make network namespaces and devices: run them as root (sudo)");
    }
    if cfg!(debug_assertions) {
        eprintln!("This is a debug build: its figures mean nothing; build with --release.");
    }
    let suites = if args.suites.is_empty() { vec![Suite::Cni, Suite::Network] } else { args.suites };
    let plan = Plan { id: args.id, rounds: args.rounds, progress: Progress::start() };
    for suite in suites {
        let measured = async {
            match suite {
                Suite::Cni => cni::measure(&plan).await,
                Suite::Network => network::measure(&plan).await,
            }
        };
        let rows = tokio::select! {
            rows = measured => rows?,
            _ = interrupted() => return Ok(false),
        };
        let name = match suite {
            Suite::Cni => "cni",
            Suite::Network => "network",
        };
        println!("{}", stats::table(&rows));
        write(&args.out, name, &rows)?;
    }
    Ok(true)
}

fn write(out: &Path, suite: &str, rows: &[Row]) -> anyhow::Result<()> {
    let path = out.join(format!("{suite}.json"));
    std::fs::create_dir_all(out)
        .and_then(|()| std::fs::write(&path, format!("{:#}\n", serde_json::json!(rows))))
        .with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    Ok(())
}
