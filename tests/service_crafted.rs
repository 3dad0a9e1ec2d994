//! Promise: whatever a packet looks like, a program translates it rightly, passes
//! it on as it was, or drops it: no checksum is ever wrong that was right, and none
//! becomes right that was wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use datapath_support::crafted::{
    ICMP, ICMP6, NEXT, REDIRECT, Runner, SCTP, SHOT, Shape, TCP, UDP, packet, plain, read, residue, sum, transport,
};
use datapath_support::edge::{At, CLIENT4, CLIENT6, Edge, NODE_PORT, NODE4, NODE6, any_node, index};
use fairway_ebpf_abi::{FRONTEND_LOCAL, OUTSIDE_PORTS, SCOPE_INSIDE, SCOPE_OUTSIDE};

const VIP4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1));
const PORT: u16 = 80;
const SYN: u8 = 2;
const INIT: u8 = 1;

/// A pod that asks Services, and clients that ask the node.
struct World {
    edge: Edge,
    leaves_pod: Runner,
    enters_pod: Runner,
    enters_node: Runner,
}

/// Where packets of a family go, by whom and to what.
#[derive(Clone, Copy, Debug)]
struct Way {
    ends: [IpAddr; 2],
    ports: [u16; 2],
    backend: SocketAddr,
    outside: bool,
}

impl World {
    fn new(test: &str) -> Option<Self> {
        let mut edge = Edge::new(test)?;
        // What it does not drop or refuse goes on to the stack.
        edge.pod.attach(&mut edge.datapath, |way| way.short = false);
        for (n, like) in [(1, VIP4), (2, VIP6)] {
            for protocol in [TCP, UDP, SCTP] {
                let set = n * 1000 + u32::from(protocol);
                let (_, to) = edge.backend(At::Elsewhere, like, 8080);
                let at = SocketAddr::new(like, PORT);
                edge.services.put(set, at, protocol, SCOPE_INSIDE, 0, &[to]);
                edge.services.put(set + 200, any_node(like), protocol, SCOPE_OUTSIDE, 0, &[to]);
                let nobody = SocketAddr::new(like, PORT + 1);
                edge.services.put(set + 400, nobody, protocol, SCOPE_INSIDE, 0, &[]);
                edge.services.put(set + 600, nobody, protocol, SCOPE_OUTSIDE, FRONTEND_LOCAL, &[]);
            }
        }
        let base = edge.node.bpffs.join(format!("fairway/v{}/pods", fairway_ebpf_abi::LAYOUT_VERSION));
        let dir = std::fs::read_dir(base).unwrap().next().unwrap().unwrap().path();
        let device = index(&edge.pod.host);
        let leaves_pod = Runner::pinned(&dir.join("egress"), device);
        let enters_pod = Runner::pinned(&dir.join("ingress"), device);
        let shown =
            std::process::Command::new("tc").args(["filter", "show", "dev", "up0", "ingress"]).output().unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        let id = shown.split_once(" id ").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
        let enters_node = Runner::loaded(id.unwrap(), &edge.node.bpffs, index("up0"));
        Some(Self { edge, leaves_pod, enters_pod, enters_node })
    }

    fn ways(&self) -> [Way; 4] {
        let pod = |like: IpAddr| if like.is_ipv4() { IpAddr::V4(self.edge.pod.v4) } else { self.edge.pod.v6.into() };
        let to = |like| self.edge.backend(At::Elsewhere, like, 8080).1;
        [VIP4, VIP6, NODE4.into(), NODE6.into()].map(|at| {
            let outside = at == NODE4 || at == NODE6;
            let client: IpAddr = match (outside, at.is_ipv4()) {
                (false, _) => pod(at),
                (true, true) => CLIENT4.into(),
                (true, false) => CLIENT6.into(),
            };
            let port = if outside { NODE_PORT } else { PORT };
            Way { ends: [client, at], ports: [4000, port], backend: to(at), outside }
        })
    }

    fn run(&self, way: &Way, packet: &[u8]) -> (u32, Vec<u8>) {
        if way.outside { self.enters_node.run(packet) } else { self.leaves_pod.run(packet) }
    }

