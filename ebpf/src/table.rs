//! The table of flows, and a spare one for when it is full.
//!
//! The table forgets nothing by itself: the agent collects what has ended. What
//! finds no room there goes to the spare one, which forgets its oldest. A flow
//! that was forgotten is sent where its addresses and ports fall, which is the
//! same backend as long as its Service has not changed: so a node with too many
//! flows does without memory before it does without packets.
//!
//! Both are preallocated, so an entry that is removed may be another flow's at
//! once: values are copied, never kept.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::{HashMap, LruHashMap};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_map;
use fairway_ebpf_abi::{Addr, EVENT_TABLE_FULL, FLOW_ENDED, Flow, FlowKey, MAX_FLOWS, MAX_SPARE_FLOWS};

use crate::event;
use crate::packet::TCP;

#[btf_map]
static FLOWS: HashMap<FlowKey, Flow, { MAX_FLOWS as usize }> = HashMap::new();

#[btf_map]
static SPARE_FLOWS: LruHashMap<FlowKey, Flow, { MAX_SPARE_FLOWS as usize }> = LruHashMap::new();

/// How exact the time of use is.
const STEP: u64 = 1_000_000_000;
/// Nobody collects what is spare: a silent flow of datagrams counts as over after
/// this, as it would be in the table. A connection's is removed when its ports are
/// used anew.
const SPARE_SILENCE: u64 = 120 * STEP;
const EEXIST: i32 = -17;

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn entry(key: &FlowKey) -> Option<*mut Flow> {
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        return Some(flow);
    }
    let flow = SPARE_FLOWS.get_ptr_mut(key)?;
    // SAFETY: a value of the map; another flow's at worst, which is then young.
    let silent = now().wrapping_sub(unsafe { (*flow).last_used });
    (key.protocol == TCP || silent < SPARE_SILENCE).then_some(flow)
}

#[inline(always)]
pub fn is_there(key: &FlowKey) -> bool {
    entry(key).is_some()
}

/// Copies the entry and marks it as used. Seconds are exact enough for its end,
/// and spare the cache line a write per packet.
#[inline(always)]
pub fn find(key: &FlowKey, found: &mut Flow) -> bool {
    let Some(flow) = entry(key) else { return false };
    // SAFETY: as in `entry`.
    unsafe {
        let now = now();
        if now.wrapping_sub((*flow).last_used) > STEP {
            (*flow).last_used = now;
        }
        *found = *flow;
    }
    true
}

/// Copies the entry, and that is all.
#[inline(always)]
pub fn peek(key: &FlowKey, found: &mut Flow) -> bool {
    let Some(flow) = entry(key) else { return false };
    // SAFETY: as in `entry`.
    *found = unsafe { *flow };
    true
}

/// What there is by the key of an answer.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Nothing,
    /// Somebody else's.
    Another,
    Ours,
}

/// Marks the answer's entry as used if it is this client's (`peer`; a pod's says
/// nowhere); notes which of its ends will send no more, and forgets that when it
/// `opens` anew.
#[inline(always)]
pub fn hold(key: &FlowKey, client: &Addr, port: u16, ended: u16, opens: bool) -> Held {
    let Some(flow) = entry(key) else { return Held::Nothing };
    // SAFETY: as in `entry`.
    let flow = unsafe { &mut *flow };
    if flow.peer != *client || flow.peer_port != port {
        return Held::Another;
    }
    let now = now();
    if now.wrapping_sub(flow.last_used) > STEP {
        flow.last_used = now;
    }
    if opens {
        flow.flags &= !FLOW_ENDED;
    }
    if ended & !flow.flags != 0 {
        flow.flags |= ended;
        flow.last_used = now;
    }
    Held::Ours
}

/// Whether it was put there, and nothing else was.
#[inline(always)]
pub fn add(key: &FlowKey, flow: &Flow) -> bool {
    if SPARE_FLOWS.get_ptr(key).is_some() {
        return false;
    }
    match FLOWS.insert(key, flow, u64::from(BPF_NOEXIST)) {
        Ok(()) => true,
        Err(EEXIST) => false,
        Err(_) => SPARE_FLOWS.insert(key, flow, u64::from(BPF_ANY)).is_ok(),
    }
}

#[inline(always)]
pub fn put(key: &FlowKey, flow: &Flow) -> bool {
    if FLOWS.insert(key, flow, u64::from(BPF_ANY)).is_ok() {
        return true;
    }
    event::count(EVENT_TABLE_FULL);
    SPARE_FLOWS.insert(key, flow, u64::from(BPF_ANY)).is_ok()
}

#[inline(always)]
pub fn remove(key: &FlowKey) {
    let _ = FLOWS.remove(key);
    let _ = SPARE_FLOWS.remove(key);
}
