//! Promise: what `connect()` did not resolve is translated packet by packet at
//! the pod's device: datagrams, raw TCP, answers, errors, fragments; a backend
//! that is gone is left at the next packet; nobody there is refused at once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use datapath_support::{Node, Services, TCP, TestPod, UDP, attachment};
use fairway::datapath::Datapath;
use fairway::service::maps::{Chunk, ServiceMaps as _};
use fairway_ebpf_abi::{EVENT_CHOSEN, EVENT_ERROR_TRANSLATED, EVENT_MOVED, EVENT_REFUSED, SCOPE_INSIDE};

const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 53);
const VIP6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1)), 53);
const PATIENCE: Duration = Duration::from_secs(2);

/// A client pod and two servers of one node.
struct World {
    datapath: Datapath,
    client: TestPod,
    servers: [TestPod; 2],
    services: Services,
    _node: Node,
}

impl World {
    /// Without the short way, everything crosses the node's stack.
    fn new(test: &str, short: bool) -> Option<Self> {
        let node = Node::new(test)?;
        let (mut datapath, _) = node.open();
        let [client, a, b] = [2, 3, 4].map(TestPod::new);
        for pod in [&client, &a, &b] {
            // Everything packet by packet.
            pod.attach(&mut datapath, |way| (way.per_packet, way.short) = (true, short));
        }
        let services = Services::of(&datapath);
        Some(Self { datapath, client, servers: [a, b], services, _node: node })
    }

    fn each(test: &str, body: impl Fn(&mut World)) {
        for short in [false, true] {
            println!("short: {short}");
            let Some(mut world) = World::new(test, short) else { return };
            body(&mut world);
        }
    }

    fn address(&self, server: usize, like: SocketAddr, port: u16) -> SocketAddr {
        match like.ip() {
            IpAddr::V4(_) => (self.servers[server].v4, port).into(),
            IpAddr::V6(_) => (self.servers[server].v6, port).into(),
        }
    }

    fn udp_server(&self, server: usize, like: SocketAddr) -> UdpSocket {
        let at = self.address(server, like, 5353);
        let socket = self.servers[server].netns.run(|| UdpSocket::bind(at).unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    fn udp_client(&self, like: SocketAddr) -> UdpSocket {
        let any = if like.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = self.client.netns.run(|| UdpSocket::bind(any).unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    fn event(&self, which: u32) -> u64 {
        self.datapath.service_events().unwrap()[which as usize]
    }

    fn short_packets(&self) -> u64 {
        let all = self.datapath.counters().unwrap();
        all.iter().map(|(_, c)| c.egress_short + c.ingress_short).sum()
    }
}

/// One question, answered with who was asked.
fn ask(client: &UdpSocket, at: SocketAddr, server: &UdpSocket, payload: &[u8]) -> SocketAddr {
    client.send_to(payload, at).unwrap();
    let mut buffer = vec![0; 70_000];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], payload);
    server.send_to(&buffer[..n], from).unwrap();
    let (n, answered) = client.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], payload);
    assert_eq!(answered, at, "the answer comes from the Service");
    from
}

#[test]
fn a_pods_datagrams_reach_a_backend_and_answers_come_from_the_service() {
    World::each("a_pods_datagrams_reach_a_backend_and_answers_come_from_the_service", |world| {
        for (set, at) in [(1, VIP), (2, VIP6)] {
            let server = world.udp_server(0, at);
            world.services.put(set, at, UDP, SCOPE_INSIDE, 0, &[server.local_addr().unwrap()]);
            let client = world.udp_client(at);
            for payload in [&b"q"[..], &[7; 1000]] {
                let seen = ask(&client, at, &server, payload);
                assert_eq!(
                    seen.ip(),
                    if at.is_ipv4() { world.client.v4.into() } else { IpAddr::from(world.client.v6) }
                );
            }
        }
        assert_eq!(world.event(EVENT_CHOSEN), 2, "one choice per flow");
    });
}

#[test]
fn a_fragmented_datagram_follows_its_first_fragment() {
    World::each("a_fragmented_datagram_follows_its_first_fragment", |world| {
        for (set, at) in [(1, VIP), (2, VIP6)] {
            let server = world.udp_server(0, at);
            world.services.put(set, at, UDP, SCOPE_INSIDE, 0, &[server.local_addr().unwrap()]);
            ask(&world.udp_client(at), at, &server, &[9; 9000]);
        }
    });
}

#[test]
fn a_dead_backend_is_left_at_the_next_datagram() {
    World::each("a_dead_backend_is_left_at_the_next_datagram", |world| {
        let servers = [world.udp_server(0, VIP), world.udp_server(1, VIP)];
        let addresses = servers.each_ref().map(|s| s.local_addr().unwrap());
        let client = world.udp_client(VIP);
        let first = world.services.put(1, VIP, UDP, SCOPE_INSIDE, 0, &addresses[..1]);
        ask(&client, VIP, &servers[0], b"before");
        world.services.put(1, VIP, UDP, SCOPE_INSIDE, 0, &addresses[1..]);
        // As long as its id is there the flow stays.
        ask(&client, VIP, &servers[0], b"draining");
        world.services.maps.apply(Chunk::DeleteBackends(&[first[0].id])).unwrap();
        ask(&client, VIP, &servers[1], b"after");
        assert_eq!(world.event(EVENT_MOVED), 1);
    });
}