    /// It is translated, and nothing else about it is changed.
    #[track_caller]
    fn translated(&self, way: &Way, before: &[u8]) -> Vec<u8> {
        let (verdict, after) = self.run(way, before);
        let is = read(&after).unwrap();
        let was = read(before).unwrap();
        assert_eq!(verdict, if way.outside { REDIRECT } else { NEXT }, "{way:?}");
        assert_eq!((is.ends[1], is.ports[1]), (way.backend.ip(), way.backend.port()), "{way:?}");
        match way.outside {
            false => assert_eq!((is.ends[0], is.ports[0], is.hops), (was.ends[0], was.ports[0], was.hops)),
            true => {
                assert_eq!((is.ends[0], is.hops), (way.ends[1], was.hops - 1));
                assert!(OUTSIDE_PORTS.contains(&is.ports[0]), "{is:?}");
            }
        }
        assert_eq!(residue(&after), residue(before), "{way:?}: {before:02x?} became {after:02x?}");
        assert_eq!(after.len(), before.len());
        after
    }

    fn build(&self, way: &Way, shape: &Shape, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let kind = if protocol == TCP { SYN } else { INIT };
        packet(shape, protocol, way.ends, &transport(protocol, way.ends, way.ports, kind, payload))
    }
}

fn shapes() -> Vec<Shape> {
    let options = |words: usize| Shape { options: [1, 1, 1, 0].repeat(words), ..plain() };
    let extensions = |list: &[u8]| Shape { extensions: list.to_vec(), ..plain() };
    let all = [options(1), options(2), options(10), extensions(&[0]), extensions(&[60]), extensions(&[0, 43, 60])];
    [plain()].into_iter().chain(all).collect()
}

/// With a network header.
fn shortest(way: &Way) -> usize {
    14 + if way.ends[0].is_ipv4() { 20 } else { 40 }
}

fn fits(shape: &Shape, way: &Way) -> bool {
    if way.ends[0].is_ipv4() { shape.extensions.is_empty() } else { shape.options.is_empty() }
}

#[test]
fn every_shape_of_packet_is_translated_with_right_checksums() {
    let Some(world) = World::new("every_shape_of_packet_is_translated_with_right_checksums") else { return };
    let mut count = 0;
    for way in world.ways() {
        for shape in shapes() {
            if !fits(&shape, &way) {
                continue;
            }
            for protocol in [TCP, UDP, SCTP] {
                for length in [0, 1, 2, 3, 31, 1000, 1337] {
                    // SCTP's chunks are padded to words.
                    let length = if protocol == SCTP { length / 4 * 4 } else { length };
                    let payload: Vec<u8> = (0..length).map(|n| (n * 7) as u8).collect();
                    let right = world.build(&way, &shape, protocol, &payload);
                    let after = world.translated(&way, &right);
                    let good = (0, 0);
                    assert_eq!(residue(&after), Some(good), "right before and after");
                    // What was wrong stays wrong by as much.
                    let mut wrong = right.clone();
                    let at = read(&right).unwrap().at + if protocol == SCTP { 14 } else { 4 };
                    wrong[at] ^= 0x15;
                    if protocol != TCP || at + 1 < wrong.len() {
                        let after = world.translated(&way, &wrong);
                        assert_ne!(residue(&after), Some(good));
                    }
                    count += 2;
                }
            }
        }
    }
    println!("{count} packets");
    assert!(count > 300);
}

#[test]
fn a_datagram_without_a_checksum_gets_none_and_one_that_sums_to_zero_keeps_one() {
    let test = "a_datagram_without_a_checksum_gets_none_and_one_that_sums_to_zero_keeps_one";
    let Some(world) = World::new(test) else { return };
    for way in world.ways() {
        let mut none = world.build(&way, &plain(), UDP, b"none");
        let at = read(&none).unwrap().at;
        none[at + 6..at + 8].fill(0);
        if way.ends[0].is_ipv4() {
            let (verdict, after) = world.run(&way, &none);
            assert_ne!(verdict, SHOT);
            assert_eq!(read(&after).unwrap().ends[1], way.backend.ip());
            assert_eq!(after[at + 6..at + 8], [0, 0], "{way:?}");
        }
        // The two bytes of payload for which it comes out as zero.
        let translated = world.translated(&way, &world.build(&way, &plain(), UDP, &[0, 0]));
        let check = u16::from_be_bytes([translated[at + 6], translated[at + 7]]);
        let zero = world.build(&way, &plain(), UDP, &check.to_be_bytes());
        let after = world.translated(&way, &zero);
        assert_eq!(after[at + 6..at + 8], [0xff, 0xff], "{way:?}: 0 would mean none");
    }
}

