//! ICMP errors about translated flows: the packet they quote is translated as
//! well, or whoever sent it would not know it. Path MTU discovery through a
//! Service works by this.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{Addr, EVENT_ERROR_TRANSLATED, EVENT_UNWRITABLE, FLOW_ANSWER, FLOW_OUTSIDE, FlowKey};

use crate::flow::{self, FORWARD, REVERSE, Scratch};
use crate::packet::{ICMP, Packet, SCTP, TCP, UDP};
use crate::rewrite::{End, ICMP6};
use crate::{NEXT, event, outside, short, table};

/// What an error quotes: the packet that caused it.
pub struct Quoted {
    v4: bool,
    pub src: Addr,
    pub dst: Addr,
    pub protocol: u8,
    pub sport: u16,
    pub dport: u16,
    /// Where its network and transport headers begin.
    network: usize,
    transport: usize,
}

impl Quoted {
    /// `None` when the packet is no error or quotes too little.
    #[inline(always)]
    pub fn of(ctx: &TcContext, packet: &Packet) -> Option<Self> {
        if packet.later_fragment {
            return None;
        }
        let kind: u8 = ctx.load(packet.transport).ok()?;
        let error = match packet.protocol {
            // Unreachable, time exceeded, parameter problem.
            ICMP => matches!(kind, 3 | 11 | 12),
            // Also: packet too big.
            ICMP6 => matches!(kind, 1..=4),
            _ => false,
        };
        if !error {
            return None;
        }
        let network = packet.transport + 8;
        let (src, dst, protocol, transport) = if packet.v4 {
            let first: u8 = ctx.load(network).ok()?;
            let ends: [u32; 2] = ctx.load(network + 12).ok()?;
            let length = usize::from(first & 0x0f) * 4;
            (Addr::v4(ends[0]), Addr::v4(ends[1]), ctx.load(network + 9).ok()?, network + length)
        } else {
            let src: [u32; 4] = ctx.load(network + 8).ok()?;
            let dst: [u32; 4] = ctx.load(network + 24).ok()?;
            (Addr::v6(src), Addr::v6(dst), ctx.load(network + 6).ok()?, network + 40)
        };
        if !matches!(protocol, TCP | UDP | SCTP) {
            return None;
        }
        let ports: [u16; 2] = ctx.load(transport).ok()?;
        Some(Self { v4: packet.v4, src, dst, protocol, sport: ports[0], dport: ports[1], network, transport })
    }

    /// The flow's key as seen from the other end of the quoted packet.
    #[inline(always)]
    fn answered(&self, kind: u8) -> FlowKey {
        FlowKey {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            protocol: self.protocol,
            kind,
            _pad: 0,
        }
    }

    /// Changes one end of the quoted packet. Its own header checksum makes up for
    /// an IPv4 address in the sum around it; everything else is made up for there.
    #[inline(always)]
    fn set(&self, ctx: &TcContext, around: &Packet, end: End, to: &Addr, port: u16) -> Option<()> {
        let sum = around.transport + 2;
        let (from, from_port) = if end == End::Source { (self.src, self.sport) } else { (self.dst, self.dport) };
        if self.v4 {
            let at = self.network + if end == End::Source { 12 } else { 16 };
            let (from, to) = (from.words[3], to.words[3]);
            ctx.l3_csum_replace(self.network + 10, u64::from(from), u64::from(to), 4).ok()?;
            ctx.store(at, &to, 0).ok()?;
        } else {
            let at = self.network + if end == End::Source { 8 } else { 24 };
            for i in 0..4 {
                ctx.l4_csum_replace(sum, u64::from(from.words[i]), u64::from(to.words[i]), 4).ok()?;
            }
            ctx.store(at, &to.words, 0).ok()?;
        }
        if from_port != port {
            ctx.l4_csum_replace(sum, u64::from(from_port), u64::from(port), 2).ok()?;
            ctx.store(self.transport + if end == End::Source { 0 } else { 2 }, &port, 0).ok()?;
        }
        Some(())
    }
}

/// To a pod, about what it sent to a Service: it knows the Service alone.
#[inline(always)]
pub fn entering(ctx: &TcContext) {
    note(ctx, error_entering(ctx.skb.skb));
}

/// What became of an error, as the global functions say it: 0 when it was about
/// no flow that is known, else whether it was translated.
const TRANSLATED: i32 = 1;
const UNWRITABLE: i32 = 2;

#[inline(always)]
fn said(written: Option<bool>) -> i32 {
    match written {
        None => 0,
        Some(true) => TRANSLATED,
        Some(false) => UNWRITABLE,
    }
}

/// Told from the outermost function: all that call each other share 512 bytes.
#[inline(always)]
fn note(ctx: &TcContext, outcome: i32) {
    match outcome {
        TRANSLATED => event::count(EVENT_ERROR_TRANSLATED),
        UNWRITABLE => event::tell(ctx, EVENT_UNWRITABLE),
        _ => {}
    }
}

/// A global function, which the verifier walks once: errors are rare enough to be
/// read again.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn error_entering(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return 0 };
    said(translate_entering(ctx, packet))
}

