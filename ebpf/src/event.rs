//! Telling what was done with packets: a count of everything, and samples of
//! what somebody may ask about.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::btf_maps::{PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{Addr, EVENT_COUNT, Pace, SAMPLE_INTERVAL, SAMPLES_SIZE, Sample};

use crate::packet::{Packet, Ports};
use crate::{account, table};

#[btf_map]
static EVENTS: PerCpuArray<u64, { EVENT_COUNT as usize }> = PerCpuArray::new();

#[btf_map]
static SAMPLES: RingBuf<(), { SAMPLES_SIZE as usize }> = RingBuf::new();

#[btf_map]
static PACES: PerCpuArray<Pace, { EVENT_COUNT as usize }> = PerCpuArray::new();

#[inline(always)]
pub fn count(which: u32) {
    if let Some(count) = EVENTS.get_ptr_mut(which) {
        // SAFETY: this CPU's own, written with bottom halves off.
        unsafe { *count += 1 };
    }
}

/// Counts it and, not too often, tells whose packet it was.
#[inline(always)]
pub fn tell(ctx: &TcContext, which: u32) {
    event_tell(ctx.skb.skb, which);
}

/// A global function, which the verifier walks once: nothing is as rare as this.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn event_tell(skb: *mut __sk_buff, which: u32) -> i32 {
    let ctx = &TcContext::new(skb);
    count(which);
    let Some(pace) = PACES.get_ptr_mut(which) else { return 0 };
    // SAFETY: this CPU's own, written with bottom halves off.
    let pace = unsafe { &mut *pace };
    let now = table::now();
    if now.wrapping_sub(pace.last) < SAMPLE_INTERVAL {
        pace.untold = pace.untold.saturating_add(1);
        return 0;
    }
    // Looked at before there is an entry to fill in, which must be sent whatever
    // comes.
    let (src, dst, protocol, ports) = match Packet::parse(ctx) {
        Some(packet) => (packet.src, packet.dst, packet.protocol, packet.ports(ctx)),
        None => (Addr::default(), Addr::default(), 0, Ports::NONE),
    };
    let endpoint = account::endpoint(ctx);
    let Some(mut entry) = SAMPLES.reserve_untyped::<Sample>(0) else {
        // Nobody reads.
        pace.untold = pace.untold.saturating_add(1);
        return 0;
    };
    entry.write(Sample {
        time: now,
        src,
        dst,
        what: which,
        endpoint,
        untold: pace.untold,
        sport: ports.source,
        dport: ports.destination,
        protocol: u32::from(protocol),
        _pad: 0,
    });
    entry.submit(0);
    *pace = Pace { last: now, untold: 0, _pad: 0 };
    0
}
