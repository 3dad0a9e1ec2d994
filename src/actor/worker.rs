//! A plain thread that owns something that blocks: sled, a namespace, a file.
//!
//! Actors never block their executor; they send a closure to their worker and
//! take its result up as a future. A closure that panics ends the worker; its
//! owner sees [`WorkerGone`] and fails, and is rebuilt with a new worker.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use tokio::sync::oneshot;

/// The worker has ended, or its queue is full.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkerGone {
    #[error("the worker thread has ended")]
    Ended,
    #[error("the worker thread's queue is full")]
    Full,
}

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A thread that owns an `S`; jobs run one after the other.
pub struct Worker<S> {
    jobs: SyncSender<Job<S>>,
}

impl<S> Clone for Worker<S> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone() }
    }
}

impl<S: 'static> Worker<S> {
    /// Start the thread; `open` builds what it owns, there. The thread ends when
    /// the last clone of the worker is dropped and its jobs are done.
    pub async fn start<E: Send + 'static>(
        name: impl Into<String>,
        queue: usize,
        open: impl FnOnce() -> Result<S, E> + Send + 'static,
    ) -> Result<Self, WorkerStartError<E>> {
        let (jobs, inbox) = sync_channel::<Job<S>>(queue);
        let (tell, opened) = oneshot::channel();
        let body = move || {
            let mut state = match open() {
                Ok(state) => {
                    let _ = tell.send(Ok(()));
                    state
                }
                Err(e) => {
                    let _ = tell.send(Err(e));
                    return;
                }
            };
            while let Ok(job) = inbox.recv() {
                job(&mut state);
            }
        };
        std::thread::Builder::new().name(name.into()).spawn(body).map_err(WorkerStartError::Thread)?;
        match opened.await {
            Ok(Ok(())) => Ok(Self { jobs }),
            Ok(Err(e)) => Err(WorkerStartError::Open(e)),
            Err(_) => Err(WorkerStartError::Panicked),
        }
    }

    /// Queue a job now; the result comes when it has run. Jobs run in the order
    /// of these calls, whether or not the futures are polled.
    pub fn call<R, F>(&self, job: F) -> impl Future<Output = Result<R, WorkerGone>> + use<S, R, F> + 'static
    where
        R: Send + 'static,
        F: FnOnce(&mut S) -> R + Send + 'static,
    {
        let (tell, result) = oneshot::channel();
        let queued = self.jobs.try_send(Box::new(move |state| {
            let _ = tell.send(job(state));
        }));
        let refused = match queued {
            Ok(()) => None,
            Err(TrySendError::Full(_)) => Some(WorkerGone::Full),
            Err(TrySendError::Disconnected(_)) => Some(WorkerGone::Ended),
        };
        async move {
            match refused {
                Some(gone) => Err(gone),
                None => result.await.map_err(|_| WorkerGone::Ended),
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum WorkerStartError<E> {
    #[error("no thread: {0}")]
    Thread(std::io::Error),
    #[error("{0}")]
    Open(E),
    #[error("it panicked while opening")]
    Panicked,
}
