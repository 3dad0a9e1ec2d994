//! The `fairway` program: arguments, telemetry, exit code, nothing else.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use fairway::config::Config;
use fairway::{actor, agent, install, status, telemetry};

/// A pod network for Kubernetes on a cloud VPC.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the node agent.
    Agent {
        /// The configuration file (YAML).
        #[arg(long, default_value = "/etc/fairway/agent.yaml", env = "FAIRWAY_CONFIG")]
        config: PathBuf,
        /// Read and check the configuration, print it with its defaults, and exit.
        #[arg(long)]
        check: bool,
    },
    /// Show what this node's agent is doing.
    Status(status::Args),
    /// Show where a connection from this node goes: which Service, which backends, and why.
    Trace(status::trace::Args),
    /// Install the CNI shim, then the network configuration.
    InstallCni(InstallCni),
    /// A whole VPC on this machine: simulated cloud, Kubernetes stand-in, nodes.
    Lab(fairway::lab::cli::Args),
    /// Compare Fairway with what it replaces, on this machine, in one run.
    Bench(fairway::bench::Args),
}

#[derive(clap::Args)]
#[command(after_help = "Example:\n  fairway install-cni --bin-dir /host/opt/cni/bin --conf-dir /host/etc/cni/net.d")]
struct InstallCni {
    /// Another shim than the one that this program carries.
    #[arg(long)]
    shim: Option<PathBuf>,
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    #[arg(long, default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// The CNI version of the configuration: what the runtime and every chained plugin know.
    #[arg(long, default_value = "1.0.0")]
    cni_version: String,
    #[arg(long, default_value = "/run/fairway/cni.sock")]
    socket: PathBuf,
    #[arg(long, default_value = "/var/lib/fairway/spool")]
    spool: PathBuf,
    /// Leave hostPort to something else than the reference portmap plugin.
    #[arg(long)]
    no_portmap: bool,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Agent { config, check } => run_agent(&config, check),
        Command::Status(args) => multi(async move { status::run(&args).await.map_err(Into::into) }),
        Command::Trace(args) => multi(async move { status::trace::run(&args).await.map_err(Into::into) }),
        Command::InstallCni(args) => install_cni(&args),
        Command::Lab(args) => multi(async move { fairway::lab::cli::run(args).await }),
        Command::Bench(args) => multi(async move { fairway::bench::run(args).await }),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("fairway: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_agent(path: &std::path::Path, check: bool) -> anyhow::Result<bool> {
    let config = Config::load(path)?;
    if check {
        println!("{:#}", serde_json::to_value(&config)?);
        return Ok(true);
    }
    telemetry::init(&config.log);
    fairway::sys::memory::keep_little();
    actor::run(agent::run(config))?;
    Ok(true)
}

fn multi(work: impl Future<Output = anyhow::Result<bool>>) -> anyhow::Result<bool> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}

fn install_cni(args: &InstallCni) -> anyhow::Result<bool> {
    let conflist = install::Conflist {
        cni_version: args.cni_version.clone(),
        socket: args.socket.clone(),
        spool: args.spool.clone(),
        portmap: !args.no_portmap,
    };
    let shim = install::shim(args.shim.as_deref())?;
    install::install(&shim, &args.bin_dir, &args.conf_dir, &conflist)?;
    println!("installed {}/fairway-cni and {}/10-fairway.conflist", args.bin_dir.display(), args.conf_dir.display());
    Ok(true)
}
