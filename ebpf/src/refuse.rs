//! Telling a client at once that nobody is there, as its peer's host would: a
//! reset for TCP (RFC 9293, 3.10.7.1), an ICMP port unreachable for UDP, an abort
//! for SCTP (RFC 9260, 8.4). The refused packet becomes the answer.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::{bpf_csum_diff, bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{Addr, EVENT_REFUSED};

use crate::packet::{ETHERNET, ICMP, Packet, SCTP, TCP, UDP, at};
use crate::rewrite::ICMP6;
use crate::{account, event, sctp};

const HOPS: u8 = 64;

/// Back where the packet came from.
#[inline(always)]
pub fn to_sender(ctx: &TcContext) -> i32 {
    let Ok(macs) = ctx.load::<[[u8; 6]; 2]>(0) else { return account::drop() };
    if ctx.store(0, &[macs[1], macs[0]], 0).is_err() {
        return account::drop();
    }
    let flags = if account::is_in_pod() { u64::from(BPF_F_INGRESS) } else { 0 };
    // SAFETY: the context is valid; the helper takes two numbers.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, flags) as i32 }
}

/// Refuses the packet: the verdict with which its answer goes out.
#[inline(always)]
pub fn sender(ctx: &TcContext) -> i32 {
    event::tell(ctx, EVENT_REFUSED);
    refuse_sender(ctx.skb.skb)
}

/// A global function, which the verifier walks once: it reads the packet again,
/// and nothing of how it was called matters to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn refuse_sender(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = &Packet::parse(ctx) else { return account::drop() };
    let made = match (packet.protocol, packet.v4) {
        (TCP, _) => reset(ctx, packet),
        (SCTP, _) => abort(ctx, packet),
        (UDP, true) => unreachable4(ctx, packet),
        (UDP, false) => unreachable6(ctx, packet),
        _ => None,
    };
    match made {
        Some(()) => to_sender(ctx),
        None => account::drop(),
    }
}

#[repr(C)]
struct Ipv4 {
    version_length: u8,
    tos: u8,
    length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    src: u32,
    dst: u32,
}

