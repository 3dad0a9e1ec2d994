//! Who rules speak of: peers, and which pods and addresses each of them is.
//!
//! Pure. A peer counts while a profile names it. Pods that have namespace, labels
//! and named ports in common are one *group*, matched once.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::model::{Labels, NamedPort, Peer, Selector, Test, Word};
use super::tables::Namer;
use crate::service::model::Protocol;

pub type PeerId = u64;

/// A peer as rules write it, with its policy's namespace resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerKey {
    Pods { within: Scope, pods: Selector },
    Block { net: IpNet, except: Box<[IpNet]> },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    One(Word),
    Selected(Selector),
}

fn name_selector(namer: &mut Namer, selector: &Selector) {
    namer.number(selector.0.len() as u64);
    for requirement in &selector.0 {
        namer.text(&requirement.key);
        let (kind, values) = match &requirement.test {
            Test::In(values) => (0, Some(values)),
            Test::NotIn(values) => (1, Some(values)),
            Test::Exists => (2, None),
            Test::DoesNotExist => (3, None),
        };
        namer.number(kind);
        namer.number(values.map_or(0, |v| v.len() as u64));
        values.into_iter().flatten().for_each(|value| namer.text(value));
    }
}

impl PeerKey {
    /// A peer as the rule of a policy in `namespace` means it.
    pub fn of(peer: &Peer, namespace: &Word) -> Self {
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

    pub fn id(&self) -> PeerId {
        let mut namer = Namer::new("peer");
        match self {
            PeerKey::Pods { within, pods } => {
                match within {
                    Scope::One(namespace) => {
                        namer.number(0);
                        namer.text(namespace);
                    }
                    Scope::Selected(selector) => {
                        namer.number(1);
                        name_selector(&mut namer, selector);
                    }
                }
                name_selector(&mut namer, pods);
            }
            PeerKey::Block { net, except } => {
                namer.number(2);
                std::iter::once(net).chain(except).for_each(|net| namer.text(&net.to_string()));
            }
        }
        namer.name()
    }

    /// Whether the net, which no border of the block crosses, lies in it.
    fn holds(&self, within: &IpNet) -> bool {
        let PeerKey::Block { net, except } = self else { return false };
        net.contains(within) && !except.iter().any(|out| out.contains(within))
    }
}

/// A port's name and protocol that some rule of the egress side uses.
pub type PortName = (Word, Protocol);

/// What an address is: peers by id, and the numbers of named ports in use.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Class {
    pub peers: BTreeSet<PeerId>,
    pub named: Vec<NamedPort>,
}

impl Class {
    pub fn id(&self) -> u64 {
        if self.peers.is_empty() && self.named.is_empty() {
            return super::tables::NOBODY;
        }
        let mut namer = Namer::new("class");
        namer.number(self.peers.len() as u64);
        self.peers.iter().for_each(|peer| namer.number(*peer));
        for port in &self.named {
            namer.text(&port.name);
            namer.number(u64::from(port.protocol.number()) << 16 | u64::from(port.port));
        }
        namer.name()
    }
}

pub type GroupId = u32;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupKey {
    pub namespace: Word,
    pub labels: Arc<Labels>,
    pub ports: Arc<[NamedPort]>,
}

#[derive(Debug)]
struct Group {
    key: GroupKey,
    pods: u32,
    addresses: HashSet<IpAddr>,
    /// Selected by these, of those that count.
    peers: BTreeSet<PeerId>,
}

#[derive(Debug, Default)]
pub struct Peers {
    namespaces: HashMap<Word, Arc<Labels>>,
    groups: HashMap<GroupId, Group>,
    by_key: HashMap<GroupKey, GroupId>,
    by_namespace: HashMap<Word, BTreeSet<GroupId>>,
    next_group: GroupId,
    /// How often each is named by profiles.
    live: BTreeMap<PeerId, (PeerKey, usize)>,
    names: BTreeMap<PortName, usize>,
    /// Groups that may be other peers than they were, and addresses of which that
    /// holds.
    stale: BTreeSet<GroupId>,
    touched: BTreeSet<IpAddr>,
    blocks_changed: bool,
}

impl Peers {
    pub fn set_namespace(&mut self, name: &Word, labels: Option<Arc<Labels>>) {
        match labels {
            Some(labels) => self.namespaces.insert(name.clone(), labels),
            None => self.namespaces.remove(name),
        };
        self.stale.extend(self.by_namespace.get(name).into_iter().flatten());
    }

    /// One more pod of this kind.
    pub fn join(&mut self, key: GroupKey) -> GroupId {
        let next = self.next_group;
        let id = *self.by_key.entry(key.clone()).or_insert(next);
        if id == next {
            self.next_group += 1;
            self.by_namespace.entry(key.namespace.clone()).or_default().insert(id);
            self.groups.insert(id, Group { key, pods: 0, addresses: HashSet::new(), peers: BTreeSet::new() });
            self.stale.insert(id);
        }
        if let Some(group) = self.groups.get_mut(&id) {
            group.pods += 1;
        }
        id
    }

