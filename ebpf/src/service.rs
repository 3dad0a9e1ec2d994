//! Services: from an address somebody connects to, to a backend.
//!
//! Shared by the socket path and the packet path. One lookup finds the frontend,
//! one the backend: `hash % count` names a slot. Sets change while programs read
//! them (see `fairway_ebpf_abi::service`), so a slot may be gone by the time it is
//! looked up; then the first one is taken, which is the last to go.

use aya_ebpf::btf_maps::{HashMap, LpmTrie, LruHashMap, lpm_trie::Key};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_map;
use fairway_ebpf_abi::{
    ANY_NODE4, ANY_NODE6, Addr, Affinity, AffinityKey, BACKEND_DRAINING, Backend, FRONTEND_AFFINITY, FRONTEND_RANGES,
    Frontend, FrontendKey, MAX_AFFINITIES, MAX_BACKENDS, MAX_FRONTENDS, MAX_SOURCE_RANGES, RangeKey, SlotKey,
};

use crate::account::NO_PREALLOC;
use crate::short;

#[btf_map]
static FRONTENDS: HashMap<FrontendKey, Frontend, { MAX_FRONTENDS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static SLOTS: HashMap<SlotKey, Backend, { MAX_BACKENDS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static BACKENDS: HashMap<u32, Backend, { MAX_BACKENDS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static SOURCE_RANGES: LpmTrie<RangeKey, u32, { MAX_SOURCE_RANGES as usize }> = LpmTrie::new();

#[btf_map]
static AFFINITIES: LruHashMap<AffinityKey, Affinity, { MAX_AFFINITIES as usize }> = LruHashMap::new();

const SECOND: u64 = 1_000_000_000;

#[inline(always)]
pub fn frontend(key: &FrontendKey) -> Option<&'static Frontend> {
    // SAFETY: entries are replaced whole, never written in place; a removed one
    // stays valid until the program ends (not preallocated).
    unsafe { FRONTENDS.get(key) }
}

/// As [`frontend`], and an address of the node stands for all of them. `key` is
/// what was found afterwards.
#[inline(always)]
pub fn frontend_or_node_port(key: &mut FrontendKey) -> Option<&'static Frontend> {
    match frontend(key) {
        Some(frontend) => Some(frontend),
        None if short::is_node(&key.addr) => {
            key.addr = if key.addr.is_v4() { ANY_NODE4 } else { ANY_NODE6 };
            frontend(key)
        }
        None => None,
    }
}

/// A backend by its id: gone when it is no longer one.
#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend> {
    // SAFETY: as in `frontend`.
    unsafe { BACKENDS.get(&id) }
}

/// Whether this client may use the frontend.
#[inline(always)]
pub fn admits(frontend: &Frontend, client: &Addr) -> bool {
    frontend.flags & FRONTEND_RANGES == 0
        || SOURCE_RANGES.get(&Key::new(160, RangeKey { set: frontend.set.to_be(), addr: *client })).is_some()
}

/// A backend for a new flow: the client's last one, if the Service wants that and
/// it is still there, else the one that `hash` falls on.
#[inline(always)]
pub fn choose(frontend: &Frontend, hash: u32, client: AffinityKey) -> Option<&'static Backend> {
    if frontend.flags & FRONTEND_AFFINITY == 0 {
        return slot(frontend, hash);
    }
    let client = AffinityKey { set: frontend.set, ..client };
    // SAFETY: takes nothing.
    let now = unsafe { bpf_ktime_get_ns() };
    let known = AFFINITIES.get_ptr_mut(&client);
    if let Some(known) = known {
        // SAFETY: a value of the map; the fields are plain numbers, and a writer
        // on another CPU means the same client.
        let known = unsafe { &mut *known };
        let age = now.wrapping_sub(known.last_used);
        if age < u64::from(frontend.affinity_seconds) * SECOND
            && let Some(backend) = backend(known.backend)
            && backend.flags & BACKEND_DRAINING == 0
        {
            known.last_used = now;
            return Some(backend);
        }
    }
    let chosen = slot(frontend, hash)?;
    let _ = AFFINITIES.insert(&client, &Affinity { last_used: now, backend: chosen.id, _pad: 0 }, 0);
    Some(chosen)
}

#[inline(always)]
fn slot(frontend: &Frontend, hash: u32) -> Option<&'static Backend> {
    if frontend.count == 0 {
        return None;
    }
    let set = frontend.set;
    // SAFETY: as in `frontend`.
    unsafe { SLOTS.get(&SlotKey { set, slot: hash % frontend.count }).or_else(|| SLOTS.get(&SlotKey { set, slot: 0 })) }
}

/// Spreads the bits of a flow's description (Murmur3's finaliser, word by word).
#[inline(always)]
pub fn mix(seed: u32, words: &[u32]) -> u32 {
    let mut hash = seed;
    for word in words {
        hash ^= *word;
        hash ^= hash >> 16;
        hash = hash.wrapping_mul(0x85eb_ca6b);
        hash ^= hash >> 13;
        hash = hash.wrapping_mul(0xc2b2_ae35);
        hash ^= hash >> 16;
    }
    hash
}
