//! The seam between the simulated cloud and the packet side of the lab.
//!
//! The cloud decides what is attached and assigned; the fabric makes the kernel
//! forward exactly that. Every call is idempotent: the wanted state is given in
//! full, so a caller that lost an answer simply asks again.

use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::pin::Pin;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::model::Mac;

/// What the fabric's methods return: boxed, so that the trait is object-safe.
pub type FabricFuture<'a> = Pin<Box<dyn Future<Output = Result<(), FabricError>> + Send + 'a>>;

/// An ENI at the moment it is attached to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniPort {
    pub eni_id: String,
    pub instance_id: String,
    pub mac: Mac,
    /// Queues of the device, each direction.
    pub queues: u32,
    pub subnet4: Ipv4Net,
    pub gateway4: Ipv4Addr,
    pub subnet6: Option<Ipv6Net>,
    pub gateway6: Option<Ipv6Addr>,
    /// All private IPv4 addresses, the primary one first.
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FabricError {
    #[error("instance {0} has no network namespace in this lab; register it first")]
    UnknownInstance(String),
    #[error("ENI {0} is not attached")]
    UnknownEni(String),
    #[error("{what}: {cause}")]
    Kernel { what: String, cause: String },
}

/// What carries the VPC's packets.
pub trait Fabric: Send + Sync {
    /// Make the ENI's device appear in its instance's namespace.
    fn attach(&self, port: EniPort) -> FabricFuture<'_>;
    /// Remove the device, wherever it is now; one that is gone is success.
    fn detach(&self, eni_id: &str) -> FabricFuture<'_>;
    /// Forward these addresses to the ENI, and no others.
    fn set_addresses(&self, eni_id: &str, v4: Vec<Ipv4Addr>, v6: Vec<Ipv6Addr>) -> FabricFuture<'_>;
}
