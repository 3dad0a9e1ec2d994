//! ServiceMap: Services without kube-proxy.
//!
//! Purpose: keeps the kernel's service maps saying what the cluster's Services
//! and EndpointSlices say, seen from this node; answers health check node ports;
//! explains where a connection goes. The maps are pinned: while the agent is
//! away the kernel goes on with what it has, and a new run changes only what
//! differs, and removes nothing before it knows the cluster whole.
//!
//! How it turns: ClusterWatch writes what it sees into the [`index`], which
//! remembers which Services have changed. One look at a time, the worker takes
//! those, compiles them and writes the difference; what changes meanwhile waits
//! in the index, once for each Service.
//!
//! - data: [`model`], [`convert`] (from the API), [`index`], [`maps`]
//! - deciding: [`choose`], [`compile`], [`claims`], [`ids`], [`place`], [`diff`],
//!   [`adopt`], [`book`], [`explain`]
//! - doing: [`sync`], `desk`, [`health`]; told: [`problem`], [`status`], [`figures`], [`told`]
//! - beside Services: [`tend`] collects flows that have ended and ends sockets
//!   whose backend is gone, by [`ages`]; [`pressure`] tells which maps fill up

pub mod adopt;
pub mod ages;
pub mod book;
pub mod choose;
pub mod claims;
pub mod compile;
pub mod convert;
mod desk;
pub mod diff;
pub mod explain;
pub mod figures;
pub mod health;
pub mod ids;
pub mod index;
pub mod maps;
pub mod model;
pub mod place;
pub mod pressure;
pub mod problem;
pub mod status;
pub mod sync;
mod tell;
pub mod tend;
mod tending;
pub mod told;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::actor::{Actor, Ctx, Handles, Message, Port, Responder, StartError, Worker, WorkerGone};
use crate::cluster::{NodeInfo, NodePods, RecordEvent};
use crate::model::PodKey;
use desk::{Desk, Synced};
use explain::{Explanation, Query};
use health::{Answer, HealthPorts};
use index::Index;
use maps::ServiceMaps;
use model::{NodeFacts, Protocol};
use pressure::Pressure;
use problem::{Problem, Reason};
use status::ServiceSnapshot;
use tend::FlowTables;
use tending::Tending;

/// Services that had to go without, and ports that could not be bound, are tried
/// again this often.
const RETRY: Duration = Duration::from_secs(10);

/// The `services` section of the agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Carry Services, in the place of kube-proxy. Two that do so at once are one
    /// too many: where kube-proxy runs, say false or remove it.
    pub enabled: bool,
    /// The root of the machine's cgroup v2 tree; absent: looked for among what is
    /// mounted.
    pub cgroup_root: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self { enabled: true, cgroup_root: None }
    }
}

/// Why a connection goes where it goes.
#[derive(Clone, Debug)]
pub struct Explain {
    pub client: Client,
    pub to: SocketAddr,
    pub protocol: Protocol,
}
impl Message for Explain {
    const NAME: &'static str = "Explain";
    type Reply = Explanation;
    type Error = ExplainError;
}

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client {
    /// A pod of this node.
    Pod(PodKey),
    /// A process of the node itself.
    Node,
    /// Somebody beyond the cluster, by an ENI of this node.
    Outside(Option<IpAddr>),
}

