//! Who is behind a pod's link: its addresses and namespace, the way past the
//! stack to and from it, and which addresses and namespace are the node's own.
//!
//! Owner: `Datapath`. A pod's link is written before its addresses and removed
//! after them, so that whoever finds an address finds a link that counts it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::{HashMap, MapData, MapError};
use fairway_ebpf_abi::{
    Addr, Endpoint, LINK_SHORT, LINKS, Link, NAMESPACES, NETNS_GUARDED, NETNS_NODE, NETNS_PER_PACKET, NETNS_POD, NODE,
    POD_ANSWERS, POD_AWAY, POD_ISOLATED, POD_SHORT, PODS, PROFILE_OPEN, Pod, TRANSLATED_ANSWERS, TRANSLATED_REQUESTS,
};

use super::DatapathError;
use super::programs::Programs;

/// What the programs know of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    pub v4: Ipv4Addr,
    pub v6: Option<Ipv6Addr>,
    /// Next hops of the ENI's vSwitch.
    pub gateway4: Ipv4Addr,
    pub gateway6: Option<Ipv6Addr>,
    /// Interface index of the shared ENI; none for a pod with its own.
    pub eni: Option<u32>,
    /// The link to the node of a pod with an ENI of its own, when it is known.
    pub node_link: Option<NodeLink>,
    /// Of the pod's network namespace: what sockets know it by, and its number in the
    /// node's.
    pub cookie: Option<u64>,
    pub netns: Option<i32>,
    /// Services are resolved packet by packet, never when a process connects.
    pub per_packet: bool,
    /// Packets may pass by the node's stack once it has seen the connection open.
    pub short: bool,
    /// Its link has a queue that limits what it receives: nobody may hand packets
    /// over past it.
    pub limited: bool,
}

/// The link between the node and a pod with an ENI of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeLink {
    /// Interface indices of its ends, in the node and in the pod.
    pub in_node: u32,
    pub in_pod: u32,
    /// Next hops, from the pod.
    pub gateway4: Ipv4Addr,
    pub gateway6: Ipv6Addr,
}

pub(super) struct Ways {
    links: HashMap<MapData, Endpoint, Link>,
    pods: HashMap<MapData, Addr, Pod>,
    node: HashMap<MapData, Addr, u32>,
    namespaces: HashMap<MapData, u64, u32>,
    /// Of pods that are not known it is not known either whether packets of theirs
    /// were translated: their flows may be older than the map.
    begun_anew: bool,
}

impl Ways {
    pub(super) fn open(programs: &mut Programs, begun_anew: bool) -> Result<Self, DatapathError> {
        Ok(Self {
            begun_anew,
            links: programs.take_map(LINKS)?.try_into().map_err(unlike)?,
            pods: programs.take_map(PODS)?.try_into().map_err(unlike)?,
            node: programs.take_map(NODE)?.try_into().map_err(unlike)?,
            namespaces: programs.take_map(NAMESPACES)?.try_into().map_err(unlike)?,
        })
    }

    /// Every pod that was there is known again.
    pub(super) fn settled(&mut self) {
        self.begun_anew = false;
    }

