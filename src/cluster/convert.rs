//! From the API's objects to ours: what is kept of a pod and of the node.
//!
//! Pure. Everything else is dropped here, managed fields and container specs
//! above all: hundreds of pods must not cost megabytes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{NodeCondition, NodeInfo, Owner, PodInfo};
use crate::model::PodKey;

/// The condition's type, as other pressure-free conditions: true is good.
pub const CONDITION: &str = "AddressesAvailable";
/// The extended resource that pods with an ENI of their own request.
pub const RESOURCE: &str = "fairway.io/eni";

const KEPT: [&str; 3] =
    ["kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth", "kubernetes.io/config.mirror"];

pub fn pod_key(meta: &ObjectMeta) -> Option<PodKey> {
    Some(PodKey::new(meta.namespace.clone()?, meta.name.clone()?))
}

pub fn pod(pod: Pod) -> Option<(PodKey, PodInfo)> {
    let meta = pod.metadata;
    let key = pod_key(&meta)?;
    let spec = pod.spec.unwrap_or_default();
    let status = pod.status.unwrap_or_default();
    let many = status.pod_ips.unwrap_or_default().into_iter().map(|ip| ip.ip);
    let mut ips: Vec<IpAddr> = many.chain(status.pod_ip).filter_map(|ip| ip.parse().ok()).collect();
    ips.sort_unstable_by_key(|ip| (ip.is_ipv6(), *ip));
    ips.dedup();
    let owners = meta.owner_references.unwrap_or_default();
    let owner = owners.into_iter().find(|o| o.controller == Some(true));
    let info = PodInfo {
        uid: meta.uid.unwrap_or_default(),
        phase: status.phase.unwrap_or_default(),
        terminating: meta.deletion_timestamp.is_some(),
        host_network: spec.host_network.unwrap_or_default(),
        annotations: ours(meta.annotations.unwrap_or_default()),
        labels: meta.labels.unwrap_or_default(),
        owner: owner.map(|o| Owner { kind: o.kind, name: o.name }),
        ips,
        node: spec.node_name.unwrap_or_default(),
    };
    Some((key, info))
}

fn ours(mut annotations: BTreeMap<String, String>) -> BTreeMap<String, String> {
    annotations.retain(|key, _| key.starts_with("fairway.io/") || KEPT.contains(&key.as_str()));
    annotations
}

pub fn node(node: Node) -> NodeInfo {
    let meta = node.metadata;
    let status = node.status.unwrap_or_default();
    let addresses = status.addresses.unwrap_or_default();
    let condition = status.conditions.unwrap_or_default().into_iter().find(|c| c.type_ == CONDITION);
    let mut capacity = status.capacity.unwrap_or_default();
    NodeInfo {
        name: meta.name.unwrap_or_default(),
        uid: meta.uid.unwrap_or_default(),
        labels: meta.labels.unwrap_or_default(),
        annotations: ours(meta.annotations.unwrap_or_default()),
        addresses: addresses.iter().filter_map(|a| a.address.parse().ok()).collect(),
        condition: condition.map(|c| NodeCondition {
            available: c.status == "True",
            reason: c.reason.unwrap_or_default(),
            message: c.message.unwrap_or_default(),
        }),
        exclusive_enis: capacity.remove(RESOURCE).map(|q| q.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_keeps_what_others_ask_for_and_nothing_else() {
        let object = json!({
            "metadata": {
                "namespace": "default", "name": "web-0", "uid": "u1", "deletionTimestamp": "2026-01-01T00:00:00Z",
                "annotations": {"fairway.io/eni": "exclusive", "kubernetes.io/ingress-bandwidth": "1M", "huge": "x".repeat(1000)},
                "labels": {"app": "web"},
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "Other", "name": "o", "uid": "x"},
                    {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "uid": "s", "controller": true},
                ],
                "managedFields": [{"manager": "m"}],
            },
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "2001:db8::1"}, {"ip": "10.0.0.1"}]},
        });
        let (key, info) = pod(serde_json::from_value(object).unwrap()).unwrap();
        assert_eq!(key, PodKey::new("default", "web-0"));
        assert_eq!(info.annotations.len(), 2);
        assert!(info.terminating && info.owned_by("StatefulSet") && !info.finished());
        assert_eq!(info.ips, ["10.0.0.1".parse::<IpAddr>().unwrap(), "2001:db8::1".parse().unwrap()]);
    }

    #[test]
    fn an_empty_object_is_no_pod() {
        assert!(pod(Pod::default()).is_none());
        assert_eq!(node(Node::default()), NodeInfo::default());
    }
}