impl std::str::FromStr for Client {
    type Err = String;
    /// `node`, `outside`, `outside=<address>`, `<namespace>/<pod>` or `<pod>`.
    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('=') {
            Some(("outside", ip)) => {
                return ip.parse().map(|ip| Client::Outside(Some(ip))).map_err(|e| format!("{ip:?}: {e}"));
            }
            Some(_) => return Err(format!("{s:?} is no client: want a pod, node, or outside[=address]")),
            None => {}
        }
        Ok(match s {
            "" => return Err("no client: want a pod, node, or outside[=address]".to_owned()),
            "node" => Client::Node,
            "outside" => Client::Outside(None),
            pod => {
                let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
                Client::Pod(PodKey::new(namespace, name))
            }
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    #[error("this node has no pod {0}; `node` and `outside` are clients too")]
    NoSuchPod(PodKey),
    #[error("the Services of the cluster are not known yet: {0}")]
    NotYet(String),
}

/// What is carried, how full the maps are, and what is wrong.
#[derive(Clone, Debug)]
pub struct ServiceStatus {}
impl Message for ServiceStatus {
    const NAME: &'static str = "ServiceStatus";
    type Reply = ServiceSnapshot;
    type Error = std::convert::Infallible;
}

/// Opens the maps, on the worker's thread, for each embodiment anew.
pub type OpenMaps = Arc<dyn Fn() -> Result<Box<dyn ServiceMaps>, String> + Send + Sync>;

/// Opens what the programs fill, on the thread of another worker.
pub type OpenFlows = Arc<dyn Fn() -> Result<Box<dyn FlowTables>, String> + Send + Sync>;

/// Everything the actor is built from, afresh after each failure.
#[derive(Clone)]
pub struct Deps {
    pub node_name: String,
    pub index: Index,
    pub node: watch::Receiver<Option<Arc<NodeInfo>>>,
    pub pods: watch::Receiver<NodePods>,
    /// What is the same on every node is told by one of them.
    pub leader: watch::Receiver<bool>,
    pub record_event: Port<RecordEvent>,
    pub maps: OpenMaps,
    /// None where no programs run.
    pub flows: Option<OpenFlows>,
    /// For metrics; the newest counts.
    pub snapshots: watch::Sender<Arc<ServiceSnapshot>>,
}

pub struct ServiceMap {
    deps: Deps,
    worker: Worker<Desk>,
    tending: Option<Tending>,
    /// A turn of it is in work.
    tends: bool,
    pressure: Pressure,
    node: Arc<NodeFacts>,
    health: HealthPorts,
    told: BTreeSet<Problem>,
    snapshot: ServiceSnapshot,
    synced_at: Option<Instant>,
    /// A look is in work; another is wanted when it ends.
    busy: bool,
    again: bool,
    /// Why the maps cannot be relied on; this embodiment ends soon.
    stalled: Option<String>,
}

impl ServiceMap {
    pub async fn open(deps: Deps) -> Result<Self, StartError> {
        let (open, index) = (deps.maps.clone(), deps.index.clone());
        let worker = Worker::start("services", 64, move || {
            let maps = open()?;
            Desk::open(maps, index).map_err(|e| e.to_string())
        });
        let worker = worker.await.map_err(StartError::new)?;
        let adopted = worker.call(|desk| desk.adopted()).await.map_err(StartError::new)?;
        let tending = tending::start(deps.flows.clone()).await?;
        Ok(Self {
            node: Arc::new(NodeFacts { name: deps.node_name.as_str().into(), ..NodeFacts::default() }),
            deps,
            worker,
            tending,
            tends: false,
            pressure: Pressure::default(),
            health: HealthPorts::default(),
            told: BTreeSet::new(),
            snapshot: ServiceSnapshot { adopted, ..ServiceSnapshot::default() },
            synced_at: None,
            busy: false,
            again: false,
            stalled: None,
        })
    }

    /// Look at what has changed, unless a look is in work (its end looks again).
    fn turn(&mut self, retry: bool, ctx: &mut Ctx<'_, Self>) {
        if self.busy {
            self.again = true;
            return;
        }
        // Without these nothing may be concluded; each of them turns again.
        if !self.deps.index.complete() {
            return;
        }
        let Some(info) = self.deps.node.borrow().clone() else { return };
        self.node = Arc::new(node_facts(&info, &self.node));
        self.busy = true;
        let node = self.node.clone();
        let work = self.worker.call(move |desk| desk.sync(node, retry));
        ctx.spawn(work, |actor, outcome, ctx| {
            actor.busy = false;
            match outcome {
                Ok(Ok(synced)) => {
                    if let Some(synced) = synced {
                        actor.synced(synced, ctx);
                    }
                    if std::mem::take(&mut actor.again) {
                        actor.turn(false, ctx);
                    }
                }
                // What is in the maps is no longer known: begin anew, but not at once.
                // The agent has more to do than this.
                Ok(Err(e)) => {
                    tracing::error!(error = %e, "Services cannot be carried; starting over soon");
                    actor.busy = true;
                    actor.stalled = Some(e.to_string());
                    ctx.after(RETRY, move |_, ctx| ctx.fail(e.to_string()));
                }
                Err(gone) => ctx.fail(gone.to_string()),
            }
        });
    }

    fn synced(&mut self, synced: Synced, ctx: &mut Ctx<'_, Self>) {
        if self.synced_at.is_none() {
            let (services, took) = (synced.services, synced.took.as_millis());
            tracing::info!(services, entries = synced.done.written, took_ms = took, "Services are carried");
        }
        self.synced_at = Some(Instant::now());
        let answers = synced
            .health
            .into_iter()
            .map(|(port, (service, local_ready))| (port, Answer { service, local_ready, healthy: true }));
        let unbound = self.health.set(answers.collect());
        let mut problems = synced.problems;
        problems.extend(unbound.into_iter().map(|(of, why)| Problem::new(&of, "", Reason::HealthCheckPort, why)));
        let s = &mut self.snapshot;
        s.retry = synced.waiting > 0 || problems.iter().any(|p| p.reason == Reason::HealthCheckPort);
        (s.services, s.sets, s.used, s.capacity) = (synced.services, synced.sets, synced.used, synced.capacity);
        s.health_check_ports = self.health.ports().collect();
        s.count_sync(synced.done, synced.took);
        s.set_problems(&problems);
        self.tell(problems, ctx);
        self.read_pressure(ctx);
        self.publish();
        self.backends_gone(synced.gone, ctx);
    }

    fn publish(&self) {
        let snapshot = ServiceSnapshot { awaited: self.awaited(), ..self.snapshot.clone() };
        self.deps.snapshots.send_replace(Arc::new(snapshot));
    }

    fn query(&self, ask: Explain) -> Result<Query, ExplainError> {
        let (client, client_ips, outside) = match ask.client {
            Client::Node => ("the node".to_owned(), self.node.addresses.clone(), false),
            Client::Outside(ip) => {
                let words = ip.map_or("a client outside".to_owned(), |ip| format!("{ip}, outside"));
                (words, ip.into_iter().collect(), true)
            }
            Client::Pod(key) => {
                let pods = self.deps.pods.borrow();
                let pod = pods.as_ref().and_then(|pods| pods.get(&key));
                let Some(pod) = pod else { return Err(ExplainError::NoSuchPod(key)) };
                (format!("pod {key}"), pod.ips.clone(), false)
            }
        };
        Ok(Query { client, client_ips, outside, to: ask.to, protocol: ask.protocol })
    }

    /// What is still awaited before anything can be written.
    fn awaited(&self) -> Option<String> {
        if let Some(why) = &self.stalled {
            return Some(format!("another try: {why}"));
        }
        if self.synced_at.is_some() {
            return None;
        }
        let known = self.deps.index.known();
        Some(match () {
            () if self.deps.node.borrow().is_none() => "the cluster's Node object of this node".to_owned(),
            () if !known.services_complete => "the first full list of Services".to_owned(),
            () if !known.slices_complete => "the first full list of EndpointSlices".to_owned(),
            () => "the first writing of the maps".to_owned(),
        })
    }
}

/// What the tables depend on. A Node whose addresses were wiped keeps those it had.
fn node_facts(info: &NodeInfo, before: &NodeFacts) -> NodeFacts {
    let mut addresses = info.addresses.clone();
    addresses.sort_unstable();
    addresses.dedup();
    NodeFacts {
        name: before.name.clone(),
        zone: info.labels.get(NodeFacts::ZONE).map(|z| z.as_str().into()),
        addresses: if addresses.is_empty() { before.addresses.clone() } else { addresses },
    }
}

impl Actor for ServiceMap {
    const NAME: &'static str = "ServiceMap";

    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        ctx.on_change(self.deps.index.changed(), |actor: &mut Self, _, ctx| actor.turn(false, ctx));
        ctx.on_change(self.deps.node.clone(), |actor: &mut Self, _, ctx| actor.turn(false, ctx));
        ctx.on_change(self.deps.leader.clone(), |actor: &mut Self, leads, ctx| {
            if leads {
                actor.tell_as_leader(ctx);
            }
        });
        self.tend_regularly(ctx);
        ctx.every(RETRY, |actor, ctx| {
            if actor.snapshot.retry {
                actor.turn(true, ctx);
            }
        });
        Ok(())
    }
}

impl Handles<Explain> for ServiceMap {
    fn handle(&mut self, ask: Explain, to: Responder<Explain>, ctx: &mut Ctx<'_, Self>) {
        if let Some(what) = self.awaited() {
            return to.fail(ExplainError::NotYet(format!("waiting for {what}")));
        }
        let query = match self.query(ask) {
            Ok(query) => query,
            Err(e) => return to.fail(e),
        };
        let work = self.worker.call(move |desk| desk.explain(&query));
        ctx.spawn(work, |_, explained, ctx| match explained {
            Ok(explanation) => to.ok(explanation),
            Err(WorkerGone::Full) => to.fail(ExplainError::NotYet("the worker is busy".to_owned())),
            Err(gone) => ctx.fail(gone.to_string()),
        });
    }
}

impl Handles<ServiceStatus> for ServiceMap {
    fn handle(&mut self, _: ServiceStatus, to: Responder<ServiceStatus>, _: &mut Ctx<'_, Self>) {
        let ago = self.synced_at.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        to.ok(ServiceSnapshot {
            awaited: self.awaited(),
            known: self.deps.index.known(),
            synced_ms_ago: ago,
            ..self.snapshot.clone()
        });
    }
}
