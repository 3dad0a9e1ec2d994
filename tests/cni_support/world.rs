//! A CniServer whose pool and wirer are probes with a memory.
//!
//! The probes keep the promises of the real actors (a lease per attachment,
//! idempotent steps) and write down what they were asked, so that a test reads
//! who holds what and in which order it came about.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::result_large_err, reason = "the errors are the actors' own")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fairway::actor::{AskError, ChildPolicy, Message, Placement, Port, Registry, Tree};
use fairway::cluster::{self, About, NodeInfo, PodInfo, Publisher, RecordEvent};
use fairway::cni::{CniServer, Config, Ports};
use fairway::model::{AttachmentId, EniRef, Lease, Mac, PodKey, Subnet};
use fairway::netns::{Finding, WireError, Wired};
use fairway::pool::{Allocate, PoolError};
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::shim::{Call, conf};

#[derive(Default)]
pub struct Model {
    pub leases: BTreeMap<AttachmentId, Lease>,
    pub confirmed: BTreeSet<AttachmentId>,
    pub releasing: BTreeSet<AttachmentId>,
    pub wired: BTreeSet<AttachmentId>,
    pub asked: Vec<Allocate>,
    /// `Message sandbox`, in the order they came.
    pub log: Vec<String>,
    pub events: Vec<RecordEvent>,
    pub findings: Vec<Finding>,
    /// Messages that fail, by name, with how often yet.
    pub failing: BTreeMap<&'static str, usize>,
    /// Messages that take this long.
    pub slow: BTreeMap<&'static str, Duration>,
    pub panics: BTreeSet<&'static str>,
    pub pool_error: Option<PoolError>,
    pub wire_error: Option<WireError>,
    pub next: u8,
    /// Conversations at work, and the most there were at once.
    pub inside: BTreeMap<AttachmentId, usize>,
    pub overlapped: bool,
    pub most_at_once: usize,
}

pub type Shared = Arc<Mutex<Model>>;

impl Model {
    fn fails(&mut self, name: &'static str) -> bool {
        match self.failing.get_mut(name) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }

    fn pool_fault(&self) -> PoolError {
        self.pool_error.clone().unwrap_or(PoolError::Waiting { reason: "a test says so".into() })
    }
    fn wire_fault(&self, attachment: &AttachmentId) -> WireError {
        let kernel =
            WireError::Kernel { attachment: attachment.clone(), step: "link".into(), cause: "a test says so".into() };
        self.wire_error.clone().unwrap_or(kernel)
    }

    fn lease(&mut self, asked: &Allocate) -> Lease {
        if let Some(lease) = self.leases.get(&asked.attachment) {
            return lease.clone();
        }
        self.next += 1;
        let lease = Lease {
            attachment: asked.attachment.clone(),
            pod: asked.pod.clone(),
            pod_uid: asked.pod_uid.clone(),
            mode: asked.mode,
            eni: EniRef {
                id: "eni-1".into(),
                mac: Mac([0, 0x16, 0x3e, 0, 0, 1]),
                vswitch: "vsw-1".into(),
                primary4: Ipv4Addr::new(10, 9, 0, 200),
                subnet: Subnet {
                    cidr4: "10.9.0.0/24".parse().unwrap(),
                    gateway4: Ipv4Addr::new(10, 9, 0, 253),
                    cidr6: None,
                    gateway6: None,
                },
            },
            v4: Ipv4Addr::new(10, 9, 0, self.next),
            v6: None,
            netns: asked.netns.clone(),
            bandwidth: asked.bandwidth,
            traffic: Default::default(),
        };
        self.leases.insert(asked.attachment.clone(), lease.clone());
        lease
    }
}

/// A port that answers from the model, after the delay that the test set.
fn port<M: Message>(
    model: &Shared,
    name_of: impl Fn(&M) -> Option<AttachmentId> + Send + Sync + 'static,
    answer: impl Fn(&mut Model, M) -> Result<M::Reply, M::Error> + Send + Sync + 'static,
) -> Port<M> {
    let model = model.clone();
    let answer = Arc::new(answer);
    Port::new("probe", move |message: M, deadline| {
        let id = name_of(&message);
        let (slow, panics) = {
            let mut m = model.lock();
            let sandbox = id.as_ref().map(|i| i.sandbox.to_string()).unwrap_or_default();
            m.log.push(format!("{} {sandbox}", M::NAME));
            if let Some(id) = &id {
                let inside = m.inside.entry(id.clone()).or_default();
                *inside += 1;
                m.overlapped |= m.inside[id] > 1;
                m.most_at_once = m.most_at_once.max(m.inside.values().filter(|n| **n > 0).count());
            }
            (m.slow.get(M::NAME).copied(), m.panics.contains(M::NAME))
        };
        let (model, answer) = (model.clone(), answer.clone());
        Box::pin(async move {
            assert!(!panics, "a test wants this to panic");
            let late = match slow {
                Some(delay) => tokio::time::timeout_at(deadline.instant(), tokio::time::sleep(delay)).await.is_err(),
                None => false,
            };
            let mut m = model.lock();
            if let Some(n) = id.and_then(|id| m.inside.get_mut(&id)) {
                *n -= 1;
            }
            // Like a real actor, it does its work even when nobody waits.
            let result = answer(&mut m, message);
            if late {
                return Err(AskError::Timeout { actor: "probe", message: M::NAME });
            }
            result.map_err(AskError::Domain)
        })
    })
}

macro_rules! pool_port {
    ($model:expr, $message:ident, $m:ident, $x:ident => $answer:expr) => {
        port::<fairway::pool::$message>(
            $model,
            |x| Some(x.attachment.clone()),
            |$m, $x| if $m.fails(stringify!($message)) { Err($m.pool_fault()) } else { $answer },
        )
    };
}

