//! What a simulated cloud is made of: region, VPC, vSwitches, keys, limits,
//! latencies. Purpose: one validated value that every other part is built from.
//! Owner: whoever starts the lab. Invariants: after [`CloudConfig::validate`]
//! every vSwitch lies in the VPC, overlaps no other and has room for an ENI.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::catalog::InstanceType;

/// Names are cut here: nothing the cloud names is longer.
pub const MAX_NAME: usize = 128;
const MAX_VSWITCHES: usize = 256;
const MAX_SECURITY_GROUPS: usize = 256;
const MAX_KEYS: usize = 256;
const MAX_TYPES: usize = 256;

/// The whole configuration. Every field has a default that makes a usable
/// two-zone VPC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudConfig {
    pub region: String,
    pub account_id: u64,
    pub vpc_id: String,
    pub vpc_cidr4: Ipv4Net,
    pub vpc_cidr6: Option<Ipv6Net>,
    pub vswitches: Vec<VSwitchSpec>,
    pub security_groups: Vec<String>,
    /// Long-lived keys; the metadata service issues temporary ones besides.
    pub keys: Vec<AccessKey>,
    /// RAM role of every instance; `None`: the metadata service issues nothing.
    pub role: Option<String>,
    pub sts_lifetime_seconds: u64,
    /// Added to the built-in catalogue; the same name replaces.
    pub instance_types: Vec<InstanceType>,
    pub latency: Latencies,
    /// 1 = as slow as the real cloud, 0 = no delay at all.
    pub latency_scale: f64,
    /// Seed of everything random: identifiers, addresses, jitter, faults.
    pub seed: u64,
    /// How far the metadata service is behind the API (scaled as well).
    pub metadata_lag_ms: u64,
    /// Refuse metadata reads without a token.
    pub metadata_token_required: bool,
    pub throttle: ThrottleConfig,
    /// ENIs of the account in the region.
    pub eni_quota: u32,
    /// Private IPv4 addresses in one security group.
    pub security_group_quota: u32,
    /// Names and addresses the server certificate is valid for, besides the
    /// region's endpoint names and loopback.
    pub sans: Vec<String>,
}

impl Default for CloudConfig {
    fn default() -> Self {
        let v4 = |a, b, c, d, len| Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len);
        let v6 = |index, len| Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xfa1, 0, index, 0, 0, 0, 0), len);
        let vswitch = |id: &str, zone: &str, cidr4, index| VSwitchSpec {
            id: id.into(),
            zone: zone.into(),
            cidr4,
            cidr6: Some(v6(index, 64)),
            name: String::new(),
        };
        let a = vswitch("vsw-lab-a", "cn-hangzhou-h", v4(10, 0, 0, 0, 20), 0xa);
        let b = vswitch("vsw-lab-b", "cn-hangzhou-i", v4(10, 0, 16, 0, 20), 0xb);
        Self {
            region: "cn-hangzhou".into(),
            account_id: 1_000_000_000_000_001,
            vpc_id: "vpc-lab".into(),
            vpc_cidr4: v4(10, 0, 0, 0, 16),
            vpc_cidr6: Some(v6(0, 48)),
            vswitches: vec![a, b],
            security_groups: vec!["sg-lab".into()],
            keys: vec![AccessKey { id: "lab-key-id".into(), secret: "lab-key-secret".into() }],
            role: Some("FairwayNodeRole".into()),
            sts_lifetime_seconds: 6 * 3600,
            instance_types: Vec::new(),
            latency: Latencies::default(),
            latency_scale: 1.0,
            seed: 1,
            metadata_lag_ms: 1500,
            metadata_token_required: false,
            throttle: ThrottleConfig::default(),
            eni_quota: 50_000,
            security_group_quota: 65_536,
            sans: Vec::new(),
        }
    }
}

