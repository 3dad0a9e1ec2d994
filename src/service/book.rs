//! The books: which Service has which entries, and what a change makes of them.
//!
//! Pure. A round takes the names of Services that changed, compiles those and
//! the ones that an address passes to or from, and answers the writes; the books
//! change when the writes are done ([`Book::commit`]). No round looks at a
//! Service that nothing happened to.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use fairway_ebpf_abi as abi;

use super::adopt::Adopted;
use super::claims::{Claims, Identity};
use super::compile::{Health, Origin, Wanted, compile};
use super::diff::{BACKEND_MARK, SET_MARK, Writes, diff, dismiss};
use super::ids::Ids;
use super::maps::{Counts, Tables};
use super::model::{NodeFacts, Service, ServiceName, Slice, words};
use super::place::{Installed, Numbers, growth, place};
use super::problem::{Problem, Reason};

/// What the cluster says of a Service now.
#[derive(Clone, Debug, Default)]
pub struct Input {
    pub service: Option<Arc<Service>>,
    /// In the order of their names.
    pub slices: Vec<Arc<Slice>>,
}

/// Where the newest is to be had.
pub trait Source {
    fn get(&self, name: &ServiceName) -> Input;
}

#[derive(Default)]
struct Entry {
    identity: Option<Arc<Identity>>,
    uid: Box<str>,
    claimed: Vec<(abi::FrontendKey, Origin)>,
    installed: Installed,
}

pub struct Book {
    node: Arc<NodeFacts>,
    entries: HashMap<ServiceName, Entry>,
    claims: Claims,
    numbers: Numbers,
    adopted: Option<Adopted>,
    capacity: Counts,
    used: Counts,
    health: BTreeMap<ServiceName, Health>,
    problems: BTreeMap<ServiceName, Vec<Problem>>,
    /// Services with entries, and sets.
    sizes: (usize, usize),
    /// Not served as wanted, for want of room or by the kernel's refusal.
    waiting: BTreeSet<ServiceName>,
}

/// What a round would do; undone by being dropped, but for numbers given.
#[derive(Default)]
pub struct Round {
    changes: Vec<Change>,
    /// What an earlier run has left, less what is somebody's by now.
    leftovers: Option<Adopted>,
    /// Services looked at.
    pub compiled: usize,
}

impl Round {
    /// Sets that a frontend names when the round is done.
    fn named(&self) -> HashSet<u32> {
        self.changes.iter().flat_map(|c| c.new.frontends.iter().map(|(_, f)| f.set)).collect()
    }
}

struct Change {
    name: ServiceName,
    old: Installed,
    new: Installed,
    /// What was to be, and the kernel has refused; `new` is what stays.
    refused: Option<Installed>,
}

impl Book {
    /// `limit` bounds the numbers of sets and of backends.
    pub fn new(tables: Tables, mut capacity: Counts, limit: u32) -> Self {
        // The marks take two.
        capacity.slots = capacity.slots.saturating_sub(2);
        let mut numbers = Numbers { sets: Ids::new(limit), backends: Ids::new(limit) };
        let adopted = Adopted::new(tables, &mut numbers);
        Self {
            node: Arc::default(),
            entries: HashMap::new(),
            claims: Claims::default(),
            numbers,
            used: adopted.counts(),
            adopted: Some(adopted),
            capacity,
            health: BTreeMap::new(),
            problems: BTreeMap::new(),
            sizes: (0, 0),
            waiting: BTreeSet::new(),
        }
    }

    /// What everything was compiled for; when it changes, all Services are to be
    /// looked at again.
    pub fn set_node(&mut self, node: Arc<NodeFacts>) -> bool {
        let changed = *self.node != *node;
        self.node = node;
        changed
    }

    pub fn node(&self) -> &NodeFacts {
        &self.node
    }

    /// Nothing has been removed yet that an earlier run has left.
    pub fn adopting(&self) -> bool {
        self.adopted.is_some()
    }

    /// Look at these Services. The first round must be given all there are.
    pub fn round(&mut self, dirty: impl IntoIterator<Item = ServiceName>, source: &dyn Source) -> Round {
        let mut ahead: BTreeSet<ServiceName> = dirty.into_iter().collect();
        let mut wanted: BTreeMap<ServiceName, Wanted> = BTreeMap::new();
        let mut compiled = 0;
        while let Some(name) = ahead.pop_first() {
            compiled += 1;
            let input = source.get(&name);
            let want = match &input.service {
                Some(service) => compile(service, &input.slices, &self.node),
                None => Wanted::default(),
            };
            let mut affected = BTreeSet::new();
            self.claim(&name, input.service.as_deref(), &want, &mut affected);
            wanted.insert(name, want);
            // What is compiled already needs no second look: places are given
            // when all claims are known.
            ahead.extend(affected.into_iter().filter(|n| !wanted.contains_key(n)));
        }
        let mut round = Round { compiled, ..Round::default() };
        let mut adopted = self.adopted.take();
        let mut peak = self.used;
        for (name, wanted) in wanted {
            let change = self.change(name, &wanted, adopted.as_mut(), &mut peak);
            round.changes.extend(change);
        }
        round.leftovers = adopted;
        round
    }