    pub fn leave(&mut self, id: GroupId) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.pods -= 1;
        if group.pods > 0 {
            return;
        }
        if let Some(group) = self.groups.remove(&id) {
            self.by_key.remove(&group.key);
            if let Some(ids) = self.by_namespace.get_mut(&group.key.namespace) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.by_namespace.remove(&group.key.namespace);
                }
            }
        }
        self.stale.remove(&id);
    }

    /// The address is a pod's of this group, or no longer.
    pub fn address(&mut self, id: GroupId, ip: IpAddr, is: bool) {
        if let Some(group) = self.groups.get_mut(&id) {
            match is {
                true => group.addresses.insert(ip),
                false => group.addresses.remove(&ip),
            };
        }
        self.touched.insert(ip);
    }

    /// A profile speaks of this peer.
    pub fn count(&mut self, key: &PeerKey) {
        let (_, count) = self.live.entry(key.id()).or_insert_with(|| (key.clone(), 0));
        *count += 1;
        if *count == 1 {
            self.changed(key);
        }
    }

    pub fn discount(&mut self, key: &PeerKey) {
        let id = key.id();
        let Some((_, count)) = self.live.get_mut(&id) else { return };
        *count -= 1;
        if *count == 0 {
            self.live.remove(&id);
            self.changed(key);
        }
    }

    fn changed(&mut self, key: &PeerKey) {
        match key {
            PeerKey::Pods { within: Scope::One(namespace), .. } => {
                self.stale.extend(self.by_namespace.get(namespace).into_iter().flatten());
            }
            PeerKey::Pods { .. } => self.stale.extend(self.groups.keys()),
            PeerKey::Block { .. } => self.blocks_changed = true,
        }
    }

    /// A profile asks for the number of this port at whom it is connected to.
    pub fn count_name(&mut self, name: &PortName) {
        let count = self.names.entry(name.clone()).or_default();
        *count += 1;
        if *count == 1 {
            self.touch_named(name);
        }
    }

    pub fn discount_name(&mut self, name: &PortName) {
        let Some(count) = self.names.get_mut(name) else { return };
        *count -= 1;
        if *count == 0 {
            self.names.remove(name);
            self.touch_named(name);
        }
    }

    /// What is known of the pods of a group.
    pub fn group(&self, id: GroupId) -> Option<&GroupKey> {
        self.groups.get(&id).map(|group| &group.key)
    }

    fn touch_named(&mut self, name: &PortName) {
        let has = |group: &&Group| group.key.ports.iter().any(|p| (&p.name, p.protocol) == (&name.0, name.1));
        self.touched.extend(self.groups.values().filter(has).flat_map(|group| &group.addresses));
    }

    fn selects(&self, peer: &PeerKey, key: &GroupKey) -> bool {
        let PeerKey::Pods { within, pods } = peer else { return false };
        let here = match within {
            Scope::One(namespace) => *namespace == key.namespace,
            // A namespace that is not known is in nobody's selection.
            Scope::Selected(selector) => self.namespaces.get(&key.namespace).is_some_and(|l| selector.matches(l)),
        };
        here && pods.matches(&key.labels)
    }

    /// The addresses that may have another class now. `nets` says whether those of
    /// no pod may, too.
    pub fn take_touched(&mut self) -> Touched {
        for id in std::mem::take(&mut self.stale) {
            let Some(group) = self.groups.get(&id) else { continue };
            let selecting = self.live.iter().filter(|(_, (peer, _))| self.selects(peer, &group.key));
            let peers: BTreeSet<PeerId> = selecting.map(|(id, _)| *id).collect();
            if let Some(group) = self.groups.get_mut(&id)
                && group.peers != peers
            {
                group.peers = peers;
                self.touched.extend(&group.addresses);
            }
        }
        let nets = std::mem::take(&mut self.blocks_changed);
        if nets {
            let shown = self.groups.values().filter(|group| !group.peers.is_empty() || !group.key.ports.is_empty());
            self.touched.extend(shown.flat_map(|group| &group.addresses));
        }
        Touched { addresses: std::mem::take(&mut self.touched), nets }
    }

    /// What a pod's address is; `None` when it is no more than others of its net.
    pub fn class(&self, ip: IpAddr, group: GroupId) -> Option<Class> {
        let group = self.groups.get(&group)?;
        let used = |p: &&NamedPort| self.names.contains_key(&(p.name.clone(), p.protocol));
        let named: Vec<NamedPort> = match self.names.is_empty() {
            true => Vec::new(),
            false => group.key.ports.iter().filter(used).cloned().collect(),
        };
        if group.peers.is_empty() && named.is_empty() {
            return None;
        }
        let mut peers = self.blocks_around(&IpNet::from(ip));
        peers.extend(&group.peers);
        Some(Class { peers, named })
    }

    fn blocks_around(&self, net: &IpNet) -> BTreeSet<PeerId> {
        self.live.iter().filter(|(_, (peer, _))| peer.holds(net)).map(|(id, _)| *id).collect()
    }

    /// All nets between whose borders nothing changes, each with what it is.
    pub fn nets(&self) -> BTreeMap<IpNet, Class> {
        let mut borders = BTreeSet::new();
        for (peer, _) in self.live.values() {
            if let PeerKey::Block { net, except } = peer {
                borders.insert(net.trunc());
                borders.extend(except.iter().map(IpNet::trunc));
            }
        }
        let class = |net: &IpNet| Class { peers: self.blocks_around(net), named: Vec::new() };
        borders.iter().map(|net| (*net, class(net))).collect()
    }
}

/// What [`Peers::take_touched`] has found.
#[derive(Debug, Default)]
pub struct Touched {
    pub addresses: BTreeSet<IpAddr>,
    pub nets: bool,
}
