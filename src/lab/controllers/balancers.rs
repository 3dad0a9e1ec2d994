//! Load balancers of Services, as a cloud's controller manager makes them: an
//! address for each Service of the type, its listeners, and who is behind them.
//!
//! Behind a listener are the pods' own addresses, as in a VPC where pods have
//! them, or with the annotation [`BACKEND_TYPE`] `ecs` the nodes at the Service's
//! node port: those with a ready pod where externalTrafficPolicy is Local. What
//! the router is to do is published as a whole; whoever has the router takes it
//! from there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Controller, Key, Queue, key, set_status};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, list, text};
use crate::lab::kube::registry::{Ctx, Registry, WatchEvent};
use crate::lab::vpc::nft::{Listeners, Transport};

pub const BACKEND_TYPE: &str = "service.beta.kubernetes.io/backend-type";

/// Addresses of load balancers are from here (documentation addresses).
const FIRST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const COUNT: u32 = 254;

pub struct Balancers {
    given: BTreeMap<Key, IpAddr>,
    listeners: BTreeMap<Key, Listeners>,
    publish: watch::Sender<Listeners>,
}

impl Balancers {
    pub fn new() -> (Self, watch::Receiver<Listeners>) {
        let (publish, published) = watch::channel(Listeners::new());
        (Self { given: BTreeMap::new(), listeners: BTreeMap::new(), publish }, published)
    }

    /// The address it has or gets; `None` when all are given.
    fn address(&mut self, service: &Value, of: &Key) -> Option<IpAddr> {
        let said = text(service, "/status/loadBalancer/ingress/0/ip").parse().ok();
        if let Some(known) = said.or_else(|| self.given.get(of).copied()) {
            self.given.insert(of.clone(), known);
            return Some(known);
        }
        let taken: BTreeSet<&IpAddr> = self.given.values().collect();
        let all = (0..COUNT).map(|n| IpAddr::V4(Ipv4Addr::from_bits(FIRST.to_bits() + n)));
        let free = all.into_iter().find(|ip| !taken.contains(ip))?;
        self.given.insert(of.clone(), free);
        Some(free)
    }

    fn set(&mut self, of: &Key, listeners: Listeners) {
        match listeners.is_empty() {
            true => drop(self.listeners.remove(of)),
            false => drop(self.listeners.insert(of.clone(), listeners)),
        }
        let all: Listeners = self.listeners.values().flatten().map(|(at, to)| (*at, to.clone())).collect();
        self.publish.send_if_modified(|published| {
            let changed = *published != all;
            *published = all;
            changed
        });
    }
}

impl Controller for Balancers {
    const NAME: &'static str = "cloud-controller-manager";
    type Key = Key;

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![named("Service"), named("EndpointSlice")]
    }

    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<Key>) {
        let Some(object) = event.object() else { return };
        match kind.kind {
            "Service" => queue.add(key(object)),
            _ => {
                let labels = object::labels(object);
                if let Some(service) = labels.and_then(|l| l.get(super::endpoints::SERVICE)).and_then(Value::as_str) {
                    queue.add((object::namespace(object).to_owned(), service.to_owned()));
                }
            }
        }
    }

    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, key: &Key) -> Result<Option<Duration>, ApiError> {
        let (namespace, name) = key;
        let service = api.find(named("Service"), namespace, name).filter(|s| !object::deleting(s));
        let balanced = |s: &Arc<Value>| text(s, "/spec/type") == "LoadBalancer" && is_default(s);
        let Some(service) = service.filter(balanced) else {
            self.given.remove(key);
            self.set(key, Listeners::new());
            return Ok(None);
        };
        let Some(vip) = self.address(&service, key) else {
            return Err(ApiError::bad_request("no address for a load balancer is left".to_owned()));
        };
        if text(&service, "/status/loadBalancer/ingress/0/ip") != vip.to_string() {
            let status = json!({"loadBalancer": {"ingress": [{"ip": vip.to_string(), "ipMode": "VIP"}]}});
            set_status(api, ctx, named("Service"), &service, status)?;
        }
        let mut slices = api.within(named("EndpointSlice"), namespace);
        let of = |slice: &Value| object::labels(slice)?.get(super::endpoints::SERVICE)?.as_str().map(str::to_owned);
        slices.retain(|slice| of(slice).as_ref() == Some(name));
        let nodes = api.within(named("Node"), "");
        self.set(key, listeners(&service, vip, &slices, &nodes));
        Ok(None)
    }
}

