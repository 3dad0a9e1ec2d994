//! What the packet path tells of what it did: every event is counted, and of
//! those that somebody may ask about some are told in full.

use crate::{Addr, Endpoint};

/// Counts of what the packet path did, by `EVENT_*`; one per CPU.
pub const EVENTS: &str = "EVENTS";
/// Ring buffer of [`Sample`].
pub const SAMPLES: &str = "SAMPLES";
/// [`Pace`] by `EVENT_*`; one per CPU.
pub const PACES: &str = "PACES";

/// A new flow of the packet path was given a backend.
pub const EVENT_CHOSEN: u32 = 0;
/// A client was told that nobody is there.
pub const EVENT_REFUSED: u32 = 1;
/// Not in the frontend's source ranges.
pub const EVENT_NOT_ADMITTED: u32 = 2;
/// The flow table is full.
pub const EVENT_TABLE_FULL: u32 = 3;
/// A flow has left a backend that is gone.
pub const EVENT_MOVED: u32 = 4;
/// An ICMP error was translated.
pub const EVENT_ERROR_TRANSLATED: u32 = 5;
/// A packet could not be rewritten.
pub const EVENT_UNWRITABLE: u32 = 6;
/// No backend is on this node, and others may have some: nothing was said.
pub const EVENT_UNANSWERED: u32 = 7;
/// No port of the node was free for a client from outside.
pub const EVENT_NO_PORT: u32 = 8;
/// The source was not the pod's.
pub const EVENT_SPOOFED: u32 = 9;
/// A policy does not let it into the pod, or out of it.
pub const EVENT_DENIED_INGRESS: u32 = 10;
pub const EVENT_DENIED_EGRESS: u32 = 11;
/// A pod has sent what cannot be read as a packet of its kind.
pub const EVENT_MALFORMED: u32 = 12;
pub const EVENT_COUNT: u32 = 13;

/// The ring buffer's size in bytes: a power of two and whole pages of every size
/// there is.
pub const SAMPLES_SIZE: u32 = 1 << 16;
/// Between two samples of one kind on one CPU, at least: nanoseconds.
pub const SAMPLE_INTERVAL: u64 = 100_000_000;

/// An event told in full, and the packet that it was about. Sampled: of each kind
/// ten a second and CPU at most, and none while nobody reads and the buffer is
/// full. No packet is held up for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Of `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    pub src: Addr,
    pub dst: Addr,
    /// `EVENT_*`.
    pub what: u32,
    /// The device where it happened: a pod's, or an interface index of the node.
    pub endpoint: Endpoint,
    /// Of the same kind on the same CPU since its last sample, and not told.
    pub untold: u32,
    /// Network byte order; 0 when the packet has none.
    pub sport: u16,
    pub dport: u16,
    /// IP protocol number; 0 when it is no IP packet.
    pub protocol: u32,
    pub _pad: u32,
}

impl Sample {
    /// As it lies in the buffer.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let addr = |at: usize| Some(Addr { words: [word(at)?, word(at + 4)?, word(at + 8)?, word(at + 12)?] });
        (bytes.len() == size_of::<Self>()).then_some(())?;
        Some(Self {
            time: u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?),
            src: addr(8)?,
            dst: addr(24)?,
            what: word(40)?,
            endpoint: word(44)?,
            untold: word(48)?,
            sport: half(52)?,
            dport: half(54)?,
            protocol: word(56)?,
            _pad: 0,
        })
    }
}

/// How one CPU keeps to the pace of one kind of sample.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// Of `CLOCK_MONOTONIC`, nanoseconds.
    pub last: u64,
    pub untold: u32,
    pub _pad: u32,
}

const _: () = {
    assert!(size_of::<Sample>() == 64 && align_of::<Sample>() == 8);
    assert!(core::mem::offset_of!(Sample, what) == 40 && core::mem::offset_of!(Sample, sport) == 52);
    assert!(size_of::<Pace>() == 16);
};
