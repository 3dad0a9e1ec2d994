//! A small VPC for tests: unique names per process, removed even on failure.
#![allow(dead_code)]

#[path = "../support/skip.rs"]
mod skipping;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fairway::lab::fabric::{EniPort, Fabric};
use fairway::lab::vpc::name::LabId;
use fairway::lab::vpc::ns::{Netns, OwnedNetns};
use fairway::lab::vpc::os::{self, Boot};
use fairway::lab::vpc::{Vpc, VpcConfig};
use fairway::model::Mac;
pub use skipping::skip;

/// What the tests cannot do without, or `None` when all is there.
pub fn missing() -> Option<&'static str> {
    skipping::missing_of(&[skipping::NFT])
}

pub fn lab_id(letter: char) -> LabId {
    format!("v{letter}{}", std::process::id()).parse().unwrap()
}

/// Removes what a failed test left.
pub struct Cleanup(pub LabId);

impl Drop for Cleanup {
    fn drop(&mut self) {
        let _ = fairway::lab::node::down::sweep(&self.0);
    }
}

pub fn v4(s: &str) -> Ipv4Addr {
    s.parse().unwrap()
}

pub fn v6(s: &str) -> Ipv6Addr {
    s.parse().unwrap()
}

pub fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

/// An ENI in 10.9.0.0/24 and fd09::/64.
pub fn eni(id: &str, instance: &str, last: u8, addresses: &[&str]) -> EniPort {
    EniPort {
        eni_id: id.into(),
        instance_id: instance.into(),
        mac: Mac([0, 0x16, 0x3e, 9, 9, last]),
        queues: 4,
        subnet4: "10.9.0.0/24".parse().unwrap(),
        gateway4: v4("10.9.0.253"),
        subnet6: Some("fd09::/64".parse().unwrap()),
        gateway6: Some(v6("fd09::fffd")),
        v4: addresses.iter().filter_map(|a| a.parse().ok()).collect(),
        v6: addresses.iter().filter_map(|a| a.parse().ok()).collect(),
    }
}

/// A machine with a booted primary ENI.
pub async fn machine(vpc: &Vpc, name: &str, port: EniPort) -> OwnedNetns {
    let ns = OwnedNetns::create(&vpc.id().name(name)).unwrap();
    vpc.register_instance(&port.instance_id, &ns).await;
    let boot = Boot::from(&port);
    let eni_id = port.eni_id.clone();
    vpc.attach(port).await.unwrap();
    os::boot(&ns, &boot).await.unwrap();
    assert!(vpc.settled(&eni_id).await.unwrap());
    ns
}

pub async fn vpc(letter: char) -> (Cleanup, Vpc) {
    let id = lab_id(letter);
    let cleanup = Cleanup(id.clone());
    let vpc = Vpc::up(VpcConfig::new(id)).await.unwrap();
    (cleanup, vpc)
}

pub fn sh(ns: &Netns, command: &str) -> String {
    let command = command.to_owned();
    let out = ns.run(|| std::process::Command::new("sh").args(["-c", &command]).output().unwrap()).unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
