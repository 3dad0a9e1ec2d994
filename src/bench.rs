//! `fairway bench`: comparisons on one machine in one run, as ratios.

pub mod cni;
pub mod overlay;
pub mod stats;
pub mod traffic;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which comparison to run.
    #[arg(value_enum)]
    suite: Suite,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    Cni,
    Network,
}

pub async fn run(args: Args) -> anyhow::Result<bool> {
    anyhow::bail!("suite {:?} is being written", args.suite)
}
