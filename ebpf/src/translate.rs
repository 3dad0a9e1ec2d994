//! The packet path of Services: what `connect()` did not resolve.
//!
//! `leaving` turns a pod's packet to a Service into one to a backend, `entering`
//! turns the answer back. A pod's datagrams are looked at one by one, so that a
//! backend that is gone is left at the next of them; its TCP packets only once
//! something of it was translated here. A pod of which nothing was pays for one
//! look-up a datagram.

use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{
    AFFINITY_ADDRESS, Addr, AffinityKey, EVENT_CHOSEN, EVENT_MOVED, EVENT_NOT_ADMITTED, EVENT_REFUSED,
    EVENT_TABLE_FULL, EVENT_UNWRITABLE, FLOW_ENDED_BACKEND, FLOW_ENDED_CLIENT, FlowKey, Fragment, Frontend,
    FrontendKey, HAIRPIN4, HAIRPIN6, Link, SCOPE_INSIDE, TRANSLATED_ANSWERS, TRANSLATED_REQUESTS,
};

use crate::flow::{self, FORWARD, Made, NOWHERE, REVERSE, Scratch};
use crate::outside::{Door, ended};
use crate::packet::{ICMP, Packet, Ports, SCTP, TCP, UDP};
use crate::rewrite::{End, ICMP6};
use crate::{NEXT, account, errors, event, outside, policy, refuse, sctp, service, short, table};

/// What became of a packet.
pub enum Outcome {
    /// As it was, or translated: it goes on.
    On,
    /// It ends here, with this verdict.
    Ends(i32),
}

/// How many backends are tried for a flow whose answers could not be told from
/// another's.
const TRIES: u32 = 4;

/// A packet from the pod behind `link`.
#[inline(always)]
pub fn leaving(ctx: &TcContext, link: &Link, packet: &mut Packet) -> Outcome {
    match packet.protocol {
        UDP | SCTP => {}
        TCP if link.translated != 0 || packet.opens_tcp(ctx) => {}
        ICMP | ICMP6 => {
            // It may be for somebody else now: the stack knows the way.
            if errors::leaving(ctx) {
                return Outcome::Ends(NEXT);
            }
            return answering(ctx, link, packet);
        }
        _ => return Outcome::On,
    }
    if let Outcome::Ends(verdict) = answering(ctx, link, packet) {
        return Outcome::Ends(verdict);
    }
    if packet.later_fragment {
        return follow_first(ctx, packet);
    }
    let Some(scratch) = flow::scratch() else { return Outcome::On };
    let ports = packet.ports(ctx);
    if ports == Ports::NONE {
        return Outcome::On;
    }
    (scratch.src, scratch.dst) = (packet.src, packet.dst);
    if packet.dst == HAIRPIN4 || packet.dst == HAIRPIN6 {
        let own = if packet.v4 { &link.v4 } else { &link.v6 };
        return Outcome::Ends(back_to_oneself(ctx, own, packet, scratch));
    }
    scratch.forward = flow::key(packet, ports, FORWARD);
    let opens = packet.protocol == TCP && packet.opens_tcp(ctx);
    let known =
        !opens && link.translated & TRANSLATED_REQUESTS != 0 && table::find(&scratch.forward, &mut scratch.found);
    // A TCP connection stays with its backend to the end.
    if known && (packet.protocol == TCP || service::backend(scratch.found.backend).is_some()) {
        scratch.client = client_of(packet, &scratch.found.addr);
        let (addr, port) = (scratch.found.addr, scratch.found.port);
        scratch.set_reverse(&addr, port);
        scratch.restore(scratch.found.backend);
        note_end(ctx, packet, FLOW_ENDED_CLIENT, scratch);
    } else {
        scratch.frontend =
            FrontendKey { addr: packet.dst, port: ports.destination, protocol: packet.protocol, scope: SCOPE_INSIDE };
        let Some(frontend) = service::frontend_or_node_port(&mut scratch.frontend) else {
            if opens && link.translated & TRANSLATED_REQUESTS != 0 {
                forget_answers(scratch);
            }
            return Outcome::On;
        };
        if known {
            event::count(EVENT_MOVED);
        }
        match admit(packet, frontend, scratch) {
            EVENT_CHOSEN => event::count(EVENT_CHOSEN),
            EVENT_REFUSED => return Outcome::Ends(refuse::sender(ctx)),
            why => {
                event::tell(ctx, why);
                return Outcome::Ends(account::drop());
            }
        }
    }
    // Where to, by now, is what answers will come from.
    let (to, client) = (&scratch.reverse, &scratch.client);
    let written = packet.set_address(ctx, End::Destination, &to.src).is_some()
        && packet.set_port(ctx, End::Destination, ports.destination, to.sport).is_some()
        && (*client == packet.src || packet.set_address(ctx, End::Source, client).is_some());
    if !written {
        event::tell(ctx, EVENT_UNWRITABLE);
        return Outcome::Ends(account::drop());
    }
    sctp::one_address(ctx, packet);
    if packet.first_fragment {
        scratch.remember_fragment(packet, FORWARD);
    }
    if link.translated & TRANSLATED_REQUESTS == 0 {
        short::mark_translated(account::endpoint(ctx), link, TRANSLATED_REQUESTS);
    }
    if scratch.client != scratch.src { Outcome::Ends(refuse::to_sender(ctx)) } else { Outcome::On }
}

