//! What a packet says of itself: addresses, protocol, ports.
//!
//! Reads the headers in place. Everything is checked against the packet's end:
//! a packet that ends too early, or is neither IPv4 nor IPv6, is `None`, and its
//! door lets the stack judge it.

use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::Addr;

use crate::rewrite::ICMP6;

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

pub const ETHERNET: usize = 14;
const ETH_P_IP: u16 = 0x0800_u16.to_be();
const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();

/// Network headers without options.
const HEADER4: u32 = 14 + 20;
const HEADER6: u32 = 14 + 40;
/// Where they say what is behind them.
const PROTOCOL4: usize = 14 + 9;
const PROTOCOL6: usize = 14 + 6;

const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

pub struct Packet {
    pub src: Addr,
    pub dst: Addr,
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub hops: u8,
    pub v4: bool,
    /// The ports are in the first fragment only.
    pub later_fragment: bool,
    /// More fragments follow the first.
    pub first_fragment: bool,
    /// What fragments of one packet have in common; 0 when it is whole.
    pub fragment_id: u32,
    /// Where the transport header begins.
    pub transport: usize,
    /// Where the packet ends, less what the link has padded it with.
    pub end: usize,
}

/// Both ports, in network byte order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    pub source: u16,
    pub destination: u16,
}

impl Ports {
    pub const NONE: Self = Self { source: 0, destination: 0 };
}

#[repr(C)]
struct Ipv4 {
    version_length: u8,
    _tos: u8,
    length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    _checksum: u16,
    src: u32,
    dst: u32,
}

#[repr(C)]
struct Ipv6 {
    _version: u32,
    length: u16,
    next: u8,
    hops: u8,
    src: [u32; 4],
    dst: [u32; 4],
}

/// The part of a header of type `T` at `offset`, if the packet is that long.
#[inline(always)]
pub fn at<T>(ctx: &TcContext, offset: usize) -> Option<&T> {
    // Read anew each time: kept across a call the compiler takes it for the 32 bits
    // that it is declared as, and the verifier loses sight of it.
    // SAFETY: the context is the kernel's and valid while the program runs.
    let (start, end) = unsafe {
        let skb = ctx.skb.skb;
        (core::ptr::read_volatile(&raw const (*skb).data), core::ptr::read_volatile(&raw const (*skb).data_end))
    };
    let start = start as usize + offset;
    if start + size_of::<T>() > end as usize {
        return None;
    }
    // SAFETY: the bytes are the packet's (just checked); `T` is one of this
    // module's header types, of which any bytes are a value; BPF has no
    // alignment rules that the verifier would not enforce.
    Some(unsafe { &*(start as *const T) })
}

/// What is looked at of a transport header: no more than there is of it. (What is
/// none of these may be an extension with another behind it.)
#[inline(always)]
const fn header_of(protocol: u8) -> u32 {
    match protocol {
        UDP | ICMP | ICMP6 => 8,
        SCTP => 12,
        _ => 20,
    }
}

/// Whether that much can be read in place, or all there is.
#[inline(always)]
fn is_linear(ctx: &TcContext, length: u32) -> bool {
    ctx.data() + ctx.len().min(length) as usize <= ctx.data_end()
}

/// Headers may lie outside the linear part: makes it longer, which costs a copy.
///
/// Never by what is behind the headers: of packets that travel as one (SCTP's by
/// their sender, UDP's by a device that collects them) that is the next packet's
/// beginning, which its receiver would miss there.
#[inline(always)]
fn pull(ctx: &TcContext, header: u32, says: usize) -> Option<()> {
    let protocol: u8 = ctx.load(says).ok()?;
    let wanted = header + header_of(protocol);
    if is_linear(ctx, wanted) { Some(()) } else { ctx.pull_data(ctx.len().min(wanted)).ok() }
}

/// By the protocol that the kernel has found.
#[inline(always)]
pub fn is_ip(protocol: u16) -> bool {
    protocol == ETH_P_IP || protocol == ETH_P_IPV6
}

impl Packet {
    #[inline(always)]
    pub fn parse(ctx: &TcContext) -> Option<Self> {
        // SAFETY: the context is the kernel's and valid while the program runs.
        let protocol = unsafe { (*ctx.skb.skb).protocol } as u16;
        if !is_ip(protocol) {
            return None;
        }
        let v4 = protocol == ETH_P_IP;
        let (header, says) = if v4 { (HEADER4, PROTOCOL4) } else { (HEADER6, PROTOCOL6) };
        if !is_linear(ctx, header + header_of(TCP)) {
            pull(ctx, header, says)?;
        }
        if v4 { Self::v4(ctx) } else { Self::v6(ctx) }
    }

