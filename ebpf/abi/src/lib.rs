//! Map keys, values and constants shared by Fairway's kernel and user side.
//!
//! Every type here is plain old data with a fixed layout: no padding that the
//! verifier would see uninitialised, all fields naturally aligned. The layout
//! is asserted at compile time. Addresses are 16 bytes, IPv4 ones v4-mapped;
//! addresses and ports are in network byte order, everything else in the host's.
#![no_std]

mod event;
mod pod;
mod policy;
mod service;

pub use event::*;
pub use pod::*;
pub use policy::*;
pub use service::*;

/// Version of the map layouts; part of the pin directory's name. Raise it when
/// a key, a value or a map's meaning changes.
pub const LAYOUT_VERSION: u32 = 4;

/// An IPv6 address, or an IPv4 one in its v4-mapped form.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addr {
    /// As in the packet.
    pub words: [u32; 4],
}

/// `::ffff:0:0/96` as the third word.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// From the address as the packet has it.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    pub const fn from_octets4(octets: [u8; 4]) -> Self {
        Self::v4(u32::from_ne_bytes(octets))
    }

    pub const fn from_octets6(o: [u8; 16]) -> Self {
        Self::v6([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    pub const fn octets6(&self) -> [u8; 16] {
        let [a, b, c, d] = self.words;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }
}

#[cfg(feature = "user")]
impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(ip) => Self::from_octets4(ip.octets()),
            core::net::IpAddr::V6(ip) => Self::from_octets6(ip.octets()),
        }
    }
}

#[cfg(feature = "user")]
impl From<Addr> for core::net::IpAddr {
    fn from(addr: Addr) -> Self {
        let ip = core::net::Ipv6Addr::from(addr.octets6());
        match ip.to_ipv4_mapped() {
            Some(ip) => ip.into(),
            None => ip.into(),
        }
    }
}

const _: () = assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 4);

// SAFETY: `repr(C)`, no padding, any bytes are a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Addr {}
