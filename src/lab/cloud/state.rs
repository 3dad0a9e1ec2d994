//! Account: the pure core of the simulated cloud.
//!
//! Purpose: every ENI, address and instance of the account, and the rules by
//! which they change. Owner: the engine, behind one lock. No IO, no clock, no
//! randomness but the seeded generator. Invariants (see [`Account::violations`]):
//! an address is on one ENI only, vSwitch counts match the ENIs, no instance
//! exceeds its type's quotas, a refused request changes nothing.
//!
//! - `space`: addresses of one vSwitch
//! - `eni`: create, attach, detach, delete
//! - `addresses`: assign and unassign
//! - `audit`: the invariants, checked

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::catalog::{InstanceType, catalog};
use super::config::CloudConfig;
use super::error::ApiError;
use crate::lab::fabric::EniPort;
use crate::model::Mac;

mod addresses;
mod audit;
mod eni;
mod space;
#[cfg(test)]
mod tests;

pub use eni::CreateEni;
pub use space::{AddressSpace, Want};

/// Milliseconds since the Unix epoch.
pub type Millis = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EniStatus {
    Available,
    Attaching,
    InUse,
    Detaching,
    Deleting,
}

impl EniStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            EniStatus::Available => "Available",
            EniStatus::Attaching => "Attaching",
            EniStatus::InUse => "InUse",
            EniStatus::Detaching => "Detaching",
            EniStatus::Deleting => "Deleting",
        }
    }

    pub fn parse(s: &str) -> Option<Self> {
        [Self::Available, Self::Attaching, Self::InUse, Self::Detaching, Self::Deleting]
            .into_iter()
            .find(|status| status.as_str() == s)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EniKind {
    Primary,
    Secondary,
}

impl EniKind {
    pub fn as_str(self) -> &'static str {
        match self {
            EniKind::Primary => "Primary",
            EniKind::Secondary => "Secondary",
        }
    }
}

/// An ENI as the account knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eni {
    pub id: String,
    pub mac: Mac,
    pub kind: EniKind,
    pub status: EniStatus,
    pub vswitch: String,
    pub zone: String,
    pub security_groups: Vec<String>,
    /// All IPv4 addresses, the primary one first; never empty.
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
    /// Set from Attaching to Detaching.
    pub instance: Option<String>,
    pub device_index: u32,
    /// As asked for at creation.
    pub queues_asked: Option<u32>,
    /// As attached.
    pub queues: Option<u32>,
    pub tags: BTreeMap<String, String>,
    pub name: String,
    pub description: String,
    pub resource_group: String,
    pub delete_on_release: bool,
    pub source_dest_check: bool,
    pub created_ms: Millis,
    /// What the cloud itself took to create and attach it.
    #[serde(default)]
    pub latency_ms: Millis,
    /// A change is in progress; another one is refused as a conflict.
    pub busy: bool,
    /// Counts attachments, so that a late completion of an earlier one is seen.
    pub epoch: u64,
}

impl Eni {
    pub fn primary4(&self) -> Ipv4Addr {
        self.v4.first().copied().unwrap_or(Ipv4Addr::UNSPECIFIED)
    }
}

/// An instance as registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    pub id: String,
    pub instance_type: String,
    pub zone: String,
    pub vswitch: String,
    pub netns: Option<String>,
    pub primary_eni: String,
    pub security_groups: Vec<String>,
    pub registered_ms: Millis,
    /// Being removed: nothing can be attached any more.
    pub leaving: bool,
}

/// What is needed to register an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterInstance {
    pub instance_id: String,
    pub instance_type: String,
    pub vswitch: String,
    /// Must be the vSwitch's when given.
    #[serde(default)]
    pub zone: Option<String>,
    /// Network namespace that stands for the instance.
    #[serde(default)]
    pub netns: Option<String>,
    /// Empty: the first one of the account.
    #[serde(default)]
    pub security_groups: Vec<String>,
    #[serde(default)]
    pub primary_ip: Option<Ipv4Addr>,
    /// Addresses of the primary ENI in the vSwitch's IPv6 block.
    #[serde(default)]
    pub ipv6_count: u32,
}

