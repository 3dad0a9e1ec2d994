//! The object store: one table per kind, one counter of revisions, a bounded
//! history of changes per table. Pure data; the caller holds the lock.
//!
//! Invariants: revisions only grow; a table's history is in order and covers
//! everything after `forgotten`; an object's `resourceVersion` is the revision of
//! its last change.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use serde_json::Value;

use super::error::ApiError;
use super::kind::{KINDS, Kind};
use super::object;

/// Namespace (empty for cluster-wide kinds) and name: the order of lists.
pub type Key = (String, String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    Added,
    Modified,
    Deleted,
}

/// One change of one object.
#[derive(Debug)]
pub struct Change {
    pub revision: u64,
    pub kind: ChangeKind,
    pub object: Arc<Value>,
    pub before: Option<Arc<Value>>,
}

#[derive(Default)]
struct Table {
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Arc<Change>>,
    /// Revision of the newest change that is no longer in the history.
    forgotten: u64,
    last: u64,
}

pub struct Store {
    tables: Vec<Table>,
    revision: u64,
    /// Nobody may start to watch from before this revision.
    horizon: u64,
    keep: usize,
}

impl Store {
    /// Revisions start after `first`; each table remembers `keep` changes.
    pub fn new(first: u64, keep: usize) -> Self {
        let table = || Table { forgotten: first, last: first, ..Table::default() };
        Self { tables: KINDS.iter().map(|_| table()).collect(), revision: first, horizon: first, keep: keep.max(1) }
    }

    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Option<&Arc<Value>> {
        self.tables[kind.index()].objects.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// Objects in list order, of one namespace or of all.
    pub fn scan<'a>(&'a self, kind: &Kind, namespace: Option<&str>) -> Box<dyn Iterator<Item = &'a Arc<Value>> + 'a> {
        let objects = &self.tables[kind.index()].objects;
        match namespace {
            None => Box::new(objects.values()),
            Some(namespace) => {
                let namespace = namespace.to_owned();
                let from = Bound::Included((namespace.clone(), String::new()));
                let range = objects.range((from, Bound::Unbounded));
                Box::new(range.take_while(move |((ns, _), _)| *ns == namespace).map(|(_, object)| object))
            }
        }
    }

    pub fn count(&self, kind: &Kind) -> usize {
        self.tables[kind.index()].objects.len()
    }

    /// Create or replace; returns the object as stored.
    pub fn put(&mut self, kind: &Kind, mut object: Value) -> Arc<Value> {
        self.revision += 1;
        let revision = self.revision;
        object::metadata(&mut object).insert("resourceVersion".into(), revision.to_string().into());
        let object = Arc::new(object);
        let key = (object::namespace(&object).to_owned(), object::name(&object).to_owned());
        let before = self.tables[kind.index()].objects.insert(key, object.clone());
        let change = if before.is_some() { ChangeKind::Modified } else { ChangeKind::Added };
        self.record(kind, Change { revision, kind: change, object: object.clone(), before });
        object
    }

    /// Remove; the last state carries the revision of the removal.
    pub fn remove(&mut self, kind: &Kind, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let key = (namespace.to_owned(), name.to_owned());
        let before = self.tables[kind.index()].objects.remove(&key)?;
        self.revision += 1;
        let revision = self.revision;
        let mut last = (*before).clone();
        object::metadata(&mut last).insert("resourceVersion".into(), revision.to_string().into());
        let object = Arc::new(last);
        let change = Change { revision, kind: ChangeKind::Deleted, object: object.clone(), before: Some(before) };
        self.record(kind, change);
        Some(object)
    }

    fn record(&mut self, kind: &Kind, change: Change) {
        let keep = self.keep;
        let table = &mut self.tables[kind.index()];
        table.last = change.revision;
        table.history.push_back(Arc::new(change));
        while table.history.len() > keep {
            if let Some(gone) = table.history.pop_front() {
                table.forgotten = gone.revision;
            }
        }
    }

    /// Whether a watch may start from `revision`.
    pub fn check_start(&self, kind: &Kind, revision: u64) -> Result<(), ApiError> {
        let oldest = self.horizon.max(self.tables[kind.index()].forgotten);
        if revision < oldest { Err(ApiError::expired(revision, oldest)) } else { Ok(()) }
    }

    /// Changes after `revision`, oldest first, at most `limit`; an error when
    /// some of them are forgotten.
    pub fn changes(&self, kind: &Kind, revision: u64, limit: usize) -> Result<Vec<Arc<Change>>, ApiError> {
        let table = &self.tables[kind.index()];
        if revision < table.forgotten {
            return Err(ApiError::expired(revision, table.forgotten));
        }
        let start = table.history.partition_point(|change| change.revision <= revision);
        Ok(table.history.range(start..).take(limit).cloned().collect())
    }

    /// The revision of this table's newest change.
    pub fn last_change(&self, kind: &Kind) -> u64 {
        self.tables[kind.index()].last
    }

    /// Forget all history: who has not read it yet must list again.
    pub fn compact(&mut self) {
        self.horizon = self.revision;
        for table in &mut self.tables {
            table.history.clear();
            table.forgotten = table.last;
        }
    }
}
