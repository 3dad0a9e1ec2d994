//! The whole process wired in one readable function: who starts, in which
//! order, who asks whom, and what ends the process.
//!
//! The order is the request graph read backwards: an actor starts after those
//! it asks. A child that fails is rebuilt alone; one that fails too often ends
//! the process with its reason, and the kernel goes on forwarding meanwhile.
//! Nothing here detaches a program or removes a link: that is what makes a
//! restart invisible to pods.

mod facts;
pub mod programs;
mod ready;
mod takeover;
pub mod trace;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::actor::{AskError, ChildPolicy, Escalation, Handle, Placement, Registry, Tree};
use crate::cloud::{CloudApi, CloudStats};
use crate::cluster::ClusterWatch;
use crate::cni::{self, CniServer};
use crate::config::Config;
use crate::datapath::upgrade::Awaits;
use crate::datapath::{Datapath, DatapathError, Options, cgroup_root};
use crate::debug::{Collect, DebugHttp, Query, View, Views};
use crate::netns::{NetnsWirer, NoPrograms, PodPrograms, Wiring};
use crate::policy::status::PolicySnapshot;
use crate::policy::{self, PolicyCompiler};
use crate::pool::snapshot::PoolSnapshot;
use crate::pool::{self, Audit, Pool};
use crate::service::status::ServiceSnapshot;
use crate::service::{self, ServiceMap};
use programs::Programs;
use takeover::TakeOver;
use trace::Tracer;

