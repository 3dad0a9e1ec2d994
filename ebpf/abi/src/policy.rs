//! NetworkPolicy: who may talk to whom.
//!
//! An address has a class ([`CLASSES`] for pods', [`CLASS_NETS`] for all others,
//! else 0), an isolated pod has a profile in each direction ([`crate::Link`]).
//! Profile and class together name the ports that are open ([`RULES`]); what has
//! no entry is judged as class 0. Names are digests, the same in every run.
//!
//! Order of writing, so that a program between two writes judges as before or as
//! after: rules before the addresses and pods that lead to them; after the last
//! write the generation, which makes programs judge flows again that they know.

use crate::Addr;

/// Names of maps: `u64` by [`Addr`], `u64` by [`NetKey`], [`RuleBlock`] by
/// [`RuleKey`], `u64` by the name of a rule (one per CPU), an array of one
/// [`PolicyState`].
pub const CLASSES: &str = "CLASSES";
pub const CLASS_NETS: &str = "CLASS_NETS";
pub const RULES: &str = "RULES";
pub const RULE_HITS: &str = "RULE_HITS";
pub const POLICY: &str = "POLICY";

pub const MAX_CLASSED: u32 = 1 << 18;
pub const MAX_CLASS_NETS: u32 = 1 << 16;
pub const MAX_RULE_BLOCKS: u32 = 1 << 18;
pub const MAX_RULES: u32 = 1 << 16;

/// The pod is not isolated in this direction.
pub const PROFILE_OPEN: u64 = 0;
/// Nothing is open to anybody: a pod that is not known yet.
pub const PROFILE_CLOSED: u64 = u64::MAX;

/// As the kernel takes the key of an LPM trie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetKey {
    pub prefix: u32,
    pub addr: Addr,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleKey {
    pub profile: u64,
    pub class: u64,
    /// Counted from 0.
    pub block: u32,
    pub _pad: u32,
}

pub const BLOCK_PORTS: usize = 15;
/// What one pair of profile and class can have.
pub const MAX_BLOCKS: u32 = 64;

/// Ports that are open; no port is in two of them. What is not filled in opens
/// nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleBlock {
    /// Another block follows.
    pub more: u32,
    pub _pad: u32,
    pub ports: [OpenPorts; BLOCK_PORTS],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenPorts {
    /// The name of the rule; 0: none.
    pub rule: u64,
    /// Both included, in the host's byte order.
    pub from: u16,
    pub to: u16,
    /// [`EVERYTHING`], or IP protocol number.
    pub protocol: u16,
    pub _pad: u16,
}

/// Every protocol there is, with ports or without.
pub const EVERYTHING: u16 = 0;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyState {
    /// Of the tables: flows that were judged by another are judged again.
    pub generation: u32,
    pub _pad: u32,
}

const _: () = {
    assert!(size_of::<NetKey>() == 20 && align_of::<NetKey>() == 4);
    assert!(size_of::<RuleKey>() == 24 && align_of::<RuleKey>() == 8);
    assert!(size_of::<OpenPorts>() == 16);
    assert!(size_of::<RuleBlock>() == 8 + 16 * BLOCK_PORTS);
    assert!(size_of::<PolicyState>() == 8);
};

// SAFETY: each is `repr(C)`, has no padding (asserted above), and any bytes are
// a value of it.
#[cfg(feature = "user")]
mod user {
    unsafe impl aya::Pod for super::NetKey {}
    unsafe impl aya::Pod for super::RuleKey {}
    unsafe impl aya::Pod for super::RuleBlock {}
    unsafe impl aya::Pod for super::PolicyState {}
}
