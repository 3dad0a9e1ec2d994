//! Promise: ServiceMap carries what the API server says, through cuts, restarts
//! and nonsense, and says what is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "cluster_support/api.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod api;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{Api, NODE};
use fairway::actor::{ChildPolicy, Deadline, Handle, Handles, Message, Placement, Registry, Tree};
use fairway::cluster::{self, ClusterWatch, Source};
use fairway::model::PodKey;
use fairway::service::explain::Outcome;
use fairway::service::maps::{Chunk, Counts, MemoryMaps, ReadFailed, ServiceMaps, Tables, WriteFailed};
use fairway::service::model::Protocol;
use fairway::service::status::ServiceSnapshot;
use fairway::service::{Client, Deps, Explain, ExplainError, ServiceMap, ServiceStatus};
use parking_lot::Mutex;
use serde_json::{Value, json};

/// Pinned maps: they outlive the agent.
#[derive(Clone, Default)]
struct Pinned(Arc<Mutex<MemoryMaps>>);

impl ServiceMaps for Pinned {
    fn read_all(&mut self) -> Result<Tables, ReadFailed> {
        self.0.lock().read_all()
    }
    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), WriteFailed> {
        self.0.lock().apply(chunk)
    }
    fn capacity(&self) -> Counts {
        self.0.lock().capacity
    }
}

impl Pinned {
    fn counts(&self, addr: &str) -> Vec<u32> {
        let maps = self.0.lock();
        let of = maps.tables.frontends.iter().filter(|(k, _)| std::net::IpAddr::from(k.addr).to_string() == addr);
        of.map(|(_, f)| f.count).collect()
    }
    fn writes(&self) -> usize {
        self.0.lock().writes
    }
}

struct Agent {
    services: Handle<ServiceMap>,
    tree: Option<Tree>,
}

impl Agent {
    fn start(api: &Api, maps: &Pinned) -> Self {
        let (publisher, facts) = cluster::facts();
        let config = cluster::Config {
            source: Source::Kubeconfig(api.kubeconfig()),
            node_name: "n1".into(),
            services: true,
            lease_seconds: 2,
            ..cluster::Config::default()
        };
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
        let given = facts.clone();
        let cluster: Handle<ClusterWatch> =
            tree.child(move || ClusterWatch::open(config.clone(), publisher.clone(), given.clone()));
        let maps = maps.clone();
        let deps = Deps {
            node_name: "n1".to_owned(),
            index: facts.services.clone(),
            node: facts.node.clone(),
            pods: facts.pods.clone(),
            leader: facts.leader.clone(),
            record_event: cluster.port(),
            maps: Arc::new(move || Ok(Box::new(maps.clone()))),
            flows: None,
            snapshots: tokio::sync::watch::channel(Arc::new(ServiceSnapshot::default())).0,
        };
        let services = tree.child(move || ServiceMap::open(deps.clone()));
        Self { services, tree: Some(tree) }
    }
    fn ask<M: Message>(&self, message: M) -> Result<M::Reply, fairway::actor::AskError<M::Error>>
    where
        ServiceMap: Handles<M>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(self.services.ask(message, Deadline::after(Duration::from_secs(5))))
    }
    fn status(&self) -> ServiceSnapshot {
        let mut last = None;
        until("ServiceMap answers", || {
            last = self.ask(ServiceStatus {}).ok();
            last.is_some()
        });
        last.unwrap()
    }
    fn trace(&self, client: Client, to: &str) -> fairway::service::explain::Explanation {
        self.ask(Explain { client, to: to.parse().unwrap(), protocol: Protocol::Tcp }).unwrap()
    }
    fn stop(mut self) {
        fairway::actor::run(self.tree.take().unwrap().shutdown(Duration::from_secs(5)));
    }
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < give_up, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn service_path(name: &str) -> String {
    format!("/api/v1/namespaces/default/services/{name}")
}
fn slice_path(name: &str) -> String {
    format!("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/{name}")
}

