//! From policies, pods and namespaces to the tables that the kernel judges by.
//!
//! Pure, and incremental: what is told is noted, and [`Compiler::settle`] works on
//! what depends on it. Only policies that isolate a pod of this node have any
//! effect on the tables.
//!
//! How a change becomes writes: first there is more than before (peers of new
//! profiles, their rules), then pods change over, then what nobody uses goes. A
//! pair of profile and class has its rule before either can be found.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::memory::{Guarded, Known as KnownPolicies};
use super::model::{Direction, Labels, Name, Pod, Policy, Word};
use super::peers::{Class, GroupId, GroupKey, Peers};
use super::profile::Profile;
use super::tables::{CLOSED, ClassId, Endpoint, Enforced, NOBODY, Open, ProfileId, Tables, Verdict, Write};
use crate::service::model::Protocol;

struct Known {
    uid: u64,
    ips: Box<[IpAddr]>,
    group: GroupId,
}

/// Somebody has it, counted.
struct Used<T> {
    of: T,
    count: usize,
}

pub struct Compiler {
    policies: BTreeMap<Name, Arc<Policy>>,
    pods: HashMap<Name, Known>,
    /// Whose an address is: the last that was said to have it. Others waited for.
    claims: HashMap<IpAddr, Vec<Name>>,
    peers: Peers,
    local: BTreeMap<Endpoint, Name>,
    stale: BTreeSet<Endpoint>,

    enforced: BTreeMap<Endpoint, Enforced>,
    profiles: BTreeMap<ProfileId, Used<Profile>>,
    classes: BTreeMap<ClassId, Used<Class>>,
    /// Those that have no rules yet.
    fresh_profiles: BTreeSet<ProfileId>,
    fresh_classes: BTreeSet<ClassId>,
    rules: BTreeMap<(ProfileId, ClassId), Arc<[Open]>>,
    dropped: BTreeMap<(ProfileId, ClassId), Arc<[Open]>>,
    addresses: HashMap<IpAddr, ClassId>,
    nets: BTreeMap<IpNet, ClassId>,
}

/// How much there is of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    pub policies: usize,
    pub rules: usize,
    pub addresses: usize,
    pub ranges: usize,
    pub profiles: usize,
    pub isolated: usize,
    pub closed: usize,
}

impl Default for Compiler {
    fn default() -> Self {
        // Everybody who is nobody: always there.
        let nobody = Used { of: Class::default(), count: 1 };
        Self {
            policies: BTreeMap::new(),
            pods: HashMap::new(),
            claims: HashMap::new(),
            peers: Peers::default(),
            local: BTreeMap::new(),
            stale: BTreeSet::new(),
            enforced: BTreeMap::new(),
            profiles: BTreeMap::new(),
            classes: BTreeMap::from([(NOBODY, nobody)]),
            fresh_profiles: BTreeSet::new(),
            fresh_classes: BTreeSet::new(),
            rules: BTreeMap::new(),
            dropped: BTreeMap::new(),
            addresses: HashMap::new(),
            nets: BTreeMap::new(),
        }
    }
}

impl Compiler {
    pub fn set_policy(&mut self, name: Name, policy: Option<Arc<Policy>>) {
        let here = self.local.iter().filter(|(_, pod)| pod.namespace == name.namespace);
        self.stale.extend(here.map(|(endpoint, _)| *endpoint));
        match policy {
            Some(policy) => self.policies.insert(name, policy),
            None => self.policies.remove(&name),
        };
    }

    pub fn set_namespace(&mut self, name: &Word, labels: Option<Arc<Labels>>) {
        self.peers.set_namespace(name, labels);
    }

    /// A pod anywhere in the cluster, as it is now.
    pub fn set_pod(&mut self, name: Name, pod: Option<Pod>) {
        let local = self.local.iter().filter(|(_, n)| **n == name).map(|(endpoint, _)| *endpoint);
        self.stale.extend(local);
        let joined = pod.map(|pod| {
            let key = GroupKey { namespace: name.namespace.clone(), labels: pod.labels, ports: pod.ports };
            (self.peers.join(key), pod.ips, pod.uid)
        });
        if let Some(old) = self.pods.remove(&name) {
            for ip in &old.ips {
                self.unclaim(*ip, &name, old.group);
            }
            self.peers.leave(old.group);
        }
        if let Some((group, ips, uid)) = joined {
            for ip in &ips {
                self.claim(*ip, &name, group);
            }
            self.pods.insert(name, Known { uid, ips, group });
        }
    }