/// From SIGTERM to the end of the process.
const SHUTDOWN: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("state folder {path}: {cause}")]
    State { path: std::path::PathBuf, cause: std::io::Error },
    #[error("eBPF programs: {0}")]
    Datapath(#[from] DatapathError),
    #[error("{0}")]
    Wiring(crate::netns::BadConfig),
    #[error("signals: {0}")]
    Signals(std::io::Error),
    #[error("{0}")]
    Escalated(#[from] Escalation),
}

/// Run the agent until it is told to stop or an actor has failed too often.
pub async fn run(config: Config) -> Result<(), AgentError> {
    let mut stop = Stop::listen().map_err(AgentError::Signals)?;
    std::fs::create_dir_all(&config.state_dir)
        .map_err(|cause| AgentError::State { path: config.state_dir.clone(), cause })?;
    let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());

    // The cluster: facts outlive the actor that publishes them.
    let (publisher, facts) = crate::cluster::facts();
    let cluster: Handle<ClusterWatch> = tree.child({
        // Without programs nobody would read the maps.
        let services = config.services.enabled && config.bpffs.is_some();
        let policies = config.policies.enabled && config.bpffs.is_some();
        let cluster =
            crate::cluster::Config { node_name: config.node.clone(), services, policies, ..config.cluster.clone() };
        let facts = facts.clone();
        move || ClusterWatch::open(cluster.clone(), publisher.clone(), facts.clone())
    });

    // The cloud.
    let stats = CloudStats::default();
    let cloud: Handle<CloudApi> = tree.child({
        let (config, stats) = (config.cloud.clone(), stats.clone());
        move || {
            let (config, stats) = (config.clone(), stats.clone());
            async move { CloudApi::new(&config, stats).await }
        }
    });

    // The kernel.
    let opened = match &config.bpffs {
        Some(bpffs) => Some(open_datapath(bpffs, &config)?),
        None => None,
    };
    let awaits = opened.as_ref().map(|(_, awaits)| *awaits).unwrap_or_default();
    let programs = opened.map(|(programs, _)| programs);
    let hooks: Arc<dyn PodPrograms> = match &programs {
        Some(programs) => programs.clone(),
        None => Arc::new(NoPrograms),
    };
    let wiring = Wiring::new(config.netns.clone(), hooks).map_err(AgentError::Wiring)?;
    // These three are a pod's start and end, and talk to each other all the time.
    let kubelets = tree.together("kubelet");
    let netns: Handle<NetnsWirer> = tree.child_in(&kubelets, move || NetnsWirer::open(wiring.clone()));

    // The addresses.
    let (bound_sender, bound) = watch::channel(None);
    let (snapshots, snapshot) = watch::channel(Arc::new(PoolSnapshot::default()));
    let deps = pool::Deps {
        config: config.pool.clone(),
        ledger: pool::LedgerPlace::Folder(config.state_dir.join("ledger")),
        cloud: cloud_ports(&cloud),
        netns: netns_ports(&netns),
        bound,
        elected: facts.leader.clone(),
        snapshots,
    };
    let pool: Handle<Pool> = tree.child_in(&kubelets, move || Pool::start(deps.clone()));
    actor_free_task(facts::bound_pods(facts.clone(), config.cni.default_mode, bound_sender));
    actor_free_task(facts::node_status(snapshot.clone(), cluster.port()));

    // Services.
    let (service_sender, service_figures) = watch::channel(Arc::new(ServiceSnapshot::default()));
    let carried = programs.clone().filter(|_| carries_services(&config));
    let services: Option<Handle<ServiceMap>> = carried.map(|programs| {
        let deps = service::Deps {
            node_name: config.node.clone(),
            index: facts.services.clone(),
            node: facts.node.clone(),
            pods: facts.pods.clone(),
            leader: facts.leader.clone(),
            record_event: cluster.port(),
            maps: service_maps(programs.clone()),
            flows: Some(flow_tables(programs)),
            snapshots: service_sender,
        };
        tree.child(move || ServiceMap::open(deps.clone()))
    });
    // Policies.
    let (policy_sender, policy_figures) = watch::channel(Arc::new(PolicySnapshot::default()));
    let enforced = programs.clone().filter(|_| enforces_policies(&config));
    let policies: Option<Handle<PolicyCompiler>> = enforced.map(|programs| {
        let deps = policy::Deps {
            index: facts.policies.clone(),
            leases: pool.port(),
            leader: facts.leader.clone(),
            record_event: cluster.port(),
            maps: policy_maps(programs),
            memory: Some(config.state_dir.join("policies.json")),
            snapshots: policy_sender,
        };
        tree.child(move || PolicyCompiler::open(deps.clone()))
    });
    if let Some(programs) = programs.clone() {
        let take_over = TakeOver {
            programs,
            awaits,
            pool: snapshot.clone(),
            services: services.is_some().then(|| service_figures.clone()),
            policies: policies.is_some().then(|| policy_figures.clone()),
            leases: pool.port(),
            wire: netns.port(),
            enforce: policies.as_ref().map(Handle::port),
        };
        actor_free_task(take_over.run());
    }

    // Kubelet.
    let ports = cni_ports(&pool, &netns, policies.as_ref(), &cluster);
    let server: Handle<CniServer> = tree.child_in(&kubelets, {
        let (config, facts) = (config.cni.clone(), facts.clone());
        move || CniServer::open(config.clone(), ports.clone(), facts.clone())
    });

    // Whoever looks.
    let mut views = views(&tree, &stats, &snapshot, programs.clone(), &pool, &server, &cluster);
    views.ready.extend(programs.map(ready::programs));
    views.ready.push(ready::cni(config.cni.socket.clone()));
    if let Some(services) = &services {
        service_views(&mut views, services, &service_figures);
    }
    if let Some(policies) = &policies {
        policy_views(&mut views, policies, &policy_figures);
    }
    let tracer =
        Tracer { services: services.as_ref().map(Handle::port), policies: policies.as_ref().map(Handle::port) };
    views.queries.insert("trace", trace_query(tracer));
    let _: Handle<DebugHttp> = tree.child({
        let config = config.debug.clone();
        move || DebugHttp::bind(config.clone(), views.clone())
    });

    actor_free_task(forget_start(snapshot));
    tracing::info!(node = config.node, version = env!("CARGO_PKG_VERSION"), "Agent started");
    let outcome = tokio::select! {
        signal = stop.wait() => {
            tracing::info!(signal, "Stopping");
            Ok(())
        }
        escalation = tree.escalation() => Err(escalation.into()),
    };
    // A second signal ends the process at once.
    let late = tokio::select! {
        late = tree.shutdown(SHUTDOWN) => late,
        _ = stop.wait() => Vec::new(),
    };
    if !late.is_empty() {
        tracing::warn!(actors = late.join(", "), "Not stopped in time; their state is in the ledger");
    }
    outcome
}

