//! NetworkPolicy at the door of an isolated pod.
//!
//! A flow is judged when it begins, as its beginner's direction says, and both of
//! its directions pass by one entry. When the tables have changed since, it is
//! judged again as it was then. A pod that no policy isolates comes by here for a
//! comparison of two numbers.
//!
//! Who has begun a TCP connection that nobody has seen begin (the pod was not
//! isolated then, or its entry is lost) is told by the pod's own sockets: where
//! somebody listens, it was the other end. Judged by the direction of a single
//! packet, a connection that is forbidden by now would live on by its answers.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    __sk_buff, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, PerCpuHashMap, lpm_trie::Key};
use aya_ebpf::helpers::{bpf_sk_lookup_tcp, bpf_sk_release};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{
    Addr, EVENT_DENIED_EGRESS, EVENT_DENIED_INGRESS, EVENT_MALFORMED, EVERYTHING, FLOW_ANSWER, FLOW_BY_OTHER,
    FLOW_ENDED, FLOW_ENDED_BACKEND, FLOW_ENDED_CLIENT, FLOW_JUDGED, FlowKey, HAIRPIN4, HAIRPIN6, LET_IN, LET_OUT, Link,
    MAX_BLOCKS, MAX_CLASS_NETS, MAX_CLASSED, MAX_RULE_BLOCKS, MAX_RULES, PROFILE_OPEN, PolicyState, RuleBlock, RuleKey,
};

use crate::account::{self, NO_PREALLOC};
use crate::errors::Quoted;
use crate::flow::{self, NO_FLOW, Scratch};
use crate::outside::ended;
use crate::packet::{Packet, Ports, SCTP, TCP, UDP, is_ip};
use crate::rewrite::ICMP6;
use crate::{event, short, table};