    #[inline(always)]
    fn v4(ctx: &TcContext) -> Option<Self> {
        let ip: &Ipv4 = at(ctx, ETHERNET)?;
        let length = usize::from(ip.version_length & 0x0f) * 4;
        if ip.version_length >> 4 != 4 || length < 20 {
            return None;
        }
        Some(Self {
            src: Addr::v4(ip.src),
            dst: Addr::v4(ip.dst),
            protocol: ip.protocol,
            hops: ip.ttl,
            v4: true,
            later_fragment: ip.fragment & 0x1fff_u16.to_be() != 0,
            first_fragment: ip.fragment & 0x3fff_u16.to_be() == 0x2000_u16.to_be(),
            fragment_id: if ip.fragment & 0x3fff_u16.to_be() != 0 { u32::from(ip.id) } else { 0 },
            transport: ETHERNET + length,
            end: ETHERNET + usize::from(u16::from_be(ip.length)),
        })
    }

    #[inline(always)]
    fn v6(ctx: &TcContext) -> Option<Self> {
        let ip: &Ipv6 = at(ctx, ETHERNET)?;
        let mut packet = Self {
            src: Addr::v6(ip.src),
            dst: Addr::v6(ip.dst),
            protocol: ip.next,
            hops: ip.hops,
            v4: false,
            later_fragment: false,
            first_fragment: false,
            fragment_id: 0,
            transport: ETHERNET + 40,
            end: ETHERNET + 40 + usize::from(u16::from_be(ip.length)),
        };
        // RFC 8200, section 4.1: more extensions than these is no usual packet.
        for _ in 0..4 {
            match packet.protocol {
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    let extension: &[u8; 2] = at(ctx, packet.transport)?;
                    packet.protocol = extension[0];
                    packet.transport += (usize::from(extension[1]) + 1) * 8;
                }
                FRAGMENT => {
                    let extension: &[u8; 8] = at(ctx, packet.transport)?;
                    let offset = u16::from_be_bytes([extension[2], extension[3]]);
                    packet.protocol = extension[0];
                    packet.later_fragment = offset >> 3 != 0;
                    packet.first_fragment = offset == 1;
                    packet.fragment_id = u32::from_ne_bytes([extension[4], extension[5], extension[6], extension[7]]);
                    packet.transport += 8;
                    if packet.later_fragment {
                        return Some(packet);
                    }
                }
                _ => return Some(packet),
            }
        }
        None
    }

    /// [`Ports::NONE`] when it has none, or they are not here. (No `Option`: the
    /// compiler would spill its undefined half, which the verifier refuses.)
    #[inline(always)]
    pub fn ports(&self, ctx: &TcContext) -> Ports {
        if self.later_fragment || !matches!(self.protocol, TCP | UDP | SCTP) {
            return Ports::NONE;
        }
        match at::<Ports>(ctx, self.transport) {
            Some(ports) => *ports,
            None => Ports::NONE,
        }
    }

    /// Of TCP; none when they are not here.
    #[inline(always)]
    pub fn tcp_flags(&self, ctx: &TcContext) -> u8 {
        if self.protocol != TCP || self.later_fragment {
            return 0;
        }
        match at::<[u8; 14]>(ctx, self.transport) {
            Some(header) => header[13],
            None => 0,
        }
    }

    /// Whether this is the first packet of a TCP connection.
    #[inline(always)]
    pub fn begins_tcp(&self, ctx: &TcContext) -> bool {
        self.tcp_flags(ctx) & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Or to nobody.
    #[inline(always)]
    pub fn to_loopback(&self) -> bool {
        let words = self.dst.words;
        match self.v4 {
            true => matches!(u32::from_be(words[3]) >> 24, 0 | 127),
            false => words[..3] == [0; 3] && u32::from_be(words[3]) <= 1,
        }
    }

    /// Whether this opens a TCP connection, from either side. A header that is
    /// not whole counts as one: the stack judges it.
    #[inline(always)]
    pub fn opens_tcp(&self, ctx: &TcContext) -> bool {
        if self.protocol != TCP || self.later_fragment {
            return false;
        }
        match at::<[u8; 14]>(ctx, self.transport) {
            Some(header) => header[13] & TCP_SYN != 0,
            None => true,
        }
    }
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
