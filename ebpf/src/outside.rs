//! Clients from outside: node ports, load balancers' addresses, external
//! addresses, brought to a backend by the node that they reached.
//!
//! The backend takes the node for the client, at a port that no other client of
//! it has, unless the Service wants its clients known (externalTrafficPolicy
//! Local) or the backend is a process of this node: then the client stays who it
//! is. Either way the answer passes this node, which turns it back: at the pod's
//! door, or where a packet of another node arrives. A pod with an ENI of its own
//! would answer by that: its program there leads what answers to its link to the
//! node. It leaves by the node's own ENI with the address that the client knows,
//! which no pod's ENI has.
//!
//! What has an address of the node for its source is no packet that the stack
//! would forward, so it goes on by `redirect_neigh`.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{
    Addr, EVENT_CHOSEN, EVENT_REFUSED, EVENT_UNWRITABLE, FLOW_ANSWER, FLOW_ENDED, FLOW_ENDED_BACKEND, FLOW_OUTSIDE,
    FrontendKey, OUTSIDE_PORTS, SCOPE_OUTSIDE, TRANSLATED_ANSWERS,
};

use crate::flow::{self, Ends};
use crate::packet::{Packet, Ports, SCTP, TCP, UDP};
use crate::rewrite::End;
use crate::translate::follow;
use crate::{NEXT, account, errors, event, masquerade, refuse, sctp, service, short, table};

/// Added to an `EVENT_*`: the packet ends by it. Below are verdicts.
const ENDED_BY: i32 = 0x100;
/// It is decided what becomes of the packet.
const GOES_ON: i32 = 0x80;

/// A packet that has reached the node on its own ENI, and is no pod's.
#[inline(always)]
pub fn arrive(ctx: &TcContext, packet: &Packet) -> i32 {
    let outcome = match packet.protocol {
        TCP | UDP | SCTP => match packet.later_fragment {
            true => outside_fragment(ctx.skb.skb, CLIENT),
            false => {
                // An answer of a backend elsewhere or over its link, or a client.
                let to = u16::from_be(packet.ports(ctx).destination);
                match OUTSIDE_PORTS.contains(&to) || short::pod(&packet.src).is_some() {
                    true => match answered(ctx, packet, Door::Answer) {
                        NEXT => request(ctx, packet),
                        verdict => verdict,
                    },
                    false => request(ctx, packet),
                }
            }
        },
        _ => errors::error_arriving(ctx.skb.skb),
    };
    settle(ctx, outcome)
}

/// In two steps, so that neither needs all of the stack.
#[inline(always)]
fn request(ctx: &TcContext, packet: &Packet) -> i32 {
    match outside_request(ctx.skb.skb) {
        GOES_ON => {
            sctp::one_address(ctx, packet);
            outside_write(ctx.skb.skb, Door::Client as u32)
        }
        outcome => outcome,
    }
}

#[inline(always)]
fn answered(ctx: &TcContext, packet: &Packet, door: Door) -> i32 {
    match outside_answer(ctx.skb.skb) {
        GOES_ON => {
            sctp::one_address(ctx, packet);
            outside_write(ctx.skb.skb, door as u32)
        }
        outcome => outcome,
    }
}

/// A packet that may be answering a client from outside, or an error about one.
#[inline(always)]
pub fn answer(ctx: &TcContext, packet: &Packet, door: Door) -> i32 {
    let outcome = match packet.protocol {
        _ if packet.later_fragment => outside_fragment(ctx.skb.skb, door as u32),
        TCP | UDP | SCTP => answered(ctx, packet, door),
        _ => errors::error_answering(ctx.skb.skb),
    };
    settle(ctx, outcome)
}

