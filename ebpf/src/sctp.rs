//! SCTP's checksum, a CRC32c over the whole packet (RFC 9260, section 6.8), and the
//! addresses that the ends of an association tell each other.
//!
//! A CRC is linear, so a changed part changes it by the CRC of the difference,
//! moved as far as that is from the packet's end: multiplied by x to that
//! power, modulo the polynomial. That is a few hundred steps for any length,
//! without reading the packet.
//!
//! A packet from a socket next door mostly has none yet, but 0 in its place: the
//! device by which it leaves the machine computes it, or the kernel does before,
//! over that 0. So a 0 stays. (Of four thousand million packets from elsewhere one
//! has that for its checksum, and is lost.)

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;

use crate::packet::{Packet, SCTP};

/// CRC32c's polynomial, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Where the checksum is in the common header.
pub const CHECKSUM: usize = 8;

/// All ones when the lowest bit is set. Without a branch: each would double what
/// the verifier has to walk.
#[inline(always)]
const fn lowest(word: u32) -> u32 {
    (((word << 31) as i32) >> 31) as u32
}

/// Divides by x.
#[inline(always)]
const fn step(word: u32) -> u32 {
    (word >> 1) ^ (POLYNOMIAL & lowest(word))
}

/// The CRC's register after one more byte. A global function, as `crc_shift`: the
/// verifier walks it once, not once per call and per way to get there.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn crc_byte(crc: u32, byte: u32) -> u32 {
    let mut crc = crc ^ (byte & 0xff);
    for _ in 0..8 {
        crc = step(crc);
    }
    crc
}

/// The product of two polynomials modulo ours, bits reversed: `1 << 31` is 1.
#[inline(always)]
const fn multiply(a: u32, mut b: u32) -> u32 {
    let (mut product, mut bit) = (0, 0);
    while bit < 32 {
        product ^= b & lowest(a >> (31 - bit));
        b = step(b);
        bit += 1;
    }
    product
}

/// x to the power of 8·2ⁿ.
const POWERS: [u32; 16] = {
    let mut powers = [0u32; 16];
    // x⁸: one byte of zeros behind a 1.
    let (mut power, mut n) = (1u32 << 31, 0);
    while n < 8 {
        power = step(power);
        n += 1;
    }
    n = 0;
    while n < 16 {
        powers[n] = power;
        power = multiply(power, power);
        n += 1;
    }
    powers
};

/// `crc` moved `bytes` bytes away from the end.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn crc_shift(mut crc: u32, bytes: u32) -> u32 {
    let mut n = 0;
    while n < 16 {
        // Multiplied by 1 where the bit is not set.
        let set = lowest(bytes >> n);
        crc = multiply(crc, (POWERS[n] & set) | (1 << 31 & !set));
        n += 1;
    }
    crc
}

/// Two bytes at `offset` of the packet have changed (network byte order).
#[inline(always)]
pub fn changed(ctx: &TcContext, packet: &Packet, offset: usize, from: u16, to: u16) -> Option<()> {
    let at = packet.transport + CHECKSUM;
    let crc: u32 = ctx.load(at).ok()?;
    if crc == 0 {
        return Some(());
    }
    let after = packet.end.checked_sub(packet.transport + offset + 2)? as u32;
    let difference = u32::from(from ^ to);
    // The first byte on the wire goes into the register first.
    let change = crc_byte(crc_byte(0, difference), difference >> 8);
    let change = crc_shift(change, after);
    // The register's byte order on the wire is little-endian.
    ctx.store(at, &(crc ^ change.to_le()), 0).ok()
}

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
/// Where the first chunk is, and the parameters of those two.
const CHUNK: usize = 12;
const PARAMETERS: usize = CHUNK + 20;
const IPV4_ADDRESS: u16 = 5;
const IPV6_ADDRESS: u16 = 6;
/// Padding (RFC 4820), which all skip, whether they know it or not.
const PADDING: u16 = 0x8005;
/// How many parameters are looked at: addresses come first.
const MOST: u32 = 16;

/// Whoever opens an association through a Service, or accepts one, says by which
/// other addresses it can be reached. Its peer would try those, past the Service,
/// at ports that are nobody's there, be told so, and end the association: the
/// addresses become padding.
#[inline(always)]
pub fn one_address(ctx: &TcContext, packet: &Packet) {
    if packet.protocol == SCTP && !packet.later_fragment {
        sctp_one_address(ctx.skb.skb);
    }
}

/// A global function, which the verifier walks once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sctp_one_address(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = Packet::parse(ctx) else { return 0 };
    let Ok(chunk) = ctx.load::<u8>(packet.transport + CHUNK) else { return 0 };
    if chunk != INIT && chunk != INIT_ACK {
        return 0;
    }
    let mut at = packet.transport + PARAMETERS;
    for _ in 0..MOST {
        let Ok([kind, length]) = ctx.load::<[u16; 2]>(at) else { return 0 };
        let (kind, length) = (u16::from_be(kind), u16::from_be(length));
        if matches!(kind, IPV4_ADDRESS | IPV6_ADDRESS) {
            let offset = at - packet.transport;
            let to = PADDING.to_be();
            if changed(ctx, &packet, offset, kind.to_be(), to).is_none() || ctx.store(at, &to, 0).is_err() {
                return 0;
            }
        }
        // None is shorter than its own header; they begin at whole words.
        at += (usize::from(length.max(4)) + 3) & !3;
    }
    0
}

/// The checksum of these bytes.
#[inline(always)]
pub fn checksum<const N: usize>(bytes: &[u8; N]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc = crc_byte(crc, u32::from(*byte));
    }
    (!crc).to_le()
}
