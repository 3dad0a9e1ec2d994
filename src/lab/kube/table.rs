//! `kubectl get`: objects as rows, with the columns the real server shows. Pure.

mod pod;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::events;
use super::kind::Kind;
use super::object::{self, int, list, text};

/// What a row carries of its object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Include {
    #[default]
    Metadata,
    Object,
    Nothing,
}

/// Column names; `*` marks those that only `-o wide` shows.
fn columns(kind: &Kind) -> &'static str {
    match kind.kind {
        "Pod" => "Name,Ready,Status,Restarts,Age,*IP,*Node,*Nominated Node,*Readiness Gates",
        "Namespace" => "Name,Status,Age",
        "Node" => {
            "Name,Status,Roles,Age,Version,*Internal-IP,*External-IP,*OS-Image,*Kernel-Version,*Container-Runtime"
        }
        "Service" => "Name,Type,Cluster-IP,External-IP,Port(s),Age,*Selector",
        "Endpoints" => "Name,Endpoints,Age",
        "EndpointSlice" => "Name,AddressType,Ports,Endpoints,Age",
        "Event" => "Last Seen,Type,Reason,Object,*Subobject,*Source,Message,*First Seen,*Count,*Name",
        "ConfigMap" => "Name,Data,Age",
        "Secret" => "Name,Type,Data,Age",
        "ServiceAccount" => "Name,Secrets,Age",
        "Deployment" => "Name,Ready,Up-to-date,Available,Age,*Containers,*Images,*Selector",
        "ReplicaSet" => "Name,Desired,Current,Ready,Age,*Containers,*Images,*Selector",
        "StatefulSet" => "Name,Ready,Age,*Containers,*Images",
        "DaemonSet" => "Name,Desired,Current,Ready,Up-to-date,Available,Node Selector,Age",
        "NetworkPolicy" => "Name,Pod-Selector,Age",
        "Ingress" => "Name,Class,Hosts,Address,Ports,Age",
        "Lease" => "Name,Holder,Age",
        "PodDisruptionBudget" => "Name,Min Available,Max Unavailable,Allowed Disruptions,Age",
        "RoleBinding" | "ClusterRoleBinding" => "Name,Role,Age",
        "IngressClass" => "Name,Controller,Age",
        "Role" | "ClusterRole" => "Name,Created At",
        _ => "Name,Age",
    }
}

fn cells(kind: &Kind, o: &Value, now: Timestamp) -> Vec<Value> {
    let name = || json!(object::name(o));
    let age = || json!(age(o, "/metadata/creationTimestamp", now));
    match kind.kind {
        "Pod" => pod::cells(o, now),
        "Namespace" => vec![name(), json!(text(o, "/status/phase")), age()],
        "Node" => node(o, name(), age()),
        "Service" => vec![
            name(),
            json!(text(o, "/spec/type")),
            json!(or_none(text(o, "/spec/clusterIP"))),
            json!(external(o)),
            json!(service_ports(o)),
            age(),
            json!(pairs(o.pointer("/spec/selector"))),
        ],
        "Endpoints" => vec![name(), json!(addresses(o)), age()],
        "EndpointSlice" => vec![
            name(),
            json!(text(o, "/addressType")),
            json!(some(
                list(o, "/ports").iter().map(|p| int(p, "/port").map_or("*".into(), |n| n.to_string())),
                "<unset>"
            )),
            json!(some(
                list(o, "/endpoints")
                    .iter()
                    .flat_map(|e| list(e, "/addresses"))
                    .map(|a| a.as_str().unwrap_or("").into()),
                "<unset>"
            )),
            age(),
        ],
        "Event" => event(o, now),
        "ConfigMap" => {
            vec![name(), json!(["/data", "/binaryData"].iter().map(|p| size(o, p)).sum::<usize>()), age()]
        }
        "Secret" => vec![name(), json!(text(o, "/type")), json!(size(o, "/data")), age()],
        "ServiceAccount" => vec![name(), json!(list(o, "/secrets").len()), age()],
        "Deployment" => vec![
            name(),
            json!(format!("{}/{}", count(o, "/status/readyReplicas"), count(o, "/spec/replicas"))),
            json!(count(o, "/status/updatedReplicas")),
            json!(count(o, "/status/availableReplicas")),
            age(),
            json!(containers(o, "name")),
            json!(containers(o, "image")),
            json!(selector(o, "/spec/selector")),
        ],
        "ReplicaSet" => vec![
            name(),
            json!(count(o, "/spec/replicas")),
            json!(count(o, "/status/replicas")),
            json!(count(o, "/status/readyReplicas")),
            age(),
            json!(containers(o, "name")),
            json!(containers(o, "image")),
            json!(selector(o, "/spec/selector")),
        ],
        "StatefulSet" => vec![
            name(),
            json!(format!("{}/{}", count(o, "/status/readyReplicas"), count(o, "/spec/replicas"))),
            age(),
            json!(containers(o, "name")),
            json!(containers(o, "image")),
        ],
        "DaemonSet" => vec![
            name(),
            json!(count(o, "/status/desiredNumberScheduled")),
            json!(count(o, "/status/currentNumberScheduled")),
            json!(count(o, "/status/numberReady")),
            json!(count(o, "/status/updatedNumberScheduled")),
            json!(count(o, "/status/numberAvailable")),
            json!(pairs(o.pointer("/spec/template/spec/nodeSelector"))),
            age(),
        ],
        "NetworkPolicy" => vec![name(), json!(selector(o, "/spec/podSelector")), age()],
        "Ingress" => vec![
            name(),
            json!(or_none(text(o, "/spec/ingressClassName"))),
            json!(some(
                list(o, "/spec/rules").iter().map(|r| text(r, "/host")).filter(|h| !h.is_empty()).map(str::to_owned),
                "*"
            )),
            json!(""),
            json!(if list(o, "/spec/tls").is_empty() { "80" } else { "80, 443" }),
            age(),
        ],
        "Lease" => vec![name(), json!(text(o, "/spec/holderIdentity")), age()],
        "PodDisruptionBudget" => {
            let bound = |pointer: &str| o.pointer(pointer).map_or("N/A".to_owned(), plain);
            vec![
                name(),
                json!(bound("/spec/minAvailable")),
                json!(bound("/spec/maxUnavailable")),
                json!(count(o, "/status/disruptionsAllowed")),
                age(),
            ]
        }
        "RoleBinding" | "ClusterRoleBinding" => {
            vec![name(), json!(format!("{}/{}", text(o, "/roleRef/kind"), text(o, "/roleRef/name"))), age()]
        }
        "IngressClass" => vec![name(), json!(text(o, "/spec/controller")), age()],
        "Role" | "ClusterRole" => vec![name(), json!(text(o, "/metadata/creationTimestamp"))],
        _ => vec![name(), age()],
    }
}

