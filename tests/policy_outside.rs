//! Promise: a client that a node port has brought to a pod is judged as itself,
//! whomever the pod takes for it; a pod with an ENI of its own is judged on its
//! link to the node as well, and cannot pass by the programs inside it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use datapath_support::edge::{At, CLIENT4, CLIENT6, Edge, NODE_PORT, NODE4, NODE6, any_node};
use datapath_support::{TCP, UDP, attachment};
use fairway::datapath::cgroup_root;
use fairway::datapath::policies::KernelPolicies;
use fairway::policy::maps::Change;
use fairway::policy::model::{Direction, Name};
use fairway::policy::tables::{CLOSED, Enforced, Open, RuleName};
use fairway_ebpf_abi::{EVENT_DENIED_INGRESS, EVENT_SPOOFED, FRONTEND_LOCAL, SCOPE_OUTSIDE};
use ipnet::IpNet;

const SILENCE: Duration = Duration::from_millis(250);
const PROFILE: u64 = 7;
const CLASS: u64 = 70;

/// Everything is open to the outside network of the client, or to nobody.
fn tables(edge: &Edge, client: bool) -> KernelPolicies {
    let mut tables = edge.datapath.policy_maps().unwrap();
    let by = RuleName { policy: Name::new("a", "p"), direction: Direction::Ingress, number: 0 };
    let all = Open { protocol: None, from: 0, to: u16::MAX, by };
    let open: Arc<[Open]> = if client { [all].into() } else { [].into() };
    tables.apply(&Change::PutRules(PROFILE, CLASS, open)).unwrap();
    for net in ["10.7.0.0/24", "fd07::/64"] {
        tables.apply(&Change::Net(net.parse::<IpNet>().unwrap(), Some(CLASS))).unwrap();
    }
    tables.next_generation().unwrap();
    tables
}

/// Whether a client outside gets an answer by TCP and by UDP.
fn served(edge: &Edge, node: IpAddr, tcp: &TcpListener, udp: &UdpSocket) -> [bool; 2] {
    let to = SocketAddr::new(node, NODE_PORT);
    let connected = edge.client.run(|| TcpStream::connect_timeout(&to, SILENCE)).is_ok();
    if connected {
        drop(tcp.accept().unwrap());
    }
    let asking = edge.asking(to);
    asking.set_read_timeout(Some(SILENCE)).unwrap();
    udp.set_read_timeout(Some(SILENCE)).unwrap();
    asking.send(b"q").unwrap();
    let mut buffer = [0; 16];
    let answered = match udp.recv_from(&mut buffer) {
        Ok((_, from)) => {
            udp.send_to(b"a", from).unwrap();
            asking.recv(&mut buffer).is_ok()
        }
        Err(_) => false,
    };
    [connected, answered]
}

#[test]
fn a_client_that_a_node_port_has_brought_is_judged_as_itself() {
    for (at, local) in [(At::Pod, false), (At::Pod, true), (At::Elsewhere, false), (At::Elsewhere, true)] {
        println!("{at:?}, client kept: {local}");
        let Some(mut edge) = Edge::new("a_client_that_a_node_port_has_brought_is_judged_as_itself") else { return };
        let own = match at {
            At::Pod => attachment(edge.pod.sandbox()),
            At::Elsewhere => {
                edge.exclusive();
                attachment("own")
            }
        };
        let flags = if local { FRONTEND_LOCAL } else { 0 };
        for (n, node) in [IpAddr::from(NODE4), NODE6.into()].into_iter().enumerate() {
            let (tcp, udp) = (edge.tcp_server(at, node), edge.udp_server(at, node));
            let backends = [tcp.local_addr().unwrap(), udp.local_addr().unwrap()];
            let set = 10 * n as u32 + 1;
            edge.services.put(set, any_node(node), TCP, SCOPE_OUTSIDE, flags, &backends[..1]);
            edge.services.put(set + 1, any_node(node), UDP, SCOPE_OUTSIDE, flags, &backends[1..]);
            let isolate = |edge: &mut Edge, profile| {
                let how = Enforced { ingress: profile, egress: Some(CLOSED) };
                assert!(edge.datapath.isolate(&own, how).unwrap().is_some());
            };
            isolate(&mut edge, Some(PROFILE));
            tables(&edge, true);
            assert_eq!(served(&edge, node, &tcp, &udp), [true, true], "as {CLIENT4} or {CLIENT6}");
            tables(&edge, false);
            assert_eq!(served(&edge, node, &tcp, &udp), [false, false]);
            isolate(&mut edge, Some(CLOSED));
            tables(&edge, true);
            assert_eq!(served(&edge, node, &tcp, &udp), [false, false]);
        }
        assert!(edge.event(EVENT_DENIED_INGRESS) > 0);
    }
}

