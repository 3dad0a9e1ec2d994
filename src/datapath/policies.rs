//! The kernel's side of policies' tables: classes and rules.
//!
//! Owner: PolicyCompiler's worker. Holds descriptors of its own, so that tables
//! are written without the lock of `Datapath`; which profile a pod has is in its
//! link, and written there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::{Map, MapData, MapError, PerCpuHashMap, PerCpuValues};
use fairway_ebpf_abi::{Addr, CLASS_NETS, CLASSES, NetKey, POLICY, PolicyState, RULE_HITS, RULES, RuleBlock, RuleKey};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::DatapathError;
use super::pins::Pins;
use crate::policy::maps::{Change, InForce, encode};
use crate::policy::tables::{NOBODY, RuleId};
use crate::sys::bpf::{self, Batch};

/// Bits in front of an IPv4 address.
const MAPPED: u8 = 96;

/// The tables as they are pinned.
pub struct KernelPolicies {
    classes: OwnedFd,
    nets: OwnedFd,
    rules: OwnedFd,
    state: OwnedFd,
    hits: PerCpuHashMap<MapData, u64, u64>,
    cpus: usize,
}

impl KernelPolicies {
    /// The maps have been compared with what this build takes them for.
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let open = |name| {
            let path = pins.map(name);
            bpf::open_pinned(&path).map_err(|cause| DatapathError::Pins { path, cause })
        };
        let unlike = |e: MapError| DatapathError::Object(e.to_string());
        let hits = MapData::from_pin(pins.map(RULE_HITS)).map_err(unlike)?;
        let tables = Self {
            classes: open(CLASSES)?,
            nets: open(CLASS_NETS)?,
            rules: open(RULES)?,
            state: open(POLICY)?,
            hits: Map::PerCpuHashMap(hits).try_into().map_err(unlike)?,
            cpus: aya::util::nr_cpus().map_err(|(_, e)| DatapathError::Counters(e.into()))?,
        };
        // A range of all IPv6 addresses has the mapped ones in it, which are IPv4's.
        let everybody = IpNet::V4(Ipv4Net::default());
        let fail = |e| DatapathError::Pins { path: pins.map(CLASS_NETS), cause: e };
        if tables.nets().get(&key(&everybody)).map_err(fail)?.is_none() {
            tables.nets().put(&[key(&everybody)], &[NOBODY]).map_err(|(_, e)| fail(e))?;
        }
        Ok(tables)
    }

    fn classes(&self) -> Batch<'_, Addr, u64> {
        Batch::of(self.classes.as_fd())
    }

    fn nets(&self) -> Batch<'_, NetKey, u64> {
        Batch::of(self.nets.as_fd())
    }

    fn rules(&self) -> Batch<'_, RuleKey, RuleBlock> {
        Batch::of(self.rules.as_fd())
    }

    pub fn read(&mut self) -> io::Result<InForce> {
        let mut rules: BTreeMap<(u64, u64), u32> = BTreeMap::new();
        for (key, _) in self.rules().read_all()? {
            let count = rules.entry((key.profile, key.class)).or_default();
            *count = (*count).max(key.block + 1);
        }
        let nets = self.nets().read_all()?.into_iter();
        let everybody = IpNet::V4(Ipv4Net::default());
        let counted: BTreeSet<u64> = self.hits.keys().collect::<Result<_, _>>().map_err(io::Error::other)?;
        Ok(InForce {
            rules,
            addresses: self.classes().read_all()?.into_iter().map(|(addr, class)| (addr.into(), class)).collect(),
            nets: nets
                .map(|(key, class)| (net(&key), class))
                .filter(|(net, class)| *net != everybody || *class != NOBODY)
                .collect(),
            counted,
        })
    }

    pub fn apply(&mut self, change: &Change) -> Result<(), String> {
        match change {
            Change::PutRules(profile, class, open) => {
                let blocks = encode(open)?;
                let key = |block: usize| RuleKey { profile: *profile, class: *class, block: block as u32, _pad: 0 };
                // The first is where programs begin: it comes last.
                let keys: Vec<RuleKey> = (0..blocks.len()).rev().map(key).collect();
                let blocks: Vec<RuleBlock> = blocks.into_iter().rev().collect();
                said("rules", self.rules().put(&keys, &blocks))
            }
            Change::DropRules(profile, class, count) => {
                let key = |block| RuleKey { profile: *profile, class: *class, block, _pad: 0 };
                said("rules", self.rules().delete(&(0..*count).map(key).collect::<Vec<_>>()))
            }
            Change::Address(ip, Some(class)) => said("pods' addresses", self.classes().put(&[(*ip).into()], &[*class])),
            Change::Address(ip, None) => said("pods' addresses", self.classes().delete(&[(*ip).into()])),
            Change::Net(net, Some(class)) => said("ranges", self.nets().put(&[key(net)], &[*class])),
            Change::Net(net, None) if *net == IpNet::V4(Ipv4Net::default()) => {
                said("ranges", self.nets().put(&[key(net)], &[NOBODY]))
            }
            Change::Net(net, None) => said("ranges", self.nets().delete(&[key(net)])),
            Change::Count(rule, true) => {
                let none = PerCpuValues::try_from(vec![0; self.cpus]).map_err(|e| e.to_string())?;
                self.hits.insert(rule, none, 0).map_err(|e| format!("the hits of a rule cannot be counted: {e}"))
            }
            Change::Count(rule, false) => {
                let _ = self.hits.remove(rule);
                Ok(())
            }
        }
    }

    pub fn next_generation(&mut self) -> io::Result<()> {
        let state: Batch<'_, u32, PolicyState> = Batch::of(self.state.as_fd());
        let before = state.get(&0)?.unwrap_or_default();
        let now = PolicyState { generation: before.generation.wrapping_add(1), _pad: 0 };
        state.put(&[0], &[now]).map_err(|(_, e)| e)
    }

    pub fn hits(&mut self) -> io::Result<Vec<(RuleId, u64)>> {
        let all = self.hits.iter().map(|entry| entry.map(|(rule, counts)| (rule, counts.iter().sum())));
        all.collect::<Result<_, _>>().map_err(io::Error::other)
    }
}