#[btf_map]
static CLASSES: HashMap<Addr, u64, { MAX_CLASSED as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static CLASS_NETS: LpmTrie<Addr, u64, { MAX_CLASS_NETS as usize }> = LpmTrie::new();

#[btf_map]
static RULES: HashMap<RuleKey, RuleBlock, { MAX_RULE_BLOCKS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static RULE_HITS: PerCpuHashMap<u64, u64, { MAX_RULES as usize }, NO_PREALLOC> = PerCpuHashMap::new();

#[btf_map]
static POLICY: Array<PolicyState, 1> = Array::new();

const PASS: i32 = 0;
const DENY: i32 = 1;

/// Which way a packet passes the pod's door.
const OUT: u32 = 0;
const IN: u32 = 1;

#[inline(always)]
pub fn isolates(link: &Link) -> bool {
    link.ingress | link.egress != PROFILE_OPEN
}

/// Whether a packet may leave the pod: as its receiver is to see it. Counted and
/// told when not.
#[inline(always)]
pub fn lets_out(ctx: &TcContext, endpoint: u32, link: &Link) -> bool {
    if !isolates(link) || judge(ctx, link, OUT) {
        return true;
    }
    account::denied_egress(ctx, endpoint);
    event::tell(ctx, EVENT_DENIED_EGRESS);
    false
}

/// Whether a packet may enter the pod: as its sender is known in the VPC.
#[inline(always)]
pub fn lets_in(ctx: &TcContext, endpoint: u32, link: &Link) -> bool {
    if !isolates(link) || judge(ctx, link, IN) {
        return true;
    }
    account::denied_ingress(ctx, endpoint);
    event::tell(ctx, EVENT_DENIED_INGRESS);
    false
}

/// What cannot be read cannot be judged, nor seen to be the pod's own.
#[inline(always)]
pub fn lets_unread_out(ctx: &TcContext, link: &Link) -> bool {
    is_no_flow(ctx, !isolates(link)) || malformed(ctx)
}

#[inline(always)]
pub fn lets_unread_in(ctx: &TcContext, link: &Link) -> bool {
    !isolates(link) || is_no_flow(ctx, false) || malformed(ctx)
}

/// ARP is no packet of a flow, nor is anything but IP (`all`), which an isolated
/// pod has no need of.
#[inline(always)]
fn is_no_flow(ctx: &TcContext, all: bool) -> bool {
    const ETH_P_ARP: u32 = 0x0806_u16.to_be() as u32;
    // SAFETY: the context is the kernel's and valid while the program runs.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    protocol == ETH_P_ARP || (all && !is_ip(protocol as u16))
}

#[inline(always)]
fn malformed(ctx: &TcContext) -> bool {
    event::tell(ctx, EVENT_MALFORMED);
    false
}

#[inline(always)]
fn judge(ctx: &TcContext, link: &Link, way: u32) -> bool {
    // Seen from the pod its namespace has no number, and needs none.
    let netns = if account::is_in_pod() { CURRENT } else { link.netns };
    // One after the other: all that call each other share one stack.
    policy_judge(ctx.skb.skb, link.ingress, link.egress, netns, way) == PASS || policy_related(ctx.skb.skb, way) == PASS
}

/// `BPF_F_CURRENT_NETNS`; seen from the node the same number says that the pod's is
/// not known.
const CURRENT: i32 = -1;

/// A global function, which the verifier walks once, with all of what it needs.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn policy_judge(skb: *mut __sk_buff, ingress: u64, egress: u64, netns: i32, way: u32) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &Packet::parse(ctx) else { return DENY };
    let Some(scratch) = flow::scratch() else { return DENY };
    let (local, remote) = if way == IN { (packet.dst, packet.src) } else { (packet.src, packet.dst) };
    if local == remote || remote == HAIRPIN4 || remote == HAIRPIN6 || is_neighbour_talk(ctx, packet) {
        return PASS;
    }
    let fragments = if way == IN { LET_IN } else { LET_OUT };
    if packet.later_fragment {
        return if flow::fragment(packet, fragments).is_some() { PASS } else { DENY };
    }
    let ports = packet.ports(ctx);
    if ports == Ports::NONE && matches!(packet.protocol, TCP | UDP | SCTP) {
        return DENY;
    }
    let (sport, dport) = if way == IN { (ports.destination, ports.source) } else { (ports.source, ports.destination) };
    let protocol = packet.protocol;
    scratch.judged = FlowKey { src: local, dst: remote, sport, dport, protocol, kind: FLOW_JUDGED, _pad: 0 };
    scratch.generation = match POLICY.get(0) {
        Some(state) => state.generation,
        None => 0,
    };
    let begins = packet.begins_tcp(ctx);
    let known = !begins && table::find(&scratch.judged, &mut scratch.found);
    if known {
        note_end(ctx, packet, way, scratch);
        if scratch.found.backend == scratch.generation {
            if packet.first_fragment {
                remember(packet, fragments, scratch);
            }
            return PASS;
        }
    }
    let by_other = match known {
        true => scratch.found.flags & FLOW_BY_OTHER != 0,
        false if protocol == TCP && !begins => listens(ctx, netns, way, scratch),
        false => way == IN,
    };
    scratch.made = NO_FLOW;
    scratch.made.flags = if known { scratch.found.flags } else { 0 };
    let allowed = match by_other {
        true => {
            scratch.made.flags |= FLOW_BY_OTHER;
            may_come(ingress, scratch)
        }
        false => {
            let FlowKey { dst, dport, .. } = scratch.judged;
            permits(egress, &dst, protocol, dport, scratch)
        }
    };
    if !allowed {
        return DENY;
    }
    scratch.made.last_used = table::now();
    scratch.made.backend = scratch.generation;
    if packet.first_fragment {
        remember(packet, fragments, scratch);
    }
    // One that finds no room is judged again with its next packet.
    table::put(&scratch.judged, &scratch.made);
    PASS
}

/// IPv6 finds its neighbours and groups by ICMP (RFC 4861, RFC 3810): without it
/// nothing passes at all.
#[inline(always)]
fn is_neighbour_talk(ctx: &TcContext, packet: &Packet) -> bool {
    if packet.protocol != ICMP6 || packet.later_fragment {
        return false;
    }
    matches!(ctx.load::<u8>(packet.transport), Ok(130..=137 | 143))
}

/// An error about a flow that is allowed (RFC 792, RFC 4443), as it was judged. What
/// no rule lets through may be one.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn policy_related(skb: *mut __sk_buff, way: u32) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &Packet::parse(ctx) else { return DENY };
    let Some(quoted) = Quoted::of(ctx, packet) else { return DENY };
    let Some(scratch) = flow::scratch() else { return DENY };
    // What is told to the pod is about a packet of its own.
    let (src, dst, sport, dport) = match way {
        IN => (quoted.src, quoted.dst, quoted.sport, quoted.dport),
        _ => (quoted.dst, quoted.src, quoted.dport, quoted.sport),
    };
    scratch.reverse = FlowKey { src, dst, sport, dport, protocol: quoted.protocol, kind: FLOW_JUDGED, _pad: 0 };
    if table::is_there(&scratch.reverse) { PASS } else { DENY }
}

#[inline(always)]
fn remember(packet: &Packet, fragments: u8, scratch: &mut Scratch) {
    (scratch.src, scratch.dst) = (packet.src, packet.dst);
    scratch.remember_fragment(packet, fragments);
}

/// The entry knows which ends of a connection will send no more.
#[inline(always)]
fn note_end(ctx: &TcContext, packet: &Packet, way: u32, scratch: &mut Scratch) {
    let ended = ended(ctx, packet, if way == OUT { FLOW_ENDED_CLIENT } else { FLOW_ENDED_BACKEND });
    if ended & !scratch.found.flags & FLOW_ENDED != 0 {
        scratch.found.flags |= ended;
        let (peer, port) = (scratch.found.peer, scratch.found.peer_port);
        table::hold(&scratch.judged, &peer, port, ended, false);
    }
}