#[test]
fn the_link_to_the_node_is_no_way_round_a_pods_policies() {
    let Some(mut edge) = Edge::new("the_link_to_the_node_is_no_way_round_a_pods_policies") else { return };
    edge.exclusive();
    let own = attachment("own");
    for (node, pod) in
        [(IpAddr::from(NODE4), IpAddr::from([10, 9, 1, 2])), (NODE6.into(), "fd09:1::2".parse().unwrap())]
    {
        let at_node = TcpListener::bind((node, 8081)).unwrap();
        let to = at_node.local_addr().unwrap();
        let reaches = |edge: &Edge| edge.elsewhere.run(|| TcpStream::connect_timeout(&to, SILENCE)).is_ok();
        edge.datapath.isolate(&own, Enforced::default()).unwrap();
        assert!(reaches(&edge));
        edge.datapath.isolate(&own, Enforced { ingress: Some(CLOSED), egress: Some(CLOSED) }).unwrap();
        tables(&edge, false);
        assert!(!reaches(&edge), "from the pod to the node");
        // The node itself always reaches its pod, and is answered.
        let in_pod = edge.elsewhere.run(|| TcpListener::bind((pod, 8082)).unwrap());
        let probe = TcpStream::connect_timeout(&in_pod.local_addr().unwrap(), Duration::from_secs(2));
        assert!(probe.is_ok(), "{probe:?}");
    }
}

#[test]
fn a_source_that_is_not_the_pods_does_not_leave_by_its_link() {
    let Some(mut edge) = Edge::new("a_source_that_is_not_the_pods_does_not_leave_by_its_link") else { return };
    edge.exclusive();
    let at_node = UdpSocket::bind((NODE4, 8081)).unwrap();
    at_node.set_read_timeout(Some(SILENCE)).unwrap();
    let send = |edge: &Edge, from: Ipv4Addr| {
        edge.elsewhere.run(|| {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.send_to(b"x", (NODE4, 8081)).unwrap();
        });
    };
    send(&edge, Ipv4Addr::new(10, 9, 1, 2));
    assert!(at_node.recv_from(&mut [0; 8]).is_ok());
    // An address of somebody else that the pod has given itself.
    edge.elsewhere.run(|| datapath_support::ip("addr add 10.9.0.2/32 dev lo"));
    send(&edge, Ipv4Addr::new(10, 9, 0, 2));
    assert!(at_node.recv_from(&mut [0; 8]).is_err());
    assert_eq!(edge.event(EVENT_SPOOFED), 1);
}

#[test]
fn packet_sockets_cannot_skip_programs_inside_a_pod() {
    let Some(mut edge) = Edge::new("packet_sockets_cannot_skip_programs_inside_a_pod") else { return };
    edge.datapath.attach_guard(&cgroup_root(None).unwrap()).unwrap();
    edge.exclusive();
    const PACKET_QDISC_BYPASS: libc::c_int = 20;
    const SOL_XDP: libc::c_int = 283;
    const XDP_UMEM_FILL_RING: libc::c_int = 5;
    let set = |family: libc::c_int, level: libc::c_int, name: libc::c_int| {
        let on: libc::c_int = 1;
        // SAFETY: plain system calls; the option outlives the call, and its size is
        // given; the descriptor is closed below.
        unsafe {
            let socket = libc::socket(family, libc::SOCK_RAW, 0);
            assert!(socket >= 0, "{}", std::io::Error::last_os_error());
            let done = libc::setsockopt(socket, level, name, (&raw const on).cast(), 4);
            let error = std::io::Error::last_os_error().raw_os_error();
            libc::close(socket);
            if done == 0 { None } else { error }
        }
    };
    let bypass = || set(libc::AF_PACKET, libc::SOL_PACKET, PACKET_QDISC_BYPASS);
    let xdp = || set(libc::AF_XDP, SOL_XDP, XDP_UMEM_FILL_RING);
    assert_eq!(edge.elsewhere.run(bypass), Some(libc::EPERM));
    assert_eq!(edge.elsewhere.run(xdp), Some(libc::EPERM));
    // Where programs are on the node's side it does not matter, nor at the node.
    assert_eq!(edge.pod.netns.run(bypass), None);
    assert_ne!(edge.pod.netns.run(xdp), Some(libc::EPERM));
    assert_eq!(bypass(), None);
    // Others are set as ever, and long ones arrive whole.
    let long = || {
        let filter = vec![libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0xffff }; 1000];
        let program = libc::sock_fprog { len: 1000, filter: filter.as_ptr().cast_mut() };
        // SAFETY: as above; the program points to the filter, which outlives the call.
        unsafe {
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
            let size = size_of::<libc::sock_fprog>() as libc::socklen_t;
            let done =
                libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const program).cast(), size);
            libc::close(socket);
            done
        }
    };
    assert_eq!(edge.elsewhere.run(long), 0);
}
