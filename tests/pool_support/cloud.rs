//! A cloud in memory: the rules that the pool relies on, and the ways in which a
//! real one breaks them. Synchronous; callers add latency.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use fairway::cloud::*;
use fairway::model::*;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What happens to calls.
#[derive(Clone, Debug, Default)]
pub struct Chaos {
    /// Of a hundred calls, this many fail without effect.
    pub fail: u32,
    /// Of a hundred calls, the answers of this many are lost after the effect.
    pub lose_reply: u32,
    /// Every call fails in transport.
    pub down: bool,
}

#[derive(Clone)]
pub struct ModelCloud(pub Arc<Mutex<Inner>>);

pub struct Inner {
    pub instance: InstanceId,
    pub limits: InstanceLimits,
    pub vswitches: BTreeMap<VSwitchId, Net>,
    pub enis: BTreeMap<EniId, Eni>,
    tokens: BTreeMap<ClientToken, Remembered>,
    pub calls: BTreeMap<&'static str, u32>,
    pub chaos: Chaos,
    pub refuse_create: Option<CloudErrorKind>,
    rng: StdRng,
    next: u32,
}

pub struct Net {
    prefix: u8,
    /// Addresses not taken yet; the rest of the vSwitch belongs to others.
    pub free: BTreeSet<Ipv4Addr>,
    next6: u16,
}

#[derive(Clone)]
enum Remembered {
    Eni(EniId),
    V4(Vec<Ipv4Addr>),
    V6(Vec<Ipv6Addr>),
}

pub fn error(kind: CloudErrorKind, action: &str) -> CloudError {
    CloudError {
        message: format!("{kind:?}"),
        kind,
        action: action.to_owned(),
        code: None,
        request_id: None,
        remedy: "see the model".to_owned(),
    }
}

impl ModelCloud {
    pub fn new(enis: u32, per_eni: u32, seed: u64, vswitches: &[(&str, usize)]) -> Self {
        let limits = InstanceLimits {
            type_name: format!("ecs.model-{enis}x{per_eni}"),
            enis,
            ipv4_per_eni: per_eni,
            ipv6_per_eni: per_eni,
            queues_per_secondary_eni: 2,
        };
        let nets = vswitches.iter().enumerate().map(|(i, (name, size))| {
            let prefix = i as u8 + 1;
            let free = (0..*size).map(|n| Ipv4Addr::new(10, prefix, (n / 250) as u8, (n % 250) as u8 + 1)).collect();
            (VSwitchId::from(*name), Net { prefix, free, next6: 1 })
        });
        let cloud = Inner {
            instance: "i-self".into(),
            limits,
            vswitches: nets.collect(),
            enis: BTreeMap::new(),
            tokens: BTreeMap::new(),
            calls: BTreeMap::new(),
            chaos: Chaos::default(),
            refuse_create: None,
            rng: StdRng::seed_from_u64(seed),
            next: 1,
        };
        let cloud = Self(Arc::new(Mutex::new(cloud)));
        cloud.0.lock().primary_eni();
        cloud
    }

    pub fn calls(&self) -> BTreeMap<&'static str, u32> {
        self.0.lock().calls.clone()
    }

    pub fn mutating_calls(&self) -> u32 {
        self.0.lock().calls.iter().filter(|(name, _)| !name.starts_with("describe")).map(|(_, n)| n).sum()
    }

    /// Run a call with its chance of failing before or after the effect.
    pub fn call<T>(
        &self,
        name: &'static str,
        effect: impl FnOnce(&mut Inner) -> Result<T, CloudErrorKind>,
    ) -> Result<T, CloudError> {
        let mut cloud = self.0.lock();
        *cloud.calls.entry(name).or_default() += 1;
        let dice: u32 = cloud.rng.random_range(0..100);
        let chaos = cloud.chaos.clone();
        if chaos.down || dice < chaos.fail {
            let kind = match dice % 3 {
                0 if !chaos.down => CloudErrorKind::Throttled { retry_after: std::time::Duration::from_secs(1) },
                1 if !chaos.down => CloudErrorKind::Conflict,
                _ => CloudErrorKind::Transport,
            };
            return Err(error(kind, name));
        }
        let result = effect(&mut cloud).map_err(|kind| error(kind, name));
        if result.is_ok() && dice < chaos.fail + chaos.lose_reply {
            return Err(error(CloudErrorKind::Transport, name));
        }
        result
    }

    /// ENIs other than the primary one, with their addresses.
    pub fn secondary(&self) -> Vec<Eni> {
        self.0.lock().enis.values().filter(|e| e.kind != EniKind::Primary).cloned().collect()
    }
}

