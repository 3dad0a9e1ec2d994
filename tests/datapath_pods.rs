//! Promise: what is attached to a pod's device counts its packets, outlives the
//! agent, is taken up again after a restart, and never trusts a foreign pin.
//!
//! Each test has network namespaces and a BPF file system of its own, made on
//! its thread and gone with it: nothing has a name, nothing is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use aya::maps::MapInfo;
use aya::programs::{SchedClassifier, TcAttachType};
use fairway::agent::programs::Programs;
use fairway::datapath::{Adoption, Counters, Datapath, DatapathError, Device, Options, Via};
use fairway::model::{AttachMode, AttachmentId, Bandwidth, EniRef, Lease, Mac, PodKey, Subnet};
use fairway::netns::{Attachment, Placed, PodPrograms as _};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const POD: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Ethernet, IPv4 and UDP headers.
const UDP_HEADERS: u64 = 14 + 20 + 8;

const CLSACT: Options = Options { host_side: Via::Clsact, in_pod: Via::Clsact };
const TCX: Options = Options { host_side: Via::Tcx, in_pod: Via::Tcx };

/// Where the two ends of a test's only conversation are.
struct Node {
    bpffs: PathBuf,
    _mount_point: tempfile::TempDir,
}

impl Node {
    /// Moves this thread into a new network and mount namespace with a bpffs.
    /// `None`, and counted as skipped, when the machine cannot do that.
    fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skipped(test, "root");
            return None;
        }
        if !fs::read_to_string("/proc/filesystems").unwrap().contains("\tbpf\n") {
            skipped(test, "the bpf file system");
            return None;
        }
        let mount_point = tempfile::tempdir().unwrap();
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        mount(Some("bpf"), mount_point.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        // Only what a test sends is on its links.
        quiet();
        Some(Self { bpffs: mount_point.path().to_owned(), _mount_point: mount_point })
    }

    fn open(&self) -> (Datapath, Adoption) {
        Datapath::open(&self.bpffs).unwrap()
    }

    fn open_with(&self, options: Options) -> (Datapath, Adoption) {
        Datapath::open_with(&self.bpffs, options).unwrap()
    }

    fn pins(&self) -> PathBuf {
        self.bpffs.join(format!("fairway/v{}", fairway_ebpf_abi::LAYOUT_VERSION))
    }

    fn pod_pins(&self) -> Vec<PathBuf> {
        fs::read_dir(self.pins().join("pods")).unwrap().map(|e| e.unwrap().path()).collect()
    }
}

fn quiet() {
    for conf in ["all", "default"] {
        fs::write(format!("/proc/sys/net/ipv6/conf/{conf}/disable_ipv6"), "1").unwrap();
    }
    ip("link set lo up");
}

fn skipped(test: &str, missing: &str) {
    println!("SKIPPED: {test}: {missing}");
    if let Some(file) = std::env::var_os("FAIRWAY_SKIPPED") {
        let mut file = OpenOptions::new().create(true).append(true).open(file).unwrap();
        writeln!(file, "SKIPPED: {test}: {missing}").unwrap();
    }
}

fn ip(args: &str) {
    let done = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "ip {args}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A network namespace without a name; it ends with this value.
struct Netns(File);

impl Netns {
    fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            quiet();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        Self(std::thread::scope(|s| s.spawn(make).join().unwrap()))
    }

    fn run<R: Send>(&self, job: impl FnOnce() -> R + Send) -> R {
        let inside = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            job()
        };
        std::thread::scope(|s| s.spawn(inside).join().unwrap())
    }

    /// As `ip link set … netns` takes it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    fn device<'a>(&'a self, name: &'a str) -> Device<'a> {
        Device::named(name).inside(self.0.as_fd())
    }
}

fn here(name: &str) -> Device<'_> {
    Device::named(name)
}

