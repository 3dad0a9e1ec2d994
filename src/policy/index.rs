//! What has been seen of policies, pods and namespaces, until the compiler takes
//! it.
//!
//! Filled by ClusterWatch, emptied by PolicyCompiler. Holds the names of what there
//! is, and the newest state of what has changed since the last look: the rest is in
//! the compiler. Memory is bounded by the cluster, not by how fast it changes.
//!
//! Invariants: a list that is begun anew marks what it finds; what it has not found
//! by its end is gone, whether or not a deletion was seen. Until the first list of
//! every kind has ended the index is not complete, and nothing may be concluded
//! from what is missing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::model::{Labels, Name, Pod, Policy, Word};

/// Problems remembered; beyond that they are only counted.
const MAX_PROBLEMS: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Policies,
    Pods,
    Namespaces,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Policies, Kind::Pods, Kind::Namespaces];

    pub fn words(self) -> &'static str {
        match self {
            Kind::Policies => "NetworkPolicies",
            Kind::Pods => "pods",
            Kind::Namespaces => "namespaces",
        }
    }
}

/// An object that cannot be; what was known of it stays in force.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    pub kind: Kind,
    pub uid: String,
    pub why: String,
}

/// What has changed since the last look, newest state.
#[derive(Debug, Default)]
pub struct News {
    pub policies: HashMap<Name, Option<Arc<Policy>>>,
    pub pods: HashMap<Name, Option<Pod>>,
    pub namespaces: HashMap<Word, Option<Arc<Labels>>>,
    /// Lists of all kinds have been seen.
    pub complete: bool,
}

impl News {
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty() && self.pods.is_empty() && self.namespaces.is_empty()
    }
}

/// Of one kind.
struct Seen<K> {
    /// The list that last had it.
    names: HashMap<K, u32>,
    list: u32,
    complete: bool,
}

impl<K> Default for Seen<K> {
    fn default() -> Self {
        Self { names: HashMap::new(), list: 0, complete: false }
    }
}

impl<K: Clone + Eq + std::hash::Hash> Seen<K> {
    fn put<T>(&mut self, name: K, now: Option<T>, news: &mut HashMap<K, Option<T>>) -> bool {
        let known = match &now {
            Some(_) => self.names.insert(name.clone(), self.list).is_some(),
            None => self.names.remove(&name).is_some(),
        };
        let is_news = now.is_some() || known;
        if is_news {
            news.insert(name, now);
        }
        is_news
    }

    /// It is there, whatever it is.
    fn keep(&mut self, name: &K) {
        if let Some(list) = self.names.get_mut(name) {
            *list = self.list;
        }
    }

    /// The list has ended: what it did not have is gone.
    fn end<T>(&mut self, news: &mut HashMap<K, Option<T>>) {
        let list = self.list;
        self.names.retain(|name, seen| {
            let stays = *seen == list;
            if !stays {
                news.insert(name.clone(), None);
            }
            stays
        });
        self.complete = true;
    }
}

#[derive(Default)]
struct Inner {
    policies: Seen<Name>,
    pods: Seen<Name>,
    namespaces: Seen<Word>,
    news: News,
    refusals: BTreeMap<(Kind, Name), (Refusal, u32)>,
}

impl Inner {
    fn complete(&self) -> bool {
        self.policies.complete && self.pods.complete && self.namespaces.complete
    }

    fn list(&mut self, kind: Kind) -> &mut u32 {
        match kind {
            Kind::Policies => &mut self.policies.list,
            Kind::Pods => &mut self.pods.list,
            Kind::Namespaces => &mut self.namespaces.list,
        }
    }
}

