//! The node's side of ENIs: what its own carries, and what the shared ones do.
//!
//! Filters belong to their device and go with it; a filter of an earlier process
//! works until this one's is put in its place, in one step. Which device was the
//! uplink is in the pinned map, so that another process can take its filters off.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::{Array, MapData, MapError};
use fairway_ebpf_abi::{self as abi, ENI_INGRESS, LINK_EGRESS, NODE_EGRESS, NODE_INGRESS, UPLINK};

use super::programs::Programs;
use super::{Datapath, DatapathError, clsact};
use crate::sys::bpf::TcxChain;

/// The device that carries the node's own traffic, and the node's addresses on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub ifindex: u32,
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

pub(super) struct Enis {
    uplink: Array<MapData, abi::Uplink>,
    /// Shared ones, by index.
    shared: BTreeSet<u32>,
}

impl Enis {
    pub(super) fn open(programs: &mut Programs) -> Result<Self, DatapathError> {
        let unlike = |e: MapError| DatapathError::Object(e.to_string());
        Ok(Self { uplink: programs.take_map(UPLINK)?.try_into().map_err(unlike)?, shared: BTreeSet::new() })
    }

    fn current(&self) -> Result<abi::Uplink, DatapathError> {
        self.uplink.get(&0, 0).map_err(DatapathError::Ways)
    }
}

impl Datapath {
    /// The programs for clients from outside go onto this device, and off the one
    /// that it was before. Done again it puts this build's programs in.
    pub fn set_uplink(&mut self, uplink: Option<Uplink>) -> Result<(), DatapathError> {
        if let Some(held) = &mut self.held {
            held.uplink = Some(uplink);
            return Ok(());
        }
        let before = self.enis.current()?;
        let addr = |ip: Option<IpAddr>| ip.map_or(abi::Addr::default(), abi::Addr::from);
        let now = uplink.map_or(abi::Uplink::default(), |uplink| abi::Uplink {
            v4: addr(uplink.v4.map(IpAddr::V4)),
            v6: addr(uplink.v6.map(IpAddr::V6)),
            ifindex: uplink.ifindex,
            // Its connections go on.
            translated: before.translated,
        });
        if now != before {
            self.enis.uplink.set(0, now, 0).map_err(DatapathError::Ways)?;
        }
        if let Some(uplink) = uplink {
            self.attach_uplink(uplink.ifindex)?;
        }
        let index = before.ifindex;
        if index != 0 && index != now.ifindex && !self.known.values().any(|entry| entry.endpoint == index) {
            let off =
                |chain| clsact::detach(index, chain).map_err(|cause| DatapathError::Eni { ifindex: index, cause });
            off(TcxChain::Egress)?;
            match self.enis.shared.contains(&index) {
                true => self.attach_eni(index)?,
                false => off(TcxChain::Ingress)?,
            }
        }
        Ok(())
    }

    fn attach_uplink(&self, ifindex: u32) -> Result<(), DatapathError> {
        let both = [
            (self.shared.classifier(NODE_INGRESS)?, TcxChain::Ingress),
            (self.shared.classifier(NODE_EGRESS)?, TcxChain::Egress),
        ];
        clsact::attach(&both, ifindex).map_err(|cause| DatapathError::Eni { ifindex, cause })
    }

    /// Whether this build's programs for clients from outside are in force, read
    /// from the kernel: on which device.
    pub fn uplink(&self) -> Result<Option<u32>, DatapathError> {
        let ifindex = self.enis.current()?.ifindex;
        if ifindex == 0 {
            return Ok(None);
        }
        for (name, chain) in [(NODE_INGRESS, TcxChain::Ingress), (NODE_EGRESS, TcxChain::Egress)] {
            let fail = |cause| DatapathError::Eni { ifindex, cause };
            let ours = crate::sys::bpf::program_id(self.shared.classifier(name)?).map_err(fail)?;
            if clsact::program_on(ifindex, chain).map_err(fail)? != Some(ours) {
                return Ok(None);
            }
        }
        Ok(Some(ifindex))
    }

    /// The program for what arrives on a shared ENI. Done again it puts this
    /// build's program in. The uplink's own does the same, and more.
    pub fn attach_eni(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        self.enis.shared.insert(ifindex);
        if let Some(held) = &mut self.held {
            held.enis.insert(ifindex);
            return Ok(());
        }
        if self.enis.current()?.ifindex == ifindex {
            return self.attach_uplink(ifindex);
        }
        let ingress = [(self.shared.classifier(ENI_INGRESS)?, TcxChain::Ingress)];
        clsact::attach(&ingress, ifindex).map_err(|cause| DatapathError::Eni { ifindex, cause })
    }

    /// What a pod with an ENI of its own exchanges with the node, and its answers to
    /// clients from outside, pass by its link. The filters go with the link.
    pub fn attach_link(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        if let Some(held) = &mut self.held {
            held.links.insert(ifindex);
            return Ok(());
        }
        let both = [
            (self.shared.classifier(NODE_INGRESS)?, TcxChain::Ingress),
            (self.shared.classifier(LINK_EGRESS)?, TcxChain::Egress),
        ];
        clsact::attach(&both, ifindex).map_err(|cause| DatapathError::Eni { ifindex, cause })
    }

    /// The links to the node that carry an earlier process's program get this one's.
    pub(super) fn renew_links(&mut self) -> Result<(), DatapathError> {
        let fail = |cause| DatapathError::Eni { ifindex: 0, cause };
        let ours = crate::sys::bpf::program_id(self.shared.classifier(NODE_INGRESS)?).map_err(fail)?;
        let all = aya::programs::loaded_programs().filter_map(Result::ok);
        let earlier: BTreeSet<u32> =
            all.filter(|p| p.name_as_str() == Some(NODE_INGRESS)).map(|p| p.id()).filter(|id| *id != ours).collect();
        if earlier.is_empty() {
            return Ok(());
        }
        let uplink = self.enis.current()?.ifindex;
        for device in &nix::net::if_::if_nameindex().map_err(|e| fail(e.into()))? {
            let index = device.index();
            let is = clsact::program_on(index, TcxChain::Ingress).ok().flatten();
            if index != uplink && is.is_some_and(|id| earlier.contains(&id)) {
                self.attach_link(index)?;
            }
        }
        Ok(())
    }

    /// The ENI is no longer shared. Success when there is no such device.
    pub fn detach_eni(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        self.enis.shared.remove(&ifindex);
        if let Some(held) = &mut self.held {
            held.enis.remove(&ifindex);
        }
        if self.enis.current()?.ifindex == ifindex {
            return Ok(());
        }
        clsact::detach(ifindex, TcxChain::Ingress).map_err(|cause| DatapathError::Eni { ifindex, cause })
    }
}
