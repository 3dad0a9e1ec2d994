//! Promise: the kernel's flow table is collected while it is in use: what has
//! ended goes, what is in use stays, whatever the table's size; and the sockets
//! that were led to a backend end with it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use datapath_support::{Node, Services, TCP, TestPod, UDP};
use fairway::datapath::Datapath;
use fairway::service::ages::{SECOND, partner};
use fairway::service::maps::{Chunk, Gone, ServiceMaps as _};
use fairway::service::model::Protocol;
use fairway::service::tend::{Tended, Tender};
use fairway::sys::clock::monotonic_ns;
use fairway_ebpf_abi::{
    Addr, Backend, EVENT_TABLE_FULL, FLOW_ENDED, FLOW_ENDED_BACKEND, FLOW_ENDED_CLIENT, FLOW_FORWARD, FLOW_REVERSE,
    FLOWS, Flow, FlowKey, LAYOUT_VERSION, MAX_FLOWS, SCOPE_INSIDE, SPARE_FLOWS,
};
use socket2::{Domain, SockRef, Socket, Type};

const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
const VIP6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1)), 80);
const PATIENCE: Duration = Duration::from_secs(2);

type Table = HashMap<MapData, FlowKey, Flow>;

fn table(node: &Node) -> Table {
    let pin = node.bpffs.join(format!("fairway/v{LAYOUT_VERSION}/maps/{FLOWS}"));
    HashMap::try_from(Map::HashMap(MapData::from_pin(pin).unwrap())).unwrap()
}

fn spare(node: &Node) -> Table {
    let pin = node.bpffs.join(format!("fairway/v{LAYOUT_VERSION}/maps/{SPARE_FLOWS}"));
    HashMap::try_from(Map::LruHashMap(MapData::from_pin(pin).unwrap())).unwrap()
}

fn empty(table: &mut Table) {
    for key in table.keys().map(Result::unwrap).collect::<Vec<_>>() {
        let _ = table.remove(&key);
    }
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
    table.insert(partner(&key, &to).unwrap(), from, 0).unwrap();
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
    let another = client.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    another.send_to(b"?", VIP).unwrap();
    assert_eq!(table.keys().count(), MAX_FLOWS as usize / 4 + 2, "and now there is");
}

/// Every place in the table is somebody's.
fn fill(table: &mut Table) {
    let mut n = 0;
    while table.keys().count() < MAX_FLOWS as usize {
        for _ in 0..MAX_FLOWS / 2 {
            n += 1;
            let key = FlowKey { sport: 9, dport: 9, src: Addr::v4(n), ..FlowKey::default() };
            // An odd one fits no more.
            let _ = table.insert(key, Flow { last_used: monotonic_ns(), ..Flow::default() }, 0);
        }
    }
}

