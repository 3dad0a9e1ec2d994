//! `fairway lab cloud`: the simulated cloud on its own.
//!
//! Purpose: API, metadata service and admin interface for nodes that somebody
//! else runs: network namespaces named in the configuration or registered over
//! HTTP. Owner: `main`. Invariant: returns on SIGINT or SIGTERM after an orderly
//! end, the nodes' ENIs detached.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::{ApiError, CloudConfig, CloudLab, Listeners, RegisterInstance, Resolver, Running, StartError};
use crate::lab::fabric::Fabric;

/// Where to listen and what to serve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeConfig {
    pub cloud: CloudConfig,
    pub https: Option<SocketAddr>,
    pub http: Option<SocketAddr>,
    pub metadata: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
    /// The CA's certificate is written here for clients to trust.
    pub ca_file: Option<PathBuf>,
    /// Registered at the start.
    pub nodes: Vec<RegisterInstance>,
    /// Peers of the metadata service that do not come from an ENI's address:
    /// address → instance, for an agent outside the simulated VPC.
    pub peers: BTreeMap<IpAddr, String>,
}

impl Default for ServeConfig {
    fn default() -> Self {
        let local = |port| Some(SocketAddr::from(([127, 0, 0, 1], port)));
        Self {
            cloud: CloudConfig::default(),
            https: local(7443),
            http: None,
            metadata: local(7480),
            admin: local(7490),
            ca_file: None,
            nodes: Vec::new(),
            peers: BTreeMap::new(),
        }
    }
}

/// The stand-alone cloud could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(
        "cannot listen on {address} for {what}: {cause}; is another lab running, or the address not this machine's?"
    )]
    Bind { what: &'static str, address: SocketAddr, cause: std::io::Error },
    #[error("cannot write the CA to {path}: {cause}")]
    CaFile { path: PathBuf, cause: std::io::Error },
    #[error("cannot register node {node}: {cause}")]
    Node { node: String, cause: ApiError },
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
}

fn bind(what: &'static str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, ServeError> {
    let bind = |address| TcpListener::bind(address).map_err(|cause| ServeError::Bind { what, address, cause });
    address.map(bind).transpose()
}

/// Serves until SIGINT or SIGTERM. `ready` is called once everything listens
/// and the configured nodes are registered.
pub async fn serve(
    config: ServeConfig,
    fabric: Arc<dyn Fabric>,
    ready: impl FnOnce(&Running),
) -> Result<(), ServeError> {
    serve_also(config, Listeners::default(), fabric, ready).await
}

/// As [`serve`], on the further listeners of `more` too.
pub async fn serve_also(
    config: ServeConfig,
    more: Listeners,
    fabric: Arc<dyn Fabric>,
    ready: impl FnOnce(&Running),
) -> Result<(), ServeError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let listeners = Listeners {
        https: bind("https", config.https)?,
        http: bind("http", config.http)?,
        metadata: bind("metadata", config.metadata)?,
        admin: bind("admin", config.admin)?,
        resolver: Resolver::Peers(config.peers),
        ..more
    };
    let running = CloudLab::start(config.cloud, fabric, listeners)?;
    let started = prepare(&running, config.ca_file, &config.nodes).await;
    if started.is_ok() {
        ready(&running);
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
    running.retire().await;
    started
}

async fn prepare(running: &Running, ca_file: Option<PathBuf>, nodes: &[RegisterInstance]) -> Result<(), ServeError> {
    if let (Some(path), Some(pem)) = (ca_file, running.cloud.ca_pem()) {
        std::fs::write(&path, pem).map_err(|cause| ServeError::CaFile { path, cause })?;
    }
    for node in nodes {
        let registered = running.cloud.register_instance(node).await;
        registered.map_err(|cause| ServeError::Node { node: node.instance_id.clone(), cause })?;
    }
    Ok(())
}
