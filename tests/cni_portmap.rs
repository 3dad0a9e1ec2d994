//! A chain as on real nodes: Debian's `portmap`, which knows CNI up to 1.0.0,
//! after us. It must accept our result, pass it on, and forward a host port to
//! the address in it.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "cni_support/shim.rs"]
mod shim;
#[path = "support/skip.rs"]
mod skipping;
#[path = "cni_support/world.rs"]
mod world;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use skipping::skip as skipped;
use world::World;

const PORTMAP: &str = "/usr/lib/cni/portmap";

fn ip(args: &str) -> bool {
    let status = Command::new("ip").args(args.split_whitespace()).stderr(Stdio::null()).status();
    status.is_ok_and(|s| s.success())
}

/// A named network namespace that goes away with the test.
struct Netns(String);

impl Netns {
    fn new(role: &str) -> Option<Self> {
        let name = format!("fwl-cni{}-{role}", std::process::id());
        ip(&format!("netns add {name}")).then_some(Self(name))
    }
    #[track_caller]
    fn ip(&self, args: &str) {
        assert!(ip(&format!("-n {} {args}", self.0)), "ip {args}");
    }
    fn path(&self) -> String {
        format!("/var/run/netns/{}", self.0)
    }
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }
    /// On a thread of its own, which ends in there.
    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
        let file = File::open(self.path()).unwrap();
        std::thread::spawn(move || {
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.0));
    }
}

fn portmap(node: &Netns, command: &str, pod: &Netns, config: &Value) -> (bool, String) {
    let mut child = node
        .command(PORTMAP)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "a")
        .env("CNI_NETNS", pod.path())
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/usr/lib/cni")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    (out.status.success(), String::from_utf8(out.stdout).unwrap())
}

#[test]
fn portmap_after_us_forwards_a_host_port_to_the_pod() {
    const TEST: &str = "portmap_after_us_forwards_a_host_port_to_the_pod";
    if !Path::new(PORTMAP).exists() {
        return skipped(TEST, "Debian's package containernetworking-plugins");
    }
    let (Some(node), Some(pod)) = (Netns::new("node"), Netns::new("pod")) else {
        return skipped(TEST, "root, or ip netns");
    };
    let nat = node.command("iptables").args(["-t", "nat", "-S"]).stdout(Stdio::null()).status();
    if !nat.is_ok_and(|s| s.success()) {
        return skipped(TEST, "iptables with a nat table");
    }

    // As the wirer would do it, for the address that the probe leases first.
    node.ip("link set lo up");
    node.ip(&format!("link add fw0 type veth peer name eth0 netns {}", pod.0));
    node.ip("addr add 192.0.2.1/32 dev lo");
    node.ip("addr add 169.254.1.1/32 dev fw0");
    node.ip("link set fw0 up");
    node.ip("route add 10.9.0.1/32 dev fw0");
    pod.ip("link set lo up");
    pod.ip("link set eth0 up");
    pod.ip("addr add 10.9.0.1/32 dev eth0");
    pod.ip("route add 169.254.1.1 dev eth0");
    pod.ip("route add default via 169.254.1.1");

    let world = World::up();
    let config = world.conf("1.0.0");
    let ours = shim::Call::new("ADD", "a", &config).with("CNI_NETNS", &pod.path()).run().ok().json();
    let mut chained = json!({
        "cniVersion": "1.0.0",
        "name": "fairway",
        "type": "portmap",
        "capabilities": {"portMappings": true},
        "runtimeConfig": {"portMappings": [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]},
        "prevResult": ours,
    });
    let (ok, result) = portmap(&node, "ADD", &pod, &chained);
    assert!(ok, "{result}");
    let mut passed_on: Value = serde_json::from_str(&result).unwrap();
    passed_on.as_object_mut().unwrap().retain(|_, v| *v != json!({}));
    assert_eq!(passed_on, ours, "it understood all of our result");

    let server = pod.run(|| TcpListener::bind("10.9.0.1:80").unwrap()).join().unwrap();
    let answering = std::thread::spawn(move || server.accept().unwrap().0.write_all(b"pod").unwrap());
    let asking = node.run(|| {
        let to = "192.0.2.1:18080".parse().unwrap();
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(asking.join().unwrap(), "pod");
    answering.join().unwrap();

    // The runtime goes on with the chain's result, and backwards for DEL.
    let mut check = config.clone();
    check["prevResult"] = passed_on.clone();
    shim::Call::new("CHECK", "a", &check).with("CNI_NETNS", &pod.path()).run().ok();
    chained["prevResult"] = passed_on;
    let (ok, out) = portmap(&node, "DEL", &pod, &chained);
    assert!(ok, "{out}");
    shim::Call::new("DEL", "a", &check).with("CNI_NETNS", &pod.path()).run().ok();
    assert!(world.holders().is_empty());
    let refused = node.run(|| TcpStream::connect_timeout(&"192.0.2.1:18080".parse().unwrap(), Duration::from_secs(2)));
    assert!(refused.join().unwrap().is_err(), "the forwarding is gone");
}

#[test]
fn portmap_refuses_the_version_it_does_not_know_and_we_say_what_we_speak() {
    if !Path::new(PORTMAP).exists() {
        return skipped(
            "portmap_refuses_the_version_it_does_not_know_and_we_say_what_we_speak",
            "Debian's package containernetworking-plugins",
        );
    }
    let version = |program: &str| -> Vec<String> {
        let out = Command::new(program).env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).output().unwrap();
        let out: Value = serde_json::from_slice(&out.stdout).unwrap();
        serde_json::from_value(out["supportedVersions"].clone()).unwrap()
    };
    let (theirs, ours) = (version(PORTMAP), version(env!("CARGO_BIN_EXE_fairway-cni")));
    assert!(theirs.contains(&"1.0.0".to_owned()) && ours.contains(&"1.0.0".to_owned()), "{theirs:?} {ours:?}");
    assert!(!theirs.contains(&"1.1.0".to_owned()), "{theirs:?}: the conflist may say 1.1.0 now");
}