/// The account and all it holds.
#[derive(Clone, Debug)]
pub struct Account {
    pub region: String,
    pub account_id: u64,
    pub vpc_id: String,
    pub vpc_cidr4: Ipv4Net,
    pub vpc_cidr6: Option<Ipv6Net>,
    pub types: BTreeMap<String, InstanceType>,
    pub spaces: BTreeMap<String, AddressSpace>,
    pub groups: Vec<String>,
    pub instances: BTreeMap<String, Instance>,
    pub enis: BTreeMap<String, Eni>,
    /// vSwitches that an injected fault has run dry.
    pub exhausted: BTreeSet<String>,
    eni_quota: u32,
    group_quota: u32,
    rng: StdRng,
}

/// An instance registry is bounded, as everything that comes from outside.
const MAX_INSTANCES: usize = 5000;

impl Account {
    /// `config` has been validated.
    pub fn new(config: &CloudConfig) -> Self {
        Self {
            region: config.region.clone(),
            account_id: config.account_id,
            vpc_id: config.vpc_id.clone(),
            vpc_cidr4: config.vpc_cidr4,
            vpc_cidr6: config.vpc_cidr6,
            types: catalog(&config.instance_types),
            spaces: config.vswitches.iter().map(|v| (v.id.clone(), AddressSpace::new(v.clone()))).collect(),
            groups: config.security_groups.clone(),
            instances: BTreeMap::new(),
            enis: BTreeMap::new(),
            exhausted: BTreeSet::new(),
            eni_quota: config.eni_quota,
            group_quota: config.security_group_quota,
            rng: StdRng::seed_from_u64(config.seed),
        }
    }

    /// Registers an instance and creates its primary ENI, not yet attached.
    pub fn register(&mut self, spec: &RegisterInstance, now: Millis) -> Result<Instance, ApiError> {
        let name = super::config::check_name("instance_id", &spec.instance_id);
        name.map_err(|e| ApiError::invalid("instance_id", e))?;
        if self.instances.contains_key(&spec.instance_id) {
            return Err(ApiError::new(409, "InvalidInstanceId.Duplicate", "The instance is registered already."));
        }
        if self.instances.len() >= MAX_INSTANCES {
            return Err(ApiError::new(403, "QuotaExceeded.Instance", "The account holds as many instances as it may."));
        }
        let kind = self.types.get(&spec.instance_type);
        let kind = kind.ok_or_else(|| ApiError::invalid("instance_type", "it is not in the catalogue"))?.clone();
        let space = self.spaces.get(&spec.vswitch).ok_or_else(|| ApiError::vswitch_not_found(&spec.vswitch))?;
        let zone = space.spec.zone.clone();
        if spec.zone.as_ref().is_some_and(|z| *z != zone) {
            return Err(ApiError::invalid("zone", format!("vSwitch {} is in {zone}", spec.vswitch)));
        }
        if let Some(netns) = &spec.netns {
            super::config::check_name("netns", netns).map_err(|e| ApiError::invalid("netns", e))?;
        }
        let groups = match spec.security_groups.as_slice() {
            [] => self.groups.iter().take(1).cloned().collect(),
            given => given.to_vec(),
        };
        if spec.ipv6_count > kind.eni_ipv6_address_quantity {
            return Err(ApiError::count6(kind.eni_ipv6_address_quantity));
        }
        let create = CreateEni {
            vswitch: spec.vswitch.clone(),
            security_groups: groups.clone(),
            primary4: spec.primary_ip,
            v6: if spec.ipv6_count > 0 { Want::Any(spec.ipv6_count) } else { Want::Nothing },
            delete_on_release: true,
            ..CreateEni::default()
        };
        let primary_eni = self.create(&create, now)?;
        let instance = Instance {
            id: spec.instance_id.clone(),
            instance_type: spec.instance_type.clone(),
            zone,
            vswitch: spec.vswitch.clone(),
            netns: spec.netns.clone(),
            primary_eni: primary_eni.clone(),
            security_groups: groups,
            registered_ms: now,
            leaving: false,
        };
        self.instances.insert(instance.id.clone(), instance.clone());
        if let Some(eni) = self.enis.get_mut(&primary_eni) {
            eni.kind = EniKind::Primary;
            eni.status = EniStatus::Attaching;
            eni.instance = Some(instance.id.clone());
            eni.queues = Some(kind.primary_eni_queue_number);
            eni.epoch += 1;
        }
        Ok(instance)
    }