/// One vSwitch: a zone's subnet of the VPC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VSwitchSpec {
    pub id: String,
    pub zone: String,
    pub cidr4: Ipv4Net,
    #[serde(default)]
    pub cidr6: Option<Ipv6Net>,
    #[serde(default)]
    pub name: String,
}

/// A key pair of the account.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessKey {
    pub id: String,
    pub secret: String,
}

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// How long the real cloud takes, in milliseconds. `spread` is the share by
/// which a single call may be faster or slower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Latencies {
    pub create: u64,
    /// Until the call is answered; the ENI is Attaching from then on.
    pub attach_answer: u64,
    /// From the call until the ENI is InUse.
    pub attach: u64,
    pub assign: u64,
    pub unassign: u64,
    pub detach_answer: u64,
    /// From the call until the ENI is Available again.
    pub detach: u64,
    pub delete: u64,
    pub describe: u64,
    pub spread: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            create: 1000,
            attach_answer: 300,
            attach: 4000,
            assign: 600,
            unassign: 600,
            detach_answer: 300,
            detach: 3000,
            delete: 400,
            describe: 100,
            spread: 0.25,
        }
    }
}

/// Token buckets of the account: calls per minute, the burst being one
/// minute's worth. 0 means no limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleConfig {
    /// Of an API that has no entry in `per_api`.
    pub default_per_minute: u32,
    pub per_api: BTreeMap<String, u32>,
    /// Over all APIs together.
    pub account_per_minute: u32,
}

impl Default for ThrottleConfig {
    fn default() -> Self {
        let per_api = [
            ("CreateNetworkInterface", 500),
            ("AttachNetworkInterface", 500),
            ("DetachNetworkInterface", 400),
            ("DeleteNetworkInterface", 500),
            ("AssignPrivateIpAddresses", 400),
            ("UnassignPrivateIpAddresses", 400),
            ("AssignIpv6Addresses", 400),
            ("UnassignIpv6Addresses", 400),
            ("DescribeNetworkInterfaces", 800),
            ("DescribeNetworkInterfaceAttribute", 2000),
            ("DescribeInstanceTypes", 400),
            ("DescribeVSwitches", 300),
        ];
        Self {
            default_per_minute: 500,
            per_api: per_api.into_iter().map(|(api, limit)| (api.to_owned(), limit)).collect(),
            account_per_minute: 6000,
        }
    }
}