/// Not another controller's.
fn is_default(service: &Value) -> bool {
    text(service, "/spec/loadBalancerClass").is_empty()
}

/// Pure: who is behind each port.
fn listeners(service: &Value, vip: IpAddr, slices: &[Arc<Value>], nodes: &[Arc<Value>]) -> Listeners {
    let by_nodes = object::annotation(service, BACKEND_TYPE) == "ecs";
    let local = text(service, "/spec/externalTrafficPolicy") == "Local";
    let port = |object: &Value, at: &str| object::int(object, at).and_then(|p| u16::try_from(p).ok());
    let mut all = Listeners::new();
    for wanted in list(service, "/spec/ports") {
        let Some(number) = port(wanted, "/port") else { continue };
        let transport = match text(wanted, "/protocol") {
            "TCP" => Transport::Tcp,
            "UDP" => Transport::Udp,
            _ => continue,
        };
        let mut behind = BTreeSet::new();
        let mut with_pods = BTreeSet::new();
        for slice in slices {
            let named = |p: &&Value| {
                text(p, "/name") == text(wanted, "/name") && text(p, "/protocol") == text(wanted, "/protocol")
            };
            let Some(target) = list(slice, "/ports").iter().find(named).and_then(|p| port(p, "/port")) else {
                continue;
            };
            let ready = |e: &&Value| e.pointer("/conditions/ready").and_then(Value::as_bool).unwrap_or(true);
            for endpoint in list(slice, "/endpoints").iter().filter(ready) {
                with_pods.insert(text(endpoint, "/nodeName"));
                let addresses = list(endpoint, "/addresses").iter().filter_map(Value::as_str);
                behind.extend(addresses.filter_map(|ip| Some(SocketAddr::new(ip.parse().ok()?, target))));
            }
        }
        if by_nodes {
            let Some(node_port) = port(wanted, "/nodePort") else { continue };
            let serving = nodes.iter().filter(|node| !local || with_pods.contains(object::name(node)));
            let addresses = serving.flat_map(|node| list(node, "/status/addresses"));
            let internal = addresses.filter(|a| text(a, "/type") == "InternalIP");
            behind =
                internal.filter_map(|a| Some(SocketAddr::new(text(a, "/address").parse().ok()?, node_port))).collect();
        }
        behind.retain(|to| to.is_ipv4() == vip.is_ipv4());
        if !behind.is_empty() {
            all.entry((vip, number, transport)).or_default().extend(behind);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(annotation: &str, policy: &str) -> Value {
        json!({
            "metadata": {"name": "web", "annotations": {BACKEND_TYPE: annotation}},
            "spec": {"externalTrafficPolicy": policy, "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080},
                {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
            ]},
        })
    }

    fn cluster() -> (Vec<Arc<Value>>, Vec<Arc<Value>>) {
        let slice = json!({
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "nodeName": "n1", "conditions": {"ready": true}},
                {"addresses": ["10.0.0.2"], "nodeName": "n2", "conditions": {"ready": false}},
                {"addresses": ["10.0.0.3"], "nodeName": "n1"},
            ],
        });
        let node = |name: &str, ip: &str| {
            let addresses = json!([{"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": name}]);
            Arc::new(json!({"metadata": {"name": name}, "status": {"addresses": addresses}}))
        };
        (vec![Arc::new(slice)], vec![node("n1", "10.1.0.1"), node("n2", "10.1.0.2")])
    }

    fn behind(annotation: &str, policy: &str) -> Vec<(u16, Vec<String>)> {
        let (slices, nodes) = cluster();
        let vip = IpAddr::V4(FIRST);
        let all = listeners(&service(annotation, policy), vip, &slices, &nodes);
        all.into_iter().map(|((_, port, _), to)| (port, to.iter().map(SocketAddr::to_string).collect())).collect()
    }

    #[test]
    fn ready_pods_are_behind_it_or_the_nodes_that_have_one() {
        let own = |all: &[&str]| all.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        assert_eq!(behind("", "Cluster"), [(80, own(&["10.0.0.1:8080", "10.0.0.3:8080"]))]);
        let every = |port| own(&[&format!("10.1.0.1:{port}"), &format!("10.1.0.2:{port}")]);
        assert_eq!(behind("ecs", "Cluster"), [(53, every(30053)), (80, every(30080))]);
        assert_eq!(behind("ecs", "Local"), [(80, own(&["10.1.0.1:30080"]))], "the other has no ready pod");
    }
}
