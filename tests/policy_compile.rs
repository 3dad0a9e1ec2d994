//! Promise: the compiled tables judge every connection as the Kubernetes API says
//! that NetworkPolicies do, after any history of changes, and at no moment between
//! two writes otherwise than before or after the change.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use fairway::policy::compile::Compiler;
use fairway::policy::model::{
    Direction, Labels, Name, NamedPort, Peer, Pod, Policy, Port, PortAt, Requirement, Rule, Selector, Test, Word,
};
use fairway::policy::tables::{Tables, Verdict};
use fairway::service::model::Protocol;
use ipnet::IpNet;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

/// Everything as the API has it, and which pods are here.
#[derive(Clone, Debug, Default)]
struct Cluster {
    namespaces: BTreeMap<Word, Arc<Labels>>,
    pods: BTreeMap<Name, Pod>,
    policies: BTreeMap<Name, Arc<Policy>>,
    local: BTreeMap<u32, Name>,
}

impl Cluster {
    /// Who has an address. Addresses are one pod's alone here.
    fn owner(&self, ip: IpAddr) -> Option<(&Name, &Pod)> {
        self.pods.iter().find(|(_, pod)| pod.ips.contains(&ip))
    }

    fn is(&self, peer: &Peer, of: &Name, ip: IpAddr) -> bool {
        match peer {
            Peer::Block { net, except } => net.contains(&ip) && !except.iter().any(|out| out.contains(&ip)),
            Peer::Pods { namespaces, pods } => self.owner(ip).is_some_and(|(name, pod)| {
                let here = match namespaces {
                    None => name.namespace == of.namespace,
                    Some(selector) => self.namespaces.get(&name.namespace).is_some_and(|l| selector.matches(l)),
                };
                here && pods.matches(&pod.labels)
            }),
        }
    }

    /// `None`: nobody isolates the pod. Else whether it is allowed.
    fn judge(&self, endpoint: u32, direction: Direction, peer: IpAddr, protocol: Protocol, port: u16) -> Option<bool> {
        let name = self.local.get(&endpoint)?;
        let Some(pod) = self.pods.get(name) else {
            // Any policy of its namespace may be meant for it.
            let here = self.policies.iter().filter(|(policy, _)| policy.namespace == name.namespace);
            return here.map(|(_, it)| it).any(|it| it.rules(direction).is_some()).then_some(false);
        };
        let target = match direction {
            Direction::Ingress => Some(pod),
            Direction::Egress => self.owner(peer).map(|(_, pod)| pod),
        };
        let opens = |wanted: &Port| {
            wanted.protocol == protocol
                && match &wanted.at {
                    PortAt::Any => true,
                    PortAt::Range(from, to) => (*from..=*to).contains(&port),
                    PortAt::Named(name) => target.is_some_and(|pod| {
                        let is = |p: &NamedPort| p.name == *name && p.protocol == protocol && p.port == port;
                        pod.ports.iter().any(is)
                    }),
                }
        };
        let mut isolated = false;
        for (policy, it) in &self.policies {
            if policy.namespace != name.namespace || !it.selects.matches(&pod.labels) {
                continue;
            }
            let Some(rules) = it.rules(direction) else { continue };
            isolated = true;
            for rule in rules {
                let from = rule.peers.as_ref().is_none_or(|peers| peers.iter().any(|p| self.is(p, policy, peer)));
                if from && rule.ports.as_ref().is_none_or(|ports| ports.iter().any(opens)) {
                    return Some(true);
                }
            }
        }
        isolated.then_some(false)
    }

