//! Following one table's changes, from a revision or from the present state.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::watch as channel;

use super::{Filter, Registry, matching};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::Kind;
use crate::lab::kube::object;
use crate::lab::kube::store::{Change, ChangeKind};

#[derive(Clone, Debug)]
pub enum WatchEvent {
    Added(Arc<Value>),
    Modified(Arc<Value>),
    Deleted(Arc<Value>),
    /// The initial state is complete as of this revision.
    Synced(u64),
}

impl WatchEvent {
    pub fn object(&self) -> Option<&Arc<Value>> {
        match self {
            Self::Added(object) | Self::Modified(object) | Self::Deleted(object) => Some(object),
            Self::Synced(_) => None,
        }
    }
}

/// Where a watch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchStart {
    /// The present state as additions, then changes.
    State,
    /// The same, and a [`WatchEvent::Synced`] in between.
    StateThenSynced,
    /// Changes after this revision.
    After(u64),
    /// Changes from now on.
    Now,
}

/// Events taken from the history at one time.
const BATCH: usize = 500;

/// A reader of one table's changes. Dropping it costs nothing.
pub struct Watcher {
    registry: Arc<Registry>,
    kind: &'static Kind,
    filter: Filter,
    position: u64,
    initial: VecDeque<WatchEvent>,
    changed: channel::Receiver<u64>,
}

impl Registry {
    pub fn watch(
        self: &Arc<Self>,
        kind: &'static Kind,
        filter: Filter,
        start: WatchStart,
    ) -> Result<Watcher, ApiError> {
        let changed = self.changed[kind.index()].subscribe();
        let state = self.state.lock();
        let current = state.store.revision();
        let mut initial = VecDeque::new();
        let position = match start {
            WatchStart::State | WatchStart::StateThenSynced => {
                initial.extend(matching(&state.store, kind, &filter).into_iter().map(WatchEvent::Added));
                if start == WatchStart::StateThenSynced {
                    initial.push_back(WatchEvent::Synced(current));
                }
                current
            }
            WatchStart::After(revision) => {
                if revision > current {
                    return Err(ApiError::future_revision(revision, current));
                }
                state.store.check_start(kind, revision)?;
                revision
            }
            WatchStart::Now => current,
        };
        drop(state);
        Ok(Watcher { registry: self.clone(), kind, filter, position, initial, changed })
    }
}

impl Watcher {
    pub fn kind(&self) -> &'static Kind {
        self.kind
    }

    /// Everything up to this revision has been handed out.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// What has happened since the last call; empty when nothing has. An error
    /// when this reader was too slow for the history: it must start anew.
    pub fn poll(&mut self) -> Result<Vec<WatchEvent>, ApiError> {
        if !self.initial.is_empty() {
            let count = self.initial.len().min(BATCH);
            return Ok(self.initial.drain(..count).collect());
        }
        loop {
            self.changed.mark_unchanged();
            let changes = {
                let state = self.registry.state.lock();
                let changes = state.store.changes(self.kind, self.position, BATCH)?;
                self.position = match changes.last() {
                    Some(last) if changes.len() == BATCH => last.revision,
                    _ => state.store.revision(),
                };
                changes
            };
            let full = changes.len() == BATCH;
            let events: Vec<WatchEvent> = changes.iter().filter_map(|change| self.seen(change)).collect();
            if !events.is_empty() || !full {
                return Ok(events);
            }
        }
    }

    /// Wait until there may be something to poll.
    pub async fn changed(&mut self) {
        if !self.initial.is_empty() {
            return;
        }
        // The registry outlives its watchers: it is held by this one.
        let _ = self.changed.changed().await;
    }

    /// The next events, waiting for them.
    pub async fn next(&mut self) -> Result<Vec<WatchEvent>, ApiError> {
        loop {
            let events = self.poll()?;
            if !events.is_empty() {
                return Ok(events);
            }
            self.changed().await;
        }
    }

    /// A change as this reader's selectors show it: an object that stops to
    /// match is gone.
    fn seen(&self, change: &Change) -> Option<WatchEvent> {
        let before = change.before.as_ref().filter(|object| self.filter.matches(object));
        let now = change.kind != ChangeKind::Deleted && self.filter.matches(&change.object);
        match (before, now) {
            (None, false) => None,
            (None, true) => Some(WatchEvent::Added(change.object.clone())),
            (Some(_), true) => Some(WatchEvent::Modified(change.object.clone())),
            (Some(_), false) if change.kind == ChangeKind::Deleted => Some(WatchEvent::Deleted(change.object.clone())),
            (Some(before), false) => {
                let mut last = (**before).clone();
                object::metadata(&mut last).insert("resourceVersion".into(), change.revision.to_string().into());
                Some(WatchEvent::Deleted(Arc::new(last)))
            }
        }
    }
}
