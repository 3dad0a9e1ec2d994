//! The overlay that pods with VPC addresses do without: VXLAN between two
//! nodes, with a bridge and a veth pair per pod, as flannel builds it.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::lab::vpc::ns::{self, OwnedNetns};

/// One end: a node's namespace (by `ip netns` name) and its address in the VPC.
#[derive(Clone, Debug)]
pub struct End {
    pub node: String,
    pub underlay: Ipv4Addr,
}

/// Two pods on an overlay between two nodes; removed when dropped.
pub struct Overlay {
    ends: [End; 2],
    pods: [String; 2],
    /// Not by `ip netns`: on a machine where it is the first to make one, it puts
    /// a mount over those that are there, and they cannot be removed any more.
    namespaces: Vec<OwnedNetns>,
}

/// The header VXLAN adds over IPv4.
const OVERHEAD: u32 = 50;

impl Overlay {
    /// `prefix` starts the names of the two pod namespaces.
    pub fn build(prefix: &str, ends: [End; 2], mtu: u32) -> io::Result<Self> {
        let pods = [0, 1].map(|i| format!("{prefix}vx{i}"));
        let mut overlay = Self { pods, ends, namespaces: Vec::new() };
        // What a killed run left behind would be in the way.
        overlay.remove();
        for side in 0..2 {
            overlay.namespaces.push(OwnedNetns::create(&overlay.pods[side]).map_err(io::Error::other)?);
            overlay.build_side(side, mtu - OVERHEAD)?;
        }
        Ok(overlay)
    }

    fn build_side(&self, side: usize, mtu: u32) -> io::Result<()> {
        let (own, other) = (&self.ends[side], &self.ends[1 - side]);
        let (node, pod) = (own.node.as_str(), self.pods[side].as_str());
        let (own_mac, other_mac) = (vtep_mac(side), vtep_mac(1 - side));
        let (own_ip, other_ip) = (own.underlay.to_string(), other.underlay.to_string());
        let n = side;
        let o = 1 - side;
        ip(&format!(
            "-n {node} link add flannel.1 address {own_mac} mtu {mtu} type vxlan id 1 local {own_ip} dev eth0 dstport 8472 nolearning"
        ))?;
        ip(&format!("-n {node} addr add 10.244.{n}.0/32 dev flannel.1"))?;
        ip(&format!("-n {node} link set flannel.1 up"))?;
        ip(&format!("-n {node} link add cni0 mtu {mtu} type bridge"))?;
        ip(&format!("-n {node} addr add 10.244.{n}.1/24 dev cni0"))?;
        ip(&format!("-n {node} link set cni0 up"))?;
        forwards(&Path::new("/var/run/netns").join(node), &["cni0", "flannel.1"])?;
        ip(&format!("-n {node} link add fwvx0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pod}"))?;
        ip(&format!("-n {node} link set fwvx0 master cni0 up"))?;
        ip(&format!("-n {pod} link set lo up"))?;
        ip(&format!("-n {pod} link set eth0 up"))?;
        ip(&format!("-n {pod} addr add 10.244.{n}.2/24 dev eth0"))?;
        ip(&format!("-n {pod} route add default via 10.244.{n}.1"))?;
        ip(&format!("-n {node} route add 10.244.{o}.0/24 via 10.244.{o}.0 dev flannel.1 onlink"))?;
        ip(&format!("-n {node} neigh add 10.244.{o}.0 lladdr {other_mac} dev flannel.1 nud permanent"))?;
        run("bridge", &format!("-n {node} fdb append {other_mac} dev flannel.1 dst {other_ip} self permanent"))?;
        Ok(())
    }

    pub fn pod(&self, side: usize) -> PathBuf {
        Path::new("/var/run/netns").join(&self.pods[side])
    }

    pub fn address(&self, side: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, side as u8, 2)
    }

    fn remove(&self) {
        for (end, pod) in self.ends.iter().zip(&self.pods) {
            // Each may be gone already.
            let _ = ns::remove(&Path::new(ns::NETNS_DIR).join(pod));
            let _ = ip(&format!("-n {} link del flannel.1", end.node));
            let _ = ip(&format!("-n {} link del cni0", end.node));
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Packets that come in by these devices are routed on.
fn forwards(node: &Path, devices: &'static [&'static str]) -> io::Result<()> {
    let write = move || {
        devices
            .iter()
            .try_for_each(|device| std::fs::write(format!("/proc/sys/net/ipv4/conf/{device}/forwarding"), "1"))
    };
    let done = super::traffic::in_namespace(node, None, write).join();
    done.unwrap_or_else(|_| Err(io::Error::other("the thread in the node's namespace panicked")))
}

fn vtep_mac(side: usize) -> String {
    format!("0e:f1:00:00:00:{:02x}", side + 1)
}

fn ip(arguments: &str) -> io::Result<()> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &str) -> io::Result<()> {
    let output = Command::new(program).args(arguments.split_whitespace()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
