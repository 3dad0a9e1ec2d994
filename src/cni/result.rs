//! CNI results: built from a lease, read from a `prevResult`, written in the
//! version that the caller speaks.
//!
//! Pure. Invariants: what is read in a version and written in it again is
//! unchanged; a result merged with a `prevResult` keeps all of it, and its
//! indices point to the same interfaces as before.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::{CniError, code};
use crate::model::{AttachMode, Lease};
use crate::netns::Wired;

/// A CNI version that this plugin speaks, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub const ALL: [Version; 4] = [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    pub fn name(self) -> &'static str {
        super::wire::SUPPORTED[self as usize]
    }
    pub fn parse(s: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.name() == s)
    }
}

/// The union of all versions' results; fields as in 1.1.0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CniResult {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    #[serde(default, rename = "socketPath", skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    #[serde(default, rename = "pciID", skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    pub address: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub dst: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    fn is_empty(&self) -> bool {
        *self == Dns::default()
    }
}

impl CniResult {
    /// What ADD made: the host's link, if there is one, and the pod's.
    pub fn of(lease: &Lease, wired: &Wired) -> Self {
        let sandbox = lease.netns.to_string_lossy().into_owned();
        let host = wired.host_ifname.as_ref().map(|name| Interface {
            name: name.clone(),
            mac: wired.host_mac.map(|m| m.to_string()).unwrap_or_default(),
            mtu: Some(wired.mtu),
            ..Interface::default()
        });
        let pod = Interface {
            name: lease.attachment.ifname.clone(),
            mac: wired.pod_mac.to_string(),
            mtu: Some(wired.mtu),
            sandbox,
            ..Interface::default()
        };
        let interfaces: Vec<_> = host.into_iter().chain([pod]).collect();
        let mut result = Self { interfaces, ..Self::default() };
        let subnet = &lease.eni.subnet;
        let exclusive = lease.mode == AttachMode::Exclusive;
        // A shared ENI's pod has its address alone; the default route leads to
        // the host's end of the link. An exclusive ENI is on its vSwitch.
        let gateway4 = exclusive.then_some(IpAddr::V4(subnet.gateway4));
        let len4 = if exclusive { subnet.cidr4.prefix_len() } else { 32 };
        result.push(IpAddr::V4(lease.v4), len4, gateway4);
        if let Some(v6) = lease.v6 {
            let gateway6 = subnet.gateway6.filter(|_| exclusive).map(IpAddr::V6);
            let len6 = subnet.cidr6.filter(|_| exclusive).map_or(128, |net| net.prefix_len());
            result.push(IpAddr::V6(v6), len6, gateway6);
        }
        result
    }

    fn push(&mut self, address: IpAddr, prefix_len: u8, gateway: Option<IpAddr>) {
        let full = if address.is_ipv4() { 32 } else { 128 };
        let address = IpNet::new_assert(address, prefix_len.min(full));
        let any = if full == 32 { IpAddr::from([0u8; 4]) } else { IpAddr::from([0u8; 16]) };
        self.ips.push(Ip { address, gateway, interface: Some(self.interfaces.len() - 1) });
        self.routes.push(Route {
            dst: IpNet::new_assert(any, 0),
            gw: gateway,
            mtu: None,
            advmss: None,
            priority: None,
            table: None,
            scope: None,
        });
    }

    /// Read a `prevResult`.
    pub fn read(value: &Value) -> Result<Self, CniError> {
        let bad = |why: String| CniError::new(code::DECODE, "prevResult is not a CNI result").remedy(why);
        if !value.is_object() {
            return Err(bad("it is not a JSON object".into()));
        }
        let result = Self::deserialize(value).map_err(|e| bad(e.to_string()))?;
        let count = result.interfaces.len();
        match result.ips.iter().find_map(|ip| ip.interface.filter(|i| *i >= count)) {
            Some(index) => Err(bad(format!("an address is on interface {index} of {count}"))),
            None => Ok(result),
        }
    }

    /// The result of a chain so far, and ours after it.
    pub fn after(self, mut previous: Self) -> Result<Self, CniError> {
        let ours = |i: &Interface| (i.name.clone(), i.sandbox.clone());
        let twice = self.interfaces.iter().find(|i| previous.interfaces.iter().any(|p| ours(p) == ours(i)));
        if let Some(i) = twice {
            let msg = format!("a plugin earlier in the chain has already made interface {}", i.name);
            return Err(CniError::new(code::INVALID_CONFIG, msg).remedy("name one main plugin in the conflist"));
        }
        let shift = previous.interfaces.len();
        previous.interfaces.extend(self.interfaces);
        previous.ips.extend(self.ips.into_iter().map(|ip| Ip { interface: ip.interface.map(|i| i + shift), ..ip }));
        previous.routes.extend(self.routes);
        if previous.dns.is_empty() {
            previous.dns = self.dns;
        }
        Ok(previous)
    }

    /// What of this a version can say.
    pub fn limited_to(mut self, version: Version) -> Self {
        if version < Version::V1_1_0 {
            for i in &mut self.interfaces {
                *i = Interface {
                    name: i.name.clone(),
                    mac: i.mac.clone(),
                    sandbox: i.sandbox.clone(),
                    ..<_>::default()
                };
            }
            for r in &mut self.routes {
                *r = Route { mtu: None, advmss: None, priority: None, table: None, scope: None, ..r.clone() };
            }
        }
        self
    }

    /// In the words of a version.
    pub fn write(&self, version: Version) -> Value {
        let mut out = json!(self.clone().limited_to(version));
        out["cniVersion"] = json!(version.name());
        if version < Version::V1_0_0
            && let Some(ips) = out.get_mut("ips").and_then(Value::as_array_mut)
        {
            for (ip, value) in self.ips.iter().zip(ips) {
                value["version"] = json!(if ip.address.addr().is_ipv4() { "4" } else { "6" });
            }
        }
        out
    }
}

#[cfg(test)]
mod tests;
