//! Services and EndpointSlices as last seen, and which Services have changed.
//!
//! Filled by ClusterWatch, emptied by ServiceMap. Memory is bounded by the
//! cluster, not by how fast it changes: a change replaces what was known and
//! puts the Service's name on a list that has each name once.
//!
//! Invariants: a list that is begun anew marks what it finds; what it has not
//! found by its end is gone, whether or not a deletion was seen. Until the first
//! list of both kinds has ended the index is not complete, and nothing may be
//! concluded from what is missing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::book::{Input, Source};
use super::model::{Service, ServiceName, Slice};
use super::problem::{Problem, Reason};

/// Problems remembered; beyond that they are only counted.
const MAX_PROBLEMS: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Services,
    Slices,
}

#[derive(Default)]
struct Seen<T> {
    value: T,
    /// Of the list that last had it.
    list: u32,
}

#[derive(Default)]
struct Inner {
    services: HashMap<ServiceName, Seen<Arc<Service>>>,
    /// By Service, then by the slice's own name.
    slices: HashMap<ServiceName, BTreeMap<Arc<str>, Seen<Arc<Slice>>>>,
    /// The Service that a slice was of when last seen.
    slice_of: HashMap<ServiceName, ServiceName>,
    dirty: HashSet<ServiceName>,
    problems: BTreeMap<(Reason, ServiceName), Problem>,
    problem_lists: HashMap<(Reason, ServiceName), u32>,
    lists: [u32; 2],
    complete: [bool; 2],
}

/// What has changed since the last look.
#[derive(Debug, Default)]
pub struct Dirty {
    pub names: HashSet<ServiceName>,
    /// Lists of both kinds have been seen.
    pub complete: bool,
}

/// How much is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Known {
    pub services: usize,
    pub slices: usize,
    pub endpoints: usize,
    pub services_complete: bool,
    pub slices_complete: bool,
}

#[derive(Clone)]
pub struct Index {
    inner: Arc<Mutex<Inner>>,
    changed: watch::Sender<u64>,
}

impl Default for Index {
    fn default() -> Self {
        Self { inner: Arc::default(), changed: watch::channel(0).0 }
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("known", &self.known()).finish()
    }
}

impl Index {
    /// Rises with every change.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn edit(&self, edit: impl FnOnce(&mut Inner) -> bool) {
        if edit(&mut self.inner.lock()) {
            self.changed.send_modify(|n| *n += 1);
        }
    }

    pub fn list_begins(&self, kind: Kind) {
        self.inner.lock().lists[kind as usize] += 1;
    }

    pub fn list_ends(&self, kind: Kind) {
        self.edit(|inner| {
            inner.sweep(kind);
            let news = !inner.complete[kind as usize] || !inner.dirty.is_empty();
            inner.complete[kind as usize] = true;
            news
        });
    }

    /// A Service as it is now, `None` for one that is not ours to carry.
    pub fn service(&self, name: ServiceName, service: Option<Service>) {
        self.edit(|inner| {
            let list = inner.lists[Kind::Services as usize];
            let solved = inner.solved(Reason::InvalidService, &name);
            let changed = match service {
                None => inner.services.remove(&name).is_some(),
                Some(service) => inner.put_service(name.clone(), service, list),
            };
            if changed {
                inner.dirty.insert(name);
            }
            changed || solved
        });
    }

    /// A slice as it is now and the Service it is of; `None` when it is deleted,
    /// or nobody's, or holds no addresses.
    pub fn slice(&self, slice: ServiceName, now: Option<(ServiceName, Slice)>) {
        self.edit(|inner| {
            let solved = inner.solved(Reason::InvalidEndpoints, &slice);
            let was = inner.slice_of.get(&slice).cloned();
            let mut changed = false;
            if let Some(was) = was.filter(|was| now.as_ref().is_none_or(|(of, _)| of != was)) {
                inner.remove_slice(&slice, &was);
                changed = true;
            }
            if let Some((of, now)) = now {
                changed |= inner.put_slice(slice, of, now);
            }
            changed || solved
        });
    }

    /// An object that cannot be: what was known of it before stands.
    pub fn refused(&self, reason: Reason, name: ServiceName, uid: &str, why: &str) {
        self.edit(|inner| {
            let kind = if reason == Reason::InvalidService { Kind::Services } else { Kind::Slices };
            let list = inner.lists[kind as usize];
            // Still there, if not as it should be.
            match kind {
                Kind::Services => inner.services.get_mut(&name).into_iter().for_each(|s| s.list = list),
                Kind::Slices => {
                    let of = inner.slice_of.get(&name).and_then(|of| inner.slices.get_mut(of));
                    of.and_then(|s| s.get_mut(&name.name)).into_iter().for_each(|s| s.list = list);
                }
            }
            let key = (reason, name);
            if inner.problems.len() >= MAX_PROBLEMS && !inner.problems.contains_key(&key) {
                return false;
            }
            let problem = Problem::new(&key.1, uid, reason, why);
            inner.problem_lists.insert(key.clone(), list);
            let news = inner.problems.get(&key) != Some(&problem);
            inner.problems.insert(key, problem);
            news
        });
    }

    /// The Services that have changed, each once. What they have changed to is
    /// asked for by name, and is the newest then.
    pub fn take_dirty(&self) -> Dirty {
        let mut inner = self.inner.lock();
        let complete = inner.complete == [true, true];
        // Until then nobody may act on it.
        let names = if complete { std::mem::take(&mut inner.dirty) } else { HashSet::new() };
        Dirty { names, complete }
    }

    /// For whoever could not use what was taken.
    pub fn mark_dirty(&self, names: impl IntoIterator<Item = ServiceName>) {
        self.edit(|inner| {
            inner.dirty.extend(names);
            true
        });
    }

    /// Full lists of both kinds have been seen.
    pub fn complete(&self) -> bool {
        self.inner.lock().complete == [true, true]
    }

    pub fn names(&self) -> Vec<ServiceName> {
        self.inner.lock().services.keys().cloned().collect()
    }

    pub fn problems(&self) -> Vec<Problem> {
        self.inner.lock().problems.values().cloned().collect()
    }

    pub fn known(&self) -> Known {
        let inner = self.inner.lock();
        let slices = inner.slices.values().flat_map(BTreeMap::values);
        Known {
            services: inner.services.len(),
            slices: inner.slice_of.len(),
            endpoints: slices.map(|s| s.value.endpoints.len()).sum(),
            services_complete: inner.complete[0],
            slices_complete: inner.complete[1],
        }
    }
}