#[test]
fn a_checksum_of_sctp_that_is_left_to_a_device_stays_so() {
    let Some(world) = World::new("a_checksum_of_sctp_that_is_left_to_a_device_stays_so") else { return };
    for way in world.ways() {
        let mut left = world.build(&way, &plain(), SCTP, &[1; 64]);
        let at = read(&left).unwrap().at;
        left[at + 8..at + 12].fill(0);
        let (_, after) = world.run(&way, &left);
        let is = read(&after).unwrap();
        assert_eq!((is.ends[1], is.ports[1]), (way.backend.ip(), way.backend.port()), "{way:?}");
        assert_eq!(after[at + 8..at + 12], [0; 4], "{way:?}");
    }
}

#[test]
fn an_association_through_a_service_hears_of_no_other_addresses() {
    let Some(world) = World::new("an_association_through_a_service_hears_of_no_other_addresses") else { return };
    let v4 = [&[0, 5, 0, 8][..], &[10, 9, 0, 2]].concat();
    let v6 = [&[0, 6, 0, 20][..], &[0xfd; 16]].concat();
    // The types of address that are understood, padded to a word; no address.
    let others = [0, 12, 0, 6, 0, 5, 0, 0];
    let padding = |address: &[u8]| [&[0x80, 5], &address[2..]].concat();
    let before = [&v4[..], &others, &v6, &v4].concat();
    let expected = [&padding(&v4)[..], &others, &padding(&v6), &padding(&v4)].concat();
    for way in world.ways() {
        let sent = world.build(&way, &plain(), SCTP, &before);
        let after = world.translated(&way, &sent);
        let at = read(&after).unwrap().at + 12 + 20;
        assert_eq!(after[at..], expected, "{way:?}");
        // DATA may say what it likes.
        let data = transport(SCTP, way.ends, way.ports, 0, &before);
        let after = world.translated(&way, &packet(&plain(), SCTP, way.ends, &data));
        assert_eq!(after[at..], before, "{way:?}");
    }
}

#[test]
fn fragments_follow_their_first_and_strangers_pass() {
    let Some(world) = World::new("fragments_follow_their_first_and_strangers_pass") else { return };
    for way in world.ways() {
        let whole = transport(UDP, way.ends, way.ports, 0, &[5; 64]);
        let part = |offset: u16, more, range: std::ops::Range<usize>| {
            let shape = Shape { fragment: Some((offset, more)), ..plain() };
            packet(&shape, UDP, way.ends, &whole[range])
        };
        let later = part(4, false, 32..72);
        let (verdict, after) = world.run(&way, &later);
        assert_eq!((verdict, &after), (NEXT, &later), "its first has not been seen: {way:?}");
        let (_, first) = world.run(&way, &part(0, true, 0..32));
        let ends = read(&first).unwrap().ends;
        assert_eq!(ends[1], way.backend.ip());
        let (verdict, after) = world.run(&way, &later);
        assert_eq!(verdict, if way.outside { REDIRECT } else { NEXT });
        assert_eq!(read(&after).unwrap().ends, ends, "{way:?}");
        // Put together again, its checksum is right.
        let at = read(&first).unwrap().at;
        let body = [&first[at..], &after[read(&after).unwrap().at..]].concat();
        assert_eq!(residue(&packet(&plain(), UDP, ends, &body)), Some((0, 0)), "{way:?}");
    }
}

#[test]
fn a_packet_cut_anywhere_is_translated_passed_on_or_dropped() {
    let Some(world) = World::new("a_packet_cut_anywhere_is_translated_passed_on_or_dropped") else { return };
    let mut seen = std::collections::BTreeMap::new();
    for way in world.ways() {
        for shape in shapes().into_iter().filter(|shape| fits(shape, &way)) {
            for protocol in [TCP, UDP, SCTP, ICMP, ICMP6] {
                let whole = match protocol {
                    ICMP | ICMP6 => error(&way, protocol, &[1; 32]),
                    _ => world.build(&way, &shape, protocol, &[9; 24]),
                };
                for length in shortest(&way)..=whole.len() {
                    let cut = &whole[..length];
                    let (verdict, after) = world.run(&way, cut);
                    *seen.entry((verdict, after == cut)).or_insert(0) += 1;
                    assert!(matches!(verdict, NEXT | SHOT | REDIRECT), "{verdict}: {cut:02x?}");
                    if verdict == SHOT || after == cut {
                        continue;
                    }
                    assert_eq!(after.len(), length);
                    // A CRC is moved as far as the packet says that it is long.
                    if protocol != SCTP || length == whole.len() {
                        assert_eq!(residue(&after), residue(cut), "{way:?} {shape:?} {protocol} cut at {length}");
                    }
                }
            }
        }
    }
    println!("verdict, unchanged: {seen:?}");
    assert!(seen.keys().any(|k| k.0 == SHOT) && seen.keys().any(|k| k == &(NEXT, true)));
}

