//! How pods are wired: the `netns` part of the configuration file.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::names::IFNAMSIZ;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The pods' gateway: link-local, on the host link, a permanent neighbour.
    pub gateway4: Ipv4Addr,
    pub gateway6: Ipv6Addr,
    /// What host links' names begin with; 12 hex digits follow.
    pub link_prefix: String,
    /// Added to an ENI's primary address to give the number of its table.
    pub table_base: u32,
    /// Priority of `to <pod> lookup main`; comes before `rule_from_pod`.
    pub rule_to_pod: u32,
    /// Priority of `from <pod> lookup <the ENI's table>`.
    pub rule_from_pod: u32,
    /// For ENIs and pods; absent: as the ENI's device has it.
    pub mtu: Option<u32>,
    /// What exclusive pods reach over their host link besides the node itself.
    pub node_local: Vec<IpNet>,
    /// A sysfs mounted in the node's network namespace.
    pub sysfs: PathBuf,
    /// Whether the receive queues of shared ENIs are spread over cores.
    pub spread_receive: SpreadReceive,
    /// How many threads wire pods side by side.
    pub threads: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            gateway4: Ipv4Addr::new(169, 254, 1, 1),
            gateway6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
            link_prefix: "fw".to_owned(),
            table_base: 0,
            rule_to_pod: 512,
            rule_from_pod: 1536,
            mtu: None,
            node_local: vec![IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16))],
            sysfs: PathBuf::from("/sys"),
            spread_receive: SpreadReceive::Auto,
            threads: 4,
        }
    }
}

/// When receive queues are spread over cores (RPS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpreadReceive {
    /// From four cores on. With fewer, the core it moves a packet to is the one
    /// where a pod sends or receives, and bytes per second fall by a fifth
    /// (docs/benchmarks.md).
    #[default]
    Auto,
    Always,
    /// The device's interrupts are spread by somebody else.
    Never,
}

impl SpreadReceive {
    pub(super) fn applies(self, cores: usize) -> bool {
        match self {
            Self::Auto => cores >= 4,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// A value that cannot work, with the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("netns.{field}: {cause}")]
pub struct BadConfig {
    pub field: &'static str,
    pub cause: String,
}

impl Config {
    pub fn validate(&self) -> Result<(), BadConfig> {
        let bad = |field, cause: &str| Err(BadConfig { field, cause: cause.to_owned() });
        if self.gateway4.octets()[..2] != [169, 254] {
            return bad("gateway4", "must be a link-local address (169.254.0.0/16)");
        }
        if !self.gateway6.is_unicast_link_local() {
            return bad("gateway6", "must be a link-local address (fe80::/10)");
        }
        let letters = self.link_prefix.bytes().all(|b| b.is_ascii_lowercase());
        if !letters || self.link_prefix.is_empty() || self.link_prefix.len() > IFNAMSIZ - 12 - 1 {
            return bad("link_prefix", "must be one or two lower-case letters");
        }
        if self.rule_to_pod == 0 || self.rule_to_pod >= self.rule_from_pod || self.rule_from_pod >= 32766 {
            return bad("rule_to_pod", "want 0 < rule_to_pod < rule_from_pod < 32766");
        }
        if self.mtu.is_some_and(|mtu| !(576..=65_535).contains(&mtu)) {
            return bad("mtu", "must be 576 to 65535");
        }
        if self.node_local.iter().any(|net| net.prefix_len() == 0) {
            return bad("node_local", "a default route would take all of a pod's traffic to the node");
        }
        if !(1..=64).contains(&self.threads) {
            return bad("threads", "must be 1 to 64");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid_and_each_bad_value_is_named() {
        assert_eq!(Config::default().validate(), Ok(()));
        let bad = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.validate().map_err(|e| e.field)
        };
        assert_eq!(bad(|c| c.gateway4 = Ipv4Addr::new(10, 0, 0, 1)), Err("gateway4"));
        assert_eq!(bad(|c| c.gateway6 = Ipv6Addr::LOCALHOST), Err("gateway6"));
        assert_eq!(bad(|c| c.link_prefix = "toolong".into()), Err("link_prefix"));
        assert_eq!(bad(|c| c.rule_to_pod = 2000), Err("rule_to_pod"));
        assert_eq!(bad(|c| c.mtu = Some(100)), Err("mtu"));
        assert_eq!(bad(|c| c.node_local = vec!["0.0.0.0/0".parse().unwrap()]), Err("node_local"));
        assert_eq!(bad(|c| c.threads = 0), Err("threads"));
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(serde_json::from_str::<Config>(r#"{"mtu": 1400}"#).is_ok());
        assert!(serde_json::from_str::<Config>(r#"{"mtuu": 1400}"#).is_err());
    }
}