impl Inner {
    fn primary_eni(&mut self) {
        let vswitch = self.vswitches.keys().next().cloned().unwrap();
        let eni = self.new_eni(vswitch, 1, 0, BTreeMap::new(), "").unwrap();
        let instance = self.instance.clone();
        let eni = self.enis.get_mut(&eni).unwrap();
        (eni.kind, eni.status, eni.instance) = (EniKind::Primary, EniStatus::InUse, Some(instance));
    }

    fn new_eni(
        &mut self,
        vswitch: VSwitchId,
        ipv4: u32,
        ipv6: u32,
        tags: BTreeMap<String, String>,
        description: &str,
    ) -> Result<EniId, CloudErrorKind> {
        let (v4, v6) = (self.take4(&vswitch, ipv4)?, self.take6(&vswitch, ipv6));
        let n = self.next;
        self.next += 1;
        let id = EniId(format!("eni-{n}"));
        let eni = Eni {
            id: id.clone(),
            mac: Mac([0, 0x16, 0x3e, 0, (n >> 8) as u8, n as u8]),
            status: EniStatus::Available,
            kind: EniKind::Secondary,
            instance: None,
            vswitch,
            vpc: "vpc-1".to_owned(),
            zone: "z".to_owned(),
            security_groups: vec!["sg-1".into()],
            primary4: v4[0],
            ipv4: v4,
            ipv6: v6,
            tags,
            queues: Some(2),
            delete_on_release: true,
            description: description.to_owned(),
            created: String::new(),
        };
        self.enis.insert(id.clone(), eni);
        Ok(id)
    }

    fn take4(&mut self, vswitch: &VSwitchId, count: u32) -> Result<Vec<Ipv4Addr>, CloudErrorKind> {
        let net = self.vswitches.get_mut(vswitch).ok_or(CloudErrorKind::NotFound)?;
        if net.free.len() < count as usize {
            return Err(CloudErrorKind::VSwitchExhausted);
        }
        Ok((0..count).filter_map(|_| net.free.pop_first()).collect())
    }

    fn take6(&mut self, vswitch: &VSwitchId, count: u32) -> Vec<Ipv6Addr> {
        let net = self.vswitches.get_mut(vswitch).unwrap();
        let from = net.next6;
        net.next6 += count as u16;
        (from..net.next6).map(|n| Ipv6Addr::new(0xfd00, u16::from(net.prefix), 0, 0, 0, 0, 0, n)).collect()
    }

    fn give4(&mut self, vswitch: &VSwitchId, addresses: &[Ipv4Addr]) {
        self.vswitches.get_mut(vswitch).unwrap().free.extend(addresses);
    }

    pub fn create(&mut self, m: &CreateEni) -> Result<Eni, CloudErrorKind> {
        if let Some(kind) = &self.refuse_create {
            return Err(kind.clone());
        }
        assert!((1..=50).contains(&m.ipv4) && m.ipv6 <= 10, "{m:?} breaks the API's limits");
        assert!(!m.security_groups.is_empty() && m.token.0.len() <= 64 && m.token.0.is_ascii());
        if let Some(Remembered::Eni(id)) = self.tokens.get(&m.token) {
            return self.enis.get(id).cloned().ok_or(CloudErrorKind::TokenMismatch);
        }
        assert!(m.ipv4 <= self.limits.ipv4_per_eni);
        let id = self.new_eni(m.vswitch.clone(), m.ipv4, m.ipv6, m.tags.clone(), &m.description)?;
        self.tokens.insert(m.token.clone(), Remembered::Eni(id.clone()));
        Ok(self.enis[&id].clone())
    }

    fn eni(&mut self, id: &EniId) -> Result<&mut Eni, CloudErrorKind> {
        self.enis.get_mut(id).ok_or(CloudErrorKind::NotFound)
    }

    pub fn attach(&mut self, id: &EniId) -> Result<(), CloudErrorKind> {
        let attached = self.enis.values().filter(|e| e.instance.is_some()).count() as u32;
        let (instance, limit) = (self.instance.clone(), self.limits.enis);
        let eni = self.eni(id)?;
        if eni.status != EniStatus::Available {
            return Err(CloudErrorKind::InvalidState);
        }
        if attached >= limit {
            return Err(CloudErrorKind::InstanceEniLimit);
        }
        (eni.status, eni.instance) = (EniStatus::InUse, Some(instance));
        Ok(())
    }

