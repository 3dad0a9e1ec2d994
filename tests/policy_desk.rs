//! Promise: the kernel's tables follow the cluster through refusals, restarts and
//! ignorance: what was in force stays so until better is known, and a pod that
//! nobody knows yet is closed where a policy may be meant for it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fairway::actor::{ChildPolicy, Deadline, Handle, Placement, Port, Registry, Tree};
use fairway::model::{AttachmentId, PodKey};
use fairway::policy::desk::{Desk, Standing};
use fairway::policy::index::{Index, Kind};
use fairway::policy::maps::{Change, InForce, PolicyMaps, blocks_of};
use fairway::policy::memory::Memory;
use fairway::policy::model::{Direction, Labels, Name, Peer, Pod, Policy, Requirement, Rule, Selector, Test};
use fairway::policy::tables::{CLOSED, ClassId, Endpoint, Enforced, ProfileId, RuleId, Tables, Verdict, Write};
use fairway::policy::{Deps, Enforce, PolicyCompiler, convert};
use fairway::pool::Leases;
use fairway::service::model::Protocol;
use tokio::sync::watch;

/// The tables as the kernel would have them.
#[derive(Default)]
struct Model {
    tables: Tables,
    blocks: BTreeMap<(ProfileId, ClassId), u32>,
    counted: std::collections::BTreeSet<RuleId>,
    pods: BTreeMap<AttachmentId, Endpoint>,
    generation: u32,
    writes: usize,
    /// Refused once so many more writes have been made.
    refuse_after: Option<usize>,
}

#[derive(Clone, Default)]
struct Maps(Arc<Mutex<Model>>);

impl Maps {
    fn new(pods: &[u32]) -> Self {
        let maps = Self::default();
        maps.0.lock().unwrap().pods = pods.iter().map(|n| (attachment(*n), *n)).collect();
        maps
    }

    fn judge(&self, endpoint: u32, peer: &str) -> Verdict {
        let peer: IpAddr = peer.parse().unwrap();
        self.0.lock().unwrap().tables.judge(endpoint, Direction::Ingress, peer, Protocol::Tcp, 80)
    }

    fn endpoint_is(&self, endpoint: u32) -> Enforced {
        self.0.lock().unwrap().tables.endpoints.get(&endpoint).copied().unwrap_or_default()
    }
}

impl PolicyMaps for Maps {
    fn read(&mut self) -> Result<InForce, String> {
        let model = self.0.lock().unwrap();
        Ok(InForce {
            rules: model.blocks.clone(),
            addresses: model.tables.addresses.clone(),
            nets: model.tables.nets.clone(),
            counted: model.counted.clone(),
        })
    }
    fn apply(&mut self, change: &Change) -> Result<(), String> {
        let mut model = self.0.lock().unwrap();
        if let Some(left) = &mut model.refuse_after {
            match left.checked_sub(1) {
                Some(fewer) => *left = fewer,
                None => return Err("the kernel's map of policies' rules is full".to_owned()),
            }
        }
        model.writes += 1;
        let write = match change.clone() {
            Change::PutRules(profile, class, open) => {
                model.blocks.insert((profile, class), blocks_of(&open));
                Write::Rule(profile, class, Some(open))
            }
            Change::DropRules(profile, class, blocks) => {
                assert_eq!(model.blocks.remove(&(profile, class)), Some(blocks), "as many as there are");
                Write::Rule(profile, class, None)
            }
            Change::Address(ip, class) => Write::Address(ip, class),
            Change::Net(net, class) => Write::Net(net, class),
            Change::Count(rule, counted) => {
                match counted {
                    true => model.counted.insert(rule),
                    false => model.counted.remove(&rule),
                };
                return Ok(());
            }
        };
        model.tables.apply(&write);
        Ok(())
    }
    fn next_generation(&mut self) -> Result<(), String> {
        self.0.lock().unwrap().generation += 1;
        Ok(())
    }
    fn hits(&mut self) -> Result<Vec<(RuleId, u64)>, String> {
        Ok(self.0.lock().unwrap().counted.iter().map(|rule| (*rule, 1)).collect())
    }
    fn pods(&mut self) -> Result<Vec<(AttachmentId, Endpoint, Enforced)>, String> {
        let model = self.0.lock().unwrap();
        let how = |endpoint| model.tables.endpoints.get(endpoint).copied().unwrap_or_default();
        Ok(model.pods.iter().map(|(id, endpoint)| (id.clone(), *endpoint, how(endpoint))).collect())
    }
    fn endpoint(&mut self, attachment: &AttachmentId) -> Result<Option<Endpoint>, String> {
        Ok(self.0.lock().unwrap().pods.get(attachment).copied())
    }
    fn enforce(&mut self, attachment: &AttachmentId, how: Enforced) -> Result<Option<Endpoint>, String> {
        let mut model = self.0.lock().unwrap();
        let Some(endpoint) = model.pods.get(attachment).copied() else { return Ok(None) };
        model.tables.apply(&Write::Endpoint(endpoint, Some(how).filter(|how| *how != Enforced::default())));
        Ok(Some(endpoint))
    }
}

