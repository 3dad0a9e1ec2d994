//! The scheduler: pods to ready nodes, spread. One pass places every pod that
//! waits; what cannot be placed says why, and waits for a change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Controller, Queue, event, pods};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, flag, list, map, text};
use crate::lab::kube::quantity;
use crate::lab::kube::registry::{Ctx, Filter, Registry, Sub, WatchEvent};
use crate::lab::kube::selector::Labels;

pub struct Scheduler;

impl Controller for Scheduler {
    const NAME: &'static str = "default-scheduler";
    type Key = ();

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![named("Node"), named("Pod")]
    }

    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<()>) {
        let Some(object) = event.object() else { return };
        // A placed pod matters only when it makes room.
        let gone = matches!(event, WatchEvent::Deleted(_)) || pods::finished(object);
        if kind.kind == "Node" || gone || waits(object) {
            queue.add(());
        }
    }

    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, (): &()) -> Result<Option<Duration>, ApiError> {
        let all = api.all(named("Pod"), &Filter::default());
        let mut waiting: Vec<_> = all.iter().filter(|pod| waits(pod)).collect();
        waiting.sort_by_cached_key(|pod| turn(pod));
        if waiting.is_empty() {
            return Ok(None);
        }
        let nodes = api.all(named("Node"), &Filter::default());
        let mut cluster = Cluster::new(&nodes, &all);
        for pod in waiting {
            let (namespace, name) = (object::namespace(pod), object::name(pod));
            match cluster.place(pod) {
                Ok(node) => match api.bind(ctx, namespace, name, &node) {
                    Ok(()) => {
                        cluster.take(pod, &node);
                        let message = format!("Successfully assigned {namespace}/{name} to {node}");
                        event(api, ctx, pod, false, "Scheduled", &message);
                    }
                    // Deleted or bound by someone else since the list.
                    Err(error) if matches!(error.code, 404 | 409) => {}
                    Err(error) => return Err(error),
                },
                Err(why) => unschedulable(api, ctx, pod, &why)?,
            }
        }
        Ok(None)
    }
}

fn waits(pod: &Value) -> bool {
    text(pod, "/spec/nodeName").is_empty()
        && text(pod, "/spec/schedulerName") == "default-scheduler"
        && list(pod, "/spec/schedulingGates").is_empty()
        && pods::active(pod)
}

/// Important pods first, then old ones.
fn turn(pod: &Value) -> (std::cmp::Reverse<i64>, String, Option<u64>) {
    let priority = object::int(pod, "/spec/priority").unwrap_or(0);
    (std::cmp::Reverse(priority), text(pod, "/metadata/creationTimestamp").to_owned(), object::revision(pod))
}

fn unschedulable(api: &Registry, ctx: &Ctx, pod: &Value, why: &str) -> Result<(), ApiError> {
    let said = list(pod, "/status/conditions")
        .iter()
        .any(|c| text(c, "/reason") == "Unschedulable" && text(c, "/message") == why);
    if said {
        return Ok(());
    }
    event(api, ctx, pod, true, "FailedScheduling", why);
    let now = object::rfc3339(ctx.now);
    let key = (object::namespace(pod), object::name(pod));
    let written = api.modify(ctx, named("Pod"), key, Sub::Status, |pod| {
        let conditions = object::map_mut(pod, &["status"]).entry("conditions").or_insert_with(|| json!([]));
        if let Value::Array(conditions) = conditions {
            conditions.retain(|c| text(c, "/type") != "PodScheduled");
            conditions.push(json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                   "message": why, "lastTransitionTime": now}));
        }
        true
    });
    match written {
        Err(error) if error.code == 404 => Ok(()),
        other => other.map(drop),
    }
}

struct Node<'a> {
    object: &'a Value,
    labels: Option<&'a Map<String, Value>>,
    used: BTreeMap<String, i128>,
    pods: i128,
    host_ports: BTreeSet<(i64, String)>,
    residents: Vec<&'a Value>,
}

/// Pure: what a pass knows.
pub struct Cluster<'a> {
    nodes: BTreeMap<&'a str, Node<'a>>,
    /// Pods of one controller on one node.
    siblings: HashMap<(String, String), u32>,
    requests: HashMap<&'a str, BTreeMap<String, i128>>,
}

