//! The values the API server fills in. Pure; applied on every write, so it must
//! be idempotent.

use serde_json::{Map, Value, json};

use super::kind::Kind;
use super::object::{self, default, map_mut};

/// Before the decoder: numbers where a quantity is meant are accepted.
pub fn quantities(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, below) in map.iter_mut() {
                if matches!(key.as_str(), "limits" | "requests" | "capacity" | "allocatable" | "overhead") {
                    for amount in below.as_object_mut().into_iter().flat_map(Map::values_mut) {
                        if amount.is_number() {
                            *amount = amount.to_string().into();
                        }
                    }
                }
                if matches!(key.as_str(), "sizeLimit" | "divisor") && below.is_number() {
                    *below = below.to_string().into();
                }
                quantities(below);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(quantities),
        _ => {}
    }
}

pub fn apply(kind: &Kind, object: &mut Value) {
    match kind.kind {
        "Pod" => pod(object),
        "Namespace" => namespace(object),
        "Node" => node(object),
        "Service" => service(object),
        "Secret" => secret(object),
        "Deployment" => deployment(object),
        "StatefulSet" => stateful_set(object),
        "ReplicaSet" => replica_set(object),
        "DaemonSet" => daemon_set(object),
        "NetworkPolicy" => network_policy(object),
        "EndpointSlice" => ports(object, &["ports"]),
        "Endpoints" => {
            for subset in object.get_mut("subsets").and_then(Value::as_array_mut).into_iter().flatten() {
                ports(subset, &["ports"]);
            }
        }
        "Event" => {
            let namespace = object::namespace(object).to_owned();
            let event = map_mut(object, &[]);
            default(event, "type", "Normal");
            if let Some(involved) = event.get_mut("involvedObject").and_then(Value::as_object_mut)
                && namespace != "default"
            {
                default(involved, "namespace", namespace);
            }
        }
        "Role" | "ClusterRole" => default(map_mut(object, &[]), "rules", json!([])),
        _ => {}
    }
}

fn ports(object: &mut Value, path: &[&str]) {
    let list = path.iter().try_fold(object, |here, key| here.get_mut(*key));
    for port in list.and_then(Value::as_array_mut).into_iter().flatten() {
        default(map_mut(port, &[]), "protocol", "TCP");
    }
}

fn namespace(object: &mut Value) {
    let name = object::name(object).to_owned();
    map_mut(object, &["metadata", "labels"]).insert("kubernetes.io/metadata.name".into(), name.into());
    default(map_mut(object, &["status"]), "phase", "Active");
}

fn node(object: &mut Value) {
    // A node that names its capacity only may give all of it away.
    if let Some(capacity) = object.pointer("/status/capacity").cloned() {
        default(map_mut(object, &["status"]), "allocatable", capacity);
    }
}

fn secret(object: &mut Value) {
    let secret = map_mut(object, &[]);
    default(secret, "type", "Opaque");
    if let Some(Value::Object(plain)) = secret.remove("stringData") {
        let data = map_mut(object, &["data"]);
        for (key, value) in plain {
            let bytes = k8s_openapi::ByteString(value.as_str().unwrap_or("").as_bytes().to_vec());
            data.insert(key, serde_json::to_value(bytes).unwrap_or_default());
        }
    }
}

fn pod(object: &mut Value) {
    pod_spec(map_mut(object, &["spec"]));
    let spec = map_mut(object, &["spec"]);
    default(spec, "serviceAccountName", "default");
    let account = spec.get("serviceAccountName").cloned().unwrap_or_default();
    default(spec, "serviceAccount", account);
    default(spec, "enableServiceLinks", true);
    default(spec, "preemptionPolicy", "PreemptLowerPriority");
    default(spec, "priority", 0);
    evictions(spec);
    let class = qos_class(&object["spec"]);
    let status = map_mut(object, &["status"]);
    default(status, "phase", "Pending");
    default(status, "qosClass", class);
}