#[inline(always)]
fn translate_entering(ctx: &TcContext, packet: &mut Packet) -> Option<bool> {
    let quoted = Quoted::of(ctx, packet)?;
    let scratch = flow::scratch()?;
    scratch.reverse = quoted.answered(REVERSE);
    if !table::find(&scratch.reverse, &mut scratch.found) {
        return None;
    }
    let flow = &scratch.found;
    let from_backend = packet.src == quoted.dst;
    let written = quoted.set(ctx, packet, End::Destination, &flow.addr, flow.port).is_some()
        && (!from_backend || packet.set_address(ctx, End::Source, &flow.addr).is_some());
    Some(written)
}

/// From anywhere to the node, about a flow of a client from outside: about what
/// was answered to the client, or about what was sent on to a backend. A verdict,
/// or one of [`outside::ended_by`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn error_arriving(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return NEXT };
    let Some(quoted) = Quoted::of(ctx, packet) else { return NEXT };
    let Some(scratch) = flow::scratch() else { return NEXT };
    scratch.forward = quoted.answered(FLOW_OUTSIDE);
    if !table::find(&scratch.forward, &mut scratch.found) {
        return about_request(ctx, packet, &quoted, scratch);
    }
    // The backend knows itself, and whom it takes for the client.
    let flow = &scratch.found;
    let kept = flow.peer == scratch.forward.src;
    let written = quoted.set(ctx, packet, End::Source, &flow.addr, flow.port).is_some()
        && quoted.set(ctx, packet, End::Destination, &flow.peer, flow.peer_port).is_some()
        && packet.set_address(ctx, End::Destination, &flow.addr).is_some();
    // From a router, whose address the stack forwards, the VPC does not.
    if written && (kept || short::pod(&flow.addr).is_some()) {
        event::count(EVENT_ERROR_TRANSLATED);
        return NEXT;
    }
    match written && packet.set_address(ctx, End::Source, &flow.peer).is_some() {
        true => translated_to_outside(ctx, packet),
        false => outside::ended_by(EVENT_UNWRITABLE),
    }
}

/// From a pod, or a process of the node, that answers a client from outside.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn error_answering(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return NEXT };
    let Some(quoted) = Quoted::of(ctx, packet) else { return NEXT };
    let Some(scratch) = flow::scratch() else { return NEXT };
    about_request(ctx, packet, &quoted, scratch)
}

/// Whether a pod tells somebody whom the node has brought to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn error_known(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &Packet::parse(ctx) else { return 0 };
    let Some(quoted) = Quoted::of(ctx, packet) else { return 0 };
    let Some(scratch) = flow::scratch() else { return 0 };
    scratch.reverse = quoted.answered(FLOW_ANSWER);
    i32::from(table::is_there(&scratch.reverse))
}

/// About what was sent on to a backend: the client is told, as if the Service did.
#[inline(always)]
fn about_request(ctx: &TcContext, packet: &mut Packet, quoted: &Quoted, scratch: &mut Scratch) -> i32 {
    scratch.reverse = quoted.answered(FLOW_ANSWER);
    if !table::find(&scratch.reverse, &mut scratch.found) {
        return NEXT;
    }
    let flow = &scratch.found;
    // A router in between is not the node's to speak for, and the VPC lets nobody
    // do so: the node itself says it then.
    let from = if packet.src == quoted.dst { flow.addr } else { packet.dst };
    let written = quoted.set(ctx, packet, End::Source, &flow.peer, flow.peer_port).is_some()
        && quoted.set(ctx, packet, End::Destination, &flow.addr, flow.port).is_some()
        && packet.set_address(ctx, End::Source, &from).is_some()
        && packet.set_address(ctx, End::Destination, &flow.peer).is_some();
    if written { translated_to_outside(ctx, packet) } else { outside::ended_by(EVENT_UNWRITABLE) }
}

#[inline(always)]
fn translated_to_outside(ctx: &TcContext, packet: &Packet) -> i32 {
    event::count(EVENT_ERROR_TRANSLATED);
    outside::leave(ctx, packet)
}

/// From a pod, about what a Service answered: the backend knows itself alone.
#[inline(always)]
pub fn leaving(ctx: &TcContext) -> bool {
    let outcome = error_leaving(ctx.skb.skb);
    note(ctx, outcome);
    outcome != 0
}

/// As [`error_entering`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn error_leaving(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return 0 };
    said(translate_leaving(ctx, packet))
}

#[inline(always)]
fn translate_leaving(ctx: &TcContext, packet: &mut Packet) -> Option<bool> {
    let quoted = Quoted::of(ctx, packet)?;
    let scratch = flow::scratch()?;
    scratch.forward = quoted.answered(FORWARD);
    if !table::find(&scratch.forward, &mut scratch.found) {
        return None;
    }
    let flow = &scratch.found;
    let to_service = packet.dst == quoted.src;
    let written = quoted.set(ctx, packet, End::Source, &flow.addr, flow.port).is_some()
        && (!to_service || packet.set_address(ctx, End::Destination, &flow.addr).is_some());
    Some(written)
}