/// A packet that leaves a pod on an ENI of its own: whether it is for a client
/// that the node has brought to it, who knows it by another address.
#[inline(always)]
pub fn answers(ctx: &TcContext, packet: &Packet) -> bool {
    match packet.protocol {
        TCP | UDP | SCTP if packet.later_fragment => flow::fragment(packet, FLOW_ANSWER).is_some(),
        TCP | UDP | SCTP => outside_known(ctx.skb.skb) != 0,
        _ => errors::error_known(ctx.skb.skb) != 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn outside_known(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &Packet::parse(ctx) else { return 0 };
    let Some(scratch) = flow::scratch() else { return 0 };
    let ports = packet.ports(ctx);
    scratch.reverse = flow::key(packet, ports, FLOW_ANSWER);
    if ports == Ports::NONE || !table::peek(&scratch.reverse, &mut scratch.found) {
        return 0;
    }
    if packet.first_fragment {
        // Later ones go the same way; what they become is decided at its end.
        (scratch.src, scratch.dst) = (packet.src, packet.dst);
        scratch.remember_fragment(packet, FLOW_ANSWER);
    }
    1
}

/// A packet that leaves the node on its own ENI: a process of the node may be
/// answering. What comes from pods and elsewhere has passed its door.
#[inline(always)]
pub fn leaving(ctx: &TcContext) -> i32 {
    let Some(packet) = &Packet::parse(ctx) else { return NEXT };
    if !short::is_node(&packet.src) {
        return NEXT;
    }
    answer(ctx, packet, Door::Leaving)
}

/// Told from the outermost function: all that call each other share one stack.
#[inline(always)]
fn settle(ctx: &TcContext, outcome: i32) -> i32 {
    if outcome < ENDED_BY {
        return outcome;
    }
    match (outcome - ENDED_BY) as u32 {
        EVENT_REFUSED => refuse::sender(ctx),
        why => {
            event::tell(ctx, why);
            account::drop()
        }
    }
}

pub const fn ended_by(event: u32) -> i32 {
    ENDED_BY + event as i32
}

/// What is met where.
#[repr(u32)]
#[derive(Clone, Copy)]
pub enum Door {
    /// A client's packet, on the node's own ENI.
    Client,
    /// An answer, at a pod's door or from elsewhere.
    Answer,
    /// An answer of the node's own processes, on its way out.
    Leaving,
}

/// Which ends of a TCP connection a packet says will send no more.
#[inline(always)]
pub fn ended(ctx: &TcContext, packet: &Packet, by: u16) -> u16 {
    const FIN: u8 = 0x01;
    const RST: u8 = 0x04;
    match packet.tcp_flags(ctx) {
        flags if flags & RST != 0 => FLOW_ENDED,
        flags if flags & FIN != 0 => by,
        _ => 0,
    }
}

/// A client's packet to a Service. A global function, as the others here: the
/// verifier walks it once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn outside_request(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return NEXT };
    let Some(scratch) = flow::scratch() else { return NEXT };
    let ports = packet.ports(ctx);
    // Nobody reaches the node's loopback from elsewhere.
    if ports == Ports::NONE || packet.to_loopback() {
        return NEXT;
    }
    let opens = packet.opens_tcp(ctx);
    (scratch.src, scratch.dst) = (packet.src, packet.dst);
    scratch.forward = flow::key(packet, ports, FLOW_OUTSIDE);
    if !masquerade::goes_on(ctx, packet, opens, scratch) {
        scratch.frontend =
            FrontendKey { addr: packet.dst, port: ports.destination, protocol: packet.protocol, scope: SCOPE_OUTSIDE };
        let Some(frontend) = service::frontend_or_node_port(&mut scratch.frontend) else { return NEXT };
        match masquerade::admit(packet.protocol, frontend, scratch) {
            EVENT_CHOSEN => event::count(EVENT_CHOSEN),
            why => return ended_by(why),
        }
    }
    // What answers look like, seen from the other end.
    let reverse = &scratch.reverse;
    scratch.wanted = Ends { src: reverse.dst, dst: reverse.src, sport: reverse.dport, dport: reverse.sport };
    GOES_ON
}

/// The packet is as the backend is to see it: on to there. `src` is the client.
#[inline(always)]
fn deliver(ctx: &TcContext, packet: &Packet, src: &Addr) -> i32 {
    let pod = short::pod(&packet.dst);
    if let Some(pod) = pod
        && pod.translated & TRANSLATED_ANSWERS == 0
        && let Some(link) = short::link(pod.endpoint)
    {
        short::mark_translated(pod.endpoint, link, TRANSLATED_ANSWERS);
    }
    match pod {
        // The stack forwards it, as any packet to the pod; or takes it itself.
        _ if packet.src == *src => NEXT,
        // By its queue, and past the program at its door.
        Some(pod) => short::out_of(pod.ifindex),
        None if packet.hops <= 1 => TC_ACT_SHOT,
        None => match packet.hop(ctx) {
            // SAFETY: the context is the kernel's and valid while the program runs.
            Some(()) => short::out_of(unsafe { (*ctx.skb.skb).ifindex }),
            None => ended_by(EVENT_UNWRITABLE),
        },
    }
}

/// A backend's answer, to become one from the address that the client has asked.
/// `NEXT` when it is for nobody from outside.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn outside_answer(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return NEXT };
    let Some(scratch) = flow::scratch() else { return NEXT };
    let ports = packet.ports(ctx);
    if ports == Ports::NONE {
        return NEXT;
    }
    scratch.reverse = flow::key(packet, ports, FLOW_ANSWER);
    if !table::find(&scratch.reverse, &mut scratch.found) {
        return NEXT;
    }
    let found = &scratch.found;
    let ended = ended(ctx, packet, FLOW_ENDED_BACKEND);
    if ended & !found.flags != 0 {
        table::hold(&scratch.reverse, &found.peer, found.peer_port, ended, false);
    }
    scratch.wanted = Ends { src: found.addr, dst: found.peer, sport: found.port, dport: found.peer_port };
    GOES_ON
}