fn attachment(n: u32) -> AttachmentId {
    AttachmentId { sandbox: format!("s{n}").as_str().into(), ifname: "eth0".into() }
}

fn with(app: &str) -> Selector {
    Selector([Requirement { key: "app".into(), test: Test::In([app.into()].into()) }].into())
}

fn pod(app: &str, ip: &str, uid: &str) -> Option<Pod> {
    let labels = Arc::new(Labels::new([("app".into(), app.into())]));
    Some(Pod { uid: convert::uid(uid), ips: [ip.parse().unwrap()].into(), labels, ports: [].into() })
}

/// Isolates `app: own`, and lets `peer` in.
fn policy(peer: &str) -> Option<Policy> {
    let peers = [Peer::Pods { namespaces: None, pods: with(peer) }].into();
    let rules = [Rule { peers: Some(peers), ports: None }].into();
    Some(Policy { selects: with("own"), ingress: Some(rules), egress: None })
}

fn name(text: &str) -> Name {
    Name::new("a", text)
}

/// Pods `own`, `b` and `c`, the policy `p` that lets `b` in.
fn cluster() -> Index {
    let index = Index::default();
    Kind::ALL.into_iter().for_each(|kind| index.list_begins(kind));
    index.namespace("a".into(), Some(Arc::default()));
    index.pod(name("own"), pod("own", "10.0.0.1", "u1"));
    index.pod(name("b"), pod("b", "10.0.0.2", "u2"));
    index.pod(name("c"), pod("c", "10.0.0.3", "u3"));
    index.policy(name("p"), policy("b"));
    Kind::ALL.into_iter().for_each(|kind| index.list_ends(kind));
    index
}

fn desk(maps: &Maps, index: &Index) -> Desk {
    Desk::open(Box::new(maps.clone()), index.clone(), Memory::open(None))
}

fn started(maps: &Maps, index: &Index) -> Desk {
    let mut desk = desk(maps, index);
    desk.adopt(&[(attachment(1), name("own"))]).unwrap();
    desk.settle().unwrap().unwrap();
    desk
}

fn lets(maps: &Maps, peer: &str) -> bool {
    !matches!(maps.judge(1, peer), Verdict::Denied)
}

#[test]
fn another_run_finds_the_tables_as_it_would_make_them() {
    let maps = Maps::new(&[1]);
    started(&maps, &cluster());
    assert!(lets(&maps, "10.0.0.2") && !lets(&maps, "10.0.0.3"));
    let (writes, generation) = {
        let model = maps.0.lock().unwrap();
        (model.writes, model.generation)
    };
    // Until it knows the cluster whole it changes nothing.
    let index = Index::default();
    let mut ignorant = desk(&maps, &index);
    ignorant.adopt(&[(attachment(1), name("own"))]).unwrap();
    assert!(ignorant.settle().unwrap().is_none());
    started(&maps, &cluster());
    let model = maps.0.lock().unwrap();
    assert_eq!((model.writes, model.generation), (writes, generation), "nothing to write, nothing to judge again");
}

#[test]
fn a_write_that_is_refused_leaves_what_was_in_force_and_is_made_up_for() {
    // However far it gets.
    for after in 0..8 {
        let maps = Maps::new(&[1]);
        let index = cluster();
        let mut desk = started(&maps, &index);
        maps.0.lock().unwrap().refuse_after = Some(after);
        index.policy(name("p"), policy("c"));
        let refused = desk.settle();
        if refused.is_ok() {
            assert!(after >= 3, "a change takes a few writes");
            continue;
        }
        assert!(refused.unwrap_err().contains("full"));
        // As before, or, where only tidying up was refused, as it is to be.
        let now = (lets(&maps, "10.0.0.2"), lets(&maps, "10.0.0.3"));
        assert!(now == (true, false) || after >= 3 && now == (false, true), "after {after} writes: {now:?}");
        maps.0.lock().unwrap().refuse_after = None;
        desk.settle().unwrap().unwrap();
        assert_eq!((lets(&maps, "10.0.0.2"), lets(&maps, "10.0.0.3")), (false, true));
        let fresh = Maps::new(&[1]);
        started(&fresh, &index_again());
        assert_eq!(maps.0.lock().unwrap().tables, fresh.0.lock().unwrap().tables, "and nothing is left over");
    }
}

/// The cluster after that change.
fn index_again() -> Index {
    let index = cluster();
    index.policy(name("p"), policy("c"));
    index
}