/// Whether somebody in the pod listens where the packet comes in or out. When that
/// cannot be seen, the packet's own direction must do.
#[inline(always)]
fn listens(ctx: &TcContext, netns: i32, way: u32, scratch: &Scratch) -> bool {
    if netns < 0 && !account::is_in_pod() {
        return way == IN;
    }
    const LISTEN: u32 = 10;
    let (at, dport) = (&scratch.judged.src, scratch.judged.sport);
    // From nowhere: no connection looks like that.
    let (tuple, size) = match at.is_v4() {
        true => {
            let ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 { saddr: 0, daddr: at.words[3], sport: 0, dport };
            (bpf_sock_tuple__bindgen_ty_1 { ipv4 }, size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>())
        }
        false => {
            let ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 { saddr: [0; 4], daddr: at.words, sport: 0, dport };
            (bpf_sock_tuple__bindgen_ty_1 { ipv6 }, size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>())
        }
    };
    let mut tuple = bpf_sock_tuple { __bindgen_anon_1: tuple };
    // SAFETY: the tuple is whole for its size and lives through the call; what is
    // found is given back.
    unsafe {
        let found = bpf_sk_lookup_tcp(ctx.as_ptr(), &raw mut tuple, size as u32, netns as u64, 0);
        if found.is_null() {
            return false;
        }
        let listens = (*found).state == LISTEN;
        bpf_sk_release(found.cast());
        listens
    }
}

/// The other end begins. The node itself always may; for a client that it hides
/// from the pod, the client is judged.
#[inline(always)]
fn may_come(ingress: u64, scratch: &mut Scratch) -> bool {
    if ingress == PROFILE_OPEN {
        return true;
    }
    let mut who = scratch.judged.dst;
    if short::is_node(&who) {
        scratch.reverse = scratch.judged;
        scratch.reverse.kind = FLOW_ANSWER;
        if !table::peek(&scratch.reverse, &mut scratch.found) {
            return true;
        }
        who = scratch.found.peer;
        scratch.made.peer = who;
    }
    let FlowKey { protocol, sport, .. } = scratch.judged;
    permits(ingress, &who, protocol, sport, scratch)
}

/// Whether a rule of the profile opens the port to this address.
#[inline(always)]
fn permits(profile: u64, who: &Addr, protocol: u8, port: u16, scratch: &mut Scratch) -> bool {
    if profile == PROFILE_OPEN {
        return true;
    }
    scratch.rule = RuleKey { profile, class: class_of(who), block: 0, _pad: 0 };
    let port = u32::from(u16::from_be(port));
    for block in 0..MAX_BLOCKS {
        match policy_block(block, u32::from(protocol), port) {
            SEARCH_ON => {}
            found => return found == OPENED,
        }
    }
    false
}

const CLOSED: u32 = 0;
const OPENED: u32 = 1;
const SEARCH_ON: u32 = 2;

/// Looks a block of rules through (`scratch.rule`, whose class becomes nobody's
/// when the pair has no rules of its own). A global function: what it has looked at
/// is of no matter to the verifier afterwards.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn policy_block(block: u32, protocol: u32, port: u32) -> u32 {
    let Some(scratch) = flow::scratch() else { return CLOSED };
    scratch.rule.block = block;
    let mut found = rules(&scratch.rule);
    if found.is_none() && block == 0 && scratch.rule.class != 0 {
        scratch.rule.class = 0;
        found = rules(&scratch.rule);
    }
    let Some(found) = found else { return CLOSED };
    for open in &found.ports {
        let meant = open.protocol == EVERYTHING || u32::from(open.protocol) == protocol;
        if open.rule != 0 && meant && u32::from(open.from) <= port && port <= u32::from(open.to) {
            if let Some(hits) = RULE_HITS.get_ptr_mut(&open.rule) {
                // SAFETY: this CPU's own, written with bottom halves off.
                unsafe { *hits += 1 };
            }
            return OPENED;
        }
    }
    if found.more == 0 { CLOSED } else { SEARCH_ON }
}

#[inline(always)]
fn rules(key: &RuleKey) -> Option<&'static RuleBlock> {
    // SAFETY: entries are replaced whole, never written in place; a removed one
    // stays valid until the program ends (not preallocated).
    unsafe { RULES.get(key) }
}

#[inline(always)]
fn class_of(addr: &Addr) -> u64 {
    // SAFETY: as in `rules`.
    if let Some(class) = unsafe { CLASSES.get(addr) } {
        return *class;
    }
    match CLASS_NETS.get(&Key::new(128, *addr)) {
        Some(class) => *class,
        None => 0,
    }
}
