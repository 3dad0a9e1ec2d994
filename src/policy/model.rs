//! NetworkPolicies, and what is kept of pods and namespaces to judge by.
//!
//! Pure, plain data. Of a pod elsewhere there is its addresses, its namespace,
//! its labels and its named ports, and the last two are shared by all pods that
//! have the same.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::service::model::Protocol;

pub type Word = Arc<str>;

/// A NetworkPolicy or a pod, by namespace and name.
pub use crate::service::model::ServiceName as Name;

/// Sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(Box<[(Word, Word)]>);

impl Labels {
    pub fn new(labels: impl IntoIterator<Item = (Word, Word)>) -> Self {
        let sorted: std::collections::BTreeMap<_, _> = labels.into_iter().collect();
        Self(sorted.into_iter().collect())
    }

    pub fn get(&self, key: &str) -> Option<&Word> {
        let at = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }
}

/// All requirements hold; none selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(pub Box<[Requirement]>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    pub key: Word,
    pub test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Test {
    In(BTreeSet<Word>),
    /// What has no such label is not in it either.
    NotIn(BTreeSet<Word>),
    Exists,
    DoesNotExist,
}

impl Selector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| match (&r.test, labels.get(&r.key)) {
            (Test::In(values), found) => found.is_some_and(|v| values.contains(v)),
            (Test::NotIn(values), found) => !found.is_some_and(|v| values.contains(v)),
            (Test::Exists, found) => found.is_some(),
            (Test::DoesNotExist, found) => found.is_none(),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Direction::Ingress { "ingress" } else { "egress" })
    }
}

/// Which pods of its namespace a policy isolates, and what it lets through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub selects: Selector,
    /// `None`: says nothing about the direction. No rule: lets nothing through.
    pub ingress: Option<Box<[Rule]>>,
    pub egress: Option<Box<[Rule]>>,
}

impl Policy {
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// `None`: everybody.
    pub peers: Option<Box<[Peer]>>,
    /// `None`: every port of every protocol.
    pub ports: Option<Box<[Port]>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Without a selector of namespaces: of the policy's own.
    Pods {
        namespaces: Option<Selector>,
        pods: Selector,
    },
    Block {
        net: IpNet,
        except: Box<[IpNet]>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    pub protocol: Protocol,
    pub at: PortAt,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortAt {
    Any,
    /// From and to, both included.
    Range(u16, u16),
    /// Of the pod that is connected to; several pods may mean different numbers.
    Named(Word),
}

/// A port that a pod's container names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    pub name: Word,
    pub protocol: Protocol,
    pub port: u16,
}

/// What policies see of a pod. Not one with the node's network, nor one that has
/// finished: neither has an address of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// A digest of its uid: a name may be used again.
    pub uid: u64,
    pub ips: Box<[IpAddr]>,
    pub labels: Arc<Labels>,
    /// Sorted.
    pub ports: Arc<[NamedPort]>,
}