    fn claim(&mut self, ip: IpAddr, name: &Name, group: GroupId) {
        let claims = self.claims.entry(ip).or_default();
        if let Some(before) = claims.last().and_then(|last| self.pods.get(last)) {
            self.peers.address(before.group, ip, false);
        }
        claims.push(name.clone());
        self.peers.address(group, ip, true);
    }

    fn unclaim(&mut self, ip: IpAddr, name: &Name, group: GroupId) {
        let Some(claims) = self.claims.get_mut(&ip) else { return };
        claims.retain(|n| n != name);
        self.peers.address(group, ip, false);
        match claims.last().and_then(|last| self.pods.get(last)) {
            Some(next) => self.peers.address(next.group, ip, true),
            None => drop(self.claims.remove(&ip)),
        }
    }

    /// A pod of this node has this device, or none has.
    pub fn set_endpoint(&mut self, endpoint: Endpoint, pod: Option<Name>) {
        self.stale.insert(endpoint);
        match pod {
            Some(name) => drop(self.local.insert(endpoint, name)),
            None => drop(self.local.remove(&endpoint)),
        }
    }

    /// The uid of a pod that is known.
    pub fn uid(&self, pod: &Name) -> Option<u64> {
        self.pods.get(pod).map(|known| known.uid)
    }

    fn policies_in(&self, namespace: &Word) -> impl Iterator<Item = (&Name, &Arc<Policy>)> {
        let first = Name { namespace: namespace.clone(), name: "".into() };
        self.policies.range(first..).take_while(move |(name, _)| name.namespace == *namespace)
    }

    /// A pod that is not known yet is closed where any policy of its namespace may
    /// isolate it.
    pub fn guarded(&self, namespace: &Word) -> Enforced {
        let mut guarded = Guarded::default();
        self.policies_in(namespace).for_each(|(_, policy)| guarded.add(policy));
        guarded.closed()
    }

    /// The same of every namespace.
    pub fn guarded_namespaces(&self) -> KnownPolicies {
        let mut namespaces: BTreeMap<String, Guarded> = BTreeMap::new();
        for (name, policy) in &self.policies {
            namespaces.entry(name.namespace.to_string()).or_default().add(policy);
        }
        KnownPolicies { namespaces }
    }

    /// The profiles that the pod has by now.
    fn profiles_of(&self, pod: &GroupKey) -> [Option<Profile>; 2] {
        let here = self.policies_in(&pod.namespace);
        let selecting: Vec<_> = here.filter(|(_, policy)| policy.selects.matches(&pod.labels)).collect();
        Direction::BOTH.map(|direction| {
            let rules =
                |(name, policy): &(&Name, &Arc<Policy>)| Some(((*name).clone(), policy.rules(direction)?.to_vec()));
            let isolating: Vec<_> = selecting.iter().filter_map(rules).collect();
            (!isolating.is_empty()).then(|| Profile::new(direction, &isolating, &pod.ports))
        })
    }

    /// Everything that was told takes effect: the writes, in order.
    pub fn settle(&mut self) -> Vec<Write> {
        let mut writes = Vec::new();
        let mut gone = BTreeSet::new();
        self.dropped.clear();
        let before: BTreeMap<Endpoint, Enforced> = std::mem::take(&mut self.stale)
            .into_iter()
            .map(|endpoint| (endpoint, self.enforced.remove(&endpoint).unwrap_or_default()))
            .collect();
        for endpoint in before.keys() {
            let Some(name) = self.local.get(endpoint) else { continue };
            let known = self.pods.get(name).and_then(|known| self.peers.group(known.group));
            let Some(pod) = known else {
                self.enforced.insert(*endpoint, self.guarded(&name.namespace));
                continue;
            };
            let profiles = self.profiles_of(pod);
            let [ingress, egress] = profiles.map(|profile| profile.map(|profile| self.use_profile(profile)));
            self.enforced.insert(*endpoint, Enforced { ingress, egress });
        }
        self.reclass(&mut writes, &mut gone);
        for (endpoint, old) in &before {
            let now = self.enforced.get(endpoint).copied().unwrap_or_default();
            if now != *old {
                writes.push(Write::Endpoint(*endpoint, Some(now).filter(|now| *now != Enforced::default())));
            }
        }
        for profile in before.values().flat_map(|old| [old.ingress, old.egress]).flatten() {
            self.leave_profile(profile);
        }
        self.reclass(&mut writes, &mut gone);
        self.sweep(&mut writes, &gone);
        writes
    }