    pub fn detach(&mut self, id: &EniId) -> Result<(), CloudErrorKind> {
        let eni = self.eni(id)?;
        if eni.status != EniStatus::InUse {
            return Err(CloudErrorKind::InvalidState);
        }
        (eni.status, eni.instance) = (EniStatus::Available, None);
        Ok(())
    }

    pub fn delete(&mut self, id: &EniId) -> Result<(), CloudErrorKind> {
        let eni = self.eni(id)?.clone();
        if eni.status != EniStatus::Available {
            return Err(CloudErrorKind::InvalidState);
        }
        self.enis.remove(id);
        self.give4(&eni.vswitch, &eni.ipv4);
        Ok(())
    }

    pub fn assign4(&mut self, m: &AssignIpv4) -> Result<Vec<Ipv4Addr>, CloudErrorKind> {
        if let Some(Remembered::V4(list)) = self.tokens.get(&m.token) {
            return Ok(list.clone());
        }
        let limit = self.limits.ipv4_per_eni as usize;
        let eni = self.eni(&m.eni)?.clone();
        if eni.status != EniStatus::InUse {
            return Err(CloudErrorKind::InvalidState);
        }
        if eni.ipv4.len() + m.count as usize > limit {
            return Err(CloudErrorKind::InstanceIpLimit);
        }
        let new = self.take4(&eni.vswitch, m.count)?;
        self.eni(&m.eni)?.ipv4.extend(&new);
        self.tokens.insert(m.token.clone(), Remembered::V4(new.clone()));
        Ok(new)
    }

    pub fn assign6(&mut self, m: &AssignIpv6) -> Result<Vec<Ipv6Addr>, CloudErrorKind> {
        assert!((1..=10).contains(&m.count), "{m:?} breaks the API's limits");
        if let Some(Remembered::V6(list)) = self.tokens.get(&m.token) {
            return Ok(list.clone());
        }
        let limit = self.limits.ipv6_per_eni as usize;
        let eni = self.eni(&m.eni)?.clone();
        if eni.status != EniStatus::InUse {
            return Err(CloudErrorKind::InvalidState);
        }
        if eni.ipv6.len() + m.count as usize > limit {
            return Err(CloudErrorKind::InstanceIpLimit);
        }
        let new = self.take6(&eni.vswitch, m.count);
        self.eni(&m.eni)?.ipv6.extend(&new);
        self.tokens.insert(m.token.clone(), Remembered::V6(new.clone()));
        Ok(new)
    }

    pub fn unassign4(&mut self, m: &UnassignIpv4) -> Result<(), CloudErrorKind> {
        let eni = self.eni(&m.eni)?;
        assert!(!m.addresses.contains(&eni.primary4), "the ENI's own address cannot be given back");
        if !m.addresses.iter().all(|ip| eni.ipv4.contains(ip)) {
            return Err(CloudErrorKind::NotFound);
        }
        eni.ipv4.retain(|ip| !m.addresses.contains(ip));
        let vswitch = eni.vswitch.clone();
        self.give4(&vswitch, &m.addresses);
        Ok(())
    }

    pub fn unassign6(&mut self, m: &UnassignIpv6) -> Result<(), CloudErrorKind> {
        let eni = self.eni(&m.eni)?;
        if !m.addresses.iter().all(|ip| eni.ipv6.contains(ip)) {
            return Err(CloudErrorKind::NotFound);
        }
        eni.ipv6.retain(|ip| !m.addresses.contains(ip));
        Ok(())
    }

    pub fn describe(&self, m: &DescribeEnis) -> Vec<Eni> {
        let fits = |e: &&Eni| {
            (m.ids.is_empty() || m.ids.contains(&e.id))
                && (m.instance.is_none() || m.instance == e.instance)
                && m.tags.iter().all(|(k, v)| e.tags.get(k) == Some(v))
                && m.status.is_none_or(|s| s == e.status)
        };
        self.enis.values().filter(fits).cloned().collect()
    }

    pub fn describe_vswitches(&self, m: &DescribeVSwitches) -> Vec<VSwitch> {
        let known = self.vswitches.iter().filter(|(id, _)| m.ids.contains(id));
        known
            .map(|(id, net)| VSwitch {
                id: id.clone(),
                zone: "z".to_owned(),
                cidr4: format!("10.{}.0.0/16", net.prefix).parse().unwrap(),
                cidr6: Some(format!("fd00:{:x}::/64", net.prefix).parse().unwrap()),
                available: net.free.len() as u32,
            })
            .collect()
    }
}
