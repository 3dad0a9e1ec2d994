//! ClusterWatch against an API server that comes, goes, cuts and forgets.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "cluster_support/api.rs"]
mod api;

use std::time::{Duration, Instant};

use api::{Api, LEASE, NODE};
use fairway::actor::{ChildPolicy, Deadline, Handle, Handles, Message, Placement, Registry, Tree};
use fairway::cluster::{
    self, About, ClusterError, ClusterStatus, ClusterWatch, Config, Facts, NodeCondition, PodInfo, RecordEvent,
    SetNodeStatus, Source,
};
use fairway::model::PodKey;
use serde_json::{Value, json};

struct Agent {
    facts: Facts,
    handle: Handle<ClusterWatch>,
    tree: Option<Tree>,
}

impl Agent {
    fn of(node: &str, source: Source, change: impl FnOnce(&mut Config)) -> Self {
        let (publisher, facts) = cluster::facts();
        let mut config = Config { source, node_name: node.into(), lease_seconds: 2, ..Config::default() };
        change(&mut config);
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
        let given = facts.clone();
        let handle = tree.child(move || ClusterWatch::open(config.clone(), publisher.clone(), given.clone()));
        Self { facts, handle, tree: Some(tree) }
    }
    fn start(api: &Api) -> Self {
        Self::of("n1", Source::Kubeconfig(api.kubeconfig()), |_| {})
    }
    fn ask<M: Message>(&self, message: M) -> Result<M::Reply, fairway::actor::AskError<M::Error>>
    where
        ClusterWatch: Handles<M>,
    {
        futures_block(self.handle.ask(message, Deadline::after(Duration::from_secs(5))))
    }
    #[track_caller]
    fn tell<M>(&self, message: M) -> M::Reply
    where
        ClusterWatch: Handles<M>,
        M: Message + Clone,
        M::Error: std::fmt::Debug,
    {
        let mut last = None;
        until("the actor answers", || {
            last = self.ask(message.clone()).ok();
            last.is_some()
        });
        last.unwrap()
    }
    fn pods(&self) -> Option<Vec<String>> {
        self.facts.pods.borrow().as_ref().map(|m| m.keys().map(|k| k.name.clone()).collect())
    }
    fn pod(&self, name: &str) -> Option<PodInfo> {
        let pods = self.facts.pods.borrow().clone()?;
        pods.get(&PodKey::new("default", name)).map(|p| (**p).clone())
    }
    fn leads(&self) -> bool {
        *self.facts.leader.borrow()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(tree) = self.tree.take() {
            fairway::actor::run(tree.shutdown(Duration::from_secs(5)));
        }
    }
}

fn futures_block<F: Future>(work: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < give_up, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn pod_path(name: &str) -> String {
    format!("/api/v1/namespaces/default/pods/{name}")
}
fn pod(name: &str, uid: &str, node: &str) -> Value {
    json!({
        "metadata": {"namespace": "default", "name": name, "uid": uid,
            "annotations": {"fairway.io/eni": "exclusive", "other": "x"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "uid": "s", "controller": true}]},
        "spec": {"nodeName": node, "containers": [{"name": "c"}]},
        "status": {"phase": "Pending"},
    })
}
fn event(n: u32) -> RecordEvent {
    RecordEvent {
        about: About::Pod { key: PodKey::new("default", format!("web-{n}")), uid: Some(format!("u{n}")) },
        warning: false,
        reason: "AddressAssigned".into(),
        action: "Add".into(),
        note: format!("address 10.0.0.{n} from ENI eni-1 in 3 ms"),
    }
}

#[test]
fn the_node_s_pods_are_known_and_no_others() {
    let api = Api::new();
    api.put(&pod_path("web-0"), pod("web-0", "u0", "n1"));
    api.put(&pod_path("web-9"), pod("web-9", "u9", "n2"));
    let agent = Agent::start(&api);
    until("the list", || agent.pods() == Some(vec!["web-0".to_owned()]));
    let info = agent.pod("web-0").unwrap();
    assert!(info.owned_by("StatefulSet"));
    assert_eq!(info.annotations.len(), 1, "only what is ours is kept");

    api.put(&pod_path("web-1"), pod("web-1", "u1", "n1"));
    until("an addition", || agent.pods().is_some_and(|p| p.len() == 2));
    let mut running = pod("web-0", "u0", "n1");
    running["status"] = json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.7"}]});
    api.put(&pod_path("web-0"), running);
    until("a change", || agent.pod("web-0").is_some_and(|p| p.phase == "Running" && p.ips.len() == 1));
    api.remove(&pod_path("web-1"));
    until("a deletion", || agent.pods().is_some_and(|p| p.len() == 1));

    let node = agent.facts.node.borrow().clone().unwrap();
    assert_eq!((node.uid.as_str(), node.addresses.len()), ("node-uid", 1));
    assert_eq!(node.labels["zone"], "a");
}

