//! The hook for programs on pods' devices.
//!
//! Purpose: lets the datapath put its programs on a pod's devices at the right
//! moment without this module knowing eBPF. Called on wiring threads, in the
//! node's namespace; may block for as long as a load takes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::{AttachmentId, Lease};

/// One attachment's devices in the node's namespace.
#[derive(Clone, Copy, Debug)]
pub struct Attachment<'a> {
    pub lease: &'a Lease,
    pub host_ifname: &'a str,
    pub host_ifindex: u32,
    /// An exclusive ENI that has not moved into the pod yet. `None` once it has
    /// (and always in veth mode, where the ENI is shared).
    pub eni_ifindex: Option<u32>,
    /// Of a pod with an ENI of its own: the index, in the pod, of its link to the
    /// node, and the next hops there. `None` when it is not known.
    pub node_link: Option<(u32, Ipv4Addr, Ipv6Addr)>,
    /// The ENI that a pod in veth mode leaves by.
    pub shared_eni: Option<u32>,
    /// What eBPF programs know the pod's namespace by. `None` when it was not
    /// asked for, and before Linux 5.14.
    pub netns_cookie: Option<u64>,
    /// The number of the pod's namespace in the node's, by which programs look into
    /// it. `None` when it was not asked for.
    pub netns_number: Option<i32>,
}

/// Whether an attachment's programs are in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    Yes,
    /// They would be lost when the ENI moves: to be attached again once it is
    /// inside the pod, before it is up.
    OnceInside,
}

/// What the datapath does with a pod's devices. Every call may be repeated.
pub trait PodPrograms: Send + Sync {
    /// The devices are made and not up yet: no packet passes before this returns.
    fn attach(&self, to: &Attachment<'_>) -> Result<Placed, String>;
    /// The devices are gone, or an exclusive ENI is back with the node.
    fn detach(&self, from: &AttachmentId) -> Result<(), String>;
    /// What is wrong, in words; empty when all is well.
    fn verify(&self, of: &Attachment<'_>) -> Result<Vec<String>, String>;
    /// The attachments with a pinned program.
    fn pinned(&self) -> Result<Vec<String>, String>;
    /// A shared ENI's device is up and carries pods; done again it changes nothing.
    fn eni_up(&self, ifindex: u32) -> Result<(), String>;
    /// It no longer does.
    fn eni_gone(&self, ifindex: u32) -> Result<(), String>;
    /// All addresses of the node itself, whenever they have changed.
    fn node_addresses(&self, addresses: &[IpAddr]) -> Result<(), String>;
    /// The device of the node's default route and the node's addresses on it, after
    /// each [`Self::node_addresses`]; none while there is no such route.
    fn uplink(&self, device: Option<(u32, &[IpAddr])>) -> Result<(), String>;
}

/// No programs.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPrograms;

impl PodPrograms for NoPrograms {
    fn attach(&self, _: &Attachment<'_>) -> Result<Placed, String> {
        Ok(Placed::Yes)
    }
    fn detach(&self, _: &AttachmentId) -> Result<(), String> {
        Ok(())
    }
    fn verify(&self, _: &Attachment<'_>) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }
    fn pinned(&self) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }
    fn eni_up(&self, _: u32) -> Result<(), String> {
        Ok(())
    }
    fn eni_gone(&self, _: u32) -> Result<(), String> {
        Ok(())
    }
    fn node_addresses(&self, _: &[IpAddr]) -> Result<(), String> {
        Ok(())
    }
    fn uplink(&self, _: Option<(u32, &[IpAddr])>) -> Result<(), String> {
        Ok(())
    }
}
