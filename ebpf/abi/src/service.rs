//! Services: frontends, the sets of backends behind them, and what is remembered
//! of the choices made.
//!
//! A *frontend* is an address, port and protocol that somebody may connect to,
//! seen from inside the cluster or from outside. It names a *set* of backends.
//! Several frontends may share a set (a ClusterIP and an external IP of one port);
//! a Service whose policies differ inside and outside has one set for each.
//!
//! A set's backends are numbered from 0 without holes (`SLOTS`), so a new flow
//! finds its backend by one division and one lookup. Each backend also has an id
//! that no other backend of this node has (`BACKENDS`): while the id is there, the
//! flows that chose it go on, also when it no longer takes new ones.
//!
//! Order of writing, so that a reader between two writes finds a whole Service:
//! backends and slots before the frontend that counts them; a smaller count
//! before the slots beyond it go.

use crate::Addr;

pub const MAX_FRONTENDS: u32 = 1 << 18;
pub const MAX_BACKENDS: u32 = 1 << 19;
pub const MAX_SOURCE_RANGES: u32 = 1 << 16;
pub const MAX_AFFINITIES: u32 = 1 << 16;
pub const MAX_NAMESPACES: u32 = 8192;
pub const MAX_SOCKETS: u32 = 1 << 16;
pub const MAX_FLOWS: u32 = 1 << 17;
/// Entries that had no room among the others.
pub const MAX_SPARE_FLOWS: u32 = 1 << 15;
pub const MAX_FRAGMENTS: u32 = 1 << 13;

/// Names of maps: [`Frontend`] by [`FrontendKey`], [`Backend`] by [`SlotKey`],
/// [`Backend`] by its id, [`u32`] (unused) by [`RangeKey`], [`Affinity`] by
/// [`AffinityKey`], `u32` (`NETNS_*`) by namespace cookie.
pub const FRONTENDS: &str = "FRONTENDS";
pub const SLOTS: &str = "SLOTS";
pub const BACKENDS: &str = "BACKENDS";
pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
pub const AFFINITIES: &str = "AFFINITIES";
pub const NAMESPACES: &str = "NAMESPACES";
/// [`Original`] of a connected socket; in the socket itself.
pub const ORIGINALS: &str = "ORIGINALS";
/// [`Original`] by [`SocketKey`], and flows of the packet path: [`Flow`] by
/// [`FlowKey`].
pub const SOCKETS: &str = "SOCKETS";
pub const FLOWS: &str = "FLOWS";
/// As [`FLOWS`], of those that found no room there.
pub const SPARE_FLOWS: &str = "SPARE_FLOWS";
/// [`Addr`] by [`FragmentKey`].
pub const FRAGMENTS: &str = "FRAGMENTS";

/// The client that a pod sees when it talks to itself through a Service: a packet
/// with its own source would be dropped by its stack.
pub const HAIRPIN4: Addr = Addr::from_octets4([169, 254, 42, 1]);
pub const HAIRPIN6: Addr = Addr::from_octets6([0xfd, 0x66, 0x61, 0x69, 0x72, 0x77, 0x61, 0x79, 0, 0, 0, 0, 0, 0, 0, 1]);

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// [`ANY_NODE4`] or [`ANY_NODE6`]: every address of the node, whatever those are
    /// at the time (node ports). An address's own entry goes before it.
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    /// IP protocol number: TCP 6, UDP 17, SCTP 132.
    pub protocol: u8,
    /// `SCOPE_*`.
    pub scope: u8,
}

/// The addresses of frontends that every address of the node stands for.
pub const ANY_NODE4: Addr = Addr::v4(0);
pub const ANY_NODE6: Addr = Addr::v6([0; 4]);

/// Who connects: a pod or a process of a node of this cluster.
pub const SCOPE_INSIDE: u8 = 0;
/// Who connects: anybody else, by a packet that arrives on an ENI.
pub const SCOPE_OUTSIDE: u8 = 1;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    pub set: u32,
    /// How many slots of the set are filled. None: refuse, or see the flags.
    pub count: u32,
    /// `FRONTEND_*`.
    pub flags: u32,
    /// For `FRONTEND_AFFINITY`.
    pub affinity_seconds: u32,
}

/// A client comes back to the backend it had, for `affinity_seconds`.
pub const FRONTEND_AFFINITY: u32 = 1;
/// Only clients in the set's `SOURCE_RANGES`.
pub const FRONTEND_RANGES: u32 = 1 << 1;
/// Without backends, say nothing (externalTrafficPolicy Local) instead of refusing.
pub const FRONTEND_SILENT: u32 = 1 << 2;
/// The client's address is kept on the way to a backend of this node, and there
/// are no others.
pub const FRONTEND_LOCAL: u32 = 1 << 3;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotKey {
    pub set: u32,
    pub slot: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    /// `BACKEND_*`.
    pub flags: u16,
    /// Never 0.
    pub id: u32,
}

/// It runs on this node.
pub const BACKEND_LOCAL: u16 = 1;
/// In `BACKENDS` alone: the flows that chose it go on, but it takes no new ones,
/// and nobody comes back to it by affinity.
pub const BACKEND_DRAINING: u16 = 1 << 1;

/// Not a set: its slots are the user side's memory of which ids it has given.
pub const SET_NONE: u32 = 0;

/// Key of an LPM trie; `prefix` counts the bits of `set` too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RangeKey {
    /// Network byte order, or the trie would not compare it as a whole.
    pub set: u32,
    pub addr: Addr,
}

/// As the kernel takes the key of an LPM trie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrieKey {
    pub prefix: u32,
    pub key: RangeKey,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AffinityKey {
    /// The client's address, or its namespace's cookie in the last two words.
    pub client: Addr,
    pub set: u32,
    /// `AFFINITY_*`.
    pub kind: u32,
}

