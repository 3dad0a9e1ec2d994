//! The table of kinds: what is stored, how its paths are spelled, what it may do.
//!
//! Everything else in the stand-in is generic over this table. The k8s-openapi
//! type of a kind is used for one purpose: to check and normalise input as the
//! real server's decoder would, including the names of unknown fields.

use k8s_openapi::api::{apps, coordination, core, discovery, events, networking, policy, rbac};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// One kind of object.
pub struct Kind {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
    pub singular: &'static str,
    pub short: &'static [&'static str],
    pub namespaced: bool,
    /// In `kubectl get all`.
    pub all: bool,
    /// Has a status subresource: updates of the main resource leave it alone.
    pub status: bool,
    /// Has a scale subresource (at `spec.replicas`).
    pub scale: bool,
    /// Counts changes of its spec in `metadata.generation`.
    pub generation: bool,
    decode: fn(&Value) -> Result<Value, serde_json::Error>,
}

fn typed<T: DeserializeOwned + Serialize>(value: &Value) -> Result<Value, serde_json::Error> {
    serde_json::to_value(T::deserialize(value)?)
}

const BASE: Kind = Kind {
    group: "",
    version: "v1",
    kind: "",
    plural: "",
    singular: "",
    short: &[],
    namespaced: true,
    all: false,
    status: false,
    scale: false,
    generation: false,
    decode: |value| Ok(value.clone()),
};

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.resource())
    }
}

/// What one kind's decoder made of an object.
pub struct Decoded {
    pub object: Value,
    /// Paths of fields that the kind does not have.
    pub unknown: Vec<String>,
}

impl Kind {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    /// As errors name it: `pods`, `deployments.apps`.
    pub fn resource(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// Position in [`KINDS`]: the same for a kind's two views of one table.
    pub fn index(&self) -> usize {
        let stored = self.stored();
        KINDS.iter().position(|k| std::ptr::eq(k, stored)).unwrap_or(0)
    }

    /// The kind whose table holds the objects: `events.k8s.io` Events are a
    /// second view of core Events.
    pub fn stored(&self) -> &'static Kind {
        if self.group == "events.k8s.io" {
            return named(self.kind);
        }
        KINDS.iter().find(|k| std::ptr::eq(*k, self)).unwrap_or(&KINDS[0])
    }

    /// Check types as the real decoder would; nulls and unknown fields go.
    pub fn decode(&self, value: &Value) -> Result<Decoded, String> {
        let object = (self.decode)(value).map_err(|e| explain(self, value, &e))?;
        let mut unknown = Vec::new();
        lost(value, &object, &mut String::new(), &mut unknown);
        Ok(Decoded { object, unknown })
    }
}

/// Fields of `input` that are not in `output`. Bounded: an error names a few.
fn lost(input: &Value, output: &Value, path: &mut String, found: &mut Vec<String>) {
    const NAMED: usize = 20;
    match (input, output) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                if found.len() >= NAMED || value.is_null() {
                    continue;
                }
                let length = path.len();
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
                match b.get(key) {
                    Some(kept) => lost(value, kept, path, found),
                    None => found.push(path.clone()),
                }
                path.truncate(length);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            for (index, (value, kept)) in a.iter().zip(b).enumerate() {
                let length = path.len();
                path.push_str(&format!("[{index}]"));
                lost(value, kept, path, found);
                path.truncate(length);
            }
        }
        _ => {}
    }
}

/// The decoder's message does not say where. Without the offending child the
/// object decodes (or fails elsewhere), so descend by leaving children out.
fn explain(kind: &Kind, value: &Value, error: &serde_json::Error) -> String {
    let text = error.to_string();
    let mut trial = value.clone();
    let mut path: Vec<Step> = Vec::new();
    'descend: for _ in 0..32 {
        let children = match at(&mut trial, &path) {
            Some(Value::Object(map)) => map.keys().take(200).map(|k| Step::Key(k.clone())).collect::<Vec<_>>(),
            Some(Value::Array(list)) => (0..list.len().min(200)).map(Step::Index).collect(),
            _ => break,
        };
        // Without the culprit the object decodes; failing that, it fails in
        // another way, since a required field is missing now.
        let mut suspect = None;
        for child in children {
            let Some(taken) = at(&mut trial, &path).and_then(|parent| child.take(parent)) else { continue };
            let outcome = (kind.decode)(&trial);
            if let Some(parent) = at(&mut trial, &path) {
                child.put_back(parent, taken);
            }
            match outcome {
                Ok(_) => {
                    path.push(child);
                    continue 'descend;
                }
                Err(e) if suspect.is_none() && e.to_string() != text && !child.is_type() => suspect = Some(child),
                Err(_) => {}
            }
        }
        match suspect {
            Some(child) => path.push(child),
            None => break,
        }
    }
    let mut place = String::new();
    for step in &path {
        match step {
            Step::Key(key) if place.is_empty() => place.push_str(key),
            Step::Key(key) => place.push_str(&format!(".{key}")),
            Step::Index(index) => place.push_str(&format!("[{index}]")),
        }
    }
    if place.is_empty() { text } else { format!("{place}: {text}") }
}

enum Step {
    Key(String),
    Index(usize),
}

