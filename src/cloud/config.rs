//! CloudApi's part of the agent's configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use http::Uri;
use http::uri::{Authority, Scheme};
use serde::{Deserialize, Serialize};

pub use super::credentials::Source;
use super::provider::Api;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub provider: ProviderName,
    /// Where the API is; asked of the metadata service when not given.
    pub region: Option<String>,
    pub endpoints: Endpoints,
    /// Certificates (PEM) trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    pub credentials: Source,
    /// One attempt of one call takes at most this long.
    pub call_timeout_ms: u64,
    pub connect_timeout_ms: u64,
    /// Calls in flight at the same time. A quarter is kept for waiting pods.
    pub max_in_flight: u32,
    /// Instead of the built-in limits.
    pub limits: BTreeMap<Api, Limit>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            provider: ProviderName::Aliyun,
            region: None,
            endpoints: Endpoints::default(),
            ca_file: None,
            credentials: Source::default(),
            call_timeout_ms: 20_000,
            connect_timeout_ms: 5_000,
            max_in_flight: 16,
            limits: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProviderName {
    Aliyun,
}

/// Base URLs instead of the regional ones. Plain http only where it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Endpoints {
    pub ecs: Option<String>,
    pub vpc: Option<String>,
    pub metadata: Option<String>,
}

/// One API's rate on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    pub per_minute: u32,
    pub burst: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("cloud.region {0:?} is not a region id such as cn-hangzhou")]
    Region(String),
    #[error("cloud.endpoints: {0:?} is not of the form https://host[:port] (or http://, where that is meant)")]
    Endpoint(String),
    #[error("cloud.{0} must be from {1} to {2}")]
    Range(&'static str, u64, u64),
    #[error("cloud.limits.{0}: per_minute must be from 1 to 60000 and burst from 2 to 10000")]
    Limit(&'static str),
}

impl Config {
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(region) = self.region.as_deref().filter(|r| !is_region(r)) {
            return Err(ConfigError::Region(region.to_owned()));
        }
        for url in [&self.endpoints.ecs, &self.endpoints.vpc, &self.endpoints.metadata].into_iter().flatten() {
            Endpoint::parse(url)?;
        }
        let ranges = [
            ("call_timeout_ms", self.call_timeout_ms, 100, 120_000),
            ("connect_timeout_ms", self.connect_timeout_ms, 10, 60_000),
            ("max_in_flight", self.max_in_flight.into(), 4, 128),
        ];
        for (name, value, least, most) in ranges {
            if !(least..=most).contains(&value) {
                return Err(ConfigError::Range(name, least, most));
            }
        }
        let fits = |l: &Limit| (1..=60_000).contains(&l.per_minute) && (2..=10_000).contains(&l.burst);
        match self.limits.iter().find(|(_, limit)| !fits(limit)) {
            Some((api, _)) => Err(ConfigError::Limit(api.name())),
            None => Ok(()),
        }
    }

    /// The limit of an API on this node.
    ///
    /// The account's quota is shared by every node and by tools we know nothing
    /// of, so no fixed number can be right: the burst covers what takes a node
    /// from empty to full (15 ENIs), the rate what batched refills of a busy
    /// node need, and the adaptive rate finds what the account has left. On
    /// 5,000 idle nodes the sum is what they do: nothing.
    pub fn limit(&self, api: Api) -> Limit {
        let built_in = match api {
            Api::CreateNetworkInterface
            | Api::AttachNetworkInterface
            | Api::AssignPrivateIpAddresses
            | Api::AssignIpv6Addresses => Limit { per_minute: 120, burst: 24 },
            Api::DetachNetworkInterface
            | Api::DeleteNetworkInterface
            | Api::UnassignPrivateIpAddresses
            | Api::UnassignIpv6Addresses => Limit { per_minute: 60, burst: 12 },
            Api::DescribeNetworkInterfaces => Limit { per_minute: 90, burst: 15 },
            Api::DescribeInstanceTypes => Limit { per_minute: 12, burst: 3 },
            Api::DescribeVSwitches => Limit { per_minute: 30, burst: 12 },
            Api::Metadata => Limit { per_minute: 240, burst: 30 },
        };
        self.limits.get(&api).copied().unwrap_or(built_in)
    }
}

/// Region ids become part of a host name, so they are checked strictly.
pub(super) fn is_region(s: &str) -> bool {
    let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=32).contains(&s.len()) && s.chars().all(ok) && !s.starts_with('-') && !s.ends_with('-')
}

/// Where a product's API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub scheme: Scheme,
    pub authority: Authority,
}

impl Endpoint {
    pub fn parse(url: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::Endpoint(url.to_owned());
        let parts = url.parse::<Uri>().map_err(|_| bad())?.into_parts();
        let bare = parts.path_and_query.as_ref().is_none_or(|p| p.as_str() == "/");
        match (parts.scheme, parts.authority) {
            (Some(scheme), Some(authority))
                if bare
                    && (scheme == Scheme::HTTPS || scheme == Scheme::HTTP)
                    && !authority.host().is_empty()
                    && !authority.as_str().contains('@') =>
            {
                Ok(Self { scheme, authority })
            }
            _ => Err(bad()),
        }
    }

    /// `path_and_query` starts with a slash.
    pub fn url(&self, path_and_query: &str) -> String {
        format!("{}://{}{path_and_query}", self.scheme, self.authority)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_an_empty_document_means_them() {
        Config::default().validate().unwrap();
        let empty: Config = serde_saphyr::from_str("{}").unwrap();
        assert_eq!(empty, Config::default());
    }

    #[test]
    fn everything_can_be_written_in_yaml() {
        let yaml = "
region: cn-hangzhou
endpoints: { ecs: 'https://10.0.0.1:8443', metadata: 'http://127.0.0.1:81' }
ca_file: /etc/fairway/ca.pem
credentials:
  files: { access_key_id: /s/id, access_key_secret: /s/secret }
max_in_flight: 8
limits:
  CreateNetworkInterface: { per_minute: 30, burst: 4 }
";
        let config: Config = serde_saphyr::from_str(yaml).unwrap();
        config.validate().unwrap();
        assert_eq!(config.limit(Api::CreateNetworkInterface), Limit { per_minute: 30, burst: 4 });
        assert!(matches!(config.credentials, Source::Files { .. }));
        let role: Config = serde_saphyr::from_str("credentials: { ram-role: { role: node } }").unwrap();
        assert_eq!(role.credentials, Source::RamRole { role: Some("node".to_owned()) });
    }

    #[test]
    fn misspelt_keys_and_bad_values_are_refused_with_their_name() {
        assert!(serde_saphyr::from_str::<Config>("regoin: x").is_err());
        assert!(serde_saphyr::from_str::<Config>("limits: { CreateEverything: { per_minute: 1, burst: 2 } }").is_err());
        let bad = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(bad(|c| c.region = Some("evil.example/".to_owned())).contains("cloud.region"));
        assert!(bad(|c| c.endpoints.ecs = Some("ftp://x".to_owned())).contains("ftp://x"));
        assert!(bad(|c| c.endpoints.vpc = Some("https://user@x".to_owned())).contains("user@x"));
        assert!(bad(|c| c.endpoints.vpc = Some("https://x/path".to_owned())).contains("https://x/path"));
        assert!(bad(|c| c.max_in_flight = 1).contains("max_in_flight"));
        assert!(
            bad(|c| c.limits = [(Api::Metadata, Limit { per_minute: 0, burst: 5 })].into()).contains("limits.Metadata")
        );
    }
}
