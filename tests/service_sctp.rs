//! Promise: SCTP associations reach Services as connections of TCP do, from pods
//! and from outside, and are refused at once when nobody is there.
//!
//! With real sockets, where the kernel has them: in the emulated machine of
//! `kernel_matrix`. A large message of theirs goes through the programs as a chain
//! of packets without a checksum. What the programs write is in `service_crafted`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use datapath_support::edge::{At, Edge, NODE_PORT, NODE4, NODE6, PATIENCE, any_node};
use datapath_support::{Netns, ip, skipped, sysctl};
use fairway_ebpf_abi::{FRONTEND_LOCAL, SCOPE_INSIDE, SCOPE_OUTSIDE};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen, socket,
};

const SCTP: u8 = 132;
const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
const VIP6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1)), 80);

/// One-to-one style, which behaves as a stream does. `None` without SCTP.
fn open(like: SocketAddr) -> Option<OwnedFd> {
    let family = if like.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp).ok()
}

fn address(of: SocketAddr) -> SockaddrStorage {
    SockaddrStorage::from(of)
}

fn server(netns: &Netns, at: SocketAddr) -> TcpListener {
    netns.run(|| {
        let socket = open(at).unwrap();
        bind(socket.as_raw_fd(), &address(at)).unwrap();
        listen(&socket, Backlog::new(8).unwrap()).unwrap();
        TcpListener::from(socket)
    })
}

fn client(netns: &Netns, to: SocketAddr) -> std::io::Result<TcpStream> {
    netns.run(|| {
        let socket = open(to).unwrap();
        let timeout = nix::sys::time::TimeVal::new(PATIENCE.as_secs() as i64, 0);
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::SendTimeout, &timeout).unwrap();
        connect(socket.as_raw_fd(), &address(to))?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// A device between the router and its neighbour `of` for which the kernel computes
/// SCTP's checksums and takes chains of packets apart, as for most network cards.
/// Without it no receiver here would ever look at a checksum.
fn plain_card(edge: &Edge, of: &str, v4: &str, v6: &str) {
    edge.router.run(|| {
        ip(&format!("addr flush dev {of}"));
        ip(&format!("link add link {of} name {of}0 type macvlan mode bridge"));
        ip(&format!("addr add {v4}/24 dev {of}0"));
        ip(&format!("addr add {v6}/64 dev {of}0 nodad"));
        ip(&format!("link set {of}0 up"));
        // It is the only one to say that it has them.
        sysctl("ipv4/conf/all/arp_ignore", "1");
    });
}

fn edge(test: &str) -> Option<Edge> {
    if open(VIP).is_none() {
        skipped(test, "SCTP in the kernel");
        return None;
    }
    let edge = Edge::new(test)?;
    plain_card(&edge, "client", "10.7.0.254", "fd07::fe");
    plain_card(&edge, "elsewhere", "10.9.1.254", "fd09:1::fe");
    Some(edge)
}

/// By how many addresses the associations of a namespace reach their peers.
fn paths(netns: &Netns) -> usize {
    let all = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/sctp/remaddr").unwrap());
    all.lines().filter(|line| !line.trim().is_empty()).count() - 1
}

/// Messages each way; the last is of several packets, which travel as one where
/// the devices let them.
fn talk(netns: &Netns, to: SocketAddr, listener: &TcpListener) {
    let mut client = client(netns, to).unwrap_or_else(|e| panic!("{to}: {e}"));
    let (mut server, _) = listener.accept().unwrap();
    for payload in [&b"q"[..], &[7; 1000], &[9; 3000]] {
        client.write_all(payload).unwrap();
        let mut got = vec![0; payload.len()];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, payload);
        server.write_all(&got).unwrap();
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, payload);
    }
}

#[test]
fn a_pods_association_reaches_a_backend_or_is_refused() {
    let test = "a_pods_association_reaches_a_backend_or_is_refused";
    let Some(mut edge) = edge(test) else { return };
    for (set, at) in [(1, VIP), (2, VIP6)] {
        let (netns, to) = edge.backend(At::Elsewhere, at.ip(), 8080);
        let listener = server(netns, to);
        edge.pod.attach(&mut edge.datapath, |way| way.short = false);
        // The router knows the way to pods here.
        edge.router.run(|| match at.is_ipv4() {
            true => ip(&format!("route add {}/32 via {NODE4}", edge.pod.v4)),
            false => ip(&format!("-6 route add {}/128 via {NODE6}", edge.pod.v6)),
        });
        // To nobody's Service: past the programs, as it is.
        talk(&edge.pod.netns, to, &listener);
        edge.services.put(set, at, SCTP, SCOPE_INSIDE, 0, &[to]);
        talk(&edge.pod.netns, at, &listener);
        edge.services.put(set + 10, at, SCTP, SCOPE_INSIDE, 0, &[]);
        let began = Instant::now();
        let error = client(&edge.pod.netns, at).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        assert!(began.elapsed() < Duration::from_secs(1));
    }
}

/// Both have addresses of either family and say so to each other, who would try them
/// past the Service and find nobody.
#[test]
fn an_association_knows_the_service_alone() {
    let Some(mut edge) = edge("an_association_knows_the_service_alone") else { return };
    edge.pod.attach(&mut edge.datapath, |way| way.short = false);
    edge.router.run(|| {
        ip(&format!("route add {}/32 via {NODE4}", edge.pod.v4));
        ip(&format!("-6 route add {}/128 via {NODE6}", edge.pod.v6));
    });
    let asked = SocketAddr::new(NODE4.into(), NODE_PORT);
    let mapped = |at: SocketAddr| match at {
        SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        v6 => v6,
    };
    let (_, to) = edge.backend(At::Elsewhere, NODE4.into(), 8080);
    edge.services.put(1, VIP, SCTP, SCOPE_INSIDE, 0, &[to]);
    edge.services.put(2, any_node(NODE4.into()), SCTP, SCOPE_OUTSIDE, 0, &[to]);
    let listener = server(&edge.elsewhere, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), to.port()));
    for (netns, at) in [(&edge.pod.netns, VIP), (&edge.client, asked)] {
        let mut client = client(netns, mapped(at)).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"q").unwrap();
        server.read_exact(&mut [0]).unwrap();
        assert_eq!((paths(netns), paths(&edge.elsewhere)), (1, 1), "{at}");
        drop((client, server));
        let deadline = Instant::now() + PATIENCE;
        while paths(&edge.elsewhere) > 0 {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
    }
}

#[test]
fn an_association_from_outside_reaches_a_backend_or_is_refused() {
    let test = "an_association_from_outside_reaches_a_backend_or_is_refused";
    let Some(mut edge) = edge(test) else { return };
    for (at, flags) in [(At::Pod, 0), (At::Pod, FRONTEND_LOCAL), (At::Elsewhere, 0)] {
        for ip in [IpAddr::V4(NODE4), IpAddr::V6(NODE6)] {
            let asked = SocketAddr::new(ip, NODE_PORT);
            let (netns, to) = edge.backend(at, ip, 8080);
            let listener = server(netns, to);
            edge.services.put(1, any_node(ip), SCTP, SCOPE_OUTSIDE, flags, &[to]);
            talk(&edge.client, asked, &listener);
            edge.services.put(2, any_node(ip), SCTP, SCOPE_OUTSIDE, flags, &[]);
            let error = client(&edge.client, asked).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{at:?} {asked}: {error}");
        }
    }
}
