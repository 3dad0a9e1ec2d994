//! Network namespaces, a BPF file system and Services of a test's own, made on
//! its thread and gone with it: nothing has a name, nothing is left behind.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod crafted;
pub mod edge;

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::Command;

use fairway::datapath::services::KernelMaps;
use fairway::datapath::{Adoption, Datapath, Device, Way, cgroup_root};
use fairway::model::{AttachMode, AttachmentId};
use fairway::service::maps::{Chunk, ServiceMaps as _};
use fairway_ebpf_abi::{Backend, Frontend, FrontendKey, SlotKey};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

pub fn skipped(test: &str, missing: &str) {
    println!("SKIPPED: {test}: {missing}");
    if let Some(file) = std::env::var_os("FAIRWAY_SKIPPED") {
        let mut file = OpenOptions::new().create(true).append(true).open(file).unwrap();
        writeln!(file, "SKIPPED: {test}: {missing}").unwrap();
    }
}

pub fn ip(args: &str) {
    let done = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "ip {args}: {}", String::from_utf8_lossy(&done.stderr));
}

pub fn sysctl(path: &str, value: &str) {
    fs::write(format!("/proc/sys/net/{path}"), value).unwrap();
}

/// The thread's own network and mount namespace, which plays the node.
pub struct Node {
    pub bpffs: PathBuf,
    _mount_point: tempfile::TempDir,
}

impl Node {
    /// `None`, and counted as skipped, when the machine cannot do that.
    pub fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skipped(test, "root");
            return None;
        }
        if !fs::read_to_string("/proc/filesystems").unwrap().contains("\tbpf\n") {
            skipped(test, "the bpf file system");
            return None;
        }
        if cgroup_root(None).is_err() {
            skipped(test, "a cgroup v2 tree");
            return None;
        }
        let mount_point = tempfile::tempdir().unwrap();
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        mount(Some("bpf"), mount_point.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        ip("link set lo up");
        Some(Self { bpffs: mount_point.path().to_owned(), _mount_point: mount_point })
    }

    pub fn open(&self) -> (Datapath, Adoption) {
        Datapath::open(&self.bpffs).unwrap()
    }

    /// A datapath that resolves Services at the socket.
    pub fn with_sockets(&self) -> Datapath {
        let (mut datapath, _) = self.open();
        datapath.attach_sockets(&cgroup_root(None).unwrap()).unwrap();
        datapath
    }
}

/// A network namespace without a name; it ends with this value.
pub struct Netns(File);

impl Netns {
    pub fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        Self(std::thread::scope(|s| s.spawn(make).join().unwrap()))
    }

    pub fn run<R: Send>(&self, job: impl FnOnce() -> R + Send) -> R {
        let inside = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            job()
        };
        std::thread::scope(|s| s.spawn(inside).join().unwrap())
    }

    /// As `ip link set … netns` takes it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    pub fn device<'a>(&'a self, name: &'a str) -> Device<'a> {
        Device::named(name).inside(self.0.as_fd())
    }

    pub fn cookie(&self) -> u64 {
        self.run(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            fairway::sys::netns::cookie_of(socket.as_fd()).unwrap().unwrap()
        })
    }
}

pub fn attachment(sandbox: &str) -> AttachmentId {
    AttachmentId { sandbox: sandbox.into(), ifname: "eth0".into() }
}

/// A routed pod as the wirer makes it: 10.9.0.`n` and fd09::`n`, behind `pod<n>`.
pub struct TestPod {
    pub netns: Netns,
    pub host: String,
    pub v4: std::net::Ipv4Addr,
    pub v6: std::net::Ipv6Addr,
}

