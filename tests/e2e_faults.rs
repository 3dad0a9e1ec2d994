//! What goes wrong around the agent: a clear error, nothing lost, and recovery
//! without hands. Every test ends with the accounts balanced.

mod e2e_support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e_support::direct::{Sandbox, shim};
use e2e_support::pods::{all_ask_all, asks};
use e2e_support::{Lab, lab, lay, missing, skip};
use fairway::lab::cloud::{Fault, FaultSpec, VSwitchSpec};
use fairway::lab::kubelet::record::PodRecord;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

macro_rules! needs {
    ($test:literal) => {
        if let Some(missing) = missing() {
            return skip($test, missing);
        }
    };
}

const MUTATING: [&str; 8] = [
    "CreateNetworkInterface",
    "AttachNetworkInterface",
    "DetachNetworkInterface",
    "DeleteNetworkInterface",
    "AssignPrivateIpAddresses",
    "UnassignPrivateIpAddresses",
    "AssignIpv6Addresses",
    "UnassignIpv6Addresses",
];

fn create(lab: &Lab, prefix: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|n| {
            let name = format!("{prefix}{n}");
            lab.create(0, &name, n % 4 == 3);
            name
        })
        .collect()
}

async fn ready(lab: &Lab, names: &[String]) -> Vec<PodRecord> {
    let mut pods = Vec::new();
    for name in names {
        pods.push(lab.ready_within(name, Duration::from_secs(60)).await);
    }
    pods
}

