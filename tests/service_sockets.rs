//! Promise: a connection to a Service reaches one of its backends, decided once,
//! when a process connects; only in this node's namespaces; also while no agent
//! runs; refused at once when there is nobody.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use datapath_support::{Netns, Node, Services, TCP, TestPod, UDP};
use fairway_ebpf_abi::{FRONTEND_AFFINITY, SCOPE_INSIDE};

const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
const VIP6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1)), 80);
const PATIENCE: Duration = Duration::from_secs(2);

fn listener(ip: &str) -> TcpListener {
    TcpListener::bind((ip.parse::<IpAddr>().unwrap(), 0)).unwrap()
}

/// Connects and says who was reached, by the listener's view of its own address.
fn reach(to: SocketAddr, listeners: &[&TcpListener]) -> SocketAddr {
    let client = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
    assert_eq!(client.peer_addr().unwrap(), to, "the process sees whom it asked for");
    for listener in listeners {
        listener.set_nonblocking(true).unwrap();
        match listener.accept() {
            Ok((server, _)) => {
                assert_eq!(server.peer_addr().unwrap(), client.local_addr().unwrap());
                return server.local_addr().unwrap();
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => panic!("{e}"),
        }
    }
    panic!("nobody was reached");
}

#[test]
fn a_process_of_the_node_reaches_a_backend_and_sees_the_service() {
    let Some(node) = Node::new("a_process_of_the_node_reaches_a_backend_and_sees_the_service") else { return };
    let datapath = node.with_sockets();
    let backend = listener("127.0.0.2");
    Services::of(&datapath).put(1, VIP, TCP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
    assert_eq!(reach(VIP, &[&backend]), backend.local_addr().unwrap());
    // An IPv6 socket that talks IPv4 is no different.
    let mapped = SocketAddr::new(Ipv4Addr::new(10, 96, 0, 1).to_ipv6_mapped().into(), 80);
    let client = TcpStream::connect_timeout(&mapped, PATIENCE).unwrap();
    assert_eq!(client.peer_addr().unwrap(), mapped);
}

#[test]
fn both_families_have_services() {
    let Some(node) = Node::new("both_families_have_services") else { return };
    let datapath = node.with_sockets();
    let backend = listener("::1");
    Services::of(&datapath).put(1, VIP6, TCP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
    assert_eq!(reach(VIP6, &[&backend]), backend.local_addr().unwrap());
}

#[test]
fn another_namespace_of_the_machine_is_left_alone() {
    let Some(node) = Node::new("another_namespace_of_the_machine_is_left_alone") else { return };
    let datapath = node.with_sockets();
    let backend = listener("127.0.0.2");
    Services::of(&datapath).put(1, VIP, TCP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
    let other = Netns::new();
    let error = other.run(|| TcpStream::connect_timeout(&VIP, PATIENCE).unwrap_err());
    assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH), "no route there, and nobody made one: {error}");
}

#[test]
fn a_pod_reaches_a_backend_once_it_is_known_and_not_when_it_opts_out() {
    let test = "a_pod_reaches_a_backend_once_it_is_known_and_not_when_it_opts_out";
    let Some(node) = Node::new(test) else { return };
    let mut datapath = node.with_sockets();
    let (pod, server) = (TestPod::new(2), TestPod::new(3));
    let backend = server.netns.run(|| TcpListener::bind((server.v4, 8080)).unwrap());
    Services::of(&datapath).put(1, VIP, TCP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
    let connect = || pod.netns.run(|| TcpStream::connect_timeout(&VIP, Duration::from_millis(300)));
    assert!(connect().is_err(), "a namespace nobody has told of");
    pod.attach(&mut datapath, |_| {});
    let client = connect().unwrap();
    assert_eq!(client.peer_addr().unwrap(), VIP);
    pod.attach(&mut datapath, |way| way.per_packet = true);
    let raw = pod.netns.run(|| {
        // Where the kernel would really send it.
        let socket = TcpStream::connect_timeout(&VIP, Duration::from_millis(300));
        socket.map(|s| s.peer_addr().unwrap())
    });
    if let Ok(peer) = raw {
        assert_eq!(peer, VIP, "resolved packet by packet");
    }
    datapath.detach(&datapath_support::attachment(pod.sandbox())).unwrap();
    assert!(connect().is_err(), "gone with the attachment");
}

#[test]
fn a_node_port_is_on_every_address_of_the_node_and_on_no_pods_loopback() {
    let test = "a_node_port_is_on_every_address_of_the_node_and_on_no_pods_loopback";
    let Some(node) = Node::new(test) else { return };
    let mut datapath = node.with_sockets();
    let (pod, server) = (TestPod::new(2), TestPod::new(3));
    pod.attach(&mut datapath, |_| {});
    server.attach(&mut datapath, |_| {});
    for own in ["10.8.0.1/32", "10.8.0.9/32"] {
        datapath_support::ip(&format!("addr add {own} dev lo"));
    }
    let node_port = |addr: &str| SocketAddr::new(addr.parse().unwrap(), 30_080);
    let own = ["10.8.0.1", "10.8.0.9", "127.0.0.1"].map(node_port);
    datapath.set_node_addresses(&own.map(|a| a.ip())).unwrap();
    let backend = server.netns.run(|| TcpListener::bind((server.v4, 8080)).unwrap());
    let mut services = Services::of(&datapath);
    services.put(1, node_port("0.0.0.0"), TCP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
    backend.set_nonblocking(true).unwrap();
    let reached = |at: SocketAddr| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match backend.accept() {
                Ok((_, from)) => return from.ip(),
                Err(e) => {
                    assert!(e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline, "{at}: nobody came: {e}")
                }
            }
            std::thread::yield_now();
        }
    };
    for at in own {
        let client = TcpStream::connect_timeout(&at, PATIENCE).unwrap();
        assert_eq!(client.peer_addr().unwrap(), at);
        reached(at);
    }
    for at in &own[..2] {
        for per_packet in [false, true] {
            pod.attach(&mut datapath, |way| way.per_packet = per_packet);
            pod.netns.run(|| TcpStream::connect_timeout(at, PATIENCE).unwrap());
            assert_eq!(reached(*at), IpAddr::from(pod.v4), "{at} {per_packet}");
        }
    }
    pod.attach(&mut datapath, |_| {});
    for at in [own[2], node_port("0.0.0.0")] {
        let error = pod.netns.run(|| TcpStream::connect_timeout(&at, PATIENCE).unwrap_err());
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "nobody listens in the pod: {error}");
        let listening = pod.netns.run(|| TcpListener::bind(("127.0.0.1", 30_080)).unwrap());
        pod.netns.run(|| TcpStream::connect_timeout(&at, PATIENCE).unwrap());
        listening.accept().unwrap();
    }
    let unknown = TcpStream::connect_timeout(&node_port("127.0.0.2"), PATIENCE).unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::ConnectionRefused, "not one of the node's: {unknown}");
}