fn key(net: &IpNet) -> NetKey {
    let prefix = match net {
        IpNet::V4(net) => MAPPED + net.prefix_len(),
        IpNet::V6(net) => net.prefix_len(),
    };
    NetKey { prefix: prefix.into(), addr: net.network().into() }
}

fn net(key: &NetKey) -> IpNet {
    let prefix = u8::try_from(key.prefix).unwrap_or(128).min(128);
    match IpAddr::from(key.addr) {
        IpAddr::V4(ip) if prefix >= MAPPED => Ipv4Net::new(ip, prefix - MAPPED).map(IpNet::V4),
        IpAddr::V4(ip) => Ipv6Net::new(Ipv4Addr::to_ipv6_mapped(&ip), prefix).map(IpNet::V6),
        IpAddr::V6(ip) => Ipv6Net::new(ip, prefix).map(IpNet::V6),
    }
    .unwrap_or_default()
}

fn said(what: &str, done: Result<(), (usize, io::Error)>) -> Result<(), String> {
    done.map_err(|(_, e)| match e.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => format!("the kernel's map of policies' {what} is full"),
        Some(libc::ENOMEM) => format!("the kernel has no memory for policies' {what}"),
        _ => format!("policies' {what} cannot be written: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_the_same_there_and_back() {
        for text in ["0.0.0.0/0", "10.1.0.0/16", "10.1.2.3/32", "::/0", "2001:db8::/33", "fd00::1/128"] {
            let range: IpNet = text.parse().unwrap();
            assert_eq!(net(&key(&range)), range);
        }
    }
}
