//! The socket path: a Service is resolved once, when a process connects.
//!
//! Doors: `connect`, `sendmsg`, `recvmsg`, `getpeername` of both families, on the
//! root of the cgroup tree, where they see every process of the machine. They act
//! only in the network namespaces of this node (`NAMESPACES`), so that agents that
//! share a machine leave each other's pods alone. IPv6 sockets that talk to
//! v4-mapped addresses need nothing special: the maps' keys have that form.
//!
//! TCP is resolved here for all; UDP for the node's own processes only, since a
//! pod's datagrams are judged one by one and so leave a dead backend at once.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::{HashMap, LruHashMap, SkStorage};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie};
use aya_ebpf::macros::{btf_map, cgroup_sock_addr};
use aya_ebpf::programs::SockAddrContext;
use fairway_ebpf_abi::{
    AFFINITY_NAMESPACE, Addr, AffinityKey, FRONTEND_RANGES, FrontendKey, MAX_NAMESPACES, MAX_SOCKETS, NETNS_NODE,
    NETNS_PER_PACKET, Original, SCOPE_INSIDE, SocketKey,
};

use crate::account::NO_PREALLOC;
use crate::packet::{TCP, UDP};
use crate::service;

#[btf_map]
static NAMESPACES: HashMap<u64, u32, { MAX_NAMESPACES as usize }, NO_PREALLOC> = HashMap::new();

/// What connected sockets talked to. Ends with the socket.
#[btf_map]
static ORIGINALS: SkStorage<Original> = SkStorage::new();

/// What unconnected ones talked to, and connected datagram sockets.
#[btf_map]
static SOCKETS: LruHashMap<SocketKey, Original, { MAX_SOCKETS as usize }> = LruHashMap::new();

/// The only verdict there is: what is refused is sent where nobody answers.
const ALLOW: i32 = 1;
const MPTCP: u32 = 262;
const LOOPBACK4: Addr = Addr::from_octets4([127, 0, 0, 1]);
const LOOPBACK6: Addr = Addr::from_octets6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

/// The unspecified address means the same to a process.
#[inline(always)]
fn is_loopback(addr: &Addr) -> bool {
    if addr.is_v4() {
        matches!(u32::from_be(addr.words[3]) >> 24, 0 | 127)
    } else {
        *addr == LOOPBACK6 || *addr == Addr::v6([0; 4])
    }
}

/// The address a call is about, as the process sees it.
#[derive(Clone, Copy)]
struct Peer {
    addr: Addr,
    /// Network byte order.
    port: u16,
}

#[inline(always)]
fn peer4(ctx: &SockAddrContext) -> Peer {
    // SAFETY: the context is the kernel's and valid while the program runs.
    let call = unsafe { &*ctx.sock_addr };
    Peer { addr: Addr::v4(call.user_ip4), port: call.user_port as u16 }
}

#[inline(always)]
fn peer6(ctx: &SockAddrContext) -> Peer {
    // SAFETY: as in `peer4`. Word by word: wider reads are refused.
    let read = |i: usize| unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip6[i]) };
    let words = [read(0), read(1), read(2), read(3)];
    // SAFETY: as in `peer4`.
    Peer { addr: Addr::v6(words), port: unsafe { (*ctx.sock_addr).user_port } as u16 }
}

#[inline(always)]
fn set4(ctx: &SockAddrContext, to: Peer) {
    // SAFETY: as in `peer4`; these fields may be written.
    unsafe {
        (*ctx.sock_addr).user_ip4 = to.addr.words[3];
        (*ctx.sock_addr).user_port = u32::from(to.port);
    }
}

#[inline(always)]
fn set6(ctx: &SockAddrContext, to: Peer) {
    // SAFETY: as in `set4`, word by word.
    unsafe {
        for i in 0..4 {
            core::ptr::write_volatile(&raw mut (*ctx.sock_addr).user_ip6[i], to.addr.words[i]);
        }
        (*ctx.sock_addr).user_port = u32::from(to.port);
    }
}

/// Flags of the process's namespace and its cookie; `None` when it is not ours.
#[inline(always)]
fn namespace(ctx: &SockAddrContext) -> Option<(u32, u64)> {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    flags_of(cookie).map(|flags| (flags, cookie))
}

/// `NETNS_*` of a namespace of this node.
#[inline(always)]
pub fn flags_of(cookie: u64) -> Option<u32> {
    // SAFETY: entries are replaced whole and not preallocated.
    unsafe { NAMESPACES.get(&cookie) }.copied()
}

#[inline(always)]
fn protocol(ctx: &SockAddrContext) -> u8 {
    // SAFETY: as in `peer4`.
    match unsafe { (*ctx.sock_addr).protocol } {
        MPTCP => TCP,
        protocol => protocol as u8,
    }
}