/// The configuration cannot describe a cloud.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{what} {value:?} must be 1 to {MAX_NAME} characters of a-z, A-Z, 0-9, '-', '_' or '.'")]
    Name { what: &'static str, value: String },
    #[error("{what}: {count} entries, 1 to {max} are possible")]
    Count { what: &'static str, count: usize, max: usize },
    #[error("{what} {id} is there twice")]
    Twice { what: &'static str, id: String },
    #[error("vSwitch {0}: its blocks must lie in the VPC's")]
    OutsideVpc(String),
    #[error("vSwitch {0}: its blocks overlap those of vSwitch {1}")]
    Overlap(String, String),
    #[error("vSwitch {0}: the IPv4 block must be /16 to /29 and the IPv6 block a /64")]
    Size(String),
    #[error("{what} must be within {range}")]
    Range { what: &'static str, range: &'static str },
}

pub(super) fn check_name(what: &'static str, value: &str) -> Result<(), ConfigError> {
    let fits = (1..=MAX_NAME).contains(&value.len());
    if fits && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        Ok(())
    } else {
        Err(ConfigError::Name { what, value: value.chars().take(MAX_NAME).collect() })
    }
}

fn check_count(what: &'static str, count: usize, max: usize) -> Result<(), ConfigError> {
    if (1..=max).contains(&count) { Ok(()) } else { Err(ConfigError::Count { what, count, max }) }
}

impl CloudConfig {
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name("region", &self.region)?;
        check_name("vpc_id", &self.vpc_id)?;
        check_count("vswitches", self.vswitches.len(), MAX_VSWITCHES)?;
        check_count("security_groups", self.security_groups.len(), MAX_SECURITY_GROUPS)?;
        if self.keys.len() > MAX_KEYS {
            return Err(ConfigError::Count { what: "keys", count: self.keys.len(), max: MAX_KEYS });
        }
        if self.instance_types.len() > MAX_TYPES {
            let count = self.instance_types.len();
            return Err(ConfigError::Count { what: "instance_types", count, max: MAX_TYPES });
        }
        if let Some(role) = &self.role {
            check_name("role", role)?;
        }
        for group in &self.security_groups {
            check_name("security group", group)?;
        }
        for key in &self.keys {
            check_name("access key", &key.id)?;
        }
        for (index, vswitch) in self.vswitches.iter().enumerate() {
            self.check_vswitch(vswitch, &self.vswitches[..index])?;
        }
        if !(0.0..=10.0).contains(&self.latency_scale) {
            return Err(ConfigError::Range { what: "latency_scale", range: "0 and 10" });
        }
        if !(0.0..=0.9).contains(&self.latency.spread) {
            return Err(ConfigError::Range { what: "latency.spread", range: "0 and 0.9" });
        }
        if !(1..=86_400).contains(&self.sts_lifetime_seconds) {
            return Err(ConfigError::Range { what: "sts_lifetime_seconds", range: "1 and 86400" });
        }
        if self.metadata_lag_ms > super::metadata::MAX_LAG_MS {
            return Err(ConfigError::Range { what: "metadata_lag_ms", range: "0 and 120000" });
        }
        Ok(())
    }

    fn check_vswitch(&self, vswitch: &VSwitchSpec, before: &[VSwitchSpec]) -> Result<(), ConfigError> {
        check_name("vSwitch", &vswitch.id)?;
        check_name("zone", &vswitch.zone)?;
        let id = || vswitch.id.clone();
        if !(16..=29).contains(&vswitch.cidr4.prefix_len()) || vswitch.cidr6.is_some_and(|c| c.prefix_len() != 64) {
            return Err(ConfigError::Size(id()));
        }
        let inside6 = vswitch.cidr6.is_none_or(|six| self.vpc_cidr6.is_some_and(|vpc| vpc.contains(&six)));
        if !self.vpc_cidr4.contains(&vswitch.cidr4) || !inside6 {
            return Err(ConfigError::OutsideVpc(id()));
        }
        for other in before {
            if other.id == vswitch.id {
                return Err(ConfigError::Twice { what: "vSwitch", id: id() });
            }
            let four = other.cidr4.contains(&vswitch.cidr4) || vswitch.cidr4.contains(&other.cidr4);
            let six = vswitch.cidr6.is_some() && vswitch.cidr6 == other.cidr6;
            if four || six {
                return Err(ConfigError::Overlap(id(), other.id.clone()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_configuration_is_valid() {
        CloudConfig::default().validate().unwrap();
    }

    #[test]
    fn a_configuration_that_cannot_be_is_refused_with_a_reason() {
        let mut config = CloudConfig::default();
        config.vswitches[1].cidr4 = "10.0.8.0/21".parse().unwrap();
        assert!(matches!(config.validate(), Err(ConfigError::Overlap(..))));
        config.vswitches[1].cidr4 = "10.1.0.0/24".parse().unwrap();
        assert!(matches!(config.validate(), Err(ConfigError::OutsideVpc(_))));
        config.vswitches[1].cidr4 = "10.0.16.0/30".parse().unwrap();
        assert!(matches!(config.validate(), Err(ConfigError::Size(_))));
        config.vswitches.truncate(1);
        config.latency_scale = f64::NAN;
        assert!(matches!(config.validate(), Err(ConfigError::Range { .. })));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let text = format!("{:?}", CloudConfig::default());
        assert!(text.contains("lab-key-id") && !text.contains("lab-key-secret"));
    }
}