#[test]
fn nobody_there_is_refused_at_once() {
    let Some(node) = Node::new("nobody_there_is_refused_at_once") else { return };
    let datapath = node.with_sockets();
    let mut services = Services::of(&datapath);
    for at in [VIP, VIP6] {
        services.put(1, at, TCP, SCOPE_INSIDE, 0, &[]);
        let began = Instant::now();
        let error = TcpStream::connect_timeout(&at, PATIENCE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        assert!(began.elapsed() < Duration::from_millis(500));
    }
    services.put(2, VIP, UDP, SCOPE_INSIDE, 0, &[]);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(VIP).unwrap();
    // Told at the send or at the next receive, whichever comes first.
    let told = socket.send(b"?").and_then(|_| socket.recv(&mut [0; 8]));
    assert_eq!(told.unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn the_nodes_datagrams_go_to_a_backend_and_answers_come_from_the_service() {
    let Some(node) = Node::new("the_nodes_datagrams_go_to_a_backend_and_answers_come_from_the_service") else { return };
    let datapath = node.with_sockets();
    let mut services = Services::of(&datapath);
    for (set, at, any) in [(1, VIP, "0.0.0.0:0"), (2, VIP6, "[::]:0")] {
        let backend = UdpSocket::bind(if at.is_ipv4() { "127.0.0.2:0" } else { "[::1]:0" }).unwrap();
        services.put(set, at, UDP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
        backend.set_read_timeout(Some(PATIENCE)).unwrap();
        for connected in [true, false] {
            let client = UdpSocket::bind(any).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            if connected {
                client.connect(at).unwrap();
                client.send(b"ask").unwrap();
                assert_eq!(client.peer_addr().unwrap(), at);
            } else {
                client.send_to(b"ask", at).unwrap();
            }
            let mut buffer = [0; 8];
            let (_, from) = backend.recv_from(&mut buffer).unwrap();
            backend.send_to(b"answer", from).unwrap();
            let (n, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..n], from), (&b"answer"[..], at), "connected: {connected}");
        }
    }
}

#[test]
fn connections_go_on_being_resolved_without_an_agent_and_by_the_next_one() {
    let Some(node) = Node::new("connections_go_on_being_resolved_without_an_agent_and_by_the_next_one") else { return };
    let datapath = node.with_sockets();
    let backend = listener("127.0.0.2");
    Services::of(&datapath).put(1, VIP, TCP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
    assert_eq!(datapath.socket_doors().len(), 8);
    drop(datapath);
    reach(VIP, &[&backend]);
    let mut datapath = node.with_sockets();
    reach(VIP, &[&backend]);
    assert_eq!(datapath.socket_doors().len(), 8);
    datapath.detach_sockets().unwrap();
    assert_eq!(datapath.socket_doors().len(), 0);
    assert!(TcpStream::connect_timeout(&VIP, Duration::from_millis(300)).is_err());
}

#[test]
fn backends_are_chosen_evenly() {
    let Some(node) = Node::new("backends_are_chosen_evenly") else { return };
    let datapath = node.with_sockets();
    for (count, tries) in [(3usize, 1500usize), (10, 2000), (100, 5000)] {
        let backends: Vec<UdpSocket> = (0..count).map(|_| UdpSocket::bind("127.0.0.2:0").unwrap()).collect();
        let addresses: Vec<_> = backends.iter().map(|b| b.local_addr().unwrap()).collect();
        Services::of(&datapath).put(count as u32, VIP, UDP, SCOPE_INSIDE, 0, &addresses);
        let mut counts = vec![0f64; count];
        for _ in 0..tries {
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            client.connect(VIP).unwrap();
            client.send(b"x").unwrap();
            let hit = backends.iter().position(|b| {
                b.set_nonblocking(true).unwrap();
                b.recv(&mut [0; 4]).is_ok()
            });
            counts[hit.expect("somebody has it")] += 1.0;
        }
        let expected = tries as f64 / count as f64;
        let chi2: f64 = counts.iter().map(|n| (n - expected).powi(2) / expected).sum();
        // Wilson and Hilferty's approximation of the 0.99999 quantile.
        let df = (count - 1) as f64;
        let limit = df * (1.0 - 2.0 / (9.0 * df) + 4.265 * (2.0 / (9.0 * df)).sqrt()).powi(3);
        assert!(chi2 < limit, "{count} backends: chi-square {chi2:.1}, limit {limit:.1}: {counts:?}");
    }
}

#[test]
fn a_client_comes_back_to_its_backend_until_that_is_gone() {
    let Some(node) = Node::new("a_client_comes_back_to_its_backend_until_that_is_gone") else { return };
    let datapath = node.with_sockets();
    let (a, b, c) = (listener("127.0.0.2"), listener("127.0.0.3"), listener("127.0.0.4"));
    let all = [&a, &b, &c];
    let addresses: Vec<_> = all.iter().map(|l| l.local_addr().unwrap()).collect();
    let mut services = Services::of(&datapath);
    let backends = services.put(1, VIP, TCP, SCOPE_INSIDE, FRONTEND_AFFINITY, &addresses);
    let first = reach(VIP, &all);
    for _ in 0..30 {
        assert_eq!(reach(VIP, &all), first);
    }
    // Its id goes: at once somebody else, and the same one from then on.
    let gone = backends.iter().find(|b| b.port == first.port().to_be()).unwrap().id;
    let rest: Vec<_> = addresses.iter().copied().filter(|a| *a != first).collect();
    services.put(1, VIP, TCP, SCOPE_INSIDE, FRONTEND_AFFINITY, &rest);
    use fairway::service::maps::{Chunk, ServiceMaps as _};
    services.maps.apply(Chunk::DeleteBackends(&[gone])).unwrap();
    let second = reach(VIP, &all);
    assert_ne!(second, first);
    let mut seen = BTreeMap::new();
    for _ in 0..30 {
        *seen.entry(reach(VIP, &all)).or_insert(0) += 1;
    }
    assert_eq!(seen.len(), 1, "{seen:?}");
}