fn node(o: &Value, name: Value, age: Value) -> Vec<Value> {
    let mut status = if object::condition(o, "Ready") { "Ready".to_owned() } else { "NotReady".to_owned() };
    if object::flag(o, "/spec/unschedulable") {
        status.push_str(",SchedulingDisabled");
    }
    let roles = object::labels(o)
        .into_iter()
        .flat_map(|labels| labels.keys())
        .filter_map(|key| key.strip_prefix("node-role.kubernetes.io/").map(str::to_owned));
    let address = |kind: &str| {
        let found = list(o, "/status/addresses").iter().find(|a| text(a, "/type") == kind);
        or_none(found.map_or("", |a| text(a, "/address"))).to_owned()
    };
    let info = |field: &str| match text(o, &format!("/status/nodeInfo/{field}")) {
        "" => "<unknown>".to_owned(),
        known => known.to_owned(),
    };
    vec![
        name,
        json!(status),
        json!(some(roles, "<none>")),
        age,
        json!(text(o, "/status/nodeInfo/kubeletVersion")),
        json!(address("InternalIP")),
        json!(address("ExternalIP")),
        json!(info("osImage")),
        json!(info("kernelVersion")),
        json!(info("containerRuntimeVersion")),
    ]
}

fn event(o: &Value, now: Timestamp) -> Vec<Value> {
    let first = ["/firstTimestamp", "/eventTime", "/metadata/creationTimestamp"];
    let last = ["/series/lastObservedTime", "/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"];
    let seen = |places: &[&str]| {
        let place = places.iter().find(|p| object::time(o, p).is_some());
        place.map_or("<unknown>".to_owned(), |p| age(o, p, now))
    };
    let source = match text(o, "/source/component") {
        "" => text(o, "/reportingComponent"),
        component => component,
    };
    let subject = format!("{}/{}", text(o, "/involvedObject/kind").to_lowercase(), text(o, "/involvedObject/name"));
    vec![
        json!(seen(&last)),
        json!(text(o, "/type")),
        json!(text(o, "/reason")),
        json!(subject),
        json!(text(o, "/involvedObject/fieldPath")),
        json!(source),
        json!(text(o, "/message").trim()),
        json!(seen(&first)),
        json!(int(o, "/count").or(int(o, "/series/count")).unwrap_or(1).max(1)),
        json!(object::name(o)),
    ]
}