/// The answer's entry knows which ends of a connection will send no more.
#[inline(always)]
fn note_end(ctx: &TcContext, packet: &Packet, by: u16, scratch: &Scratch) {
    let ended = ended(ctx, packet, by);
    if ended != 0 {
        table::hold(&scratch.reverse, &NOWHERE, 0, ended, false);
    }
}

/// A connection to nobody's Service begins, from ports that a translated one may
/// have had: its answers are its own.
#[inline(never)]
fn forget_answers(scratch: &mut Scratch) {
    let FlowKey { src, dst, sport, dport, protocol, .. } = scratch.forward;
    scratch.reverse = FlowKey { src: dst, dst: src, sport: dport, dport: sport, protocol, kind: REVERSE, _pad: 0 };
    table::remove(&scratch.reverse);
}

/// Who the backend sees: the pod, or somebody else when the pod talks to itself.
#[inline(always)]
fn client_of(packet: &Packet, backend: &Addr) -> Addr {
    match (*backend == packet.src, packet.v4) {
        (false, _) => packet.src,
        (true, true) => HAIRPIN4,
        (true, false) => HAIRPIN6,
    }
}

/// A backend for a new flow, as where its answers come from (`scratch.reverse`):
/// what has happened, `EVENT_CHOSEN` if there is one, `EVENT_REFUSED` if nobody is
/// there. A function of its own: the way it took is of no matter afterwards.
#[inline(never)]
fn admit(packet: &Packet, frontend: &Frontend, scratch: &mut Scratch) -> u32 {
    if !service::admits(frontend, &packet.src) {
        return EVENT_NOT_ADMITTED;
    }
    let (s, d) = (packet.src.words, packet.dst.words);
    let ports = u32::from(scratch.forward.sport) << 16 | u32::from(scratch.forward.dport);
    let mut hash = service::mix(u32::from(packet.protocol), &[s[0], s[1], s[3], d[0], d[1], d[3], ports]);
    let client = AffinityKey { client: packet.src, set: 0, kind: AFFINITY_ADDRESS };
    for _ in 0..TRIES {
        let Some(backend) = service::choose(frontend, hash, client) else { return EVENT_REFUSED };
        scratch.client = client_of(packet, &backend.addr);
        scratch.set_reverse(&backend.addr, backend.port);
        match scratch.make(backend.id) {
            Made::Done => return EVENT_CHOSEN,
            Made::Collides => hash = hash.wrapping_add(1),
            Made::Full => break,
        }
    }
    EVENT_TABLE_FULL
}

/// The pod answers somebody whom the node has brought to it (a node port, a load
/// balancer's address): the answer comes from there.
#[inline(always)]
fn answering(ctx: &TcContext, link: &Link, packet: &Packet) -> Outcome {
    if link.translated & TRANSLATED_ANSWERS == 0 {
        return Outcome::On;
    }
    if link.node_link != 0 {
        return match outside::answers(ctx, packet) {
            // Judged where it arrives.
            true => Outcome::Ends(short::over_link(link, packet)),
            false => Outcome::On,
        };
    }
    // Judged as the pod has sent it: nobody knows it afterwards.
    if policy::isolates(link) && outside::answers(ctx, packet) && !policy::lets_out(ctx, account::endpoint(ctx), link) {
        return Outcome::Ends(account::drop());
    }
    match outside::answer(ctx, packet, Door::Answer) {
        NEXT => Outcome::On,
        verdict => Outcome::Ends(verdict),
    }
}