/// Pods stay five minutes on a node that became unreachable.
fn evictions(spec: &mut Map<String, Value>) {
    default(spec, "tolerations", json!([]));
    let Some(Value::Array(tolerations)) = spec.get_mut("tolerations") else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let covered = tolerations.iter().any(|t| {
            let effect = object::text(t, "/effect");
            matches!(object::text(t, "/key"), "" if object::text(t, "/operator") == "Exists")
                || (object::text(t, "/key") == key && (effect.is_empty() || effect == "NoExecute"))
        });
        if !covered {
            tolerations
                .push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
}

fn qos_class(spec: &Value) -> &'static str {
    let containers = object::list(spec, "/containers");
    let amounts = |c: &Value, kind: &str| object::map(c, &format!("/resources/{kind}")).cloned().unwrap_or_default();
    let relevant = |m: &Map<String, Value>| m.contains_key("cpu") || m.contains_key("memory");
    let any = containers.iter().any(|c| relevant(&amounts(c, "requests")) || relevant(&amounts(c, "limits")));
    let full = containers.iter().all(|c| {
        let (requests, limits) = (amounts(c, "requests"), amounts(c, "limits"));
        ["cpu", "memory"].iter().all(|r| limits.contains_key(*r) && requests.get(*r) == limits.get(*r))
    });
    match (any, full) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Shared by pods and pod templates.
fn pod_spec(spec: &mut Map<String, Value>) {
    default(spec, "restartPolicy", "Always");
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "securityContext", json!({}));
    default(spec, "terminationGracePeriodSeconds", 30);
    // The two names of one field.
    for (from, to) in [("serviceAccountName", "serviceAccount"), ("serviceAccount", "serviceAccountName")] {
        if let Some(account) = spec.get(from).cloned() {
            default(spec, to, account);
        }
    }
    let host = spec.get("hostNetwork").and_then(Value::as_bool).unwrap_or(false);
    for group in ["containers", "initContainers"] {
        for one in spec.get_mut(group).and_then(Value::as_array_mut).into_iter().flatten() {
            container(map_mut(one, &[]), host);
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        for source in ["configMap", "secret", "projected", "downwardAPI"] {
            if let Some(source) = volume.get_mut(source).and_then(Value::as_object_mut) {
                default(source, "defaultMode", 420);
            }
        }
        if let Some(host) = volume.get_mut("hostPath").and_then(Value::as_object_mut) {
            default(host, "type", "");
        }
    }
}

fn container(container: &mut Map<String, Value>, host: bool) {
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    default(container, "resources", json!({}));
    let image = container.get("image").and_then(Value::as_str).unwrap_or("");
    let tag = image.rsplit('/').next().unwrap_or("");
    let pinned = tag.contains('@') || tag.split_once(':').is_some_and(|(_, tag)| tag != "latest");
    default(container, "imagePullPolicy", if pinned { "IfNotPresent" } else { "Always" });
    for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let port = map_mut(port, &[]);
        default(port, "protocol", "TCP");
        if let (true, Some(number)) = (host, port.get("containerPort").cloned()) {
            default(port, "hostPort", number);
        }
    }
    if let Some(Value::Object(limits)) = container.get("resources").and_then(|r| r.get("limits")).cloned() {
        let resources = container.entry("resources").or_insert_with(|| json!({}));
        let requests = map_mut(resources, &["requests"]);
        for (name, amount) in limits {
            default(requests, &name, amount);
        }
    }
    for variable in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(field) = variable.pointer_mut("/valueFrom/fieldRef").and_then(Value::as_object_mut) {
            default(field, "apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).and_then(Value::as_object_mut) else { continue };
        default(probe, "timeoutSeconds", 1);
        default(probe, "periodSeconds", 10);
        default(probe, "successThreshold", 1);
        default(probe, "failureThreshold", 3);
        if let Some(http) = probe.get_mut("httpGet").and_then(Value::as_object_mut) {
            default(http, "path", "/");
            default(http, "scheme", "HTTP");
        }
    }
}

fn template(object: &mut Value) {
    pod_spec(map_mut(object, &["spec", "template", "spec"]));
    let metadata = map_mut(object, &["spec", "template", "metadata"]);
    metadata.remove("creationTimestamp");
}

fn deployment(object: &mut Value) {
    template(object);
    let spec = map_mut(object, &["spec"]);
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "progressDeadlineSeconds", 600);
    let strategy = map_mut(object, &["spec", "strategy"]);
    default(strategy, "type", "RollingUpdate");
    if strategy.get("type").and_then(Value::as_str) == Some("RollingUpdate") {
        let rolling = map_mut(object, &["spec", "strategy", "rollingUpdate"]);
        default(rolling, "maxSurge", "25%");
        default(rolling, "maxUnavailable", "25%");
    }
}

