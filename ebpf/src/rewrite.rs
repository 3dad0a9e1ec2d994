//! Changing a packet's addresses and ports, checksums included.
//!
//! Right under every state a checksum can be in. A device that still has to
//! compute it (PARTIAL) needs the pseudo header's part changed, which the helper
//! does by its flag. One that has summed the whole packet (COMPLETE) needs that
//! sum to stay true: for IPv4 the header's own checksum makes up for the address,
//! for IPv6 nothing does, so there the store itself adjusts the sum. A UDP
//! checksum of 0 means none and stays 0.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::Addr;

use crate::packet::{Packet, SCTP, TCP, UDP};

/// Which of a packet's two ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

pub const IP_CHECKSUM: usize = 24;

impl Packet {
    /// Where an address is in the packet.
    #[inline(always)]
    fn address_at(&self, end: End) -> usize {
        match (self.v4, end) {
            (true, End::Source) => 26,
            (true, End::Destination) => 30,
            (false, End::Source) => 22,
            (false, End::Destination) => 38,
        }
    }

    /// Where the transport's checksum is, if it covers addresses.
    #[inline(always)]
    fn checksum(&self) -> Option<(usize, u64)> {
        if self.later_fragment {
            return None;
        }
        match self.protocol {
            TCP => Some((self.transport + 16, 0)),
            UDP => Some((self.transport + 6, u64::from(BPF_F_MARK_MANGLED_0))),
            ICMP6 => Some((self.transport + 2, 0)),
            _ => None,
        }
    }

    #[inline(always)]
    pub fn set_address(&mut self, ctx: &TcContext, end: End, to: &Addr) -> Option<()> {
        let at = self.address_at(end);
        let from = if end == End::Source { self.src } else { self.dst };
        if let Some((checksum, flags)) = self.checksum() {
            let flags = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
            if self.v4 {
                replace4(ctx, checksum, from.words[3], to.words[3], flags)?;
            } else {
                for i in 0..4 {
                    replace4(ctx, checksum, from.words[i], to.words[i], flags)?;
                }
            }
        }
        if self.v4 {
            ctx.l3_csum_replace(IP_CHECKSUM, u64::from(from.words[3]), u64::from(to.words[3]), 4).ok()?;
            ctx.store(at, &to.words[3], 0).ok()?;
        } else {
            ctx.store(at, &to.words, u64::from(BPF_F_RECOMPUTE_CSUM)).ok()?;
        }
        match end {
            End::Source => self.src = *to,
            End::Destination => self.dst = *to,
        }
        Some(())
    }

    /// Ports in network byte order.
    #[inline(always)]
    pub fn set_port(&mut self, ctx: &TcContext, end: End, from: u16, to: u16) -> Option<()> {
        if from == to || self.later_fragment {
            return Some(());
        }
        let at = self.transport + if end == End::Source { 0 } else { 2 };
        match self.checksum() {
            Some((checksum, flags)) => {
                ctx.l4_csum_replace(checksum, u64::from(from), u64::from(to), flags | 2).ok()?;
            }
            None if self.protocol == SCTP => crate::sctp::changed(ctx, self, at - self.transport, from, to)?,
            None => {}
        }
        ctx.store(at, &to, 0).ok()
    }
}

impl Packet {
    /// One router on its way more. There must be a hop left.
    #[inline(always)]
    pub fn hop(&self, ctx: &TcContext) -> Option<()> {
        let left = self.hops.wrapping_sub(1);
        if !self.v4 {
            const HOP_LIMIT: usize = 21;
            return ctx.store(HOP_LIMIT, &left, u64::from(BPF_F_RECOMPUTE_CSUM)).ok();
        }
        const TIME_TO_LIVE: usize = 22;
        // The first byte of a word of which the second is the protocol.
        let word = |hops: u8| u64::from(u16::from_ne_bytes([hops, 0]));
        ctx.l3_csum_replace(IP_CHECKSUM, word(self.hops), word(left), 2).ok()?;
        ctx.store(TIME_TO_LIVE, &left, 0).ok()
    }
}

pub const ICMP6: u8 = 58;

#[inline(always)]
fn replace4(ctx: &TcContext, at: usize, from: u32, to: u32, flags: u64) -> Option<()> {
    ctx.l4_csum_replace(at, u64::from(from), u64::from(to), flags).ok()
}
