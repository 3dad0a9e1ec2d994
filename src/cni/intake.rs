//! Takes up the releases that shims left in the spool.
//!
//! Owner: CniServer. Invariants: file work is on the spool's own thread; a
//! release leaves the spool only after the pool has finished it; the agent is
//! not ready before each of those found at start has been tried with the other
//! actors up.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::unix::pipe;
use tokio_util::task::AbortOnDropHandle;

use super::conversation::Desk;
use super::errors::Unreleased;
use super::spool::{self, Entry};
use super::wire::{CniError, code};
use crate::actor::{Deadline, StartError, Worker, WorkerGone};
use crate::model::{AttachmentId, SandboxId};

/// Releases in work at the same time.
const PARALLEL: usize = 8;
const ONE_RELEASE: Duration = Duration::from_secs(30);
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// A look at the folder even when nothing was announced.
const LOOK: Duration = Duration::from_secs(60);
/// A shim's own patience with the disk is shorter.
const DRAFT_AGE: Duration = Duration::from_secs(300);
const QUEUE: usize = 512;

/// The spool's folder, on its own thread.
#[derive(Clone)]
pub struct SpoolWorker {
    dir: PathBuf,
    worker: Worker<PathBuf>,
}

impl SpoolWorker {
    pub async fn start(dir: PathBuf) -> Result<Self, StartError> {
        let open = {
            let dir = dir.clone();
            move || spool::prepare(&dir).map(|()| dir)
        };
        let worker = Worker::start("CniServer-spool", QUEUE, open).await;
        let why = |e| StartError::new(format!("spool {}: {e}; free or repair the disk", dir.display()));
        Ok(Self { worker: worker.map_err(why)?, dir })
    }

    async fn call<R: Send + 'static>(
        &self,
        job: impl FnOnce(&Path) -> io::Result<R> + Send + 'static,
    ) -> io::Result<R> {
        let done = self.worker.call(move |dir| job(dir)).await;
        done.map_err(|gone: WorkerGone| io::Error::other(gone))?
    }
    pub async fn store(&self, entry: Entry) -> io::Result<()> {
        self.call(move |dir| spool::store(dir, &entry)).await
    }
    pub async fn holds(&self, id: &AttachmentId) -> io::Result<bool> {
        let name = spool::file_name(id.sandbox.as_str(), &id.ifname);
        self.call(move |dir| dir.join(name).try_exists()).await
    }
    pub async fn remove(&self, id: &AttachmentId) -> io::Result<()> {
        let id = id.clone();
        self.call(move |dir| spool::remove(dir, id.sandbox.as_str(), &id.ifname)).await
    }
    async fn waiting(&self) -> io::Result<Vec<AttachmentId>> {
        let names = self.call(spool::list).await?;
        let parsed = names.iter().filter_map(|name| spool::parse_name(name));
        Ok(parsed
            .map(|(id, ifname)| AttachmentId { sandbox: SandboxId::from(id), ifname: ifname.to_owned() })
            .collect())
    }
}

/// Runs as long as the CniServer; ends only with an error of the spool itself.
pub async fn take_up(desk: Arc<Desk>) -> io::Error {
    let mut announced = match Announced::watch(&desk.spool.dir) {
        Ok(watch) => watch,
        Err(e) => return e,
    };
    let mut delay = RETRY_FIRST;
    loop {
        // Anything announced from here on is another look.
        announced.clear();
        let left = match look(&desk).await {
            Ok(left) => left,
            Err(e) => return e,
        };
        if !left.for_lack_of_an_actor && !*desk.ready.borrow() {
            tracing::info!(left = left.count, "Releases left behind have been taken up");
            desk.ready.send_replace(true);
        }
        let pause = if left.count == 0 { LOOK } else { delay };
        delay = if left.count == 0 { RETRY_FIRST } else { (delay * 2).min(RETRY_MAX) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            seen = announced.next() => if let Err(e) = seen { return e },
        }
    }
}

#[derive(Default)]
struct Left {
    count: usize,
    /// The pool or the wirer was not up (yet): these were not really tried.
    for_lack_of_an_actor: bool,
}

async fn look(desk: &Arc<Desk>) -> io::Result<Left> {
    desk.spool.call(|dir| std::fs::metadata(dir).and_then(|_| spool::sweep(dir, DRAFT_AGE))).await?;
    let waiting = desk.spool.waiting().await?;
    let mut left = Left::default();
    let mut work = futures::stream::iter(waiting).map(|id| apart(desk.clone(), id)).buffer_unordered(PARALLEL);
    while let Some((id, result)) = work.next().await {
        if let Err(e) = result {
            // While the pool starts, every newly spooled release is a look at all.
            if e.actor_away {
                tracing::debug!(attachment = %id, error = %e, "A spooled release has to wait");
            } else {
                tracing::warn!(attachment = %id, error = %e, "A spooled release will be tried again");
            }
            left.count += 1;
            left.for_lack_of_an_actor |= e.actor_away;
        }
    }
    Ok(left)
}

/// As a task of its own: a release that panics must not take the server along,
/// again and again.
async fn apart(desk: Arc<Desk>, id: AttachmentId) -> (AttachmentId, Result<(), Unreleased>) {
    let task = AbortOnDropHandle::new(tokio::spawn(one(desk, id.clone())));
    let done = task.await.unwrap_or_else(|e| {
        let error = CniError::new(code::TRY_AGAIN, format!("the release failed: {e}"));
        Err(Unreleased { error, actor_away: false })
    });
    (id, done)
}

async fn one(desk: Arc<Desk>, id: AttachmentId) -> Result<(), Unreleased> {
    let deadline = Deadline::after(ONE_RELEASE);
    let Some(_turn) = desk.turns.take(&id, deadline).await else {
        let error = CniError::new(code::TRY_AGAIN, "another call for it is at work");
        return Err(Unreleased { error, actor_away: false });
    };
    let span = tracing::info_span!("cni", command = "DEL", container = %id.sandbox, pod = "", spooled = true);
    tracing::Instrument::instrument(desk.finish_spooled(&id, deadline), span).await
}

/// The kernel's word that a file has appeared, or that the folder is gone.
struct Announced {
    // An inotify descriptor is read like a pipe, and tokio has a safe type for
    // these. Its events need not be parsed: each one is a reason to look.
    events: pipe::Receiver,
}

impl Announced {
    fn watch(dir: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(dir, AddWatchFlags::IN_MOVED_TO)?;
        let fd = OwnedFd::from(inotify);
        Ok(Self { events: pipe::Receiver::from_owned_fd_unchecked(fd)? })
    }

    fn clear(&mut self) {
        let mut events = [0; 4096];
        while self.events.try_read(&mut events).is_ok_and(|n| n > 0) {}
    }

    async fn next(&mut self) -> io::Result<()> {
        self.events.readable().await
    }
}