    /// What the last [`Compiler::settle`] dropped of a pair.
    pub fn dropped(&self, profile: ProfileId, class: ClassId) -> Option<Arc<[Open]>> {
        self.dropped.get(&(profile, class)).cloned()
    }

    /// How a pod of this node is isolated, since the last [`Compiler::settle`].
    pub fn enforced(&self, endpoint: Endpoint) -> Enforced {
        self.enforced.get(&endpoint).copied().unwrap_or_default()
    }

    pub fn knows(&self, pod: &Name) -> bool {
        self.pods.contains_key(pod)
    }

    pub fn ips(&self, pod: &Name) -> &[IpAddr] {
        self.pods.get(pod).map_or(&[], |known| &known.ips)
    }

    /// Whose an address is.
    pub fn owner(&self, ip: IpAddr) -> Option<&Name> {
        self.claims.get(&ip)?.last()
    }

    pub fn endpoint_of(&self, pod: &Name) -> Option<Endpoint> {
        self.local.iter().find(|(_, name)| *name == pod).map(|(endpoint, _)| *endpoint)
    }

    /// The policies that isolate a pod in this direction.
    pub fn isolating(&self, pod: &Name, direction: Direction) -> Vec<&Name> {
        let group = self.pods.get(pod).and_then(|known| self.peers.group(known.group));
        let isolates = |policy: &Policy| {
            policy.rules(direction).is_some() && group.is_none_or(|pod| policy.selects.matches(&pod.labels))
        };
        self.policies_in(&pod.namespace).filter(|(_, policy)| isolates(policy)).map(|(name, _)| name).collect()
    }

    /// As programs judge by what is in force.
    pub fn judge(
        &self,
        endpoint: Endpoint,
        direction: Direction,
        peer: IpAddr,
        protocol: Protocol,
        port: u16,
    ) -> Verdict {
        let Some(profile) = self.enforced(endpoint).profile(direction) else { return Verdict::Open };
        let longest = || {
            let around = self.nets.iter().filter(|(net, _)| net.contains(&peer));
            around.max_by_key(|(net, _)| net.prefix_len()).map(|(_, class)| *class)
        };
        let class = self.addresses.get(&peer).copied().or_else(longest).unwrap_or(NOBODY);
        let open = self.rules.get(&(profile, class)).or_else(|| self.rules.get(&(profile, NOBODY)));
        match open.and_then(|open| open.iter().find(|o| o.covers(protocol, port))) {
            Some(open) => Verdict::Allowed(open.by.clone()),
            None => Verdict::Denied,
        }
    }

    pub fn sizes(&self) -> Sizes {
        let isolated = self.enforced.values().filter(|how| **how != Enforced::default());
        let closed = |how: &&Enforced| [how.ingress, how.egress].contains(&Some(CLOSED));
        Sizes {
            policies: self.policies.len(),
            rules: self.rules.len(),
            addresses: self.addresses.len(),
            ranges: self.nets.len(),
            profiles: self.profiles.len(),
            isolated: isolated.clone().count(),
            closed: isolated.filter(closed).count(),
        }
    }

    /// All that is in force once every write has been made.
    pub fn tables(&self) -> Tables {
        let isolated = self.enforced.iter().filter(|(_, how)| **how != Enforced::default());
        Tables {
            rules: self.rules.clone(),
            addresses: self.addresses.iter().map(|(ip, class)| (*ip, *class)).collect(),
            nets: self.nets.clone(),
            endpoints: isolated.map(|(endpoint, how)| (*endpoint, *how)).collect(),
        }
    }

    fn use_profile(&mut self, profile: Profile) -> ProfileId {
        let id = profile.id();
        if !self.profiles.contains_key(&id) {
            profile.peers().for_each(|peer| self.peers.count(peer));
            profile.names().for_each(|name| self.peers.count_name(name));
            self.fresh_profiles.insert(id);
        }
        self.profiles.entry(id).or_insert(Used { of: profile, count: 0 }).count += 1;
        id
    }

    fn leave_profile(&mut self, id: ProfileId) {
        let Some(used) = self.profiles.get_mut(&id) else { return };
        used.count -= 1;
        if used.count == 0 {
            used.of.peers().for_each(|peer| self.peers.discount(peer));
            used.of.names().for_each(|name| self.peers.discount_name(name));
        }
    }

