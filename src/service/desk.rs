//! What ServiceMap's worker thread owns: the maps and the books.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::explain::{Explanation, Query, explain};
use super::index::Index;
use super::maps::{Counts, Gone, ServiceMaps};
use super::model::{NodeFacts, ServiceName};
use super::problem::Problem;
use super::sync::{Done, SyncError, Syncer};

pub(super) struct Desk {
    syncer: Syncer<Box<dyn ServiceMaps>>,
    index: Index,
}

/// How things are after a look at what has changed.
pub(super) struct Synced {
    pub done: Done,
    pub took: Duration,
    pub problems: Vec<Problem>,
    /// Backends that are gone.
    pub gone: Vec<Gone>,
    /// Port to Service and its ready endpoints here.
    pub health: BTreeMap<u16, (ServiceName, usize)>,
    pub used: Counts,
    pub capacity: Counts,
    pub services: usize,
    pub sets: usize,
    /// Services that wait for room.
    pub waiting: usize,
}

impl Desk {
    pub fn open(maps: Box<dyn ServiceMaps>, index: Index) -> Result<Self, SyncError> {
        Ok(Self { syncer: Syncer::open(maps)?, index })
    }

    /// Whether the maps hold what an earlier run wrote.
    pub fn adopted(&self) -> bool {
        self.syncer.book.used().frontends > 0
    }

    /// Bring the maps up to date; `None` while the cluster is not known whole.
    pub fn sync(&mut self, node: Arc<NodeFacts>, retry: bool) -> Result<Option<Synced>, SyncError> {
        let began = Instant::now();
        let dirty = self.index.take_dirty();
        if !dirty.complete {
            return Ok(None);
        }
        let mut names = dirty.names;
        let book = &mut self.syncer.book;
        if book.set_node(node) || book.adopting() {
            names.extend(self.index.names());
            names.extend(book.names().cloned());
        }
        if retry {
            names.extend(book.waiting().iter().cloned());
        }
        let done = self.syncer.sync(names, &self.index)?;
        Ok(Some(self.synced(done, began.elapsed())))
    }

    fn synced(&mut self, done: Done, took: Duration) -> Synced {
        let gone = std::mem::take(&mut self.syncer.gone);
        let book = &self.syncer.book;
        let mut problems = self.index.problems();
        problems.extend(book.problems().cloned());
        let mut health: BTreeMap<u16, (ServiceName, usize)> = BTreeMap::new();
        for (name, h) in book.health() {
            health.entry(h.port).or_insert_with(|| (name.clone(), h.local_ready));
        }
        let (services, sets) = book.sizes();
        Synced {
            done,
            took,
            problems,
            gone,
            health,
            used: book.used(),
            capacity: book.capacity(),
            services,
            sets,
            waiting: book.waiting().len(),
        }
    }

    pub fn explain(&self, query: &Query) -> Explanation {
        explain(&self.syncer.book, &self.index, query)
    }
}
