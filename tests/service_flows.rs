//! Promise: the kernel's flow table is collected while it is in use: what has
//! ended goes, what is in use stays, whatever the table's size; and the sockets
//! that were led to a backend end with it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use datapath_support::{Node, Services, TestPod, UDP};
use fairway::datapath::Datapath;
use fairway::service::ages::{SECOND, partner};
use fairway::service::maps::{Chunk, Gone, ServiceMaps as _};
use fairway::service::model::Protocol;
use fairway::service::tend::{Tended, Tender};
use fairway::sys::clock::monotonic_ns;
use fairway_ebpf_abi::{
    Addr, Backend, EVENT_TABLE_FULL, FLOW_ENDED, FLOW_FORWARD, FLOWS, Flow, FlowKey, LAYOUT_VERSION, MAX_FLOWS,
    SCOPE_INSIDE,
};

const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
const VIP6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1)), 80);
const PATIENCE: Duration = Duration::from_secs(2);
const TCP: u8 = 6;

type Table = HashMap<MapData, FlowKey, Flow>;

fn table(node: &Node) -> Table {
    let pin = node.bpffs.join(format!("fairway/v{LAYOUT_VERSION}/maps/{FLOWS}"));
    HashMap::try_from(Map::HashMap(MapData::from_pin(pin).unwrap())).unwrap()
}

fn tender(datapath: &Datapath) -> Tender {
    Tender::new(Box::new(datapath.flow_tables().unwrap()))
}

/// Both entries of a flow, as old as `ages` say.
fn flow(table: &mut Table, n: u32, protocol: u8, backend: u32, ages: [u64; 2], flags: u16) -> FlowKey {
    let now = monotonic_ns();
    let ago = |seconds: u64| now.checked_sub(seconds * SECOND).expect("a machine that has run for minutes");
    let client = Addr::from_octets4([10, (n >> 16) as u8, (n >> 8) as u8, n as u8]);
    let key = FlowKey {
        src: client,
        dst: VIP.ip().into(),
        sport: 9,
        dport: 80u16.to_be(),
        protocol,
        kind: FLOW_FORWARD,
        _pad: 0,
    };
    let backend_addr = Addr::from_octets4([11, 0, 0, backend as u8]);
    let to =
        Flow { last_used: ago(ages[0]), addr: backend_addr, port: 8080u16.to_be(), flags, backend, ..Flow::default() };
    table.insert(key, to, 0).unwrap();
    let from = Flow { last_used: ago(ages[1]), addr: key.dst, port: key.dport, backend, ..Flow::default() };
    table.insert(partner(&key, &to), from, 0).unwrap();
    key
}

fn pass(tender: &mut Tender) -> Tended {
    loop {
        let before = tender.turn();
        assert_eq!(before.error, None);
        if before.passes > 0 {
            return before;
        }
    }
}

#[test]
fn what_has_ended_goes_and_what_is_in_use_stays() {
    let Some(node) = Node::new("what_has_ended_goes_and_what_is_in_use_stays") else { return };
    let (datapath, _) = node.open();
    datapath.service_maps().unwrap().apply(Chunk::PutBackends(&[Backend { id: 1, ..Backend::default() }])).unwrap();
    let mut table = table(&node);
    let stays = [
        flow(&mut table, 1, UDP, 1, [25, 25], 0),
        flow(&mut table, 2, UDP, 1, [100, 99], 0),
        flow(&mut table, 3, UDP, 1, [200, 20], 0),
        flow(&mut table, 4, TCP, 1, [200, 200], 0),
        flow(&mut table, 5, TCP, 1, [100, 100], FLOW_ENDED),
        // Its backend is gone, and it with it.
        flow(&mut table, 6, TCP, 2, [1, 1], 0),
        // In use: its next packet finds another backend.
        flow(&mut table, 7, UDP, 2, [1, 1], 0),
    ];
    let goes = [
        flow(&mut table, 11, UDP, 1, [31, 31], 0),
        flow(&mut table, 12, UDP, 1, [125, 124], 0),
        flow(&mut table, 13, TCP, 1, [130, 130], FLOW_ENDED),
        flow(&mut table, 14, UDP, 2, [5, 5], 0),
    ];
    let tended = pass(&mut tender(&datapath));
    let here = |key: &FlowKey| table.get(key, 0).is_ok();
    assert_eq!(stays.map(|key| here(&key)), [true; 7]);
    assert_eq!(goes.map(|key| here(&key)), [false; 4]);
    assert_eq!(table.keys().count(), 14);
    assert_eq!((tended.expired, tended.orphaned, tended.uses[0].entries), (6, 2, 14));
}

