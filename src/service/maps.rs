//! The tables as a whole, the writes to them, and who carries the writes out.
//!
//! Writes come in [`Chunk`]s: a bounded number of entries of one table, all put
//! or all deleted, which is what one batch call of the kernel takes. The order
//! of chunks is what keeps a reader safe between any two of them (`diff`).

use std::collections::BTreeMap;

use fairway_ebpf_abi as abi;

use super::model::{Protocol, Range};

/// What is in the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    pub frontends: BTreeMap<abi::FrontendKey, abi::Frontend>,
    pub slots: BTreeMap<abi::SlotKey, abi::Backend>,
    pub backends: BTreeMap<u32, abi::Backend>,
    pub ranges: std::collections::BTreeSet<Range>,
}

/// Entries by table: how many there are, or how many there can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    pub frontends: usize,
    pub slots: usize,
    pub backends: usize,
    pub ranges: usize,
}

impl Counts {
    /// As the ABI has the maps.
    pub const CAPACITY: Counts = Counts {
        frontends: abi::MAX_FRONTENDS as usize,
        slots: abi::MAX_BACKENDS as usize,
        backends: abi::MAX_BACKENDS as usize,
        ranges: abi::MAX_SOURCE_RANGES as usize,
    };

    /// The first table that would hold more than it can.
    pub fn beyond(&self, capacity: &Counts) -> Option<&'static str> {
        let pairs = [
            ("frontends", self.frontends, capacity.frontends),
            ("slots", self.slots, capacity.slots),
            ("backends", self.backends, capacity.backends),
            ("source ranges", self.ranges, capacity.ranges),
        ];
        pairs.into_iter().find(|(_, has, can)| has > can).map(|(table, ..)| table)
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.frontends += other.frontends;
        self.slots += other.slots;
        self.backends += other.backends;
        self.ranges += other.ranges;
    }
}

impl std::ops::SubAssign for Counts {
    fn sub_assign(&mut self, other: Counts) {
        self.frontends = self.frontends.saturating_sub(other.frontends);
        self.slots = self.slots.saturating_sub(other.slots);
        self.backends = self.backends.saturating_sub(other.backends);
        self.ranges = self.ranges.saturating_sub(other.ranges);
    }
}

/// Entries of one table. Puts replace; a deletion of what is not there is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// By [`abi::Backend::id`].
    PutBackends(&'a [abi::Backend]),
    PutSlots(&'a [(abi::SlotKey, abi::Backend)]),
    PutRanges(&'a [Range]),
    PutFrontends(&'a [(abi::FrontendKey, abi::Frontend)]),
    DeleteFrontends(&'a [abi::FrontendKey]),
    DeleteSlots(&'a [abi::SlotKey]),
    DeleteRanges(&'a [Range]),
    DeleteBackends(&'a [u32]),
}

impl Chunk<'_> {
    pub fn len(&self) -> usize {
        match self {
            Chunk::PutBackends(c) => c.len(),
            Chunk::PutSlots(c) => c.len(),
            Chunk::PutRanges(c) | Chunk::DeleteRanges(c) => c.len(),
            Chunk::PutFrontends(c) => c.len(),
            Chunk::DeleteFrontends(c) => c.len(),
            Chunk::DeleteSlots(c) => c.len(),
            Chunk::DeleteBackends(c) => c.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The table, as in [`Counts::beyond`].
    pub fn table(&self) -> &'static str {
        match self {
            Chunk::PutBackends(_) | Chunk::DeleteBackends(_) => "backends",
            Chunk::PutSlots(_) | Chunk::DeleteSlots(_) => "slots",
            Chunk::PutRanges(_) | Chunk::DeleteRanges(_) => "source ranges",
            Chunk::PutFrontends(_) | Chunk::DeleteFrontends(_) => "frontends",
        }
    }
}

/// A backend whose id is gone: nothing may go on using it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone {
    /// Unknown of one that an earlier run has left.
    pub protocol: Option<Protocol>,
    pub backend: abi::Backend,
}

/// The maps cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the service maps cannot be read: {0}")]
pub struct ReadFailed(pub String);

/// An entry was not written; those before it were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {index}: {cause}")]
pub struct WriteFailed {
    pub index: usize,
    pub cause: String,
}

/// The maps, with one owner: the worker of ServiceMap.
pub trait ServiceMaps {
    fn read_all(&mut self) -> Result<Tables, ReadFailed>;
    /// Entries are written in their order.
    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), WriteFailed>;
    fn capacity(&self) -> Counts {
        Counts::CAPACITY
    }
}

impl<T: ServiceMaps + ?Sized> ServiceMaps for Box<T> {
    fn read_all(&mut self) -> Result<Tables, ReadFailed> {
        (**self).read_all()
    }
    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), WriteFailed> {
        (**self).apply(chunk)
    }
    fn capacity(&self) -> Counts {
        (**self).capacity()
    }
}

/// Maps in memory: for tests, and for an agent without programs.
#[derive(Clone, Debug)]
pub struct MemoryMaps {
    pub tables: Tables,
    pub capacity: Counts,
    /// Entries written.
    pub writes: usize,
    pub chunks: usize,
    /// What the kernel refuses although there is room.
    pub refuse: Option<fn(&Chunk<'_>, usize) -> bool>,
}

impl Default for MemoryMaps {
    fn default() -> Self {
        Self { tables: Tables::default(), capacity: Counts::CAPACITY, writes: 0, chunks: 0, refuse: None }
    }
}

impl MemoryMaps {
    fn write(&mut self, chunk: &Chunk<'_>, i: usize) {
        let t = &mut self.tables;
        match chunk {
            Chunk::PutBackends(c) => drop(t.backends.insert(c[i].id, c[i])),
            Chunk::PutSlots(c) => drop(t.slots.insert(c[i].0, c[i].1)),
            Chunk::PutRanges(c) => drop(t.ranges.insert(c[i])),
            Chunk::PutFrontends(c) => drop(t.frontends.insert(c[i].0, c[i].1)),
            Chunk::DeleteFrontends(c) => drop(t.frontends.remove(&c[i])),
            Chunk::DeleteSlots(c) => drop(t.slots.remove(&c[i])),
            Chunk::DeleteRanges(c) => drop(t.ranges.remove(&c[i])),
            Chunk::DeleteBackends(c) => drop(t.backends.remove(&c[i])),
        }
    }

    pub fn counts(&self) -> Counts {
        let t = &self.tables;
        Counts {
            frontends: t.frontends.len(),
            slots: t.slots.len(),
            backends: t.backends.len(),
            ranges: t.ranges.len(),
        }
    }
}

impl ServiceMaps for MemoryMaps {
    fn read_all(&mut self) -> Result<Tables, ReadFailed> {
        Ok(self.tables.clone())
    }

    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), WriteFailed> {
        self.chunks += 1;
        for index in 0..chunk.len() {
            if self.refuse.is_some_and(|refuse| refuse(&chunk, index)) {
                return Err(WriteFailed { index, cause: "refused".to_owned() });
            }
            self.write(&chunk, index);
            self.writes += 1;
            if let Some(table) = self.counts().beyond(&self.capacity) {
                return Err(WriteFailed { index, cause: format!("{table} is full") });
            }
        }
        Ok(())
    }

    fn capacity(&self) -> Counts {
        self.capacity
    }
}
