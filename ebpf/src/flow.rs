//! Flows of the packet path: who was sent where, and how answers are to look.
//!
//! A translated flow has a forward entry, which holds the backend, and a reverse
//! one, which the next forward packet restores if it is lost.

use aya_ebpf::btf_maps::{LruHashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use fairway_ebpf_abi::{
    Addr, FLOW_FORWARD, FLOW_REVERSE, Flow, FlowKey, Fragment, FragmentKey, FrontendKey, MAX_FRAGMENTS, RuleKey,
};

use crate::packet::{Packet, Ports};
use crate::table;

#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment, { MAX_FRAGMENTS as usize }> = LruHashMap::new();

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
    /// The flow as policies see it: the pod first.
    pub judged: FlowKey,
    pub rule: RuleKey,
    /// Of the policies' tables.
    pub generation: u32,
    part: FragmentKey,
    becomes: Fragment,
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

/// All zero, without a call.
pub const NO_FLOW: Flow =
    Flow { last_used: 0, addr: NOWHERE, port: 0, flags: 0, backend: 0, peer: NOWHERE, peer_port: 0, _pad: [0; 3] };
pub const NOWHERE: Addr = Addr { words: [0; 4] };

impl Scratch {
    /// The first fragment, between `self.src` and `self.dst`, has become `packet`: the
    /// later ones are to follow it.
    #[inline(always)]
    pub fn remember_fragment(&mut self, packet: &Packet, kind: u8) {
        self.part = fragment_key(self.src, self.dst, packet, kind);
        self.becomes = Fragment { src: packet.src, dst: packet.dst };
        let _ = FRAGMENTS.insert(&self.part, &self.becomes, 0);
    }

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
        if !table::add(&self.reverse, &self.made) {
            if table::find(&self.reverse, &mut self.found)
                && (self.found.addr != self.made.addr || self.found.port != self.made.port)
            {
                return Made::Collides;
            }
            // An earlier one between the same ends: it begins anew.
            if !table::put(&self.reverse, &self.made) {
                return Made::Full;
            }
        }
        self.made.addr = self.reverse.src;
        self.made.port = self.reverse.sport;
        if !table::put(&self.forward, &self.made) {
            table::remove(&self.reverse);
            return Made::Full;
        }
        Made::Done
    }

    /// The reverse entry, if it is not there.
    #[inline(always)]
    pub fn restore(&mut self, backend: u32) {
        if !table::is_there(&self.reverse) {
            self.describe_answers(backend);
            table::add(&self.reverse, &self.made);
        }
    }

    #[inline(always)]
    fn describe_answers(&mut self, backend: u32) {
        let (addr, port) = (self.forward.dst, self.forward.dport);
        self.made = Flow { last_used: table::now(), addr, port, backend, ..NO_FLOW };
    }
}

pub enum Made {
    Done,
    /// The same client port talks to the same backend by another address.
    Collides,
    /// Not even the spare table takes it.
    Full,
}

#[inline(always)]
fn fragment_key(src: Addr, dst: Addr, packet: &Packet, kind: u8) -> FragmentKey {
    FragmentKey { src, dst, id: packet.fragment_id, protocol: u16::from(packet.protocol), kind: u16::from(kind) }
}

#[inline(always)]
pub fn fragment(packet: &Packet, kind: u8) -> Option<&'static Fragment> {
    // SAFETY: read at once; a reused entry is another packet's, rarely.
    unsafe { FRAGMENTS.get(&fragment_key(packet.src, packet.dst, packet, kind)) }
}

pub const FORWARD: u8 = FLOW_FORWARD;
pub const REVERSE: u8 = FLOW_REVERSE;
