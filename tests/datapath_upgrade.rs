//! Promise: a build whose maps have another layout takes over from the last one
//! without a gap: what is the same is shared, what has changed is filled before the
//! new programs run, flows stay with their backends; also after a crash half way,
//! and on the way back.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use aya::maps::MapInfo;
use datapath_support::{Node, Services, TCP, TestPod, UDP};
use fairway::datapath::upgrade::{Converter, Layout};
use fairway::datapath::{Adoption, Datapath, Options, cgroup_root};
use fairway::service::maps::{Chunk, ServiceMaps as _};
use fairway_ebpf_abi::{
    BACKENDS, FLOWS, FRONTENDS, LAYOUT_VERSION, LINKS, NAMESPACES, PODS, SCOPE_INSIDE, SLOTS, SOURCE_RANGES, SlotKey,
};

const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
const PATIENCE: Duration = Duration::from_secs(2);
const NEXT: u32 = LAYOUT_VERSION + 1;
const FLOWS_AS_THEY_ARE: Converter =
    Converter { map: FLOWS, from: LAYOUT_VERSION, to: NEXT, entry: |k, v| Some((k.to_vec(), v.to_vec())) };

fn layout(version: u32, changed: &'static [&'static str], converters: &'static [Converter]) -> Layout {
    Layout { version, changed, converters }
}

/// A node with a Service of two backends, reached by a pod's datagrams and by the
/// node's connections.
struct World {
    client: TestPod,
    socket: UdpSocket,
    servers: [(TestPod, UdpSocket); 2],
    listener: TcpListener,
    node: Node,
}

impl World {
    fn new(test: &str) -> Option<Self> {
        let node = Node::new(test)?;
        let client = TestPod::new(2);
        let socket = client.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let servers = [3, 4].map(|n| {
            let pod = TestPod::new(n);
            let socket = pod.netns.run(|| UdpSocket::bind((pod.v4, 8080)).unwrap());
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            (pod, socket)
        });
        let listener = TcpListener::bind("127.0.0.2:0").unwrap();
        Some(Self { client, socket, servers, listener, node })
    }

    fn open(&self, layout: Layout) -> (Datapath, Adoption) {
        let (mut datapath, adoption) = Datapath::open_as(&self.node.bpffs, Options::default(), layout).unwrap();
        datapath.attach_sockets(&cgroup_root(None).unwrap()).unwrap();
        (datapath, adoption)
    }

    fn begin(&self) -> Datapath {
        let (mut datapath, _) = self.open(Layout::CURRENT);
        self.client.attach(&mut datapath, |way| way.short = false);
        let mut services = Services::of(&datapath);
        let to: Vec<SocketAddr> = self.servers.iter().map(|(_, s)| s.local_addr().unwrap()).collect();
        services.put(1, VIP, UDP, SCOPE_INSIDE, 0, &to);
        services.put(2, VIP, TCP, SCOPE_INSIDE, 0, &[self.listener.local_addr().unwrap()]);
        datapath
    }

    /// What a sync and a wiring do: the same Services with the same ids, but every
    /// flow without state would go to the other backend.
    fn fill(&self, datapath: &mut Datapath) {
        self.client.attach(datapath, |way| way.short = false);
        let mut services = Services::of(datapath);
        let to: Vec<SocketAddr> = self.servers.iter().map(|(_, s)| s.local_addr().unwrap()).collect();
        let mut backends = services.put(1, VIP, UDP, SCOPE_INSIDE, 0, &to);
        backends.reverse();
        let slots: Vec<_> = (0..).zip(&backends).map(|(slot, b)| (SlotKey { set: 1, slot }, *b)).collect();
        services.maps.apply(Chunk::PutSlots(&slots)).unwrap();
        services.put(2, VIP, TCP, SCOPE_INSIDE, 0, &[self.listener.local_addr().unwrap()]);
    }

    /// Whom the flow reaches, and that the answer comes from the Service.
    #[track_caller]
    fn ask(&self) -> usize {
        self.socket.send_to(b"?", VIP).unwrap();
        for (n, (_, server)) in self.servers.iter().enumerate() {
            server.set_nonblocking(true).unwrap();
            if let Ok((_, from)) = server.recv_from(&mut [0; 8]) {
                server.send_to(b"!", from).unwrap();
                assert_eq!(self.socket.recv_from(&mut [0; 8]).unwrap().1, VIP);
                return n;
            }
        }
        panic!("nobody was reached");
    }

    #[track_caller]
    fn connect(&self) {
        TcpStream::connect_timeout(&VIP, PATIENCE).unwrap();
        self.listener.accept().unwrap();
    }