/// The pod answers itself. A function of its own for the stack's sake.
#[inline(never)]
fn back_to_oneself(ctx: &TcContext, own: &Addr, packet: &mut Packet, scratch: &mut Scratch) -> i32 {
    let ports = packet.ports(ctx);
    scratch.reverse = flow::key(packet, ports, REVERSE);
    if !table::find(&scratch.reverse, &mut scratch.found) {
        return account::drop();
    }
    note_end(ctx, packet, FLOW_ENDED_BACKEND, scratch);
    let flow = &scratch.found;
    let written = packet.set_address(ctx, End::Source, &flow.addr).is_some()
        && packet.set_port(ctx, End::Source, ports.source, flow.port).is_some()
        && packet.set_address(ctx, End::Destination, own).is_some();
    sctp::one_address(ctx, packet);
    if written { refuse::to_sender(ctx) } else { account::drop() }
}

/// A packet that enters a pod; `translated` when packets of it have been.
/// What cannot be rewritten goes on as it is: its receiver will not know it.
#[inline(always)]
pub fn entering(ctx: &TcContext, packet: &mut Packet, translated: bool) {
    match packet.protocol {
        UDP | SCTP | TCP if translated => match answered(ctx, packet) {
            Answered::AsItWas => {}
            Answered::Translated => sctp::one_address(ctx, packet),
            Answered::Unwritable => event::tell(ctx, EVENT_UNWRITABLE),
        },
        ICMP | ICMP6 => errors::entering(ctx),
        _ => {}
    }
}

/// What became of a packet that may be an answer.
#[repr(u32)]
#[derive(Clone, Copy)]
enum Answered {
    AsItWas,
    Translated,
    Unwritable,
}

#[inline(never)]
fn answered(ctx: &TcContext, packet: &mut Packet) -> Answered {
    if packet.later_fragment {
        return match flow::fragment(packet, REVERSE) {
            Some(to) if !follow(ctx, packet, to) => Answered::Unwritable,
            _ => Answered::AsItWas,
        };
    }
    let Some(scratch) = flow::scratch() else { return Answered::AsItWas };
    let ports = packet.ports(ctx);
    if ports == Ports::NONE {
        return Answered::AsItWas;
    }
    scratch.reverse = flow::key(packet, ports, REVERSE);
    if !table::find(&scratch.reverse, &mut scratch.found) {
        return Answered::AsItWas;
    }
    note_end(ctx, packet, FLOW_ENDED_BACKEND, scratch);
    (scratch.src, scratch.dst) = (packet.src, packet.dst);
    let flow = &scratch.found;
    let written = packet.set_address(ctx, End::Source, &flow.addr).is_some()
        && packet.set_port(ctx, End::Source, ports.source, flow.port).is_some();
    if written && packet.first_fragment {
        scratch.remember_fragment(packet, REVERSE);
    }
    if written { Answered::Translated } else { Answered::Unwritable }
}

/// A later fragment goes where the first one went.
#[inline(always)]
fn follow_first(ctx: &TcContext, packet: &mut Packet) -> Outcome {
    let Some(to) = flow::fragment(packet, FORWARD) else { return Outcome::On };
    let hairpin = to.src != packet.src;
    match follow(ctx, packet, to) {
        false => Outcome::Ends(account::drop()),
        true if hairpin => Outcome::Ends(refuse::to_sender(ctx)),
        true => Outcome::On,
    }
}

/// Whether it could be written.
#[inline(always)]
pub fn follow(ctx: &TcContext, packet: &mut Packet, to: &Fragment) -> bool {
    (to.src == packet.src || packet.set_address(ctx, End::Source, &to.src).is_some())
        && (to.dst == packet.dst || packet.set_address(ctx, End::Destination, &to.dst).is_some())
}
