//! Logs and spans: one subscriber for the process, human or JSON.
//!
//! Levels: TRACE per packet or netlink message; DEBUG what an engineer needs,
//! names and addresses included; INFO what a user would call a change; WARN
//! something went wrong and was handled; ERROR somebody must look.

use std::io::IsTerminal as _;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Human,
    Json,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub format: LogFormat,
    /// Directives as `level` or `target=level`, comma-separated. The variable
    /// FAIRWAY_LOG takes precedence.
    pub filter: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { format: LogFormat::Human, filter: "info".to_owned() }
    }
}

/// Install the process's subscriber. A second call changes nothing.
pub fn init(config: &Config) {
    let filter = std::env::var("FAIRWAY_LOG").unwrap_or_else(|_| config.filter.clone());
    let filter = EnvFilter::try_new(&filter).unwrap_or_else(|error| {
        eprintln!("fairway: log filter {filter:?} is not understood ({error}); using \"info\"");
        EnvFilter::new("info")
    });
    let base = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        .with_thread_names(true);
    let _ = match config.format {
        LogFormat::Human => base.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => base.json().flatten_event(true).try_init(),
    };
}