pub const AFFINITY_ADDRESS: u32 = 0;
pub const AFFINITY_NAMESPACE: u32 = 1;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// Of `CLOCK_MONOTONIC`, nanoseconds.
    pub last_used: u64,
    pub backend: u32,
    pub _pad: u32,
}

/// The node's own network namespace.
pub const NETNS_NODE: u32 = 1;
/// A pod of this node.
pub const NETNS_POD: u32 = 1 << 1;
/// Connections are not resolved at the socket, but packet by packet.
pub const NETNS_PER_PACKET: u32 = 1 << 2;
/// Policies are enforced inside it: it may not pass by its own device's programs.
pub const NETNS_GUARDED: u32 = 1 << 3;

/// What a socket talked to, before it was translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Original {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    pub _pad: u16,
    /// The backend's id, to see whether it still is one.
    pub backend: u32,
}

/// For UDP sockets: an unconnected one may talk to many Services.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketKey {
    pub cookie: u64,
    /// The backend's.
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    pub _pad: [u16; 3],
}

/// One direction of a translated flow, as its packets look before translation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    pub src: Addr,
    pub dst: Addr,
    /// Network byte order; 0 for protocols without ports.
    pub sport: u16,
    pub dport: u16,
    pub protocol: u8,
    /// `FLOW_*`.
    pub kind: u8,
    pub _pad: u16,
}

/// The later fragments of a packet whose first one was translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentKey {
    pub src: Addr,
    pub dst: Addr,
    pub id: u32,
    pub protocol: u16,
    /// `FLOW_*`: at whose door. A fragment passes several.
    pub kind: u16,
}

/// Which address of the fragments changes, and to what.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    pub src: Addr,
    pub dst: Addr,
}

/// Pod to Service: authoritative, holds the backend.
pub const FLOW_FORWARD: u8 = 0;
/// Backend to pod: how the reply is to look. The next forward packet restores
/// one that was lost.
pub const FLOW_REVERSE: u8 = 1;
/// As the two, for a client from outside: client to Service, and backend to
/// whom it takes for the client. Apart from them, for a pod's packets would be
/// found by what another pod has asked.
pub const FLOW_OUTSIDE: u8 = 2;
pub const FLOW_ANSWER: u8 = 3;
/// A flow of an isolated pod that its policies allow, in both directions. `src` is
/// the pod, whoever has begun; `backend` the generation of the tables by which it
/// was judged; `peer` the client that the node hides from it, if there is one.
pub const FLOW_JUDGED: u8 = 4;
/// No flows: fragments of a packet that was let out of a pod, and into one.
pub const LET_OUT: u8 = 5;
pub const LET_IN: u8 = 6;

/// The ports of the node that clients from outside get, of every protocol: below
/// those that the kernel gives to the node's own processes and below those of
/// Services.
pub const OUTSIDE_PORTS: core::ops::Range<u16> = 10_000..30_000;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Of `CLOCK_MONOTONIC`, nanoseconds.
    pub last_used: u64,
    /// Where the packets go, or the source that replies get.
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    /// `FLOW_ENDED_*`, `FLOW_BY_OTHER`.
    pub flags: u16,
    pub backend: u32,
    /// Of a client from outside: whom the backend takes for it, and in the answer's
    /// entry the client. The same when its address is kept. Zero for pods.
    pub peer: Addr,
    /// Network byte order.
    pub peer_port: u16,
    pub _pad: [u16; 3],
}

/// In the entry of an answer: this end will send no more data. With both, another
/// client may have its port after a while.
pub const FLOW_ENDED_CLIENT: u16 = 1;
pub const FLOW_ENDED_BACKEND: u16 = 1 << 1;
pub const FLOW_ENDED: u16 = FLOW_ENDED_CLIENT | FLOW_ENDED_BACKEND;
/// Of [`FLOW_JUDGED`]: the other end has begun it.
pub const FLOW_BY_OTHER: u16 = 1 << 2;

const _: () = {
    assert!(size_of::<FrontendKey>() == 20 && align_of::<FrontendKey>() == 4);
    assert!(size_of::<Frontend>() == 16);
    assert!(size_of::<SlotKey>() == 8);
    assert!(size_of::<Backend>() == 24 && align_of::<Backend>() == 4);
    assert!(size_of::<RangeKey>() == 20 && size_of::<TrieKey>() == 24);
    assert!(size_of::<AffinityKey>() == 24);
    assert!(size_of::<Affinity>() == 16);
    assert!(size_of::<Original>() == 24);
    assert!(size_of::<SocketKey>() == 32);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 56);
    assert!(size_of::<FragmentKey>() == 40 && size_of::<Fragment>() == 32);
};

// SAFETY: each is `repr(C)`, has no padding (asserted above), and any bytes are
// a value of it.
#[cfg(feature = "user")]
mod user {
    use super::*;
    unsafe impl aya::Pod for FrontendKey {}
    unsafe impl aya::Pod for Frontend {}
    unsafe impl aya::Pod for SlotKey {}
    unsafe impl aya::Pod for Backend {}
    unsafe impl aya::Pod for RangeKey {}
    unsafe impl aya::Pod for TrieKey {}
    unsafe impl aya::Pod for AffinityKey {}
    unsafe impl aya::Pod for Affinity {}
    unsafe impl aya::Pod for Original {}
    unsafe impl aya::Pod for SocketKey {}
    unsafe impl aya::Pod for FlowKey {}
    unsafe impl aya::Pod for Flow {}
    unsafe impl aya::Pod for FragmentKey {}
    unsafe impl aya::Pod for Fragment {}
}