#[repr(C)]
struct Ipv6 {
    version: u32,
    length: u16,
    next: u8,
    hops: u8,
    src: [u32; 4],
    dst: [u32; 4],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Tcp {
    sport: u16,
    dport: u16,
    seq: u32,
    ack: u32,
    length: u8,
    flags: u8,
    window: u16,
    checksum: u16,
    urgent: u16,
}

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// One's complement sum of whole words, on top of `sum`.
#[inline(always)]
fn add<T>(sum: u32, words: &T) -> u32 {
    let data = core::ptr::from_ref(words).cast_mut().cast();
    // SAFETY: readable for its size, which is a multiple of four and small.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, data, size_of::<T>() as u32, sum) as u32 }
}

#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Sum of the pseudo header (RFC 9293, 3.1; RFC 8200, 8.1).
#[inline(always)]
fn pseudo(src: &Addr, dst: &Addr, v4: bool, protocol: u8, length: u16) -> u32 {
    let tail = [u32::from(length).to_be(), u32::from(protocol).to_be()];
    let sum = add(0, &tail);
    if v4 { add(add(sum, &src.words[3]), &dst.words[3]) } else { add(add(sum, &src.words), &dst.words) }
}

/// Writes the network header of an answer with `length` bytes behind it; says
/// where those begin.
#[inline(always)]
fn network(ctx: &TcContext, packet: &Packet, protocol: u8, length: u16) -> Option<usize> {
    if packet.v4 {
        let mut ip = Ipv4 {
            version_length: 0x45,
            tos: 0,
            length: (20 + length).to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: HOPS,
            protocol,
            checksum: 0,
            src: packet.dst.words[3],
            dst: packet.src.words[3],
        };
        ip.checksum = fold(add(0, &ip));
        ctx.store(ETHERNET, &ip, 0).ok()?;
        Some(ETHERNET + 20)
    } else {
        let ip = Ipv6 {
            version: 0x6000_0000_u32.to_be(),
            length: length.to_be(),
            next: protocol,
            hops: HOPS,
            src: packet.dst.words,
            dst: packet.src.words,
        };
        ctx.store(ETHERNET, &ip, 0).ok()?;
        Some(ETHERNET + 40)
    }
}

/// Cuts the packet, or makes it longer.
#[inline(always)]
fn resize(ctx: &TcContext, length: usize) -> Option<()> {
    // SAFETY: the context is valid.
    let done = unsafe { bpf_skb_change_tail(ctx.as_ptr().cast(), length as u32, 0) };
    (done == 0).then_some(())
}

#[inline(always)]
fn header_length(packet: &Packet) -> usize {
    if packet.v4 { 20 } else { 40 }
}

#[inline(always)]
fn reset(ctx: &TcContext, packet: &Packet) -> Option<()> {
    let got: Tcp = ctx.load(packet.transport).ok()?;
    let header = usize::from(got.length >> 4) * 4;
    let payload = packet.end.saturating_sub(packet.transport + header) as u32;
    let taken = payload + u32::from(got.flags & SYN != 0) + u32::from(got.flags & FIN != 0);
    let (seq, ack, flags) = if got.flags & ACK != 0 {
        (got.ack, 0, RST)
    } else {
        (0, u32::from_be(got.seq).wrapping_add(taken).to_be(), RST | ACK)
    };
    if got.flags & RST != 0 {
        return None;
    }
    let mut tcp =
        Tcp { sport: got.dport, dport: got.sport, seq, ack, length: 5 << 4, flags, window: 0, checksum: 0, urgent: 0 };
    tcp.checksum = fold(add(pseudo(&packet.dst, &packet.src, packet.v4, TCP, 20), &tcp));
    resize(ctx, ETHERNET + header_length(packet) + 20)?;
    let behind = network(ctx, packet, TCP, 20)?;
    ctx.store(behind, &tcp, 0).ok()
}

/// Common header and an ABORT chunk.
#[inline(always)]
fn abort(ctx: &TcContext, packet: &Packet) -> Option<()> {
    const INIT: u8 = 1;
    const ABORT: u8 = 6;
    let ports: [u16; 2] = ctx.load(packet.transport).ok()?;
    let tag: [u8; 4] = ctx.load(packet.transport + 4).ok()?;
    let chunk: u8 = ctx.load(packet.transport + 12).ok()?;
    // An INIT says by which tag its sender knows the association; other chunks
    // are answered with their own, and the T bit says so.
    let (tag, reflected) = match chunk {
        INIT => (ctx.load::<[u8; 4]>(packet.transport + 16).ok()?, 0),
        ABORT => return None,
        _ => (tag, 1),
    };
    let (s, d) = (ports[1].to_ne_bytes(), ports[0].to_ne_bytes());
    let mut bytes = [s[0], s[1], d[0], d[1], tag[0], tag[1], tag[2], tag[3], 0, 0, 0, 0, ABORT, reflected, 0, 4];
    // Who has left its own to a device has this left to one as well.
    if ctx.load::<u32>(packet.transport + sctp::CHECKSUM).ok()? != 0 {
        let sum = sctp::checksum(&bytes).to_ne_bytes();
        bytes[8] = sum[0];
        bytes[9] = sum[1];
        bytes[10] = sum[2];
        bytes[11] = sum[3];
    }
    resize(ctx, ETHERNET + header_length(packet) + 16)?;
    let behind = network(ctx, packet, SCTP, 16)?;
    ctx.store(behind, &bytes, 0).ok()
}

/// Quotes the network header and the eight bytes behind it.
#[inline(always)]
fn unreachable4(ctx: &TcContext, packet: &Packet) -> Option<()> {
    const QUOTE: usize = 28;
    let quote: &[u32; QUOTE / 4] = at(ctx, ETHERNET)?;
    // Destination unreachable, port.
    let mut icmp = [u32::from_ne_bytes([3, 3, 0, 0]), 0];
    icmp[0] |= u32::from(fold(add(add(0, &icmp), quote))) << 16;
    resize(ctx, ETHERNET + QUOTE)?;
    ctx.adjust_room(28, BPF_ADJ_ROOM_MAC, 0).ok()?;
    let behind = network(ctx, packet, ICMP, 8 + QUOTE as u16)?;
    ctx.store(behind, &icmp, 0).ok()
}

#[inline(always)]
fn unreachable6(ctx: &TcContext, packet: &Packet) -> Option<()> {
    const QUOTE: usize = 48;
    let quote: &[u32; QUOTE / 4] = at(ctx, ETHERNET)?;
    let mut icmp = [u32::from_ne_bytes([1, 4, 0, 0]), 0];
    let sum = pseudo(&packet.dst, &packet.src, false, ICMP6, 8 + QUOTE as u16);
    icmp[0] |= u32::from(fold(add(add(sum, &icmp), quote))) << 16;
    resize(ctx, ETHERNET + QUOTE)?;
    ctx.adjust_room(48, BPF_ADJ_ROOM_MAC, 0).ok()?;
    let behind = network(ctx, packet, ICMP6, 8 + QUOTE as u16)?;
    ctx.store(behind, &icmp, 0).ok()
}