/// What was needed to get here is not needed to go on.
async fn forget_start(mut snapshot: watch::Receiver<Arc<PoolSnapshot>>) {
    if snapshot.wait_for(|pool| pool.reconciled).await.is_ok() {
        crate::sys::memory::forget_text();
    }
}

/// Work beside the actors that only carries a fact from one to another.
fn actor_free_task(work: impl Future<Output = ()> + 'static) {
    tokio::task::spawn_local(work);
}

struct Stop {
    term: Signal,
    int: Signal,
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }
    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

/// Without a cluster there are none to carry.
fn carries_services(config: &Config) -> bool {
    config.services.enabled && config.cluster.source != crate::cluster::Source::Disabled
}

/// As with Services.
fn enforces_policies(config: &Config) -> bool {
    config.policies.enabled && config.cluster.source != crate::cluster::Source::Disabled
}

fn open_datapath(bpffs: &std::path::Path, config: &Config) -> Result<(Arc<Programs>, Awaits), AgentError> {
    let (mut datapath, adoption) = Datapath::open_as(bpffs, Options::default(), takeover::layout())?;
    if config.services.enabled {
        let root = cgroup_root(config.services.cgroup_root.as_deref())?;
        datapath.attach_sockets(&root)?;
    } else {
        datapath.detach_sockets()?;
    }
    if config.policies.enabled {
        datapath.attach_guard(&cgroup_root(config.services.cgroup_root.as_deref())?)?;
    }
    tracing::info!(
        adopted = adoption.adopted.len(),
        collected = adoption.collected.len(),
        rotated = ?adoption.rotated,
        sockets = datapath.socket_doors().len(),
        "eBPF programs loaded"
    );
    let programs = Programs::new(datapath, config.fast_path.unwrap_or(config.services.enabled));
    let programs = if config.services.enabled { programs } else { programs.without_services() };
    Ok((Arc::new(programs), adoption.awaits))
}

fn cloud_ports(cloud: &Handle<CloudApi>) -> pool::CloudPorts {
    pool::CloudPorts {
        who_am_i: cloud.port(),
        instance_type: cloud.port(),
        vswitches: cloud.port(),
        enis: cloud.port(),
        create: cloud.port(),
        attach: cloud.port(),
        detach: cloud.port(),
        delete: cloud.port(),
        assign4: cloud.port(),
        unassign4: cloud.port(),
        assign6: cloud.port(),
        unassign6: cloud.port(),
    }
}

fn netns_ports(netns: &Handle<NetnsWirer>) -> pool::NetnsPorts {
    pool::NetnsPorts { prepare: netns.port(), forget: netns.port(), unwire: netns.port(), inventory: netns.port() }
}

fn cni_ports(
    pool: &Handle<Pool>,
    netns: &Handle<NetnsWirer>,
    policies: Option<&Handle<PolicyCompiler>>,
    cluster: &Handle<ClusterWatch>,
) -> cni::Ports {
    cni::Ports {
        allocate: pool.port(),
        confirm: pool.port(),
        begin_release: pool.port(),
        finish_release: pool.port(),
        lookup: pool.port(),
        leases: pool.port(),
        wire: netns.port(),
        unwire: netns.port(),
        verify: netns.port(),
        enforce: policies.map(Handle::port),
        record_event: cluster.port(),
    }
}

