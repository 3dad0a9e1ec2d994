//! Where a subject lives: two nodes with a cable between them, a client pod and
//! two server pods on the first, two server pods on the second.
//!
//! Pods are routed, without a bridge, as Fairway and others wire them. Nothing
//! has a name: the namespaces are this process's descriptors and end with it,
//! also when it is killed.

use std::fs::File;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use nix::sched::{CloneFlags, setns, unshare};

use crate::bench::network::traffic::Server;

/// The pods' range, on every node.
pub const POD_CIDR: &str = "10.128.0.0/9";
/// Services' addresses, as the lab's API server has them.
pub const SERVICE_CIDR: &str = "172.21.0.0/16";
/// The pods' gateway, as they see it.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// A network namespace without a name.
pub struct Space(File);

impl Space {
    pub fn new() -> anyhow::Result<Self> {
        let make = || -> anyhow::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
            ip("link set lo up")?;
            // A new namespace may take these from the machine's own.
            for (name, value) in [("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")] {
                sysctl(name, value)?;
            }
            Ok(File::open("/proc/thread-self/ns/net")?)
        };
        let made = std::thread::scope(|scope| scope.spawn(make).join());
        made.unwrap_or_else(|_| anyhow::bail!("the thread that makes a namespace panicked")).map(Self)
    }

    /// Run `job` in it.
    pub fn run<R: Send>(&self, job: impl FnOnce() -> anyhow::Result<R> + Send) -> anyhow::Result<R> {
        let inside = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)?;
            job()
        };
        let done = std::thread::scope(|scope| scope.spawn(inside).join());
        done.unwrap_or_else(|_| anyhow::bail!("the thread in a namespace panicked"))
    }

    /// Put the calling thread into it, for good.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }

    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    pub fn cookie(&self) -> anyhow::Result<Option<u64>> {
        self.run(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
            Ok(crate::sys::netns::cookie_of(socket.as_fd())?)
        })
    }
}

/// A pod behind `link` of its node.
pub struct Pod {
    pub space: Space,
    pub address: Ipv4Addr,
    pub link: String,
}

/// A node: its namespace, the address of its ENI, its pods.
pub struct Node {
    pub space: Space,
    pub eni: Ipv4Addr,
    /// The other one's, which is the way to all that is not here.
    pub gateway: Ipv4Addr,
    pub pods: Vec<Pod>,
}

/// The device towards the other node.
pub const ENI: &str = "eni0";

/// Both nodes and the servers in their pods.
pub struct Place {
    /// The client's and the servers' of one node.
    pub near: Node,
    pub far: Node,
    near_servers: Vec<Server>,
    far_servers: Vec<Server>,
}

impl Place {
    pub fn build() -> anyhow::Result<Self> {
        let mut nodes = [Node::new(1, 2)?, Node::new(2, 1)?];
        let [near, far] = &nodes;
        let far_path = far.space.path();
        near.space.run(|| {
            ip(&format!("link add {ENI} mtu 1500 type veth peer name {ENI} mtu 1500 netns {}", far_path.display()))
        })?;
        for node in &nodes {
            node.connect()?;
        }
        nodes[0].pods = vec![nodes[0].pod(2)?, nodes[0].pod(3)?, nodes[0].pod(4)?];
        nodes[1].pods = vec![nodes[1].pod(3)?, nodes[1].pod(4)?];
        let serve = |pod: &Pod| Server::start(&pod.space.path(), IpAddr::V4(pod.address));
        let [near, far] = nodes;
        let near_servers = near.pods[1..].iter().map(serve).collect::<Result<_, _>>()?;
        let far_servers = far.pods.iter().map(serve).collect::<Result<_, _>>()?;
        Ok(Self { near, far, near_servers, far_servers })
    }

    pub fn client(&self) -> PathBuf {
        self.near.pods[0].space.path()
    }

    /// The servers that are so many nodes apart: on the client's node, or the other.
    pub fn servers(&self, nodes: usize) -> Vec<&Server> {
        if nodes == 1 { self.near_servers.iter() } else { self.far_servers.iter() }.collect()
    }
}

/// Addresses of those servers, the same in every place.
pub fn backends(nodes: usize) -> [Ipv4Addr; 2] {
    let node = if nodes == 1 { 1 } else { 2 };
    [3, 4].map(|pod| pod_address(node, pod))
}

fn pod_address(node: u8, pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 128, node, pod)
}

impl Node {
    fn new(number: u8, other: u8) -> anyhow::Result<Self> {
        let eni = |n| Ipv4Addr::new(10, 8, 0, n);
        let space = Space::new()?;
        space.run(|| sysctl("ip_forward", "1"))?;
        Ok(Self { space, eni: eni(number), gateway: eni(other), pods: Vec::new() })
    }

    fn connect(&self) -> anyhow::Result<()> {
        let gateway = self.gateway;
        self.space.run(|| {
            ip(&format!("addr add {}/24 dev {ENI}", self.eni))?;
            ip(&format!("link set {ENI} up"))?;
            ip(&format!("route add 10.128.{}.0/24 via {gateway} dev {ENI}", gateway.octets()[3]))
        })
    }

    fn pod(&self, pod: u8) -> anyhow::Result<Pod> {
        let address = pod_address(self.eni.octets()[3], pod);
        let link = format!("pod{pod}");
        let (host_mac, pod_mac) = (format!("02:00:00:00:01:{pod:02x}"), format!("02:00:00:00:02:{pod:02x}"));
        let space = Space::new()?;
        let path = space.path();
        self.space.run(|| {
            ip(&format!(
                "link add {link} address {host_mac} mtu 1500 type veth peer name eth0 address {pod_mac} mtu 1500 netns {}",
                path.display()
            ))?;
            ip(&format!("link set {link} up"))
        })?;
        space.run(|| {
            ip(&format!("addr add {address}/32 dev eth0"))?;
            ip("link set eth0 up")?;
            ip(&format!("neigh replace {GATEWAY} lladdr {host_mac} dev eth0 nud permanent"))?;
            ip(&format!("route add default via {GATEWAY} dev eth0 onlink"))?;
            sysctl("ip_local_port_range", "10000 65000")
        })?;
        self.space.run(|| {
            ip(&format!("route add {address}/32 dev {link}"))?;
            ip(&format!("neigh replace {address} lladdr {pod_mac} dev {link} nud permanent"))
        })?;
        Ok(Pod { space, address, link })
    }
}

/// In the calling thread's namespace.
pub fn sysctl(name: &str, value: &str) -> anyhow::Result<()> {
    let path = format!("/proc/sys/net/ipv4/{name}");
    std::fs::write(&path, value).with_context(|| path)
}

pub fn ip(arguments: &str) -> anyhow::Result<()> {
    tool("ip", arguments, "").map(drop)
}

/// Run a program with `input`; its output.
pub fn tool(program: &str, arguments: &str, input: &str) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments.split_whitespace()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{program} cannot be started"))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    // It may say something before it has read all.
    let output = std::thread::scope(|scope| {
        // When it ends early its message says why.
        scope.spawn(move || drop(stdin.write_all(input.as_bytes())));
        child.wait_with_output()
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{program} {arguments}: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
