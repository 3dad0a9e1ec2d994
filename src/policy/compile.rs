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

use super::model::{Direction, Labels, Name, Peer, Pod, Policy, Word};
use super::peers::{Class, GroupId, GroupKey, Peers};
use super::profile::Profile;
use super::tables::{ClassId, Endpoint, Enforced, NOBODY, Open, ProfileId, Write};

struct Known {
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
    /// Of pods of this node, to select policies by.
    local_pods: BTreeMap<Name, Pod>,
    stale: BTreeSet<Endpoint>,

    enforced: BTreeMap<Endpoint, Enforced>,
    profiles: BTreeMap<ProfileId, Used<Profile>>,
    classes: BTreeMap<ClassId, Used<Class>>,
    /// Those that have no rules yet.
    fresh_profiles: BTreeSet<ProfileId>,
    fresh_classes: BTreeSet<ClassId>,
    rules: BTreeMap<(ProfileId, ClassId), Arc<[Open]>>,
    addresses: HashMap<IpAddr, ClassId>,
    nets: BTreeMap<IpNet, ClassId>,
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
            local_pods: BTreeMap::new(),
            stale: BTreeSet::new(),
            enforced: BTreeMap::new(),
            profiles: BTreeMap::new(),
            classes: BTreeMap::from([(NOBODY, nobody)]),
            fresh_profiles: BTreeSet::new(),
            fresh_classes: BTreeSet::new(),
            rules: BTreeMap::new(),
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
        let local: Vec<Endpoint> = local.collect();
        if !local.is_empty() {
            self.stale.extend(local);
            match &pod {
                Some(pod) => drop(self.local_pods.insert(name.clone(), pod.clone())),
                None => drop(self.local_pods.remove(&name)),
            }
        }
        let joined = pod.map(|pod| {
            let key = GroupKey { namespace: name.namespace.clone(), labels: pod.labels, ports: pod.ports };
            (self.peers.join(key), pod.ips)
        });
        if let Some(old) = self.pods.remove(&name) {
            for ip in &old.ips {
                self.unclaim(*ip, &name, old.group);
            }
            self.peers.leave(old.group);
        }
        if let Some((group, ips)) = joined {
            for ip in &ips {
                self.claim(*ip, &name, group);
            }
            self.pods.insert(name, Known { ips, group });
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
    pub fn set_endpoint(&mut self, endpoint: Endpoint, pod: Option<(Name, Pod)>) {
        self.stale.insert(endpoint);
        if let Some(before) = self.local.remove(&endpoint)
            && !self.local.values().any(|name| *name == before)
        {
            self.local_pods.remove(&before);
        }
        if let Some((name, pod)) = pod {
            self.local.insert(endpoint, name.clone());
            self.local_pods.insert(name, pod);
        }
    }

    /// The profiles that the pod has by now.
    fn profiles_of(&self, name: &Name, pod: &Pod) -> [Option<Profile>; 2] {
        let first = Name { namespace: name.namespace.clone(), name: "".into() };
        let here = self.policies.range(first..).take_while(|(n, _)| n.namespace == name.namespace);
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
        let before: BTreeMap<Endpoint, Enforced> = std::mem::take(&mut self.stale)
            .into_iter()
            .map(|endpoint| (endpoint, self.enforced.remove(&endpoint).unwrap_or_default()))
            .collect();
        for endpoint in before.keys() {
            let pod = self.local.get(endpoint).and_then(|name| Some((name, self.local_pods.get(name)?)));
            let Some((name, pod)) = pod else { continue };
            let profiles = self.profiles_of(name, pod);
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
            if self.rules.remove(&(profile, class)).is_some() {
                writes.push(Write::Rule(profile, class, None));
            }
        }
    }
}

/// A peer as the rule of a policy in `namespace` means it.
pub(super) fn resolved(peer: &Peer, namespace: &Word) -> super::peers::PeerKey {
    use super::peers::{PeerKey, Scope};
    match peer {
        Peer::Pods { namespaces: None, pods } => {
            PeerKey::Pods { within: Scope::One(namespace.clone()), pods: pods.clone() }
        }
        Peer::Pods { namespaces: Some(selector), pods } => {
            PeerKey::Pods { within: Scope::Selected(selector.clone()), pods: pods.clone() }
        }
        Peer::Block { net, except } => PeerKey::Block { net: *net, except: except.clone() },
    }
}