impl Source for Index {
    fn get(&self, name: &ServiceName) -> Input {
        let inner = self.inner.lock();
        let slices = inner.slices.get(name).into_iter().flat_map(BTreeMap::values);
        Input {
            service: inner.services.get(name).map(|s| s.value.clone()),
            slices: slices.map(|s| s.value.clone()).collect(),
        }
    }
}

impl Inner {
    fn put_service(&mut self, name: ServiceName, service: Service, list: u32) -> bool {
        match self.services.get_mut(&name) {
            Some(known) => {
                known.list = list;
                let changed = *known.value != service;
                if changed {
                    known.value = Arc::new(service);
                }
                changed
            }
            None => {
                self.services.insert(name, Seen { value: Arc::new(service), list });
                true
            }
        }
    }

    fn put_slice(&mut self, slice: ServiceName, of: ServiceName, now: Slice) -> bool {
        let list = self.lists[Kind::Slices as usize];
        let slices = self.slices.entry(of.clone()).or_default();
        if let Some(known) = slices.get_mut(&slice.name) {
            known.list = list;
            if *known.value == now {
                return false;
            }
            known.value = Arc::new(now);
        } else {
            slices.insert(slice.name.clone(), Seen { value: Arc::new(now), list });
            self.slice_of.insert(slice, of.clone());
        }
        self.dirty.insert(of);
        true
    }

    fn remove_slice(&mut self, slice: &ServiceName, of: &ServiceName) {
        self.slice_of.remove(slice);
        if let Some(slices) = self.slices.get_mut(of) {
            slices.remove(&slice.name);
            if slices.is_empty() {
                self.slices.remove(of);
            }
        }
        self.dirty.insert(of.clone());
    }

    /// What the list that has ended did not have.
    fn sweep(&mut self, kind: Kind) {
        let list = self.lists[kind as usize];
        let reason = match kind {
            Kind::Services => Reason::InvalidService,
            Kind::Slices => Reason::InvalidEndpoints,
        };
        let (lists, problems) = (&mut self.problem_lists, &mut self.problems);
        problems.retain(|key, _| key.0 != reason || lists.get(key) == Some(&list));
        lists.retain(|key, _| problems.contains_key(key));
        match kind {
            Kind::Services => {
                let dirty = &mut self.dirty;
                self.services.retain(|name, seen| {
                    let stays = seen.list == list;
                    if !stays {
                        dirty.insert(name.clone());
                    }
                    stays
                });
            }
            Kind::Slices => {
                let known = self.slices.iter().flat_map(|(of, slices)| slices.iter().map(move |s| (of, s)));
                let gone: Vec<_> = known
                    .filter(|(_, (_, seen))| seen.list != list)
                    .map(|(of, (name, _))| (ServiceName::new(of.namespace.clone(), name.clone()), of.clone()))
                    .collect();
                gone.iter().for_each(|(slice, of)| self.remove_slice(slice, of));
            }
        }
    }

    fn solved(&mut self, reason: Reason, name: &ServiceName) -> bool {
        if self.problems.is_empty() {
            return false;
        }
        let key = (reason, name.clone());
        self.problem_lists.remove(&key);
        self.problems.remove(&key).is_some()
    }
}