async fn delete(lab: &Lab, names: &[String]) {
    names.iter().for_each(|name| lab.delete(name));
    for name in names {
        lab.gone(name).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttling_storm_only_delays() {
    needs!("a_throttling_storm_only_delays");
    let lab = lab("fa", 1, |_| ()).await;
    lab.site.cloud.add_fault(FaultSpec::from(Fault::Throttle { code: None }).seconds(4.0)).unwrap();
    let pods = ready(&lab, &create(&lab, "p", 8)).await;
    all_ask_all(&pods).await.unwrap();
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_cloud_down_the_stock_serves_and_the_rest_comes_after() {
    needs!("with_the_cloud_down_the_stock_serves_and_the_rest_comes_after");
    let lab = lab("fb", 1, |_| ()).await;
    lab.settled().await;
    lab.site.cloud.add_fault(FaultSpec::from(Fault::Down).seconds(8.0)).unwrap();
    let began = Instant::now();
    let first = create(&lab, "a", 2);
    ready(&lab, &first).await;
    assert!(began.elapsed() < Duration::from_secs(5), "from the stock: {:?}", began.elapsed());
    // The agent may even be killed meanwhile.
    lab.node(0).node.kill_agent().await.unwrap();
    let all = [first, create(&lab, "b", 8)].concat();
    let pods = ready(&lab, &all).await;
    all_ask_all(&pods).await.unwrap();
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_replies_of_every_mutating_call_double_nothing() {
    needs!("lost_replies_of_every_mutating_call_double_nothing");
    let lab = lab("fc", 1, |config| {
        config.dual = true;
        lay(
            &mut config.agent,
            json!({"pool": {"min_idle": 1, "max_idle": 1, "quarantine": "200ms", "release_delay": "200ms"}}),
        );
    })
    .await;
    let cloud = &lab.site.cloud;
    // One fault per call, so that the hits say of which.
    for api in MUTATING {
        for status in [None, Some(500)] {
            let fault = FaultSpec::from(Fault::LostReply { status }).apis(&[api]);
            // The rarer ones are lost more often, so that some are.
            let percent = if api.starts_with("Unassign") { 65 } else { 40 };
            cloud.add_fault(fault.percent(percent)).unwrap();
        }
    }
    let lost = || {
        let mut lost = BTreeMap::from(MUTATING.map(|api| (api.to_owned(), 0)));
        cloud.faults().iter().for_each(|f| *lost.entry(f.spec.apis[0].clone()).or_default() += f.hits);
        lost
    };
    // It keeps its ENI, so that addresses are given back one by one, not with it.
    lab.create(0, "stays", false);
    lab.ready_within("stays", Duration::from_secs(60)).await;
    for round in 0.. {
        let names = create(&lab, &format!("r{round}"), 5);
        ready(&lab, &names).await;
        delete(&lab, &names).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        if round > 0 && lost().values().all(|hits| *hits > 0) {
            break;
        }
        assert!(round < 8, "replies were lost of these calls only: {:?}", lost());
    }
    let lost = lost();
    let names = create(&lab, "last", 5);
    let pods = ready(&lab, &names).await;
    cloud.clear_faults();
    all_ask_all(&pods).await.unwrap();
    lab.settled().await;
    println!("replies lost: {lost:?}");
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_or_silent_metadata_service_is_waited_for() {
    needs!("a_late_or_silent_metadata_service_is_waited_for");
    let lab = lab("fd", 1, |_| ()).await;
    let cloud = &lab.site.cloud;
    let late = || cloud.add_fault(FaultSpec::from(Fault::MetadataLag { ms: 60_000 })).unwrap();
    late();
    let first = create(&lab, "a", 6);
    ready(&lab, &first).await;
    // Silent while the agent starts: it waits and says so.
    cloud.add_fault(FaultSpec::from(Fault::MetadataDown { status: Some(503) })).unwrap();
    lab.node(0).node.kill_agent().await.unwrap();
    let second = create(&lab, "b", 2);
    lab.until("the agent to say what it waits for", Duration::from_secs(60), async || {
        let log = std::fs::read_to_string(&lab.node(0).node.dirs().agent_log).unwrap();
        if log.contains("metadata service") { Ok(()) } else { Err("it does not".to_owned()) }
    })
    .await;
    cloud.clear_faults();
    late();
    ready(&lab, &second).await;
    cloud.clear_faults();
    all_ask_all(&ready(&lab, &[first, second].concat()).await).await.unwrap();
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exhausted_vswitch_is_avoided_and_told() {
    needs!("an_exhausted_vswitch_is_avoided_and_told");
    let lab = lab("fe", 1, |config| {
        let a = config.cloud.vswitches[0].clone();
        config.cloud.vswitches.push(VSwitchSpec {
            id: "vsw-lab-c".into(),
            cidr4: "10.0.32.0/20".parse().unwrap(),
            cidr6: None,
            ..a
        });
        lay(
            &mut config.agent,
            json!({"pool": {"vswitches": ["vsw-lab-a", "vsw-lab-c"], "min_idle": 0, "max_idle": 2}}),
        );
    })
    .await;
    let cloud = &lab.site.cloud;
    let exhaust = |id: &str| cloud.add_fault(Fault::ExhaustVswitch { vswitch: id.to_owned() }).unwrap();
    exhaust("vsw-lab-a");
    let names = create(&lab, "a", 4);
    let pods = ready(&lab, &names).await;
    all_ask_all(&pods).await.unwrap();
    // Both: the pod waits, its event says why, and it starts when there is room.
    exhaust("vsw-lab-c");
    let more: Vec<String> = create(&lab, "b", 6);
    lab.until("the shortage to be told", Duration::from_secs(30), async || {
        let view = lab.view(0, "/debug/pool").await?;
        let held = view["holds"].to_string();
        if held.contains("vswitch/vsw-lab-c") { Ok(()) } else { Err(held) }
    })
    .await;
    cloud.clear_faults();
    ready(&lab, &more).await;
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_start_and_end_while_the_kubernetes_api_is_away() {
    needs!("pods_start_and_end_while_the_kubernetes_api_is_away");
    let lab = lab("ff", 1, |_| ()).await;
    let names = create(&lab, "a", 2);
    let pods = ready(&lab, &names).await;
    lab.kube().set_away(true);
    let mut by_hand = Vec::new();
    for n in 0..3 {
        let sandbox = Sandbox::new(&lab, 0, &format!("h{n}"));
        let ips = sandbox.call(&lab, 0, "ADD").await.ips();
        assert_eq!(ips.len(), 1);
        asks(sandbox.ns(), &pods[0]).await.unwrap();
        by_hand.push(sandbox);
        if n == 1 {
            // Started anew, the agent serves without the API as well.
            lab.node(0).node.kill_agent().await.unwrap();
            lab.agent_ready(0).await;
        }
    }
    for sandbox in &by_hand {
        assert!(sandbox.call(&lab, 0, "DEL").await.ok);
    }
    lab.kube().set_away(false);
    lab.settled().await;
    lab.down().await;
}

/// A folder whose file system is nearly full, until dropped.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn on(path: &'a Path) -> Self {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some("size=6m,mode=0700")).unwrap();
        Self(path)
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("filler")).unwrap();
        let block = [7u8; 4096];
        while file.write_all(&block).is_ok() {}
    }

    fn clear(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_with_a_reason_and_loses_nothing() {
    needs!("a_full_disk_refuses_with_a_reason_and_loses_nothing");
    let lab = lab("fg", 1, |config| {
        lay(&mut config.agent, json!({"pool": {"min_idle": 6, "max_idle": 10, "quarantine": "50ms"}}));
    })
    .await;
    lab.settled().await;
    let node = &lab.node(0).node;
    node.stop_agent().await;
    let state = node.dirs().state.clone();
    let ledger = state.join("ledger");
    let kept: Vec<_> = walk(&ledger).into_iter().map(|p| (p.clone(), std::fs::read(&p).unwrap())).collect();
    let small = Small::on(&state);
    for (path, content) in kept {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_sparse(&path, &content);
    }
    lab.start_agent(0, &[], Some(Duration::from_millis(200))).await;
    lab.agent_ready(0).await;
    let names = create(&lab, "a", 2);
    let pods = ready(&lab, &names).await;
    for killed in [false, true] {
        small.fill();
        // The ledger goes on in the room that its file has already.
        let busy: Vec<Sandbox> = (0..4).map(|n| Sandbox::new(&lab, 0, &format!("h{n}"))).collect();
        let refused = async |sandbox: &Sandbox| {
            for _ in 0..300 {
                for verb in ["ADD", "DEL"] {
                    let said = sandbox.call(&lab, 0, verb).await;
                    if !said.ok {
                        return Some(said.message());
                    }
                }
            }
            None
        };
        let why = futures::future::join_all(busy.iter().map(refused)).await;
        let why = why.into_iter().flatten().next().expect("the disk is full");
        println!("full disk: {why}");
        assert!(why.contains("ledger"), "{why}");
        // Pods that run go on.
        all_ask_all(&pods).await.unwrap();
        let name = format!("b{killed}");
        lab.create(0, &name, false);
        if killed {
            node.kill_agent().await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            all_ask_all(&pods).await.unwrap();
        }
        small.clear();
        lab.ready(&name).await;
        for sandbox in &busy {
            lab.until("the release", Duration::from_secs(20), async || match sandbox.call(&lab, 0, "DEL").await {
                said if said.ok => Ok(()),
                said => Err(said.message()),
            })
            .await;
        }
        drop(busy);
        lab.settled().await;
    }
    node.stop_agent().await;
    drop(small);
    lab.down().await;
}

/// With holes, as the ledger makes its file: each page written needs room.
fn write_sparse(path: &Path, content: &[u8]) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::create(path).unwrap();
    for (n, page) in content.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        file.write_all_at(page, n as u64 * 4096).unwrap();
    }
    file.set_len(content.len() as u64).unwrap();
}

fn walk(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    entries.flat_map(|p| if p.is_dir() { walk(&p) } else { vec![p] }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_ledger_is_set_aside_and_rebuilt_with_its_leases() {
    needs!("a_corrupt_ledger_is_set_aside_and_rebuilt_with_its_leases");
    let lab = lab("fh", 1, |_| ()).await;
    let names = create(&lab, "a", 5);
    let before = ready(&lab, &names).await;
    lab.settled().await;
    let node = &lab.node(0).node;
    let ledger = node.dirs().state.join("ledger");
    for round in 0..2 {
        node.stop_agent().await;
        for path in walk(&ledger) {
            let mut bytes = std::fs::read(&path).unwrap();
            match round {
                0 => bytes.iter_mut().step_by(7).for_each(|b| *b ^= 0x55),
                _ => bytes.truncate(bytes.len() / 2),
            }
            std::fs::write(&path, bytes).unwrap();
        }
        lab.start_agent(0, &[], Some(Duration::from_millis(200))).await;
        lab.agent_ready(0).await;
        let report = lab.view(0, "/debug/pool").await.unwrap()["ledger"].clone();
        println!("corrupt ledger: {report}");
        if round == 0 {
            assert!(report["damaged"].is_string() && report["moved_to"].is_string(), "{report}");
        }
        // No address of a running pod goes to anybody else.
        let fresh = create(&lab, &format!("n{round}"), 3);
        let mut all = ready(&lab, &fresh).await;
        all.extend(before.clone());
        all_ask_all(&all).await.unwrap();
        for pod in &before {
            assert_eq!(lab.record(&pod.pod.name).unwrap().ips, pod.ips);
        }
        lab.settled().await;
        delete(&lab, &fresh).await;
    }
    delete(&lab, &names).await;
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_nodes_ledger_is_refused_and_left_as_it_is() {
    needs!("another_nodes_ledger_is_refused_and_left_as_it_is");
    let lab = lab("fi", 2, |_| ()).await;
    for node in 0..2 {
        lab.create(node, &format!("a{node}"), false);
    }
    let pods = [lab.ready("a0").await, lab.ready("a1").await];
    lab.settled().await;
    let ledger = |node: usize| lab.node(node).node.dirs().state.join("ledger");
    for node in 0..2 {
        lab.node(node).node.stop_agent().await;
    }
    let own = ledger(0).with_extension("own");
    std::fs::rename(ledger(0), &own).unwrap();
    for path in walk(&ledger(1)) {
        let to = ledger(0).join(path.strip_prefix(ledger(1)).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(&path, to).unwrap();
    }
    lab.start_agent(0, &[], Some(Duration::from_millis(200))).await;
    lab.start_agent(1, &[], Some(Duration::from_millis(200))).await;
    lab.agent_ready(1).await;
    lab.until("the refusal to be told", Duration::from_secs(20), async || {
        let log = std::fs::read_to_string(&lab.node(0).node.dirs().agent_log).unwrap();
        let theirs = &lab.node(1).instance;
        if log.lines().any(|l| l.contains("ledger") && l.contains(theirs)) { Ok(()) } else { Err(lab.last_words()) }
    })
    .await;
    all_ask_all(&pods).await.unwrap();
    // The remedy: its own ledger back in place.
    lab.node(0).node.stop_agent().await;
    std::fs::remove_dir_all(ledger(0)).unwrap();
    std::fs::rename(&own, ledger(0)).unwrap();
    lab.start_agent(0, &[], Some(Duration::from_millis(200))).await;
    lab.agent_ready(0).await;
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_out_of_order_and_half_made_namespaces_lose_nothing() {
    needs!("calls_out_of_order_and_half_made_namespaces_lose_nothing");
    let lab = lab("fj", 1, |_| ()).await;
    let names = create(&lab, "a", 1);
    let pods = ready(&lab, &names).await;

    // DEL before ADD, and again.
    let one = Sandbox::new(&lab, 0, "one");
    assert!(one.call(&lab, 0, "DEL").await.ok);
    // ADD twice: the same address, and it works.
    let first = one.call(&lab, 0, "ADD").await.ips();
    assert_eq!(one.call(&lab, 0, "ADD").await.ips(), first);
    asks(one.ns(), &pods[0]).await.unwrap();
    // Killed between two ADDs: still the same.
    lab.node(0).node.kill_agent().await.unwrap();
    lab.agent_ready(0).await;
    assert_eq!(one.call(&lab, 0, "ADD").await.ips(), first);
    asks(one.ns(), &pods[0]).await.unwrap();
    assert!(one.call(&lab, 0, "DEL").await.ok);
    assert!(one.call(&lab, 0, "DEL").await.ok);

    // Namespaces that are none, or are full already.
    let two = Sandbox::new(&lab, 0, "two");
    for bad in ["/var/run/netns/fairway-no-such-namespace", "/etc/passwd", "/", "relative", ""] {
        let said = two.call_in(&lab, 0, "ADD", bad).await.message();
        assert!(said.len() > 20, "{bad}: {said}");
        two.call_in(&lab, 0, "DEL", bad).await;
    }
    let three = Sandbox::new(&lab, 0, "three");
    let ns = three.ns().name().to_owned();
    let made = std::process::Command::new("ip").args(["-n", &ns, "link", "add", "eth0", "type", "dummy"]).status();
    if made.is_ok_and(|s| s.success()) {
        assert!(three.call(&lab, 0, "ADD").await.message().contains("eth0"));
        assert!(three.call(&lab, 0, "DEL").await.ok);
        // The runtime clears it away: then it goes.
        std::process::Command::new("ip").args(["-n", &ns, "link", "del", "eth0"]).status().unwrap();
        asks_by_hand(&lab, &three, &pods[0]).await;
    }
    assert!(three.call(&lab, 0, "DEL").await.ok);

    // The namespace dies before its DEL.
    let mut four = Sandbox::new(&lab, 0, "four");
    four.call(&lab, 0, "ADD").await.ips();
    four.lose_namespace();
    assert!(four.call(&lab, 0, "DEL").await.ok);
    // And one that nobody ever releases.
    let mut five = Sandbox::new(&lab, 0, "five");
    five.call(&lab, 0, "ADD").await.ips();
    five.lose_namespace();
    lab.settled().await;
    lab.down().await;
}

async fn asks_by_hand(lab: &Lab, sandbox: &Sandbox, to: &PodRecord) {
    sandbox.call(lab, 0, "ADD").await.ips();
    asks(sandbox.ns(), to).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_with_the_agent_down_is_taken_up_when_it_returns() {
    needs!("a_release_with_the_agent_down_is_taken_up_when_it_returns");
    let lab = lab("fk", 1, |_| ()).await;
    let names = create(&lab, "a", 4);
    ready(&lab, &names).await;
    lab.node(0).node.stop_agent().await;
    let began = Instant::now();
    delete(&lab, &names).await;
    assert!(began.elapsed() < Duration::from_secs(10), "kubelet was held up: {:?}", began.elapsed());
    // An ADD meanwhile is refused in words, and made good.
    lab.create(0, "b", false);
    lab.start_agent(0, &[], Some(Duration::from_millis(200))).await;
    lab.ready("b").await;
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_refused_in_words_and_harms_nobody() {
    needs!("garbage_is_refused_in_words_and_harms_nobody");
    let lab = lab("fl", 1, |_| ()).await;
    let names = create(&lab, "a", 2);
    let pods = ready(&lab, &names).await;
    let socket = lab.node(0).node.dirs().root.join("cni.sock");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let garbage: [&[u8]; 7] =
        [b"", b"\0\0\0\0", &[0xff; 70_000], b"{}", b"{\"wire\":1}\n", deep.as_bytes(), b"GET / HTTP/1.1\r\n\r\n"];
    for bytes in garbage {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.take(1 << 20).read_to_end(&mut answer);

        let said = shim(&lab, 0, "ADD", "garbage", "/var/run/netns/x", "g", Some(bytes.to_vec())).await;
        assert!(!said.message().is_empty());
    }
    for id in ["", "../../etc", "a b", "x\n", &"y".repeat(5000)] {
        assert!(!shim(&lab, 0, "ADD", id, "/var/run/netns/x", "g", None).await.message().is_empty());
    }
    assert!(!shim(&lab, 0, "NONSENSE", "id", "/var/run/netns/x", "g", None).await.message().is_empty());
    // Connections that never say anything, too.
    let idle: Vec<UnixStream> = (0..50).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let more = ready(&lab, &create(&lab, "b", 2)).await;
    drop(idle);
    all_ask_all(&[pods, more].concat()).await.unwrap();
    lab.settled().await;
    lab.down().await;
}