macro_rules! wire_port {
    ($model:expr, $message:ident, $m:ident, $x:ident => $answer:expr) => {
        port::<fairway::netns::$message>(
            $model,
            |x| Some(x.lease.attachment.clone()),
            |$m, $x| {
                if $m.fails(stringify!($message)) { Err($m.wire_fault(&$x.lease.attachment)) } else { $answer }
            },
        )
    };
}

pub fn ports(model: &Shared) -> Ports {
    Ports {
        allocate: pool_port!(model, Allocate, m, x => {
            m.asked.push(x.clone());
            if m.releasing.contains(&x.attachment) {
                return Err(PoolError::BeingReleased(x.attachment));
            }
            Ok(m.lease(&x))
        }),
        confirm: pool_port!(model, Confirm, m, x => { m.confirmed.insert(x.attachment); Ok(()) }),
        begin_release: pool_port!(model, BeginRelease, m, x => {
            let lease = m.leases.get(&x.attachment).cloned();
            if lease.is_some() {
                m.releasing.insert(x.attachment);
            }
            Ok(lease)
        }),
        finish_release: pool_port!(model, FinishRelease, m, x => {
            m.leases.remove(&x.attachment);
            m.confirmed.remove(&x.attachment);
            m.releasing.remove(&x.attachment);
            Ok(())
        }),
        lookup: pool_port!(model, Lookup, m, x => Ok(m.leases.get(&x.attachment).cloned())),
        leases: port::<fairway::pool::Leases>(
            model,
            |_| None,
            |m, _| if m.fails("Leases") { Err(m.pool_fault()) } else { Ok(m.leases.values().cloned().collect()) },
        ),
        wire: wire_port!(model, Wire, m, x => {
            m.wired.insert(x.lease.attachment);
            Ok(Wired { host_ifname: Some("fw0".into()), host_mac: Some(Mac([2; 6])), pod_mac: Mac([4; 6]), mtu: 1500 })
        }),
        unwire: wire_port!(model, Unwire, m, x => { m.wired.remove(&x.lease.attachment); Ok(()) }),
        verify: wire_port!(model, Verify, m, _x => Ok(m.findings.clone())),
        enforce: None,
        record_event: port::<RecordEvent>(
            model,
            |_| None,
            |m, x| {
                m.events.push(x);
                Ok(())
            },
        ),
    }
}

pub struct World {
    pub dir: TempDir,
    pub model: Shared,
    pub publisher: Publisher,
    facts: cluster::Facts,
    pub config: Config,
    tree: Option<Tree>,
    pub registry: Registry,
}

impl World {
    /// Folders and probes; the server is not up yet.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config =
            Config { socket: dir.path().join("cni.sock"), spool_dir: dir.path().join("spool"), ..Config::default() };
        let (publisher, facts) = cluster::facts();
        Self { dir, model: Shared::default(), publisher, facts, config, tree: None, registry: Registry::default() }
    }

    /// With the server up and ready.
    pub fn up() -> Self {
        let mut world = Self::new();
        world.start();
        world.wait_ready();
        world
    }

    pub fn start(&mut self) {
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
        self.registry = tree.registry().clone();
        let (config, model, facts) = (self.config.clone(), self.model.clone(), self.facts.clone());
        tree.child(move || CniServer::open(config.clone(), ports(&model), facts.clone()));
        self.tree = Some(tree);
    }

    pub fn stop(&mut self) {
        if let Some(tree) = self.tree.take() {
            let late = fairway::actor::run(tree.shutdown(Duration::from_secs(5)));
            assert_eq!(late, Vec::<&str>::new());
        }
    }

    pub fn wait_ready(&self) {
        let mut last = None;
        let give_up = Instant::now() + Duration::from_secs(20);
        while last.as_ref().is_none_or(|out: &crate::shim::Outcome| out.exit != 0) {
            assert!(Instant::now() < give_up, "never ready: {last:?} {:?}", self.registry.snapshot());
            last = Some(self.call("STATUS", "").run());
        }
    }

    pub fn conf(&self, version: &str) -> serde_json::Value {
        conf(version, self.dir.path())
    }

    pub fn call(&self, command: &str, sandbox: &str) -> Call {
        Call::new(command, sandbox, &self.conf("1.1.0"))
    }

    pub fn spooled(&self) -> Vec<String> {
        fairway::cni::spool::list(Path::new(&self.config.spool_dir)).unwrap()
    }

    pub fn publish_pod(&self, key: PodKey, info: PodInfo) {
        let mut pods = self.publisher.pods.borrow().as_deref().cloned().unwrap_or_default();
        pods.insert(key, Arc::new(info));
        self.publisher.pods.send_replace(Some(Arc::new(pods)));
    }

    pub fn publish_node(&self, info: NodeInfo) {
        self.publisher.node.send_replace(Some(Arc::new(info)));
    }

    pub fn holders(&self) -> Vec<String> {
        self.model.lock().leases.keys().map(|id| id.sandbox.to_string()).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(tree) = self.tree.take() {
            let _ = fairway::actor::run(tree.shutdown(Duration::from_secs(5)));
        }
    }
}

pub fn id(sandbox: &str) -> AttachmentId {
    AttachmentId { sandbox: sandbox.into(), ifname: "eth0".into() }
}

pub fn about(event: &RecordEvent) -> String {
    match &event.about {
        About::Pod { key, .. } => key.to_string(),
        About::Node => "node".into(),
        About::Service { name, .. } | About::NetworkPolicy { name, .. } | About::EndpointSlice { name, .. } => {
            name.to_string()
        }
    }
}

/// Wait for a state that another process or thread brings about.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < give_up, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