/// How much is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Known {
    pub policies: usize,
    pub pods: usize,
    pub namespaces: usize,
    pub complete: bool,
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
        *self.inner.lock().list(kind) += 1;
    }

    pub fn list_ends(&self, kind: Kind) {
        self.edit(|inner| {
            let list = *inner.list(kind);
            inner.refusals.retain(|(of, _), (_, seen)| *of != kind || *seen == list);
            match kind {
                Kind::Policies => inner.policies.end(&mut inner.news.policies),
                Kind::Pods => inner.pods.end(&mut inner.news.pods),
                Kind::Namespaces => inner.namespaces.end(&mut inner.news.namespaces),
            }
            true
        });
    }

    pub fn policy(&self, name: Name, now: Option<Policy>) {
        self.edit(|inner| {
            let solved = inner.refusals.remove(&(Kind::Policies, name.clone())).is_some();
            inner.policies.put(name, now.map(Arc::new), &mut inner.news.policies) || solved
        });
    }

    /// A pod that policies can speak of; none when it is gone, has finished, or has
    /// the node's network.
    pub fn pod(&self, name: Name, now: Option<Pod>) {
        self.edit(|inner| {
            let solved = inner.refusals.remove(&(Kind::Pods, name.clone())).is_some();
            inner.pods.put(name, now, &mut inner.news.pods) || solved
        });
    }

    pub fn namespace(&self, name: Word, labels: Option<Arc<Labels>>) {
        self.edit(|inner| inner.namespaces.put(name, labels, &mut inner.news.namespaces));
    }

    /// An object that cannot be: what was known of it before stands.
    pub fn refused(&self, kind: Kind, name: Name, uid: &str, why: &str) {
        self.edit(|inner| {
            match kind {
                Kind::Policies => inner.policies.keep(&name),
                Kind::Pods => inner.pods.keep(&name),
                Kind::Namespaces => inner.namespaces.keep(&name.name),
            }
            let list = *inner.list(kind);
            let key = (kind, name);
            if inner.refusals.len() >= MAX_PROBLEMS && !inner.refusals.contains_key(&key) {
                return false;
            }
            let refusal = Refusal { kind, uid: uid.to_owned(), why: why.to_owned() };
            let news = inner.refusals.get(&key).is_none_or(|(before, _)| *before != refusal);
            inner.refusals.insert(key, (refusal, list));
            news
        });
    }

    /// What has changed. Nothing before lists of all kinds have been seen: nobody
    /// may act on less.
    pub fn take(&self) -> News {
        let mut inner = self.inner.lock();
        match inner.complete() {
            true => News { complete: true, ..std::mem::take(&mut inner.news) },
            false => News::default(),
        }
    }

    /// Kinds of which no full list has been seen.
    pub fn missing(&self) -> Vec<Kind> {
        let inner = self.inner.lock();
        let complete = |kind: &Kind| match kind {
            Kind::Policies => inner.policies.complete,
            Kind::Pods => inner.pods.complete,
            Kind::Namespaces => inner.namespaces.complete,
        };
        Kind::ALL.into_iter().filter(|kind| !complete(kind)).collect()
    }

    pub fn refusals(&self) -> Vec<(Name, Refusal)> {
        let inner = self.inner.lock();
        inner.refusals.iter().map(|((_, name), (refusal, _))| (name.clone(), refusal.clone())).collect()
    }

    pub fn known(&self) -> Known {
        let inner = self.inner.lock();
        Known {
            policies: inner.policies.names.len(),
            pods: inner.pods.names.len(),
            namespaces: inner.namespaces.names.len(),
            complete: inner.complete(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new("a", text)
    }

    fn complete() -> Index {
        let index = Index::default();
        for kind in Kind::ALL {
            index.list_begins(kind);
            assert!(!index.take().complete, "not before all have ended");
            index.list_ends(kind);
        }
        index
    }

    #[test]
    fn the_newest_state_is_taken_once() {
        let index = complete();
        assert!(index.take().complete);
        index.policy(name("p"), Some(Policy::default()));
        index.policy(name("p"), None);
        index.policy(name("q"), Some(Policy::default()));
        let news = index.take();
        assert_eq!((news.policies[&name("p")].is_some(), news.policies[&name("q")].is_some()), (false, true));
        assert!(index.take().is_empty());
        index.policy(name("never"), None);
        assert!(index.take().is_empty(), "what was never there is no news");
    }

    #[test]
    fn what_a_new_list_does_not_have_is_gone_and_what_cannot_be_stays() {
        let index = complete();
        for n in ["p", "q", "r"] {
            index.policy(name(n), Some(Policy::default()));
        }
        index.take();
        index.list_begins(Kind::Policies);
        index.policy(name("p"), Some(Policy::default()));
        index.refused(Kind::Policies, name("q"), "u", "a port that is none");
        assert_eq!(index.refusals().len(), 1);
        index.list_ends(Kind::Policies);
        let news = index.take();
        assert_eq!(news.policies.get(&name("r")), Some(&None));
        assert!(!news.policies.contains_key(&name("q")), "in force as it was");
        assert_eq!(index.known().policies, 2);
        index.policy(name("q"), Some(Policy::default()));
        assert_eq!(index.refusals(), []);
        // A refused one that the next list does not have is forgotten.
        index.refused(Kind::Policies, name("s"), "u", "no");
        index.list_begins(Kind::Policies);
        index.list_ends(Kind::Policies);
        assert_eq!((index.refusals().len(), index.known().policies), (0, 0));
    }
}
