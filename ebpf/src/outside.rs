//! Clients from outside: node ports, load balancers' addresses, external
//! addresses, brought to a backend by the node that they reached.
//!
//! The backend takes the node for the client, at a port that no other client of
//! it has, unless the Service wants its clients known (externalTrafficPolicy
//! Local) or the backend is a process of this node: then the client stays who it
//! is; but not for a pod with an ENI of its own. Either way the answer passes this node, which turns it back: at the pod's
//! door, or where a packet of another node arrives. It leaves by the node's own
//! ENI with the address that the client knows, which no pod's ENI has.
//!
//! What has an address of the node for its source is no packet that the stack
//! would forward, so it goes on by `redirect_neigh`.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{
    AFFINITY_ADDRESS, Addr, AffinityKey, BACKEND_DRAINING, EVENT_CHOSEN, EVENT_MOVED, EVENT_NO_PORT,
    EVENT_NOT_ADMITTED, EVENT_REFUSED, EVENT_TABLE_FULL, EVENT_UNANSWERED, EVENT_UNWRITABLE, FLOW_ANSWER, FLOW_ENDED,
    FLOW_ENDED_BACKEND, FLOW_ENDED_CLIENT, FLOW_OUTSIDE, FRONTEND_LOCAL, FRONTEND_SILENT, Flow, Frontend, FrontendKey,
    OUTSIDE_PORTS, POD_AWAY, SCOPE_OUTSIDE, TRANSLATED_ANSWERS,
};

use crate::flow::{self, Ends, Held, NO_FLOW, Scratch};
use crate::packet::{Packet, Ports, SCTP, TCP, UDP};
use crate::rewrite::End;
use crate::translate::follow;
use crate::{NEXT, account, errors, event, refuse, service, short};

/// Added to an `EVENT_*`: the packet ends by it. Below are verdicts.
const ENDED_BY: i32 = 0x100;
/// It is decided what becomes of the packet.
const GOES_ON: i32 = 0x80;

/// How many ports, or backends, are tried for a new flow; and after how many of
/// them one may be taken from a flow that is over.
const TRIES: u32 = 16;
const POLITE_TRIES: u32 = 8;
/// For how long what is over, or an idle flow of datagrams, keeps its port then.
const SECOND: u64 = 1_000_000_000;
const REST_ENDED: u64 = 10 * SECOND;
const REST_DATAGRAMS: u64 = 30 * SECOND;

/// A packet that has reached the node on its own ENI, and is no pod's.
#[inline(always)]
pub fn arrive(ctx: &TcContext, packet: &Packet) -> i32 {
    let outcome = match packet.protocol {
        TCP | UDP | SCTP => match packet.later_fragment {
            true => outside_fragment(ctx.skb.skb, CLIENT),
            false => {
                // An answer of a backend elsewhere, or a client.
                let to = u16::from_be(packet.ports(ctx).destination);
                match OUTSIDE_PORTS.contains(&to) {
                    true => match answered(ctx, Door::Answer) {
                        NEXT => request(ctx),
                        verdict => verdict,
                    },
                    false => request(ctx),
                }
            }
        },
        _ => errors::error_arriving(ctx.skb.skb),
    };
    settle(ctx, outcome)
}

/// In two steps, so that neither needs all of the stack.
#[inline(always)]
fn request(ctx: &TcContext) -> i32 {
    match outside_request(ctx.skb.skb) {
        GOES_ON => outside_write(ctx.skb.skb, Door::Client as u32),
        outcome => outcome,
    }
}

#[inline(always)]
fn answered(ctx: &TcContext, door: Door) -> i32 {
    match outside_answer(ctx.skb.skb) {
        GOES_ON => outside_write(ctx.skb.skb, door as u32),
        outcome => outcome,
    }
}

