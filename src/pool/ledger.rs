//! The ledger: the pool's state on disk.
//!
//! Owner: the `ledger` worker thread, which alone touches the [`Store`]. Every
//! turn is one batch, written before anyone is told: flushed to the disk when it
//! says something of the cloud, which a power cut does not undo; noted in the
//! `tail`, out of reach of whatever kills the process, when it is about the
//! node's own kernel alone (`docs/decisions/0007-the-ledgers-tail.md`). Keys are
//! readable (`address/10.0.1.7`), values are `v1:` and JSON. The tree `meta` says
//! which schema this is and whose ledger: another instance's is refused.
//!
//! sled is a journal that can be rebuilt: a damaged one is moved aside
//! (`ledger.corrupt-<time>`) and the pool recovers from cloud, kernel and
//! cluster. After a failed write sled refuses all later ones, so it is opened
//! anew, and what the failed batch may or may not have left is written again.

mod records;
mod sled_store;
pub(crate) mod tail;

use std::collections::{BTreeMap, BTreeSet};

pub use records::{decode, diff, encode};
pub use sled_store::SledStore;

use crate::model::InstanceId;

use super::state::State;
use super::step::FailPoint;

/// One key's new value; `None` removes it.
pub type Write = (String, Option<Vec<u8>>);

/// A flat, ordered, durable map. One owner, never shared.
pub trait Store: Send {
    /// Everything, or the first error.
    fn load(&mut self) -> Result<BTreeMap<String, Vec<u8>>, LedgerError>;
    /// All of it or nothing, durable when it returns.
    fn commit(&mut self, batch: &[Write]) -> Result<(), LedgerError>;
    /// All of it or nothing; the end of the process does not undo it, that of the
    /// machine may, until the next `commit` or `settle`.
    fn note(&mut self, batch: &[Write]) -> Result<(), LedgerError> {
        self.commit(batch)
    }
    /// Make durable what was noted.
    fn settle(&mut self) -> Result<(), LedgerError> {
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    #[error("{0}")]
    Io(String),
    #[error("the ledger is damaged: {0}")]
    Corrupt(String),
    #[error(
        "this ledger belongs to instance {theirs}, and this is {ours}: the state folder was copied; remove it, it will be rebuilt"
    )]
    Foreign { theirs: InstanceId, ours: InstanceId },
    #[error("another process has the ledger open: {0}; only one agent may run on a node")]
    InUse(String),
    #[error("the ledger has schema {found}, this agent knows {known}; run the agent version that wrote it")]
    Schema { found: String, known: u32 },
}

/// What opening the ledger found, for the log, an Event and a metric.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LedgerReport {
    /// There was none.
    pub new: bool,
    /// Why it had to be set aside, and where it is now.
    pub damaged: Option<String>,
    pub moved_to: Option<String>,
    pub leases: usize,
    pub enis: usize,
}

impl LedgerReport {
    /// Leases may exist that the ledger does not know.
    pub fn rebuilt(&self) -> bool {
        self.new || self.damaged.is_some()
    }
}

/// The state on disk, and what a failed write may have left there.
pub struct Ledger {
    store: Box<dyn Store>,
    /// As known to be on disk.
    written: Option<State>,
    /// Keys a failed batch wanted to change.
    doubtful: BTreeSet<String>,
}

impl Ledger {
    /// Read everything; `None` when the store is empty.
    pub fn open(mut store: Box<dyn Store>) -> Result<(Self, Option<State>), LedgerError> {
        let records = store.load()?;
        let state = if records.is_empty() { None } else { Some(decode(&records)?) };
        Ok((Self { store, written: state.clone(), doubtful: BTreeSet::new() }, state))
    }

    /// Make `state` durable. Writes what differs from what is on disk.
    pub fn commit(&mut self, state: &State) -> Result<(), LedgerError> {
        self.write(state, |store, batch| store.commit(batch))
    }

    /// Write `state` so that it outlives the process.
    pub fn note(&mut self, state: &State) -> Result<(), LedgerError> {
        self.write(state, |store, batch| store.note(batch))
    }