/// A pod behind a veth pair: `host` in the node, `eth0` in the pod. Neighbours
/// are permanent, so that no ARP is on the link.
fn veth_pod(host: &str) -> Netns {
    let pod = Netns::new();
    ip(&format!(
        "link add {host} address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns {}",
        pod.path()
    ));
    ip(&format!("addr add {HOST}/24 dev {host}"));
    ip(&format!("link set {host} up"));
    ip(&format!("neigh replace {POD} lladdr 02:00:00:00:00:02 dev {host} nud permanent"));
    pod.run(|| configure_pod("eth0"));
    wait_for_link(host);
    pod
}

fn configure_pod(device: &str) {
    ip(&format!("addr add {POD}/24 dev {device}"));
    ip(&format!("link set {device} up"));
    ip(&format!("neigh replace {HOST} lladdr 02:00:00:00:00:01 dev {device} nud permanent"));
    wait_for_link(device);
}

/// Returns when the link can carry packets. Its peer being up is not enough: the
/// kernel activates the queue a moment later, and drops what is sent until then.
fn wait_for_link(device: &str) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        let shown = Command::new("ip").args(["-o", "link", "show", "dev", device]).output().unwrap();
        if String::from_utf8_lossy(&shown.stdout).contains(" state UP ") {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{device} does not come up");
    }
}

/// Sends `to_pod` datagrams of `size` bytes into the pod and `from_pod` out of
/// it, and waits until each has arrived.
fn exchange(pod: &Netns, to_pod: usize, from_pod: usize, size: usize) {
    let outside = UdpSocket::bind((HOST, 0)).unwrap();
    converse(&outside, pod, to_pod, from_pod, size);
}

fn converse(outside: &UdpSocket, pod: &Netns, to_pod: usize, from_pod: usize, size: usize) {
    let inside = pod.run(|| UdpSocket::bind((POD, 0)).unwrap());
    let timeout = Some(std::time::Duration::from_secs(5));
    outside.set_read_timeout(timeout).unwrap();
    inside.set_read_timeout(timeout).unwrap();
    let mut buffer = vec![0; size];
    for _ in 0..to_pod {
        outside.send_to(&vec![1; size], inside.local_addr().unwrap()).unwrap();
        inside.recv_from(&mut buffer).unwrap();
    }
    for _ in 0..from_pod {
        inside.send_to(&vec![1; size], outside.local_addr().unwrap()).unwrap();
        outside.recv_from(&mut buffer).unwrap();
    }
}

fn udp(ingress: u64, egress: u64, size: u64) -> Counters {
    Counters {
        ingress_packets: ingress,
        ingress_bytes: ingress * (size + UDP_HEADERS),
        egress_packets: egress,
        egress_bytes: egress * (size + UDP_HEADERS),
        ..Default::default()
    }
}

fn attachment(sandbox: &str) -> AttachmentId {
    AttachmentId { sandbox: sandbox.into(), ifname: "eth0".into() }
}

fn counters(datapath: &Datapath, sandbox: &str) -> Counters {
    let all = datapath.counters().unwrap();
    all.into_iter().find(|(a, _)| *a == attachment(sandbox)).unwrap().1
}

/// How many of our programs the kernel says are on a device, whichever way.
fn programs_on(device: &str) -> usize {
    let tcx = |side| SchedClassifier::query_tcx(device, side).map_or(0, |(_, programs)| programs.len());
    let clsact = |side| {
        let shown = Command::new("tc").args(["filter", "show", "dev", device, side]).output().unwrap();
        String::from_utf8(shown.stdout).unwrap().matches("direct-action").count()
    };
    tcx(TcAttachType::Ingress) + tcx(TcAttachType::Egress) + clsact("ingress") + clsact("egress")
}

/// Runs a test's body for each way of attaching on the host side.
fn each_way(test: &str, body: impl Fn(&Node, Options)) {
    for options in [CLSACT, TCX] {
        let Some(node) = Node::new(test) else { return };
        if options == TCX && !node.open().0.moves_with_device() {
            skipped(test, "tcx (kernel 6.6)");
            return;
        }
        println!("{options:?}");
        body(&node, options);
    }
}

