//! Map keys, values and constants shared by Fairway's kernel and user side.
//!
//! Every type here is plain old data with a fixed layout: no padding that the
//! verifier would see uninitialised, all fields naturally aligned. The layout
//! is asserted at compile time.
#![no_std]

/// Version of the map layouts; part of the pin directory's name. Raise it when
/// a key, a value or a map's meaning changes.
pub const LAYOUT_VERSION: u32 = 1;

/// How many pod devices one node can have attached at a time.
pub const MAX_ENDPOINTS: u32 = 4096;

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
/// Name of the program constant that holds the endpoint; 0 means the interface
/// index of the packet.
pub const ENDPOINT: &str = "ENDPOINT";
/// Name of the program for packets that leave a pod.
pub const POD_EGRESS: &str = "pod_egress";
/// Name of the program for packets that enter a pod.
pub const POD_INGRESS: &str = "pod_ingress";

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
}

const _: () = {
    assert!(size_of::<Endpoint>() == 4);
    assert!(size_of::<Counters>() == 32);
    assert!(align_of::<Counters>() == 8);
    assert!(core::mem::offset_of!(Counters, ingress_bytes) == 8);
    assert!(core::mem::offset_of!(Counters, egress_packets) == 16);
    assert!(core::mem::offset_of!(Counters, egress_bytes) == 24);
};

// SAFETY: `Counters` is `repr(C)`, has no padding, and any bytes are a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Counters {}