    fn claim(
        &mut self,
        name: &ServiceName,
        service: Option<&Service>,
        wanted: &Wanted,
        affected: &mut BTreeSet<ServiceName>,
    ) {
        let entry = self.entries.entry(name.clone()).or_default();
        let created = service.map(|s| s.created).unwrap_or_default();
        let identity = Arc::new(Identity { created, name: name.clone() });
        let mut before = std::mem::take(&mut entry.claimed);
        let now: Vec<_> = wanted.frontends.iter().map(|f| (f.key, f.origin)).collect();
        if let Some(was) = &entry.identity {
            // One that was made anew is not as old as it was.
            let same = **was == *identity;
            before.retain(|claim| !(same && now.binary_search(claim).is_ok()));
            for (key, origin) in before {
                self.claims.release(&key, origin, was, affected);
            }
        }
        let identity = match &entry.identity {
            Some(was) if **was == *identity => was.clone(),
            _ => identity,
        };
        for (key, origin) in &now {
            self.claims.claim(*key, *origin, &identity, affected);
        }
        entry.identity = Some(identity);
        entry.uid = service.map(|s| s.uid.clone()).unwrap_or_default();
        entry.claimed = now;
        match wanted.health {
            Some(health) => drop(self.health.insert(name.clone(), health)),
            None => drop(self.health.remove(name)),
        }
    }

    /// What becomes of one Service's entries, now that all claims are known.
    fn change(
        &mut self,
        name: ServiceName,
        wanted: &Wanted,
        adopted: Option<&mut Adopted>,
        peak: &mut Counts,
    ) -> Option<Change> {
        let entry = self.entries.get_mut(&name)?;
        let identity = entry.identity.clone()?;
        if let Some(adopted) = adopted {
            entry.installed = adopted.take(wanted, &identity, &self.claims, &mut self.numbers);
        }
        let mut problems = lost(wanted, &identity, &self.claims, &entry.uid);
        let owned = |i: usize| self.claims.owns(&wanted.frontends[i].key, &identity);
        let placed = place(wanted, owned, &entry.installed, &mut self.numbers);
        let fits = placed.map_err(|e| (Reason::IdsExhausted, e.to_string())).and_then(|new| {
            let growth = growth(&entry.installed, &new);
            let mut then = *peak;
            then += growth;
            match then.beyond(&self.capacity).filter(|_| growth != Counts::default()) {
                None => {
                    *peak = then;
                    Ok(new)
                }
                Some(table) => {
                    take_back(&new, &entry.installed, &mut self.numbers);
                    Err((Reason::TableFull, format!("this node's table of {table} has no room for it")))
                }
            }
        });
        self.waiting.remove(&name);
        let change = match fits {
            Ok(new) => new,
            Err((reason, message)) => {
                problems.push(Problem::new(&name, &entry.uid, reason, message));
                self.waiting.insert(name.clone());
                stays(&entry.installed, &identity, &self.claims)
            }
        };
        let old = entry.installed.clone();
        self.set_problems(&name, problems);
        Some(Change { name, old, new: change, refused: None })
    }

    /// The writes of a round.
    pub fn writes(&self, round: &Round) -> Writes {
        let mut out = Writes::default();
        if let Some(mark) = self.numbers.backends.mark_to_write() {
            out.mark(BACKEND_MARK, mark);
        }
        if let Some(mark) = self.numbers.sets.mark_to_write() {
            out.mark(SET_MARK, mark);
        }
        for change in &round.changes {
            // What of a refused change was done, and what was not, is not told
            // apart: writing again what is there already changes nothing.
            diff(change.refused.as_ref().unwrap_or(&change.old), &change.new, &mut out);
        }
        let dropped = round
            .changes
            .iter()
            .flat_map(|c| missing(&c.old, &c.new).chain(c.refused.iter().flat_map(|refused| missing(refused, &c.new))));
        let kept: HashSet<abi::FrontendKey> =
            round.changes.iter().flat_map(|c| c.new.frontends.iter().map(|f| f.0)).collect();
        dismiss(dropped, |key| kept.contains(key), &mut out);
        if let Some(left) = &round.leftovers {
            left.leave(&round.named(), |key| kept.contains(key), &mut out);
        }
        out
    }

    /// The kernel has refused an entry of this Service: what of the round is its
    /// is taken back. The writes are to be made again, all of them.
    pub fn revoke(&mut self, round: &mut Round, of: &ServiceName, cause: &str) {
        for change in round.changes.iter_mut().filter(|c| c.name == *of && c.refused.is_none()) {
            let Some(identity) = self.entries.get(of).and_then(|e| e.identity.clone()) else { continue };
            let stays = stays(&change.old, &identity, &self.claims);
            change.refused = Some(std::mem::replace(&mut change.new, stays));
        }
        self.waiting.insert(of.clone());
        let uid = self.entries.get(of).map(|e| e.uid.clone()).unwrap_or_default();
        let mut problems = self.problems.remove(of).unwrap_or_default();
        problems.push(Problem::new(of, &uid, Reason::Refused, cause.to_owned()));
        self.set_problems(of, problems);
    }