#[test]
fn a_full_table_has_room_again_once_a_flow_has_found_none() {
    let Some(node) = Node::new("a_full_table_has_room_again_once_a_flow_has_found_none") else { return };
    let (mut datapath, _) = node.open();
    let client = TestPod::new(2);
    client.attach(&mut datapath, |way| way.short = false);
    let backends = Services::of(&datapath).put(1, VIP, UDP, SCOPE_INSIDE, 0, &["10.9.0.9:80".parse().unwrap()]);
    let socket = client.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let mut table = table(&node);
    let mut tender = tender(&datapath);
    let began = std::time::Instant::now();
    assert_eq!(tender.turn().passes, 1);
    println!("an empty table looked at in {:?}", began.elapsed());
    for n in 0..MAX_FLOWS / 2 {
        flow(&mut table, n, UDP, backends[0].id, [if n % 4 == 0 { 1 } else { 60 }; 2], 0);
    }
    socket.send_to(b"?", VIP).unwrap();
    assert_eq!(datapath.service_events().unwrap()[EVENT_TABLE_FULL as usize], 1, "the flow has found no room");
    let began = std::time::Instant::now();
    let tended = tender.turn();
    println!("{MAX_FLOWS} entries looked at in {:?}", began.elapsed());
    assert_eq!(tended.uses[0].entries, MAX_FLOWS as usize / 4);
    assert_eq!(tended.flows["udp"], MAX_FLOWS as usize / 8);
    socket.send_to(b"?", VIP).unwrap();
    assert_eq!(table.keys().count(), MAX_FLOWS as usize / 4 + 2, "and now it has");
}

#[test]
fn flows_of_real_datagrams_and_every_map_are_counted() {
    let Some(node) = Node::new("flows_of_real_datagrams_and_every_map_are_counted") else { return };
    let mut datapath = node.with_sockets();
    let (client, server) = (TestPod::new(2), TestPod::new(3));
    client.attach(&mut datapath, |way| way.short = false);
    let backend = server.netns.run(|| UdpSocket::bind((server.v4, 0)).unwrap());
    backend.set_read_timeout(Some(PATIENCE)).unwrap();
    Services::of(&datapath).put(1, VIP, UDP, SCOPE_INSIDE, 0, &[backend.local_addr().unwrap()]);
    let sockets: Vec<_> = (0..3).map(|_| client.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap())).collect();
    for socket in &sockets {
        socket.send_to(b"?", VIP).unwrap();
        backend.recv_from(&mut [0; 8]).unwrap();
    }
    let nobody = SocketAddr::new(VIP.ip(), 81);
    Services::of(&datapath).put(2, nobody, UDP, SCOPE_INSIDE, 0, &[]);
    sockets[0].send_to(b"?", nobody).unwrap();
    let tended = pass(&mut tender(&datapath));
    assert_eq!((tended.flows["udp"], tended.events["backend_chosen"], tended.events["refused"]), (3, 3, 1));
    // What was refused is told in full.
    let told = tended.told.last.back().unwrap();
    assert_eq!((tended.told.read, told.what.as_str(), told.protocol.as_str()), (1, "refused", "udp"));
    let from = SocketAddr::new(client.v4.into(), sockets[0].local_addr().unwrap().port());
    assert_eq!((&told.from, &told.to), (&from.to_string(), &nobody.to_string()));
    let of = |map: &str| tended.uses.iter().find(|u| u.map == map).map(|u| u.entries);
    let expected = [("flows", 6), ("links", 1), ("pods", 2), ("counters", 1), ("namespaces", 2), ("fragments", 0)];
    for (map, entries) in expected {
        assert_eq!(of(map), Some(entries), "{map} of {:?}", tended.uses);
    }
    for map in ["affinities", "sockets", "node"] {
        assert!(of(map).is_some(), "{map}");
    }
}

