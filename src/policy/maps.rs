//! What the kernel's tables hold, and how what is compiled is written there.
//!
//! The trait is implemented by the kernel's maps, and by a model in tests. Here is
//! what both have in common: rules in blocks, as programs read them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use fairway_ebpf_abi::{BLOCK_PORTS, EVERYTHING, MAX_BLOCKS, OpenPorts, RuleBlock};
use ipnet::IpNet;

use super::tables::{ClassId, Endpoint, Enforced, Open, ProfileId, RuleId};
use crate::model::AttachmentId;

/// What is in the kernel's tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InForce {
    /// With how many blocks each has. What a pair opens is told by its name.
    pub rules: BTreeMap<(ProfileId, ClassId), u32>,
    pub addresses: BTreeMap<IpAddr, ClassId>,
    pub nets: BTreeMap<IpNet, ClassId>,
    /// Rules whose hits are counted.
    pub counted: BTreeSet<RuleId>,
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    PutRules(ProfileId, ClassId, Arc<[Open]>),
    DropRules(ProfileId, ClassId, u32),
    Address(IpAddr, Option<ClassId>),
    Net(IpNet, Option<ClassId>),
    /// Hits of this rule are counted, or no longer.
    Count(RuleId, bool),
}

/// The tables that policies compile to. Errors are in words, with their remedy.
pub trait PolicyMaps: Send {
    fn read(&mut self) -> Result<InForce, String>;
    fn apply(&mut self, change: &Change) -> Result<(), String>;
    /// Flows that are known are judged again.
    fn next_generation(&mut self) -> Result<(), String>;
    fn hits(&mut self) -> Result<Vec<(RuleId, u64)>, String>;
    /// The pods of this node, by what the datapath knows.
    fn pods(&mut self) -> Result<Vec<(AttachmentId, Endpoint, Enforced)>, String>;
    /// The number of a pod's device; `None` when it has none.
    fn endpoint(&mut self, attachment: &AttachmentId) -> Result<Option<Endpoint>, String>;
    /// In force when this returns; `None` when there is no such pod.
    fn enforce(&mut self, attachment: &AttachmentId, how: Enforced) -> Result<Option<Endpoint>, String>;
}

/// How many blocks these ports take. There is one for no ports too.
pub fn blocks_of(open: &[Open]) -> u32 {
    u32::try_from(open.len().div_ceil(BLOCK_PORTS).max(1)).unwrap_or(u32::MAX)
}

/// As programs read them.
pub fn encode(open: &[Open]) -> Result<Vec<RuleBlock>, String> {
    let count = blocks_of(open);
    if count > MAX_BLOCKS {
        let most = MAX_BLOCKS as usize * BLOCK_PORTS;
        return Err(format!("{} ranges of ports are open to one kind of peer; {most} is the most", open.len()));
    }
    let mut blocks = vec![RuleBlock { more: 1, ..RuleBlock::default() }; count as usize];
    for (block, open) in blocks.iter_mut().zip(open.chunks(BLOCK_PORTS)) {
        for (slot, open) in block.ports.iter_mut().zip(open) {
            let protocol = open.protocol.map_or(EVERYTHING, |p| p.number().into());
            *slot = OpenPorts { rule: open.by.id(), from: open.from, to: open.to, protocol, _pad: 0 };
        }
    }
    if let Some(last) = blocks.last_mut() {
        last.more = 0;
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::super::model::{Direction, Name};
    use super::super::tables::RuleName;
    use super::*;
    use crate::service::model::Protocol;

    fn open(n: usize) -> Vec<Open> {
        let by = RuleName { policy: Name::new("a", "p"), direction: Direction::Ingress, number: 0 };
        let one =
            |i: usize| Open { protocol: Some(Protocol::Tcp), from: 2 * i as u16, to: 2 * i as u16, by: by.clone() };
        (0..n).map(one).collect()
    }

    #[test]
    fn blocks_hold_every_range_once_and_say_where_they_end() {
        for n in [0, 1, 15, 16, 31, 960] {
            let blocks = encode(&open(n)).unwrap();
            assert_eq!(blocks.len() as u32, blocks_of(&open(n)));
            let filled = blocks.iter().flat_map(|b| &b.ports).filter(|p| p.rule != 0).count();
            assert_eq!(filled, n);
            let more: Vec<u32> = blocks.iter().map(|b| b.more).collect();
            assert!(more.split_last().unwrap().1.iter().all(|m| *m == 1) && more.last() == Some(&0));
        }
        assert!(encode(&open(961)).unwrap_err().contains("960 is the most"));
    }
}