fn service(name: &str, ip: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut object = json!({
        "metadata": {"namespace": "default", "name": name, "uid": format!("uid-{name}"), "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]},
    });
    change(&mut object);
    object
}

/// Endpoints by address, the first on this node.
fn slice(of: &str, endpoints: &[&str]) -> Value {
    let endpoint = |(i, ip): (usize, &&str)| json!({"addresses": [ip], "nodeName": if i == 0 { "n1" } else { "n2" }});
    json!({
        "metadata": {"namespace": "default", "name": format!("{of}-1"), "uid": "s", "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4", "ports": [{"port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints.iter().enumerate().map(endpoint).collect::<Vec<_>>(),
    })
}

#[test]
fn services_and_their_endpoints_come_and_go() {
    let api = Api::new();
    let maps = Pinned::default();
    api.put(&service_path("web"), service("web", "10.96.0.1", |_| ()));
    api.put(&slice_path("web-1"), slice("web", &["10.0.1.1", "10.0.2.1"]));
    let agent = Agent::start(&api, &maps);
    until("web has two backends", || maps.counts("10.96.0.1") == [2]);
    // Live: an endpoint, a Service, one that is left to another, one that is taken up again.
    api.put(&slice_path("web-1"), slice("web", &["10.0.1.1", "10.0.2.1", "10.0.2.2"]));
    until("web has three", || maps.counts("10.96.0.1") == [3]);
    api.put(&service_path("db"), service("db", "10.96.0.2", |_| ()));
    until("db is refused", || maps.counts("10.96.0.2") == [0]);
    let other = "service.kubernetes.io/service-proxy-name";
    api.put(&service_path("web"), service("web", "10.96.0.1", |o| o["metadata"]["labels"] = json!({other: "mesh"})));
    until("web is the mesh's", || maps.counts("10.96.0.1").is_empty());
    api.put(&service_path("web"), service("web", "10.96.0.1", |_| ()));
    until("web is ours again", || maps.counts("10.96.0.1") == [3]);
    // A deletion behind the watch's back.
    api.remove(&service_path("db"));
    api.compact();
    until("db is gone", || maps.counts("10.96.0.2").is_empty());
    let status = agent.status();
    assert_eq!((status.services, status.awaited, status.used.backends), (1, None, 3));
    assert_eq!(status.known.endpoints, 3);
    agent.stop();
}

#[test]
fn a_new_run_adopts_the_maps_and_removes_nothing_before_it_knows_all() {
    let mut api = Api::new();
    let maps = Pinned::default();
    for (name, ip, pod) in [("web", "10.96.0.1", "10.0.1.1"), ("db", "10.96.0.2", "10.0.1.2")] {
        api.put(&service_path(name), service(name, ip, |_| ()));
        api.put(&slice_path(&format!("{name}-1")), slice(name, &[pod, "10.0.2.1"]));
    }
    let agent = Agent::start(&api, &maps);
    until("both are carried", || maps.counts("10.96.0.1") == [2] && maps.counts("10.96.0.2") == [2]);
    agent.stop();
    let before = maps.0.lock().tables.clone();
    let writes = maps.writes();

    // The API is away: what is there stays.
    api.down();
    let agent = Agent::start(&api, &maps);
    std::thread::sleep(Duration::from_millis(500));
    assert!(agent.status().awaited.is_some());
    let asked =
        agent.ask(Explain { client: Client::Node, to: "10.96.0.1:80".parse().unwrap(), protocol: Protocol::Tcp });
    assert!(matches!(asked, Err(fairway::actor::AskError::Domain(ExplainError::NotYet(_)))), "{asked:?}");
    assert_eq!(maps.writes(), writes);
    // Meanwhile one has gone; the other is not touched.
    api.remove(&service_path("db"));
    api.remove(&slice_path("db-1"));
    api.up();
    until("db is gone", || maps.counts("10.96.0.2").is_empty());
    let after = maps.0.lock().tables.clone();
    assert!(after.frontends.iter().all(|(k, f)| before.frontends.get(k) == Some(f)));
    assert!(after.backends.iter().all(|(k, b)| before.backends.get(k) == Some(b)), "ids are what they were");
    assert_eq!((after.frontends.len(), after.backends.len()), (1, 2));
    agent.stop();
}

#[test]
fn what_is_wrong_is_said_once_and_leaves_the_others_alone() {
    let api = Api::new();
    let maps = Pinned::default();
    maps.0.lock().capacity.backends = 4;
    api.put(&service_path("web"), service("web", "10.96.0.1", |_| ()));
    api.put(&slice_path("web-1"), slice("web", &["10.0.1.1", "10.0.2.1"]));
    let agent = Agent::start(&api, &maps);
    until("web is carried", || maps.counts("10.96.0.1") == [2]);
    // An impossible port, in a Service that was sound; a slice at odds with itself;
    // an address that is taken; more endpoints than there is room for.
    api.put(&service_path("web"), service("web", "10.96.0.1", |o| o["spec"]["ports"][0]["port"] = json!(70_000)));
    api.put(&slice_path("bad-1"), {
        let mut bad = slice("web", &["10.0.1.9"]);
        bad["metadata"]["name"] = json!("bad-1");
        bad["addressType"] = json!("IPv6");
        bad
    });
    api.put(
        &service_path("thief"),
        service("thief", "10.96.0.3", |o| {
            o["spec"]["externalIPs"] = json!(["10.96.0.1"]);
            o["metadata"]["creationTimestamp"] = json!("2020-01-01T00:00:00Z");
        }),
    );
    api.put(&service_path("big"), service("big", "10.96.0.4", |_| ()));
    api.put(&slice_path("big-1"), slice("big", &["10.0.3.1", "10.0.3.2", "10.0.3.3"]));
    until("all four are told", || agent.status().problem_counts.values().sum::<usize>() == 4);
    let told: Vec<_> = agent.status().problems.iter().map(|p| (p.reason.name(), p.about.to_string())).collect();
    for (reason, about) in [
        ("InvalidService", "default/web"),
        ("InvalidEndpoints", "default/bad-1"),
        ("ServiceAddressConflict", "default/thief"),
        ("ServiceTableFull", "default/big"),
    ] {
        assert!(told.contains(&(reason, about.to_owned())), "{told:?}");
    }
    assert_eq!(maps.counts("10.96.0.1"), [2, 0], "inside web's as it was, outside the other's");
    until("Events tell what this node alone knows, and the leader the rest", || {
        let events = api.store().events();
        let told =
            |name: &str, reason: &str| events.iter().any(|e| e["regarding"]["name"] == name && e["reason"] == reason);
        told("big", "ServiceTableFull") && told("thief", "ServiceAddressConflict") && told("bad-1", "InvalidEndpoints")
    });
    let seen = api.store().events().iter().filter(|e| e["regarding"]["name"] == "big").count();
    assert_eq!(seen, 1);
    // Put right, all is well.
    api.put(&service_path("web"), service("web", "10.96.0.1", |_| ()));
    api.remove(&slice_path("bad-1"));
    api.remove(&service_path("thief"));
    api.put(&slice_path("big-1"), slice("big", &["10.0.3.1"]));
    until("nothing is wrong", || agent.status().problem_counts.is_empty());
    assert_eq!(maps.counts("10.96.0.4"), [1]);
    agent.stop();
}

#[test]
fn maps_that_cannot_be_written_do_not_end_the_agent() {
    let api = Api::new();
    let maps = Pinned::default();
    maps.0.lock().refuse = Some(|_, _| true);
    api.put(&service_path("web"), service("web", "10.96.0.1", |_| ()));
    let agent = Agent::start(&api, &maps);
    until("it says so", || agent.status().awaited.is_some_and(|why| why.contains("cannot be written")));
    maps.0.lock().refuse = None;
    until("it starts over", || maps.counts("10.96.0.1") == [0]);
    until("all is well", || agent.status().awaited.is_none());
    agent.stop();
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn health(port: u16) -> Option<(String, Value)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.split_whitespace().nth(1)?.to_owned(), serde_json::from_str(body).ok()?))
}

#[test]
fn a_health_check_node_port_says_whether_this_node_has_endpoints() {
    let api = Api::new();
    let maps = Pinned::default();
    let port = free_port();
    let local = move |o: &mut Value| {
        o["spec"]["type"] = json!("LoadBalancer");
        o["spec"]["externalTrafficPolicy"] = json!("Local");
        o["spec"]["healthCheckNodePort"] = json!(port);
        o["spec"]["ports"][0]["nodePort"] = json!(30080);
    };
    api.put(&service_path("web"), service("web", "10.96.0.1", local));
    api.put(&slice_path("web-1"), slice("web", &["10.0.1.1", "10.0.2.1"]));
    let agent = Agent::start(&api, &maps);
    until("it is healthy", || health(port).is_some_and(|(code, _)| code == "200"));
    let (_, body) = health(port).unwrap();
    let expected =
        json!({"service": {"namespace": "default", "name": "web"}, "localEndpoints": 1, "serviceProxyHealthy": true});
    assert_eq!(body, expected);
    // One who says nothing does not keep the others from asking.
    let _silent: Vec<_> = (0..10).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let mut elsewhere = slice("web", &["10.0.1.1", "10.0.2.1"]);
    elsewhere["endpoints"][0]["conditions"] = json!({"ready": false});
    api.put(&slice_path("web-1"), elsewhere);
    until("none is here", || health(port).is_some_and(|(code, _)| code == "503"));
    assert_eq!(health(port).unwrap().1["localEndpoints"], 0);
    api.remove(&service_path("web"));
    until("the port is closed", || TcpStream::connect(("127.0.0.1", port)).is_err());
    // A port that somebody else has.
    let taken = std::net::TcpListener::bind(("0.0.0.0", port)).unwrap();
    api.put(&service_path("web"), service("web", "10.96.0.1", local));
    until("it is told", || agent.status().problems.iter().any(|p| p.reason.name() == "HealthCheckPortTaken"));
    drop(taken);
    until("it is bound in the end", || health(port).is_some());
    until("nothing is wrong", || agent.status().problem_counts.is_empty());
    agent.stop();
}

#[test]
fn a_connection_is_explained() {
    let api = Api::new();
    let maps = Pinned::default();
    api.put(
        "/api/v1/namespaces/default/pods/client",
        json!({"metadata": {"namespace": "default", "name": "client", "uid": "c"}, "spec": {"nodeName": "n1", "containers": []},
               "status": {"phase": "Running", "podIP": "10.0.1.77", "podIPs": [{"ip": "10.0.1.77"}]}}),
    );
    api.put(
        &service_path("web"),
        service("web", "10.96.0.1", |o| {
            o["spec"]["type"] = json!("LoadBalancer");
            o["spec"]["externalTrafficPolicy"] = json!("Local");
            o["spec"]["ports"][0]["nodePort"] = json!(30080);
            o["spec"]["loadBalancerSourceRanges"] = json!(["192.0.2.0/24"]);
            o["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}});
        }),
    );
    let mut endpoints = slice("web", &["10.0.1.1", "10.0.2.1", "10.0.2.2"]);
    endpoints["endpoints"][2]["conditions"] = json!({"ready": false});
    api.put(&slice_path("web-1"), endpoints);
    let agent = Agent::start(&api, &maps);
    until("web is carried", || maps.counts("10.96.0.1") == [2]);
    let pod = Client::Pod(PodKey::new("default", "client"));
    until("the pod is known", || {
        agent.ask(Explain { client: pod.clone(), to: "10.96.0.1:80".parse().unwrap(), protocol: Protocol::Tcp }).is_ok()
    });

    let inside = agent.trace(pod.clone(), "10.96.0.1:80");
    assert_eq!((inside.outcome, inside.client.as_str()), (Outcome::Balanced, "pod default/client"));
    assert_eq!(inside.service.unwrap().service.to_string(), "default/web");
    let verdicts: Vec<_> = inside.backends.iter().map(|b| (b.verdict.words(), b.slot.is_some())).collect();
    assert_eq!(verdicts, [("takes new connections", true), ("takes new connections", true), ("not ready", false)]);
    let outside = agent.trace(Client::Outside(Some("192.0.2.9".parse().unwrap())), "203.0.113.1:80");
    assert_eq!(outside.outcome, Outcome::Balanced);
    assert_eq!(outside.backends.iter().filter(|b| b.verdict.chosen()).count(), 1, "of this node alone");
    assert_eq!(outside.service.unwrap().source_ranges, ["192.0.2.0/24"]);
    let denied = agent.trace(Client::Outside(Some("198.51.100.1".parse().unwrap())), "203.0.113.1:80");
    assert_eq!(denied.outcome, Outcome::Dropped);
    assert!(denied.summary.contains("source ranges"), "{}", denied.summary);
    let by_node = agent.trace(Client::Node, "10.0.0.1:30080");
    assert_eq!(by_node.outcome, Outcome::Balanced, "a node port of this node: {}", by_node.summary);

    let port = agent.trace(Client::Node, "10.96.0.1:81");
    assert!(port.outcome == Outcome::NotAService && port.summary.contains("not this port"), "{}", port.summary);
    let scope = agent.trace(Client::Outside(None), "10.96.0.1:80");
    assert!(scope.summary.contains("only from inside"), "{}", scope.summary);
    let nobody = agent.trace(Client::Node, "10.9.9.9:80");
    assert!(nobody.summary.contains("no Service has"), "{}", nobody.summary);
    let unknown = agent.ask(Explain {
        client: Client::Pod(PodKey::new("default", "nobody")),
        to: "10.96.0.1:80".parse().unwrap(),
        protocol: Protocol::Tcp,
    });
    assert!(matches!(unknown, Err(fairway::actor::AskError::Domain(ExplainError::NoSuchPod(_)))));
    api.put(&slice_path("web-1"), slice("web", &[]));
    until("none is left", || agent.trace(pod.clone(), "10.96.0.1:80").outcome == Outcome::Refused);
    agent.stop();
}

#[test]
fn a_node_port_is_on_whatever_addresses_the_node_has() {
    let api = Api::new();
    let maps = Pinned::default();
    api.put(
        &service_path("web"),
        service("web", "10.96.0.1", |o| {
            o["spec"]["type"] = json!("NodePort");
            o["spec"]["ports"][0]["nodePort"] = json!(30080);
        }),
    );
    api.put(&slice_path("web-1"), slice("web", &["10.0.1.1"]));
    let agent = Agent::start(&api, &maps);
    until("inside and outside", || maps.counts("0.0.0.0") == [1, 1]);
    let writes = maps.writes();
    let node = |addresses: &[&str]| {
        let all: Vec<_> = addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
        json!({"metadata": {"name": "n1", "uid": "node-uid"}, "status": {"addresses": all}})
    };
    let traced = |at: &str| agent.trace(Client::Node, at).outcome;
    assert_eq!(traced("10.0.0.2:30080"), Outcome::NotAService);
    api.put(NODE, node(&["10.0.0.1", "10.0.0.2"]));
    until("the new one too", || traced("10.0.0.2:30080") == Outcome::Balanced);
    assert_eq!(maps.writes(), writes, "the kernel side knows the node's addresses by itself");
    agent.stop();
}

#[test]
fn one_endpoint_is_in_the_maps_soon_after_the_watch_has_told() {
    let api = Api::new();
    let maps = Pinned::default();
    let (services, batch) = (300, 4);
    for n in 0..services {
        let name = format!("s{n}");
        api.put(&service_path(&name), service(&name, &format!("10.96.{}.{}", n / 250, n % 250 + 1), |_| ()));
        let pods: Vec<String> = (0..batch).map(|p| format!("10.{p}.{}.{}", n / 250, n % 250 + 1)).collect();
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        api.put(&slice_path(&format!("{name}-1")), slice(&name, &pods));
    }
    let agent = Agent::start(&api, &maps);
    until("all are carried", || maps.0.lock().tables.frontends.len() == services);
    let mut took = Vec::new();
    for n in 0..20 {
        let (began, writes) = (Instant::now(), maps.writes());
        api.put(&slice_path("s7-1"), slice("s7", &["10.0.0.8", "10.1.0.8"][..1 + n % 2]));
        until("it is written", || maps.writes() > writes);
        took.push(began.elapsed());
    }
    took.sort();
    println!("from the API's change to the map, polled each 5 ms: {:?} median, {:?} longest", took[10], took[19]);
    println!("longest look: {} µs", agent.status().longest_us);
    agent.stop();
}
