//! A node in a VPC: its own ENI, a router beyond, a client from outside, a pod of
//! another node. The router lets nothing through that the ENI has no address for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use fairway::datapath::{Datapath, NodeLink, Uplink, Way};
use fairway::model::AttachMode;
use fairway_ebpf_abi::{BACKEND_LOCAL, Backend, FLOW_ANSWER, FLOW_OUTSIDE, Flow, FlowKey};

use super::{Netns, Node, Services, TestPod, ip, sysctl};

pub const PATIENCE: Duration = Duration::from_secs(3);

pub const NODE_PORT: u16 = 30_080;
/// Of the node, on its ENI.
pub const NODE4: Ipv4Addr = Ipv4Addr::new(10, 8, 0, 1);
pub const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd08, 0, 0, 0, 0, 0, 0, 1);
pub const SECOND4: Ipv4Addr = Ipv4Addr::new(10, 8, 0, 9);
/// Led to the node by the router.
pub const BALANCER4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub const BALANCER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
pub const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 2);

/// Where a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Pod,
    Elsewhere,
}

pub struct Edge {
    pub datapath: Datapath,
    pub services: Services,
    pub router: Netns,
    pub client: Netns,
    pub pod: TestPod,
    /// A pod of another node, 10.9.1.2 and fd09:1::2.
    pub elsewhere: Netns,
    pub node: Node,
}

/// A link from the router to another namespace, with a default route there.
fn link(router: &Netns, name: &str, to: &Netns, net: &str, host: u8) {
    router.run(|| {
        ip(&format!("link add {name} type veth peer name eth0 netns {}", to.path()));
        ip(&format!("addr add 10.{net}.254/24 dev {name}"));
        ip(&format!("addr add fd{}::fe/64 dev {name} nodad", six(net)));
        ip(&format!("link set {name} up"));
    });
    to.run(|| {
        ip(&format!("addr add 10.{net}.{host}/24 dev eth0"));
        ip(&format!("addr add fd{}::{host}/64 dev eth0 nodad", six(net)));
        ip("link set eth0 up");
        ip(&format!("route add default via 10.{net}.254"));
        ip(&format!("-6 route add default via fd{}::fe", six(net)));
    });
}

fn six(net: &str) -> &str {
    match net {
        "7.0" => "07",
        "8.0" => "08",
        _ => "09:1",
    }
}

impl Edge {
    pub fn new(test: &str) -> Option<Self> {
        let node = Node::new(test)?;
        let (router, client, elsewhere) = (Netns::new(), Netns::new(), Netns::new());
        // Addresses are good at once, or first packets would be sent again.
        let at_once = || sysctl("ipv6/conf/default/accept_dad", "0");
        at_once();
        for netns in [&router, &client, &elsewhere] {
            netns.run(at_once);
        }
        router.run(|| {
            // Every packet that is too big is told of.
            sysctl("ipv4/icmp_ratelimit", "0");
            sysctl("ipv6/icmp/ratelimit", "0");
            sysctl("ipv4/ip_forward", "1");
            sysctl("ipv6/conf/all/forwarding", "1");
            // As a VPC does: from the node's ENI only what is led there.
            sysctl("ipv4/conf/all/rp_filter", "1");
            sysctl("ipv4/conf/default/rp_filter", "1");
        });
        link(&router, "client", &client, "7.0", 2);
        link(&router, "elsewhere", &elsewhere, "9.1", 2);
        sysctl("ipv4/ip_forward", "1");
        ip(&format!("link add up0 type veth peer name node netns {}", router.path()));
        ip(&format!("addr add {NODE4}/24 dev up0"));
        ip(&format!("addr add {SECOND4}/24 dev up0"));
        ip(&format!("addr add {NODE6}/64 dev up0 nodad"));
        router.run(|| {
            ip("addr add 10.8.0.254/24 dev node");
            ip("addr add fd08::fe/64 dev node nodad");
            ip("link set node up");
            ip(&format!("route add {BALANCER4}/32 via {NODE4}"));
            ip(&format!("-6 route add {BALANCER6}/128 via {NODE6}"));
        });
        ip("link set up0 up");
        ip("route add default via 10.8.0.254");
        ip("-6 route add default via fd08::fe");
        let (mut datapath, _) = node.open();
        let pod = TestPod::new(2);
        pod.attach(&mut datapath, |way| way.eni = Some(index("up0")));
        let own = [NODE4.into(), SECOND4.into(), NODE6.into(), IpAddr::from([127, 0, 0, 1])];
        datapath.set_node_addresses(&own).unwrap();
        datapath.set_uplink(Some(uplink())).unwrap();
        let services = Services::of(&datapath);
        Some(Self { datapath, services, router, client, pod, elsewhere, node })
    }

