//! Promise: a client from outside reaches a Service by any address of a node, by
//! a load balancer's or by an external one, wherever its backends are; the answer
//! comes from where it asked; the backend knows it when the Service wants that.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use datapath_support::edge::{
    At, BALANCER4, BALANCER6, CLIENT4, CLIENT6, Edge, NODE_PORT, NODE4, NODE6, PATIENCE, SECOND4, any_node, index,
    uplink,
};
use datapath_support::{Services, TCP, UDP, ip};
use fairway::service::maps::{Chunk, ServiceMaps as _};
use fairway::service::model::Range;
use fairway_ebpf_abi::{
    EVENT_CHOSEN, EVENT_ERROR_TRANSLATED, EVENT_NO_PORT, EVENT_NOT_ADMITTED, EVENT_REFUSED, EVENT_UNANSWERED,
    FLOW_ENDED, FRONTEND_LOCAL, FRONTEND_RANGES, FRONTEND_SILENT, OUTSIDE_PORTS, SCOPE_OUTSIDE,
};

/// A Service's addresses as clients see them, with what its frontend is at.
fn addresses() -> [(SocketAddr, SocketAddr); 5] {
    let node = |ip: IpAddr| (SocketAddr::new(ip, NODE_PORT), any_node(ip));
    let own = |ip: IpAddr| (SocketAddr::new(ip, 80), SocketAddr::new(ip, 80));
    [node(NODE4.into()), node(SECOND4.into()), node(NODE6.into()), own(BALANCER4.into()), own(BALANCER6.into())]
}

fn client(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { CLIENT4.into() } else { CLIENT6.into() }
}

/// Who a backend sees when it does not see the client.
fn node(reached: IpAddr) -> IpAddr {
    match reached {
        IpAddr::V4(ip) if ip == SECOND4 => SECOND4.into(),
        IpAddr::V4(_) => NODE4.into(),
        IpAddr::V6(_) => NODE6.into(),
    }
}

/// Both ways; who the server saw.
fn talk(asking: &UdpSocket, server: &UdpSocket, payload: &[u8]) -> SocketAddr {
    asking.send(payload).unwrap();
    let mut buffer = vec![0; 70_000];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..n] == *payload);
    server.send_to(&buffer[..n], from).unwrap();
    let n = asking.recv(&mut buffer).unwrap();
    assert!(buffer[..n] == *payload);
    from
}

fn pass(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) {
    let payload: Vec<u8> = (0..bytes).map(|n| n as u8).collect();
    to.set_read_timeout(Some(PATIENCE)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| from.write_all(&payload).unwrap());
        let mut got = vec![0; bytes];
        to.read_exact(&mut got).unwrap();
        assert!(got == payload);
    });
}

#[test]
fn datagrams_reach_backends_here_and_elsewhere_by_every_address() {
    let Some(mut edge) = Edge::new("datagrams_reach_backends_here_and_elsewhere_by_every_address") else { return };
    let mut set = 0;
    for at in [At::Pod, At::Elsewhere] {
        for (asked, frontend) in addresses() {
            set += 1;
            let server = edge.udp_server(at, asked.ip());
            edge.services.put(set, frontend, UDP, SCOPE_OUTSIDE, 0, &[server.local_addr().unwrap()]);
            let asking = edge.asking(asked);
            for payload in [&b"q"[..], &[7; 1000], &[9; 9000]] {
                let seen = talk(&asking, &server, payload);
                assert_eq!(seen.ip(), node(asked.ip()), "{at:?} {asked}");
                assert!(OUTSIDE_PORTS.contains(&seen.port()), "{seen}");
            }
        }
    }
    assert_eq!(edge.event(EVENT_CHOSEN), 10, "one choice per flow");
}

