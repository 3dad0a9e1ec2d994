//! The API's behaviour, without HTTP: what a create, an update, a delete mean.
//!
//! Owner of the object store and of the Services' addresses, behind one lock
//! that no call holds across an await. Everyone, the HTTP server and the
//! controllers alike, reads and writes through here.
//!
//! - [`write`]: create, update, the four patches, bindings, scale
//! - [`delete`]: grace periods, finalizers, propagation, eviction
//! - [`watch`]: following changes

mod delete;
mod shape;
mod sub;
mod watch;
mod write;

use std::collections::VecDeque;
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::watch as channel;

pub use delete::{DeleteOptions, Deleted};
pub use sub::scale_of;
pub use watch::{WatchEvent, WatchStart, Watcher};
pub use write::{PatchKind, Sub, Written};

use super::KubeConfig;
use super::error::ApiError;
use super::kind::{KINDS, Kind};
use super::object;
use super::selector::{Fields, Labels};
use super::services::Services;
use super::store::Store;

/// What to do with fields that a kind does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Validation {
    Ignore,
    #[default]
    Warn,
    Strict,
}

/// Who writes, and how.
#[derive(Clone, Debug)]
pub struct Ctx {
    pub manager: String,
    pub dry_run: bool,
    pub validation: Validation,
    pub now: Timestamp,
}

impl Ctx {
    pub fn new(manager: &str) -> Self {
        Self { manager: manager.to_owned(), dry_run: false, validation: Validation::Warn, now: Timestamp::now() }
    }
}

/// What to list or watch.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub namespace: Option<String>,
    pub labels: Labels,
    pub fields: Fields,
}

impl Filter {
    pub fn namespace(namespace: &str) -> Self {
        Self { namespace: Some(namespace.to_owned()), ..Self::default() }
    }

    pub fn matches(&self, object: &Value) -> bool {
        self.namespace.as_deref().is_none_or(|ns| ns == object::namespace(object))
            && self.labels.matches(object::labels(object))
            && self.fields.matches(object)
    }
}

/// Pages, and how fresh the answer must be.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub limit: usize,
    pub token: String,
    pub revision: Option<u64>,
    /// `resourceVersionMatch=Exact`.
    pub exact: bool,
}

/// A page of a list.
pub struct Listing {
    pub items: Vec<Arc<Value>>,
    pub revision: u64,
    pub token: Option<String>,
    pub remaining: usize,
}

/// A list that is being read in pages: all pages show the same moment.
struct Snapshot {
    id: u64,
    revision: u64,
    items: Arc<Vec<Arc<Value>>>,
}

/// Lists in reading at one time; the oldest is given up.
const SNAPSHOTS: usize = 64;

struct State {
    store: Store,
    services: Services,
    snapshots: VecDeque<Snapshot>,
    next_snapshot: u64,
}

pub struct Registry {
    state: Mutex<State>,
    /// Per table: the revision of its newest change.
    changed: Vec<channel::Sender<u64>>,
    /// Counted up to end every open watch; true in the second place: abruptly.
    cut: channel::Sender<(u64, bool)>,
}