#[test]
fn nobody_there_is_refused_at_once() {
    World::each("nobody_there_is_refused_at_once", |world| {
        for (set, at) in [(1, VIP), (2, VIP6)] {
            world.services.put(set, at, TCP, SCOPE_INSIDE, 0, &[]);
            world.services.put(set + 10, at, UDP, SCOPE_INSIDE, 0, &[]);
            let began = Instant::now();
            let error = world.client.netns.run(|| TcpStream::connect_timeout(&at, PATIENCE).unwrap_err());
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{at}: {error}");
            let client = world.udp_client(at);
            client.connect(at).unwrap();
            client.send(b"?").unwrap();
            let error = client.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{at}: {error}");
            assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        }
        assert_eq!(world.event(EVENT_REFUSED), 4);
    });
}

#[test]
fn tcp_that_did_not_come_through_connect_is_translated() {
    World::each("tcp_that_did_not_come_through_connect_is_translated", |world| {
        for (set, at) in [(1, VIP), (2, VIP6)] {
            let to = world.address(0, at, 8080);
            let listener = world.servers[0].netns.run(|| TcpListener::bind(to).unwrap());
            world.services.put(set, at, TCP, SCOPE_INSIDE, 0, &[to]);
            let mut client = world.client.netns.run(|| TcpStream::connect_timeout(&at, PATIENCE).unwrap());
            let (mut server, _) = listener.accept().unwrap();
            let payload: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
            let sent = payload.clone();
            let sender = std::thread::spawn(move || {
                client.write_all(&sent).unwrap();
                client
            });
            let mut got = vec![0; payload.len()];
            server.set_read_timeout(Some(PATIENCE)).unwrap();
            server.read_exact(&mut got).unwrap();
            assert!(got == payload, "every byte, segmented by offload or not");
            server.write_all(b"answer").unwrap();
            let mut client = sender.join().unwrap();
            let mut answer = [0; 6];
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"answer");
        }
    });
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    World::each("a_pod_reaches_itself_through_its_service", |world| {
        for (set, at) in [(1, VIP), (2, VIP6)] {
            let server = world.udp_server(0, at);
            world.services.put(set, at, UDP, SCOPE_INSIDE, 0, &[server.local_addr().unwrap()]);
            let any = if at.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let client = world.servers[0].netns.run(|| UdpSocket::bind(any).unwrap());
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let seen = ask(&client, at, &server, b"me");
            assert_ne!(seen.ip(), server.local_addr().unwrap().ip(), "its own address would not be accepted");
        }
    });
}

#[test]
fn an_icmp_error_about_a_translated_packet_reaches_its_sender() {
    World::each("an_icmp_error_about_a_translated_packet_reaches_its_sender", |world| {
        for (set, at) in [(1, VIP), (2, VIP6)] {
            // A backend that is there, on whose port nobody listens.
            let to = world.address(0, at, 4444);
            world.services.put(set, at, UDP, SCOPE_INSIDE, 0, &[to]);
            let client = world.udp_client(at);
            client.connect(at).unwrap();
            client.send(b"?").unwrap();
            let error = client.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{at}: {error}");
        }
        assert_eq!(world.event(EVENT_ERROR_TRANSLATED), 2);
        assert_eq!(world.event(EVENT_REFUSED), 0, "the backend's own host said so");
    });
}

#[test]
fn packets_of_an_open_connection_take_the_short_way_and_a_limited_pods_do_not() {
    let test = "packets_of_an_open_connection_take_the_short_way_and_a_limited_pods_do_not";
    let Some(mut world) = World::new(test, true) else { return };
    let to = world.address(0, VIP, 8080);
    let listener = world.servers[0].netns.run(|| TcpListener::bind(to).unwrap());
    let exchange = |world: &World| {
        let before = world.short_packets();
        let mut client = world.client.netns.run(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        server.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
        world.short_packets() - before
    };
    assert!(exchange(&world) >= 4, "data and acknowledgements, counted at both pods");
    for pod in [&world.client, &world.servers[0]] {
        pod.attach(&mut world.datapath, |way| way.limited = true);
    }
    assert_eq!(exchange(&world), 0);
    world.datapath.detach(&attachment(world.client.sandbox())).unwrap();
}

#[test]
fn a_pod_cannot_send_from_an_address_that_is_not_its_own() {
    let Some(mut world) = World::new("a_pod_cannot_send_from_an_address_that_is_not_its_own", true) else { return };
    let server = world.udp_server(0, VIP);
    let other = world.servers[1].v4;
    let spoofer = world.client.netns.run(|| {
        datapath_support::ip(&format!("addr add {other}/32 dev eth0"));
        UdpSocket::bind((other, 0)).unwrap()
    });
    spoofer.send_to(b"not me", server.local_addr().unwrap()).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(server.recv(&mut [0; 8]).is_err());
    let counters = world.datapath.counters().unwrap();
    assert_eq!(counters.iter().map(|(_, c)| c.spoofed).sum::<u64>(), 1);
    world.datapath.detach(&attachment(world.client.sandbox())).unwrap();
}
