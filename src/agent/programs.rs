//! The datapath's programs on the wirer's devices.
//!
//! One datapath for all wiring threads, behind a mutex: each call is a few
//! system calls, and the pins are the memory.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd as _;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::datapath::services::KernelMaps;
use crate::datapath::{Datapath, DatapathError, Device, Way};
use crate::model::{AttachMode, AttachmentId};
use crate::netns::{Attachment, PodPrograms};

pub struct Programs {
    datapath: Mutex<Datapath>,
    /// Pods' packets may pass by the node's stack.
    fast_path: bool,
}

impl Programs {
    pub fn new(datapath: Datapath, fast_path: bool) -> Self {
        Self { datapath: Mutex::new(datapath), fast_path }
    }

    fn way(&self, of: &Attachment<'_>) -> Way {
        let (lease, subnet) = (of.lease, &of.lease.eni.subnet);
        Way {
            v4: lease.v4,
            v6: lease.v6,
            gateway4: subnet.gateway4,
            gateway6: subnet.gateway6,
            eni: of.shared_eni,
            cookie: of.netns_cookie,
            per_packet: false,
            short: self.fast_path && of.shared_eni.is_some(),
            limited: lease.bandwidth.ingress_bps.is_some(),
        }
    }

    /// What is attached and what has passed, for `/debug/endpoints`.
    pub fn view(&self) -> Value {
        let datapath = self.datapath.lock();
        let (attached, counters) = match (datapath.attached(), datapath.counters()) {
            (Ok(attached), Ok(counters)) => (attached, counters),
            (Err(e), _) | (_, Err(e)) => return json!({ "error": e.to_string() }),
        };
        let counted = |id: &AttachmentId| counters.iter().find(|(a, _)| a == id).map(|(_, c)| *c).unwrap_or_default();
        attached
            .iter()
            .map(|a| {
                let c = counted(&a.attachment);
                json!({
                    "attachment": a.attachment.to_string(),
                    "mode": a.mode,
                    "via": a.via,
                    "ifindex": a.ifindex,
                    "programs": a.programs,
                    "egress_packets": c.egress_packets,
                    "egress_bytes": c.egress_bytes,
                    "ingress_packets": c.ingress_packets,
                    "ingress_bytes": c.ingress_bytes,
                    "short": a.short,
                    "egress_short": c.egress_short,
                    "ingress_short": c.ingress_short,
                    "spoofed": c.spoofed,
                })
            })
            .collect()
    }

    /// The maps of Services, with descriptors of their own.
    pub fn service_maps(&self) -> Result<KernelMaps, String> {
        self.datapath.lock().service_maps().map_err(|e| e.to_string())
    }

    fn on_device<R>(
        &self,
        of: &Attachment<'_>,
        f: impl FnOnce(&mut Datapath, Device<'_>) -> Result<R, DatapathError>,
    ) -> Result<R, String> {
        let mut datapath = self.datapath.lock();
        let said = |e: DatapathError| e.to_string();
        match (of.lease.mode, of.eni_ifindex) {
            (AttachMode::Veth, _) => f(&mut datapath, Device::index(of.host_ifindex)).map_err(said),
            (AttachMode::Exclusive, Some(eni)) if datapath.moves_with_device() => {
                f(&mut datapath, Device::index(eni)).map_err(said)
            }
            // Below 6.6 the attachment is lost when the device moves: the wirer
            // calls again once it is inside.
            (AttachMode::Exclusive, Some(_)) => Err("needs the device inside the pod".to_owned()),
            (AttachMode::Exclusive, None) => {
                let netns = File::open(&of.lease.netns).map_err(|e| format!("{}: {e}", of.lease.netns.display()))?;
                let device = Device::named(&of.lease.attachment.ifname).inside(netns.as_fd());
                f(&mut datapath, device).map_err(said)
            }
        }
    }
}

impl PodPrograms for Programs {
    fn attach(&self, to: &Attachment<'_>) -> Result<(), String> {
        let inside_only = to.lease.mode == AttachMode::Exclusive && to.eni_ifindex.is_some();
        if inside_only && !self.datapath.lock().moves_with_device() {
            return Ok(());
        }
        let way = self.way(to);
        self.on_device(to, |datapath, device| {
            datapath.attach(&to.lease.attachment, to.lease.mode, device)?;
            datapath.lead(&to.lease.attachment, &way)
        })
    }

    fn detach(&self, from: &AttachmentId) -> Result<(), String> {
        self.datapath.lock().detach(from).map_err(|e| e.to_string())
    }

    fn verify(&self, of: &Attachment<'_>) -> Result<Vec<String>, String> {
        let there = self.on_device(of, |datapath, device| datapath.verify(&of.lease.attachment, device))?;
        Ok(if there { Vec::new() } else { vec!["the packet counters are not attached".to_owned()] })
    }

    fn pinned(&self) -> Result<Vec<String>, String> {
        let attached = self.datapath.lock().attached().map_err(|e| e.to_string())?;
        Ok(attached.into_iter().map(|a| a.attachment.to_string()).collect())
    }

    fn eni_up(&self, ifindex: u32) -> Result<(), String> {
        self.datapath.lock().attach_eni(ifindex).map_err(|e| e.to_string())
    }

    fn eni_gone(&self, ifindex: u32) -> Result<(), String> {
        self.datapath.lock().detach_eni(ifindex).map_err(|e| e.to_string())
    }

    fn node_addresses(&self, addresses: &[IpAddr]) -> Result<(), String> {
        self.datapath.lock().set_node_addresses(addresses).map_err(|e| e.to_string())
    }
}
