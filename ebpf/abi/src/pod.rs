//! Pods' devices: what passes them, and the short cuts between them.

use crate::Addr;

/// How many pod devices one node can have attached at a time.
pub const MAX_ENDPOINTS: u32 = 4096;
/// How many addresses those pods can have, and how many the node itself.
pub const MAX_POD_ADDRESSES: u32 = 2 * MAX_ENDPOINTS;
pub const MAX_NODE_ADDRESSES: u32 = 4096;

/// Which pod device a packet passes; the key of per-pod maps.
///
/// Devices in the node's namespace are numbered by their interface index, which
/// is below [`IN_POD`]. A device inside a pod has an index that means nothing
/// here; its programs carry a number of their own, at or above [`IN_POD`].
pub type Endpoint = u32;

/// First endpoint number of devices inside pods.
pub const IN_POD: Endpoint = 1 << 31;

/// Name of the map of [`Counters`] by [`Endpoint`], one value per CPU.
pub const COUNTERS: &str = "COUNTERS";
/// Name of the map of [`Link`] by [`Endpoint`].
pub const LINKS: &str = "LINKS";
/// Name of the map of [`Pod`] by [`Addr`]: this node's pods.
pub const PODS: &str = "PODS";
/// Name of the map of `u32` (unused) by [`Addr`]: the node's own addresses.
pub const NODE: &str = "NODE";
/// Name of the array of one [`Uplink`].
pub const UPLINK: &str = "UPLINK";
/// Name of the program constant that holds the endpoint; 0 means the interface
/// index of the packet.
pub const ENDPOINT: &str = "ENDPOINT";
/// Name of the program for packets that leave a pod.
pub const POD_EGRESS: &str = "pod_egress";
/// Name of the program for packets that enter a pod.
pub const POD_INGRESS: &str = "pod_ingress";
/// Name of the program for packets that enter the node on a shared ENI.
pub const ENI_INGRESS: &str = "eni_ingress";
/// Name of the program for packets that enter a pod with an ENI of its own by its
/// link to the node. What leaves it there meets [`NODE_INGRESS`].
pub const LINK_EGRESS: &str = "link_egress";
/// Names of the programs for packets that enter and leave the node on the ENI
/// that its own addresses are on.
pub const NODE_INGRESS: &str = "node_ingress";
pub const NODE_EGRESS: &str = "node_egress";

/// What passed a pod's device. Directions are the pod's: ingress is what it
/// receives. Segments of an offloaded packet count as packets; its bytes count
/// its headers once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub ingress_packets: u64,
    pub ingress_bytes: u64,
    pub egress_packets: u64,
    pub egress_bytes: u64,
    /// Of these, packets that took the short way past the node's stack.
    pub ingress_short: u64,
    pub egress_short: u64,
    /// Dropped: the source was not the pod's.
    pub spoofed: u64,
    /// Dropped: no policy lets it in, or out.
    pub denied_ingress: u64,
    pub denied_egress: u64,
}

/// What is behind a pod's device, by its endpoint number.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Cookie of the pod's network namespace; 0 when it is not known.
    pub cookie: u64,
    /// Profiles ([`crate::RuleKey`]): how policies isolate the pod.
    pub ingress: u64,
    pub egress: u64,
    /// The pod's addresses; zero when it has none of the family.
    pub v4: Addr,
    pub v6: Addr,
    /// Next hops, as in the packet; zero when there is none: on the ENI, or on the
    /// link to the node.
    pub gateway4: Addr,
    pub gateway6: Addr,
    /// Interface index of the ENI the pod's packets leave by.
    pub eni: u32,
    /// `LINK_*`.
    pub flags: u32,
    /// `TRANSLATED_*`. Written by the programs.
    pub translated: u32,
    /// Of a pod with an ENI of its own: interface index, in the pod, of its link to
    /// the node; 0 when it is not known.
    pub node_link: u32,
    /// Number of the pod's network namespace in the node's; negative when it is not
    /// known.
    pub netns: i32,
    pub _pad: u32,
}

/// Packets may go straight out of the ENI and straight to pods of this node.
pub const LINK_SHORT: u32 = 1;

/// A packet of the pod to a Service was translated: from then on all of them are
/// looked at, in both directions.
pub const TRANSLATED_REQUESTS: u32 = 1;
/// A client from outside was brought to the pod: it may be answering.
pub const TRANSLATED_ANSWERS: u32 = 1 << 1;

/// The device that carries the node's own traffic; all zero when it is not known.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uplink {
    /// The node's addresses on it; zero when it has none of the family.
    pub v4: Addr,
    pub v6: Addr,
    pub ifindex: u32,
    /// `TRANSLATED_ANSWERS`: processes of the node itself have clients from outside.
    /// Written by the programs.
    pub translated: u32,
}

/// A pod of this node, by address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub endpoint: Endpoint,
    /// Interface index of the host side of its link.
    pub ifindex: u32,
    /// `POD_*`.
    pub flags: u32,
    /// As in [`Link`].
    pub translated: u32,
}

/// Packets to it may be handed over past the node's stack: its link has no queue
/// that limits what it receives.
pub const POD_SHORT: u32 = 1;

/// It has an ENI of its own: other pods reach it through the VPC, and the node
/// alone by this link, so that it answers there.
pub const POD_AWAY: u32 = 1 << 1;

/// With [`POD_AWAY`]: it answers by this link to clients that the node has brought
/// to it as well.
pub const POD_ANSWERS: u32 = 1 << 2;

/// Policies isolate it, in one direction at least.
pub const POD_ISOLATED: u32 = 1 << 3;

const _: () = {
    assert!(size_of::<Endpoint>() == 4);
    assert!(size_of::<Counters>() == 9 * 8 && align_of::<Counters>() == 8);
    assert!(size_of::<Link>() == 3 * 8 + 4 * 16 + 6 * 4 && align_of::<Link>() == 8);
    assert!(size_of::<Pod>() == 4 * 4 && align_of::<Pod>() == 4);
    assert!(size_of::<Uplink>() == 2 * 16 + 2 * 4 && align_of::<Uplink>() == 4);
};

// SAFETY: each is `repr(C)`, has no padding (asserted above), and any bytes are
// a value of it.
#[cfg(feature = "user")]
mod user {
    unsafe impl aya::Pod for super::Counters {}
    unsafe impl aya::Pod for super::Link {}
    unsafe impl aya::Pod for super::Pod {}
    unsafe impl aya::Pod for super::Uplink {}
}