    /// Nothing attaches to the instance from here on. Its ENIs are returned.
    pub fn begin_removal(&mut self, instance_id: &str) -> Result<Vec<String>, ApiError> {
        let instance = self.instances.get_mut(instance_id).ok_or_else(|| ApiError::instance_not_found(instance_id))?;
        instance.leaving = true;
        Ok(self.enis_of(instance_id).map(|eni| eni.id.clone()).collect())
    }

    /// The instance is gone: its ENIs go with it or become Available, by their
    /// `DeleteOnRelease`.
    pub fn finish_removal(&mut self, instance_id: &str) {
        let ids: Vec<String> = self.enis_of(instance_id).map(|eni| eni.id.clone()).collect();
        for id in ids {
            let released = self.enis.get(&id).is_some_and(|e| e.delete_on_release || e.kind == EniKind::Primary);
            if released {
                self.forget_eni(&id);
            } else if let Some(eni) = self.enis.get_mut(&id) {
                eni.status = EniStatus::Available;
                eni.instance = None;
                eni.queues = None;
                eni.device_index = 0;
                eni.busy = false;
                eni.epoch += 1;
            }
        }
        self.instances.remove(instance_id);
    }

    /// ENIs that count against the instance's quota.
    pub fn enis_of<'a>(&'a self, instance_id: &'a str) -> impl Iterator<Item = &'a Eni> {
        self.enis.values().filter(move |eni| eni.instance.as_deref() == Some(instance_id))
    }

    pub fn type_of(&self, instance_id: &str) -> Option<&InstanceType> {
        self.types.get(&self.instances.get(instance_id)?.instance_type)
    }

    /// The ENI as the packet side has to build it; `None` unless it belongs to
    /// an instance.
    pub fn port(&self, eni_id: &str) -> Option<EniPort> {
        let eni = self.enis.get(eni_id)?;
        let space = self.spaces.get(&eni.vswitch)?;
        Some(EniPort {
            eni_id: eni.id.clone(),
            instance_id: eni.instance.clone()?,
            mac: eni.mac,
            queues: eni.queues.unwrap_or(1).max(1),
            subnet4: space.spec.cidr4,
            gateway4: space.gateway4(),
            subnet6: space.spec.cidr6,
            gateway6: space.gateway6(),
            v4: eni.v4.clone(),
            v6: eni.v6.clone(),
        })
    }

    /// The instance whose attached ENI has this address.
    pub fn instance_at(&self, ip: IpAddr) -> Option<&str> {
        let holder = self.spaces.values().find_map(|space| match ip {
            IpAddr::V4(v4) => space.holder4(v4),
            IpAddr::V6(v6) => space.holder6(v6),
        });
        self.enis.get(holder?)?.instance.as_deref()
    }

    /// Time that the cloud takes for a call about an ENI.
    pub fn spent(&mut self, eni: &str, ms: Millis) {
        if let Some(eni) = self.enis.get_mut(eni) {
            eni.latency_ms += ms;
        }
    }

    /// What DescribeVSwitches tells.
    pub fn available4(&self, vswitch: &str) -> u32 {
        if self.exhausted.contains(vswitch) {
            return 0;
        }
        self.spaces.get(vswitch).map_or(0, AddressSpace::available4)
    }

    fn new_id(&mut self, prefix: &str) -> String {
        const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
        let mut id = format!("{prefix}-bp1");
        for _ in 0..17 {
            id.push(char::from(DIGITS[self.rng.random_range(0..36)]));
        }
        id
    }

    fn new_mac(&mut self) -> Mac {
        loop {
            let [a, b, c, ..] = self.rng.random::<u32>().to_be_bytes();
            let mac = Mac([0x00, 0x16, 0x3e, a, b, c]);
            if self.enis.values().all(|eni| eni.mac != mac) {
                return mac;
            }
        }
    }
}