/// Where a call to a Service really goes. `None`: it is not about one, or not to
/// be resolved here.
#[inline(always)]
fn resolve(ctx: &SockAddrContext, to: Peer, hash: impl FnOnce() -> u32) -> Option<(Peer, Original)> {
    let (flags, cookie) = namespace(ctx)?;
    let protocol = protocol(ctx);
    let here = match protocol {
        TCP => flags & NETNS_PER_PACKET == 0,
        UDP => flags & NETNS_NODE != 0,
        _ => false,
    };
    if !here {
        return None;
    }
    let mut key = FrontendKey { addr: to.addr, port: to.port, protocol, scope: SCOPE_INSIDE };
    // A pod's loopback is its own, not the node's.
    let frontend = match flags & NETNS_NODE == 0 && is_loopback(&to.addr) {
        true => return None,
        false => service::frontend_or_node_port(&mut key)?,
    };
    if frontend.flags & FRONTEND_RANGES != 0 && flags & NETNS_NODE == 0 {
        // Which of the pod's addresses it comes from is not known here.
        return None;
    }
    let client = AffinityKey {
        client: Addr::v6([0, 0, cookie as u32, (cookie >> 32) as u32]),
        set: 0,
        kind: AFFINITY_NAMESPACE,
    };
    let original = Original { addr: to.addr, port: to.port, _pad: 0, backend: 0 };
    Some(match service::choose(frontend, hash(), client) {
        Some(backend) => {
            (Peer { addr: backend.addr, port: backend.port }, Original { backend: backend.id, ..original })
        }
        // Nobody listens on port 0: refused at once, on every kernel.
        None => (Peer { addr: if to.addr.is_v4() { LOOPBACK4 } else { LOOPBACK6 }, port: 0 }, original),
    })
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, to: Peer) -> Option<Peer> {
    // SAFETY: takes nothing.
    let random = || unsafe { bpf_get_prandom_u32() };
    let Some((backend, mut original)) = resolve(ctx, to, random) else {
        // A socket may be connected again, to something else.
        // SAFETY: the socket is the call's and alive.
        let earlier = unsafe { ORIGINALS.get_ptr_mut(ctx) };
        if !earlier.is_null() {
            // SAFETY: a value of the map, checked.
            unsafe { *earlier = Original::default() };
        }
        if protocol(ctx) == UDP {
            let _ = SOCKETS.remove(&socket_key(ctx, to));
        }
        return None;
    };
    // SAFETY: as above. Without memory for it getpeername shows the backend.
    let stored = unsafe { ORIGINALS.get_or_insert_ptr_mut(ctx, Some(&mut original)) };
    if !stored.is_null() {
        // SAFETY: a value of the map, checked; there may have been an earlier one.
        unsafe { *stored = original };
    }
    if protocol(ctx) == UDP {
        // By this the user side finds those that are to end with their backend:
        // nothing lists what is stored in a datagram socket.
        let _ = SOCKETS.insert(&socket_key(ctx, backend), &original, 0);
    }
    Some(backend)
}

#[inline(always)]
fn socket_key(ctx: &SockAddrContext, backend: Peer) -> SocketKey {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    SocketKey { cookie, addr: backend.addr, port: backend.port, _pad: [0; 3] }
}

#[inline(always)]
fn sendmsg(ctx: &SockAddrContext, to: Peer) -> Option<Peer> {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // One socket's datagrams to one Service go one way while its set stays.
    let words = to.addr.words;
    let flow =
        || service::mix(cookie as u32, &[(cookie >> 32) as u32, words[0], words[1], words[3], u32::from(to.port)]);
    let (backend, original) = resolve(ctx, to, flow)?;
    let key = SocketKey { cookie, addr: backend.addr, port: backend.port, _pad: [0; 3] };
    let _ = SOCKETS.insert(&key, &original, 0);
    Some(backend)
}

/// What the process sees instead of the backend `from`.
#[inline(always)]
fn recvmsg(ctx: &SockAddrContext, from: Peer) -> Option<Peer> {
    let (flags, _) = namespace(ctx)?;
    if flags & NETNS_NODE == 0 || protocol(ctx) != UDP {
        return None;
    }
    if let Some(peer) = getpeername(ctx) {
        return Some(peer);
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let key = SocketKey { cookie, addr: from.addr, port: from.port, _pad: [0; 3] };
    // SAFETY: entries are replaced whole; a reused one is another socket's, and
    // the kernel keeps it from being half written.
    unsafe { SOCKETS.get(&key) }.map(|original| Peer { addr: original.addr, port: original.port })
}

#[inline(always)]
fn getpeername(ctx: &SockAddrContext) -> Option<Peer> {
    // SAFETY: the socket is the call's and alive.
    let original = unsafe { ORIGINALS.get_ptr_mut(ctx) };
    if original.is_null() {
        return None;
    }
    // SAFETY: a value of the map, checked.
    let original = unsafe { &*original };
    (original.port != 0).then_some(Peer { addr: original.addr, port: original.port })
}

#[cgroup_sock_addr(connect4)]
pub fn sock_connect4(ctx: SockAddrContext) -> i32 {
    if let Some(to) = connect(&ctx, peer4(&ctx)) {
        set4(&ctx, to);
    }
    ALLOW
}

#[cgroup_sock_addr(connect6)]
pub fn sock_connect6(ctx: SockAddrContext) -> i32 {
    if let Some(to) = connect(&ctx, peer6(&ctx)) {
        set6(&ctx, to);
    }
    ALLOW
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    if let Some(to) = sendmsg(&ctx, peer4(&ctx)) {
        set4(&ctx, to);
    }
    ALLOW
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    if let Some(to) = sendmsg(&ctx, peer6(&ctx)) {
        set6(&ctx, to);
    }
    ALLOW
}

#[cgroup_sock_addr(recvmsg4)]
pub fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    if let Some(from) = recvmsg(&ctx, peer4(&ctx)) {
        set4(&ctx, from);
    }
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    if let Some(from) = recvmsg(&ctx, peer6(&ctx)) {
        set6(&ctx, from);
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
pub fn sock_getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some(peer) = getpeername(&ctx) {
        set4(&ctx, peer);
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub fn sock_getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(peer) = getpeername(&ctx) {
        set6(&ctx, peer);
    }
    ALLOW
}
