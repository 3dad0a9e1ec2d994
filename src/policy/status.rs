//! What PolicyCompiler tells of itself.

use serde::{Deserialize, Serialize};

use super::desk::Settled;
use super::index::Known;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySnapshot {
    /// What is still awaited before anything can be written.
    pub awaited: Option<String>,
    pub known: Known,
    #[serde(flatten)]
    pub settled: Settled,
    pub settled_ms_ago: Option<u64>,
    /// Pods whose ADD waits for the watch.
    pub waiting: usize,
    /// Why the tables cannot be written.
    pub error: Option<String>,
    /// Objects that cannot be, and why.
    pub refusals: Vec<String>,
    /// How many flows each rule has let through.
    pub hits: Vec<(String, u64)>,
}
