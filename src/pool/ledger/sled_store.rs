//! The [`Store`] on disk: sled 0.34, by the rules that make it safe as a journal
//! with one owner. Batch and flush before the reply; the first iteration error
//! ends the reading; the cache is bounded; no `generate_id`. Beside it the tail,
//! for what need not be flushed at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::tail::{self, Tail};
use super::{Ledger, LedgerError, LedgerReport, Store, Write};
use crate::model::InstanceId;
use crate::pool::state::State;

const SCHEMA: u32 = 1;
const CACHE_BYTES: u64 = 8 << 20;
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const META_TREE: &str = "meta";
/// The number of the tail that goes with this database; changed in the same
/// batch that takes a tail in.
const TAIL_KEY: &str = "tail";
/// A tail this long is taken in.
const TAIL_BYTES: u64 = 512 << 10;

pub struct SledStore {
    folder: PathBuf,
    instance: InstanceId,
    /// `None` after a failed write: to be opened anew.
    db: Option<sled::Db>,
    /// `None` until `load`, and after a failed write: then all goes to `db`.
    tail: Option<Tail>,
    tail_number: u64,
    /// What the tail says and the database does not.
    noted: BTreeMap<String, Option<Vec<u8>>>,
}

impl SledStore {
    /// Open the ledger in `folder`; a damaged one is moved aside first.
    pub fn open_ledger(
        folder: &Path,
        instance: &InstanceId,
    ) -> Result<(Ledger, Option<State>, LedgerReport), LedgerError> {
        let existed = folder.is_dir();
        let mut report = LedgerReport::default();
        let (ledger, state) = match Self::attempt(folder, instance) {
            Err(LedgerError::Corrupt(why)) => {
                let moved = move_aside(folder)?;
                report.damaged = Some(why);
                report.moved_to = Some(moved.display().to_string());
                Self::attempt(folder, instance)?
            }
            other => other?,
        };
        report.new = !existed && state.is_none();
        if existed && state.is_none() && report.damaged.is_none() {
            // A crash before the first commit, or a file sled could not read and
            // took for empty: either way leases may exist that it does not know.
            report.new = true;
        }
        if let Some(state) = &state {
            report.leases = state.leases().count();
            report.enis = state.enis.len();
        }
        Ok((ledger, state, report))
    }

    fn attempt(folder: &Path, instance: &InstanceId) -> Result<(Ledger, Option<State>), LedgerError> {
        // sled may panic on damage it did not foresee.
        let opened = std::panic::catch_unwind(|| {
            let store = Self::open(folder, instance)?;
            Ledger::open(Box::new(store))
        });
        opened.unwrap_or_else(|_| Err(LedgerError::Corrupt("reading it failed unexpectedly".to_owned())))
    }

    pub fn open(folder: &Path, instance: &InstanceId) -> Result<Self, LedgerError> {
        let (folder, instance) = (folder.to_owned(), instance.clone());
        let mut store = Self { folder, instance, db: None, tail: None, tail_number: 0, noted: BTreeMap::new() };
        store.db()?;
        Ok(store)
    }

    fn db(&mut self) -> Result<&sled::Db, LedgerError> {
        if self.db.is_none() {
            let db = self.open_db()?;
            self.claim(&db)?;
            self.db = Some(db);
        }
        self.db.as_ref().ok_or_else(|| LedgerError::Io("the ledger is not open".to_owned()))
    }

    /// sled's own threads hold the file's lock a little longer than its last
    /// user does.
    fn open_db(&self) -> Result<sled::Db, LedgerError> {
        let config = sled::Config::new().path(&self.folder).cache_capacity(CACHE_BYTES).mode(sled::Mode::LowSpace);
        let began = Instant::now();
        loop {
            match config.open().map_err(opening) {
                Err(LedgerError::InUse(_)) if began.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                opened => return opened,
            }
        }
    }

    /// Check whose ledger this is, or make it ours.
    fn claim(&self, db: &sled::Db) -> Result<(), LedgerError> {
        let meta = db.open_tree(META_TREE).map_err(failed)?;
        let text = |key: &str| -> Result<Option<String>, LedgerError> {
            let value = meta.get(key).map_err(failed)?;
            Ok(value.map(|v| String::from_utf8_lossy(&v).into_owned()))
        };
        match (text("schema")?, text("instance")?) {
            (None, None) if db.is_empty() => {
                let mut batch = sled::Batch::default();
                batch.insert("schema", SCHEMA.to_string().as_bytes());
                batch.insert("instance", self.instance.as_str().as_bytes());
                meta.apply_batch(batch).map_err(failed)?;
                meta.flush().map_err(failed)?;
                Ok(())
            }
            (Some(schema), _) if schema != SCHEMA.to_string() => {
                Err(LedgerError::Schema { found: schema, known: SCHEMA })
            }
            (Some(_), Some(instance)) if instance == self.instance.as_str() => Ok(()),
            (Some(_), Some(instance)) => {
                Err(LedgerError::Foreign { theirs: instance.into(), ours: self.instance.clone() })
            }
            _ => Err(LedgerError::Corrupt("it does not say whose it is".to_owned())),
        }
    }
}

