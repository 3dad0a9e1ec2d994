//! Which Service has an address and port that several want.
//!
//! Pure. A cluster address goes before every other, then the older Service,
//! then the one whose name comes first: the outcome does not depend on the order
//! in which they were seen.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use fairway_ebpf_abi::FrontendKey;

use super::compile::Origin;
use super::model::ServiceName;

/// A Service's age and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    pub created: i64,
    pub name: ServiceName,
}

/// Smaller goes first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    contender: bool,
    by: Arc<Identity>,
}

impl Claim {
    fn new(origin: Origin, by: &Arc<Identity>) -> Self {
        Self { contender: origin != Origin::ClusterIp, by: by.clone() }
    }
}

#[derive(Default)]
pub struct Claims {
    owners: HashMap<FrontendKey, Claim>,
    /// All who want it, where more than one does.
    contested: BTreeMap<FrontendKey, BTreeSet<Claim>>,
}

impl Claims {
    pub fn owner(&self, key: &FrontendKey) -> Option<&Identity> {
        self.owners.get(key).map(|c| &*c.by)
    }

    pub fn owns(&self, key: &FrontendKey, by: &Identity) -> bool {
        self.owners.get(key).is_some_and(|c| *c.by == *by)
    }

    pub fn len(&self) -> usize {
        self.owners.len()
    }

    pub fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    /// All keys with their owners.
    pub fn iter(&self) -> impl Iterator<Item = (&FrontendKey, &Identity)> {
        self.owners.iter().map(|(k, c)| (k, &*c.by))
    }

    /// Want an address; `changed` hears who else is affected.
    pub fn claim(&mut self, key: FrontendKey, origin: Origin, by: &Arc<Identity>, changed: &mut BTreeSet<ServiceName>) {
        let claim = Claim::new(origin, by);
        let Some(owner) = self.owners.get_mut(&key) else {
            self.owners.insert(key, claim);
            return;
        };
        if *owner == claim {
            return;
        }
        let all = self.contested.entry(key).or_insert_with(|| BTreeSet::from([owner.clone()]));
        all.insert(claim);
        if let Some(first) = all.first()
            && *first != *owner
        {
            *owner = first.clone();
            // Those who still do not have it are told of another.
            changed.extend(all.iter().filter(|c| c.by != *by).map(|c| c.by.name.clone()));
        }
    }

    /// Want it no more.
    pub fn release(
        &mut self,
        key: &FrontendKey,
        origin: Origin,
        by: &Arc<Identity>,
        changed: &mut BTreeSet<ServiceName>,
    ) {
        let claim = Claim::new(origin, by);
        let Some(all) = self.contested.get_mut(key) else {
            if self.owners.get(key) == Some(&claim) {
                self.owners.remove(key);
            }
            return;
        };
        all.remove(&claim);
        let Some(first) = all.first().cloned() else { return };
        if let Some(owner) = self.owners.get_mut(key)
            && *owner != first
        {
            *owner = first;
            changed.extend(all.iter().map(|c| c.by.name.clone()));
        }
        if all.len() == 1 {
            self.contested.remove(key);
        }
    }
}
