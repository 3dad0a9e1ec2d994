//! Packets and bytes per pod device.
//!
//! The user side makes and removes the entries; a device without one is not
//! counted. Values are per CPU and written with bottom halves off, so plain
//! additions lose nothing.

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::{Global, btf_maps::PerCpuHashMap, macros::btf_map, programs::TcContext};
use fairway_ebpf_abi::{Counters, Endpoint, MAX_ENDPOINTS};

/// Memory is taken per entry that exists, not for the most there could be, and a
/// removed one is not used again under a reader's hands.
pub const NO_PREALLOC: usize = 1;

#[btf_map]
static COUNTERS: PerCpuHashMap<Endpoint, Counters, { MAX_ENDPOINTS as usize }, NO_PREALLOC> = PerCpuHashMap::new();

#[unsafe(no_mangle)]
static ENDPOINT: Global<Endpoint> = Global::new(0);

/// The number of the device this program is attached to.
#[inline(always)]
pub fn endpoint(ctx: &TcContext) -> Endpoint {
    match ENDPOINT.load() {
        // SAFETY: the context is the kernel's and valid while the program runs.
        0 => unsafe { (*ctx.skb.skb).ifindex },
        own => own,
    }
}

/// Whether it is attached inside a pod rather than on the node's side.
#[inline(always)]
pub fn is_in_pod() -> bool {
    ENDPOINT.load() != 0
}

/// The verdict that drops. Inside a pod, on the way out, the plain one would tell
/// the sender, who would send again at once: a redirect to nowhere does not.
#[inline(always)]
pub fn drop() -> i32 {
    if is_in_pod() {
        // SAFETY: takes two numbers.
        unsafe { bpf_redirect(u32::MAX, 0) as i32 }
    } else {
        TC_ACT_SHOT
    }
}

/// A packet's size as counters have it.
#[derive(Clone, Copy)]
pub struct Size {
    packets: u64,
    bytes: u64,
}

impl Size {
    #[inline(always)]
    fn of(ctx: &TcContext) -> Self {
        // SAFETY: as in `endpoint`.
        let skb = unsafe { &*ctx.skb.skb };
        Self { packets: u64::from(skb.gso_segs.max(1)), bytes: u64::from(skb.len) }
    }
}

#[inline(always)]
fn counters(of: Endpoint) -> Option<&'static mut Counters> {
    // SAFETY: the entry is this CPU's and stays valid under the program's RCU
    // section even when the user side removes it meanwhile.
    COUNTERS.get_ptr_mut(&of).map(|counters| unsafe { &mut *counters })
}

/// Left the pod; `short` when past the node's stack.
#[inline(always)]
pub fn egress(ctx: &TcContext, of: Endpoint, short: bool) {
    let Some(counters) = counters(of) else { return };
    let size = Size::of(ctx);
    counters.egress_packets += size.packets;
    counters.egress_bytes += size.bytes;
    if short {
        counters.egress_short += size.packets;
    }
}

/// Enters the pod by the node's stack.
#[inline(always)]
pub fn ingress(ctx: &TcContext, of: Endpoint) {
    let Some(counters) = counters(of) else { return };
    let size = Size::of(ctx);
    counters.ingress_packets += size.packets;
    counters.ingress_bytes += size.bytes;
}

/// Enters the pod past the node's stack.
#[inline(always)]
pub fn short_ingress(ctx: &TcContext, of: Endpoint) {
    let Some(counters) = counters(of) else { return };
    let size = Size::of(ctx);
    counters.ingress_packets += size.packets;
    counters.ingress_bytes += size.bytes;
    counters.ingress_short += size.packets;
}

/// Was dropped: no policy lets it into the pod.
#[inline(always)]
pub fn denied_ingress(ctx: &TcContext, of: Endpoint) {
    if let Some(counters) = counters(of) {
        counters.denied_ingress += Size::of(ctx).packets;
    }
}

/// Was dropped: no policy lets it out.
#[inline(always)]
pub fn denied_egress(ctx: &TcContext, of: Endpoint) {
    if let Some(counters) = counters(of) {
        counters.denied_egress += Size::of(ctx).packets;
    }
}

/// Was dropped: not from the pod's address.
#[inline(always)]
pub fn spoofed(ctx: &TcContext, of: Endpoint) {
    if let Some(counters) = counters(of) {
        counters.spoofed += Size::of(ctx).packets;
    }
}