    /// Make durable what was noted. When that fails the next write says it again.
    pub fn settle(&mut self) -> Result<(), LedgerError> {
        self.store.settle()
    }

    fn write(
        &mut self,
        state: &State,
        write: impl FnOnce(&mut dyn Store, &[Write]) -> Result<(), LedgerError>,
    ) -> Result<(), LedgerError> {
        let mut batch = diff(self.written.as_ref(), state)?;
        if !self.doubtful.is_empty() {
            // Rare: say everything again, and that nothing else is there.
            let all = encode(state)?;
            let stale = self.doubtful.iter().chain(batch.iter().map(|(key, _)| key));
            let stale: Vec<Write> = stale.filter(|k| !all.contains_key(*k)).map(|k| (k.clone(), None)).collect();
            batch = all.into_iter().map(|(key, value)| (key, Some(value))).chain(stale).collect();
        }
        if batch.is_empty() {
            return Ok(());
        }
        let done = if self.doubtful.is_empty() { write(&mut *self.store, &batch) } else { self.store.commit(&batch) };
        match done {
            Ok(()) => {
                self.written = Some(state.clone());
                self.doubtful.clear();
                Ok(())
            }
            Err(error) => {
                self.doubtful.extend(batch.into_iter().map(|(key, _)| key));
                Err(error)
            }
        }
    }
}

/// A store in memory, for tests and simulations. Clones share the content, as a
/// disk outlives a process.
#[derive(Clone, Default)]
pub struct MemoryStore {
    disk: std::sync::Arc<parking_lot::Mutex<MemoryDisk>>,
    life: u64,
}

#[derive(Default)]
struct MemoryDisk {
    content: BTreeMap<String, Vec<u8>>,
    fail: Option<String>,
    fail_point: FailPoint,
    reached: BTreeSet<&'static str>,
    stopped: bool,
    life: u64,
}

impl MemoryStore {
    /// The same disk for a new process: older ones write no more.
    pub fn next_life(&self) -> Self {
        let mut disk = self.disk.lock();
        disk.life += 1;
        Self { disk: self.disk.clone(), life: disk.life }
    }
    /// Every commit fails for this reason until told otherwise.
    pub fn fail(&self, reason: Option<&str>) {
        self.disk.lock().fail = reason.map(str::to_owned);
    }
    /// The process that writes here stops for ever at this point.
    pub fn stop_at(&self, fail_point: FailPoint) {
        let mut disk = self.disk.lock();
        (disk.fail_point, disk.stopped) = (fail_point, false);
    }
    /// It has stopped there.
    pub fn stopped(&self) -> bool {
        self.disk.lock().stopped
    }
    /// Every step that was ever committed.
    pub fn reached(&self) -> BTreeSet<&'static str> {
        self.disk.lock().reached.clone()
    }
    /// As after a disk was replaced.
    pub fn erase(&self) {
        self.disk.lock().content.clear();
    }
    pub(super) fn before(&self, steps: &[&'static str]) -> bool {
        let mut disk = self.disk.lock();
        if disk.life != self.life {
            return true;
        }
        disk.reached.extend(steps);
        disk.stopped |= disk.fail_point.before(steps);
        disk.stopped
    }
    pub(super) fn after(&self, steps: &[&'static str]) -> bool {
        let mut disk = self.disk.lock();
        disk.stopped |= disk.fail_point.after(steps);
        disk.stopped
    }
}

impl Store for MemoryStore {
    fn load(&mut self) -> Result<BTreeMap<String, Vec<u8>>, LedgerError> {
        Ok(self.disk.lock().content.clone())
    }
    fn commit(&mut self, batch: &[Write]) -> Result<(), LedgerError> {
        let mut disk = self.disk.lock();
        if let Some(reason) = &disk.fail {
            return Err(LedgerError::Io(reason.clone()));
        }
        for (key, value) in batch {
            match value {
                Some(value) => disk.content.insert(key.clone(), value.clone()),
                None => disk.content.remove(key),
            };
        }
        Ok(())
    }
}
