//! The simulated cloud: API, metadata service, injected faults.
//!
//! Purpose: be the cloud that the agent meets: the real API over HTTPS with the
//! real parameters, answers, errors, quotas, throttling and latencies, and the
//! metadata service that lags behind it. Effects become real through
//! [`Fabric`]. Owner: the lab. It shares no wire or signing code with the agent;
//! Alibaba's own SDK and its recorded requests judge both.
//!
//! - `config`, `catalog`: what the cloud is made of
//! - `state`: the pure core, every ENI and address
//! - `throttle`, `faults`, `idempotency`, `credentials`, `signature`, `params`,
//!   `calls`: the other pure parts
//! - `engine`: the core made to happen, with latencies and the fabric
//! - `actions`, `render`: parameters in, answers out
//! - `api`, `metadata`, `admin`: the three servers, on `http` and `tls`
//! - `standalone`: `fairway lab cloud`

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_rustls::TlsAcceptor;

use self::engine::Engine;
use crate::lab::fabric::{EniPort, Fabric};

mod actions;
mod admin;
mod api;
mod calls;
pub mod catalog;
pub mod config;
mod credentials;
mod engine;
mod error;
pub mod faults;
mod http;
mod idempotency;
pub mod metadata;
pub(crate) mod params;
mod render;
pub(crate) mod signature;
mod standalone;
pub mod state;
mod throttle;
mod tls;

pub(crate) use actions::read_all;
pub use calls::{Call, CallReport};
pub use config::{AccessKey, CloudConfig, ConfigError, Latencies, ThrottleConfig, VSwitchSpec};
pub use error::ApiError;
pub use faults::{ActiveFault, Fault, FaultSpec};
pub use metadata::server::Resolver;
pub use standalone::{ServeConfig, ServeError, serve, serve_also};
pub use state::{Eni, EniKind, EniStatus, Instance, RegisterInstance};
pub use tls::{LabCa, TlsError};

/// Sockets the caller has bound, in whatever namespace they belong to.
#[derive(Default)]
pub struct Listeners {
    /// The API with TLS, as the real one.
    pub https: Option<TcpListener>,
    /// The API without.
    pub http: Option<TcpListener>,
    pub metadata: Option<TcpListener>,
    pub admin: Option<TcpListener>,
    /// As `https` and `metadata`, in further namespaces.
    pub more_https: Vec<TcpListener>,
    pub more_metadata: Vec<TcpListener>,
    /// Signs the server's certificate; made when absent and needed.
    pub ca: Option<Arc<LabCa>>,
    /// Who asks the metadata service.
    pub resolver: Resolver,
}

/// The cloud could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("listener {what}: {cause}")]
    Listener { what: &'static str, cause: std::io::Error },
}

/// A registered instance and its primary ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    pub instance: Instance,
    pub primary: EniPort,
}

/// One vSwitch in a [`StateDump`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VSwitchDump {
    pub spec: VSwitchSpec,
    pub capacity: u32,
    /// As DescribeVSwitches tells it.
    pub available: u32,
}

/// Everything the cloud knows, for audits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateDump {
    pub now_ms: u64,
    pub region: String,
    pub vpc_id: String,
    pub vswitches: Vec<VSwitchDump>,
    pub instances: Vec<Instance>,
    pub enis: Vec<Eni>,
    /// What the packet side could not do.
    pub fabric_errors: Vec<String>,
}

/// A handle on a running cloud; what `/lab/…` does, in process.
#[derive(Clone)]
pub struct CloudLab {
    engine: Arc<Engine>,
    ca: Option<Arc<LabCa>>,
}

/// A running cloud. Dropping it leaves it running until the runtime ends;
/// [`Running::shutdown`] ends it.
pub struct Running {
    pub cloud: CloudLab,
    pub https: Option<SocketAddr>,
    pub http: Option<SocketAddr>,
    pub metadata: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
}

impl CloudLab {
    /// Starts serving. Must be called within a tokio runtime.
    pub fn start(config: CloudConfig, fabric: Arc<dyn Fabric>, listeners: Listeners) -> Result<Running, StartError> {
        config.validate()?;
        let mut ca = listeners.ca;
        if ca.is_none() && (listeners.https.is_some() || !listeners.more_https.is_empty()) {
            ca = Some(Arc::new(LabCa::generate("Fairway lab CA")?));
        }
        let tls = match &ca {
            Some(ca) => Some(TlsAcceptor::from(ca.server(&names(&config))?)),
            None => None,
        };
        let engine = Engine::new(config, fabric);
        let cloud = CloudLab { engine: engine.clone(), ca };
        let api = Arc::new(api::ApiServer { engine: engine.clone() });
        let metadata = Arc::new(metadata::server::MetadataServer::new(engine.clone(), listeners.resolver));
        let admin = Arc::new(admin::AdminServer { lab: cloud.clone() });
        for listener in listeners.more_https {
            spawn(&engine, "https", Some(listener), tls.clone(), api.clone())?;
        }
        for listener in listeners.more_metadata {
            spawn(&engine, "metadata", Some(listener), None, metadata.clone())?;
        }
        let running = Running {
            https: spawn(&engine, "https", listeners.https, tls, api.clone())?,
            http: spawn(&engine, "http", listeners.http, None, api)?,
            metadata: spawn(&engine, "metadata", listeners.metadata, None, metadata)?,
            admin: spawn(&engine, "admin", listeners.admin, None, admin)?,
            cloud,
        };
        Ok(running)
    }

