//! Flows of the packet path: who was sent where, and how answers are to look.
//!
//! A translated flow has a forward entry, which holds the backend, and a reverse
//! one, which the next forward packet restores if it is lost. The table is
//! preallocated, so an entry that is removed may be another flow's at once:
//! values are copied, never kept.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::{HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_map;
use fairway_ebpf_abi::{
    Addr, FLOW_ENDED, FLOW_FORWARD, FLOW_REVERSE, Flow, FlowKey, Fragment, FragmentKey, FrontendKey, MAX_FLOWS,
    MAX_FRAGMENTS,
};

use crate::packet::{Packet, Ports};

#[btf_map]
static FLOWS: HashMap<FlowKey, Flow, { MAX_FLOWS as usize }> = HashMap::new();

#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment, { MAX_FRAGMENTS as usize }> = LruHashMap::new();

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
pub fn key(packet: &Packet, ports: Ports, kind: u8) -> FlowKey {
    FlowKey {
        src: packet.src,
        dst: packet.dst,
        sport: ports.source,
        dport: ports.destination,
        protocol: packet.protocol,
        kind,
        _pad: 0,
    }
}

/// Room for what does not fit on the stack: 512 bytes for a program and all it
/// calls. One per CPU; packet programs do not interrupt each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scratch {
    /// The flow's first direction, as its packets look before translation.
    pub forward: FlowKey,
    pub reverse: FlowKey,
    /// What was found under one of them.
    pub found: Flow,
    pub made: Flow,
    pub frontend: FrontendKey,
    /// The packet's ends before it was changed.
    pub src: Addr,
    pub dst: Addr,
    /// Who the backend sees.
    pub client: Addr,
    /// Of the flow's ends.
    pub hash: u32,
    /// What the packet is to become.
    pub wanted: Ends,
}

/// Both ends of a packet, ports in network byte order.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ends {
    pub src: Addr,
    pub dst: Addr,
    pub sport: u16,
    pub dport: u16,
}

#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: this CPU's own, and no other program runs on it before this one ends.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// How exact the time of use is.
const STEP: u64 = 1_000_000_000;

/// Copies the entry and marks it as used. Seconds are exact enough for its end,
/// and spare the cache line a write per packet.
#[inline(always)]
pub fn find(key: &FlowKey, found: &mut Flow) -> bool {
    let Some(flow) = FLOWS.get_ptr_mut(key) else { return false };
    // SAFETY: a value of the map; another flow's at worst, which is then young.
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
    // SAFETY: as in `find`.
    match unsafe { FLOWS.get(key) } {
        Some(flow) => {
            *found = *flow;
            true
        }
        None => false,
    }
}

/// All zero, without a call.
pub const NO_FLOW: Flow =
    Flow { last_used: 0, addr: NOWHERE, port: 0, flags: 0, backend: 0, peer: NOWHERE, peer_port: 0, _pad: [0; 3] };
const NOWHERE: Addr = Addr { words: [0; 4] };

/// What there is by the key of an answer.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Nothing,
    /// Somebody else's.
    Another,
    Ours,
}

/// Marks the answer's entry as used if it is this client's; notes which of its
/// ends will send no more, and forgets that when it `opens` anew.
#[inline(always)]
pub fn hold(key: &FlowKey, client: &Addr, port: u16, ended: u16, opens: bool) -> Held {
    let Some(flow) = FLOWS.get_ptr_mut(key) else { return Held::Nothing };
    // SAFETY: as in `find`.
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
    FLOWS.insert(key, flow, u64::from(BPF_NOEXIST)).is_ok()
}

#[inline(always)]
pub fn put(key: &FlowKey, flow: &Flow) -> bool {
    FLOWS.insert(key, flow, u64::from(BPF_ANY)).is_ok()
}

#[inline(always)]
pub fn remove(key: &FlowKey) {
    let _ = FLOWS.remove(key);
}

impl Scratch {
    /// Answers come from `backend`, a backend, to `self.client`.
    #[inline(always)]
    pub fn set_reverse(&mut self, backend: &Addr, port: u16) {
        self.reverse = self.forward;
        self.reverse.src = *backend;
        self.reverse.dst = self.client;
        self.reverse.sport = port;
        self.reverse.dport = self.forward.sport;
        self.reverse.kind = FLOW_REVERSE;
    }

    /// Both entries of a new flow. What is there already by the reverse key is in
    /// `self.found` afterwards.
    #[inline(always)]
    pub fn make(&mut self, backend: u32) -> Made {
        self.describe_answers(backend);
        if FLOWS.insert(&self.reverse, &self.made, u64::from(BPF_NOEXIST)).is_err() {
            if !find(&self.reverse, &mut self.found) {
                return Made::Full;
            }
            if self.found.addr != self.made.addr || self.found.port != self.made.port {
                return Made::Collides;
            }
        }
        self.made.addr = self.reverse.src;
        self.made.port = self.reverse.sport;
        match FLOWS.insert(&self.forward, &self.made, u64::from(BPF_ANY)) {
            Ok(()) => Made::Done,
            Err(_) => {
                let _ = FLOWS.remove(&self.reverse);
                Made::Full
            }
        }
    }

    /// The reverse entry, if it is not there.
    #[inline(always)]
    pub fn restore(&mut self, backend: u32) {
        if FLOWS.get_ptr(&self.reverse).is_none() {
            self.describe_answers(backend);
            let _ = FLOWS.insert(&self.reverse, &self.made, u64::from(BPF_NOEXIST));
        }
    }

    #[inline(always)]
    fn describe_answers(&mut self, backend: u32) {
        let (addr, port) = (self.forward.dst, self.forward.dport);
        self.made = Flow { last_used: now(), addr, port, backend, ..NO_FLOW };
    }
}

pub enum Made {
    Done,
    /// The same client port talks to the same backend by another address.
    Collides,
    Full,
}

#[inline(always)]
fn fragment_key(src: Addr, dst: Addr, packet: &Packet, kind: u8) -> FragmentKey {
    FragmentKey { src, dst, id: packet.fragment_id, protocol: u16::from(packet.protocol), kind: u16::from(kind) }
}

/// The first fragment has become `packet`: the later ones are to follow it.
#[inline(always)]
pub fn remember_fragment(src: Addr, dst: Addr, packet: &Packet, kind: u8) {
    let to = Fragment { src: packet.src, dst: packet.dst };
    let _ = FRAGMENTS.insert(&fragment_key(src, dst, packet, kind), &to, 0);
}

#[inline(always)]
pub fn fragment(packet: &Packet, kind: u8) -> Option<&'static Fragment> {
    // SAFETY: read at once; a reused entry is another packet's, rarely.
    unsafe { FRAGMENTS.get(&fragment_key(packet.src, packet.dst, packet, kind)) }
}

pub const FORWARD: u8 = FLOW_FORWARD;
pub const REVERSE: u8 = FLOW_REVERSE;
