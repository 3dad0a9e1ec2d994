//! The names everyone shares: pods, attachments, ENIs, leases.
//!
//! Plain data, no behaviour beyond parsing and printing. Nothing here knows
//! an actor, a socket or a cloud.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl From<&str> for $name {
            fn from(s: &str) -> Self {
                Self(s.to_owned())
            }
        }
        impl From<String> for $name {
            fn from(s: String) -> Self {
                Self(s)
            }
        }
        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
    };
}

string_id!(
    /// An ENI, as the cloud names it (`eni-…`).
    EniId
);
string_id!(
    /// A vSwitch: one zone's subnet of the VPC (`vsw-…`).
    VSwitchId
);
string_id!(
    /// A security group (`sg-…`).
    SecurityGroupId
);
string_id!(
    /// This or another cloud instance (`i-…`).
    InstanceId
);
string_id!(
    /// A CNI container id: one pod sandbox.
    SandboxId
);
string_id!(
    /// Idempotency token of one cloud call; at most 64 ASCII characters.
    ClientToken
);

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `s` is not six colon-separated hex bytes.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a MAC address (want aa:bb:cc:dd:ee:ff)")]
pub struct BadMac(String);

impl FromStr for Mac {
    type Err = BadMac;
    fn from_str(s: &str) -> Result<Self, BadMac> {
        let mut out = [0u8; 6];
        let mut parts = s.split(':');
        for slot in &mut out {
            let part = parts.next().filter(|p| p.len() == 2);
            *slot = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(|| BadMac(s.to_owned()))?;
        }
        if parts.next().is_some() {
            return Err(BadMac(s.to_owned()));
        }
        Ok(Mac(out))
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

/// Which address families pods get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpStack {
    #[default]
    Ipv4,
    Dual,
}

/// A pod by name. Reservations belong to this.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodKey {
    pub namespace: String,
    pub name: String,
}

impl PodKey {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One CNI attachment: a sandbox and the interface in it. Ownership of an
/// address belongs to this, never to a pod name: the ADD of a pod's new sandbox
/// may arrive before the DEL of its old one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentId {
    pub sandbox: SandboxId,
    pub ifname: String,
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.sandbox, self.ifname)
    }
}

/// How a pod is attached to the VPC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// A secondary address of a shared ENI, over a veth pair and policy routing.
    #[default]
    Veth,
    /// An ENI of its own, moved into the pod's namespace.
    Exclusive,
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AttachMode::Veth => "veth",
            AttachMode::Exclusive => "exclusive",
        })
    }
}

/// A pod's bandwidth limits, in bits per second; `None` is unlimited.
/// Directions are the pod's: ingress is what it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    pub ingress_bps: Option<u64>,
    pub egress_bps: Option<u64>,
}

impl Bandwidth {
    pub fn is_unlimited(&self) -> bool {
        self.ingress_bps.is_none() && self.egress_bps.is_none()
    }
}

/// What a pod asks of the programs at its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Ports of the node are its: the node's stack translates some of its packets,
    /// so all must pass there.
    pub host_ports: bool,
    /// Services are resolved packet by packet, never when a process connects.
    pub per_packet: bool,
}

/// The network a vSwitch gives its ENIs. The gateway is the last address but
/// two of the IPv4 block (`…253` of a /24), as the cloud defines it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    pub cidr4: Ipv4Net,
    pub gateway4: Ipv4Addr,
    pub cidr6: Option<Ipv6Net>,
    pub gateway6: Option<Ipv6Addr>,
}

/// The ENI behind a lease, as the node's kernel side needs to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniRef {
    pub id: EniId,
    pub mac: Mac,
    pub vswitch: VSwitchId,
    pub primary4: Ipv4Addr,
    pub subnet: Subnet,
}

/// What an attachment holds: addresses the cloud has assigned to an ENI that is
/// attached to this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub attachment: AttachmentId,
    pub pod: PodKey,
    /// The Kubernetes UID, when the runtime passed one.
    pub pod_uid: Option<String>,
    pub mode: AttachMode,
    pub eni: EniRef,
    pub v4: Ipv4Addr,
    pub v6: Option<Ipv6Addr>,
    /// The namespace's path, as the runtime named it.
    pub netns: PathBuf,
    pub bandwidth: Bandwidth,
    #[serde(default)]
    pub traffic: Traffic,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_reads_back_as_printed() {
        let mac: Mac = "00:16:3e:0a:ff:01".parse().unwrap();
        assert_eq!(mac.to_string(), "00:16:3e:0a:ff:01");
    }

    #[test]
    fn garbage_is_not_a_mac() {
        for bad in ["", "00:16:3e:0a:ff", "00:16:3e:0a:ff:01:02", "0:16:3e:0a:ff:01", "zz:16:3e:0a:ff:01"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
    }
}
