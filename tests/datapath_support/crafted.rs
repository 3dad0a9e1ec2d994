//! Packets made by hand, their checksums, and programs run on them.

use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;
pub const ICMP6: u8 = 58;
pub const ETHERNET: usize = 14;

/// Verdicts of `tc`.
pub const NEXT: u32 = u32::MAX;
pub const SHOT: u32 = 2;
pub const REDIRECT: u32 = 7;

pub fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// What lies between the network header and the transport's.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// Of IPv4: options, whole words.
    pub options: Vec<u8>,
    /// Of IPv6: extension headers by number, each of eight bytes.
    pub extensions: Vec<u8>,
    /// Offset in eights, and whether more follow.
    pub fragment: Option<(u16, bool)>,
    pub hops: u8,
}

pub fn plain() -> Shape {
    Shape { hops: 64, ..Shape::default() }
}

/// A packet with right checksums; those of fragments are of `behind` alone.
pub fn packet(shape: &Shape, protocol: u8, ends: [IpAddr; 2], behind: &[u8]) -> Vec<u8> {
    let mut out = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    match ends {
        [IpAddr::V4(src), IpAddr::V4(dst)] => {
            out.extend([8, 0]);
            let length = (20 + shape.options.len() + behind.len()) as u16;
            let (offset, more) = shape.fragment.unwrap_or((0, false));
            let mut ip = vec![0x40 | (5 + shape.options.len() / 4) as u8, 0];
            ip.extend(length.to_be_bytes());
            ip.extend([0x12, 0x34]);
            ip.extend((offset | u16::from(more) << 13).to_be_bytes());
            ip.extend([shape.hops, protocol, 0, 0]);
            ip.extend(src.octets());
            ip.extend(dst.octets());
            ip.extend(&shape.options);
            let check = !(sum(&ip, 0) as u16);
            ip[10..12].copy_from_slice(&check.to_be_bytes());
            out.extend(ip);
        }
        [IpAddr::V6(src), IpAddr::V6(dst)] => {
            out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            let mut headers: Vec<(u8, [u8; 8])> =
                shape.extensions.iter().map(|n| (*n, [0, 0, 1, 4, 0, 0, 0, 0])).collect();
            if let Some((offset, more)) = shape.fragment {
                let [a, b] = (offset << 3 | u16::from(more)).to_be_bytes();
                headers.push((44, [0, 0, a, b, 0x12, 0x34, 0x56, 0x78]));
            }
            let next: Vec<u8> = headers.iter().map(|h| h.0).chain([protocol]).collect();
            out.extend(((8 * headers.len() + behind.len()) as u16).to_be_bytes());
            out.extend([next[0], shape.hops]);
            out.extend(src.octets());
            out.extend(dst.octets());
            for (n, (_, mut header)) in headers.into_iter().enumerate() {
                header[0] = next[n + 1];
                out.extend(header);
            }
        }
        _ => panic!("of one family"),
    }
    out.extend(behind);
    out
}

fn pseudo(ends: [IpAddr; 2], protocol: u8, length: usize) -> u32 {
    let of = |start, ip: IpAddr| match ip {
        IpAddr::V4(ip) => sum(&ip.octets(), start),
        IpAddr::V6(ip) => sum(&ip.octets(), start),
    };
    sum(&(length as u32).to_be_bytes(), of(of(u32::from(protocol), ends[0]), ends[1]))
}