    /// Addresses and nets get the classes they are of by now. Classes that are left
    /// are noted in `gone`: somebody may come back to them.
    fn reclass(&mut self, writes: &mut Vec<Write>, gone: &mut BTreeSet<ClassId>) {
        let touched = self.peers.take_touched();
        let mut moves = Vec::new();
        for ip in touched.addresses {
            let owner = self.claims.get(&ip).and_then(|claims| self.pods.get(claims.last()?));
            let class = owner.and_then(|pod| self.peers.class(ip, pod.group)).map(|class| self.use_class(class));
            let before = match class {
                Some(class) => self.addresses.insert(ip, class),
                None => self.addresses.remove(&ip),
            };
            gone.extend(before.filter(|id| self.leave_class(*id)));
            if class != before {
                moves.push(Write::Address(ip, class));
            }
        }
        if touched.nets {
            let nets = self.peers.nets();
            let mut now = BTreeMap::new();
            for (net, class) in nets {
                let class = self.use_class(class);
                if self.nets.get(&net) != Some(&class) {
                    moves.push(Write::Net(net, Some(class)));
                }
                now.insert(net, class);
            }
            let before = std::mem::replace(&mut self.nets, now);
            let left = before.keys().filter(|net| !self.nets.contains_key(net));
            moves.extend(left.map(|net| Write::Net(*net, None)));
            for class in before.into_values() {
                if self.leave_class(class) {
                    gone.insert(class);
                }
            }
        }
        self.write_rules(writes);
        writes.extend(moves);
    }

    fn use_class(&mut self, class: Class) -> ClassId {
        let id = class.id();
        let fresh = &mut self.fresh_classes;
        let used = self.classes.entry(id).or_insert_with(|| {
            fresh.insert(id);
            Used { of: class, count: 0 }
        });
        used.count += 1;
        id
    }

    /// Whether it was the last.
    fn leave_class(&mut self, id: ClassId) -> bool {
        let Some(used) = self.classes.get_mut(&id) else { return false };
        used.count -= 1;
        used.count == 0
    }

    /// Every profile has a rule for every class, where it says more than nobody's.
    fn write_rules(&mut self, writes: &mut Vec<Write>) {
        let fresh_profiles = std::mem::take(&mut self.fresh_profiles);
        let fresh_classes = std::mem::take(&mut self.fresh_classes);
        for (profile_id, profile) in &self.profiles {
            let classes: Box<dyn Iterator<Item = &ClassId>> = match fresh_profiles.contains(profile_id) {
                // In order: nobody's is the first.
                true => Box::new(self.classes.keys()),
                false => Box::new(fresh_classes.iter()),
            };
            for class_id in classes {
                let Some(class) = self.classes.get(class_id) else { continue };
                let open = profile.of.open_to(&class.of);
                let nobodys = self.rules.get(&(*profile_id, NOBODY)).filter(|_| *class_id != NOBODY);
                if nobodys.is_none_or(|nobodys| **nobodys != *open) {
                    let open: Arc<[Open]> = open.into();
                    self.rules.insert((*profile_id, *class_id), open.clone());
                    writes.push(Write::Rule(*profile_id, *class_id, Some(open)));
                }
            }
        }
    }

    /// What nobody has any more goes.
    fn sweep(&mut self, writes: &mut Vec<Write>, left: &BTreeSet<ClassId>) {
        let dead = |(id, used): (&ProfileId, &Used<Profile>)| (used.count == 0).then_some(*id);
        let profiles: Vec<ProfileId> = self.profiles.iter().filter_map(dead).collect();
        let mut rules: Vec<(ProfileId, ClassId)> = Vec::new();
        for profile in profiles {
            self.profiles.remove(&profile);
            rules.extend(self.rules.range((profile, 0)..=(profile, ClassId::MAX)).map(|(pair, _)| *pair));
        }
        for class in left {
            if self.classes.get(class).is_none_or(|used| used.count > 0) {
                continue;
            }
            self.classes.remove(class);
            rules.extend(self.profiles.keys().map(|profile| (*profile, *class)));
        }
        for (profile, class) in rules {
            if let Some(open) = self.rules.remove(&(profile, class)) {
                self.dropped.insert((profile, class), open);
                writes.push(Write::Rule(profile, class, None));
            }
        }
    }
}
