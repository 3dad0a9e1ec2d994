//! The datapath's programs on the wirer's devices.
//!
//! One datapath for all wiring threads, behind a mutex: each call is a few
//! system calls, and the pins are the memory.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use fairway_ebpf_abi::Endpoint;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::datapath::flows::KernelFlows;
use crate::datapath::policies::KernelPolicies;
use crate::datapath::services::KernelMaps;
use crate::datapath::{Datapath, DatapathError, Device, NodeLink, Uplink, Way};
use crate::model::{AttachMode, AttachmentId, Lease};
use crate::netns::{Attachment, Placed, PodPrograms};
use crate::policy::maps::{Change, InForce, PolicyMaps};
use crate::policy::tables::{Enforced, RuleId};
use crate::sys::netns::Netns;

pub struct Programs {
    datapath: Mutex<Datapath>,
    /// Pods' packets may pass by the node's stack.
    fast_path: bool,
    /// Clients from outside are brought to Services.
    services: bool,
}

impl Programs {
    pub fn new(datapath: Datapath, fast_path: bool) -> Self {
        Self { datapath: Mutex::new(datapath), fast_path, services: true }
    }

    /// Services are somebody else's on this node.
    pub fn without_services(self) -> Self {
        Self { services: false, ..self }
    }

    fn way(&self, of: &Attachment<'_>) -> Way {
        let (lease, subnet) = (of.lease, &of.lease.eni.subnet);
        Way {
            v4: lease.v4,
            v6: lease.v6,
            gateway4: subnet.gateway4,
            gateway6: subnet.gateway6,
            eni: of.shared_eni,
            node_link: of.node_link.map(|(in_pod, gateway4, gateway6)| NodeLink {
                in_node: of.host_ifindex,
                in_pod,
                gateway4,
                gateway6,
            }),
            cookie: of.netns_cookie,
            netns: of.netns_number,
            per_packet: lease.traffic.per_packet,
            short: self.fast_path && of.shared_eni.is_some() && !lease.traffic.host_ports,
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
                    "denied_ingress": c.denied_ingress,
                    "denied_egress": c.denied_egress,
                })
            })
            .collect()
    }

    /// Earlier programs are in force until [`Self::take_over`].
    pub fn is_held(&self) -> bool {
        self.datapath.lock().is_held()
    }

    /// What the new maps say is what the old ones said: this build's programs take
    /// the earlier ones' places.
    pub fn take_over(&self) -> Result<Vec<String>, String> {
        self.datapath.lock().take_over().map_err(|e| e.to_string())
    }

    /// Pods whose device still runs the programs of an earlier process.
    pub fn dated(&self) -> usize {
        self.datapath.lock().dated().count()
    }

    /// Takes those up that `leases` names; what no lease claims is gone, with its
    /// device. Says what could not be done.
    pub fn take_up(&self, leases: &[Lease]) -> Vec<String> {
        let dated: Vec<AttachmentId> = self.datapath.lock().dated().cloned().collect();
        let one = |attachment: &AttachmentId| match leases.iter().find(|l| l.attachment == *attachment) {
            Some(lease) => self.take_one_up(lease),
            None => self.detach(attachment),
        };
        dated.iter().filter_map(|id| one(id).err().map(|e| format!("{id}: {e}"))).collect()
    }

    fn take_one_up(&self, lease: &Lease) -> Result<(), String> {
        let home = Netns::current().map_err(|e| e.to_string())?;
        let pod = Netns::open(&lease.netns).map_err(|e| e.to_string())?;
        let netns_cookie = pod.cookie(&home).map_err(|e| e.to_string())?;
        let (host_ifname, host_ifindex) = ("", 0);
        let inside = Attachment {
            lease,
            host_ifname,
            host_ifindex,
            eni_ifindex: None,
            node_link: None,
            shared_eni: None,
            netns_cookie,
            netns_number: None,
        };
        self.attach(&inside).map(drop)
    }

    /// Below 6.6 an attachment is lost when the device moves.
    fn too_early(&self, of: &Attachment<'_>) -> bool {
        of.lease.mode == AttachMode::Exclusive && of.eni_ifindex.is_some() && !self.datapath.lock().moves_with_device()
    }

    /// The maps of Services, with descriptors of their own.
    pub fn service_maps(&self) -> Result<KernelMaps, String> {
        self.datapath.lock().service_maps().map_err(|e| e.to_string())
    }

    /// What the programs fill, with descriptors of its own.
    pub fn flow_tables(&self) -> Result<KernelFlows, String> {
        self.datapath.lock().flow_tables().map_err(|e| e.to_string())
    }

    /// The tables that policies compile to, and the pods that they isolate.
    pub fn policy_maps(self: &Arc<Self>) -> Result<PolicyTables, String> {
        let kernel = self.datapath.lock().policy_maps().map_err(|e| e.to_string())?;
        Ok(PolicyTables { programs: self.clone(), kernel })
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
            (AttachMode::Exclusive, Some(eni)) => f(&mut datapath, Device::index(eni)).map_err(said),
            (AttachMode::Exclusive, None) => {
                let netns = File::open(&of.lease.netns).map_err(|e| format!("{}: {e}", of.lease.netns.display()))?;
                let device = Device::named(&of.lease.attachment.ifname).inside(netns.as_fd());
                f(&mut datapath, device).map_err(said)
            }
        }
    }
}