impl Store for SledStore {
    fn load(&mut self) -> Result<BTreeMap<String, Vec<u8>>, LedgerError> {
        let mut records = BTreeMap::new();
        for entry in self.db()?.iter() {
            // A damaged tree yields errors for ever: the first one ends it.
            let (key, value) = entry.map_err(failed)?;
            let key = std::str::from_utf8(&key).map_err(|_| LedgerError::Corrupt("a key is not text".to_owned()))?;
            records.insert(key.to_owned(), value.to_vec());
        }
        if let Some(number) = records.remove(TAIL_KEY) {
            let number = std::str::from_utf8(&number).ok().and_then(|n| n.parse().ok());
            self.tail_number =
                number.ok_or_else(|| LedgerError::Corrupt("which tail is its is unreadable".to_owned()))?;
        }
        let (tail, writes) = Tail::open(&self.folder, self.tail_number).map_err(tail_failed)?;
        for (key, value) in writes {
            match &value {
                Some(value) => records.insert(key.clone(), value.clone()),
                None => records.remove(&key),
            };
            self.noted.insert(key, value);
        }
        self.tail = Some(tail);
        self.settle()?;
        Ok(records)
    }

    fn commit(&mut self, writes: &[Write]) -> Result<(), LedgerError> {
        let done = self.take_in(writes);
        if done.is_err() {
            // How far it came is not known: the next write says all of it again.
            (self.db, self.tail) = (None, None);
        }
        if matches!(done, Err(LedgerError::Corrupt(_))) {
            // A write that found the disk full can leave the files unreadable.
            // The pool has the whole state in memory, and after a failure the
            // next commit writes all of it: into fresh files.
            tracing::error!(folder = %self.folder.display(), "The ledger's files are damaged; they are written anew");
            let _ = std::fs::remove_dir_all(&self.folder);
        }
        done
    }

    fn note(&mut self, writes: &[Write]) -> Result<(), LedgerError> {
        let Some(tail) = self.tail.as_mut().filter(|tail| tail.len() < TAIL_BYTES) else {
            return self.commit(writes);
        };
        if let Err(e) = tail.append(writes) {
            self.tail = None;
            return Err(tail_failed(e));
        }
        self.noted.extend(writes.iter().cloned());
        Ok(())
    }

    fn settle(&mut self) -> Result<(), LedgerError> {
        if self.noted.is_empty() { Ok(()) } else { self.commit(&[]) }
    }
}

impl SledStore {
    /// Into the database, with what was noted before.
    fn take_in(&mut self, writes: &[Write]) -> Result<(), LedgerError> {
        // A new number even when the last attempt may have failed.
        let turn_over = !self.noted.is_empty() || self.tail.is_none();
        self.tail_number += u64::from(turn_over);
        let mut all: BTreeMap<&str, Option<&[u8]>> =
            self.noted.iter().map(|(key, value)| (&**key, value.as_deref())).collect();
        all.extend(writes.iter().map(|(key, value)| (&**key, value.as_deref())));
        let number = self.tail_number.to_string();
        if turn_over {
            all.insert(TAIL_KEY, Some(number.as_bytes()));
        }
        let mut batch = sled::Batch::default();
        for (key, value) in all {
            match value {
                Some(value) => batch.insert(key.as_bytes(), value),
                None => batch.remove(key.as_bytes()),
            }
        }
        let db = self.db()?;
        db.apply_batch(batch).and_then(|()| db.flush().map(drop)).map_err(failed)?;
        self.noted.clear();
        match self.tail.as_mut() {
            Some(tail) if turn_over => tail.restart(self.tail_number),
            Some(_) => {}
            // Without a tail everything is committed, which is slower and as good.
            None => self.tail = Tail::open(&self.folder, self.tail_number).ok().map(|(tail, _)| tail),
        }
        Ok(())
    }
}

fn tail_failed(error: std::io::Error) -> LedgerError {
    LedgerError::Io(format!("{}: {error}", tail::FILE))
}

fn failed(error: sled::Error) -> LedgerError {
    match error {
        sled::Error::Corruption { .. } => LedgerError::Corrupt(error.to_string()),
        other => LedgerError::Io(other.to_string()),
    }
}

fn opening(error: sled::Error) -> LedgerError {
    match error {
        // The kind is lost on the way, the text is not.
        sled::Error::Io(e) if e.to_string().contains("could not acquire lock") => LedgerError::InUse(e.to_string()),
        // What is there cannot be read as a database.
        sled::Error::Unsupported(why) => LedgerError::Corrupt(why),
        sled::Error::Io(e)
            if matches!(e.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof) =>
        {
            LedgerError::Corrupt(e.to_string())
        }
        other => failed(other),
    }
}

/// `ledger` becomes `ledger.corrupt-<seconds since the epoch>`.
fn move_aside(folder: &Path) -> Result<PathBuf, LedgerError> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let name = folder.file_name().map_or_else(|| "ledger".to_owned(), |n| n.to_string_lossy().into_owned());
    let free = (0..1000u32).map(|n| {
        let suffix = if n == 0 { String::new() } else { format!(".{n}") };
        folder.with_file_name(format!("{name}.corrupt-{seconds}{suffix}"))
    });
    let target = free.into_iter().find(|p| !p.exists()).unwrap_or_else(|| folder.with_extension("corrupt"));
    std::fs::rename(folder, &target)
        .map_err(|e| LedgerError::Io(format!("cannot move the damaged ledger to {}: {e}", target.display())))?;
    Ok(target)
}
