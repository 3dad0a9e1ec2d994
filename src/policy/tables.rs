//! What the kernel judges by, and the writes that change it.
//!
//! An address has a *class*: the set of policies' peers that it is, counting only
//! policies that isolate a pod of this node. A pod that is isolated in a direction
//! has a *profile* there: all rules that apply to it. Profile and class together
//! say which ports are open; a pair that says no more than class [`NOBODY`] has no
//! entry of its own. Pods' addresses are looked up whole, all others among nets.
//!
//! Ids are digests of what they stand for, so that another run of the agent finds
//! the tables as it would make them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::model::{Direction, Name};
use crate::service::model::Protocol;

/// The number of a pod's device, as in the datapath.
pub type Endpoint = u32;
pub type ClassId = u64;
pub type ProfileId = u64;
pub type RuleId = u64;

/// The class of an address that no rule knows.
pub const NOBODY: ClassId = 0;

/// Ports of one protocol, or of all, that a rule opens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Open {
    pub protocol: Option<Protocol>,
    pub from: u16,
    pub to: u16,
    pub by: RuleName,
}

impl Open {
    pub fn covers(&self, protocol: Protocol, port: u16) -> bool {
        self.protocol.is_none_or(|p| p == protocol) && (self.from..=self.to).contains(&port)
    }
}

/// A rule of a policy, counted from 0 in its direction.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleName {
    pub policy: Name,
    pub direction: Direction,
    pub number: u16,
}

impl RuleName {
    pub fn id(&self) -> RuleId {
        let mut namer = Namer::new("rule");
        namer.text(&self.policy.namespace);
        namer.text(&self.policy.name);
        namer.number(u64::from(self.direction == Direction::Egress) << 16 | u64::from(self.number));
        namer.name()
    }
}

impl std::fmt::Display for RuleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}[{}]", self.policy, self.direction, self.number)
    }
}

/// The profile of a pod of which it is not known yet how it is isolated: no rule
/// opens anything.
pub const CLOSED: ProfileId = fairway_ebpf_abi::PROFILE_CLOSED;

/// How a pod is isolated. A direction without a profile is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Enforced {
    pub ingress: Option<ProfileId>,
    pub egress: Option<ProfileId>,
}

impl Enforced {
    pub const CLOSED: Self = Self { ingress: Some(CLOSED), egress: Some(CLOSED) };

    pub fn profile(&self, direction: Direction) -> Option<ProfileId> {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }
}

/// One change of the tables. In the order given, every moment between two of them
/// judges as before or as after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    Rule(ProfileId, ClassId, Option<Arc<[Open]>>),
    Address(IpAddr, Option<ClassId>),
    Net(IpNet, Option<ClassId>),
    Endpoint(Endpoint, Option<Enforced>),
}

/// The tables as a run of the compiler has made them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    pub rules: BTreeMap<(ProfileId, ClassId), Arc<[Open]>>,
    pub addresses: BTreeMap<IpAddr, ClassId>,
    pub nets: BTreeMap<IpNet, ClassId>,
    pub endpoints: BTreeMap<Endpoint, Enforced>,
}

/// What decides about a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No policy isolates the pod in this direction.
    Open,
    Allowed(RuleName),
    Denied,
}

impl Tables {
    pub fn apply(&mut self, write: &Write) {
        fn set<K: Ord + Copy, V: Clone>(map: &mut BTreeMap<K, V>, key: &K, value: Option<&V>) {
            match value {
                Some(value) => drop(map.insert(*key, value.clone())),
                None => drop(map.remove(key)),
            }
        }
        match write {
            Write::Rule(profile, class, open) => set(&mut self.rules, &(*profile, *class), open.as_ref()),
            Write::Address(ip, class) => set(&mut self.addresses, ip, class.as_ref()),
            Write::Net(net, class) => set(&mut self.nets, net, class.as_ref()),
            Write::Endpoint(endpoint, enforced) => set(&mut self.endpoints, endpoint, enforced.as_ref()),
        }
    }

    /// As the programs look it up.
    pub fn class(&self, ip: IpAddr) -> ClassId {
        let longest = || self.nets.iter().filter(|(net, _)| net.contains(&ip)).max_by_key(|(net, _)| net.prefix_len());
        self.addresses.get(&ip).copied().or_else(|| longest().map(|(_, class)| *class)).unwrap_or(NOBODY)
    }

    pub fn judge(
        &self,
        endpoint: Endpoint,
        direction: Direction,
        peer: IpAddr,
        protocol: Protocol,
        port: u16,
    ) -> Verdict {
        let enforced = self.endpoints.get(&endpoint).copied().unwrap_or_default();
        let Some(profile) = enforced.profile(direction) else { return Verdict::Open };
        let of = |class| self.rules.get(&(profile, class));
        let open = of(self.class(peer)).or_else(|| of(NOBODY));
        match open.and_then(|open| open.iter().find(|o| o.covers(protocol, port))) {
            Some(open) => Verdict::Allowed(open.by.clone()),
            None => Verdict::Denied,
        }
    }
}

/// Names what it was given, the same in every run. Never 0.
#[derive(Clone)]
pub(super) struct Namer(Sha256);

impl Namer {
    pub(super) fn new(kind: &str) -> Self {
        let mut namer = Self(Sha256::new());
        namer.text(kind);
        namer
    }

    /// With its length, so that no two lists of texts are one.
    pub(super) fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    pub(super) fn number(&mut self, number: u64) {
        self.0.update(number.to_be_bytes());
    }

    pub(super) fn name(self) -> u64 {
        let digest = self.0.finalize();
        let first = digest.iter().take(8).fold(0, |n, byte| n << 8 | u64::from(*byte));
        first.max(1)
    }
}