    /// Makes the pod elsewhere one of this node, with an ENI of its own and a link to
    /// the node, as the wirer does.
    pub fn exclusive(&mut self) {
        ip(&format!(
            "link add xl0 address 02:00:00:00:03:01 type veth peer name node0 address 02:00:00:00:03:02 netns {}",
            self.elsewhere.path()
        ));
        ip("link set xl0 up");
        self.elsewhere.run(|| {
            sysctl("ipv4/conf/node0/rp_filter", "2");
            ip("addr add 10.9.1.2/32 dev node0");
            ip("link set node0 up");
            for (gateway, own, to) in [
                ("169.254.1.1", "10.9.1.2", NODE4.to_string()),
                ("169.254.1.1", "10.9.1.2", SECOND4.to_string()),
                ("fe80::1", "fd09:1::2", NODE6.to_string()),
            ] {
                ip(&format!("neigh replace {gateway} lladdr 02:00:00:00:03:01 dev node0 nud permanent"));
                let family = if gateway.contains(':') { "-6 " } else { "" };
                ip(&format!("{family}route add {to} via {gateway} dev node0 onlink src {own}"));
            }
        });
        for (family, own) in [("", "10.9.1.2"), ("-6 ", "fd09:1::2")] {
            ip(&format!("{family}route add {own} dev xl0"));
            ip(&format!("neigh replace {own} lladdr 02:00:00:00:03:02 dev xl0 nud permanent"));
        }
        let id = super::attachment("own");
        self.datapath.attach(&id, AttachMode::Exclusive, self.elsewhere.device("eth0")).unwrap();
        let way = Way {
            v4: Ipv4Addr::new(10, 9, 1, 2),
            v6: Some(Ipv6Addr::new(0xfd09, 1, 0, 0, 0, 0, 0, 2)),
            gateway4: Ipv4Addr::new(10, 9, 1, 254),
            gateway6: None,
            eni: None,
            node_link: Some(NodeLink {
                in_node: index("xl0"),
                in_pod: self.elsewhere.run(|| index("node0")),
                gateway4: Ipv4Addr::new(169, 254, 1, 1),
                gateway6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
            }),
            cookie: Some(self.elsewhere.cookie()),
            netns: None,
            per_packet: false,
            short: false,
            limited: false,
        };
        self.datapath.lead(&id, &way).unwrap();
        self.datapath.attach_link(index("xl0")).unwrap();
    }

    /// The namespace and the address of a backend.
    pub fn backend(&self, at: At, like: IpAddr, port: u16) -> (&Netns, SocketAddr) {
        let (netns, addr): (_, IpAddr) = match (at, like) {
            (At::Pod, IpAddr::V4(_)) => (&self.pod.netns, self.pod.v4.into()),
            (At::Pod, IpAddr::V6(_)) => (&self.pod.netns, self.pod.v6.into()),
            (At::Elsewhere, IpAddr::V4(_)) => (&self.elsewhere, [10, 9, 1, 2].into()),
            (At::Elsewhere, IpAddr::V6(_)) => (&self.elsewhere, [0xfd09, 1, 0, 0, 0, 0, 0, 2].into()),
        };
        (netns, SocketAddr::new(addr, port))
    }

    pub fn tcp_server(&self, at: At, like: IpAddr) -> TcpListener {
        let (netns, to) = self.backend(at, like, 8080);
        netns.run(|| TcpListener::bind(to).unwrap())
    }

    pub fn udp_server(&self, at: At, like: IpAddr) -> UdpSocket {
        let (netns, to) = self.backend(at, like, 5353);
        netns.run(|| udp(to))
    }

    pub fn connect(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        let stream = self.client.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// A client's socket, connected: only who was asked may answer.
    pub fn asking(&self, to: SocketAddr) -> UdpSocket {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        let socket = self.client.run(|| udp(any));
        socket.connect(to).unwrap();
        socket
    }

    pub fn event(&self, which: u32) -> u64 {
        self.datapath.service_events().unwrap()[which as usize]
    }

    /// The flows of clients from outside, and their answers.
    pub fn flows(&self) -> Flows {
        let pin = self.node.bpffs.join(format!("fairway/v{}/maps/FLOWS", fairway_ebpf_abi::LAYOUT_VERSION));
        let map = aya::maps::MapData::from_pin(pin).unwrap();
        Flows(aya::maps::HashMap::try_from(aya::maps::Map::HashMap(map)).unwrap())
    }
}

pub struct Flows(pub aya::maps::HashMap<aya::maps::MapData, FlowKey, Flow>);

impl Flows {
    /// The only flow's entries: the client's way, and the answer's.
    #[track_caller]
    pub fn only(&self) -> [(FlowKey, Flow); 2] {
        let all: Vec<_> = self.0.iter().collect::<Result<_, _>>().unwrap();
        assert_eq!(all.len(), 2, "{all:?}");
        [FLOW_OUTSIDE, FLOW_ANSWER].map(|kind| *all.iter().find(|(k, _)| k.kind == kind).unwrap())
    }
}

pub fn uplink() -> Uplink {
    Uplink { ifindex: index("up0"), v4: Some(NODE4), v6: Some(NODE6) }
}

pub fn index(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).unwrap()
}

fn udp(at: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(at).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// As the compiler marks backends of this node.
pub fn local(backends: &mut [Backend]) {
    backends.iter_mut().for_each(|b| b.flags |= BACKEND_LOCAL);
}

/// What a node port's frontend is at.
pub fn any_node(like: IpAddr) -> SocketAddr {
    let any: IpAddr = if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, NODE_PORT)
}