impl Registry {
    pub fn new(config: &KubeConfig) -> Arc<Self> {
        // A revision from an earlier run must be older than any of this one.
        let first = Timestamp::now().as_second().max(0) as u64 * 1000;
        let state = State {
            store: Store::new(first, config.history),
            services: Services::new(&config.service_cidrs, config.node_ports.clone()),
            snapshots: VecDeque::new(),
            next_snapshot: first,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: KINDS.iter().map(|_| channel::Sender::new(first)).collect(),
            cut: channel::Sender::new((0, false)),
        })
    }

    pub fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Arc<Value>, ApiError> {
        let state = self.state.lock();
        state.store.get(kind, namespace, name).cloned().ok_or_else(|| ApiError::not_found(kind, name))
    }

    pub fn find(&self, kind: &Kind, namespace: &str, name: &str) -> Option<Arc<Value>> {
        self.state.lock().store.get(kind, namespace, name).cloned()
    }

    /// Everything that matches, now.
    pub fn all(&self, kind: &Kind, filter: &Filter) -> Vec<Arc<Value>> {
        matching(&self.state.lock().store, kind, filter)
    }

    /// In this namespace.
    pub fn within(&self, kind: &Kind, namespace: &str) -> Vec<Arc<Value>> {
        self.state.lock().store.scan(kind, Some(namespace)).cloned().collect()
    }

    pub fn count(&self, kind: &Kind) -> usize {
        self.state.lock().store.count(kind)
    }

    pub fn revision(&self) -> u64 {
        self.state.lock().store.revision()
    }

    pub fn first_service_address(&self) -> Option<std::net::IpAddr> {
        self.state.lock().services.first()
    }

    pub fn list(&self, kind: &Kind, filter: &Filter, page: &Page) -> Result<Listing, ApiError> {
        let mut state = self.state.lock();
        let (snapshot, from) = if page.token.is_empty() {
            let current = state.store.revision();
            if let Some(wanted) = page.revision.filter(|r| *r > current) {
                return Err(ApiError::future_revision(wanted, current));
            }
            if let Some(wanted) = page.revision.filter(|_| page.exact)
                && wanted < state.store.last_change(kind)
            {
                return Err(ApiError::expired(wanted, state.store.last_change(kind)));
            }
            let revision = page.revision.filter(|_| page.exact).unwrap_or(current);
            let items = Arc::new(matching(&state.store, kind, filter));
            state.next_snapshot += 1;
            (Snapshot { id: state.next_snapshot, revision, items }, 0)
        } else {
            let (id, from) = parse_token(&page.token)?;
            let place = state.snapshots.iter().position(|s| s.id == id);
            let snapshot = place.and_then(|at| state.snapshots.remove(at)).ok_or_else(ApiError::continue_expired)?;
            if from > snapshot.items.len() {
                return Err(ApiError::bad_request("continue key is not valid"));
            }
            (snapshot, from)
        };
        let limit = if page.limit == 0 { usize::MAX } else { page.limit };
        let to = from.saturating_add(limit).min(snapshot.items.len());
        let mut listing = Listing {
            items: snapshot.items[from..to].to_vec(),
            revision: snapshot.revision,
            token: None,
            remaining: snapshot.items.len() - to,
        };
        if listing.remaining > 0 {
            listing.token = Some(token(snapshot.id, to));
        }
        // Kept after the last page too: a client may ask for a page twice.
        if to < snapshot.items.len() || from > 0 {
            state.snapshots.push_back(snapshot);
            while state.snapshots.len() > SNAPSHOTS {
                state.snapshots.pop_front();
            }
        }
        Ok(listing)
    }

    /// End every open watch; `abruptly` breaks the connection in mid-answer.
    pub fn cut_watches(&self, abruptly: bool) {
        self.cut.send_modify(|(count, how)| {
            *count += 1;
            *how = abruptly;
        });
    }

    /// Changes whenever [`Self::cut_watches`] is called.
    pub fn cuts(&self) -> channel::Receiver<(u64, bool)> {
        self.cut.subscribe()
    }

    /// Forget the history and all half-read lists, as etcd's compaction does.
    pub fn compact(&self) {
        let mut state = self.state.lock();
        state.store.compact();
        state.snapshots.clear();
    }

    fn announce(&self, kind: &Kind, state: &State) {
        self.changed[kind.index()].send_replace(state.store.revision());
    }
}

fn matching(store: &Store, kind: &Kind, filter: &Filter) -> Vec<Arc<Value>> {
    // A watch or get by name must not read ten thousand objects.
    if let Some(name) = filter.fields.name() {
        let namespace = if kind.namespaced { filter.namespace.as_deref() } else { Some("") };
        if let Some(namespace) = namespace {
            return store.get(kind, namespace, name).filter(|o| filter.matches(o)).cloned().into_iter().collect();
        }
    }
    store.scan(kind, filter.namespace.as_deref()).filter(|object| filter.matches(object)).cloned().collect()
}

fn token(id: u64, from: usize) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(format!("{id}:{from}"))
}

fn parse_token(token: &str) -> Result<(u64, usize), ApiError> {
    use base64::Engine as _;
    let bad = || ApiError::bad_request("continue key is not valid");
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).map_err(|_| bad())?;
    let text = String::from_utf8(bytes).map_err(|_| bad())?;
    let (id, from) = text.split_once(':').ok_or_else(bad)?;
    Ok((id.parse().map_err(|_| bad())?, from.parse().map_err(|_| bad())?))
}
