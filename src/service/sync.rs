//! Carries rounds of the books out on the maps.
//!
//! Owner: ServiceMap's worker thread. Entries go in chunks of bounded size. When
//! the kernel refuses one, the Service that it is of goes back to what it had,
//! and the others are written as if it had not changed; writes say what is to
//! be, not what is to change, so that making them twice does no harm.

use super::book::{Book, Round, Source};
use super::diff::Writes;
use super::maps::{Chunk, Gone, ReadFailed, ServiceMaps, WriteFailed};
use super::model::ServiceName;

/// Entries in one chunk: a batch call of some 100 µs.
const CHUNK: usize = 512;
/// More refusals than this in one round are no matter of single Services.
const REFUSALS: usize = 16;

/// The maps are not to be relied on; start over from what is in them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyncError {
    #[error("{0}")]
    Read(#[from] ReadFailed),
    #[error("the service maps cannot be written: {table}: {cause}")]
    Write { table: &'static str, cause: String },
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Done {
    /// Services looked at.
    pub compiled: usize,
    /// Entries written or deleted.
    pub written: usize,
}

pub struct Syncer<M> {
    pub maps: M,
    pub book: Book,
    /// Backends whose ids are gone from the maps, for whoever is to be told:
    /// sockets that were connected to them directly do not find out otherwise.
    pub gone: Vec<Gone>,
}

impl<M: ServiceMaps> Syncer<M> {
    /// Takes up what is in the maps; changes nothing.
    pub fn open(maps: M) -> Result<Self, SyncError> {
        Self::with_limit(maps, u32::MAX)
    }

    pub fn with_limit(mut maps: M, limit: u32) -> Result<Self, SyncError> {
        let tables = maps.read_all()?;
        let capacity = maps.capacity();
        Ok(Self { maps, book: Book::new(tables, capacity, limit), gone: Vec::new() })
    }

    /// Bring the maps up to date with these Services. The first time they must
    /// be all there are: what is not among them goes.
    pub fn sync(
        &mut self,
        dirty: impl IntoIterator<Item = ServiceName>,
        source: &dyn Source,
    ) -> Result<Done, SyncError> {
        let (mut done, mut freed) = self.one(dirty.into_iter().collect(), source)?;
        // Those who wait for room take what has come free.
        while freed && !self.book.waiting().is_empty() {
            let before = self.book.waiting().len();
            let (more, again) = self.one(self.book.waiting().iter().cloned().collect(), source)?;
            done.compiled += more.compiled;
            done.written += more.written;
            freed = again && self.book.waiting().len() < before;
        }
        Ok(done)
    }

    /// Those who wait, whether or not something has come free.
    pub fn retry(&mut self, source: &dyn Source) -> Result<Done, SyncError> {
        let waiting = self.book.waiting().iter().cloned().collect();
        self.one(waiting, source).map(|(done, _)| done)
    }

    fn one(&mut self, dirty: Vec<ServiceName>, source: &dyn Source) -> Result<(Done, bool), SyncError> {
        let mut round = self.book.round(dirty, source);
        let mut refusals = 0;
        let writes = loop {
            let writes = self.book.writes(&round);
            let Err(refusal) = apply(&mut self.maps, &writes) else { break writes };
            refusals += 1;
            let owner = owner(&self.book, &round, &refusal).filter(|_| refusals <= REFUSALS);
            let Some(owner) = owner else {
                return Err(SyncError::Write { table: refusal.table, cause: refusal.cause });
            };
            let cause = format!("the kernel does not take an entry of {}: {}", refusal.table, refusal.cause);
            self.book.revoke(&mut round, &owner, &cause);
        };
        let done = Done { compiled: round.compiled, written: writes.len() };
        let freed = !writes.delete_backends.is_empty()
            || !writes.delete_frontends.is_empty()
            || !writes.delete_slots.is_empty()
            || !writes.delete_ranges.is_empty();
        self.book.commit(round, &writes);
        self.gone.extend_from_slice(&writes.gone);
        Ok((done, freed))
    }
}

/// What of was refused, and why.
struct Refusal {
    table: &'static str,
    cause: String,
    what: What,
}

enum What {
    Backend(u32),
    Set(u32),
    Frontend(fairway_ebpf_abi::FrontendKey),
    Deletion,
}

fn apply(maps: &mut impl ServiceMaps, writes: &Writes) -> Result<(), Refusal> {
    for chunk in writes.chunks(CHUNK) {
        maps.apply(chunk).map_err(|WriteFailed { index, cause }| {
            let what = match chunk {
                Chunk::PutBackends(c) => c.get(index).map(|b| What::Backend(b.id)),
                Chunk::PutSlots(c) => c.get(index).map(|s| What::Set(s.0.set)),
                Chunk::PutRanges(c) => c.get(index).map(|r| What::Set(r.set())),
                Chunk::PutFrontends(c) => c.get(index).map(|f| What::Frontend(f.0)),
                _ => None,
            };
            Refusal { table: chunk.table(), cause, what: what.unwrap_or(What::Deletion) }
        })?;
    }
    Ok(())
}

fn owner(book: &Book, round: &Round, refusal: &Refusal) -> Option<ServiceName> {
    match &refusal.what {
        What::Backend(id) => book.owner_in(round, |i| i.sets.iter().any(|s| s.backends().any(|b| b.id == *id))),
        What::Set(id) => book.owner_in(round, |i| i.sets.iter().any(|s| s.id == *id)),
        What::Frontend(key) => book.owner_in(round, |i| i.frontends.iter().any(|f| f.0 == *key)),
        What::Deletion => None,
    }
}
