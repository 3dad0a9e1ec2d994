//! A node, a router and pods as namespaces of this test alone.
//!
//! Every name begins with `fwt-<pid>-`; what a test made goes with its `Lab`,
//! also when it fails. The test's thread lives in the node's namespace, and so do
//! the actor's threads, which it starts.

#[path = "../support/skip.rs"]
mod skipping;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use fairway::actor::{AskError, ChildPolicy, Deadline, Handle, Handles, Message, Placement, Registry, Tree};
use fairway::model::{AttachMode, AttachmentId, Bandwidth, EniId, EniRef, Lease, Mac, PodKey, Subnet, VSwitchId};
use fairway::netns::{Config, NetnsWirer, NoPrograms, PodPrograms, Wiring};
use fairway::sys::netns::Netns;
pub use skipping::skip;

/// An address outside the node, behind the router.
pub const OUTSIDE4: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
pub const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 9);
/// The node's own address, on its primary ENI (device eth0).
pub const NODE4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
pub const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x10);

/// True (and said) when this machine cannot run the test.
pub fn skipped(test: &str) -> bool {
    let missing = if !nix::unistd::geteuid().is_root() {
        "root"
    } else if Command::new("ip").arg("-V").stdout(Stdio::null()).status().is_err() {
        "the program ip (iproute2)"
    } else {
        return false;
    };
    skip(test, missing);
    true
}

/// True (and said) when this kernel cannot limit bandwidth as the test wants.
pub fn cannot_shape(test: &str, lab: &Lab) -> bool {
    let works = |program: &str, args: &str| {
        let args = format!("-n {} {args}", lab.router);
        let status = Command::new(program).args(args.split_whitespace()).stderr(Stdio::null()).status();
        status.is_ok_and(|s| s.success())
    };
    let missing = if !works("tc", "qdisc add dev lo root tbf rate 1gbit burst 100kb limit 100kb") {
        "the token bucket filter (sch_tbf) or the program tc"
    } else if !works("ip", "link add fwtifb type ifb") {
        "the block device (ifb)"
    } else if !works("tc", "qdisc add dev fwtifb ingress") {
        "the ingress hook (sch_ingress)"
    } else {
        works("tc", "qdisc del dev lo root");
        works("ip", "link del fwtifb");
        return false;
    };
    skip(test, missing);
    true
}

/// Least throughput for a limit to be kept rather than choked, in bits per second.
/// A machine that is emulated does not reach every limit.
pub fn at_least(bps: f64) -> f64 {
    if std::env::var_os("FAIRWAY_EMULATED").is_some() { bps / 4.0 } else { bps }
}