#[test]
fn a_veth_pods_packets_and_bytes_are_counted_in_both_directions() {
    each_way("a_veth_pods_packets_and_bytes_are_counted_in_both_directions", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        let pod = veth_pod("h0");
        datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
        assert_eq!(counters(&datapath, "a"), Counters::default());
        assert_eq!(datapath.attached().unwrap()[0].via, options.host_side);
        exchange(&pod, 3, 5, 100);
        assert_eq!(counters(&datapath, "a"), udp(3, 5, 100));
        datapath.detach(&attachment("a")).unwrap();
        assert_eq!(programs_on("h0"), 0, "off a device that stays");
    });
}

#[test]
fn segments_of_an_offloaded_packet_count_as_packets() {
    let Some(node) = Node::new("segments_of_an_offloaded_packet_count_as_packets") else { return };
    const LENGTH: usize = 1 << 20;
    let (mut datapath, _) = node.open();
    let pod = veth_pod("h0");
    datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
    let listener = pod.run(|| TcpListener::bind((POD, 0)).unwrap());
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    let reader = std::thread::spawn(move || accepted.read_to_end(&mut Vec::new()).unwrap());
    stream.write_all(&vec![0; LENGTH]).unwrap();
    drop(stream);
    assert_eq!(reader.join().unwrap(), LENGTH);
    let seen = counters(&datapath, "a");
    assert!(seen.ingress_packets >= LENGTH as u64 / 1460, "{seen:?}");
    assert!(seen.ingress_bytes >= LENGTH as u64, "{seen:?}");
}

#[test]
fn an_exclusive_eni_is_counted_from_before_it_moves_until_it_is_given_back() {
    let test = "an_exclusive_eni_is_counted_from_before_it_moves_until_it_is_given_back";
    let Some(node) = Node::new(test) else { return };
    let (mut datapath, _) = node.open();
    let vpc = Netns::new();
    ip(&format!(
        "link add eni1 address 02:00:00:00:00:02 type veth peer name port address 02:00:00:00:00:01 netns {}",
        vpc.path()
    ));
    vpc.run(|| {
        ip(&format!("addr add {HOST}/24 dev port"));
        ip("link set port up");
        ip(&format!("neigh replace {POD} lladdr 02:00:00:00:00:02 dev port nud permanent"));
    });
    if !datapath.moves_with_device() {
        return skipped(test, "tcx (kernel 6.6)");
    }
    datapath.attach(&attachment("x"), AttachMode::Exclusive, here("eni1")).unwrap();
    let before = datapath.attached().unwrap();
    let pod = Netns::new();
    ip(&format!("link set eni1 netns {}", pod.path()));
    pod.run(|| {
        ip("link set eni1 name eth0");
        configure_pod("eth0");
    });
    vpc.run(|| wait_for_link("port"));
    // A retried ADD finds it done.
    datapath.attach(&attachment("x"), AttachMode::Exclusive, pod.device("eth0")).unwrap();
    assert_eq!(datapath.attached().unwrap().first().unwrap().programs, before.first().unwrap().programs);
    assert!(datapath.verify(&attachment("x"), pod.device("eth0")).unwrap());

    let outside = vpc.run(|| UdpSocket::bind((HOST, 0)).unwrap());
    converse(&outside, &pod, 4, 2, 64);
    assert_eq!(counters(&datapath, "x"), udp(4, 2, 64));

    datapath.detach(&attachment("x")).unwrap();
    assert_eq!(pod.run(|| programs_on("eth0")), 0, "the ENI goes back clean");
    assert!(datapath.counters().unwrap().is_empty());
    assert!(node.pod_pins().is_empty());
}