#[test]
fn a_flow_without_room_is_carried_and_stays_with_its_backend() {
    let Some(node) = Node::new("a_flow_without_room_is_carried_and_stays_with_its_backend") else { return };
    let (mut datapath, _) = node.open();
    let (client, server) = (TestPod::new(2), TestPod::new(3));
    for pod in [&client, &server] {
        pod.attach(&mut datapath, |way| way.per_packet = true);
    }
    let mut services = Services::of(&datapath);
    let sockets: Vec<_> = (0..5).map(|_| server.netns.run(|| UdpSocket::bind((server.v4, 0)).unwrap())).collect();
    let listeners: Vec<_> = (0..5).map(|_| server.netns.run(|| TcpListener::bind((server.v4, 0)).unwrap())).collect();
    let of_udp: Vec<_> = sockets.iter().map(|s| s.local_addr().unwrap()).collect();
    let of_tcp: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
    services.put(1, VIP, UDP, SCOPE_INSIDE, 0, &of_udp);
    services.put(2, VIP, TCP, SCOPE_INSIDE, 0, &of_tcp);
    let (mut table, mut spare) = (table(&node), spare(&node));
    fill(&mut table);

    // Each backend answers with its number.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (n, socket) in (0..).zip(&sockets) {
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Relaxed) {
                    if let Ok((_, from)) = socket.recv_from(&mut [0; 8]) {
                        socket.send_to(&[n], from).unwrap();
                    }
                }
            });
        }
        let asking = client.netns.run(|| udp("0.0.0.0:0", VIP));
        let ask = || {
            let mut answer = [255; 1];
            asking.send(b"?").unwrap();
            asking.recv(&mut answer).map(|_| answer[0])
        };
        let first = ask();
        let others: Vec<_> = (0..20).map(|_| ask().ok()).collect();
        let held = spare.keys().count();
        // Even these are forgotten, after each packet.
        let forgetful: Vec<_> = (0..20)
            .map(|_| {
                empty(&mut spare);
                ask().ok()
            })
            .collect();
        stop.store(true, Relaxed);
        let first = first.expect("an answer");
        assert_eq!(others, [Some(first); 20]);
        assert_eq!(held, 2, "the flow's two entries");
        assert_eq!(forgetful, [Some(first); 20]);
    });
    let full = datapath.service_events().unwrap()[EVENT_TABLE_FULL as usize];
    assert_eq!(full, 21, "told of each time");

    let stream = client.netns.run(|| TcpStream::connect_timeout(&VIP, PATIENCE)).expect("a connection");
    let accepted = listeners
        .iter()
        .find_map(|listener| {
            listener.set_nonblocking(true).unwrap();
            listener.accept().ok()
        })
        .expect("somebody has it")
        .0;
    accepted.set_nonblocking(false).unwrap();
    let payload = [7; 100_000];
    for (from, to) in [(&stream, &accepted), (&accepted, &stream)] {
        let (mut from, mut to, mut got) = (from, to, vec![0; payload.len()]);
        to.set_read_timeout(Some(PATIENCE)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || from.write_all(&payload).unwrap());
            to.read_exact(&mut got).unwrap();
        });
    }
    assert_eq!(table.keys().count(), MAX_FLOWS as usize, "nothing was taken from the others");
}

#[test]
fn a_connection_that_has_ended_leaves_no_trace_on_the_next() {
    let Some(node) = Node::new("a_connection_that_has_ended_leaves_no_trace_on_the_next") else { return };
    let (mut datapath, _) = node.open();
    let (client, server) = (TestPod::new(2), TestPod::new(3));
    for pod in [&client, &server] {
        pod.attach(&mut datapath, |way| way.per_packet = true);
    }
    let listener = server.netns.run(|| TcpListener::bind((server.v4, 0)).unwrap());
    let direct = listener.local_addr().unwrap();
    Services::of(&datapath).put(1, VIP, TCP, SCOPE_INSIDE, 0, &[direct]);
    let table = table(&node);
    let answers = || -> Vec<Flow> {
        let entries = table.iter().map(Result::unwrap);
        entries.filter(|(key, _)| key.kind == FLOW_REVERSE).map(|(_, flow)| flow).collect()
    };
    let flags_become = |expected: u16| {
        let deadline = Instant::now() + PATIENCE;
        while !matches!(answers()[..], [Flow { flags, .. }] if flags == expected) {
            assert!(Instant::now() < deadline, "{:?} instead of {expected}", answers());
            std::thread::yield_now();
        }
    };
    let mut port = None;
    // Whoever closes first; and a reset ends both.
    for who_first in ["server", "reset", "client"] {
        let to = |to: SocketAddr, port: Option<u16>| client.netns.run(move || connect_from(port, to));
        let stream = to(VIP, port).expect("a connection");
        port = Some(stream.local_addr().unwrap().port());
        let (accepted, _) = listener.accept().unwrap();
        flags_become(0);
        let (first, then, bit) = match who_first {
            "server" => (accepted, stream, FLOW_ENDED_BACKEND),
            _ => (stream, accepted, FLOW_ENDED_CLIENT),
        };
        match who_first {
            "reset" => SockRef::from(&first).set_linger(Some(Duration::ZERO)).unwrap(),
            _ => {
                first.shutdown(Shutdown::Write).unwrap();
                flags_become(bit);
                drop(then);
            }
        }
        drop(first);
        flags_become(FLOW_ENDED);
    }
    // The same ports again, to the backend itself: as nobody's Service.
    let stream = client.netns.run(move || connect_from(port, direct)).expect("answers come from where they were sent");
    listener.accept().unwrap().0.write_all(b"!").unwrap();
    (&stream).read_exact(&mut [0; 1]).unwrap();
    assert_eq!(answers(), []);
}

/// From a port that may have been used a moment ago.
fn connect_from(port: Option<u16>, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // Closing it leaves nothing behind that would keep the port.
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port.unwrap_or(0))).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
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