    fn layouts(&self) -> Vec<String> {
        let names = fs::read_dir(self.node.bpffs.join("fairway")).unwrap();
        let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn maps(&self, version: u32) -> BTreeMap<String, u32> {
        let dir = fs::read_dir(self.node.bpffs.join(format!("fairway/v{version}/maps"))).unwrap();
        let id = |path: std::path::PathBuf| {
            let id = MapInfo::from_pin(&path).unwrap().id();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), id)
        };
        dir.map(|e| id(e.unwrap().path())).collect()
    }
}

#[test]
fn maps_that_are_the_same_are_shared_and_nothing_is_waited_for() {
    let Some(world) = World::new("maps_that_are_the_same_are_shared_and_nothing_is_waited_for") else { return };
    let datapath = world.begin();
    let first = world.ask();
    let maps = world.maps(LAYOUT_VERSION);
    drop(datapath);
    let (datapath, adoption) = world.open(layout(NEXT, &[], &[]));
    assert!(!adoption.awaits.any() && !datapath.is_held(), "{adoption:?}");
    assert_eq!(adoption.adopted.len(), 1);
    assert_eq!((world.maps(NEXT), world.layouts()), (maps, vec![format!("v{NEXT}")]));
    assert_eq!(datapath.socket_doors().len(), 8);
    world.connect();
    assert_eq!(world.ask(), first);
}

const CHANGED: &[&str] = &[FRONTENDS, LINKS, FLOWS];

#[test]
fn earlier_programs_stay_in_force_until_the_new_maps_are_filled_and_flows_stay() {
    let test = "earlier_programs_stay_in_force_until_the_new_maps_are_filled_and_flows_stay";
    let Some(world) = World::new(test) else { return };
    let datapath = world.begin();
    let first = world.ask();
    let maps = world.maps(LAYOUT_VERSION);
    let programs = datapath.attached().unwrap()[0].programs;
    drop(datapath);
    let (mut datapath, adoption) = world.open(layout(NEXT, CHANGED, &[FLOWS_AS_THEY_ARE]));
    assert!(adoption.awaits.services && adoption.awaits.pods && datapath.is_held(), "{adoption:?}");
    let now = world.maps(NEXT);
    let anew: Vec<&str> = now.iter().filter(|(name, id)| maps[*name] != **id).map(|(name, _)| &**name).collect();
    let mut expected = [FRONTENDS, SLOTS, BACKENDS, SOURCE_RANGES, LINKS, PODS, NAMESPACES, FLOWS];
    expected.sort_unstable();
    assert_eq!(anew, expected, "with what speaks of them");
    // Nothing is known yet: the old programs go on by the old maps.
    let carry_on = |datapath: &Datapath| {
        assert_eq!(datapath.attached().unwrap()[0].programs, programs);
        world.connect();
        assert_eq!(world.ask(), first);
    };
    carry_on(&datapath);
    world.fill(&mut datapath);
    carry_on(&datapath);
    // A flow that began meanwhile stays too.
    let second = world.client.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    let world = World { socket: second, ..world };
    let later = world.ask();

    assert_eq!(datapath.take_over().unwrap(), Vec::<String>::new());
    assert_ne!(datapath.attached().unwrap()[0].programs, programs);
    assert_eq!(world.layouts(), [format!("v{NEXT}")]);
    world.connect();
    assert_eq!(world.ask(), later);
}

#[test]
fn a_start_after_a_crash_half_way_goes_on_and_so_does_the_way_back() {
    let test = "a_start_after_a_crash_half_way_goes_on_and_so_does_the_way_back";
    let Some(world) = World::new(test) else { return };
    drop(world.begin());
    let first = world.ask();
    let next = || layout(NEXT, CHANGED, &[FLOWS_AS_THEY_ARE]);
    let (datapath, _) = world.open(next());
    drop(datapath);
    world.connect();
    assert_eq!(world.ask(), first);
    let (mut datapath, adoption) = world.open(next());
    assert!(adoption.awaits.any() && datapath.is_held());
    world.fill(&mut datapath);
    drop(datapath);
    world.connect();
    assert_eq!(world.ask(), first);
    // Back to what it was: its maps are still there, and in force.
    let (mut datapath, _) = world.open(Layout::CURRENT);
    if datapath.is_held() {
        datapath.take_over().unwrap();
    }
    world.connect();
    assert_eq!((world.ask(), world.layouts()), (first, vec![format!("v{LAYOUT_VERSION}")]));
}

#[test]
fn a_node_without_pods_waits_for_nothing() {
    let Some(node) = Node::new("a_node_without_pods_waits_for_nothing") else { return };
    drop(node.open());
    let (datapath, adoption) = Datapath::open_as(&node.bpffs, Options::default(), layout(NEXT, CHANGED, &[])).unwrap();
    assert!(!datapath.is_held() && !adoption.awaits.any());
}