#[test]
fn pods_whose_devices_share_an_index_are_counted_apart() {
    let Some(node) = Node::new("pods_whose_devices_share_an_index_are_counted_apart") else { return };
    let (mut datapath, _) = node.open();
    // First links of their namespaces: the same index in each.
    let pods = [Netns::new(), Netns::new()];
    let peers = [Netns::new(), Netns::new()];
    for ((pod, peer), sandbox) in pods.iter().zip(&peers).zip(["p", "q"]) {
        pod.run(|| ip(&format!("link add eth0 index 77 address 02:00:00:00:00:02 type veth peer name port address 02:00:00:00:00:01 netns {}", peer.path())));
        peer.run(|| {
            ip(&format!("addr add {HOST}/24 dev port"));
            ip("link set port up");
            ip(&format!("neigh replace {POD} lladdr 02:00:00:00:00:02 dev port nud permanent"));
        });
        datapath.attach(&attachment(sandbox), AttachMode::Exclusive, pod.device("eth0")).unwrap();
        pod.run(|| configure_pod("eth0"));
        peer.run(|| wait_for_link("port"));
    }
    for ((pod, peer), packets) in pods.iter().zip(&peers).zip([2, 7]) {
        let outside = peer.run(|| UdpSocket::bind((HOST, 0)).unwrap());
        converse(&outside, pod, packets, 0, 10);
    }
    assert_eq!((counters(&datapath, "p"), counters(&datapath, "q")), (udp(2, 0, 10), udp(7, 0, 10)));
    if datapath.moves_with_device() {
        assert!(!datapath.verify(&attachment("p"), pods[1].device("eth0")).unwrap(), "not the other pod's device");
    }
}

#[test]
fn a_clsact_filter_is_replaced_in_place_and_missed_when_it_is_gone() {
    let Some(node) = Node::new("a_clsact_filter_is_replaced_in_place_and_missed_when_it_is_gone") else { return };
    let (mut datapath, _) = node.open_with(CLSACT);
    let pod = veth_pod("h0");
    datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
    exchange(&pod, 3, 4, 50);
    // A retried ADD finds it done.
    datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
    assert_eq!(counters(&datapath, "a"), udp(3, 4, 50));
    assert_eq!(datapath.attached().unwrap().first().unwrap().via, Via::Clsact);

    // After a restart the filter is replaced in place: counted once, not twice.
    drop(datapath);
    let (datapath, adoption) = node.open_with(CLSACT);
    assert_eq!(adoption.adopted, [attachment("a")]);
    exchange(&pod, 1, 1, 50);
    assert_eq!(counters(&datapath, "a"), udp(4, 5, 50));

    assert!(datapath.verify(&attachment("a"), here("h0")).unwrap());
    ip("link add other type veth peer name peer");
    assert!(!datapath.verify(&attachment("a"), here("other")).unwrap());
    // What `tc qdisc del dev h0 clsact` does.
    Command::new("tc").args(["qdisc", "del", "dev", "h0", "clsact"]).status().unwrap();
    assert!(!datapath.verify(&attachment("a"), here("h0")).unwrap());
}

#[test]
fn clsact_inside_a_pod_counts_too() {
    let Some(node) = Node::new("clsact_inside_a_pod_counts_too") else { return };
    let (mut datapath, _) = node.open_with(CLSACT);
    let pod = veth_pod("h0");
    datapath.attach(&attachment("x"), AttachMode::Exclusive, pod.device("eth0")).unwrap();
    exchange(&pod, 2, 6, 50);
    assert_eq!(counters(&datapath, "x"), udp(2, 6, 50));
}