/// A packet that may be answering a client from outside, or an error about one.
#[inline(always)]
pub fn answer(ctx: &TcContext, packet: &Packet, door: Door) -> i32 {
    let outcome = match packet.protocol {
        _ if packet.later_fragment => outside_fragment(ctx.skb.skb, door as u32),
        TCP | UDP | SCTP => answered(ctx, door),
        _ => errors::error_answering(ctx.skb.skb),
    };
    settle(ctx, outcome)
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
fn ended(ctx: &TcContext, packet: &Packet, by: u16) -> u16 {
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
    if !goes_on(ctx, packet, opens, scratch) {
        scratch.frontend =
            FrontendKey { addr: packet.dst, port: ports.destination, protocol: packet.protocol, scope: SCOPE_OUTSIDE };
        let Some(frontend) = service::frontend_or_node_port(&mut scratch.frontend) else { return NEXT };
        match admit(packet.protocol, frontend, scratch) {
            EVENT_CHOSEN => event::count(EVENT_CHOSEN),
            why => return ended_by(why),
        }
    }
    // What answers look like, seen from the other end.
    let reverse = &scratch.reverse;
    scratch.wanted = Ends { src: reverse.dst, dst: reverse.src, sport: reverse.dport, dport: reverse.sport };
    GOES_ON
}

/// Whether the flow is known and goes on with its backend: `scratch.reverse` is
/// then what its answers look like.
#[inline(always)]
fn goes_on(ctx: &TcContext, packet: &Packet, opens: bool, scratch: &mut Scratch) -> bool {
    if !flow::find(&scratch.forward, &mut scratch.found) {
        return false;
    }
    // A TCP connection stays with its backend to the end, and a new one of the
    // same client may have the same as long as that takes new ones.
    let goes_on = match service::backend(scratch.found.backend) {
        Some(backend) => !opens || backend.flags & BACKEND_DRAINING == 0,
        None => packet.protocol == TCP && !opens,
    };
    if !goes_on {
        event::count(EVENT_MOVED);
        return false;
    }
    let (peer, peer_port) = (scratch.found.peer, scratch.found.peer_port);
    let (addr, port) = (scratch.found.addr, scratch.found.port);
    scratch.client = peer;
    scratch.set_reverse(&addr, port);
    scratch.reverse.dport = peer_port;
    scratch.reverse.kind = FLOW_ANSWER;
    let ended = ended(ctx, packet, FLOW_ENDED_CLIENT);
    match flow::hold(&scratch.reverse, &scratch.forward.src, scratch.forward.sport, ended, opens) {
        Held::Ours => true,
        // Its port is somebody else's by now.
        Held::Another => false,
        Held::Nothing => {
            let backend = scratch.found.backend;
            scratch.made = answer_of(scratch, backend);
            flow::add(&scratch.reverse, &scratch.made)
        }
    }
}

/// What turns answers back: to the client, from the address it knows.
#[inline(always)]
fn answer_of(scratch: &Scratch, backend: u32) -> Flow {
    let (to, from) = (&scratch.forward.src, &scratch.forward.dst);
    Flow {
        last_used: flow::now(),
        addr: *from,
        port: scratch.forward.dport,
        backend,
        peer: *to,
        peer_port: scratch.forward.sport,
        ..NO_FLOW
    }
}

/// A backend for a new flow, and what its answers look like (`scratch.reverse`).
/// `EVENT_CHOSEN`, or why there is none.
///
/// The order of doors: who may come at all; then, with the client's own address,
/// the policy of the backend's pod (its place is where the backend is known and
/// the source still is what it was); the change of source comes last.
#[inline(never)]
fn admit(protocol: u8, frontend: &Frontend, scratch: &mut Scratch) -> u32 {
    if !service::admits(frontend, &scratch.src) {
        return EVENT_NOT_ADMITTED;
    }
    let (s, d) = (scratch.src.words, scratch.dst.words);
    let ports = u32::from(scratch.forward.sport) << 16 | u32::from(scratch.forward.dport);
    scratch.hash = service::mix(u32::from(protocol), &[s[0], s[1], s[3], d[0], d[1], d[3], ports]);
    let client = AffinityKey { client: scratch.src, set: 0, kind: AFFINITY_ADDRESS };
    let Some(backend) = service::choose(frontend, scratch.hash, client) else {
        return if frontend.flags & FRONTEND_SILENT != 0 { EVENT_UNANSWERED } else { EVENT_REFUSED };
    };
    let of_node = short::is_node(&backend.addr);
    // A pod with an ENI of its own would answer the client by that.
    let keeps = of_node
        || frontend.flags & FRONTEND_LOCAL != 0
            && short::pod(&backend.addr).is_some_and(|pod| pod.flags & POD_AWAY == 0);
    scratch.client = match keeps {
        true => scratch.src,
        false => match node_address(&scratch.dst) {
            Some(own) => own,
            None => return EVENT_NO_PORT,
        },
    };
    scratch.set_reverse(&backend.addr, backend.port);
    scratch.reverse.kind = FLOW_ANSWER;
    scratch.made = answer_of(scratch, backend.id);
    let taken = match keeps && take(scratch, true) == TAKEN {
        true => TAKEN,
        // Of a client that is kept, too, when two of its flows would look the same.
        false => free_port(),
    };
    if taken != TAKEN {
        return if taken == FULL { EVENT_TABLE_FULL } else { EVENT_NO_PORT };
    }
    if of_node {
        short::mark_node_answers();
    }
    scratch.made.addr = scratch.reverse.src;
    scratch.made.port = scratch.reverse.sport;
    scratch.made.peer = scratch.reverse.dst;
    scratch.made.peer_port = scratch.reverse.dport;
    if !flow::put(&scratch.forward, &scratch.made) {
        flow::remove(&scratch.reverse);
        return EVENT_TABLE_FULL;
    }
    EVENT_CHOSEN
}

/// The node's address that a backend is to answer to: the one that the client
/// has reached, or the uplink's when that was a Service's own.
#[inline(always)]
fn node_address(reached: &Addr) -> Option<Addr> {
    if short::is_node(reached) {
        return Some(*reached);
    }
    let uplink = short::uplink()?;
    let own = if reached.is_v4() { uplink.v4 } else { uplink.v6 };
    (own != Addr::default()).then_some(own)
}

const TAKEN: u32 = 0;
const COLLIDES: u32 = 1;
const FULL: u32 = 2;

/// A port of the node for the flow in the scratch space.
#[inline(always)]
fn free_port() -> u32 {
    for n in 0..TRIES {
        let tried = outside_port(n);
        if tried != COLLIDES {
            return tried;
        }
    }
    COLLIDES
}

/// The `n`th try: a flow that was forgotten finds its port again.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn outside_port(n: u32) -> u32 {
    const COUNT: u32 = OUTSIDE_PORTS.end as u32 - OUTSIDE_PORTS.start as u32;
    /// Prime to the count: all tries differ.
    const STEP: u32 = 7_919;
    let Some(scratch) = flow::scratch() else { return FULL };
    let port = u32::from(OUTSIDE_PORTS.start) + (scratch.hash % COUNT + n % TRIES * STEP) % COUNT;
    scratch.reverse.dport = (port as u16).to_be();
    take(scratch, n >= POLITE_TRIES)
}