fn replica_set(object: &mut Value) {
    template(object);
    default(map_mut(object, &["spec"]), "replicas", 1);
    default(map_mut(object, &["status"]), "replicas", 0);
}

fn stateful_set(object: &mut Value) {
    template(object);
    let spec = map_mut(object, &["spec"]);
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "podManagementPolicy", "OrderedReady");
    default(spec, "persistentVolumeClaimRetentionPolicy", json!({"whenDeleted": "Retain", "whenScaled": "Retain"}));
    let strategy = map_mut(object, &["spec", "updateStrategy"]);
    default(strategy, "type", "RollingUpdate");
    if strategy.get("type").and_then(Value::as_str) == Some("RollingUpdate") {
        default(map_mut(object, &["spec", "updateStrategy", "rollingUpdate"]), "partition", 0);
    }
    let status = map_mut(object, &["status"]);
    default(status, "replicas", 0);
    default(status, "availableReplicas", 0);
}

fn daemon_set(object: &mut Value) {
    template(object);
    default(map_mut(object, &["spec"]), "revisionHistoryLimit", 10);
    let strategy = map_mut(object, &["spec", "updateStrategy"]);
    default(strategy, "type", "RollingUpdate");
    if strategy.get("type").and_then(Value::as_str) == Some("RollingUpdate") {
        let rolling = map_mut(object, &["spec", "updateStrategy", "rollingUpdate"]);
        default(rolling, "maxSurge", 0);
        default(rolling, "maxUnavailable", 1);
    }
    let status = map_mut(object, &["status"]);
    for count in ["currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady"] {
        default(status, count, 0);
    }
}

fn network_policy(object: &mut Value) {
    let spec = map_mut(object, &["spec"]);
    default(spec, "podSelector", json!({}));
    let mut types = vec![Value::from("Ingress")];
    if spec.get("egress").is_some_and(|e| e.as_array().is_some_and(|rules| !rules.is_empty())) {
        types.push("Egress".into());
    }
    default(spec, "policyTypes", types);
    for direction in ["ingress", "egress"] {
        for rule in spec.get_mut(direction).and_then(Value::as_array_mut).into_iter().flatten() {
            ports(rule, &["ports"]);
        }
    }
}

fn service(object: &mut Value) {
    let spec = map_mut(object, &["spec"]);
    default(spec, "type", "ClusterIP");
    default(spec, "sessionAffinity", "None");
    let kind = spec.get("type").and_then(Value::as_str).unwrap_or("").to_owned();
    if spec.get("sessionAffinity").and_then(Value::as_str) == Some("ClientIP") {
        default(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10_800}}));
    }
    if kind != "ExternalName" {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    match kind.as_str() {
        "NodePort" => default(spec, "externalTrafficPolicy", "Cluster"),
        "LoadBalancer" => {
            default(spec, "externalTrafficPolicy", "Cluster");
            default(spec, "allocateLoadBalancerNodePorts", true);
        }
        _ => {
            for gone in ["externalTrafficPolicy", "allocateLoadBalancerNodePorts", "healthCheckNodePort"] {
                spec.remove(gone);
            }
        }
    }
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let port = map_mut(port, &[]);
        default(port, "protocol", "TCP");
        let target = port.get("targetPort");
        if target.is_none_or(|t| t.as_i64() == Some(0) || t.as_str() == Some("")) {
            let number = port.get("port").cloned().unwrap_or_default();
            port.insert("targetPort".into(), number);
        }
        if kind == "ClusterIP" || kind == "ExternalName" {
            port.remove("nodePort");
        }
    }
    default(map_mut(object, &["status"]), "loadBalancer", json!({}));
}