    fn set_problems(&mut self, of: &ServiceName, problems: Vec<Problem>) {
        match problems.is_empty() {
            true => drop(self.problems.remove(of)),
            false => drop(self.problems.insert(of.clone(), problems)),
        }
    }

    /// The writes are done: the books say so from here on.
    pub fn commit(&mut self, round: Round, written: &Writes) {
        for (key, mark) in &written.marks {
            match *key {
                BACKEND_MARK => self.numbers.backends.marked(mark.id),
                _ => self.numbers.sets.marked(mark.id),
            }
        }
        // What was adopted is counted only as what has become of it.
        let first = round.leftovers.is_some();
        let named = if first { round.named() } else { HashSet::new() };
        if let Some(left) = round.leftovers {
            left.take_back(&named, &mut self.numbers);
            self.used = Counts::default();
        }
        for change in round.changes {
            let is = change.new;
            take_back(&change.old, &is, &mut self.numbers);
            if let Some(refused) = &change.refused {
                take_back(refused, &is, &mut self.numbers);
            }
            if !first {
                let Some(entry) = self.entries.get(&change.name) else { continue };
                self.used -= entry.installed.counts();
            }
            self.used += is.counts();
            let Some(entry) = self.entries.get_mut(&change.name) else { continue };
            let was = std::mem::replace(&mut entry.installed, is);
            let is = &entry.installed;
            self.sizes.0 += usize::from(!is.is_empty());
            self.sizes.1 += is.sets.len();
            if !first {
                self.sizes.0 -= usize::from(!was.is_empty());
                self.sizes.1 -= was.sets.len();
            }
            let idle = is.is_empty() && entry.claimed.is_empty() && !self.problems.contains_key(&change.name);
            if idle && !self.waiting.contains(&change.name) {
                self.entries.remove(&change.name);
            }
        }
    }

    /// Whom a set is of, in a round: for the one whose entry was refused.
    pub fn owner_in(&self, round: &Round, is_its: impl Fn(&Installed) -> bool) -> Option<ServiceName> {
        round.changes.iter().find(|c| c.refused.is_none() && is_its(&c.new)).map(|c| c.name.clone())
    }

    /// Services that had to go without, to be looked at again.
    pub fn waiting(&self) -> &BTreeSet<ServiceName> {
        &self.waiting
    }

    pub fn names(&self) -> impl Iterator<Item = &ServiceName> {
        self.entries.keys()
    }

    pub fn installed(&self, name: &ServiceName) -> Option<&Installed> {
        self.entries.get(name).map(|e| &e.installed)
    }

    pub fn claims(&self) -> &Claims {
        &self.claims
    }

    pub fn health(&self) -> &BTreeMap<ServiceName, Health> {
        &self.health
    }

    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    pub fn problems_of(&self, name: &ServiceName) -> &[Problem] {
        self.problems.get(name).map_or(&[], Vec::as_slice)
    }

    pub fn used(&self) -> Counts {
        self.used
    }

    pub fn capacity(&self) -> Counts {
        self.capacity
    }

    /// Services with an entry in the tables, and their sets.
    pub fn sizes(&self) -> (usize, usize) {
        self.sizes
    }
}

/// As it was, but for what has passed to others.
fn stays(old: &Installed, identity: &Identity, claims: &Claims) -> Installed {
    let mut stays = old.clone();
    stays.frontends.retain(|(key, _)| claims.owns(key, identity));
    stays
}

fn missing<'a>(from: &'a Installed, of: &'a Installed) -> impl Iterator<Item = abi::FrontendKey> + use<'a> {
    let has = |key: &abi::FrontendKey| of.frontends.binary_search_by(|f| f.0.cmp(key)).is_ok();
    from.frontends.iter().map(|f| f.0).filter(move |key| !has(key))
}

/// Numbers that one has and the other has not are free.
fn take_back(of: &Installed, but: &Installed, numbers: &mut Numbers) {
    let sets: HashSet<u32> = but.sets.iter().map(|s| s.id).collect();
    let backends: HashSet<u32> = but.sets.iter().flat_map(|s| s.backends()).map(|b| b.id).collect();
    for set in &of.sets {
        if !sets.contains(&set.id) {
            numbers.sets.take_back(set.id);
        }
        for backend in set.backends().filter(|b| !backends.contains(&b.id)) {
            numbers.backends.take_back(backend.id);
        }
    }
}

/// Addresses that an older Service has.
fn lost(wanted: &Wanted, by: &Identity, claims: &Claims, uid: &str) -> Vec<Problem> {
    let mut first = None;
    let mut count = 0;
    for f in &wanted.frontends {
        if let Some(owner) = claims.owner(&f.key).filter(|o| *o != by) {
            count += 1;
            first.get_or_insert((f.key, owner.name.clone()));
        }
    }
    let Some((key, owner)) = first else { return Vec::new() };
    let others = if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
    let message = format!("{} is already that of Service {owner}{others}", words(&key));
    vec![Problem::new(&by.name, uid, Reason::Conflict, message)]
}
