//! What a lab is made of: its nodes, its cloud, its programs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::API;
use crate::lab::cloud::CloudConfig;
use crate::lab::vpc::name::LabId;

/// One node to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    pub name: String,
    pub instance_type: String,
    pub vswitch: String,
}

#[derive(Clone, Debug)]
pub struct SiteConfig {
    pub id: LabId,
    pub nodes: Vec<NodeSpec>,
    pub cloud: CloudConfig,
    pub dual: bool,
    /// A kubeconfig of the API server to use in place of the stand-in.
    pub kubeconfig: Option<PathBuf>,
    pub mtu: u32,
    /// Laid over the agents' configuration, key by key.
    pub agent: Value,
    pub agent_env: Vec<(String, String)>,
    /// A killed agent comes back after this long.
    pub restart_agents: Option<Duration>,
    pub program: PathBuf,
    /// Another shim than the one that is installed.
    pub shim: Option<PathBuf>,
    /// The reference plugins' folder, to chain `portmap` after Fairway.
    pub plugins: Option<PathBuf>,
    pub cni_version: String,
    /// Whether the kubelets run the pods bound to their nodes; otherwise the
    /// caller makes their CNI calls.
    pub runs_pods: bool,
    /// How often kubelets ask STATUS; containerd: every five seconds.
    pub status_interval: Duration,
    /// First and longest pause of a kubelet between tries.
    pub backoff: (Duration, Duration),
}

impl SiteConfig {
    /// Nodes `n1`, `n2`, … of one instance type, spread over the vSwitches.
    pub fn new(id: LabId, nodes: usize, instance_type: &str) -> anyhow::Result<Self> {
        let cloud = CloudConfig { sans: vec![API.to_string()], ..CloudConfig::default() };
        let vswitches: Vec<&str> = cloud.vswitches.iter().map(|v| v.id.as_str()).collect();
        let nodes = (0..nodes)
            .map(|n| NodeSpec {
                name: format!("n{}", n + 1),
                instance_type: instance_type.to_owned(),
                vswitch: vswitches[n % vswitches.len()].to_owned(),
            })
            .collect();
        let program = std::env::current_exe().context("this program's own path")?;
        let plugins = Path::new("/usr/lib/cni");
        Ok(Self {
            id,
            nodes,
            cloud,
            dual: false,
            kubeconfig: None,
            mtu: 1500,
            agent: json!({}),
            agent_env: Vec::new(),
            restart_agents: Some(Duration::from_millis(200)),
            program,
            shim: None,
            plugins: plugins.join("portmap").exists().then(|| plugins.to_owned()),
            cni_version: "1.0.0".to_owned(),
            runs_pods: true,
            status_interval: Duration::from_secs(5),
            backoff: (Duration::from_secs(1), Duration::from_secs(10)),
        })
    }
}