/// Classes and rules, with descriptors of their own; pods by the datapath, which
/// writes them too.
pub struct PolicyTables {
    programs: Arc<Programs>,
    kernel: KernelPolicies,
}

impl PolicyMaps for PolicyTables {
    fn read(&mut self) -> Result<InForce, String> {
        self.kernel.read().map_err(|e| format!("the tables of policies cannot be read: {e}"))
    }

    fn apply(&mut self, change: &Change) -> Result<(), String> {
        self.kernel.apply(change)
    }

    fn next_generation(&mut self) -> Result<(), String> {
        self.kernel.next_generation().map_err(|e| format!("the generation of policies cannot be written: {e}"))
    }

    fn hits(&mut self) -> Result<Vec<(RuleId, u64)>, String> {
        self.kernel.hits().map_err(|e| format!("the hits of rules cannot be read: {e}"))
    }

    fn pods(&mut self) -> Result<Vec<(AttachmentId, Endpoint, Enforced)>, String> {
        self.programs.datapath.lock().isolated().map_err(|e| e.to_string())
    }

    fn endpoint(&mut self, attachment: &AttachmentId) -> Result<Option<Endpoint>, String> {
        Ok(self.programs.datapath.lock().endpoint(attachment))
    }

    fn enforce(&mut self, attachment: &AttachmentId, how: Enforced) -> Result<Option<Endpoint>, String> {
        self.programs.datapath.lock().isolate(attachment, how).map_err(|e| e.to_string())
    }
}

impl PodPrograms for Programs {
    fn attach(&self, to: &Attachment<'_>) -> Result<Placed, String> {
        if self.too_early(to) {
            return Ok(Placed::OnceInside);
        }
        if to.lease.mode == AttachMode::Exclusive && !self.datapath.lock().is_attached(&to.lease.attachment) {
            // Others are wired meanwhile.
            let load = self.datapath.lock().load().map_err(|e| e.to_string())?;
            let loaded = load.run().map_err(|e| e.to_string())?;
            self.datapath.lock().loaded(loaded);
        }
        let way = self.way(to);
        self.on_device(to, |datapath, device| {
            datapath.attach(&to.lease.attachment, to.lease.mode, device)?;
            datapath.lead(&to.lease.attachment, &way)?;
            way.node_link.map_or(Ok(()), |link| datapath.attach_link(link.in_node))
        })?;
        Ok(Placed::Yes)
    }

    fn detach(&self, from: &AttachmentId) -> Result<(), String> {
        self.datapath.lock().detach(from).map_err(|e| e.to_string())
    }

    fn verify(&self, of: &Attachment<'_>) -> Result<Vec<String>, String> {
        if self.too_early(of) {
            return Ok(vec!["the ENI is not in the pod, where its programs would be".to_owned()]);
        }
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

    fn uplink(&self, device: Option<(u32, &[IpAddr])>) -> Result<(), String> {
        let uplink = device.filter(|_| self.services).map(|(ifindex, own)| Uplink {
            ifindex,
            v4: own.iter().find_map(|ip| if let IpAddr::V4(v4) = ip { Some(*v4) } else { None }),
            v6: own.iter().find_map(|ip| if let IpAddr::V6(v6) = ip { Some(*v6) } else { None }),
        });
        self.datapath.lock().set_uplink(uplink).map_err(|e| e.to_string())
    }
}