fn views(
    tree: &Tree,
    stats: &CloudStats,
    snapshot: &watch::Receiver<Arc<PoolSnapshot>>,
    programs: Option<Arc<Programs>>,
    pool: &Handle<Pool>,
    server: &Handle<CniServer>,
    cluster: &Handle<ClusterWatch>,
) -> Views {
    let view = |f: Box<dyn Fn() -> serde_json::Value + Send + Sync>| -> View { Arc::from(f) };
    let to_json =
        |v: Result<serde_json::Value, serde_json::Error>| v.unwrap_or_else(|e| json!({ "error": e.to_string() }));
    let pool_seen = snapshot.clone();
    let cloud_seen = stats.clone();
    let views = BTreeMap::from([
        ("pool", view(Box::new(move || to_json(serde_json::to_value(&**pool_seen.borrow()))))),
        ("cloud", view(Box::new(move || to_json(serde_json::to_value(cloud_seen.snapshot()))))),
        ("endpoints", view(Box::new(move || programs.as_ref().map_or_else(|| json!([]), |programs| programs.view())))),
    ]);
    let queries = BTreeMap::from([
        ("audit", query(pool, || Audit {})),
        ("cni", query(server, || cni::CniStatus {})),
        ("cluster", query(cluster, || crate::cluster::ClusterStatus {})),
    ]);
    let ready = vec![ready::pool(snapshot.clone())];
    let metrics: Vec<Collect> = facts::metrics(stats, snapshot);
    Views { actors: tree.registry().clone(), views, queries, ready, metrics }
}

/// The maps that ServiceMap writes to: those that the programs read.
fn service_maps(programs: Arc<Programs>) -> service::OpenMaps {
    Arc::new(move || Ok(Box::new(programs.service_maps()?)))
}

/// The tables that PolicyCompiler writes to.
fn policy_maps(programs: Arc<Programs>) -> policy::OpenMaps {
    Arc::new(move || Ok(Box::new(programs.policy_maps()?)))
}

/// What those programs fill themselves.
fn flow_tables(programs: Arc<Programs>) -> service::OpenFlows {
    Arc::new(move || Ok(Box::new(programs.flow_tables()?)))
}

fn service_views(views: &mut Views, services: &Handle<ServiceMap>, figures: &watch::Receiver<Arc<ServiceSnapshot>>) {
    views.queries.insert("services", query(services, || service::ServiceStatus {}));
    views.ready.push(ready::services(figures.clone()));
    let figures = figures.clone();
    views.metrics.push(Arc::new(move |registry| service::figures::collect(&figures.borrow(), registry)));
}

fn policy_views(views: &mut Views, policies: &Handle<PolicyCompiler>, figures: &watch::Receiver<Arc<PolicySnapshot>>) {
    views.queries.insert("policies", query(policies, || policy::PolicyStatus {}));
    let figures = figures.clone();
    views.metrics.push(Arc::new(move |registry| policy::figures::collect(&figures.borrow(), registry)));
}

fn trace_query(tracer: Tracer) -> Query {
    Arc::new(move |arguments, deadline| {
        let tracer = tracer.clone();
        Box::pin(async move {
            let traced = tracer.trace(&arguments, deadline).await?;
            serde_json::to_value(traced).map_err(|e| e.to_string())
        })
    })
}

/// A view that asks an actor.
fn query<A, M>(of: &Handle<A>, message: impl Fn() -> M + Send + Sync + 'static) -> Query
where
    A: crate::actor::Handles<M>,
    M: crate::actor::Message<Reply: serde::Serialize, Error: std::fmt::Display>,
{
    let port = of.port::<M>();
    Arc::new(move |_, deadline| {
        let asked = port.clone();
        let message = message();
        Box::pin(async move {
            let reply = asked.ask(message, deadline).await.map_err(|e: AskError<M::Error>| e.to_string())?;
            serde_json::to_value(reply).map_err(|e| e.to_string())
        })
    })
}