    fn questions(&self) -> Vec<(u32, Direction, IpAddr, Protocol, u16)> {
        let mut peers: Vec<IpAddr> = self.pods.values().flat_map(|pod| pod.ips.iter().copied()).collect();
        peers.extend((0..8).map(|n| address(4, n)));
        peers.extend(["192.0.2.1", "2001:db8::9"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        let mut all = Vec::new();
        for endpoint in self.local.keys() {
            for direction in Direction::BOTH {
                for peer in &peers {
                    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                        all.extend(
                            [0, 79, 80, 81, 443, 65535].map(|port| (*endpoint, direction, *peer, protocol, port)),
                        );
                    }
                }
            }
        }
        all
    }
}

#[derive(Clone, Debug)]
enum Edit {
    Namespace(Word, Option<Labels>),
    Pod(Name, Option<(Labels, Vec<NamedPort>, bool)>),
    Policy(Name, Option<Policy>),
    Local(u32, Option<Name>),
}

fn word(prefix: &'static str, of: u8) -> impl Strategy<Value = Word> {
    (0..of).prop_map(move |n| format!("{prefix}{n}").into())
}

fn labels() -> impl Strategy<Value = Labels> {
    btree_map(word("k", 3), word("v", 3), 0..3).prop_map(Labels::new)
}

fn selector() -> impl Strategy<Value = Selector> {
    let values = || proptest::collection::btree_set(word("v", 3), 1..3);
    let test = prop_oneof![
        3 => values().prop_map(Test::In),
        1 => values().prop_map(Test::NotIn),
        1 => Just(Test::Exists),
        1 => Just(Test::DoesNotExist),
    ];
    vec((word("k", 3), test).prop_map(|(key, test)| Requirement { key, test }), 0..3).prop_map(|r| Selector(r.into()))
}

/// Of a namespace's `n`th pod.
fn address(namespace: u8, n: u8) -> IpAddr {
    IpAddr::from([10, 0, namespace, n])
}

fn net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (0u8..5, 0u8..8, prop_oneof![Just(0u8), Just(8), Just(16), Just(22), Just(24), Just(30), Just(31), Just(32)])
            .prop_map(|(a, b, prefix)| IpNet::new(address(a, b), prefix).unwrap().trunc()),
        (0u16..4, prop_oneof![Just(0u8), Just(64), Just(127), Just(128)]).prop_map(|(n, prefix)| {
            IpNet::new(IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n]), prefix).unwrap().trunc()
        }),
    ]
}

fn peer() -> impl Strategy<Value = Peer> {
    prop_oneof![
        2 => (proptest::option::of(selector()), selector()).prop_map(|(namespaces, pods)| Peer::Pods { namespaces, pods }),
        1 => (net(), vec(net(), 0..3)).prop_map(|(net, except)| Peer::Block { net, except: except.into() }),
    ]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![3 => Just(Protocol::Tcp), 2 => Just(Protocol::Udp), 1 => Just(Protocol::Sctp)]
}

fn number() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0u16), Just(79), Just(80), Just(81), Just(443), Just(65535)]
}

fn port() -> impl Strategy<Value = Port> {
    let at = prop_oneof![
        1 => Just(PortAt::Any),
        3 => number().prop_map(|n| PortAt::Range(n, n)),
        2 => (number(), number()).prop_map(|(a, b)| PortAt::Range(a.min(b), a.max(b))),
        2 => word("p", 3).prop_map(PortAt::Named),
    ];
    (protocol(), at).prop_map(|(protocol, at)| Port { protocol, at })
}

fn rules() -> impl Strategy<Value = Option<Box<[Rule]>>> {
    let rule = (proptest::option::weighted(0.8, vec(peer(), 1..3)), proptest::option::weighted(0.7, vec(port(), 1..3)))
        .prop_map(|(peers, ports)| Rule { peers: peers.map(Into::into), ports: ports.map(Into::into) });
    proptest::option::weighted(0.7, vec(rule, 0..3)).prop_map(|rules| rules.map(Into::into))
}

fn name(kind: &'static str) -> impl Strategy<Value = Name> {
    (word("ns", 3), word(kind, 4)).prop_map(|(namespace, name)| Name { namespace, name })
}

fn edit() -> impl Strategy<Value = Edit> {
    let named =
        (word("p", 3), protocol(), number()).prop_map(|(name, protocol, port)| NamedPort { name, protocol, port });
    let pod = (labels(), vec(named, 0..3), any::<bool>());
    let policy =
        (selector(), rules(), rules()).prop_map(|(selects, ingress, egress)| Policy { selects, ingress, egress });
    prop_oneof![
        1 => (word("ns", 3), proptest::option::weighted(0.8, labels())).prop_map(|(n, l)| Edit::Namespace(n, l)),
        4 => (name("pod"), proptest::option::weighted(0.8, pod)).prop_map(|(n, p)| Edit::Pod(n, p)),
        4 => (name("policy"), proptest::option::weighted(0.8, policy)).prop_map(|(n, p)| Edit::Policy(n, p)),
        2 => (1u32..4, proptest::option::weighted(0.9, name("pod"))).prop_map(|(e, n)| Edit::Local(e, n)),
    ]
}