impl Step {
    /// Without these nothing decodes.
    fn is_type(&self) -> bool {
        matches!(self, Step::Key(key) if key == "apiVersion" || key == "kind")
    }

    fn take(&self, parent: &mut Value) -> Option<Value> {
        match (self, parent) {
            (Step::Key(key), Value::Object(map)) => map.remove(key),
            (Step::Index(index), Value::Array(list)) if *index < list.len() => Some(list.remove(*index)),
            _ => None,
        }
    }

    fn put_back(&self, parent: &mut Value, value: Value) {
        match (self, parent) {
            (Step::Key(key), Value::Object(map)) => drop(map.insert(key.clone(), value)),
            (Step::Index(index), Value::Array(list)) => list.insert(*index, value),
            _ => {}
        }
    }

    fn of<'a>(&self, parent: &'a mut Value) -> Option<&'a mut Value> {
        match self {
            Step::Key(key) => parent.get_mut(key.as_str()),
            Step::Index(index) => parent.get_mut(*index),
        }
    }
}

fn at<'a>(value: &'a mut Value, path: &[Step]) -> Option<&'a mut Value> {
    path.iter().try_fold(value, |value, step| step.of(value))
}

/// By `apiVersion` and `kind`, as objects and manifests name it.
pub fn by_gvk(api_version: &str, kind: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.kind == kind && k.api_version() == api_version)
}

/// By the words of a path.
pub fn by_path(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.group == group && k.version == version && k.plural == plural)
}

/// By kind alone, for the controllers and reports: core before the others.
pub fn named(kind: &str) -> &'static Kind {
    KINDS.iter().find(|k| k.kind == kind).unwrap_or(&KINDS[0])
}

/// The group versions served, core first.
pub fn group_versions() -> Vec<(&'static str, &'static str)> {
    let mut all: Vec<_> = KINDS.iter().map(|k| (k.group, k.version)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

macro_rules! kind {
    ($type:ty, $plural:literal, $singular:literal, [$($short:literal),*] $(, $flag:ident = $on:expr)* $(,)?) => {
        Kind {
            group: <$type as k8s_openapi::Resource>::GROUP,
            version: <$type as k8s_openapi::Resource>::VERSION,
            kind: <$type as k8s_openapi::Resource>::KIND,
            plural: $plural,
            singular: $singular,
            short: &[$($short),*],
            decode: typed::<$type>,
            $($flag: $on,)*
            ..BASE
        }
    };
}

/// Every kind there is. Order: an object's table number; core Events before
/// their second view.
pub static KINDS: &[Kind] = &[
    kind!(core::v1::Namespace, "namespaces", "namespace", ["ns"], namespaced = false, status = true),
    kind!(core::v1::Node, "nodes", "node", ["no"], namespaced = false, status = true),
    kind!(core::v1::Pod, "pods", "pod", ["po"], all = true, status = true, generation = true),
    kind!(core::v1::Service, "services", "service", ["svc"], all = true, status = true),
    kind!(core::v1::Endpoints, "endpoints", "endpoints", ["ep"]),
    kind!(core::v1::Event, "events", "event", ["ev"]),
    kind!(core::v1::ConfigMap, "configmaps", "configmap", ["cm"]),
    kind!(core::v1::Secret, "secrets", "secret", []),
    kind!(core::v1::ServiceAccount, "serviceaccounts", "serviceaccount", ["sa"]),
    kind!(
        apps::v1::Deployment,
        "deployments",
        "deployment",
        ["deploy"],
        all = true,
        status = true,
        scale = true,
        generation = true
    ),
    kind!(
        apps::v1::StatefulSet,
        "statefulsets",
        "statefulset",
        ["sts"],
        all = true,
        status = true,
        scale = true,
        generation = true
    ),
    kind!(
        apps::v1::ReplicaSet,
        "replicasets",
        "replicaset",
        ["rs"],
        all = true,
        status = true,
        scale = true,
        generation = true
    ),
    kind!(apps::v1::DaemonSet, "daemonsets", "daemonset", ["ds"], all = true, status = true, generation = true),
    kind!(apps::v1::ControllerRevision, "controllerrevisions", "controllerrevision", []),
    kind!(discovery::v1::EndpointSlice, "endpointslices", "endpointslice", [], generation = true),
    kind!(events::v1::Event, "events", "event", ["ev"]),
    kind!(networking::v1::NetworkPolicy, "networkpolicies", "networkpolicy", ["netpol"], generation = true),
    kind!(networking::v1::Ingress, "ingresses", "ingress", ["ing"], status = true, generation = true),
    kind!(networking::v1::IngressClass, "ingressclasses", "ingressclass", [], namespaced = false, generation = true),
    kind!(coordination::v1::Lease, "leases", "lease", []),
    kind!(
        policy::v1::PodDisruptionBudget,
        "poddisruptionbudgets",
        "poddisruptionbudget",
        ["pdb"],
        status = true,
        generation = true
    ),
    kind!(rbac::v1::ClusterRole, "clusterroles", "clusterrole", [], namespaced = false),
    kind!(rbac::v1::ClusterRoleBinding, "clusterrolebindings", "clusterrolebinding", [], namespaced = false),
    kind!(rbac::v1::Role, "roles", "role", []),
    kind!(rbac::v1::RoleBinding, "rolebindings", "rolebinding", []),
];