/// Takes the answer's key, if it is free or this flow's own; when `insisting`,
/// from a flow that is over as well.
#[inline(always)]
fn take(scratch: &mut Scratch, insisting: bool) -> u32 {
    if flow::add(&scratch.reverse, &scratch.made) {
        return TAKEN;
    }
    if !flow::peek(&scratch.reverse, &mut scratch.found) {
        return FULL;
    }
    let (found, made) = (&scratch.found, &scratch.made);
    let ours = (found.peer, found.peer_port) == (made.peer, made.peer_port)
        && (found.addr, found.port) == (made.addr, made.port);
    let idle = made.last_used.wrapping_sub(found.last_used);
    let over = match scratch.reverse.protocol {
        UDP => idle > REST_DATAGRAMS,
        _ => found.flags & FLOW_ENDED == FLOW_ENDED && idle > REST_ENDED,
    };
    if (ours || (insisting && over)) && flow::put(&scratch.reverse, &scratch.made) {
        return TAKEN;
    }
    COLLIDES
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
    if !flow::find(&scratch.reverse, &mut scratch.found) {
        return NEXT;
    }
    let found = &scratch.found;
    let ended = ended(ctx, packet, FLOW_ENDED_BACKEND);
    if ended & !found.flags != 0 {
        flow::hold(&scratch.reverse, &found.peer, found.peer_port, ended, false);
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
        flow::remember_fragment(scratch.src, scratch.dst, packet, kind);
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
