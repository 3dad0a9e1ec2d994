//! One conversation at a time per attachment, in the order they came.
//!
//! Pods do not wait for each other: there is no node-wide lock.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

use crate::actor::Deadline;
use crate::model::AttachmentId;

#[derive(Default)]
pub struct Turns {
    /// Kept alive by those who hold or await a turn.
    open: Mutex<HashMap<AttachmentId, Weak<tokio::sync::Mutex<()>>>>,
}

/// Held for the length of a conversation.
pub struct Turn {
    _guard: OwnedMutexGuard<()>,
}

impl Turns {
    fn slot(&self, id: &AttachmentId) -> Arc<tokio::sync::Mutex<()>> {
        let mut open = self.open.lock();
        if let Some(slot) = open.get(id).and_then(Weak::upgrade) {
            return slot;
        }
        open.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(tokio::sync::Mutex::new(()));
        open.insert(id.clone(), Arc::downgrade(&slot));
        slot
    }

    /// Wait for the turn; `None` when the deadline passes first.
    pub async fn take(&self, id: &AttachmentId, deadline: Deadline) -> Option<Turn> {
        let waiting = self.slot(id).lock_owned();
        let guard = tokio::time::timeout_at(deadline.instant(), waiting).await.ok()?;
        Some(Turn { _guard: guard })
    }

    /// The turn, unless someone has it.
    pub fn take_if_free(&self, id: &AttachmentId) -> Option<Turn> {
        self.slot(id).try_lock_owned().ok().map(|guard| Turn { _guard: guard })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn id(sandbox: &str) -> AttachmentId {
        AttachmentId { sandbox: sandbox.into(), ifname: "eth0".into() }
    }

    #[tokio::test(start_paused = true)]
    async fn one_attachment_has_one_conversation_at_a_time_and_others_do_not_wait() {
        let turns = Turns::default();
        let soon = || Deadline::after(Duration::from_secs(1));
        let first = turns.take(&id("a"), soon()).await.unwrap();
        assert!(turns.take_if_free(&id("a")).is_none());
        assert!(turns.take(&id("a"), soon()).await.is_none(), "a second one waits until its deadline");
        assert!(turns.take(&id("b"), soon()).await.is_some());
        drop(first);
        assert!(turns.take(&id("a"), soon()).await.is_some());
    }

    #[tokio::test]
    async fn attachments_that_are_done_are_forgotten() {
        let turns = Turns::default();
        for n in 0..1000 {
            assert!(turns.take_if_free(&id(&n.to_string())).is_some());
        }
        assert!(turns.open.lock().len() <= 1);
    }
}