/// The pod's addresses follow from its name, so that no two have one.
fn pod(name: &Name, labels: Labels, mut ports: Vec<NamedPort>, dual: bool) -> Pod {
    let digit = |word: &str| word.bytes().last().unwrap() - b'0';
    let (a, b) = (digit(&name.namespace), digit(&name.name));
    let mut ips = vec![address(a, b)];
    if dual {
        ips.push(IpAddr::from([0xfd00, 0, 0, 0, 0, 0, a.into(), b.into()]));
    }
    // One number for a name.
    ports.sort();
    ports.dedup_by(|a, b| (&a.name, a.protocol) == (&b.name, b.protocol));
    Pod { uid: 0, ips: ips.into(), labels: Arc::new(labels), ports: ports.into() }
}

impl Edit {
    fn apply(self, cluster: &mut Cluster, compiler: &mut Compiler) {
        match self {
            Edit::Namespace(name, labels) => {
                let labels = labels.map(Arc::new);
                compiler.set_namespace(&name, labels.clone());
                match labels {
                    Some(labels) => drop(cluster.namespaces.insert(name, labels)),
                    None => drop(cluster.namespaces.remove(&name)),
                }
            }
            Edit::Pod(name, made) => {
                let made = made.map(|(labels, ports, dual)| pod(&name, labels, ports, dual));
                compiler.set_pod(name.clone(), made.clone());
                match made {
                    Some(pod) => drop(cluster.pods.insert(name, pod)),
                    None => drop(cluster.pods.remove(&name)),
                }
            }
            Edit::Policy(name, policy) => {
                let policy = policy.map(Arc::new);
                compiler.set_policy(name.clone(), policy.clone());
                match policy {
                    Some(policy) => drop(cluster.policies.insert(name, policy)),
                    None => drop(cluster.policies.remove(&name)),
                }
            }
            Edit::Local(endpoint, name) => {
                compiler.set_endpoint(endpoint, name.clone());
                match name {
                    Some(name) => drop(cluster.local.insert(endpoint, name)),
                    None => drop(cluster.local.remove(&endpoint)),
                }
            }
        }
    }
}

fn allowed(verdict: Verdict) -> Option<bool> {
    match verdict {
        Verdict::Open => None,
        Verdict::Allowed(_) => Some(true),
        Verdict::Denied => Some(false),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_tables_judge_as_the_api_says_at_every_moment(history in vec(vec(edit(), 1..6), 1..8)) {
        let (mut cluster, mut compiler, mut tables) = (Cluster::default(), Compiler::default(), Tables::default());
        for edits in history {
            let mut next = cluster.clone();
            for edit in edits {
                edit.apply(&mut next, &mut compiler);
            }
            let questions = next.questions();
            let writes = compiler.settle();
            let steady: Vec<_> = questions
                .iter()
                .filter(|(e, ..)| cluster.local.get(e) == next.local.get(e))
                .map(|q| (*q, cluster.judge(q.0, q.1, q.2, q.3, q.4), next.judge(q.0, q.1, q.2, q.3, q.4)))
                .filter(|(_, before, after)| before == after)
                .collect();
            for write in &writes {
                tables.apply(write);
                // What is the same before and after is so all the time.
                for ((e, d, peer, protocol, port), before, _) in steady.iter().step_by(7) {
                    let now = allowed(tables.judge(*e, *d, *peer, *protocol, *port));
                    prop_assert_eq!(now, *before, "{} {:?} {} {} {} after {:?}", e, d, peer, protocol, port, write);
                }
            }
            for (e, d, peer, protocol, port) in questions {
                let (is, should) = (allowed(tables.judge(e, d, peer, protocol, port)), next.judge(e, d, peer, protocol, port));
                prop_assert_eq!(is, should, "{} {:?} {} {} {}", e, d, peer, protocol, port);
            }
            cluster = next;
            prop_assert_eq!(compiler.settle(), vec![], "nothing is left to do");
        }
        // Another run that learns it all at once makes the same tables.
        let mut again = Compiler::default();
        for (name, labels) in &cluster.namespaces {
            again.set_namespace(name, Some(labels.clone()));
        }
        for (name, pod) in &cluster.pods {
            again.set_pod(name.clone(), Some(pod.clone()));
        }
        for (endpoint, name) in &cluster.local {
            again.set_endpoint(*endpoint, Some(name.clone()));
        }
        for (name, policy) in &cluster.policies {
            again.set_policy(name.clone(), Some(policy.clone()));
        }
        let mut fresh = Tables::default();
        again.settle().iter().for_each(|write| fresh.apply(write));
        prop_assert_eq!(fresh, tables);
    }
}