    /// `guarded`: the pod's programs are inside it.
    pub(super) fn set(&mut self, endpoint: Endpoint, way: &Way, guarded: bool) -> Result<(), DatapathError> {
        let addr = |ip: Option<Ipv6Addr>| ip.map_or(Addr::default(), |ip| IpAddr::V6(ip).into());
        let mut link = Link {
            v4: IpAddr::V4(way.v4).into(),
            v6: addr(way.v6),
            gateway4: IpAddr::V4(way.gateway4).into(),
            gateway6: addr(way.gateway6),
            cookie: way.cookie.unwrap_or(0),
            ingress: PROFILE_OPEN,
            egress: PROFILE_OPEN,
            eni: way.eni.unwrap_or(0),
            flags: if way.short { LINK_SHORT } else { 0 },
            translated: 0,
            node_link: 0,
            netns: way.netns.unwrap_or(-1),
            _pad: 0,
        };
        if let Some(to_node) = &way.node_link {
            link.node_link = to_node.in_pod;
            link.gateway4 = IpAddr::V4(to_node.gateway4).into();
            link.gateway6 = IpAddr::V6(to_node.gateway6).into();
        }
        let old = found(self.links.get(&endpoint, 0))?;
        // Its connections go on.
        let unknown = if self.begun_anew { TRANSLATED_REQUESTS | TRANSLATED_ANSWERS } else { 0 };
        link.translated = old.map_or(unknown, |old| old.translated);
        // Whose device it is has not changed, nor what isolates it.
        if let Some(old) = &old
            && (old.v4, old.cookie) == (link.v4, link.cookie)
        {
            (link.ingress, link.egress) = (old.ingress, old.egress);
            link.netns = way.netns.unwrap_or(old.netns);
        }
        // Seen from inside the pod alone, one does not see it.
        if let (Some(old), None, None) = (&old, way.eni, way.node_link)
            && (old.v4, old.cookie) == (link.v4, link.cookie)
        {
            (link.node_link, link.gateway4, link.gateway6) = (old.node_link, old.gateway4, old.gateway6);
        }
        if let Some(old) = old
            && (old.v4, old.v6, old.cookie) != (link.v4, link.v6, link.cookie)
        {
            self.forget_keys(endpoint, &old)?;
        }
        self.links.insert(endpoint, link, 0).map_err(DatapathError::Ways)?;
        if let Some(cookie) = way.cookie {
            let flag = |on, flag| if on { flag } else { 0 };
            let flags = NETNS_POD | flag(way.per_packet, NETNS_PER_PACKET) | flag(guarded, NETNS_GUARDED);
            self.namespaces.insert(cookie, flags, 0).map_err(DatapathError::Ways)?;
        }
        let (ifindex, flags) = match (way.eni, way.node_link) {
            (Some(_), _) => (endpoint, if way.short && !way.limited { POD_SHORT } else { 0 }),
            (None, Some(link)) => (link.in_node, POD_AWAY | POD_ANSWERS),
            (None, None) => return Ok(()),
        };
        let flags = if isolates(&link) { flags | POD_ISOLATED } else { flags };
        for addr in addresses(&link) {
            let pod = Pod { endpoint, ifindex, flags, translated: link.translated };
            self.pods.insert(addr, pod, 0).map_err(DatapathError::Ways)?;
        }
        Ok(())
    }

    /// How policies isolate the pod. Before its addresses say so its link does.
    /// `false` when there is no such pod.
    pub(super) fn isolate(&mut self, endpoint: Endpoint, ingress: u64, egress: u64) -> Result<bool, DatapathError> {
        let Some(link) = found(self.links.get(&endpoint, 0))? else { return Ok(false) };
        if (link.ingress, link.egress) == (ingress, egress) {
            return Ok(true);
        }
        let link = Link { ingress, egress, ..link };
        self.links.insert(endpoint, link, 0).map_err(DatapathError::Ways)?;
        for addr in addresses(&link) {
            let Some(pod) = found(self.pods.get(&addr, 0))?.filter(|pod| pod.endpoint == endpoint) else { continue };
            let flags = if isolates(&link) { pod.flags | POD_ISOLATED } else { pod.flags & !POD_ISOLATED };
            self.pods.insert(addr, Pod { flags, ..pod }, 0).map_err(DatapathError::Ways)?;
        }
        Ok(true)
    }

    /// The profiles of a pod; `None` when there is no such pod.
    pub(super) fn isolation(&self, endpoint: Endpoint) -> Result<Option<(u64, u64)>, DatapathError> {
        Ok(found(self.links.get(&endpoint, 0))?.map(|link| (link.ingress, link.egress)))
    }