/// An ICMP error from a way's far end to its near one, about what was sent to the
/// backend: `quoted` bytes of it.
fn error(way: &Way, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let sent = [way.ends[0], way.backend.ip()];
    let quoted = transport(UDP, sent, [way.ports[0], way.backend.port()], 0, payload);
    let quoted = &packet(&plain(), UDP, sent, &quoted)[14..];
    let ends = [way.backend.ip(), way.ends[0]];
    let mut icmp = if protocol == ICMP { vec![3, 4, 0, 0, 0, 0, 5, 0] } else { vec![2, 0, 0, 0, 0, 0, 5, 0] };
    icmp.extend(quoted);
    let whole = packet(&plain(), protocol, ends, &icmp);
    let wrong = residue(&whole).unwrap().1;
    let check = (0xffff - wrong) as u16;
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    packet(&plain(), protocol, ends, &icmp)
}

#[test]
fn errors_about_a_flow_are_translated_however_little_they_quote() {
    let Some(world) = World::new("errors_about_a_flow_are_translated_however_little_they_quote") else { return };
    for way in world.ways().into_iter().filter(|way| !way.outside) {
        world.translated(&way, &world.build(&way, &plain(), UDP, b"flow"));
        let protocol = if way.ends[0].is_ipv4() { ICMP } else { ICMP6 };
        let whole = error(&way, protocol, &[3; 40]);
        assert_eq!(residue(&whole), Some((0, 0)));
        let headers = if way.ends[0].is_ipv4() { 20 } else { 40 };
        // Its own headers, the quoted one, and the eight bytes that all quote.
        let least = 14 + headers + 8 + headers + 8;
        for length in shortest(&way)..=whole.len() {
            let cut = &whole[..length];
            let (verdict, after) = world.enters_pod.run(cut);
            assert_eq!(verdict, NEXT, "the receiver judges: cut at {length}");
            if length >= least {
                let is = read(&after).unwrap();
                assert_eq!(is.ends, [way.ends[1], way.ends[0]], "as if the Service said it: cut at {length}");
                let inner = read(&[&after[..14], &after[14 + headers + 8..]].concat()).unwrap();
                assert_eq!((inner.ends, inner.ports), (way.ends, way.ports), "what the pod has sent");
            }
            if after != cut && length >= least {
                assert_eq!(residue(&after), residue(cut), "{way:?} cut at {length}");
            }
        }
    }
}

#[test]
fn what_is_refused_is_answered_rightly() {
    let Some(world) = World::new("what_is_refused_is_answered_rightly") else { return };
    for way in world.ways() {
        let asked = if way.outside { if way.ends[0].is_ipv4() { VIP4 } else { VIP6 } } else { way.ends[1] };
        let way = Way { ends: [way.ends[0], asked], ports: [4000, PORT + 1], ..way };
        for shape in [plain(), Shape { options: vec![1, 1, 1, 0], ..plain() }] {
            for protocol in [TCP, UDP, SCTP] {
                let shape = if way.ends[0].is_ipv4() { shape.clone() } else { plain() };
                let (verdict, answer) = world.run(&way, &world.build(&way, &shape, protocol, &[1; 64]));
                assert_eq!(verdict, REDIRECT, "{way:?} {protocol}");
                assert_eq!(residue(&answer), Some((0, 0)), "{way:?} {protocol}: {answer:02x?}");
                let is = read(&answer).unwrap();
                assert_eq!(is.ends, [way.ends[1], way.ends[0]]);
                match protocol {
                    TCP => assert_eq!((is.protocol, answer[is.at + 13] & 4), (TCP, 4), "a reset"),
                    SCTP => assert_eq!((is.protocol, answer[is.at + 12]), (SCTP, 6), "an abort"),
                    _ => {
                        let port = if way.ends[0].is_ipv4() { [3, 3] } else { [1, 4] };
                        assert_eq!(answer[is.at..is.at + 2], port, "unreachable, the port");
                    }
                }
                assert_ne!(sum(&answer[..6], 0), 0, "to somebody");
            }
        }
    }
}
