//! What happened to each pod, for reports.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::cni::Timed;
use super::spec::PodRef;

/// Failures kept per pod.
const MAX_FAILURES: usize = 20;

/// A pod's start, phase by phase, and everything that went wrong.
#[derive(Clone, Debug, Serialize)]
pub struct PodRecord {
    pub pod: PodRef,
    #[serde(skip)]
    seen: Instant,
    pub phases: Phases,
    /// Sandboxes tried, successful ones included.
    pub attempts: u32,
    /// Ids of the sandboxes it had, the present one last.
    pub sandboxes: Vec<String>,
    pub netns: Option<PathBuf>,
    pub ips: Vec<IpAddr>,
    pub ready: bool,
    pub ended: bool,
    /// The plugin chain's last result.
    pub result: Option<serde_json::Value>,
    /// Every plugin call about this pod, in order.
    pub calls: Vec<Timed>,
    /// The first failures, as kubelet saw them.
    pub failures: Vec<String>,
    pub failure_count: u32,
}

/// Points in time since the pod was seen, and durations of steps.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Phases {
    /// Since seen, until the network was ready.
    pub network: Option<Duration>,
    /// Making the last sandbox's namespace.
    pub namespace: Option<Duration>,
    /// The last successful ADD of the whole chain.
    pub add: Option<Duration>,
    /// Since seen, until it ran.
    pub running: Option<Duration>,
    /// Since seen, until it was first ready.
    pub ready: Option<Duration>,
    /// DEL with its retries.
    pub del: Option<Duration>,
}

impl PodRecord {
    pub(super) fn new(pod: PodRef, seen: Instant) -> Self {
        Self {
            pod,
            seen,
            phases: Phases::default(),
            attempts: 0,
            sandboxes: Vec::new(),
            netns: None,
            ips: Vec::new(),
            ready: false,
            ended: false,
            result: None,
            calls: Vec::new(),
            failures: Vec::new(),
            failure_count: 0,
        }
    }

    pub(super) fn since_seen(&self) -> Option<Duration> {
        Some(self.seen.elapsed())
    }

    pub(super) fn failed(&mut self, message: &str) {
        self.failure_count += 1;
        if self.failures.len() < MAX_FAILURES {
            self.failures.push(message.to_owned());
        }
    }
}