fn udp(any: &str, to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(any).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    socket
}

fn error_of(socket: &UdpSocket) -> Option<ErrorKind> {
    socket.set_nonblocking(true).unwrap();
    socket.recv(&mut [0; 8]).err().map(|e| e.kind()).filter(|e| *e != ErrorKind::WouldBlock)
}

#[test]
fn sockets_led_to_a_backend_end_with_it_and_those_that_chose_its_address_live() {
    let test = "sockets_led_to_a_backend_end_with_it_and_those_that_chose_its_address_live";
    let Some(node) = Node::new(test) else { return };
    let datapath = node.with_sockets();
    let mut services = Services::of(&datapath);
    let bind = |at: &str| UdpSocket::bind(at).unwrap();
    let (gone, gone6, other) = (bind("127.0.0.2:0"), bind("[::1]:0"), bind("127.0.0.3:0"));
    let [to_gone, to_gone6, to_other] = [&gone, &gone6, &other].map(|s| s.local_addr().unwrap());
    let mut backends = services.put(1, VIP, UDP, SCOPE_INSIDE, 0, &[to_gone]);
    backends.extend(services.put(2, VIP6, UDP, SCOPE_INSIDE, 0, &[to_gone6]));
    let second = SocketAddr::new(VIP.ip(), 81);
    services.put(3, second, UDP, SCOPE_INSIDE, 0, &[to_other]);

    let mapped = SocketAddr::new(Ipv4Addr::new(10, 96, 0, 1).to_ipv6_mapped().into(), 80);
    let led = [udp("0.0.0.0:0", VIP), udp("[::]:0", VIP6), udp("[::]:0", mapped)];
    let lives = [
        // Straight to the same address; by another Service; to the Service first and
        // straight to the address then.
        udp("0.0.0.0:0", to_gone),
        udp("[::]:0", to_gone6),
        udp("0.0.0.0:0", second),
        udp("0.0.0.0:0", VIP),
    ];
    lives[3].connect(to_gone).unwrap();
    // Somebody waits at one of them: it is woken.
    let waiting = led[0].try_clone().unwrap();
    waiting.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let woken = std::thread::spawn(move || waiting.recv(&mut [0; 8]).unwrap_err().kind());

    let mut tender = tender(&datapath);
    let of = |b: &Backend| Gone { protocol: Some(Protocol::Udp), backend: *b };
    let of_tcp: Vec<Gone> = backends.iter().map(|b| Gone { protocol: Some(Protocol::Tcp), ..of(b) }).collect();
    assert_eq!(tender.backends_gone(&of_tcp).sockets_ended, 0, "no backend of datagrams");
    let tended = tender.backends_gone(&backends.iter().map(of).collect::<Vec<_>>());
    assert_eq!((tended.sockets_unable, tended.sockets_ended, tended.sockets_not_ended), (None, 3, 0));
    assert_eq!(woken.join().unwrap(), ErrorKind::ConnectionAborted);
    for socket in &led[1..] {
        assert_eq!(error_of(socket), Some(ErrorKind::ConnectionAborted));
    }
    for (n, socket) in lives.iter().enumerate() {
        assert_eq!(error_of(socket), None, "socket {n} lives");
        socket.send(b"!").unwrap_or_else(|e| panic!("socket {n}: {e}"));
    }
}