#[test]
fn programs_inside_a_pod_are_brought_up_to_date_after_a_restart() {
    let test = "programs_inside_a_pod_are_brought_up_to_date_after_a_restart";
    let Some(node) = Node::new(test) else { return };
    let (mut datapath, _) = node.open_with(CLSACT);
    let pod = veth_pod("h0");
    datapath.attach(&attachment("x"), AttachMode::Exclusive, pod.device("eth0")).unwrap();
    let before = datapath.attached().unwrap()[0].programs;
    drop(datapath);

    // Out of reach so far: counted by the earlier programs, and said so.
    let (mut datapath, adoption) = node.open_with(CLSACT);
    assert_eq!(adoption.adopted, [attachment("x")]);
    assert_eq!(datapath.dated().collect::<Vec<_>>(), [&attachment("x")]);
    assert!(!datapath.verify(&attachment("x"), pod.device("eth0")).unwrap());
    exchange(&pod, 2, 3, 50);
    assert_eq!(counters(&datapath, "x"), udp(2, 3, 50));

    datapath.attach(&attachment("x"), AttachMode::Exclusive, pod.device("eth0")).unwrap();
    assert_eq!(datapath.dated().count(), 0);
    assert!(datapath.verify(&attachment("x"), pod.device("eth0")).unwrap());
    let after = datapath.attached().unwrap()[0].programs;
    assert!(before.iter().all(|old| !after.contains(old)), "{before:?} {after:?}");
    exchange(&pod, 1, 1, 50);
    assert_eq!(counters(&datapath, "x"), udp(3, 4, 50), "replaced in place: counted on, and once");
    assert_eq!(pod.run(|| programs_on("eth0")), 2);
}

#[test]
fn a_crash_while_programs_inside_a_pod_are_replaced_is_mended() {
    let Some(node) = Node::new("a_crash_while_programs_inside_a_pod_are_replaced_is_mended") else { return };
    let (mut datapath, _) = node.open_with(CLSACT);
    let pod = veth_pod("h0");
    datapath.attach(&attachment("x"), AttachMode::Exclusive, pod.device("eth0")).unwrap();
    datapath.attach(&attachment("y"), AttachMode::Veth, here("h0")).unwrap();
    drop(datapath);
    // The pin is replaced and the filter is not, as a crash between would leave it.
    let pins = node.pod_pins();
    let of = |place: &str| pins.iter().find(|p| p.to_string_lossy().contains(place)).unwrap();
    fs::rename(of("+h").join("egress"), of("+p").join("egress")).unwrap();

    let (mut datapath, _) = node.open_with(CLSACT);
    datapath.attach(&attachment("x"), AttachMode::Exclusive, pod.device("eth0")).unwrap();
    assert!(datapath.verify(&attachment("x"), pod.device("eth0")).unwrap());
    exchange(&pod, 1, 2, 50);
    assert_eq!(counters(&datapath, "x"), udp(1, 2, 50));
    assert_eq!(pod.run(|| programs_on("eth0")), 2);
}

/// Attaches, says so, and waits to be killed.
fn agent_that_will_be_killed(bpffs: &str) -> ! {
    let (mut datapath, _) = Datapath::open(Path::new(bpffs)).unwrap();
    datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
    println!("\nattached");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    unreachable!("killed before its standard input ends");
}

struct KilledAtEnd(Child);