#[test]
fn a_client_stays_who_it_is_when_the_service_wants_that() {
    let Some(mut edge) = Edge::new("a_client_stays_who_it_is_when_the_service_wants_that") else { return };
    for (set, (asked, frontend)) in (1..).zip(addresses()) {
        let server = edge.udp_server(At::Pod, asked.ip());
        let to = [server.local_addr().unwrap()];
        edge.services.put(set, frontend, UDP, SCOPE_OUTSIDE, FRONTEND_LOCAL, &to);
        let asking = edge.asking(asked);
        for payload in [&b"q"[..], &[9; 9000]] {
            let seen = talk(&asking, &server, payload);
            assert_eq!(seen, SocketAddr::new(client(asked.ip()), asking.local_addr().unwrap().port()));
        }
        let listener = edge.tcp_server(At::Pod, asked.ip());
        let to = [listener.local_addr().unwrap()];
        edge.services.put(set + 10, frontend, TCP, SCOPE_OUTSIDE, FRONTEND_LOCAL, &to);
        let mut stream = edge.connect(asked).unwrap();
        let (mut server, seen) = listener.accept().unwrap();
        assert_eq!(seen.ip(), client(asked.ip()));
        pass(&mut stream, &mut server, 300_000);
        pass(&mut server, &mut stream, 300_000);
    }
}

#[test]
fn connections_are_carried_both_ways_and_their_end_is_seen() {
    let Some(mut edge) = Edge::new("connections_are_carried_both_ways_and_their_end_is_seen") else { return };
    for at in [At::Pod, At::Elsewhere] {
        for (asked, frontend) in addresses() {
            let listener = edge.tcp_server(at, asked.ip());
            edge.services.put(1, frontend, TCP, SCOPE_OUTSIDE, 0, &[listener.local_addr().unwrap()]);
            let mut stream = edge.connect(asked).unwrap();
            let (mut server, seen) = listener.accept().unwrap();
            assert_eq!(seen.ip(), node(asked.ip()), "{at:?} {asked}");
            pass(&mut stream, &mut server, 300_000);
            pass(&mut server, &mut stream, 300_000);
            drop(stream);
            assert_eq!(server.read(&mut [0; 1]).unwrap(), 0, "the end has come through");
            drop(server);
            let mut flows = edge.flows();
            let deadline = Instant::now() + PATIENCE;
            while flows.only()[1].1.flags & FLOW_ENDED != FLOW_ENDED {
                assert!(Instant::now() < deadline, "{:?}", flows.only());
                std::thread::yield_now();
            }
            for (key, _) in flows.only() {
                flows.0.remove(&key).unwrap();
            }
        }
    }
}