/// A transport header with a payload behind it, its checksum right.
pub fn transport(protocol: u8, ends: [IpAddr; 2], ports: [u16; 2], kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = ports.iter().flat_map(|p| p.to_be_bytes()).collect();
    let at = match protocol {
        TCP => {
            out.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, kind, 0xff, 0xff, 0, 0, 0, 0]);
            16
        }
        UDP => {
            out.extend(((8 + payload.len()) as u16).to_be_bytes());
            out.extend([0, 0]);
            6
        }
        _ => {
            // Tag, checksum, and a chunk: INIT is 1, DATA is 0.
            out.extend([0xaa, 0xbb, 0xcc, 0xdd, 0, 0, 0, 0, kind, 3, 0, 20]);
            out.extend([7; 16]);
            8
        }
    };
    out.extend(payload);
    if protocol == SCTP {
        let crc = crc32c(&out);
        out[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    } else {
        let check = !(sum(&out, pseudo(ends, protocol, out.len())) as u16);
        let check = if protocol == UDP && check == 0 { 0xffff } else { check };
        out[at..at + 2].copy_from_slice(&check.to_be_bytes());
    }
    out
}

/// What a packet says, as far as it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    pub ends: [IpAddr; 2],
    pub ports: [u16; 2],
    pub protocol: u8,
    pub hops: u8,
    /// Where the transport begins.
    pub at: usize,
}

pub fn read(p: &[u8]) -> Option<Read> {
    let v4 = p.get(12..14)? == [8, 0];
    let (ends, mut protocol, hops, mut at): ([IpAddr; 2], _, _, _) = if v4 {
        let ip = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(p.get(at..at + 4)?).ok()?));
        ([ip(26)?, ip(30)?], p[23], p[22], ETHERNET + usize::from(p[14] & 15) * 4)
    } else {
        let ip = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(p.get(at..at + 16)?).ok()?));
        ([ip(22)?, ip(38)?], p[20], p[21], ETHERNET + 40)
    };
    while !v4 && matches!(protocol, 0 | 43 | 44 | 60) {
        protocol = *p.get(at)?;
        at += 8;
    }
    let port = |at: usize| p.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    Some(Read { ends, ports: [port(at), port(at + 2)], protocol, hops, at })
}

/// What a right translation leaves as it was, whether the checksums were right or
/// not: the sum over all that each covers, itself included.
pub fn residue(p: &[u8]) -> Option<(u32, u32)> {
    let read = read(p)?;
    let header = if p[12..14] == [8, 0] { sum(p.get(ETHERNET..read.at)?, 0) } else { 0xffff };
    let body = p.get(read.at..)?;
    let transport = match read.protocol {
        TCP | UDP | ICMP6 => sum(body, pseudo(read.ends, read.protocol, body.len())),
        ICMP => sum(body, 0),
        SCTP if body.len() >= 12 => {
            let mut zeroed = body.to_vec();
            zeroed[8..12].fill(0);
            crc32c(&zeroed) ^ u32::from_le_bytes([body[8], body[9], body[10], body[11]])
        }
        _ => 0,
    };
    // Both zeros of one's complement.
    Some((header % 0xffff, if read.protocol == SCTP { transport } else { transport % 0xffff }))
}

/// A program that is attached, to be run on packets.
pub struct Runner {
    program: SchedClassifier,
    ifindex: u32,
}

impl Runner {
    pub fn pinned(pin: &Path, ifindex: u32) -> Self {
        Self { program: SchedClassifier::from_pin(pin).unwrap(), ifindex }
    }

    /// Of this name and id.
    pub fn loaded(id: u32, bpffs: &Path, ifindex: u32) -> Self {
        let mut all = aya::programs::loaded_programs().filter_map(Result::ok);
        let info = all.find(|p| p.id() == id).unwrap();
        let pin = bpffs.join(format!("run{id}"));
        fairway::sys::bpf::pin(info.fd().unwrap().as_fd(), &pin).unwrap();
        Self::pinned(&pin, ifindex)
    }

    /// The verdict, and what has become of the packet, which came by the device. (The
    /// kernel makes none without a whole network header.)
    pub fn run(&self, packet: &[u8]) -> (u32, Vec<u8>) {
        let mut out = vec![0; packet.len() + 256];
        // `struct __sk_buff`, of which only the device is ours to say.
        let mut context = [0; 192];
        context[40..44].copy_from_slice(&self.ifindex.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..Default::default()
        };
        let result = self.program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }
}
