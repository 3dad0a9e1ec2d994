//! The agent's configuration file: YAML, typed, with limits, unknown keys
//! refused. Every section belongs to the module that it configures.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{cloud, cluster, cni, debug, netns, policy, pool, service, telemetry};

/// No configuration of ours is longer; what is, is not a configuration.
const LONGEST: u64 = 256 << 10;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// This node's name in the cluster. Empty: the variable NODE_NAME.
    pub node: String,
    /// What outlives a restart: the ledger.
    pub state_dir: PathBuf,
    /// A mounted bpf file system; none: pods' traffic is not counted.
    pub bpffs: Option<PathBuf>,
    /// Pods' packets go past the node's stack once it has seen a connection open.
    /// Absent: when Fairway carries Services, since beside kube-proxy the stack has
    /// to translate them.
    pub fast_path: Option<bool>,
    pub log: telemetry::Config,
    pub cloud: cloud::Config,
    pub pool: pool::Config,
    pub netns: netns::Config,
    pub cni: cni::Config,
    pub cluster: cluster::Config,
    pub services: service::Config,
    pub policies: policy::Config,
    pub debug: debug::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: String::new(),
            state_dir: "/var/lib/fairway".into(),
            bpffs: Some("/sys/fs/bpf".into()),
            fast_path: None,
            log: telemetry::Config::default(),
            cloud: cloud::Config::default(),
            pool: pool::Config::default(),
            netns: netns::Config::default(),
            cni: cni::Config::default(),
            cluster: cluster::Config::default(),
            services: service::Config::default(),
            policies: policy::Config::default(),
            debug: debug::Config::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration {path}: {cause}")]
    Read { path: PathBuf, cause: std::io::Error },
    #[error("configuration {path} is longer than {LONGEST} bytes")]
    TooLong { path: PathBuf },
    #[error("configuration {path}: {cause}")]
    Parse { path: PathBuf, cause: String },
    #[error("this node has no name: set `node` in the configuration, or the variable NODE_NAME (from spec.nodeName)")]
    NoNode,
    #[error("`pool.cluster_id` is empty: it marks this cluster's ENIs among the account's; give every cluster its own")]
    NoCluster,
    #[error("{0}")]
    Invalid(String),
}

impl Config {
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |cause| ConfigError::Read { path: path.to_owned(), cause };
        let mut text = String::new();
        File::open(path).map_err(read)?.take(LONGEST + 1).read_to_string(&mut text).map_err(read)?;
        if text.len() as u64 > LONGEST {
            return Err(ConfigError::TooLong { path: path.to_owned() });
        }
        let parsed = Self::parse(&text).map_err(|cause| ConfigError::Parse { path: path.to_owned(), cause })?;
        parsed.complete(|name| std::env::var(name).ok())
    }

    /// Pure: what the text says, unknown keys refused.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_saphyr::from_str(text).map_err(|e| e.to_string())
    }

    fn complete(mut self, variable: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        if self.node.is_empty() {
            self.node = variable("NODE_NAME").unwrap_or_default();
        }
        if self.node.is_empty() {
            return Err(ConfigError::NoNode);
        }
        if self.pool.cluster_id.is_empty() {
            return Err(ConfigError::NoCluster);
        }
        self.cloud.validate().map_err(|e| ConfigError::Invalid(e.to_string()))?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_the_rest_is_default() {
        let config =
            Config::parse("node: n1\npool:\n  cluster_id: c1\n  quarantine: 5s\ndebug:\n  listen: 127.0.0.1:9000\n")
                .unwrap();
        assert_eq!((config.node.as_str(), config.pool.cluster_id.as_str()), ("n1", "c1"));
        assert_eq!(config.pool.quarantine.as_secs(), 5);
        assert_eq!(config.cni, cni::Config::default());
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = Config::parse("nodename: n1\n").unwrap_err();
        assert!(error.contains("nodename"), "{error}");
        let error = Config::parse("pool:\n  min_idel: 3\n").unwrap_err();
        assert!(error.contains("min_idel"), "{error}");
    }

    #[test]
    fn a_node_without_a_name_or_cluster_says_how_to_give_it_one() {
        let unnamed = Config::default().complete(|_| None).unwrap_err();
        assert!(unnamed.to_string().contains("NODE_NAME"));
        let named = Config::default().complete(|name| (name == "NODE_NAME").then(|| "n1".to_owned()));
        assert!(named.unwrap_err().to_string().contains("cluster_id"));
    }

    #[test]
    fn the_default_survives_a_round_trip() {
        let text = serde_json::to_string(&Config::default()).unwrap();
        assert_eq!(Config::parse(&text).unwrap(), Config::default());
    }
}
