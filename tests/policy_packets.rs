//! Promise: an isolated pod exchanges with others what the tables let through and
//! nothing else: both families, by the stack and past it, answers included; and a
//! connection that was there before is judged as its beginning would be now.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use datapath_support::{Node, TestPod, attachment, ip};
use fairway::datapath::Datapath;
use fairway::datapath::policies::KernelPolicies;
use fairway::policy::maps::Change;
use fairway::policy::model::{Direction, Name};
use fairway::policy::tables::{CLOSED, Enforced, NOBODY, Open, RuleName};
use fairway::service::model::Protocol;
use fairway_ebpf_abi::{EVENT_DENIED_EGRESS, EVENT_DENIED_INGRESS};
use socket2::{Domain, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(2);
/// Nothing comes: longer than anything that would come takes here.
const SILENCE: Duration = Duration::from_millis(250);
/// Profiles and classes of these tests.
const SOME: u64 = 7;
const FRIENDS: u64 = 70;

struct World {
    datapath: Datapath,
    tables: KernelPolicies,
    /// The one that is isolated, and two others.
    own: TestPod,
    friend: TestPod,
    stranger: TestPod,
    _node: Node,
}

fn open(protocol: Option<Protocol>, from: u16, to: u16) -> Open {
    let by = RuleName { policy: Name::new("a", "p"), direction: Direction::Ingress, number: 0 };
    Open { protocol, from, to, by }
}

impl World {
    fn new(test: &str, short: bool) -> Option<Self> {
        let node = Node::new(test)?;
        let (mut datapath, _) = node.open();
        let [own, friend, stranger] = [2, 3, 4].map(TestPod::new);
        ip("addr add 10.9.0.1/32 dev lo");
        ip("addr add fd09::ff/128 dev lo nodad");
        let addresses: Vec<IpAddr> = ["10.9.0.1", "fd09::ff"].map(|a| a.parse().unwrap()).to_vec();
        datapath.set_node_addresses(&addresses).unwrap();
        for pod in [&own, &friend, &stranger] {
            let number = number_of(&pod.host);
            pod.attach(&mut datapath, |way| (way.short, way.netns) = (short, number));
        }
        let mut tables = datapath.policy_maps().unwrap();
        for at in [IpAddr::from(friend.v4), friend.v6.into()] {
            tables.apply(&Change::Address(at, Some(FRIENDS))).unwrap();
        }
        Some(Self { datapath, tables, own, friend, stranger, _node: node })
    }

    fn each(test: &str, body: impl Fn(&mut World)) {
        for short in [false, true] {
            println!("short: {short}");
            let Some(mut world) = World::new(test, short) else { return };
            body(&mut world);
        }
    }

    /// What friends may, and what everybody may.
    fn rules(&mut self, friends: &[Open], all: &[Open]) {
        for (class, open) in [(NOBODY, all), (FRIENDS, friends)] {
            self.tables.apply(&Change::PutRules(SOME, class, Arc::from(open))).unwrap();
        }
    }

    fn isolate(&mut self, ingress: Option<u64>, egress: Option<u64>) {
        let how = Enforced { ingress, egress };
        assert!(self.datapath.isolate(&attachment(self.own.sandbox()), how).unwrap().is_some());
        self.tables.next_generation().unwrap();
    }

    fn events(&self) -> [u64; 2] {
        let all = self.datapath.service_events().unwrap();
        [EVENT_DENIED_INGRESS, EVENT_DENIED_EGRESS].map(|which| all[which as usize])
    }
}

/// What the node calls the pod's namespace: `ip` shows it with the device.
fn number_of(host: &str) -> Option<i32> {
    let shown = std::process::Command::new("ip").args(["-o", "link", "show", "dev", host]).output().unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    let number = text.split("link-netnsid ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    Some(number)
}

fn families(pod: &TestPod) -> [IpAddr; 2] {
    [pod.v4.into(), pod.v6.into()]
}

fn udp(pod: &TestPod, at: SocketAddr) -> UdpSocket {
    let socket = pod.netns.run(|| UdpSocket::bind(at).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Whether a datagram arrives.
fn arrives(from: &UdpSocket, to: &UdpSocket, payload: &[u8]) -> bool {
    from.send_to(payload, to.local_addr().unwrap()).unwrap();
    to.set_read_timeout(Some(SILENCE)).unwrap();
    let mut buffer = vec![0; 70_000];
    match to.recv_from(&mut buffer) {
        Ok((n, who)) => {
            assert_eq!((&buffer[..n], who), (payload, from.local_addr().unwrap()));
            true
        }
        Err(_) => false,
    }
}

/// Whether a connection can be made, to a listener that is there.
fn connects(from: &TestPod, at: SocketAddr) -> bool {
    from.netns.run(|| TcpStream::connect_timeout(&at, SILENCE)).is_ok()
}

fn listener(pod: &TestPod, at: SocketAddr) -> TcpListener {
    pod.netns.run(|| TcpListener::bind(at).unwrap())
}

/// Whether bytes sent on one end come out of the other.
fn passes(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    from.write_all(b"x").unwrap();
    to.set_read_timeout(Some(SILENCE)).unwrap();
    matches!(to.read(&mut [0; 16]), Ok(n) if n > 0)
}

/// Two ends of a connection that `client` has begun.
fn connection(client: &TestPod, server: &TestPod, at: SocketAddr) -> (TcpStream, TcpStream) {
    let listener = listener(server, at);
    let one = client.netns.run(|| TcpStream::connect_timeout(&at, PATIENCE).unwrap());
    let (other, _) = listener.accept().unwrap();
    // Still listening: that is what tells who has begun.
    std::mem::forget(listener);
    (one, other)
}

/// Whether an ICMP echo is answered.
fn pings(from: &TestPod, to: IpAddr) -> bool {
    let (domain, protocol, ask, answer) = match to.is_ipv4() {
        true => (Domain::IPV4, socket2::Protocol::ICMPV4, 8, 0),
        false => (Domain::IPV6, socket2::Protocol::ICMPV6, 128, 129),
    };
    let socket = from.netns.run(|| Socket::new(domain, Type::RAW, Some(protocol)).unwrap());
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    // Type, code, checksum (the kernel fills in IPv6's), id, sequence.
    let mut echo = [ask, 0, 0, 0, 0, 1, 0, 1];
    if to.is_ipv4() {
        let sum = !(u32::from(ask) * 256 + 2) as u16;
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.send_to(&echo, &SocketAddr::new(to, 0).into()).unwrap();
    let mut socket = socket;
    let mut buffer = [0; 256];
    loop {
        let Ok(n) = socket.read(&mut buffer) else { return false };
        let icmp = if to.is_ipv4() { &buffer[20..n] } else { &buffer[..n] };
        if icmp[0] == answer {
            return true;
        }
    }
}

#[test]
fn who_is_let_in_is_heard_and_answered_and_nobody_else() {
    World::each("who_is_let_in_is_heard_and_answered_and_nobody_else", |world| {
        world.rules(&[open(Some(Protocol::Tcp), 80, 80), open(Some(Protocol::Udp), 50, 60)], &[]);
        for at in families(&world.own) {
            let doors = [listener(&world.own, (at, 80).into()), listener(&world.own, (at, 81).into())];
            for door in &doors {
                assert!(connects(&world.stranger, door.local_addr().unwrap()), "nobody is isolated yet");
            }
            world.isolate(Some(SOME), None);
            assert!(connects(&world.friend, (at, 80).into()));
            assert!(!connects(&world.friend, (at, 81).into()), "another port");
            assert!(!connects(&world.stranger, (at, 80).into()), "another peer");

            let own = udp(&world.own, (at, 55).into());
            let wrong = udp(&world.own, (at, 61).into());
            for (pod, heard) in [(&world.friend, true), (&world.stranger, false)] {
                let same = families(pod).into_iter().find(|ip| ip.is_ipv4() == at.is_ipv4()).unwrap();
                let client = udp(pod, (same, 4000).into());
                assert_eq!(arrives(&client, &own, b"q"), heard);
                assert!(arrives(&own, &client, b"a"), "egress is open");
                assert!(!arrives(&client, &wrong, b"q"), "another port");
                // What the pod has begun is answered.
                assert!(arrives(&client, &own, b"a"));
            }
            world.isolate(None, None);
        }
        assert!(world.events()[0] > 0, "{:?}", world.events());
        let counters = world.datapath.counters().unwrap();
        let (_, own) = counters.iter().find(|(id, _)| *id == attachment(world.own.sandbox())).unwrap();
        assert!(own.denied_ingress > 0);
    });
}

#[test]
fn whom_a_pod_may_reach_answers_and_nobody_else_is_reached() {
    World::each("whom_a_pod_may_reach_answers_and_nobody_else_is_reached", |world| {
        world.rules(&[open(Some(Protocol::Tcp), 80, 80), open(Some(Protocol::Udp), 50, 60)], &[]);
        // Nobody comes in, and answers do.
        world.isolate(Some(CLOSED), Some(SOME));
        for (friend, stranger) in families(&world.friend).into_iter().zip(families(&world.stranger)) {
            let _doors = [
                listener(&world.friend, (friend, 80).into()),
                listener(&world.friend, (friend, 81).into()),
                listener(&world.stranger, (stranger, 80).into()),
            ];
            assert!(connects(&world.own, (friend, 80).into()));
            assert!(!connects(&world.own, (friend, 81).into()));
            assert!(!connects(&world.own, (stranger, 80).into()));
            let same = families(&world.own).into_iter().find(|ip| ip.is_ipv4() == friend.is_ipv4()).unwrap();
            let (own, server) = (udp(&world.own, (same, 4000).into()), udp(&world.friend, (friend, 55).into()));
            assert!(!arrives(&server, &own, b"unasked"));
            assert!(arrives(&own, &server, b"q") && arrives(&server, &own, b"a"));
        }
        assert!(world.events()[0] > 0 && world.events()[1] > 0, "{:?}", world.events());
    });
}

#[test]
fn a_connection_that_is_there_is_judged_as_its_beginning_would_be() {
    World::each("a_connection_that_is_there_is_judged_as_its_beginning_would_be", |world| {
        for (own, friend) in families(&world.own).into_iter().zip(families(&world.friend)) {
            world.isolate(None, None);
            let (mut out, mut out_there) = connection(&world.own, &world.friend, (friend, 90).into());
            let (mut come, mut come_here) = connection(&world.friend, &world.own, (own, 90).into());
            let (mut more, mut more_here) = connection(&world.friend, &world.own, (own, 91).into());
            // Nobody may come any more; the pod may go anywhere.
            world.isolate(Some(CLOSED), None);
            assert!(!passes(&mut come, &mut come_here), "from the other end first");
            assert!(!passes(&mut more_here, &mut more), "from the pod first");
            assert!(passes(&mut out_there, &mut out), "from the other end first");
            assert!(passes(&mut out, &mut out_there));
            // Allowed again it goes on: TCP sends once more what was not heard.
            world.isolate(None, None);
            come_here.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            assert_eq!(come_here.read(&mut [0; 16]).unwrap(), 1);
            // Known by now, and judged again.
            world.isolate(None, Some(CLOSED));
            assert!(!passes(&mut out, &mut out_there));
            assert!(passes(&mut come, &mut come_here), "begun by the other end: egress does not matter");
            assert!(passes(&mut come_here, &mut come));
        }
    });
}

#[test]
fn fragments_follow_their_first_one() {
    World::each("fragments_follow_their_first_one", |world| {
        world.rules(&[open(Some(Protocol::Udp), 50, 60)], &[]);
        world.isolate(Some(SOME), Some(SOME));
        for (own, friend) in families(&world.own).into_iter().zip(families(&world.friend)) {
            let client = udp(&world.friend, (friend, 55).into());
            let (good, bad) = (udp(&world.own, (own, 55).into()), udp(&world.own, (own, 61).into()));
            let large = vec![7; 4000];
            assert!(arrives(&client, &good, &large));
            assert!(!arrives(&client, &bad, &large));
            assert!(arrives(&good, &client, &large));
        }
    });
}

#[test]
fn the_node_reaches_its_own_pods_and_they_answer_it_alone() {
    World::each("the_node_reaches_its_own_pods_and_they_answer_it_alone", |world| {
        world.isolate(Some(CLOSED), Some(CLOSED));
        for (own, node) in families(&world.own).into_iter().zip(["10.9.0.1", "fd09::ff"]) {
            let node: IpAddr = node.parse().unwrap();
            let _door = listener(&world.own, (own, 80).into());
            let domain = if own.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            let probe = Socket::new(domain, Type::STREAM, None).unwrap();
            probe.bind(&SocketAddr::new(node, 0).into()).unwrap();
            probe.connect_timeout(&SocketAddr::new(own, 80).into(), PATIENCE).unwrap();
            // The other way it is a connection as any.
            let _at_node = TcpListener::bind((node, 8080)).unwrap();
            assert!(!connects(&world.own, (node, 8080).into()));
        }
    });
}

#[test]
fn what_has_no_ports_is_let_through_by_rules_that_name_none() {
    World::each("what_has_no_ports_is_let_through_by_rules_that_name_none", |world| {
        for at in families(&world.own) {
            world.isolate(None, None);
            assert!(pings(&world.stranger, at));
            world.rules(&[open(None, 0, u16::MAX)], &[open(Some(Protocol::Tcp), 0, u16::MAX)]);
            world.isolate(Some(SOME), Some(CLOSED));
            assert!(pings(&world.friend, at), "and is answered");
            assert!(!pings(&world.stranger, at));
        }
        // Its neighbours an isolated pod finds all the same, and itself.
        world.isolate(Some(CLOSED), Some(CLOSED));
        for at in families(&world.own) {
            assert!(pings(&world.own, at));
        }
    });
}

#[test]
fn many_ranges_of_ports_are_found_wherever_they_stand() {
    World::each("many_ranges_of_ports_are_found_wherever_they_stand", |world| {
        let every_third: Vec<Open> = (0..60).map(|n| open(Some(Protocol::Udp), 1000 + 3 * n, 1001 + 3 * n)).collect();
        world.rules(&every_third, &[]);
        world.isolate(Some(SOME), None);
        let client = udp(&world.friend, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
        for port in [999, 1000, 1001, 1002, 1045, 1046, 1047, 1090, 1176, 1177, 1178, 1179, 1180] {
            let door = udp(&world.own, (world.own.v4, port).into());
            client.send_to(b"q", door.local_addr().unwrap()).unwrap();
            door.set_read_timeout(Some(SILENCE)).unwrap();
            let wanted = (1000..1180).contains(&port) && (port - 1000) % 3 != 2;
            assert_eq!(door.recv_from(&mut [0; 16]).is_ok(), wanted, "{port}");
        }
    });
}
