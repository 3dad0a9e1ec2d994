//! Packets and bytes per pod device.
//!
//! The user side makes and removes the entries; a device without one is not
//! counted. Values are per CPU and written with bottom halves off, so plain
//! additions lose nothing.

use aya_ebpf::{Global, btf_maps::PerCpuHashMap, macros::btf_map, programs::TcContext};
use fairway_ebpf_abi::{Counters, Endpoint, MAX_ENDPOINTS};

/// Memory is taken per pod that exists, not for the most there could be.
const BPF_F_NO_PREALLOC: usize = 1;

#[btf_map]
static COUNTERS: PerCpuHashMap<Endpoint, Counters, { MAX_ENDPOINTS as usize }, BPF_F_NO_PREALLOC> =
    PerCpuHashMap::new();

#[unsafe(no_mangle)]
static ENDPOINT: Global<Endpoint> = Global::new(0);

/// Which way a packet goes, as the pod sees it.
pub enum Direction {
    Ingress,
    Egress,
}

#[inline(always)]
pub fn count(ctx: &TcContext, direction: Direction) {
    // SAFETY: the context is the kernel's and valid while the program runs.
    let skb = unsafe { &*ctx.skb.skb };
    let endpoint = match ENDPOINT.load() {
        0 => skb.ifindex,
        own => own,
    };
    let Some(counters) = COUNTERS.get_ptr_mut(&endpoint) else { return };
    let packets = u64::from(skb.gso_segs.max(1));
    let bytes = u64::from(skb.len);
    // SAFETY: the entry is this CPU's and stays valid under the program's RCU
    // section even when the user side removes it meanwhile.
    let counters = unsafe { &mut *counters };
    match direction {
        Direction::Ingress => {
            counters.ingress_packets += packets;
            counters.ingress_bytes += bytes;
        }
        Direction::Egress => {
            counters.egress_packets += packets;
            counters.egress_bytes += bytes;
        }
    }
}
