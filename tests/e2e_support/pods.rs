//! Pods: made, awaited, asked.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fairway::lab::kubelet::record::PodRecord;
use fairway::lab::vpc::ns::Netns;
use fairway::lab::workload::client::Ask;
use serde_json::{Value, json};

use super::Lab;

pub const PORT: u16 = 8080;

/// A pod that answers on [`PORT`], bound to a node.
pub fn pod(name: &str, node: &str, exclusive: bool) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c", "image": "registry.example/c:1", "ports": [{"containerPort": PORT}]}],
        },
    });
    if exclusive {
        pod["metadata"]["annotations"] = json!({"fairway.io/eni": "exclusive"});
    }
    pod
}

impl Lab {
    pub fn create(&self, index: usize, name: &str, exclusive: bool) {
        self.kube().apply(pod(name, &self.node(index).name, exclusive)).unwrap();
    }

    /// A Service of the pods labelled `app: web`, TCP and UDP; its address.
    pub fn serve_web(&self) -> std::net::SocketAddr {
        let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "port": 80, "targetPort": 8080, "protocol": protocol});
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [port("TCP"), port("UDP")]},
        });
        self.kube().apply(service).unwrap();
        let service = self.kube().get("Service", "default", "web").unwrap();
        format!("{}:80", service["spec"]["clusterIP"].as_str().unwrap()).parse().unwrap()
    }

    pub fn delete(&self, name: &str) {
        self.kube().delete("Pod", "default", name).unwrap();
    }

    pub fn record(&self, name: &str) -> Option<PodRecord> {
        let mut found = self.site.nodes.iter().filter_map(|n| n.kubelet.record("default", name)).collect::<Vec<_>>();
        found.sort_by_key(|r| r.ended);
        found.into_iter().next()
    }

    pub async fn ready(&self, name: &str) -> PodRecord {
        self.ready_within(name, Duration::from_secs(30)).await
    }

    pub async fn ready_within(&self, name: &str, patience: Duration) -> PodRecord {
        self.until(&format!("pod {name}"), patience, async || match self.record(name) {
            Some(r) if r.ready && !r.ended => Ok(r),
            Some(r) => Err(format!("ready {} ended {} failures {:?}", r.ready, r.ended, r.failures.last())),
            None => Err("the kubelet has not seen it".to_owned()),
        })
        .await
    }

    /// Until the API has it no more and its namespace has been released.
    pub async fn gone(&self, name: &str) {
        self.until(&format!("pod {name} to be gone"), Duration::from_secs(30), async || {
            let ended = self.record(name).is_none_or(|r| r.ended);
            match self.kube().get("Pod", "default", name) {
                None if ended => Ok(()),
                other => Err(format!("in the API: {}, ended: {ended}", other.is_some())),
            }
        })
        .await;
    }

    /// Every pod that runs or wants to.
    pub fn living(&self) -> Vec<PodRecord> {
        self.site.nodes.iter().flat_map(|n| n.kubelet.records()).filter(|r| !r.ended).collect()
    }
}

pub fn ns(record: &PodRecord) -> Netns {
    Netns::open(record.netns.as_ref().unwrap()).unwrap()
}

pub fn first4(record: &PodRecord) -> IpAddr {
    *record.ips.iter().find(|ip| ip.is_ipv4()).unwrap()
}

/// Ask the pod's name over TCP and UDP at each of its addresses.
pub async fn asks(from: &Netns, to: &PodRecord) -> Result<(), String> {
    for ip in &to.ips {
        let at = SocketAddr::new(*ip, PORT);
        let wrong = |how: &str, what: String| format!("{how} {} ({at}) from {}: {what}", to.pod.name, from.name());
        for (how, answer) in [("tcp", Ask::new(at).tcp(from).await), ("udp", Ask::new(at).udp(from).await)] {
            match answer {
                Ok(answer) if answer.text == to.pod.name => {}
                Ok(answer) => return Err(wrong(how, format!("answered {:?}", answer.text))),
                Err(e) => return Err(wrong(how, e.to_string())),
            }
        }
    }
    Ok(())
}

/// Every pod asks every pod, itself left out.
pub async fn all_ask_all(pods: &[PodRecord]) -> Result<usize, String> {
    let mut asked = 0;
    for from in pods {
        for to in pods.iter().filter(|to| to.pod != from.pod) {
            asks(&ns(from), to).await?;
            asked += to.ips.len() * 2;
        }
    }
    Ok(asked)
}
