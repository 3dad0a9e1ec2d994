//! The short way: past the node's stack, to the pod's ENI or to a pod next door.
//!
//! The stack judges what opens a connection: routes, rules, its own filters. What
//! follows goes the way it would go there, without the walk: out of the ENI by
//! `redirect_neigh`, which asks for the next hop's address and keeps it fresh, or
//! into a pod of this node by `redirect_peer`, which hands the packet over inside
//! the pod's namespace. That skips the program at the other pod's door, so the
//! one who hands over counts and translates for it.

use aya_ebpf::bindings::{bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1};
use aya_ebpf::btf_maps::{Array, HashMap};
use aya_ebpf::helpers::{bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{
    Addr, EVENT_SPOOFED, Endpoint, LINK_SHORT, Link, MAX_ENDPOINTS, MAX_NODE_ADDRESSES, MAX_POD_ADDRESSES, POD_AWAY,
    POD_ISOLATED, POD_SHORT, Pod, TRANSLATED_ANSWERS, TRANSLATED_REQUESTS, Uplink,
};

use crate::NEXT;
use crate::account::{self, NO_PREALLOC};
use crate::packet::Packet;
use crate::{event, policy, translate};

#[btf_map]
static LINKS: HashMap<Endpoint, Link, { MAX_ENDPOINTS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static PODS: HashMap<Addr, Pod, { MAX_POD_ADDRESSES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static NODE: HashMap<Addr, u32, { MAX_NODE_ADDRESSES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static UPLINK: Array<Uplink, 1> = Array::new();

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// What is behind the device this packet passes.
#[inline(always)]
pub fn link(endpoint: Endpoint) -> Option<&'static Link> {
    // SAFETY: entries are replaced whole, never written in place; a removed one
    // stays valid until the program ends (not preallocated).
    unsafe { LINKS.get(&endpoint) }
}

#[inline(always)]
pub fn pod(addr: &Addr) -> Option<&'static Pod> {
    // SAFETY: as in `link`.
    unsafe { PODS.get(addr) }
}

#[inline(always)]
pub fn is_node(addr: &Addr) -> bool {
    NODE.get_ptr(addr).is_some()
}

/// The device with the node's own addresses.
#[inline(always)]
pub fn uplink() -> Option<&'static Uplink> {
    let uplink = UPLINK.get(0)?;
    (uplink.ifindex != 0).then_some(uplink)
}

/// Whether the packet has come by a pod's link to the node: the program is on
/// those and on the uplink.
#[inline(always)]
pub fn is_link(ctx: &TcContext) -> bool {
    // SAFETY: the context is the kernel's and valid while the program runs.
    let here = unsafe { (*ctx.skb.skb).ifindex };
    !uplink().is_some_and(|uplink| uplink.ifindex == here)
}

/// A packet of a pod with an ENI of its own, by its link to the node: its source
/// is the pod's, and its policies let it out.
#[inline(always)]
pub fn may_leave_by_link(ctx: &TcContext, packet: &Packet) -> bool {
    // SAFETY: as in `is_link`.
    let here = unsafe { (*ctx.skb.skb).ifindex };
    match pod(&packet.src) {
        Some(pod) if pod.ifindex == here => match link(pod.endpoint) {
            Some(link) => policy::lets_out(ctx, pod.endpoint, link),
            None => true,
        },
        None if !packet.v4 && (is_local_scope(packet.src.words[0]) || packet.src == Addr::default()) => true,
        _ => {
            event::tell(ctx, EVENT_SPOOFED);
            false
        }
    }
}

/// Whether policies let the packet into this pod.
#[inline(always)]
pub fn lets_in(ctx: &TcContext, pod: &Pod) -> bool {
    if pod.flags & POD_ISOLATED == 0 {
        return true;
    }
    match link(pod.endpoint) {
        Some(link) => policy::lets_in(ctx, pod.endpoint, link),
        None => true,
    }
}

/// Packets of this pod are looked at from now on: `TRANSLATED_*`.
#[inline(always)]
pub fn mark_translated(endpoint: Endpoint, link: &Link, how: u32) {
    // SAFETY: values of the maps; of writers at once with different bits one may
    // lose, and the next packet writes again.
    unsafe {
        if let Some(link) = LINKS.get_ptr_mut(&endpoint) {
            (*link).translated |= how;
        }
        for addr in [&link.v4, &link.v6] {
            if let Some(pod) = PODS.get_ptr_mut(addr) {
                (*pod).translated |= how;
            }
        }
    }
}

/// The same of the node's own processes.
#[inline(always)]
pub fn mark_node_answers() {
    if let Some(uplink) = UPLINK.get_ptr_mut(0) {
        // SAFETY: a value of the map; every writer here writes the same number.
        unsafe { (*uplink).translated = TRANSLATED_ANSWERS };
    }
}

/// Out of a device as the node's own packets go, whoever the source is: the stack
/// would not forward what has an address of the node for its source.
#[inline(always)]
pub fn out_of(ifindex: u32) -> i32 {
    // SAFETY: takes numbers, and no description of a next hop.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Whether the packet comes from the pod behind this link. IPv6 link-local
/// sources never leave the link.
#[inline(always)]
pub fn is_own(link: &Link, packet: &Packet) -> bool {
    if packet.v4 {
        packet.src == link.v4
    } else {
        packet.src == link.v6 || is_local_scope(packet.src.words[0]) || packet.src == Addr::default()
    }
}

/// Multicast or link-local, by an IPv6 address's first word.
#[inline(always)]
fn is_local_scope(first: u32) -> bool {
    let first = u32::from_be(first);
    first >> 24 == 0xff || first & 0xffc0_0000 == 0xfe80_0000
}

/// Multicast, broadcast, link-local, loopback: not the VPC's to forward.
#[inline(always)]
fn stays_here(packet: &Packet) -> bool {
    if !packet.v4 {
        return is_local_scope(packet.dst.words[0]) || packet.dst.words[..3] == [0, 0, 0];
    }
    let word = u32::from_be(packet.dst.words[3]);
    word >> 28 >= 0xe || word >> 16 == 0xa9fe || word >> 24 == 127 || word >> 24 == 0
}

/// A packet from a pod: where it goes, if it may go the short way.
#[inline(always)]
pub fn leave(ctx: &TcContext, link: &Link, packet: &mut Packet) -> Option<i32> {
    if link.flags & LINK_SHORT == 0 || packet.hops <= 1 || packet.opens_tcp(ctx) || stays_here(packet) {
        return None;
    }
    if let Some(pod) = pod(&packet.dst)
        && pod.flags & POD_AWAY == 0
    {
        return hand_over(ctx, pod, packet);
    }
    if is_node(&packet.dst) {
        return None;
    }
    let gateway = if packet.v4 { link.gateway4 } else { link.gateway6 };
    if link.eni == 0 || gateway == Addr::default() {
        return None;
    }
    Some(out_by(link.eni, packet.v4, &gateway))
}

/// A packet of a pod with an ENI of its own: over its link to the node instead.
#[inline(always)]
pub fn over_link(link: &Link, packet: &Packet) -> i32 {
    out_by(link.node_link, packet.v4, if packet.v4 { &link.gateway4 } else { &link.gateway6 })
}

/// Out of a device, to a next hop there.
#[inline(always)]
fn out_by(ifindex: u32, v4: bool, gateway: &Addr) -> i32 {
    let mut hop = bpf_redir_neigh {
        nh_family: if v4 { AF_INET } else { AF_INET6 },
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: gateway.words },
    };
    if v4 {
        hop.__bindgen_anon_1.ipv6_nh = [gateway.words[3], 0, 0, 0];
    }
    // SAFETY: `hop` is whole and lives through the call.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

/// A packet from outside that is a pod's.
#[inline(always)]
pub fn arrive(ctx: &TcContext, packet: &mut Packet) -> i32 {
    if packet.hops <= 1 {
        return NEXT;
    }
    match pod(&packet.dst) {
        Some(pod) if !packet.opens_tcp(ctx) => hand_over(ctx, pod, packet).unwrap_or(NEXT),
        _ => NEXT,
    }
}

#[inline(always)]
fn hand_over(ctx: &TcContext, pod: &Pod, packet: &mut Packet) -> Option<i32> {
    if pod.flags & POD_SHORT == 0 {
        return None;
    }
    if !lets_in(ctx, pod) {
        return Some(account::drop());
    }
    translate::entering(ctx, packet, pod.translated & TRANSLATED_REQUESTS != 0);
    account::short_ingress(ctx, pod.endpoint);
    // SAFETY: takes two numbers.
    Some(unsafe { bpf_redirect_peer(pod.ifindex, 0) } as i32)
}