/// The packet gets the ends it is to have (`scratch.wanted`), and goes its way.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn outside_write(skb: *mut __sk_buff, door: u32) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return NEXT };
    let Some(scratch) = flow::scratch() else { return NEXT };
    let ports = packet.ports(ctx);
    (scratch.src, scratch.dst) = (packet.src, packet.dst);
    let wanted = &scratch.wanted;
    let written = (wanted.dst == packet.dst || packet.set_address(ctx, End::Destination, &wanted.dst).is_some())
        && packet.set_port(ctx, End::Destination, ports.destination, wanted.dport).is_some()
        && (wanted.src == packet.src || packet.set_address(ctx, End::Source, &wanted.src).is_some())
        && packet.set_port(ctx, End::Source, ports.source, wanted.sport).is_some();
    if !written {
        return ended_by(EVENT_UNWRITABLE);
    }
    if packet.first_fragment {
        let kind = if door == CLIENT { FLOW_OUTSIDE } else { FLOW_ANSWER };
        scratch.remember_fragment(packet, kind);
    }
    match door {
        CLIENT => deliver(ctx, packet, &scratch.src),
        ANSWER => leave(ctx, packet),
        _ => NEXT,
    }
}

const CLIENT: u32 = Door::Client as u32;
const ANSWER: u32 = Door::Answer as u32;
const LEAVING: u32 = Door::Leaving as u32;

/// Out of the node's own ENI.
#[inline(always)]
pub fn leave(ctx: &TcContext, packet: &Packet) -> i32 {
    match short::uplink() {
        Some(uplink) if packet.hops > 1 => match packet.hop(ctx) {
            Some(()) => short::out_of(uplink.ifindex),
            None => ended_by(EVENT_UNWRITABLE),
        },
        _ => TC_ACT_SHOT,
    }
}

/// A later fragment goes where the first one went.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn outside_fragment(skb: *mut __sk_buff, door: u32) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &mut Packet::parse(ctx) else { return NEXT };
    let src = packet.src;
    if door == CLIENT
        && let Some(to) = flow::fragment(packet, FLOW_OUTSIDE)
    {
        return if follow(ctx, packet, to) { deliver(ctx, packet, &src) } else { ended_by(EVENT_UNWRITABLE) };
    }
    let Some(to) = flow::fragment(packet, FLOW_ANSWER) else { return NEXT };
    match follow(ctx, packet, to) {
        false => ended_by(EVENT_UNWRITABLE),
        true if door == LEAVING => NEXT,
        true => leave(ctx, packet),
    }
}
