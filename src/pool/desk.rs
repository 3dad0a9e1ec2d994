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
    /// Write this state, as durably as `steps`, which led to it, ask for.
    pub fn commit(&self, state: State, steps: Vec<&'static str>) -> Written {
        match self {
            DeskHandle::Thread(worker) => Box::pin(worker.call(move |desk| {
                if desk.fail_point.before(&steps) {
                    die();
                }
                let of_node = steps.iter().all(|step| OF_NODE.contains(step));
                let written = if of_node { desk.ledger.note(&state) } else { desk.ledger.commit(&state) };
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

impl DeskHandle {
    /// Make durable what was written so far.
    pub fn settle(&self) -> Written {
        match self {
            DeskHandle::Thread(worker) => Box::pin(worker.call(|desk| desk.ledger.settle())),
            DeskHandle::InPlace(..) => Box::pin(std::future::ready(Ok(Ok(())))),
        }
    }
}

/// Steps about sandboxes, links and namespaces, of which a power cut leaves
/// nothing: what undoes them undoes what they say as well. An address that such
/// a step gave away is idle again, as its pod is gone.
const OF_NODE: [&str; 5] = ["lease", "confirm", "unwire", "release", "settle"];

/// As a power cut would: no destructor runs, nothing is flushed.
pub fn die() -> ! {
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    std::process::abort()
}
