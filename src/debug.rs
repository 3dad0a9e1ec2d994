//! DebugHttp: the actor that shows what the agent is doing.
//!
//! Owner of the debug listener (TCP on loopback, or a Unix socket). Reads
//! everyone's snapshot, changes nothing, keeps no state: a restart only binds
//! the listener again. What it shows is given as [`Views`] by `agent`.

mod metrics;
pub(crate) mod routes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener};

use crate::actor::{Actor, Ctx, Deadline, Registry, StartError};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where to listen: a loopback address, or the path of a Unix socket.
    pub listen: Listen,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 9471))) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Listen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A value read at once: somebody's snapshot.
pub type View = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;
/// A value that takes fresh reads: an audit, an explanation.
pub type Query = Arc<
    dyn Fn(BTreeMap<String, String>, Deadline) -> BoxFuture<'static, Result<serde_json::Value, String>> + Send + Sync,
>;
/// Ready, or what is still awaited.
pub type ReadyCheck = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;
/// Adds one area's metrics to a scrape.
pub type Collect = Arc<dyn Fn(&mut prometheus_client::registry::Registry) + Send + Sync>;

/// Everything the endpoint shows.
#[derive(Clone, Default)]
pub struct Views {
    pub actors: Registry,
    /// `/debug/<name>`.
    pub views: BTreeMap<&'static str, View>,
    /// `/debug/<name>?key=value`, each with a deadline.
    pub queries: BTreeMap<&'static str, Query>,
    pub ready: Vec<(&'static str, ReadyCheck)>,
    pub metrics: Vec<Collect>,
}

pub struct DebugHttp {
    views: Views,
    listener: Option<Listener>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl DebugHttp {
    pub async fn bind(config: Config, views: Views) -> Result<Self, StartError> {
        let listener = match &config.listen {
            Listen::Tcp(addr) if !addr.ip().is_loopback() => {
                return Err(StartError(format!(
                    "debug.listen {addr} is not a loopback address; use 127.0.0.1 or a Unix socket"
                )));
            }
            Listen::Tcp(addr) => Listener::Tcp(
                TcpListener::bind(addr).await.map_err(|e| StartError(format!("debug.listen {addr}: {e}")))?,
            ),
            Listen::Unix(path) => {
                // Ours alone: a socket left by a killed process.
                let _ = std::fs::remove_file(path);
                let bound = UnixListener::bind(path)
                    .map_err(|e| StartError(format!("debug.listen {}: {e}", path.display())))?;
                Listener::Unix(bound)
            }
        };
        Ok(Self { views, listener: Some(listener) })
    }
}

impl Actor for DebugHttp {
    const NAME: &'static str = "DebugHttp";

    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        let router = routes::router(self.views.clone());
        let Some(listener) = self.listener.take() else {
            return Err(StartError::new("started twice"));
        };
        let serve = async move {
            match listener {
                Listener::Tcp(tcp) => axum::serve(tcp, router).await,
                Listener::Unix(unix) => axum::serve(unix, router).await,
            }
        };
        ctx.spawn(serve, |_, ended, ctx| ctx.fail(format!("the listener ended: {ended:?}")));
        Ok(())
    }
}
