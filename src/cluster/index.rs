//! Objects of one kind, kept true through lists, changes and cuts.
//!
//! Pure. A list replaces all that is known, at its end and in one step: what
//! is not in it is gone, whether or not a deletion was seen. Until the first
//! list has ended nothing is known.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What a watch says.
#[derive(Clone, Debug)]
pub enum Change<K, V> {
    ListBegins,
    Listed(K, V),
    ListEnds,
    Applied(K, V),
    /// With the UID of the object that was deleted.
    Deleted(K, String),
}

/// Objects by key. `uid` tells incarnations of the same key apart.
pub struct Index<K, V> {
    known: Option<Arc<BTreeMap<K, Arc<V>>>>,
    listing: BTreeMap<K, Arc<V>>,
    uid: fn(&V) -> &str,
}

impl<K: Ord + Clone, V: PartialEq> Index<K, V> {
    pub fn new(uid: fn(&V) -> &str) -> Self {
        Self { known: None, listing: BTreeMap::new(), uid }
    }

    /// Take a change up; what is known now, if that is different from before.
    pub fn take(&mut self, change: Change<K, V>) -> Option<Arc<BTreeMap<K, Arc<V>>>> {
        match change {
            Change::ListBegins => {
                self.listing.clear();
                None
            }
            Change::Listed(key, value) => {
                self.listing.insert(key, Arc::new(value));
                None
            }
            Change::ListEnds => {
                let listed = std::mem::take(&mut self.listing);
                if self.known.as_deref() == Some(&listed) {
                    return None;
                }
                self.known = Some(Arc::new(listed));
                self.known.clone()
            }
            Change::Applied(key, value) => self.change(|map| {
                if map.get(&key).is_some_and(|old| **old == value) {
                    return false;
                }
                map.insert(key, Arc::new(value));
                true
            }),
            Change::Deleted(key, uid) => {
                let uid_of = self.uid;
                // A successor of the same name may have been seen already.
                self.change(|map| {
                    let same = map.get(&key).is_some_and(|old| uid.is_empty() || uid_of(old) == uid);
                    same && map.remove(&key).is_some()
                })
            }
        }
    }

    fn change(&mut self, edit: impl FnOnce(&mut BTreeMap<K, Arc<V>>) -> bool) -> Option<Arc<BTreeMap<K, Arc<V>>>> {
        let known = self.known.as_mut()?;
        let changed = edit(Arc::make_mut(known));
        changed.then(|| known.clone())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Pods = Index<u8, (String, u8)>;

    fn index() -> Pods {
        Index::new(|v| &v.0)
    }
    fn value(uid: u8, n: u8) -> (String, u8) {
        (uid.to_string(), n)
    }

    #[test]
    fn nothing_is_known_before_the_first_list_has_ended() {
        let mut index = index();
        for change in [Change::Applied(1, value(1, 0)), Change::ListBegins, Change::Listed(1, value(1, 0))] {
            assert!(index.take(change).is_none());
        }
        assert_eq!(index.take(Change::ListEnds).unwrap().len(), 1);
    }

    #[test]
    fn a_deletion_missed_during_a_cut_is_made_up_for_by_the_next_list() {
        let mut index = index();
        index.take(Change::ListBegins);
        index.take(Change::Listed(1, value(1, 0)));
        index.take(Change::Listed(2, value(2, 0)));
        index.take(Change::ListEnds);
        index.take(Change::ListBegins);
        assert!(index.take(Change::Listed(2, value(2, 0))).is_none(), "the old list holds until the new one ends");
        let known = index.take(Change::ListEnds).unwrap();
        assert_eq!(known.keys().copied().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn the_late_deletion_of_a_predecessor_does_not_remove_its_successor() {
        let mut index = index();
        index.take(Change::ListBegins);
        index.take(Change::Listed(1, value(1, 0)));
        index.take(Change::ListEnds);
        index.take(Change::Applied(1, value(2, 0)));
        assert!(index.take(Change::Deleted(1, "1".into())).is_none());
        assert!(index.take(Change::Deleted(1, "2".into())).unwrap().is_empty());
    }

    fn changes() -> impl Strategy<Value = Change<u8, (String, u8)>> {
        (0u8..5, 0u8..4, 0u8..3, 0u8..2).prop_map(|(what, key, uid, n)| match what {
            0 => Change::ListBegins,
            1 => Change::Listed(key, value(uid, n)),
            2 => Change::ListEnds,
            3 => Change::Applied(key, value(uid, n)),
            _ => Change::Deleted(key, uid.to_string()),
        })
    }

    proptest! {
        #[test]
        fn what_is_known_is_the_last_list_with_its_changes(all in proptest::collection::vec(changes(), 0..40)) {
            let mut index = index();
            let mut seen = None;
            let mut known: Option<BTreeMap<u8, (String, u8)>> = None;
            let mut listing = BTreeMap::new();
            for change in all {
                match change.clone() {
                    Change::ListBegins => listing.clear(),
                    Change::Listed(k, v) => { listing.insert(k, v); }
                    Change::ListEnds => known = Some(std::mem::take(&mut listing)),
                    Change::Applied(k, v) => if let Some(m) = &mut known { m.insert(k, v); },
                    Change::Deleted(k, uid) => if let Some(m) = &mut known && m.get(&k).is_some_and(|v| v.0 == uid) { m.remove(&k); },
                }
                let before = known.clone();
                if let Some(now) = index.take(change) {
                    seen = Some(now);
                }
                let flat = seen.as_ref().map(|m| m.iter().map(|(k, v)| (*k, (**v).clone())).collect::<BTreeMap<_, _>>());
                prop_assert_eq!(flat, before);
            }
        }
    }
}
