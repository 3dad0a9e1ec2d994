//! Fabric: how the simulated cloud makes its answers true on the packet side.
//!
//! Purpose: the cloud decides (which ENI, which instance, which addresses), the
//! fabric does (devices in namespaces, routes and source filters in the VPC
//! router). Owner: the simulated cloud calls it; the lab's VPC implements it.
//! Invariants: calls about one ENI never overlap; an answer to a client is sent
//! after the fabric has taken effect; `set_addresses` always carries the full
//! list, so repeating a call is harmless.

use std::net::{Ipv4Addr, Ipv6Addr};

use futures::future::BoxFuture;
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::model::Mac;

/// An ENI as a device: what has to appear in the instance's namespace, and what
/// the router may forward to and accept from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniPort {
    pub eni_id: String,
    pub instance_id: String,
    pub mac: Mac,
    /// Receive and transmit queues of the device; at least 1.
    pub queues: u32,
    pub subnet4: Ipv4Net,
    pub gateway4: Ipv4Addr,
    pub subnet6: Option<Ipv6Net>,
    pub gateway6: Option<Ipv6Addr>,
    /// All IPv4 addresses, the ENI's primary one first.
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
}

/// Where an instance lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstancePlace {
    pub instance_id: String,
    /// Name of the instance's network namespace, as `ip netns` shows it.
    pub netns: Option<String>,
}

/// The packet side could not do what the cloud has decided.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FabricError {
    #[error("instance {0} has no namespace here: register it with its `netns` first")]
    UnknownInstance(String),
    #[error("ENI {0} is not attached here")]
    UnknownEni(String),
    #[error("{op} of {eni_id}: {cause}")]
    Failed { op: &'static str, eni_id: String, cause: String },
}

/// The packet side of the VPC, as the simulated cloud needs it.
pub trait Fabric: Send + Sync + 'static {
    /// An instance was registered; its first `attach` follows.
    fn instance_added(&self, _place: InstancePlace) -> BoxFuture<'_, Result<(), FabricError>> {
        Box::pin(async { Ok(()) })
    }

    /// All ENIs of the instance have been detached and it is gone.
    fn instance_removed(&self, _instance_id: &str) -> BoxFuture<'_, Result<(), FabricError>> {
        Box::pin(async { Ok(()) })
    }

    /// Makes the ENI's device appear in the instance's namespace.
    fn attach(&self, port: EniPort) -> BoxFuture<'_, Result<(), FabricError>>;

    /// Removes the device, wherever it has been moved meanwhile. Detaching what
    /// is not attached succeeds.
    fn detach(&self, eni_id: &str) -> BoxFuture<'_, Result<(), FabricError>>;

    /// Replaces what the router forwards to and accepts from an attached ENI.
    fn set_addresses(
        &self,
        eni_id: &str,
        v4: Vec<Ipv4Addr>,
        v6: Vec<Ipv6Addr>,
    ) -> BoxFuture<'_, Result<(), FabricError>>;
}

/// No packet side: for tests of the API alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullFabric;

impl Fabric for NullFabric {
    fn attach(&self, _port: EniPort) -> BoxFuture<'_, Result<(), FabricError>> {
        Box::pin(async { Ok(()) })
    }

    fn detach(&self, _eni_id: &str) -> BoxFuture<'_, Result<(), FabricError>> {
        Box::pin(async { Ok(()) })
    }

    fn set_addresses(
        &self,
        _eni_id: &str,
        _v4: Vec<Ipv4Addr>,
        _v6: Vec<Ipv6Addr>,
    ) -> BoxFuture<'_, Result<(), FabricError>> {
        Box::pin(async { Ok(()) })
    }
}