impl Drop for KilledAtEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn programs_and_counters_survive_kill_9_and_are_adopted() {
    let test = "programs_and_counters_survive_kill_9_and_are_adopted";
    if let Ok(bpffs) = std::env::var("FAIRWAY_TEST_AGENT") {
        agent_that_will_be_killed(&bpffs);
    }
    let Some(node) = Node::new(test) else { return };
    let pod = veth_pod("h0");
    // The same test in a process of its own, which is born into our namespaces.
    let mut agent = KilledAtEnd(
        Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env("FAIRWAY_TEST_AGENT", &node.bpffs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let said = BufReader::new(agent.0.stdout.take().unwrap()).lines();
    assert!(said.map_while(Result::ok).any(|line| line == "attached"), "the agent attached");
    exchange(&pod, 2, 3, 20);
    agent.0.kill().unwrap();
    agent.0.wait().unwrap();
    exchange(&pod, 5, 7, 20);

    let (mut datapath, adoption) = node.open();
    assert_eq!(adoption.adopted, [attachment("a")]);
    assert!(adoption.collected.is_empty() && adoption.rotated.is_empty(), "{adoption:?}");
    assert_eq!(counters(&datapath, "a"), udp(7, 10, 20));
    exchange(&pod, 1, 1, 20);
    assert_eq!(counters(&datapath, "a"), udp(8, 11, 20), "still attached, and once");
    assert!(datapath.verify(&attachment("a"), here("h0")).unwrap());

    datapath.detach(&attachment("a")).unwrap();
    assert_eq!(programs_on("h0"), 0);
}

#[test]
fn pins_of_vanished_devices_and_half_made_pins_are_collected_at_start() {
    each_way("pins_of_vanished_devices_and_half_made_pins_are_collected_at_start", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        let pods = [veth_pod("h0"), veth_pod("h1"), veth_pod("h2")];
        for (sandbox, device) in [("gone", "h0"), ("half", "h1"), ("fine", "h2")] {
            datapath.attach(&attachment(sandbox), AttachMode::Veth, here(device)).unwrap();
        }
        drop(datapath);
        ip("link del h0");
        let half = node.pod_pins().into_iter().find(|p| p.to_string_lossy().contains("half")).unwrap();
        fs::remove_file(half.join("ingress")).unwrap();
        fs::create_dir(node.pins().join("pods/not an attachment")).unwrap();

        let (datapath, adoption) = node.open_with(options);
        assert_eq!(adoption.adopted, [attachment("fine")]);
        assert_eq!(adoption.collected.len(), 3, "{adoption:?}");
        assert_eq!(node.pod_pins().len(), 1);
        assert_eq!(datapath.counters().unwrap().len(), 1);
        assert_eq!(programs_on("h1"), 0, "what was half attached is off");
        assert_eq!(programs_on("h2"), 2);
        drop(pods);
    });
}

#[test]
fn attachments_that_nobody_claims_are_detached() {
    each_way("attachments_that_nobody_claims_are_detached", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        let _pods = [veth_pod("h0"), veth_pod("h1")];
        for (sandbox, device) in [("kept", "h0"), ("orphan", "h1")] {
            datapath.attach(&attachment(sandbox), AttachMode::Veth, here(device)).unwrap();
        }
        let gone = datapath.retain(|a| *a == attachment("kept")).unwrap();
        assert_eq!(gone, [attachment("orphan")]);
        assert_eq!(programs_on("h1"), 0);
        assert_eq!(node.pod_pins().len(), 1);
    });
}

#[test]
fn a_pinned_map_of_another_layout_is_not_adopted() {
    each_way("a_pinned_map_of_another_layout_is_not_adopted", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        let pod = veth_pod("h0");
        datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
        exchange(&pod, 1, 1, 10);
        drop(datapath);
        let pin = node.pins().join("maps/COUNTERS");
        fs::remove_file(&pin).unwrap();
        // Half the value: reading it as ours would run past its end.
        aya::maps::HashMap::<_, u32, [u64; 2]>::create(4096, 1).unwrap().pin(&pin).unwrap();

        let (datapath, adoption) = node.open_with(options);
        assert_eq!(adoption.rotated.len(), 1, "{adoption:?}");
        assert!(adoption.rotated[0].contains("value size 16 instead of 72"), "{adoption:?}");
        assert_eq!(MapInfo::from_pin(&pin).unwrap().value_size() as usize, size_of::<Counters>());
        // The pod goes on, counted in the new map by a program that knows it.
        assert_eq!(adoption.adopted, [attachment("a")]);
        exchange(&pod, 3, 2, 10);
        assert_eq!(counters(&datapath, "a"), udp(3, 2, 10));
    });
}

#[test]
fn a_pin_that_is_no_map_is_not_adopted() {
    each_way("a_pin_that_is_no_map_is_not_adopted", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        let _pod = veth_pod("h0");
        datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
        drop(datapath);
        let pin = node.pins().join("maps/COUNTERS");
        fs::remove_file(&pin).unwrap();
        fs::rename(node.pod_pins()[0].join("egress"), &pin).unwrap();
        let (_datapath, adoption) = node.open_with(options);
        assert!(adoption.rotated[0].contains("instead of a map"), "{adoption:?}");
        assert_eq!(MapInfo::from_pin(&pin).unwrap().value_size() as usize, size_of::<Counters>());
    });
}

