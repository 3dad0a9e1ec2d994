//! The pool's part of the agent's configuration. Durations read `30s`, `5m`,
//! `250ms`, `1h`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::{IpStack, SecurityGroupId, VSwitchId};

/// How the vSwitch of a new ENI is chosen among those that are not exhausted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VSwitchPolicy {
    /// The first in the order of the configuration that has room.
    #[default]
    Ordered,
    Random,
    /// The one with the most free addresses.
    MostAvailable,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// ENIs carry it as a tag; ENIs of other clusters are never touched.
    pub cluster_id: String,
    pub ip_stack: IpStack,
    /// Idle addresses below this are refilled at once.
    pub min_idle: u32,
    /// Idle addresses above this are given back after `release_delay`.
    pub max_idle: u32,
    /// Whole ENIs kept ready for exclusive pods.
    pub idle_exclusive: u32,
    /// At most this many secondary ENIs, below what the instance type allows.
    pub max_enis: Option<u32>,
    /// In order of preference; empty means the node's own vSwitch.
    pub vswitches: Vec<VSwitchId>,
    pub vswitch_policy: VSwitchPolicy,
    /// Empty means those of the node's primary ENI.
    pub security_groups: Vec<SecurityGroupId>,
    /// A released address is not given to another pod for this long.
    #[serde(with = "duration")]
    pub quarantine: Duration,
    /// How long a StatefulSet pod's address is kept for the same pod name, for
    /// callers to put in their requests.
    #[serde(with = "duration")]
    pub reservation: Duration,
    #[serde(with = "duration")]
    pub release_delay: Duration,
    /// An exhausted vSwitch is avoided for this long.
    #[serde(with = "duration")]
    pub vswitch_cool_off: Duration,
    /// A lease whose network namespace is gone is released after this long.
    #[serde(with = "duration")]
    pub sandbox_gone_after: Duration,
    /// A lease whose pod is unknown to the cluster is released after this long.
    #[serde(with = "duration")]
    pub pod_gone_after: Duration,
    /// How often the ledger is compared with the cloud.
    #[serde(with = "duration")]
    pub resync: Duration,
    /// An unattached ENI of this cluster that no node claims is deleted by the
    /// elected node after this long.
    #[serde(with = "duration")]
    pub orphan_delay: Duration,
    /// Of one cloud call, its retries included.
    #[serde(with = "duration")]
    pub call_timeout: Duration,
    /// How long the device of an attached ENI may take to appear before the
    /// cloud is asked again.
    #[serde(with = "duration")]
    pub device_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster_id: String::new(),
            ip_stack: IpStack::Ipv4,
            min_idle: 5,
            max_idle: 15,
            idle_exclusive: 0,
            max_enis: None,
            vswitches: Vec::new(),
            vswitch_policy: VSwitchPolicy::Ordered,
            security_groups: Vec::new(),
            quarantine: Duration::from_secs(30),
            reservation: Duration::from_secs(300),
            release_delay: Duration::from_secs(300),
            vswitch_cool_off: Duration::from_secs(600),
            sandbox_gone_after: Duration::from_secs(60),
            pod_gone_after: Duration::from_secs(600),
            resync: Duration::from_secs(300),
            orphan_delay: Duration::from_secs(900),
            call_timeout: Duration::from_secs(30),
            device_timeout: Duration::from_secs(30),
        }
    }
}

impl Config {
    /// What deserializing cannot check.
    pub fn validate(&self) -> Result<(), String> {
        if self.cluster_id.is_empty() || self.cluster_id.len() > 128 {
            return Err("pool.cluster_id must be 1 to 128 characters: ENIs are tagged with it".to_owned());
        }
        if self.min_idle > self.max_idle {
            return Err(format!("pool.min_idle ({}) is above pool.max_idle ({})", self.min_idle, self.max_idle));
        }
        let positive = [
            ("call_timeout", self.call_timeout),
            ("device_timeout", self.device_timeout),
            ("resync", self.resync),
            ("vswitch_cool_off", self.vswitch_cool_off),
        ];
        match positive.iter().find(|(_, d)| *d < Duration::from_secs(1)) {
            Some((name, _)) => Err(format!("pool.{name} must be at least 1s")),
            None => Ok(()),
        }
    }

    /// A refill stops halfway between the limits, so that neither the next pod
    /// nor the next release needs a call.
    pub fn refill_to(&self) -> u32 {
        self.min_idle + self.max_idle.saturating_sub(self.min_idle) / 2
    }
}

/// `30s`, `5m`, `250ms`, `1h`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        let ms = d.as_millis();
        match ms {
            _ if !ms.is_multiple_of(1000) => s.collect_str(&format_args!("{ms}ms")),
            _ if ms == 0 || !ms.is_multiple_of(60_000) => s.collect_str(&format_args!("{}s", ms / 1000)),
            _ => s.collect_str(&format_args!("{}m", ms / 60_000)),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(d)?;
        parse(&text)
            .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a duration such as 30s, 5m or 1h")))
    }

    pub fn parse(text: &str) -> Option<Duration> {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = text.split_at(digits);
        let scale: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        number.parse::<u64>().ok()?.checked_mul(scale).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_configuration_reads_back_as_printed() {
        let config = Config { cluster_id: "c1".to_owned(), ..Config::default() };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
        config.validate().unwrap();
    }

    #[test]
    fn unknown_fields_and_bad_durations_are_refused_by_name() {
        let unknown = serde_json::from_str::<Config>(r#"{"max_idel": 3}"#).unwrap_err().to_string();
        assert!(unknown.contains("max_idel"), "{unknown}");
        for bad in ["30", "s", "-5s", "5 m", "1d", "99999999999999999999s", "9999999999999999999h"] {
            assert!(serde_json::from_value::<Config>(serde_json::json!({ "quarantine": bad })).is_err(), "{bad}");
        }
        assert!(Config { cluster_id: "c".into(), min_idle: 9, max_idle: 3, ..Config::default() }.validate().is_err());
    }
}