pub fn ip(args: &str) -> String {
    let out = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Many commands in one process, all in one namespace.
pub fn ip_batch(ns: &str, lines: &str) {
    let mut child = Command::new("ip")
        .args(["-n", ns, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "ip -batch in {ns}: {}\n{lines}", String::from_utf8_lossy(&out.stderr));
}

/// `ip -j` in a namespace.
pub fn show(ns: &str, args: &str) -> serde_json::Value {
    let text = ip(&format!("-n {ns} -j -d {args}"));
    if text.trim().is_empty() { serde_json::json!([]) } else { serde_json::from_str(&text).unwrap() }
}

/// What a namespace looks like to `ip`, without what changes by itself.
pub fn snapshot(ns: &str) -> String {
    let mut out = String::new();
    for what in [
        "-4 addr",
        "-6 addr show scope global",
        "-4 route show table all",
        "-6 route show table all",
        "-4 rule",
        "-6 rule",
        "neigh show nud permanent",
    ] {
        // Anycast and link-local entries come and go with forwarding and
        // carriers, the operational state lags, and in which order devices were made
        // does not matter.
        let mut blocks: Vec<String> = Vec::new();
        for line in ip(&format!("-n {ns} {what}")).lines() {
            if ["anycast", "fe80::/64", "local fe80", "multicast"].iter().any(|w| line.starts_with(w))
                || line.contains("valid_lft")
            {
                continue;
            }
            // `3: eth0@if5: <…` without the numbers.
            let line = match line.split_once(": ") {
                Some((_, rest)) if rest.contains(": <") => match (rest.split_once('@'), rest.split_once(": ")) {
                    (Some((name, _)), Some((_, rest))) => format!("{name}: {rest}"),
                    _ => rest.to_owned(),
                },
                _ => line.to_owned(),
            };
            let line = [
                ("NO-CARRIER,", ""),
                (",LOWER_UP", ""),
                (" linkdown", ""),
                (" state UNKNOWN", ""),
                (" state UP", ""),
                (" state DOWN", ""),
            ]
            .iter()
            .fold(line, |line, (from, to)| line.replace(from, to));
            match blocks.last_mut() {
                Some(block) if line.starts_with(' ') => *block += &format!("\n{}", line.trim_end()),
                _ => blocks.push(line.trim_end().to_owned()),
            }
        }
        blocks.sort();
        out += &blocks.join("\n");
        out.push('\n');
    }
    let qdiscs = Command::new("tc").args(["-n", ns, "qdisc"]).output().unwrap().stdout;
    let mut lines: Vec<String> = Vec::new();
    for line in String::from_utf8(qdiscs).unwrap().lines() {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        words.remove(2);
        lines.push(words.join(" "));
    }
    lines.sort();
    out + &lines.join("\n")
}

/// Run in a namespace, on a thread of its own.
pub fn within<T: Send>(ns: &str, work: impl FnOnce() -> T + Send) -> T {
    let path = Path::new("/var/run/netns").join(ns);
    std::thread::scope(|s| {
        s.spawn(|| {
            Netns::open(&path).unwrap().enter().unwrap();
            work()
        })
        .join()
        .unwrap()
    })
}

/// A TCP listener in a namespace that says who came; stops when dropped.
pub struct Listener {
    pub at: SocketAddr,
}

pub fn listen(ns: &str, at: impl Into<IpAddr>) -> Listener {
    let at = at.into();
    let listener = within(ns, || TcpListener::bind((at, 0)).unwrap_or_else(|e| panic!("{at}: {e}")));
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let peer = stream.peer_addr().unwrap().ip();
                let _ = stream.write_all(format!("{peer}\n").as_bytes());
                let mut sink = vec![0; 1 << 16];
                while matches!(stream.read(&mut sink), Ok(n) if n > 0) {}
            });
        }
    });
    Listener { at: address }
}

/// Who a listener says we are; an error when it cannot be reached in 2 s.
pub fn whoami(ns: &str, to: SocketAddr) -> Result<IpAddr, String> {
    within(ns, || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).map_err(|e| format!("{to}: {e}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut text = String::new();
        let mut byte = [0];
        while stream.read(&mut byte).map_err(|e| format!("{to}: {e}"))? == 1 && byte[0] != b'\n' {
            text.push(byte[0] as char);
        }
        text.parse().map_err(|e| format!("{text:?}: {e}"))
    })
}

/// Bits per second of one TCP stream over about two seconds, as the receiver
/// counts them; the first half second does not count.
pub fn throughput(from: &str, to: &str, at: IpAddr) -> f64 {
    let listener = within(to, || TcpListener::bind((at, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut sink = vec![0; 1 << 16];
        let began = Instant::now();
        let (mut counted, mut since) = (0u64, None);
        loop {
            let n = stream.read(&mut sink).unwrap_or(0);
            if n == 0 || began.elapsed() > Duration::from_millis(2500) {
                break;
            }
            match since {
                None if began.elapsed() > Duration::from_millis(500) => since = Some(Instant::now()),
                None => {}
                Some(_) => counted += n as u64,
            }
        }
        counted as f64 * 8.0 / since.unwrap_or(began).elapsed().as_secs_f64()
    });
    within(from, || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let block = vec![0x5a; 1 << 16];
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(4) && stream.write_all(&block).is_ok() {}
    });
    receiver.join().unwrap()
}

pub struct Lab {
    prefix: String,
    made: std::sync::Mutex<Vec<String>>,
    pub node: String,
    pub router: String,
    pub config: Config,
}

static LABS: AtomicU32 = AtomicU32::new(0);

impl Lab {
    /// A lab, where this machine can have one.
    pub fn here(test: &str) -> Option<Self> {
        (!skipped(test)).then(Self::new)
    }

    /// A lab for a test that limits bandwidth, where this machine can.
    pub fn shaping(test: &str) -> Option<Self> {
        Self::here(test).filter(|lab| !cannot_shape(test, lab))
    }

