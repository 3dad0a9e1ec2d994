//! A Kubernetes API server for the lab: in memory, for the kinds Fairway and
//! ordinary manifests use, well enough for kube-rs and for a real `kubectl`.
//!
//! [`KubeLab::start`] serves it on listeners that the caller has bound (one in
//! the VPC router's namespace, one on the host's loopback) and runs the
//! [`controllers`](super::controllers) beside it. In-process callers use
//! [`KubeLab`]'s methods; they are the same operations as over HTTP.
//!
//! - [`registry`]: what every operation means; owns the [`store`]
//! - [`http`]: paths, formats, watches
//! - [`kind`]: the table of kinds; [`defaults`], [`validate`], [`services`]: admission
//! - [`patch`]: JSON, merge and strategic patches, server-side apply
//! - [`selector`], [`table`], [`discovery`], [`openapi`], [`protobuf`]

pub mod defaults;
pub mod discovery;
pub mod error;
pub mod events;
pub mod http;
pub mod kind;
pub mod object;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub mod quantity;
pub mod registry;
pub mod selector;
pub mod services;
pub mod store;
pub mod table;
pub mod validate;

use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use error::ApiError;
use http::{Counters, Server};
use kind::named;
use registry::{Ctx, DeleteOptions, Filter, PatchKind, Registry, Sub, WatchStart, Watcher, Written};

/// How the stand-in behaves.
#[derive(Clone, Debug)]
pub struct KubeConfig {
    /// Where Services get addresses: one range per family, the primary first.
    pub service_cidrs: Vec<IpNet>,
    pub node_ports: RangeInclusive<u16>,
    /// Changes remembered per kind; a watcher further behind must list again.
    pub history: usize,
    /// How often a quiet watch hears a bookmark.
    pub bookmark_every: Duration,
    /// Run the controllers and the scheduler.
    pub controllers: bool,
    /// What the `kubernetes` Service in `default` leads to.
    pub advertise: Vec<SocketAddr>,
}