impl TestPod {
    pub fn new(n: u8) -> Self {
        let netns = Netns::new();
        let host = format!("pod{n}");
        ip(&format!(
            "link add {host} address 02:00:00:00:01:{n:02x} type veth peer name eth0 address 02:00:00:00:02:{n:02x} netns {}",
            netns.path()
        ));
        sysctl(&format!("ipv4/conf/{host}/forwarding"), "1");
        sysctl("ipv6/conf/all/forwarding", "1");
        ip(&format!("link set {host} up"));
        netns.run(|| {
            ip(&format!("addr add 10.9.0.{n}/32 dev eth0"));
            ip(&format!("addr add fd09::{n:x}/128 dev eth0 nodad"));
            ip("link set eth0 up");
            for gateway in ["169.254.1.1", "fe80::1"] {
                ip(&format!("neigh replace {gateway} lladdr 02:00:00:00:01:{n:02x} dev eth0 nud permanent"));
            }
            ip("route add default via 169.254.1.1 dev eth0 onlink");
            ip("-6 route add default via fe80::1 dev eth0 onlink");
        });
        ip(&format!("route add 10.9.0.{n}/32 dev {host}"));
        ip(&format!("-6 route add fd09::{n:x}/128 dev {host}"));
        for at in [format!("10.9.0.{n}"), format!("fd09::{n:x}")] {
            ip(&format!("neigh replace {at} lladdr 02:00:00:00:02:{n:02x} dev {host} nud permanent"));
        }
        let pod = Self {
            netns,
            host,
            v4: std::net::Ipv4Addr::new(10, 9, 0, n),
            v6: std::net::Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, n.into()),
        };
        pod.wait();
        pod
    }

    /// Returns when the kernel has activated the queues of both sides.
    fn wait(&self) {
        let up = |device: &str| {
            let shown = Command::new("ip").args(["-o", "link", "show", "dev", device]).output().unwrap();
            String::from_utf8_lossy(&shown.stdout).contains(" state UP ")
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !(up(&self.host) && self.netns.run(|| up("eth0"))) {
            assert!(std::time::Instant::now() < deadline, "{} does not come up", self.host);
        }
    }

    pub fn sandbox(&self) -> &str {
        &self.host
    }

    /// Its programs, and what they know of it.
    pub fn attach(&self, datapath: &mut Datapath, change: impl FnOnce(&mut Way)) {
        let id = attachment(self.sandbox());
        datapath.attach(&id, AttachMode::Veth, Device::named(&self.host)).unwrap();
        let mut way = Way {
            v4: self.v4,
            v6: Some(self.v6),
            gateway4: std::net::Ipv4Addr::new(10, 9, 1, 253),
            gateway6: None,
            eni: Some(1),
            node_link: None,
            cookie: Some(self.netns.cookie()),
            netns: None,
            per_packet: false,
            short: true,
            limited: false,
        };
        change(&mut way);
        datapath.lead(&id, &way).unwrap();
    }
}

/// Writes Services by hand.
pub struct Services {
    pub maps: KernelMaps,
    next_id: u32,
}

impl Services {
    pub fn of(datapath: &Datapath) -> Self {
        Self { maps: datapath.service_maps().unwrap(), next_id: 1 }
    }

    /// A frontend with a set of its own, as the value of `set`.
    pub fn put(
        &mut self,
        set: u32,
        at: SocketAddr,
        protocol: u8,
        scope: u8,
        flags: u32,
        backends: &[SocketAddr],
    ) -> Vec<Backend> {
        let backends: Vec<Backend> = backends
            .iter()
            .map(|to| {
                self.next_id += 1;
                Backend { addr: to.ip().into(), port: to.port().to_be(), flags: 0, id: self.next_id }
            })
            .collect();
        let slots: Vec<_> =
            backends.iter().enumerate().map(|(slot, b)| (SlotKey { set, slot: slot as u32 }, *b)).collect();
        self.maps.apply(Chunk::PutBackends(&backends)).unwrap();
        self.maps.apply(Chunk::PutSlots(&slots)).unwrap();
        let affinity_seconds = 10_800;
        let value = Frontend { set, count: backends.len() as u32, flags, affinity_seconds };
        self.maps.apply(Chunk::PutFrontends(&[(key(at, protocol, scope), value)])).unwrap();
        backends
    }
}

pub fn key(at: SocketAddr, protocol: u8, scope: u8) -> FrontendKey {
    FrontendKey { addr: at.ip().into(), port: at.port().to_be(), protocol, scope }
}