#[test]
fn a_pod_that_is_not_known_is_closed_where_a_policy_may_be_meant_for_it() {
    let maps = Maps::new(&[1, 2, 3]);
    let index = cluster();
    let mut desk = started(&maps, &index);
    let new = name("new");
    assert_eq!(desk.try_enforce(&attachment(2), &new, None).unwrap(), Standing::Unknown);
    let closed = Enforced { ingress: Some(CLOSED), egress: None };
    assert_eq!(desk.enforce_now(&attachment(2), &new).unwrap(), Standing::Enforced(closed));
    assert_eq!(maps.endpoint_is(2), closed, "the policy says nothing of egress");
    let elsewhere = Name::new("z", "new");
    let open = Standing::Enforced(Enforced::default());
    assert_eq!(desk.try_enforce(&attachment(3), &elsewhere, None).unwrap(), open, "no policy is in its namespace");
    // Once it is known it is what its labels say.
    index.pod(new.clone(), pod("c", "10.0.0.9", "u9"));
    desk.settle().unwrap().unwrap();
    assert_eq!(maps.endpoint_is(2), Enforced::default());
    assert_eq!(desk.try_enforce(&attachment(9), &new, None).unwrap(), Standing::Missing);
    // An earlier pod of its name is not it.
    assert_eq!(desk.try_enforce(&attachment(2), &new, Some(convert::uid("u9"))).unwrap(), open);
    assert_eq!(desk.try_enforce(&attachment(2), &new, Some(convert::uid("other"))).unwrap(), Standing::Unknown);
}

#[test]
fn without_the_api_a_new_pod_is_closed_as_its_namespace_had_policies() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("policies.json");
    let maps = Maps::new(&[1, 2, 3]);
    let before = |path| Desk::open(Box::new(maps.clone()), Index::default(), Memory::open(Some(path)));
    let closed = |desk: &mut Desk, n: u32, namespace: &str| {
        desk.enforce_now(&attachment(n), &Name::new(namespace, "new")).unwrap();
        maps.endpoint_is(n)
    };
    assert_eq!(closed(&mut before(path.clone()), 2, "a"), Enforced::CLOSED, "nothing is known at all");
    let mut desk = Desk::open(Box::new(maps.clone()), cluster(), Memory::open(Some(path.clone())));
    desk.settle().unwrap().unwrap();
    drop(desk);
    let mut again = before(path);
    assert_eq!(closed(&mut again, 2, "a"), Enforced { ingress: Some(CLOSED), egress: None });
    assert_eq!(closed(&mut again, 3, "b"), Enforced::default());
}

#[test]
fn devices_that_are_gone_are_forgotten_and_what_somebody_else_changed_is_mended() {
    let maps = Maps::new(&[1]);
    let mut desk = started(&maps, &cluster());
    let how = maps.endpoint_is(1);
    maps.clone().enforce(&attachment(1), Enforced::default()).unwrap();
    desk.sweep().unwrap().unwrap();
    assert_eq!(maps.endpoint_is(1), how);
    maps.0.lock().unwrap().pods.clear();
    let settled = desk.sweep().unwrap().unwrap();
    assert_eq!((settled.pods, settled.profiles, settled.addresses), (0, 0, 0));
    assert!(maps.0.lock().unwrap().tables.rules.is_empty() && maps.0.lock().unwrap().counted.is_empty());
}

#[test]
fn an_add_waits_for_the_watch_to_show_its_pod_and_not_for_ever() {
    let (maps, index) = (Maps::new(&[1, 2]), cluster());
    fairway::actor::run(async {
        let (snapshots, mut seen) = watch::channel(Arc::default());
        let (_, leader) = watch::channel(false);
        let deps = Deps {
            index: index.clone(),
            leases: Port::<Leases>::probe(|_| Ok(Vec::new())),
            leader,
            record_event: Port::probe(|_| Ok(())),
            maps: Arc::new({
                let maps = maps.clone();
                move || Ok(Box::new(maps.clone()))
            }),
            memory: None,
            snapshots,
        };
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
        let policies: Handle<PolicyCompiler> = tree.child(move || PolicyCompiler::open(deps.clone()));
        let port = policies.port::<Enforce>();
        seen.wait_for(|s| s.settled_ms_ago.is_some()).await.unwrap();
        let ask = |n: u32, pod: &str| Enforce { attachment: attachment(n), pod: PodKey::new("a", pod), uid: None };
        let began = Instant::now();
        let shown = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            index.pod(name("late"), pod("own", "10.0.0.7", "u7"));
        };
        let (late, ()) = tokio::join!(port.ask(ask(1, "late"), Deadline::after(Duration::from_secs(10))), shown);
        let late = late.unwrap();
        assert_eq!((late.ingress, late.egress, late.closed), (true, false, None));
        assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
        let began = Instant::now();
        let never = port.ask(ask(2, "never"), Deadline::after(Duration::from_secs(10))).await.unwrap();
        assert!(never.ingress && never.closed.unwrap().contains("has not shown the pod"));
        let took = began.elapsed();
        assert!((Duration::from_millis(1900)..Duration::from_secs(4)).contains(&took), "{took:?}");
        assert_eq!(maps.endpoint_is(2), Enforced { ingress: Some(CLOSED), egress: None });
        let missing = port.ask(ask(9, "own"), Deadline::after(Duration::from_secs(10))).await;
        assert!(missing.unwrap_err().to_string().contains("no programs"));
        tree.shutdown(Duration::from_secs(5)).await;
    });
}
