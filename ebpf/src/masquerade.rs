//! Who the backend of a client from outside takes for it: a port of the node that
//! no other client of that backend has, or the client itself.
//!
//! The key of the answer is what must not collide. Ports of flows that are over are
//! given again only when others cannot be had, and not at once.

use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{
    AFFINITY_ADDRESS, Addr, AffinityKey, BACKEND_DRAINING, EVENT_CHOSEN, EVENT_MOVED, EVENT_NO_PORT,
    EVENT_NOT_ADMITTED, EVENT_REFUSED, EVENT_TABLE_FULL, EVENT_UNANSWERED, FLOW_ANSWER, FLOW_ENDED, FLOW_ENDED_CLIENT,
    FRONTEND_LOCAL, FRONTEND_SILENT, Flow, Frontend, OUTSIDE_PORTS, POD_ANSWERS, POD_AWAY,
};

use crate::flow::{self, NO_FLOW, Scratch};
use crate::outside::ended;
use crate::packet::{Packet, TCP, UDP};
use crate::table::{self, Held};
use crate::{event, service, short};

/// How many ports, or backends, are tried for a new flow; and after how many of
/// them one may be taken from a flow that is over.
const TRIES: u32 = 16;
const POLITE_TRIES: u32 = 8;
/// For how long what is over, or an idle flow of datagrams, keeps its port then.
const SECOND: u64 = 1_000_000_000;
const REST_ENDED: u64 = 10 * SECOND;
const REST_DATAGRAMS: u64 = 30 * SECOND;

/// Whether the flow is known and goes on with its backend: `scratch.reverse` is
/// then what its answers look like.
#[inline(always)]
pub fn goes_on(ctx: &TcContext, packet: &Packet, opens: bool, scratch: &mut Scratch) -> bool {
    if !table::find(&scratch.forward, &mut scratch.found) {
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
    match table::hold(&scratch.reverse, &scratch.forward.src, scratch.forward.sport, ended, opens) {
        Held::Ours => true,
        // Its port is somebody else's by now.
        Held::Another => false,
        Held::Nothing => {
            let backend = scratch.found.backend;
            scratch.made = answer_of(scratch, backend);
            table::add(&scratch.reverse, &scratch.made)
        }
    }
}

/// What turns answers back: to the client, from the address it knows.
#[inline(always)]
fn answer_of(scratch: &Scratch, backend: u32) -> Flow {
    let (to, from) = (&scratch.forward.src, &scratch.forward.dst);
    Flow {
        last_used: table::now(),
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
pub fn admit(protocol: u8, frontend: &Frontend, scratch: &mut Scratch) -> u32 {
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
    // A pod with an ENI of its own must be known to answer by its link to the node.
    let keeps = of_node
        || frontend.flags & FRONTEND_LOCAL != 0
            && short::pod(&backend.addr).is_some_and(|pod| pod.flags & (POD_AWAY | POD_ANSWERS) != POD_AWAY);
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
    if !table::put(&scratch.forward, &scratch.made) {
        table::remove(&scratch.reverse);
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
    if table::add(&scratch.reverse, &scratch.made) {
        return TAKEN;
    }
    if !table::peek(&scratch.reverse, &mut scratch.found) {
        // Over since long.
        return if table::put(&scratch.reverse, &scratch.made) { TAKEN } else { FULL };
    }
    let (found, made) = (&scratch.found, &scratch.made);
    let ours = (found.peer, found.peer_port) == (made.peer, made.peer_port)
        && (found.addr, found.port) == (made.addr, made.port);
    let idle = made.last_used.wrapping_sub(found.last_used);
    let over = match scratch.reverse.protocol {
        UDP => idle > REST_DATAGRAMS,
        _ => found.flags & FLOW_ENDED == FLOW_ENDED && idle > REST_ENDED,
    };
    if (ours || (insisting && over)) && table::put(&scratch.reverse, &scratch.made) {
        return TAKEN;
    }
    COLLIDES
}