#[test]
fn pods_pinned_by_another_layout_version_are_taken_over() {
    each_way("pods_pinned_by_another_layout_version_are_taken_over", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        let pod = veth_pod("h0");
        datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
        drop(datapath);
        fs::rename(node.pins(), node.bpffs.join("fairway/v0")).unwrap();

        let (datapath, adoption) = node.open_with(options);
        assert_eq!(adoption.adopted, [attachment("a")]);
        assert!(!node.bpffs.join("fairway/v0").exists());
        assert_eq!(node.pod_pins().len(), 1);
        exchange(&pod, 2, 2, 10);
        assert_eq!(counters(&datapath, "a"), udp(2, 2, 10));
        assert_eq!(programs_on("h0"), 2, "replaced, not added");
    });
}

#[test]
fn attaching_and_detaching_again_changes_nothing() {
    each_way("attaching_and_detaching_again_changes_nothing", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        let pod = veth_pod("h0");
        datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
        exchange(&pod, 1, 0, 10);
        let before = datapath.attached().unwrap();
        datapath.attach(&attachment("a"), AttachMode::Veth, here("h0")).unwrap();
        assert_eq!(datapath.attached().unwrap(), before);
        assert_eq!(counters(&datapath, "a"), udp(1, 0, 10));
        datapath.detach(&attachment("a")).unwrap();
        datapath.detach(&attachment("a")).unwrap();
        assert!(datapath.attached().unwrap().is_empty());
    });
}

#[test]
fn a_device_that_is_missing_is_an_error_that_leaves_nothing() {
    each_way("a_device_that_is_missing_is_an_error_that_leaves_nothing", |node, options| {
        let (mut datapath, _) = node.open_with(options);
        for mode in [AttachMode::Veth, AttachMode::Exclusive] {
            let error = datapath.attach(&attachment("a"), mode, here("nosuch0")).unwrap_err();
            assert!(matches!(error, DatapathError::Attach { .. }), "{error}");
        }
        assert!(node.pod_pins().is_empty());
        assert!(datapath.counters().unwrap().is_empty());
    });
}

fn lease(sandbox: &str, mode: AttachMode, netns: &str) -> Lease {
    let subnet = Subnet {
        cidr4: "10.9.0.0/24".parse().unwrap(),
        gateway4: Ipv4Addr::new(10, 9, 0, 253),
        cidr6: None,
        gateway6: None,
    };
    let eni = EniRef { id: "eni-1".into(), mac: Mac([2; 6]), vswitch: "vsw-1".into(), primary4: POD, subnet };
    Lease {
        attachment: attachment(sandbox),
        pod: PodKey::new("default", sandbox),
        pod_uid: None,
        mode,
        eni,
        v4: POD,
        v6: None,
        netns: netns.into(),
        bandwidth: Bandwidth::default(),
        traffic: Default::default(),
    }
}

fn index(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).unwrap()
}

#[test]
fn wiring_threads_attach_in_parallel_and_verify_what_they_attached() {
    let Some(node) = Node::new("wiring_threads_attach_in_parallel_and_verify_what_they_attached") else { return };
    let programs = Programs::new(node.open().0, true);
    let names: Vec<_> = (0..8).map(|i| format!("h{i}")).collect();
    let pods: Vec<_> = names.iter().map(|name| veth_pod(name)).collect();
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| {
                let lease = lease(name, AttachMode::Veth, "/nonexistent");
                let to = Attachment {
                    lease: &lease,
                    host_ifname: name,
                    host_ifindex: index(name),
                    eni_ifindex: None,
                    node_link: None,
                    shared_eni: None,
                    netns_cookie: None,
                    netns_number: None,
                };
                programs.attach(&to).unwrap();
                assert!(programs.verify(&to).unwrap().is_empty());
            });
        }
    });
    assert_eq!(programs.pinned().unwrap().len(), names.len());
    for name in &names {
        assert_eq!(programs_on(name), 2);
        programs.detach(&attachment(name)).unwrap();
        assert_eq!(programs_on(name), 0);
    }
    drop(pods);
}

