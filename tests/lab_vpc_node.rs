//! A node has what an agent needs, and leaves nothing behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab_vpc_support;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fairway::lab::fabric::Fabric;
use fairway::lab::node::agent::AgentSpec;
use fairway::lab::node::{Node, down};
use fairway::lab::vpc::ns;
use fairway::lab::vpc::os::Boot;
use fairway::lab::workload::client::ping;
use lab_vpc_support::*;

/// A stand-in for the agent: tells where it runs, then waits.
fn agent(dir: &Path, restart_after: Option<Duration>) -> AgentSpec {
    let script = "readlink /proc/self/ns/net > \"$OUT\"; cat /proc/self/cgroup >> \"$OUT\"; mv \"$OUT\" \"$OUT.done\"; exec sleep 1000";
    let out = dir.join("seen");
    AgentSpec {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: vec![("OUT".into(), out.display().to_string())],
        restart_after,
    }
}

async fn appears(path: &Path) -> String {
    for _ in 0..500 {
        if let Ok(text) = std::fs::read_to_string(path) {
            return text;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} did not appear", path.display());
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[tokio::test]
async fn a_node_boots_its_primary_eni_and_runs_its_agent_inside() {
    if let Some(missing) = missing() {
        return skip("a_node_boots_its_primary_eni_and_runs_its_agent_inside", missing);
    }
    let (cleanup, vpc) = vpc('j').await;
    let node = Node::create(vpc.id(), "n1").await.unwrap();
    vpc.register_instance("i-1", node.ns()).await;
    let port = eni("eni-1", "i-1", 1, &["10.9.0.1", "fd09::1"]);
    vpc.attach(port.clone()).await.unwrap();
    assert_eq!(node.boot(&Boot::from(&port)).await.unwrap(), "eth0");
    assert_eq!(sh(node.ns(), "cat /proc/sys/net/ipv4/ip_forward").trim(), "0", "left as the kernel has it");
    assert!(sh(node.ns(), "ip -4 addr show eth0").contains("10.9.0.1/24"));
    ping(node.ns(), ip("10.9.0.253"), Duration::from_secs(2)).await.unwrap();

    // sysfs shows the node's devices, not the machine's.
    let devices: BTreeSet<String> = std::fs::read_dir(node.dirs().sys.join("class/net"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(devices, BTreeSet::from(["eth0".to_owned(), "lo".to_owned()]));
    assert!(node.dirs().sys.join("class/net/eth0/queues/rx-3").is_dir());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(mounts.contains(&format!("{} bpf", node.dirs().bpf.display())));

    let pid = node.start_agent(agent(&node.dirs().state, None)).await.unwrap();
    let seen = appears(&node.dirs().state.join("seen.done")).await;
    let inode = node.ns().identity().unwrap().1;
    assert!(seen.contains(&format!("net:[{inode}]")), "{seen}");
    assert!(seen.contains(&cleanup.0.name("n1")), "{seen}");
    // Killed it stays dead; started again it is another process.
    assert_eq!(node.kill_agent().await.unwrap().pid, pid);
    assert!(!alive(pid) && node.agent_pid().await.is_none());
    let again = node.start_agent(agent(&node.dirs().state, Some(Duration::from_millis(20)))).await.unwrap();
    let mut exits = node.agent_exits().await.unwrap();
    node.kill_agent().await.unwrap();
    assert_eq!(exits.wait_for(|e| e.count == 1).await.unwrap().last.as_ref().unwrap().pid, again);
    let third = loop {
        match node.agent_pid().await {
            Some(pid) => break pid,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert!(third != again && alive(third));

    let (root, cgroup) = (node.dirs().root.clone(), node.cgroup().to_owned());
    vpc.forget_instance("i-1").await.unwrap();
    node.down().await.unwrap();
    assert!(!alive(third) && !root.exists() && !cgroup.exists());
    vpc.down().await.unwrap();
    assert!(ns::list(&cleanup.0.prefix()).unwrap().is_empty());
}

#[tokio::test]
async fn an_agent_dies_with_the_lab_and_down_removes_the_rest() {
    const NAME: &str = "an_agent_dies_with_the_lab_and_down_removes_the_rest";
    if let Some(missing) = missing() {
        return skip(NAME, missing);
    }
    // The lab is a process of its own here, killed without a chance to clean up.
    if let Ok(id) = std::env::var("FAIRWAY_TEST_LAB") {
        return be_a_lab(id.parse().unwrap()).await;
    }
    let id = lab_id('k');
    let cleanup = Cleanup(id.clone());
    let mut lab = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env("FAIRWAY_TEST_LAB", id.as_str())
        .spawn()
        .unwrap();
    let pid: u32 = appears(&id.state_dir().join("agent.pid")).await.parse().unwrap();
    assert!(alive(pid));
    assert!(matches!(down::claim(&id), Err(down::DownError::Running(_, _))));
    assert!(down::labs().contains(&id));
    lab.kill().unwrap();
    lab.wait().unwrap();
    for _ in 0..500 {
        if !alive(pid) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!alive(pid), "the agent outlived the lab");

    // A process that sits in one of its namespaces, in no cgroup of the lab.
    let stray_ns = ns::Netns::named(&id.name("n1")).unwrap();
    let mut stray = stray_ns.run(|| std::process::Command::new("sleep").arg("1000").spawn().unwrap()).unwrap();
    drop(stray_ns);
    // A pod's namespace, and a note that must not be believed.
    let pod = ns::Netns::create(&format!("cni-{}", id.as_str())).unwrap().path().to_owned();
    let notes = id.state_dir().join("n1/sandboxes");
    std::fs::write(notes.join("pod"), pod.display().to_string()).unwrap();
    std::fs::write(notes.join("evil"), "/etc/passwd").unwrap();

    let swept = down::sweep(&id).unwrap();
    assert_eq!(swept.mounts.len(), 2, "{swept:?}");
    assert_eq!(swept.cgroups.len(), 1, "{swept:?}");
    assert_eq!(swept.namespaces.len(), 3, "{swept:?}");
    assert!(swept.processes.contains(&stray.id().cast_signed()), "{swept:?}");
    stray.wait().unwrap();
    assert!(!pod.exists() && !id.state_dir().exists() && Path::new("/etc/passwd").exists());
    assert!(down::sweep(&id).unwrap().is_empty());
    assert!(!down::labs().contains(&id));
    drop(cleanup);
}

async fn be_a_lab(id: fairway::lab::vpc::name::LabId) {
    let _claim = down::claim(&id).unwrap();
    let _vpc = fairway::lab::vpc::Vpc::up(fairway::lab::vpc::VpcConfig::new(id.clone())).await.unwrap();
    let node = Node::create(&id, "n1").await.unwrap();
    let pid = node.start_agent(agent(&node.dirs().state, None)).await.unwrap();
    let fresh: PathBuf = id.state_dir().join("agent.pid.new");
    std::fs::write(&fresh, pid.to_string()).unwrap();
    std::fs::rename(&fresh, id.state_dir().join("agent.pid")).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn down_stops_a_running_lab() {
    const NAME: &str = "down_stops_a_running_lab";
    if let Some(missing) = missing() {
        return skip(NAME, missing);
    }
    if let Ok(id) = std::env::var("FAIRWAY_TEST_LAB") {
        return be_a_lab(id.parse().unwrap()).await;
    }
    let id = lab_id('l');
    let _cleanup = Cleanup(id.clone());
    let mut lab = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env("FAIRWAY_TEST_LAB", id.as_str())
        .spawn()
        .unwrap();
    appears(&id.state_dir().join("agent.pid")).await;
    let sweep = tokio::task::spawn_blocking({
        let id = id.clone();
        move || down::sweep(&id).unwrap()
    });
    lab.wait().unwrap();
    assert!(sweep.await.unwrap().processes.contains(&lab.id().cast_signed()));
    assert!(ns::list(&id.prefix()).unwrap().is_empty() && !id.state_dir().exists());
}

#[tokio::test]
async fn a_plugin_is_found_in_the_nodes_folder() {
    if let Some(missing) = missing() {
        return skip("a_plugin_is_found_in_the_nodes_folder", missing);
    }
    let id = lab_id('m');
    let _cleanup = Cleanup(id.clone());
    let node = Node::create(&id, "n1").await.unwrap();
    let tool = tempfile::NamedTempFile::new().unwrap();
    std::fs::set_permissions(tool.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    node.install_plugin("tool", tool.path()).unwrap();
    node.install_plugin("tool", tool.path()).unwrap();
    assert_eq!(std::fs::read_link(node.dirs().cni_bin.join("tool")).unwrap(), tool.path());
    node.down().await.unwrap();
}
