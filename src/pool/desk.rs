//! Where the ledger is written: a thread of its own for the one on disk; in
//! place for one in memory, so that simulations run on paused time.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use super::ledger::{Ledger, LedgerError, MemoryStore};
use super::state::State;
use super::step::FailPoint;
use crate::actor::{Worker, WorkerGone};

/// What the ledger's thread owns.
pub(super) struct Desk {
    pub ledger: Ledger,
    pub fail_point: FailPoint,
}

pub(super) enum DeskHandle {
    Thread(Worker<Desk>),
    InPlace(Rc<RefCell<Ledger>>, MemoryStore),
}

type Written = Pin<Box<dyn Future<Output = Result<Result<(), LedgerError>, WorkerGone>>>>;

impl DeskHandle {
    /// Make this state durable. `steps` are what led to it.
    pub fn commit(&self, state: State, steps: Vec<&'static str>) -> Written {
        match self {
            DeskHandle::Thread(worker) => Box::pin(worker.call(move |desk| {
                if desk.fail_point.before(&steps) {
                    die();
                }
                let written = desk.ledger.commit(&state);
                if written.is_ok() && desk.fail_point.after(&steps) {
                    die();
                }
                written
            })),
            DeskHandle::InPlace(ledger, store) => {
                // A process that died here says nothing any more.
                let silence = || Box::pin(std::future::pending());
                if store.before(&steps) {
                    return silence();
                }
                let written = ledger.borrow_mut().commit(&state);
                if written.is_ok() && store.after(&steps) {
                    return silence();
                }
                Box::pin(std::future::ready(Ok(written)))
            }
        }
    }
}

/// As a power cut would: no destructor runs, nothing is flushed.
pub fn die() -> ! {
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    std::process::abort()
}