#[test]
fn nothing_is_known_until_a_list_was_seen_and_facts_outlive_the_api() {
    let mut api = Api::new();
    let config = api.kubeconfig();
    api.down();
    let agent = Agent::of("n1", Source::Kubeconfig(config), |_| {});
    let first = agent.tell(ClusterStatus {});
    assert!(first.enabled && agent.pods().is_none());
    until("the fault is seen", || agent.tell(ClusterStatus {}).faults.contains_key("pods"));
    api.put(&pod_path("web-0"), pod("web-0", "u0", "n1"));
    api.up();
    until("the API is back", || agent.pods() == Some(vec!["web-0".to_owned()]));
    api.down();
    // What changes meanwhile is made up for: a deletion, and a pod of the same name.
    api.remove(&pod_path("web-0"));
    api.put(&pod_path("web-1"), pod("web-1", "u1", "n1"));
    assert_eq!(agent.pods(), Some(vec!["web-0".to_owned()]), "the last that was seen holds");
    api.up();
    until("it is back again", || agent.pods() == Some(vec!["web-1".to_owned()]));
}

#[test]
fn a_watch_that_is_cut_goes_on_where_it_was() {
    let api = Api::new();
    let agent = Agent::start(&api);
    until("the list", || agent.pods().is_some());
    for n in 0..3 {
        api.cut();
        let name = format!("web-{n}");
        api.put(&pod_path(&name), pod(&name, "u", "n1"));
        until("the pod after the cut", || agent.pod(&name).is_some());
    }
    let lists = api.store().requests.iter().filter(|r| *r == "GET /api/v1/pods").count();
    assert_eq!(lists, 1, "a cut alone needs no new list");
}

#[test]
fn after_410_the_list_is_read_anew_and_missed_deletions_are_seen() {
    let api = Api::new();
    for n in 0..3 {
        api.put(&pod_path(&format!("web-{n}")), pod(&format!("web-{n}"), "u", "n1"));
    }
    let agent = Agent::start(&api);
    until("the list", || agent.pods().is_some_and(|p| p.len() == 3));
    api.store().objects.remove(&pod_path("web-1"));
    api.compact();
    until("the deletion nobody announced", || agent.pods().is_some_and(|p| p.len() == 2));
}

#[test]
fn a_malformed_pod_does_not_hide_the_others() {
    let api = Api::new();
    let mut broken = pod("broken", "u", "n1");
    broken["spec"]["containers"] = json!("not a list");
    api.put(&pod_path("broken"), broken);
    api.put(&pod_path("web-0"), pod("web-0", "u0", "n1"));
    let agent = Agent::start(&api);
    until("the sound one", || agent.pods() == Some(vec!["web-0".to_owned()]));
}

#[test]
fn events_tell_an_auditor_which_pod_had_which_address() {
    let api = Api::new();
    let agent = Agent::start(&api);
    agent.tell(event(7));
    until("the event", || !api.store().events().is_empty());
    let told = api.store().events()[0].clone();
    assert_eq!(told["regarding"]["name"], "web-7");
    assert_eq!(told["regarding"]["uid"], "u7");
    assert_eq!(told["note"], "address 10.0.0.7 from ENI eni-1 in 3 ms");
    assert_eq!(told["type"], "Normal");
    assert_eq!(told["reportingController"], "fairway.io/agent");
    assert!(told["eventTime"].is_string());
    for _ in 0..3 {
        agent.tell(event(7));
    }
    until("repetitions are counted", || api.store().events()[0]["series"]["count"] == 4);
    assert_eq!(api.store().events().len(), 1);
}

#[test]
fn a_flood_of_events_while_the_api_is_away_is_bounded_and_the_loss_is_told() {
    let mut api = Api::new();
    let agent = Agent::of("n1", Source::Kubeconfig(api.kubeconfig()), |c| c.events_buffered = 50);
    until("the node is seen", || agent.tell(ClusterStatus {}).node_seen);
    api.down();
    for n in 0..500 {
        agent.tell(event(n));
    }
    let stats = agent.tell(ClusterStatus {}).events;
    assert_eq!((stats.waiting, stats.dropped), (50, 450));
    api.up();
    until("all that waited arrived", || agent.tell(ClusterStatus {}).events.waiting == 0);
    let told = api.store().events();
    let lost: Vec<_> = told.iter().filter(|e| e["reason"] == "EventsLost").collect();
    assert_eq!(lost.len(), 1);
    assert!(lost[0]["note"].as_str().unwrap().starts_with("450 events were lost"));
    assert_eq!(lost[0]["regarding"]["uid"], "node-uid");
    assert_eq!(told.len(), 51);
    assert!(told.iter().any(|e| e["note"].as_str().unwrap().contains("10.0.0.499 ")), "the newest are kept");
}

