//! A thread outside every executor that says who is stuck.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use super::registry::{ActorState, Registry};

/// An actor whose thread has not turned its loop for this long is stuck.
const SILENT: Duration = Duration::from_secs(2);

/// Runs until dropped.
pub(super) struct Watchdog {
    _stop: Sender<()>,
}

impl Watchdog {
    pub(super) fn start(registry: Registry) -> Self {
        let (stop, stopped) = channel::<()>();
        let watch = move || {
            while stopped.recv_timeout(SILENT / 4) == Err(RecvTimeoutError::Timeout) {
                look(&registry);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("watchdog".to_owned()).spawn(watch) {
            tracing::warn!(%error, "No watchdog: stuck actors will go unreported");
        }
        Self { _stop: stop }
    }
}

fn look(registry: &Registry) {
    for record in registry.records() {
        let silent = record.silent();
        // Once when it becomes stuck, then every ten seconds or so.
        if record.state() == ActorState::Running && silent > SILENT && silent.as_millis() % 10_000 < 500 {
            let snapshot = record.snapshot();
            tracing::error!(
                actor = record.name,
                silent_ms = silent.as_millis() as u64,
                in_work = ?snapshot.in_work,
                depth = snapshot.depth,
                "Actor's thread is stuck"
            );
        }
    }
}