    /// A node with its primary ENI (eth0, by its OS) and a router; the calling
    /// thread is in the node's namespace afterwards.
    pub fn new() -> Self {
        let prefix = format!("fwt-{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let lab = Self {
            node: format!("{prefix}-node"),
            router: format!("{prefix}-router"),
            prefix,
            made: Default::default(),
            config: Config::default(),
        };
        lab.namespace(&lab.node);
        lab.namespace(&lab.router);
        within(&lab.router, || {
            for (key, value) in
                [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1"), ("ipv6/conf/default/accept_dad", "0")]
            {
                std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
            }
        });
        // Anti-spoofing: a packet must come in where its source lives. Not by
        // rp_filter, which also leaves ARP unanswered; the cloud does not.
        within(&lab.router, || {
            let rules = "table ip spoofed { chain in { type filter hook prerouting priority raw; fib saddr . iif oif missing drop; }; }";
            let done = std::process::Command::new("nft").arg(rules).status();
            assert!(done.unwrap().success(), "nft, of the package nftables");
        });
        within(&lab.node, || std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap());
        ip_batch(
            &lab.router,
            &format!("link set lo up\naddr add {OUTSIDE4}/32 dev lo\naddr add {OUTSIDE6}/128 dev lo\n"),
        );
        let eth0 = lab.eni(0);
        ip_batch(
            &lab.node,
            &format!(
                "link set lo up\nlink set eth0 up\naddr add {NODE4}/24 dev eth0\naddr add {NODE6}/64 dev eth0 nodad\n\
                 route add default via {} dev eth0\nroute add default via {} dev eth0\n",
                eth0.subnet.gateway4,
                eth0.subnet.gateway6.unwrap()
            ),
        );
        lab.assign(&eth0, NODE4.into());
        lab.assign(&eth0, NODE6.into());
        Netns::open(&Path::new("/var/run/netns").join(&lab.node)).unwrap().enter().unwrap();
        lab
    }

    fn namespace(&self, name: &str) {
        ip(&format!("netns add {name}"));
        self.made.lock().unwrap().push(name.to_owned());
    }

    /// What the cloud says of ENI `n`; in subnet 10.0.n.0/24, its address .10.
    pub fn eni_ref(&self, n: u8) -> EniRef {
        EniRef {
            id: EniId(format!("eni-{n}")),
            mac: Mac([0x00, 0x16, 0x3e, 0, 0, n]),
            vswitch: VSwitchId(format!("vsw-{n}")),
            primary4: Ipv4Addr::new(10, 0, n, 10),
            subnet: Subnet {
                cidr4: format!("10.0.{n}.0/24").parse().unwrap(),
                gateway4: Ipv4Addr::new(10, 0, n, 253),
                cidr6: Some(format!("fd00:0:0:{n}::/64").parse().unwrap()),
                gateway6: Some(format!("fd00:0:0:{n}::fd").parse().unwrap()),
            },
        }
    }

    /// Attach ENI `n`: a device `eth<n>` appears on the node.
    pub fn eni(&self, n: u8) -> EniRef {
        let eni = self.eni_ref(n);
        ip(&format!(
            "-n {} link add r{n} numtxqueues 2 numrxqueues 2 mtu 8500 type veth peer name eth{n} address {} mtu 8500 numtxqueues 2 numrxqueues 2 netns {}",
            self.router, eni.mac, self.node
        ));
        ip_batch(
            &self.router,
            &format!(
                "link set r{n} up\naddr add {}/32 dev r{n}\naddr add {}/128 dev r{n} nodad\n",
                eni.subnet.gateway4,
                eni.subnet.gateway6.unwrap()
            ),
        );
        if n != 0 {
            self.assign(&eni, eni.primary4.into());
        }
        eni
    }

    /// The VPC delivers an address to an ENI, by its hardware address.
    pub fn assign(&self, eni: &EniRef, address: IpAddr) {
        let n = eni.mac.0[5];
        let family = if address.is_ipv4() { "-4" } else { "-6" };
        ip(&format!("-n {} {family} route replace {address} dev r{n}", self.router));
        ip(&format!("-n {} neigh replace {address} lladdr {} dev r{n} nud permanent", self.router, eni.mac));
    }

    /// A pod's namespace and a lease of address `.host` of the ENI's subnet.
    pub fn pod(&self, eni: &EniRef, host: u8, mode: AttachMode) -> (String, Lease) {
        let n = eni.mac.0[5];
        let name = format!("{}-p{n}-{host}", self.prefix);
        self.namespace(&name);
        ip(&format!("-n {name} link set lo up"));
        let lease = self.lease(eni, host, mode, &name);
        self.assign(eni, lease.v4.into());
        self.assign(eni, lease.v6.unwrap().into());
        (name, lease)
    }

    pub fn lease(&self, eni: &EniRef, host: u8, mode: AttachMode, ns: &str) -> Lease {
        let n = eni.mac.0[5];
        let v4 = if mode == AttachMode::Exclusive { eni.primary4 } else { Ipv4Addr::new(10, 0, n, host) };
        Lease {
            attachment: AttachmentId { sandbox: ns.into(), ifname: "eth0".into() },
            pod: PodKey::new("default", format!("pod-{n}-{host}")),
            pod_uid: None,
            mode,
            eni: eni.clone(),
            v4,
            v6: Some(format!("fd00:0:0:{n}::{host:x}").parse().unwrap()),
            netns: PathBuf::from("/var/run/netns").join(ns),
            bandwidth: Bandwidth::default(),
            traffic: Default::default(),
        }
    }

    pub fn drop_namespace(&self, name: &str) {
        ip(&format!("netns del {name}"));
        self.made.lock().unwrap().retain(|n| n != name);
    }

    /// Packets the router has received from ENI `n`.
    pub fn received(&self, n: u8) -> u64 {
        show(&self.router, &format!("-s link show r{n}"))[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
    }

    /// Start the actor and run the test against it.
    pub fn run<F: Future<Output = ()>>(&self, test: impl FnOnce(Wirer) -> F) {
        self.run_with(Arc::new(NoPrograms), test);
    }

    pub fn run_with<F: Future<Output = ()>>(&self, programs: Arc<dyn PodPrograms>, test: impl FnOnce(Wirer) -> F) {
        let wiring = Wiring::new(self.config.clone(), programs).unwrap();
        fairway::actor::run(async {
            let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
            let handle = tree.child(move || NetnsWirer::open(wiring.clone()));
            test(Wirer(handle)).await;
            assert_eq!(tree.shutdown(Duration::from_secs(5)).await, [] as [&str; 0]);
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in self.made.lock().unwrap().iter().rev() {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

#[derive(Clone)]
pub struct Wirer(Handle<NetnsWirer>);

impl Wirer {
    pub async fn ask<M: Message + Clone>(&self, message: M) -> Result<M::Reply, M::Error>
    where
        NetnsWirer: Handles<M>,
        M::Error: std::fmt::Display,
    {
        self.ask_within(message, Duration::from_secs(20)).await
    }

    pub async fn ask_within<M: Message + Clone>(&self, message: M, budget: Duration) -> Result<M::Reply, M::Error>
    where
        NetnsWirer: Handles<M>,
        M::Error: std::fmt::Display,
    {
        let deadline = Deadline::after(budget);
        loop {
            match self.0.ask(message.clone(), deadline).await {
                Ok(reply) => return Ok(reply),
                Err(AskError::Domain(e)) => return Err(e),
                // It is still starting.
                Err(AskError::Unavailable { .. }) if !deadline.passed() => {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Err(e) => panic!("{}: {e}", M::NAME),
            }
        }
    }
}

/// A BPF file system of one test.
pub struct Bpffs(pub tempfile::TempDir);

impl Bpffs {
    /// `None`, and counted as skipped, on a kernel without.
    pub fn mount(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let none: Option<&str> = None;
        let done = nix::mount::mount(Some("bpf"), dir.path(), Some("bpf"), nix::mount::MsFlags::empty(), none);
        if done.is_err() {
            skip(test, "the bpf file system");
        }
        done.is_ok().then_some(Self(dir))
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A sysfs that shows the calling thread's network namespace.
pub struct Sysfs(pub PathBuf, #[allow(dead_code)] tempfile::TempDir);

impl Sysfs {
    pub fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let none: Option<&str> = None;
        nix::mount::mount(Some("sysfs"), dir.path(), Some("sysfs"), nix::mount::MsFlags::empty(), none).unwrap();
        Self(dir.path().to_owned(), dir)
    }
}

impl Drop for Sysfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
