//! Reads the tables as the kernel side does, and writes down every write.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use fairway::service::maps::{Chunk, MemoryMaps, ReadFailed, ServiceMaps, Tables, WriteFailed};
use fairway_ebpf_abi as abi;

use super::oracle::Question;

/// The kernel knows which addresses are the node's, and looks for all of them at
/// once.
pub fn key(q: &Question) -> abi::FrontendKey {
    let of_node = super::world::NODE.iter().any(|own| super::world::ip(own) == q.addr);
    let any = if q.addr.is_ipv4() { abi::ANY_NODE4 } else { abi::ANY_NODE6 };
    abi::FrontendKey {
        addr: if of_node { any } else { q.addr.into() },
        port: q.port.to_be(),
        protocol: q.protocol.number(),
        scope: if q.outside { abi::SCOPE_OUTSIDE } else { abi::SCOPE_INSIDE },
    }
}

/// All backends that a new flow may get, by slot; an error when it would find
/// nothing where something is counted.
pub fn resolve(t: &Tables, key: &abi::FrontendKey) -> Result<Option<Vec<abi::Backend>>, String> {
    let Some(frontend) = t.frontends.get(key) else { return Ok(None) };
    let mut out = Vec::new();
    for slot in 0..frontend.count {
        let at = abi::SlotKey { set: frontend.set, slot };
        let backend = t.slots.get(&at).ok_or_else(|| format!("{key:?} counts {at:?}, which is not there"))?;
        let kept = t.backends.get(&backend.id).ok_or_else(|| format!("{at:?} names {}, which is gone", backend.id))?;
        if (kept.addr, kept.port) != (backend.addr, backend.port) || backend.id == 0 {
            return Err(format!("{at:?} says {backend:?}, its id {kept:?}"));
        }
        out.push(*backend);
    }
    Ok(Some(out))
}

pub fn places(backends: &[abi::Backend]) -> BTreeSet<(IpAddr, u16)> {
    backends.iter().map(|b| (b.addr.into(), u16::from_be(b.port))).collect()
}

/// One entry written.
#[derive(Clone, Debug)]
pub enum Op {
    PutBackend(abi::Backend),
    PutSlot(abi::SlotKey, abi::Backend),
    PutRange(fairway::service::model::Range),
    PutFrontend(abi::FrontendKey, abi::Frontend),
    DeleteFrontend(abi::FrontendKey),
    DeleteSlot(abi::SlotKey),
    DeleteRange(fairway::service::model::Range),
    DeleteBackend(u32),
}

impl Op {
    pub fn apply(&self, t: &mut Tables) {
        match self {
            Op::PutBackend(b) => drop(t.backends.insert(b.id, *b)),
            Op::PutSlot(k, b) => drop(t.slots.insert(*k, *b)),
            Op::PutRange(r) => drop(t.ranges.insert(*r)),
            Op::PutFrontend(k, f) => drop(t.frontends.insert(*k, *f)),
            Op::DeleteFrontend(k) => drop(t.frontends.remove(k)),
            Op::DeleteSlot(k) => drop(t.slots.remove(k)),
            Op::DeleteRange(r) => drop(t.ranges.remove(r)),
            Op::DeleteBackend(id) => drop(t.backends.remove(id)),
        }
    }
}

/// Maps that remember what was done to them.
#[derive(Default)]
pub struct Recorder {
    pub maps: MemoryMaps,
    pub log: Vec<Op>,
}

impl ServiceMaps for Recorder {
    fn read_all(&mut self) -> Result<Tables, ReadFailed> {
        self.maps.read_all()
    }
    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), WriteFailed> {
        self.log.extend((0..chunk.len()).map(|i| match chunk {
            Chunk::PutBackends(c) => Op::PutBackend(c[i]),
            Chunk::PutSlots(c) => Op::PutSlot(c[i].0, c[i].1),
            Chunk::PutRanges(c) => Op::PutRange(c[i]),
            Chunk::PutFrontends(c) => Op::PutFrontend(c[i].0, c[i].1),
            Chunk::DeleteFrontends(c) => Op::DeleteFrontend(c[i]),
            Chunk::DeleteSlots(c) => Op::DeleteSlot(c[i]),
            Chunk::DeleteRanges(c) => Op::DeleteRange(c[i]),
            Chunk::DeleteBackends(c) => Op::DeleteBackend(c[i]),
        }));
        self.maps.apply(chunk)
    }
    fn capacity(&self) -> fairway::service::maps::Counts {
        self.maps.capacity
    }
}

/// Which address each id has meant.
#[derive(Default)]
pub struct Ids(BTreeMap<u32, (IpAddr, u16)>);

impl Ids {
    /// Every id says the same as it ever did.
    #[track_caller]
    pub fn check(&mut self, t: &Tables) {
        for (id, b) in &t.backends {
            let at = (IpAddr::from(b.addr), u16::from_be(b.port));
            let known = *self.0.entry(*id).or_insert(at);
            assert_eq!(known, at, "backend id {id} was given again");
        }
    }
}