    /// Creates the instance's primary ENI and attaches it through the fabric.
    pub async fn register_instance(&self, spec: &RegisterInstance) -> Result<Registered, ApiError> {
        let instance = self.engine.register(spec).await?;
        let port = self.engine.world().account.port(&instance.primary_eni);
        let primary = port.ok_or_else(|| ApiError::internal("the primary ENI is gone again"))?;
        Ok(Registered { instance, primary })
    }

    /// Detaches all its ENIs and deletes those that are DeleteOnRelease.
    pub async fn remove_instance(&self, instance_id: &str) -> Result<(), ApiError> {
        self.engine.remove(instance_id).await
    }

    pub fn instances(&self) -> Vec<Instance> {
        self.engine.world().account.instances.values().cloned().collect()
    }

    pub fn state(&self) -> StateDump {
        let world = self.engine.world();
        let account = &world.account;
        let vswitch = |space: &state::AddressSpace| VSwitchDump {
            spec: space.spec.clone(),
            capacity: space.capacity4(),
            available: account.available4(&space.spec.id),
        };
        StateDump {
            now_ms: self.engine.now(),
            region: account.region.clone(),
            vpc_id: account.vpc_id.clone(),
            vswitches: account.spaces.values().map(vswitch).collect(),
            instances: account.instances.values().cloned().collect(),
            enis: account.enis.values().cloned().collect(),
            fabric_errors: world.fabric_errors.clone(),
        }
    }

    /// An action of the API done by somebody else with the account: no
    /// signature, no throttling, no injected fault, not in the call log.
    pub async fn operate(&self, action: &str, params: &[(&str, &str)]) -> Result<serde_json::Value, ApiError> {
        let api = actions::Api::find(action, "2014-05-26")?;
        let region = ("RegionId".to_owned(), self.engine.config.region.clone());
        let given = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let params = params::Params::new(std::iter::once(region).chain(given))?;
        let engine = self.engine.clone();
        self.spawn(async move { actions::perform(&engine, api, &params).await }).await
    }

    /// Broken invariants of the cloud itself and failures of the packet side;
    /// empty is good.
    pub fn audit(&self) -> Vec<String> {
        let world = self.engine.world();
        let mut found = world.account.violations();
        found.extend(world.fabric_errors.iter().map(|error| format!("packet side: {error}")));
        found
    }

    /// Calls that ended at `since_ms` (Unix time) or later; 0: all.
    pub fn calls(&self, since_ms: u64) -> CallReport {
        let now = self.engine.now();
        self.engine.world().calls.report(since_ms, now)
    }

    /// The cloud's clock, for [`CloudLab::calls`].
    pub fn now_ms(&self) -> u64 {
        self.engine.now()
    }

    /// Switches a fault on; the id switches it off again.
    pub fn add_fault(&self, spec: impl Into<FaultSpec>) -> Result<u64, ApiError> {
        let now = self.engine.now();
        self.engine.world().faults.add(spec.into(), now)
    }

    pub fn remove_fault(&self, id: u64) -> bool {
        self.engine.world().faults.remove(id)
    }

    pub fn clear_faults(&self) {
        self.engine.world().faults.clear();
    }

    pub fn faults(&self) -> Vec<ActiveFault> {
        let now = self.engine.now();
        self.engine.world().faults.list(now)
    }

    /// What HTTPS clients have to trust.
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca.as_deref().map(LabCa::pem)
    }

    /// Runs to its end even when whoever waits for it goes away.
    async fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
    ) -> Result<T, ApiError> {
        let done = self.engine.tasks.spawn(work).await;
        done.unwrap_or_else(|error| Err(ApiError::internal(error)))
    }
}

impl Running {
    /// [`Running::shutdown`], but first every instance is removed, so that the
    /// fabric holds nothing of this cloud any more.
    pub async fn retire(self) {
        // Nobody waits any more for what only takes time.
        self.cloud.engine.stop.cancel();
        for instance in self.cloud.instances() {
            if let Err(error) = self.cloud.remove_instance(&instance.id).await {
                tracing::warn!(instance = instance.id, %error, "the instance could not be removed");
            }
        }
        self.shutdown().await;
    }

    /// Stops accepting, lets answers in progress end, abandons what is only
    /// waiting. Nothing is detached: the fabric belongs to the caller.
    pub async fn shutdown(self) {
        let engine = &self.cloud.engine;
        engine.stop.cancel();
        engine.tasks.close();
        if tokio::time::timeout(Duration::from_secs(5), engine.tasks.wait()).await.is_err() {
            tracing::warn!("some work of the simulated cloud did not end in time");
        }
    }
}

fn names(config: &CloudConfig) -> Vec<String> {
    let region = &config.region;
    let own = [
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
        format!("ecs.{region}.aliyuncs.com"),
        format!("ecs-vpc.{region}.aliyuncs.com"),
        format!("vpc.{region}.aliyuncs.com"),
        format!("vpc-vpc.{region}.aliyuncs.com"),
    ];
    own.into_iter().chain(config.sans.iter().cloned()).collect()
}

fn spawn(
    engine: &Arc<Engine>,
    what: &'static str,
    listener: Option<TcpListener>,
    tls: Option<TlsAcceptor>,
    handler: Arc<dyn http::Handler>,
) -> Result<Option<SocketAddr>, StartError> {
    let Some(listener) = listener else { return Ok(None) };
    let start = || {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        Ok((listener.local_addr()?, listener))
    };
    let (address, listener) = start().map_err(|cause| StartError::Listener { what, cause })?;
    let serving = http::serve(listener, tls, handler, engine.tasks.clone(), engine.stop.clone());
    engine.tasks.spawn(serving);
    Ok(Some(address))
}