#[test]
fn an_exclusive_enis_programs_are_verified_where_it_is() {
    let test = "an_exclusive_enis_programs_are_verified_where_it_is";
    let Some(node) = Node::new(test) else { return };
    let (datapath, _) = node.open();
    if !datapath.moves_with_device() {
        return skipped(test, "tcx (kernel 6.6)");
    }
    let programs = Programs::new(datapath, true);
    ip("link add eni1 type veth peer name port");
    let pod = Netns::new();
    let lease = lease("x", AttachMode::Exclusive, &pod.path());
    let host = Attachment {
        lease: &lease,
        host_ifname: "h",
        host_ifindex: 0,
        eni_ifindex: Some(index("eni1")),
        node_link: None,
        shared_eni: None,
        netns_cookie: None,
        netns_number: None,
    };
    programs.attach(&host).unwrap();
    assert!(programs.verify(&host).unwrap().is_empty());
    ip(&format!("link set eni1 netns {} name eth0", pod.path()));
    let moved = Attachment { eni_ifindex: None, ..host };
    programs.attach(&moved).unwrap();
    assert!(programs.verify(&moved).unwrap().is_empty());
    pod.run(|| ip("link set eth0 name other"));
    assert!(programs.verify(&moved).is_err(), "no such device there");
}

#[test]
fn where_a_move_loses_programs_they_are_attached_inside_and_taken_up_again() {
    let test = "where_a_move_loses_programs_they_are_attached_inside_and_taken_up_again";
    let Some(node) = Node::new(test) else { return };
    let programs = Programs::new(node.open_with(CLSACT).0, true);
    ip("link add eni1 type veth peer name port");
    let (pod, gone) = (Netns::new(), Netns::new());
    let lease = lease("x", AttachMode::Exclusive, &pod.path());
    let host = Attachment {
        lease: &lease,
        host_ifname: "h",
        host_ifindex: 0,
        eni_ifindex: Some(index("eni1")),
        node_link: None,
        shared_eni: None,
        netns_cookie: None,
        netns_number: None,
    };
    assert_eq!(programs.attach(&host).unwrap(), Placed::OnceInside);
    assert_eq!(programs_on("eni1"), 0);
    assert_eq!(programs.verify(&host).unwrap().len(), 1, "they are missing, and that is no error");
    ip(&format!("link set eni1 netns {} name eth0", pod.path()));
    let inside = Attachment { eni_ifindex: None, ..host };
    assert_eq!(programs.attach(&inside).unwrap(), Placed::Yes);
    assert!(programs.verify(&inside).unwrap().is_empty());
    // A second pod, which ends while there is no agent.
    gone.run(|| ip("link add eth0 type veth peer name port"));
    let other = Lease { attachment: attachment("gone"), netns: gone.path().into(), ..lease.clone() };
    programs.attach(&Attachment { lease: &other, ..inside }).unwrap();
    drop((programs, gone));

    let programs = Programs::new(node.open_with(CLSACT).0, true);
    assert_eq!(programs.dated(), 2);
    assert_eq!(programs.verify(&inside).unwrap().len(), 1, "an earlier process's");
    assert_eq!(programs.take_up(std::slice::from_ref(&lease)), [] as [String; 0]);
    assert_eq!((programs.dated(), programs.pinned().unwrap().len()), (0, 1));
    assert!(programs.verify(&inside).unwrap().is_empty());
}

#[test]
fn a_folder_that_is_no_bpffs_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let error = Datapath::open(folder.path()).err().unwrap();
    assert!(error.to_string().contains("mount -t bpf bpf"), "{error}");
}
