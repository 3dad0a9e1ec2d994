//! Promise: what the packet path drops or refuses is told, a sample of it, with
//! whose packet it was; never at a packet's cost, and not too often.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use datapath_support::{Node, Services, TestPod, UDP};
use fairway::datapath::{Datapath, samples::Samples};
use fairway_ebpf_abi::{
    EVENT_NOT_ADMITTED, EVENT_REFUSED, EVENT_SPOOFED, FRONTEND_RANGES, SAMPLE_INTERVAL, SCOPE_INSIDE, Sample,
};

const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 53);
const CLOSED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 2)), 53);

struct World {
    datapath: Datapath,
    pod: TestPod,
    services: Services,
    _node: Node,
}

impl World {
    fn new(test: &str) -> Option<Self> {
        let node = Node::new(test)?;
        let (mut datapath, _) = node.open();
        let pod = TestPod::new(2);
        pod.attach(&mut datapath, |_| {});
        let services = Services::of(&datapath);
        Some(Self { datapath, pod, services, _node: node })
    }

    fn socket(&self, at: impl std::net::ToSocketAddrs + Send) -> UdpSocket {
        self.pod.netns.run(|| UdpSocket::bind(at).unwrap())
    }
}

fn all(samples: &mut Samples) -> Vec<Sample> {
    std::iter::from_fn(|| samples.take()).collect()
}

fn ends(sample: &Sample) -> (SocketAddr, SocketAddr) {
    let at = |addr, port| SocketAddr::new(IpAddr::from(addr), u16::from_be(port));
    (at(sample.src, sample.sport), at(sample.dst, sample.dport))
}

#[test]
fn a_dropped_packet_is_told_with_its_pod_and_its_ends() {
    let Some(mut world) = World::new("a_dropped_packet_is_told_with_its_pod_and_its_ends") else { return };
    world.pod.netns.run(|| datapath_support::ip("addr add 10.9.0.77/32 dev eth0"));
    world.services.put(1, VIP, UDP, SCOPE_INSIDE, FRONTEND_RANGES, &["10.9.0.3:53".parse().unwrap()]);
    world.services.put(2, CLOSED, UDP, SCOPE_INSIDE, 0, &[]);
    let mut samples = world.datapath.samples().unwrap();
    assert_eq!(samples.take(), None);
    let own = world.socket("10.9.0.2:0");
    let spoofed = world.socket("10.9.0.77:0");
    for (socket, to, what) in
        [(&own, VIP, EVENT_NOT_ADMITTED), (&own, CLOSED, EVENT_REFUSED), (&spoofed, VIP, EVENT_SPOOFED)]
    {
        socket.send_to(b"?", to).unwrap();
        let told = all(&mut samples);
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0].what, what);
        assert_eq!(ends(&told[0]), (socket.local_addr().unwrap(), to));
        assert_eq!((told[0].protocol, told[0].untold), (UDP.into(), 0));
        assert_eq!(told[0].endpoint, nix::net::if_::if_nametoindex(&*world.pod.host).unwrap());
        assert!(told[0].time > 0);
    }
}

#[test]
fn many_drops_are_few_samples_that_say_how_many_were_left_out() {
    let Some(mut world) = World::new("many_drops_are_few_samples_that_say_how_many_were_left_out") else { return };
    world.services.put(1, CLOSED, UDP, SCOPE_INSIDE, 0, &[]);
    let mut samples = world.datapath.samples().unwrap();
    let socket = world.socket("10.9.0.2:0");
    let refused = |world: &World| world.datapath.service_events().unwrap()[EVENT_REFUSED as usize];
    let mut told = Vec::new();
    let began = std::time::Instant::now();
    // On any number of CPUs each tells again after a while.
    while told.iter().map(|s: &Sample| s.untold).sum::<u32>() == 0 {
        socket.send_to(b"?", CLOSED).unwrap();
        told.extend(all(&mut samples));
        assert!(began.elapsed() < Duration::from_secs(10), "{told:?}");
    }
    let most = u64::try_from(began.elapsed().as_nanos()).unwrap() / SAMPLE_INTERVAL + 1;
    let cpus = std::thread::available_parallelism().unwrap().get() as u64;
    let count = told.len() as u64;
    assert!(count <= most * cpus, "{count} samples in {:?}", began.elapsed());
    let untold: u64 = told.iter().map(|s| u64::from(s.untold)).sum();
    assert!(refused(&world) >= untold + count && untold > 0);
}

#[test]
fn a_reader_that_waits_is_woken_and_a_later_one_finds_what_nobody_read() {
    let test = "a_reader_that_waits_is_woken_and_a_later_one_finds_what_nobody_read";
    let Some(mut world) = World::new(test) else { return };
    world.services.put(1, CLOSED, UDP, SCOPE_INSIDE, 0, &[]);
    let socket = world.socket("10.9.0.2:0");
    // Before anybody has opened it, as while an agent is away.
    socket.send_to(b"?", CLOSED).unwrap();
    let samples = world.datapath.samples().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut listening = samples.listen().unwrap();
        let patience = Duration::from_secs(5);
        let first = tokio::time::timeout(patience, listening.next()).await.unwrap().unwrap();
        assert_eq!(first.what, EVENT_REFUSED);
        let second = listening.next();
        tokio::pin!(second);
        let idle = tokio::time::timeout(Duration::from_nanos(SAMPLE_INTERVAL), &mut second).await;
        assert!(idle.is_err(), "nothing has happened");
        socket.send_to(b"?", CLOSED).unwrap();
        let second = tokio::time::timeout(patience, second).await.unwrap().unwrap();
        assert!(second.time > first.time);
    });
}