#[test]
fn only_clients_in_the_source_ranges_are_let_in() {
    let Some(mut edge) = Edge::new("only_clients_in_the_source_ranges_are_let_in") else { return };
    let (asked, frontend) = addresses()[3];
    let server = edge.udp_server(At::Pod, asked.ip());
    edge.services.put(1, frontend, UDP, SCOPE_OUTSIDE, FRONTEND_RANGES, &[server.local_addr().unwrap()]);
    let ranges = |net: &str| [Range::new(1, &net.parse().unwrap())];
    edge.services.maps.apply(Chunk::PutRanges(&ranges("192.0.2.0/24"))).unwrap();
    let asking = edge.asking(asked);
    asking.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    asking.send(b"?").unwrap();
    assert_eq!(asking.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(edge.event(EVENT_NOT_ADMITTED), 1);
    edge.services.maps.apply(Chunk::PutRanges(&ranges("10.7.0.0/16"))).unwrap();
    asking.set_read_timeout(Some(PATIENCE)).unwrap();
    talk(&asking, &server, b"?");
}

#[test]
fn without_backends_a_client_is_refused_or_left_to_try_another_node() {
    let test = "without_backends_a_client_is_refused_or_left_to_try_another_node";
    let Some(mut edge) = Edge::new(test) else { return };
    for (asked, frontend) in addresses() {
        for protocol in [TCP, UDP] {
            edge.services.put(1, frontend, protocol, SCOPE_OUTSIDE, 0, &[]);
        }
        let began = Instant::now();
        assert_eq!(edge.connect(asked).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{asked}");
        let asking = edge.asking(asked);
        asking.send(b"?").unwrap();
        assert_eq!(asking.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{asked}");
        assert!(began.elapsed() < Duration::from_millis(500));
    }
    assert_eq!(edge.event(EVENT_REFUSED), 10);
    let (asked, frontend) = addresses()[0];
    edge.services.put(1, frontend, UDP, SCOPE_OUTSIDE, FRONTEND_LOCAL | FRONTEND_SILENT, &[]);
    let asking = edge.asking(asked);
    asking.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    asking.send(b"?").unwrap();
    assert_eq!(asking.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(edge.event(EVENT_UNANSWERED), 1);
}

#[test]
fn two_clients_never_have_the_same_port_and_without_one_nothing_is_sent() {
    let test = "two_clients_never_have_the_same_port_and_without_one_nothing_is_sent";
    let Some(mut edge) = Edge::new(test) else { return };
    let (asked, frontend) = addresses()[0];
    let server = edge.udp_server(At::Elsewhere, asked.ip());
    edge.services.put(1, frontend, UDP, SCOPE_OUTSIDE, 0, &[server.local_addr().unwrap()]);
    let asking = edge.asking(asked);
    let first = talk(&asking, &server, b"1");
    let mut flows = edge.flows();
    let [(forward, _), (key, answer)] = flows.only();
    // A flow that was forgotten finds its port again.
    flows.0.remove(&forward).unwrap();
    assert_eq!(talk(&asking, &server, b"2"), first);
    // Another client has it now.
    let other = fairway_ebpf_abi::Flow { peer_port: !answer.peer_port, ..answer };
    flows.0.insert(key, other, 0).unwrap();
    let second = talk(&asking, &server, b"3");
    assert_ne!(second.port(), first.port());
    assert_eq!(flows.0.get(&key, 0).unwrap().peer_port, other.peer_port, "nothing was taken from it");
    // All are somebody's.
    flows.0.remove(&forward).unwrap();
    for port in OUTSIDE_PORTS {
        let key = fairway_ebpf_abi::FlowKey { dport: port.to_be(), ..key };
        flows.0.insert(key, other, 0).unwrap();
    }
    asking.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    asking.send(b"4").unwrap();
    assert_eq!(asking.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(edge.event(EVENT_NO_PORT), 1);
    // One of them has been idle for long.
    let idle = fairway_ebpf_abi::Flow { last_used: 0, ..other };
    for port in OUTSIDE_PORTS {
        let key = fairway_ebpf_abi::FlowKey { dport: port.to_be(), ..key };
        flows.0.insert(key, idle, 0).unwrap();
    }
    asking.set_read_timeout(Some(PATIENCE)).unwrap();
    talk(&asking, &server, b"5");
}

#[test]
fn one_clients_port_reaches_one_backend_by_two_addresses() {
    let Some(mut edge) = Edge::new("one_clients_port_reaches_one_backend_by_two_addresses") else { return };
    for flags in [0, FRONTEND_LOCAL] {
        let server = edge.udp_server(At::Pod, NODE4.into());
        let [(by_node, any), _, _, (by_balancer, own), _] = addresses();
        for (set, frontend) in [(1, any), (2, own)] {
            edge.services.put(set, frontend, UDP, SCOPE_OUTSIDE, flags, &[server.local_addr().unwrap()]);
        }
        let asking = edge.asking(by_node);
        let first = talk(&asking, &server, b"by the node");
        asking.connect(by_balancer).unwrap();
        let second = talk(&asking, &server, b"by the balancer");
        assert_ne!(first, second, "or answers could not be told apart");
        if flags == FRONTEND_LOCAL {
            assert_eq!((first.ip(), second.ip()), (CLIENT4.into(), CLIENT4.into()));
        }
        asking.connect(by_node).unwrap();
        assert_eq!(talk(&asking, &server, b"by the node again"), first);
    }
}

#[test]
fn a_smaller_path_is_discovered_in_both_directions() {
    let Some(mut edge) = Edge::new("a_smaller_path_is_discovered_in_both_directions") else { return };
    // By its routes alone: a device of this size would drop what is larger on its way
    // in as well, and tell nobody, as nothing in a VPC does.
    edge.router.run(|| {
        for (device, v4, v6) in [("client", "10.7.0.2", "fd07::2"), ("elsewhere", "10.9.1.2", "fd09:1::2")] {
            ip(&format!("route add {v4}/32 dev {device} mtu lock 1300"));
            ip(&format!("-6 route add {v6}/128 dev {device} mtu lock 1300"));
        }
    });
    let mut set = 0;
    for (at, flags) in [(At::Pod, 0), (At::Pod, FRONTEND_LOCAL), (At::Elsewhere, 0)] {
        for (asked, frontend) in [addresses()[3], addresses()[2]] {
            set += 1;
            let listener = edge.tcp_server(at, asked.ip());
            edge.services.put(set, frontend, TCP, SCOPE_OUTSIDE, flags, &[listener.local_addr().unwrap()]);
            let before = edge.event(EVENT_ERROR_TRANSLATED);
            let mut stream = edge.connect(asked).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            pass(&mut server, &mut stream, 300_000);
            let between = edge.event(EVENT_ERROR_TRANSLATED);
            assert!(between > before, "{at:?} {flags} {asked}: of what is answered");
            pass(&mut stream, &mut server, 300_000);
            let after = edge.event(EVENT_ERROR_TRANSLATED);
            assert!(at == At::Pod || after > between, "{asked}: of what is asked");
            let forget = || ["route flush cache", "-6 route flush cache"].map(ip);
            edge.client.run(forget);
            edge.elsewhere.run(forget);
            edge.pod.netns.run(forget);
        }
    }
}

#[test]
fn a_backends_own_refusal_reaches_the_client() {
    let Some(mut edge) = Edge::new("a_backends_own_refusal_reaches_the_client") else { return };
    for (at, flags) in [(At::Pod, 0), (At::Pod, FRONTEND_LOCAL), (At::Elsewhere, 0)] {
        for (asked, frontend) in addresses() {
            let (_, nobody) = edge.backend(at, asked.ip(), 4444);
            for (set, protocol) in [(1, UDP), (2, TCP)] {
                edge.services.put(set, frontend, protocol, SCOPE_OUTSIDE, flags, &[nobody]);
            }
            let asking = edge.asking(asked);
            asking.send(b"?").unwrap();
            let error = asking.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{at:?} {flags} {asked}: {error}");
            assert_eq!(edge.connect(asked).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{at:?} {asked}");
        }
    }
    assert_eq!(edge.event(EVENT_REFUSED), 0, "the backends' hosts said so");
}

#[test]
fn a_process_of_the_node_is_a_backend_too() {
    let Some(mut edge) = Edge::new("a_process_of_the_node_is_a_backend_too") else { return };
    for (set, (asked, frontend)) in (1..).zip(addresses()) {
        let to = SocketAddr::new(node(asked.ip()), 8080);
        let listener = std::net::TcpListener::bind(to).unwrap();
        edge.services.put(set, frontend, TCP, SCOPE_OUTSIDE, 0, &[to]);
        let server = UdpSocket::bind(to).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        edge.services.put(set + 10, frontend, UDP, SCOPE_OUTSIDE, 0, &[to]);
        let mut stream = edge.connect(asked).unwrap();
        let (mut accepted, seen) = listener.accept().unwrap();
        assert_eq!(seen.ip(), client(asked.ip()));
        pass(&mut stream, &mut accepted, 300_000);
        pass(&mut accepted, &mut stream, 300_000);
        talk(&edge.asking(asked), &server, &[9; 9000]);
    }
    // What is not a Service's is the node's own business.
    let plain = std::net::TcpListener::bind((NODE4, 9999)).unwrap();
    edge.connect(plain.local_addr().unwrap()).unwrap();
}

#[test]
fn a_pod_with_an_eni_of_its_own_answers_over_its_link_to_the_node() {
    let Some(mut edge) = Edge::new("a_pod_with_an_eni_of_its_own_answers_over_its_link_to_the_node") else { return };
    edge.exclusive();
    let program = || {
        let shown =
            std::process::Command::new("tc").args(["filter", "show", "dev", "xl0", "ingress"]).output().unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        let id = shown.split_once(" id ").and_then(|(_, rest)| rest.split_whitespace().next()).map(str::to_owned);
        id.unwrap_or_else(|| panic!("no filter: {shown}"))
    };
    // The router would bring an answer from the ENI to the client, who would not
    // know it.
    let mut set = 0;
    for flags in [0, FRONTEND_LOCAL] {
        for (asked, frontend) in addresses() {
            set += 1;
            let expected = if flags == 0 { node(asked.ip()) } else { client(asked.ip()) };
            let server = edge.udp_server(At::Elsewhere, asked.ip());
            edge.services.put(set, frontend, UDP, SCOPE_OUTSIDE, flags, &[server.local_addr().unwrap()]);
            println!("{asked} {flags}");
            for payload in [&b"q"[..], &[9; 9000]] {
                let seen = talk(&edge.asking(asked), &server, payload);
                assert_eq!(seen.ip(), expected, "{asked} {flags}");
            }
            set += 1;
            let listener = edge.tcp_server(At::Elsewhere, asked.ip());
            edge.services.put(set, frontend, TCP, SCOPE_OUTSIDE, flags, &[listener.local_addr().unwrap()]);
            let mut stream = edge.connect(asked).unwrap();
            let (mut server, seen) = listener.accept().unwrap();
            assert_eq!(seen.ip(), expected, "{asked} {flags}");
            pass(&mut stream, &mut server, 300_000);
            pass(&mut server, &mut stream, 300_000);
            drop(listener);
            // And what nobody listens to.
            assert_eq!(edge.connect(asked).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{asked} {flags}");
            let (_, nobody) = edge.backend(At::Elsewhere, asked.ip(), 4444);
            edge.services.put(set + 100, frontend, UDP, SCOPE_OUTSIDE, flags, &[nobody]);
            let asking = edge.asking(asked);
            asking.send(b"?").unwrap();
            assert_eq!(asking.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{asked} {flags}");
        }
    }
    // Who comes by the VPC is answered there.
    let (_, own) = edge.backend(At::Elsewhere, CLIENT4.into(), 5353);
    talk(&edge.asking(own), &edge.udp_server(At::Elsewhere, CLIENT4.into()), b"direct");
    let before = program();
    let (next, _) = edge.node.open();
    drop(std::mem::replace(&mut edge.datapath, next));
    assert_ne!(program(), before, "the next agent's");
    let (asked, frontend) = addresses()[0];
    let server = edge.udp_server(At::Elsewhere, asked.ip());
    edge.services.put(set + 1, frontend, UDP, SCOPE_OUTSIDE, FRONTEND_LOCAL, &[server.local_addr().unwrap()]);
    talk(&edge.asking(asked), &server, b"after");
}

#[test]
fn the_uplinks_programs_outlive_the_agent_are_replaced_and_removed() {
    let Some(mut edge) = Edge::new("the_uplinks_programs_outlive_the_agent_are_replaced_and_removed") else { return };
    let filters = |device: &str| {
        let count = |chain| {
            let shown =
                std::process::Command::new("tc").args(["filter", "show", "dev", device, chain]).output().unwrap();
            String::from_utf8_lossy(&shown.stdout).matches(" fairway ").count()
        };
        (count("ingress"), count("egress"))
    };
    let (asked, frontend) = addresses()[0];
    let server = edge.udp_server(At::Elsewhere, asked.ip());
    edge.services.put(1, frontend, UDP, SCOPE_OUTSIDE, 0, &[server.local_addr().unwrap()]);
    let asking = edge.asking(asked);
    let seen = talk(&asking, &server, b"before");
    assert_eq!(edge.datapath.uplink().unwrap(), Some(index("up0")));
    // Another agent: from its start to its first word the old programs serve.
    let (next, _) = edge.node.open();
    drop(std::mem::replace(&mut edge.datapath, next));
    assert_eq!(edge.datapath.uplink().unwrap(), None, "not this process's");
    assert_eq!(talk(&asking, &server, b"between"), seen);
    edge.datapath.set_uplink(Some(uplink())).unwrap();
    assert_eq!(edge.datapath.uplink().unwrap(), Some(index("up0")));
    assert_eq!(talk(&asking, &server, b"after"), seen);
    assert_eq!(filters("up0"), (1, 1), "replaced, not added");
    // Pods share it: then it is not theirs any more, and it stays the node's.
    edge.datapath.attach_eni(index("up0")).unwrap();
    edge.datapath.detach_eni(index("up0")).unwrap();
    assert_eq!(talk(&asking, &server, b"still"), seen);
    ip("link add other type veth peer name beyond");
    let other = fairway::datapath::Uplink { ifindex: index("other"), ..uplink() };
    edge.datapath.set_uplink(Some(other)).unwrap();
    assert_eq!((filters("up0"), filters("other")), ((0, 0), (1, 1)));
    edge.datapath.set_uplink(None).unwrap();
    assert_eq!(filters("other"), (0, 0));
    let _ = Services::of(&edge.datapath);
}