/// Rows with their columns; `list` gives the list's metadata.
pub fn table(kind: &Kind, objects: &[&Value], metadata: Value, include: Include, now: Timestamp) -> Value {
    let columns: Vec<Value> = columns(kind)
        .split(',')
        .map(|column| {
            let name = column.trim_start_matches('*');
            json!({"name": name, "type": "string", "format": if name == "Name" { "name" } else { "" },
                   "description": "", "priority": i32::from(name.len() < column.len())})
        })
        .collect();
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": cells(kind, object, now)});
            match include {
                Include::Metadata => row["object"] = partial(object),
                Include::Object => row["object"] = events::outward(kind, object).into_owned(),
                Include::Nothing => {}
            }
            row
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
           "columnDefinitions": columns, "rows": rows})
}

/// An object's metadata alone.
pub fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
           "metadata": object.get("metadata").cloned().unwrap_or_default()})
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "<none>" } else { text }
}

fn count(object: &Value, pointer: &str) -> i64 {
    int(object, pointer).unwrap_or(0)
}

fn size(object: &Value, pointer: &str) -> usize {
    object::map(object, pointer).map_or(0, serde_json::Map::len)
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The first three, and how many more.
fn some(items: impl Iterator<Item = String>, empty: &str) -> String {
    let all: Vec<String> = items.collect();
    match all.len() {
        0 => empty.to_owned(),
        1..=3 => all.join(","),
        more => format!("{} + {} more...", all[..3].join(","), more - 3),
    }
}

fn pairs(map: Option<&Value>) -> String {
    let pairs: Vec<String> = map
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", plain(value)))
        .collect();
    or_none(&pairs.join(",")).to_owned()
}

fn selector(object: &Value, pointer: &str) -> String {
    let Some(selector) = object.pointer(pointer) else { return "<none>".into() };
    let mut parts: Vec<String> = object::map(selector, "/matchLabels")
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", plain(value)))
        .collect();
    for expression in list(selector, "/matchExpressions") {
        let key = text(expression, "/key");
        let values: Vec<String> = list(expression, "/values").iter().map(plain).collect();
        parts.push(match text(expression, "/operator") {
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            operator => format!("{key} {} ({})", operator.to_lowercase(), values.join(",")),
        });
    }
    or_none(&parts.join(",")).to_owned()
}

fn containers(object: &Value, field: &str) -> String {
    let all: Vec<&str> =
        list(object, "/spec/template/spec/containers").iter().map(|c| text(c, &format!("/{field}"))).collect();
    all.join(",")
}

fn external(service: &Value) -> String {
    let given: Vec<&str> = list(service, "/status/loadBalancer/ingress")
        .iter()
        .map(|i| if text(i, "/ip").is_empty() { text(i, "/hostname") } else { text(i, "/ip") })
        .collect();
    let fixed: Vec<&str> = list(service, "/spec/externalIPs").iter().filter_map(Value::as_str).collect();
    match text(service, "/spec/type") {
        "ExternalName" => text(service, "/spec/externalName").to_owned(),
        "LoadBalancer" if given.is_empty() && fixed.is_empty() => "<pending>".into(),
        "LoadBalancer" => [given, fixed].concat().join(","),
        _ => or_none(&fixed.join(",")).to_owned(),
    }
}

fn service_ports(service: &Value) -> String {
    let all: Vec<String> = list(service, "/spec/ports")
        .iter()
        .map(|port| {
            let (number, protocol) = (count(port, "/port"), text(port, "/protocol"));
            match int(port, "/nodePort").filter(|p| *p != 0) {
                Some(node) => format!("{number}:{node}/{protocol}"),
                None => format!("{number}/{protocol}"),
            }
        })
        .collect();
    or_none(&all.join(",")).to_owned()
}

fn addresses(endpoints: &Value) -> String {
    let all = list(endpoints, "/subsets").iter().flat_map(|subset| {
        let ports = list(subset, "/ports");
        list(subset, "/addresses").iter().flat_map(move |address| {
            let ip = text(address, "/ip").to_owned();
            let ip = if ip.contains(':') { format!("[{ip}]") } else { ip };
            match ports.is_empty() {
                true => vec![ip],
                false => ports.iter().map(|p| format!("{ip}:{}", count(p, "/port"))).collect(),
            }
        })
    });
    some(all, "<none>")
}

/// Time since, as `kubectl` writes it.
pub fn age(object: &Value, pointer: &str, now: Timestamp) -> String {
    match object::time(object, pointer) {
        None => "<unknown>".into(),
        Some(then) => human(now.as_second() - then.as_second()),
    }
}

fn human(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |big: i64, unit: &str, small: i64, part: &str| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{part}") }
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        _ if days < 730 => format!("{days}d"),
        _ => two(days / 365, "y", days % 365, "d"),
    }
}