impl Default for KubeConfig {
    fn default() -> Self {
        let v4 = IpNet::V4(ipnet::Ipv4Net::new_assert([172, 21, 0, 0].into(), 16));
        let v6 = IpNet::V6(ipnet::Ipv6Net::new_assert([0xfd00, 0x21, 0, 0, 0, 0, 0, 0].into(), 108));
        Self {
            service_cidrs: vec![v4, v6],
            node_ports: 30_000..=32_767,
            history: 20_000,
            bookmark_every: Duration::from_secs(10),
            controllers: true,
            advertise: Vec::new(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KubeLabError {
    #[error("cannot serve the Kubernetes API on {address}: {source}")]
    Listen { address: String, source: std::io::Error },
    #[error("service_cidrs: {0}; give one range per address family, for example 172.21.0.0/16")]
    ServiceCidrs(String),
    #[error("cannot set up the cluster's own objects: {0}")]
    Bootstrap(#[from] ApiError),
}

/// A running stand-in. Dropping it stops it at once; [`KubeLab::stop`] in order.
pub struct KubeLab {
    server: Arc<Server>,
    addresses: Vec<SocketAddr>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

/// How long open connections may take to end.
const STOP_TIME: Duration = Duration::from_secs(3);

impl KubeLab {
    /// Serve on `listeners`. Must be called within a tokio runtime.
    pub fn start(config: KubeConfig, listeners: Vec<TcpListener>) -> Result<Self, KubeLabError> {
        check_ranges(&config.service_cidrs)?;
        let registry = Registry::new(&config);
        let (stop, stopped) = watch::channel(false);
        let server = Arc::new(Server {
            registry: registry.clone(),
            bookmark_every: config.bookmark_every,
            stop: stopped.clone(),
            counters: Counters::default(),
        });
        let mut tasks = JoinSet::new();
        let mut addresses = Vec::new();
        for listener in listeners {
            let failed = |source| KubeLabError::Listen {
                address: listener.local_addr().map_or_else(|_| "a closed socket".into(), |a| a.to_string()),
                source,
            };
            let address = listener.local_addr().map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            let listener = tokio::net::TcpListener::from_std(listener)
                .map_err(|source| KubeLabError::Listen { address: address.to_string(), source })?;
            addresses.push(address);
            let mut stopped = stopped.clone();
            let serve = axum::serve(listener, http::router(server.clone())).with_graceful_shutdown(async move {
                let _ = stopped.wait_for(|stop| *stop).await;
            });
            tasks.spawn(async move {
                if let Err(error) = serve.await {
                    tracing::error!(%address, %error, "The Kubernetes API stand-in ended");
                }
            });
        }
        bootstrap(&registry, &config, &addresses)?;
        if config.controllers {
            super::controllers::spawn(&registry, &stopped, &mut tasks);
        }
        Ok(Self { server, addresses, stop, tasks })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The operations themselves, for reports and for the lab's kubelet.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.server.registry
    }

    /// One more controller, until the stand-in stops.
    pub fn run(&mut self, controller: impl super::controllers::Controller) {
        let ended = self.stop.subscribe();
        self.tasks.spawn(super::controllers::run(controller, self.registry().clone(), ended));
    }

    /// Create or change an object so that it is as `object` says.
    pub fn apply(&self, object: Value) -> Result<Written, ApiError> {
        let (api_version, word) = (object::text(&object, "/apiVersion"), object::text(&object, "/kind"));
        let kind = kind::by_gvk(api_version, word)
            .ok_or_else(|| ApiError::bad_request(format!("no kind \"{word}\" in version \"{api_version}\"")))?;
        let ctx = Ctx::new("fairway-lab");
        let namespace = match object::namespace(&object) {
            _ if !kind.namespaced => String::new(),
            "" => "default".to_owned(),
            namespace => namespace.to_owned(),
        };
        let name = object::name(&object).to_owned();
        if name.is_empty() {
            return self.registry().create(&ctx, kind, &namespace, object);
        }
        self.registry().patch(&ctx, kind, (&namespace, &name), Sub::Main, PatchKind::Apply(true), &object)
    }

    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
        self.registry().find(named(kind), namespace, name)
    }

    /// All objects of a kind, in all namespaces.
    pub fn list(&self, kind: &str) -> Vec<Arc<Value>> {
        self.registry().all(named(kind), &Filter::default())
    }

    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<bool, ApiError> {
        let options = DeleteOptions::default();
        let deleted = self.registry().delete(&Ctx::new("fairway-lab"), named(kind), namespace, name, &options)?;
        Ok(deleted.gone)
    }

    /// The present state, then changes.
    pub fn watch(&self, kind: &str, filter: Filter) -> Result<Watcher, ApiError> {
        self.registry().watch(named(kind), filter, WatchStart::State)
    }

    /// End every open watch; `abruptly` breaks the connections.
    pub fn cut_watches(&self, abruptly: bool) {
        self.registry().cut_watches(abruptly);
    }

    /// Forget the history: watchers that resume are told 410.
    pub fn compact(&self) {
        self.registry().compact();
    }

    /// Refuse every request over HTTP until it is set back.
    pub fn set_away(&self, away: bool) {
        self.server.counters.away.store(away, Ordering::Relaxed);
        if away {
            self.registry().cut_watches(true);
        }
    }

    /// Objects by kind, requests by `client verb resource`, open watches.
    pub fn stats(&self) -> Value {
        http::stats(&self.server)
    }

    /// End in order: no new requests, watches end, the controllers stop.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let ended = tokio::time::timeout(STOP_TIME, async { while self.tasks.join_next().await.is_some() {} });
        if ended.await.is_err() {
            tracing::warn!("Connections to the Kubernetes API stand-in were broken off");
            self.tasks.shutdown().await;
        }
    }
}

impl Drop for KubeLab {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

fn check_ranges(ranges: &[IpNet]) -> Result<(), KubeLabError> {
    let fail = |text: String| Err(KubeLabError::ServiceCidrs(text));
    match ranges {
        [] => fail("empty".into()),
        [_, _, _, ..] => fail("more than two".into()),
        [a, b] if a.addr().is_ipv4() == b.addr().is_ipv4() => fail(format!("{a} and {b} are of one family")),
        all => match all.iter().find(|net| net.max_prefix_len() - net.prefix_len() < 4) {
            Some(small) => fail(format!("{small} is too small")),
            None => Ok(()),
        },
    }
}

/// The objects that every cluster has.
fn bootstrap(registry: &Registry, config: &KubeConfig, addresses: &[SocketAddr]) -> Result<(), ApiError> {
    let ctx = Ctx::new("fairway-lab");
    let (namespaces, accounts) = (named("Namespace"), named("ServiceAccount"));
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        registry.create(&ctx, namespaces, "", json!({"metadata": {"name": name}}))?;
        registry.create(&ctx, accounts, name, json!({"metadata": {"name": "default"}}))?;
    }
    let advertised = if config.advertise.is_empty() { addresses } else { &config.advertise };
    let Some(first) = registry.first_service_address() else { return Ok(()) };
    let target = advertised.iter().find(|a| a.is_ipv4() == first.is_ipv4());
    let port = target.map_or(6443, |a| a.port());
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": first.to_string(),
                 "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]},
    });
    registry.create(&ctx, named("Service"), "default", service)?;
    let endpoints: Vec<Value> = advertised
        .iter()
        .filter(|a| a.is_ipv4() == first.is_ipv4() && a.port() == port)
        .map(|a| json!({"addresses": [a.ip().to_string()], "conditions": {"ready": true}}))
        .collect();
    let slice = json!({
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if first.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": endpoints, "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    });
    registry.create(&ctx, named("EndpointSlice"), "default", slice)?;
    Ok(())
}

/// A kubeconfig with which `kubectl` and the agent reach a stand-in at `address`.
pub fn kubeconfig(address: SocketAddr) -> String {
    let server = format!("http://{address}");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "fairway-lab",
        "clusters": [{"name": "fairway-lab", "cluster": {"server": server}}],
        "contexts": [{"name": "fairway-lab", "context": {"cluster": "fairway-lab", "user": "fairway-lab"}}],
        "users": [{"name": "fairway-lab", "user": {}}],
    });
    // JSON is YAML.
    format!("{config:#}\n")
}