impl<'a> Cluster<'a> {
    pub fn new(nodes: &'a [Arc<Value>], all: &'a [Arc<Value>]) -> Self {
        let node = |object: &'a Arc<Value>| {
            let labels = object::labels(object);
            let node = Node {
                object,
                labels,
                used: BTreeMap::new(),
                pods: 0,
                host_ports: BTreeSet::new(),
                residents: Vec::new(),
            };
            (object::name(object), node)
        };
        let mut cluster =
            Self { nodes: nodes.iter().map(node).collect(), siblings: HashMap::new(), requests: HashMap::new() };
        for pod in all.iter().filter(|pod| !pods::finished(pod)) {
            let place = text(pod, "/spec/nodeName");
            if !place.is_empty() {
                cluster.take(pod, place);
            }
        }
        cluster
    }

    /// Count a pod as placed.
    pub fn take(&mut self, pod: &'a Value, place: &str) {
        let wishes = self.requests.entry(object::uid(pod)).or_insert_with(|| requests(pod)).clone();
        if let Some((_, _, owner)) = object::controller(pod) {
            *self.siblings.entry((owner.to_owned(), place.to_owned())).or_default() += 1;
        }
        let Some(node) = self.nodes.get_mut(place) else { return };
        for (resource, amount) in wishes {
            *node.used.entry(resource).or_default() += amount;
        }
        node.pods += 1;
        node.host_ports.extend(host_ports(pod));
        node.residents.push(pod);
    }

    /// The node for a pod, or why there is none.
    pub fn place(&self, pod: &Value) -> Result<String, String> {
        let wishes = requests(pod);
        let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
        let mut best: Option<((u32, i128, &str), &str)> = None;
        for (name, node) in &self.nodes {
            if let Some(reason) = self.refuses(node, pod, &wishes) {
                *reasons.entry(reason).or_default() += 1;
                continue;
            }
            let siblings = object::controller(pod)
                .and_then(|(_, _, owner)| self.siblings.get(&(owner.to_owned(), (*name).to_owned())))
                .copied()
                .unwrap_or(0);
            let score = (siblings, node.pods, *name);
            if best.as_ref().is_none_or(|(least, _)| score < *least) {
                best = Some((score, name));
            }
        }
        match best {
            Some((_, name)) => Ok(name.to_owned()),
            None if self.nodes.is_empty() => Err("no nodes available to schedule pods".into()),
            None => {
                let list: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
                Err(format!("0/{} nodes are available: {}.", self.nodes.len(), list.join(", ")))
            }
        }
    }

    fn refuses(&self, node: &Node<'_>, pod: &Value, wishes: &BTreeMap<String, i128>) -> Option<String> {
        if flag(node.object, "/spec/unschedulable")
            && !tolerates(pod, "node.kubernetes.io/unschedulable", "", "NoSchedule")
        {
            return Some("node(s) were unschedulable".into());
        }
        if !object::condition(node.object, "Ready") {
            return Some("node(s) were not ready".into());
        }
        for taint in list(node.object, "/spec/taints") {
            let (key, value, effect) = (text(taint, "/key"), text(taint, "/value"), text(taint, "/effect"));
            if effect != "PreferNoSchedule" && !tolerates(pod, key, value, effect) {
                return Some(format!("node(s) had untolerated taint {{{key}: {value}}}"));
            }
        }
        if !selected(node, pod) {
            return Some("node(s) didn't match Pod's node affinity/selector".into());
        }
        let ports = host_ports(pod);
        if ports.iter().any(|port| node.host_ports.contains(port)) {
            return Some("node(s) didn't have free ports for the requested pod ports".into());
        }
        if self.repelled(node, pod) {
            return Some("node(s) didn't match pod anti-affinity rules".into());
        }
        let empty = Map::new();
        let room = map(node.object, "/status/allocatable").unwrap_or(&empty);
        let amount = |resource: &str| room.get(resource).and_then(Value::as_str).and_then(quantity::milli);
        if amount("pods").is_some_and(|most| (node.pods + 1) * 1000 > most) {
            return Some("Too many pods".into());
        }
        for (resource, wish) in wishes.iter().filter(|(_, wish)| **wish > 0) {
            let most = match amount(resource) {
                Some(most) => most,
                // What a node does not say about cpu and memory it has enough
                // of; what others added to nodes it has none of.
                None if resource.contains('/') => 0,
                None => continue,
            };
            if node.used.get(resource).copied().unwrap_or(0) + wish > most {
                return Some(format!("Insufficient {resource}"));
            }
        }
        None
    }

    /// Required anti-affinity, of the pod against those in the same topology
    /// and of those against the pod.
    fn repelled(&self, node: &Node<'_>, pod: &Value) -> bool {
        let together = |term: &Value, other: &Node<'_>| {
            let zone = |node: &Node<'_>| node.labels.and_then(|l| l.get(text(term, "/topologyKey"))).cloned();
            zone(node).is_some_and(|here| zone(other) == Some(here))
        };
        self.nodes.values().flat_map(|other| other.residents.iter().map(move |r| (other, *r))).any(
            |(other, resident)| {
                aversions(pod).iter().any(|term| together(term, other) && averse(term, pod, resident))
                    || aversions(resident).iter().any(|term| together(term, other) && averse(term, resident, pod))
            },
        )
    }
}

