//! A whole lab for end-to-end tests: real agents in real namespaces, small
//! delays, swept away even when a test fails; and the accounting that every
//! one of them ends with, by readings of its own.
#![allow(dead_code)]

pub mod accounts;
pub mod direct;
pub mod pods;
#[path = "../support/skip.rs"]
mod skipping;

use std::time::Duration;

use fairway::debug::Listen;
use fairway::lab::kube::KubeLab;
use fairway::lab::node::agent::AgentSpec;
use fairway::lab::node::down;
use fairway::lab::site::{Site, SiteConfig, SiteNode, tail};
use fairway::lab::vpc::name::LabId;
use serde_json::{Value, json};
pub use skipping::skip;
use skipping::{IP, NFT, missing_of};

pub const TYPE: &str = "ecs.g7.2xlarge";

/// What these tests cannot do without, or `None` when all is there.
pub fn missing() -> Option<&'static str> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let cgroups = mounts.lines().any(|l| l.split(' ').nth(2) == Some("cgroup2"));
    missing_of(&[NFT, IP]).or((!cgroups).then_some("a mounted cgroup2 file system"))
}

struct Cleanup(LabId);

impl Drop for Cleanup {
    fn drop(&mut self) {
        let _ = down::sweep(&self.0);
    }
}

/// A running lab. [`Lab::down`] at the end of a good test; else it is swept.
pub struct Lab {
    // Dropped in this order.
    _keep: Keep,
    pub site: Site,
    _cleanup: Cleanup,
}

/// With FAIRWAY_KEEP=seconds a failed test's lab stays that long, to be looked at.
struct Keep;

impl Drop for Keep {
    fn drop(&mut self) {
        let seconds = std::env::var("FAIRWAY_KEEP").ok().and_then(|s| s.parse().ok());
        if let (true, Some(seconds)) = (std::thread::panicking(), seconds) {
            std::thread::sleep(Duration::from_secs(seconds));
        }
    }
}

/// Short times, so that cool-downs, returns and retries happen within a test.
pub fn quick() -> Value {
    let limit = json!({"per_minute": 6000, "burst": 600});
    let limits: serde_json::Map<String, Value> = [
        "CreateNetworkInterface",
        "AttachNetworkInterface",
        "DetachNetworkInterface",
        "DeleteNetworkInterface",
        "AssignPrivateIpAddresses",
        "UnassignPrivateIpAddresses",
        "AssignIpv6Addresses",
        "UnassignIpv6Addresses",
        "DescribeNetworkInterfaces",
        "DescribeInstanceTypes",
        "DescribeVSwitches",
        "Metadata",
    ]
    .map(|api| (api.to_owned(), limit.clone()))
    .into_iter()
    .collect();
    json!({
        "cloud": {"limits": limits},
        "pool": {
            "min_idle": 2, "max_idle": 4, "quarantine": "500ms", "release_delay": "1s", "resync": "2s",
            "sandbox_gone_after": "1s", "vswitch_cool_off": "2s", "device_timeout": "5s",
        },
    })
}

/// `letter` tells the labs of one test file apart; the process id the rest.
pub async fn lab(letter: &str, nodes: usize, shape: impl FnOnce(&mut SiteConfig)) -> Lab {
    let id: LabId = format!("{letter}{}", std::process::id()).parse().unwrap();
    let cleanup = Cleanup(id.clone());
    let mut config = SiteConfig::new(id, nodes, TYPE).unwrap();
    config.program = env!("CARGO_BIN_EXE_fairway").into();
    config.cloud.latency_scale = 0.02;
    config.cloud.throttle.default_per_minute = 0;
    config.cloud.throttle.per_api.clear();
    config.cloud.throttle.account_per_minute = 0;
    config.status_interval = Duration::from_millis(500);
    config.backoff = (Duration::from_millis(200), Duration::from_secs(1));
    config.agent = quick();
    shape(&mut config);
    let site = Site::up(config, &|_| ()).await.unwrap();
    Lab { _keep: Keep, site, _cleanup: cleanup }
}

/// Lay one JSON object over another.
pub fn lay(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                lay(under.entry(key).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}

impl Lab {
    pub fn node(&self, index: usize) -> &SiteNode {
        &self.site.nodes[index]
    }

    /// The API stand-in.
    pub fn kube(&self) -> &KubeLab {
        self.site.cluster.stand_in.as_ref().unwrap()
    }

    /// Take everything down; what is still there afterwards fails the test.
    pub async fn down(self) {
        let id = self.site.id().clone();
        self.site.down().await.unwrap();
        assert_eq!(down::sweep(&id).unwrap(), down::Swept::default(), "the lab left something behind");
    }

    /// Start a node's agent anew, in place of the one that runs.
    pub async fn start_agent(&self, index: usize, env: &[(&str, &str)], restart: Option<Duration>) {
        let node = &self.node(index).node;
        let spec = AgentSpec {
            program: env!("CARGO_BIN_EXE_fairway").into(),
            args: vec!["agent".into(), "--config".into(), node.dirs().agent_config.display().to_string()],
            env: env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            restart_after: restart,
        };
        node.start_agent(spec).await.unwrap();
    }

    /// One view of the agent's, or why there is none.
    pub async fn view(&self, index: usize, path: &str) -> Result<Value, String> {
        let socket = Listen::Unix(self.node(index).debug_socket());
        fairway::status::client::get(&socket, path).await.map_err(|e| e.to_string())
    }

    /// Until the agent says that it has reconciled.
    pub async fn agent_ready(&self, index: usize) {
        let socket = Listen::Unix(self.node(index).debug_socket());
        self.until("the agent to be ready", Duration::from_secs(30), async || {
            let ready = fairway::status::client::get_text(&socket, "/readyz").await;
            ready.map(drop).map_err(|e| e.to_string())
        })
        .await;
    }

    /// Until `holds`, or fail with why it does not and the agents' last words.
    pub async fn until<T>(
        &self,
        what: &str,
        patience: Duration,
        mut holds: impl AsyncFnMut() -> Result<T, String>,
    ) -> T {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            // Another process's state has no event to wait for.
            let why = match holds().await {
                Ok(value) => return value,
                Err(why) => why,
            };
            if tokio::time::Instant::now() > deadline {
                panic!("waited {patience:?} for {what}: {why}\n{}", self.last_words());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn last_words(&self) -> String {
        let words =
            self.site.nodes.iter().map(|n| format!("-- agent {}\n{}", n.name, tail(&n.node.dirs().agent_log, 25)));
        words.collect::<Vec<_>>().join("\n")
    }
}
