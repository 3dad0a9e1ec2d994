//! CNI calls by hand, as a runtime without kubelet would make them.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use fairway::lab::kubelet::conf::pod_ips;
use fairway::lab::vpc::ns::{Netns, OwnedNetns};
use serde_json::{Value, json};

use super::Lab;

/// What the shim said.
#[derive(Debug)]
pub struct Said {
    pub ok: bool,
    pub out: Value,
}

impl Said {
    pub fn ips(&self) -> Vec<IpAddr> {
        assert!(self.ok, "{:?}", self.out);
        pod_ips(&self.out)
    }

    pub fn message(&self) -> String {
        assert!(!self.ok, "{:?}", self.out);
        assert!(self.out["code"].as_u64().is_some(), "no CNI error object: {:?}", self.out);
        format!("{} {}", self.out["msg"], self.out["details"])
    }
}

/// A sandbox made by hand; its namespace goes with it.
pub struct Sandbox {
    pub id: String,
    pub name: String,
    ns: Option<OwnedNetns>,
    path: PathBuf,
}

impl Sandbox {
    /// `cni-` namespaces of a lab are swept by its notes, so this one has one.
    pub fn new(lab: &Lab, node: usize, name: &str) -> Self {
        let ns = OwnedNetns::create(&lab.site.id().name(name)).unwrap();
        let id = format!("{}{node}{name}", lab.site.id());
        Self { id, name: name.to_owned(), path: ns.path().to_owned(), ns: Some(ns) }
    }

    pub fn ns(&self) -> &Netns {
        self.ns.as_ref().unwrap()
    }

    pub fn lose_namespace(&mut self) {
        self.ns = None;
    }

    pub async fn call(&self, lab: &Lab, node: usize, verb: &str) -> Said {
        self.call_in(lab, node, verb, self.path.to_str().unwrap()).await
    }

    pub async fn call_in(&self, lab: &Lab, node: usize, verb: &str, netns: &str) -> Said {
        shim(lab, node, verb, &self.id, netns, &self.name, None).await
    }
}

/// Run the shim of a node once; `stdin` replaces the configuration.
pub async fn shim(
    lab: &Lab,
    node: usize,
    verb: &str,
    id: &str,
    netns: &str,
    pod: &str,
    stdin: Option<Vec<u8>>,
) -> Said {
    let dirs = lab.node(node).node.dirs();
    let text = std::fs::read_to_string(dirs.net_d.join("10-fairway.conflist")).unwrap();
    let list: Value = serde_json::from_str(&text).unwrap();
    let mut config = list["plugins"][0].clone();
    config["name"] = list["name"].clone();
    config["cniVersion"] = json!("1.0.0");
    let mut command = Command::new(dirs.cni_bin.join("fairway-cni"));
    command.env_clear();
    command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", id).env("CNI_NETNS", netns).env("CNI_IFNAME", "eth0");
    command.env("CNI_PATH", &dirs.cni_bin);
    command.env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod}"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let input = stdin.unwrap_or_else(|| config.to_string().into_bytes());
    let done = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        // The shim need not read all of it.
        let _ = child.stdin.take().unwrap().write_all(&input);
        child.wait_with_output().unwrap()
    });
    let done = done.await.unwrap();
    let out = match done.stdout.iter().all(u8::is_ascii_whitespace) {
        true => Value::Null,
        false => serde_json::from_slice(&done.stdout)
            .unwrap_or_else(|e| panic!("stdout is no JSON ({e}): {:?}", String::from_utf8_lossy(&done.stdout))),
    };
    Said { ok: done.status.success(), out }
}