fn aversions(pod: &Value) -> &[Value] {
    list(pod, "/spec/affinity/podAntiAffinity/requiredDuringSchedulingIgnoredDuringExecution")
}

/// Whether a term of `of` means `other`.
fn averse(term: &Value, of: &Value, other: &Value) -> bool {
    let Some(Ok(selector)) = term.pointer("/labelSelector").map(Labels::from_object) else { return false };
    let named = list(term, "/namespaces");
    let space = object::namespace(other);
    let here = if named.is_empty() { space == object::namespace(of) } else { named.iter().any(|n| n == space) };
    here && selector.matches(object::labels(other))
}

fn tolerates(pod: &Value, key: &str, value: &str, effect: &str) -> bool {
    list(pod, "/spec/tolerations").iter().any(|t| {
        let (its_key, its_effect) = (text(t, "/key"), text(t, "/effect"));
        let exists = text(t, "/operator") == "Exists";
        let key_fits = its_key == key || (its_key.is_empty() && exists);
        let value_fits = exists || text(t, "/value") == value;
        key_fits && value_fits && (its_effect.is_empty() || its_effect == effect)
    })
}

fn selected(node: &Node<'_>, pod: &Value) -> bool {
    if let Some(wanted) = map(pod, "/spec/nodeSelector")
        && !Labels::exact(wanted).matches(node.labels)
    {
        return false;
    }
    let required = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution";
    let Some(required) = pod.pointer(required) else { return true };
    list(required, "/nodeSelectorTerms").iter().any(|term| {
        let fields = list(term, "/matchFields").iter().all(|field| {
            let named = list(field, "/values").iter().any(|v| v == object::name(node.object));
            text(field, "/key") == "metadata.name" && (text(field, "/operator") == "In") == named
        });
        let expressions = json!({"matchExpressions": list(term, "/matchExpressions")});
        fields && Labels::from_object(&expressions).is_ok_and(|labels| labels.matches(node.labels))
    })
}

fn host_ports(pod: &Value) -> Vec<(i64, String)> {
    list(pod, "/spec/containers")
        .iter()
        .flat_map(|c| list(c, "/ports"))
        .filter_map(|port| {
            let number = object::int(port, "/hostPort").filter(|p| *p != 0)?;
            Some((number, text(port, "/protocol").to_owned()))
        })
        .collect()
}

/// The larger of what its containers ask together and what one of its init
/// containers asks, in thousandths.
fn requests(pod: &Value) -> BTreeMap<String, i128> {
    let of = |container: &Value| -> BTreeMap<String, i128> {
        map(container, "/resources/requests")
            .into_iter()
            .flatten()
            .filter_map(|(name, amount)| Some((name.clone(), quantity::milli(amount.as_str()?)?)))
            .collect()
    };
    let mut total: BTreeMap<String, i128> = BTreeMap::new();
    for container in list(pod, "/spec/containers") {
        for (name, amount) in of(container) {
            *total.entry(name).or_default() += amount;
        }
    }
    for container in list(pod, "/spec/initContainers") {
        for (name, amount) in of(container) {
            let entry = total.entry(name).or_default();
            *entry = (*entry).max(amount);
        }
    }
    total
}