#[test]
fn an_event_the_api_refuses_does_not_hold_up_the_next() {
    let api = Api::new();
    let agent = Agent::start(&api);
    api.store().fail_writes = Some(403);
    agent.tell(event(1));
    until("it was refused", || agent.tell(ClusterStatus {}).events.refused == 1);
    api.store().fail_writes = Some(503);
    agent.tell(event(2));
    until("it failed", || agent.tell(ClusterStatus {}).faults.contains_key("events"));
    api.store().fail_writes = None;
    until("it arrived", || api.store().events().iter().any(|e| e["regarding"]["name"] == "web-2"));
    until("it is counted", || agent.tell(ClusterStatus {}).events.delivered == 1);
}

fn shortage() -> SetNodeStatus {
    SetNodeStatus {
        condition: Some(NodeCondition {
            available: false,
            reason: "AddressesExhausted".into(),
            message: "30 of 30 addresses are in use".into(),
        }),
        exclusive_enis: Some(3),
    }
}

#[test]
fn the_scheduler_sees_the_node_s_condition_and_its_exclusive_enis() {
    let api = Api::new();
    let agent = Agent::start(&api);
    agent.tell(shortage());
    let node = || api.store().objects[NODE].clone();
    let condition = |node: &Value| {
        let all = node["status"]["conditions"].as_array().unwrap().clone();
        all.into_iter().find(|c| c["type"] == "AddressesAvailable").unwrap_or_default()
    };
    until("the status", || node()["status"]["capacity"]["fairway.io/eni"] == "3");
    let first = condition(&node());
    assert_eq!((&first["status"], &first["reason"]), (&json!("False"), &json!("AddressesExhausted")));
    assert!(first["lastTransitionTime"].is_string());
    assert_eq!(node()["status"]["conditions"].as_array().unwrap().len(), 2, "others' conditions stay");
    // Someone else takes it away; it comes back.
    let mut without = node();
    without["status"]["capacity"] = json!({});
    api.put(NODE, without);
    until("it is written again", || node()["status"]["capacity"]["fairway.io/eni"] == "3");
    let writes = || api.store().requests.iter().filter(|r| r.starts_with("PATCH") && r.contains("/nodes/")).count();
    let before = writes();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(writes(), before, "a status that is right is left alone");
}

#[test]
fn one_of_the_nodes_leads_and_another_takes_over_when_it_is_gone() {
    let api = Api::new();
    let source = || Source::Kubeconfig(api.kubeconfig());
    let mut agents: Vec<_> = ["n1", "n2", "n3"].iter().map(|n| Agent::of(n, source(), |_| {})).collect();
    let leaders = |agents: &[Agent]| agents.iter().filter(|a| a.leads()).count();
    until("someone leads", || leaders(&agents) == 1);
    let watched_until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < watched_until {
        assert!(leaders(&agents) <= 1, "two lead at once");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(leaders(&agents), 1, "and goes on leading");
    let at = agents.iter().position(Agent::leads).unwrap();
    let gone = agents.remove(at);
    let facts = gone.facts.clone();
    drop(gone);
    assert!(!*facts.leader.borrow(), "an agent that stopped does not lead");
    until("another leads", || leaders(&agents) == 1);
    assert_eq!(api.store().objects[LEASE]["spec"]["leaseTransitions"], 1);
}

#[test]
fn a_leader_that_loses_the_api_stops_leading() {
    let mut api = Api::new();
    let agent = Agent::start(&api);
    until("it leads", || agent.leads());
    api.down();
    until("it steps back", || !agent.leads());
    api.up();
    until("it leads again", || agent.leads());
}

#[test]
fn without_a_cluster_everything_is_unknown_and_nothing_fails() {
    let agent = Agent::of("", Source::Disabled, |_| {});
    let status = agent.tell(ClusterStatus {});
    assert!(!status.enabled && agent.pods().is_none() && !agent.leads());
    let refused = agent.ask(event(1)).unwrap_err();
    assert_eq!(refused.domain(), Some(ClusterError::Disabled));
}
