//! Who reaches whom: pods of three namespaces that all ask each other, by real
//! sockets, and what a table says of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fairway::lab::vpc::ns::Netns;
use fairway::lab::workload::client::{Ask, AskError};
use futures::StreamExt as _;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::e2e_support::Lab;
use crate::e2e_support::pods::{first4, ns};

pub const NAMESPACES: [&str; 3] = ["x", "y", "z"];
pub const PODS: [&str; 3] = ["a", "b", "c"];
pub const DOORS: [(u16, Protocol); 4] =
    [(80, Protocol::Tcp), (81, Protocol::Tcp), (80, Protocol::Udp), (81, Protocol::Udp)];
/// Long enough for an answer, and for a SYN that is sent a second time not to count.
const DENIED: Duration = Duration::from_millis(600);
const AT_ONCE: usize = 96;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn word(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        }
    }
}

/// One question: pods as `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probe {
    pub from: String,
    pub to: String,
    pub port: u16,
    pub protocol: Protocol,
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} > {}:{}/{}", self.from, self.to, self.port, self.protocol.word())
    }
}

/// A case of the table.
#[derive(Debug, Deserialize)]
pub struct Case {
    pub case: String,
    pub policies: Vec<Value>,
    pub expect: Vec<String>,
}

impl Case {
    pub fn all() -> Vec<Self> {
        serde_saphyr::from_str(include_str!("../testdata/policies/cases.yaml")).unwrap()
    }

    /// The last line that fits counts.
    pub fn allows(&self, probe: &Probe) -> bool {
        let fits = |line: &&String| fits(line, probe);
        probe.from == probe.to || self.expect.iter().rev().find(fits).is_none_or(|line| line.starts_with("allow "))
    }
}

fn fits(line: &str, probe: &Probe) -> bool {
    let (_, rest) = line.split_once(' ').unwrap();
    let (from, to) = rest.split_once(" > ").unwrap();
    let (to, protocol) = match to.rsplit_once('/').filter(|(_, p)| ["TCP", "UDP"].contains(p)) {
        Some((to, protocol)) => (to, Some(protocol)),
        None => (to, None),
    };
    let (to, port) = match to.split_once(':') {
        Some((to, port)) => (to, Some(port.parse::<u16>().unwrap())),
        None => (to, None),
    };
    let is = |pattern: &str, pod: &str| {
        let (namespace, name) = pattern.split_once('/').unwrap_or(("*", "*"));
        let (n, p) = pod.split_once('/').unwrap();
        (namespace == "*" || namespace == n) && (name == "*" || name == p)
    };
    is(from, &probe.from)
        && is(to, &probe.to)
        && port.is_none_or(|port| port == probe.port)
        && protocol.is_none_or(|protocol| protocol == probe.protocol.word())
}

/// A pod of the matrix, on a node.
pub fn pod(namespace: &str, name: &str, node: &str, exclusive: bool) -> Value {
    let http = if name == "c" { 81 } else { 80 };
    let port = |port: u16| match port == http {
        true => json!({"containerPort": port, "name": "http"}),
        false => json!({"containerPort": port}),
    };
    let mut labels = json!({"app": name});
    if name == "c" {
        labels["tier"] = json!("back");
    }
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c", "image": "registry.example/c:1", "ports": [port(80), port(81)]}],
        },
    });
    if exclusive {
        pod["metadata"]["annotations"] = json!({"fairway.io/eni": "exclusive"});
    }
    pod
}

/// All pods of the matrix, running.
pub struct Matrix {
    pub pods: BTreeMap<String, (Netns, IpAddr)>,
}