    pub(super) fn forget(&mut self, endpoint: Endpoint) -> Result<(), DatapathError> {
        let Some(link) = found(self.links.get(&endpoint, 0))? else { return Ok(()) };
        self.forget_keys(endpoint, &link)?;
        gone(self.links.remove(&endpoint))
    }

    /// An address that another pod has by now is left alone.
    fn forget_keys(&mut self, endpoint: Endpoint, link: &Link) -> Result<(), DatapathError> {
        for addr in addresses(link) {
            if found(self.pods.get(&addr, 0))?.is_some_and(|pod| pod.endpoint == endpoint) {
                gone(self.pods.remove(&addr))?;
            }
        }
        // A namespace is one attachment's alone.
        if link.cookie == 0 { Ok(()) } else { gone(self.namespaces.remove(&link.cookie)) }
    }

    /// Removes what belongs to no attachment.
    pub(super) fn retain(&mut self, live: impl Fn(Endpoint) -> bool) -> Result<(), DatapathError> {
        let pods: Vec<_> = self.pods.iter().collect::<Result<_, _>>().map_err(DatapathError::Ways)?;
        for (addr, _) in pods.iter().filter(|(_, pod)| !live(pod.endpoint)) {
            gone(self.pods.remove(addr))?;
        }
        let links: Vec<_> = self.links.keys().collect::<Result<_, _>>().map_err(DatapathError::Ways)?;
        for endpoint in links.iter().filter(|endpoint| !live(**endpoint)) {
            self.forget(*endpoint)?;
        }
        let links: Vec<_> = self.links.iter().collect::<Result<_, _>>().map_err(DatapathError::Ways)?;
        let cookies: Vec<_> = self.namespaces.iter().collect::<Result<_, _>>().map_err(DatapathError::Ways)?;
        let orphan = |(cookie, flags): &&(u64, u32)| {
            flags & NETNS_POD != 0 && !links.iter().any(|(_, link)| link.cookie == *cookie)
        };
        for (cookie, _) in cookies.iter().filter(orphan) {
            gone(self.namespaces.remove(cookie))?;
        }
        Ok(())
    }

    /// The node's own namespace.
    pub(super) fn set_node_namespace(&mut self, cookie: u64) -> Result<(), DatapathError> {
        self.namespaces.insert(cookie, NETNS_NODE, 0).map_err(DatapathError::Ways)
    }

    /// Makes the node's own addresses these.
    pub(super) fn set_node(&mut self, addresses: &[IpAddr]) -> Result<(), DatapathError> {
        let wanted: BTreeSet<Addr> = addresses.iter().map(|ip| Addr::from(*ip)).collect();
        let there: BTreeSet<Addr> = self.node.keys().collect::<Result<_, _>>().map_err(DatapathError::Ways)?;
        for addr in wanted.difference(&there) {
            self.node.insert(addr, 0, 0).map_err(DatapathError::Ways)?;
        }
        for addr in there.difference(&wanted) {
            gone(self.node.remove(addr))?;
        }
        Ok(())
    }

    /// Whether a pod's packets may take the short way.
    pub(super) fn is_short(&self, endpoint: Endpoint) -> bool {
        self.links.get(&endpoint, 0).is_ok_and(|link| link.flags & LINK_SHORT != 0)
    }
}

fn isolates(link: &Link) -> bool {
    link.ingress != PROFILE_OPEN || link.egress != PROFILE_OPEN
}

fn addresses(link: &Link) -> impl Iterator<Item = Addr> {
    [link.v4, link.v6].into_iter().filter(|addr| *addr != Addr::default())
}

fn found<T>(entry: Result<T, MapError>) -> Result<Option<T>, DatapathError> {
    match entry {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(e) => Err(DatapathError::Ways(e)),
    }
}

/// Removing what is not there is success.
fn gone(removed: Result<(), MapError>) -> Result<(), DatapathError> {
    match removed {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(e) => Err(DatapathError::Ways(e)),
    }
}

fn unlike(e: MapError) -> DatapathError {
    DatapathError::Object(e.to_string())
}