impl Matrix {
    /// On two nodes in turn.
    pub async fn up(lab: &Lab, exclusive: bool) -> Self {
        let all = NAMESPACES.iter().flat_map(|n| PODS.iter().map(move |p| (*n, *p)));
        for namespace in NAMESPACES {
            let made = json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": {"team": namespace}},
            });
            lab.kube().apply(made).unwrap();
        }
        for (n, (namespace, name)) in all.clone().enumerate() {
            let node = &lab.node(n % lab.site.nodes.len()).name;
            lab.kube().apply(pod(namespace, name, node, exclusive)).unwrap();
        }
        let mut pods = BTreeMap::new();
        for (namespace, name) in all {
            pods.insert(format!("{namespace}/{name}"), running(lab, namespace, name).await);
        }
        Self { pods }
    }

    pub fn probes(&self) -> Vec<Probe> {
        let mut all = Vec::new();
        for from in self.pods.keys() {
            for to in self.pods.keys() {
                for (port, protocol) in DOORS {
                    all.push(Probe { from: from.clone(), to: to.clone(), port, protocol });
                }
            }
        }
        all
    }

    pub async fn ask(&self, probe: &Probe, within: Duration) -> Result<(), AskError> {
        let (from, _) = &self.pods[&probe.from];
        let (_, to) = &self.pods[&probe.to];
        let ask = Ask::new(SocketAddr::new(*to, probe.port)).within(within);
        match probe.protocol {
            Protocol::Tcp => ask.tcp(from).await.map(drop),
            Protocol::Udp => ask.udp(from).await.map(drop),
        }
    }

    /// Where what happens is not what the case says. A denial must be a silence.
    pub async fn differences(&self, case: &Case) -> Vec<String> {
        let asked = self.probes().into_iter().map(async |probe| {
            let allowed = case.allows(&probe);
            let mut said = self.ask(&probe, DENIED).await;
            if allowed && said.is_err() {
                // A busy machine is no policy.
                said = self.ask(&probe, Duration::from_secs(3)).await;
            }
            match (allowed, said) {
                (true, Ok(())) | (false, Err(AskError::Timeout(_))) => None,
                (true, Err(e)) => Some(format!("{probe} should pass: {e}")),
                (false, Ok(())) => Some(format!("{probe} should not pass")),
                (false, Err(e)) => Some(format!("{probe} should meet silence: {e}")),
            }
        });
        futures::stream::iter(asked).buffer_unordered(AT_ONCE).filter_map(async |found| found).collect().await
    }

    /// `{x/a}` by its address.
    fn filled(&self, policy: &Value) -> Value {
        let mut text = policy.to_string();
        for (name, (_, ip)) in &self.pods {
            text = text.replace(&format!("{{{name}}}"), &ip.to_string());
        }
        serde_json::from_str(&text).unwrap()
    }

    /// The policies of the case, and no others.
    pub fn apply(&self, lab: &Lab, case: &Case) {
        clear(lab);
        for (n, policy) in case.policies.iter().enumerate() {
            let mut spec = self.filled(policy);
            let namespace = spec.as_object_mut().unwrap().remove("in").unwrap();
            let made = json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {"namespace": namespace, "name": format!("p{n}")}, "spec": spec,
            });
            lab.kube().apply(made).unwrap_or_else(|e| panic!("{}: {e:?}", case.case));
        }
    }
}

pub fn clear(lab: &Lab) {
    for policy in lab.kube().list("NetworkPolicy") {
        let (namespace, name) = (&policy["metadata"]["namespace"], &policy["metadata"]["name"]);
        lab.kube().delete("NetworkPolicy", namespace.as_str().unwrap(), name.as_str().unwrap()).unwrap();
    }
}

/// Until it is ready.
pub async fn running(lab: &Lab, namespace: &str, name: &str) -> (Netns, IpAddr) {
    let record = lab
        .until(&format!("pod {namespace}/{name}"), Duration::from_secs(60), async || {
            let found = lab.site.nodes.iter().filter_map(|n| n.kubelet.record(namespace, name));
            match found.filter(|r| !r.ended).last() {
                Some(r) if r.ready => Ok(r),
                Some(r) => Err(format!("failures {:?}", r.failures.last())),
                None => Err("the kubelet has not seen it".to_owned()),
            }
        })
        .await;
    (ns(&record), first4(&record))
}

/// Until every agent's tables say what the API says.
pub async fn settled(lab: &Lab, policies: usize) {
    for node in 0..lab.site.nodes.len() {
        lab.until("the policies to be in force", Duration::from_secs(20), async || {
            let view = lab.view(node, "/debug/policies").await?;
            match view["policies"].as_u64() == Some(policies as u64) && view["error"].is_null() {
                true => Ok(()),
                false => Err(view.to_string()),
            }
        })
        .await;
    }
}
