//! What the server has: versions, groups, resources, in the old and the
//! aggregated form. Pure.

use serde_json::{Value, json};

use super::kind::{KINDS, Kind, group_versions};

const VERBS: &[&str] = &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// `/version`: the API level that the decoders know.
pub fn version() -> Value {
    json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0+fairway-lab", "gitCommit": "", "gitTreeState": "clean",
           "buildDate": "1970-01-01T00:00:00Z", "goVersion": "none", "compiler": "rustc", "platform": "linux/amd64"})
}

pub fn api_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

fn group(name: &str, version: &str) -> Value {
    let preferred = json!({"groupVersion": format!("{name}/{version}"), "version": version});
    json!({"name": name, "versions": [preferred], "preferredVersion": preferred})
}

/// `/apis`
pub fn groups() -> Value {
    let groups: Vec<Value> = group_versions()
        .iter()
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, version)| group(name, version))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/GROUP`
pub fn one_group(name: &str) -> Option<Value> {
    let (name, version) = group_versions().into_iter().find(|(group, _)| *group == name && !name.is_empty())?;
    let mut group = group(name, version);
    group["kind"] = "APIGroup".into();
    group["apiVersion"] = "v1".into();
    Some(group)
}

/// A kind's subresources: (name, group, version, kind, verbs).
type Subresource = (&'static str, &'static str, &'static str, &'static str, &'static [&'static str]);

fn subresources(kind: &Kind) -> Vec<Subresource> {
    const CHANGE: &[&str] = &["get", "patch", "update"];
    let mut all: Vec<Subresource> = Vec::new();
    if kind.status {
        all.push(("status", kind.group, kind.version, kind.kind, CHANGE));
    }
    if kind.scale {
        all.push(("scale", "autoscaling", "v1", "Scale", CHANGE));
    }
    match kind.kind {
        "Pod" => {
            all.push(("binding", "", "v1", "Binding", &["create"]));
            all.push(("eviction", "policy", "v1", "Eviction", &["create"]));
        }
        "Namespace" => all.push(("finalize", "", "v1", "Namespace", &["update"])),
        _ => {}
    }
    all
}

/// `/api/v1`, `/apis/GROUP/VERSION`
pub fn resources(group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<&Kind> = KINDS.iter().filter(|k| k.group == group && k.version == version).collect();
    if kinds.is_empty() {
        return None;
    }
    let mut resources = Vec::new();
    for kind in kinds {
        let mut entry = json!({
            "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced, "kind": kind.kind,
            "verbs": VERBS, "shortNames": kind.short,
        });
        if kind.all {
            entry["categories"] = json!(["all"]);
        }
        resources.push(entry);
        for (name, group, version, response, verbs) in subresources(kind) {
            let mut entry = json!({
                "name": format!("{}/{name}", kind.plural), "singularName": "", "namespaced": kind.namespaced,
                "kind": response, "verbs": verbs,
            });
            if group != kind.group {
                entry["group"] = group.into();
                entry["version"] = version.into();
            }
            resources.push(entry);
        }
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Some(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}))
}

/// The aggregated form of `/api` (core) or `/apis` (the rest); `version` is
/// `v2` or `v2beta1`.
pub fn aggregated(core: bool, version: &str) -> Value {
    let items: Vec<Value> = group_versions()
        .iter()
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, group_version)| {
            let resources: Vec<Value> =
                KINDS.iter().filter(|k| k.group == *group && k.version == *group_version).map(described).collect();
            let meta = if core { json!({}) } else { json!({"name": group}) };
            json!({"metadata": meta,
                   "versions": [{"version": group_version, "freshness": "Current", "resources": resources}]})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"),
           "metadata": {}, "items": items})
}

fn described(kind: &Kind) -> Value {
    let mut entry = json!({
        "resource": kind.plural, "singularResource": kind.singular, "verbs": VERBS, "shortNames": kind.short,
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
    });
    if kind.all {
        entry["categories"] = json!(["all"]);
    }
    let subs: Vec<Value> = subresources(kind)
        .into_iter()
        .map(|(name, group, version, response, verbs)| {
            json!({"subresource": name, "verbs": verbs,
                   "responseKind": {"group": group, "version": version, "kind": response}})
        })
        .collect();
    if !subs.is_empty() {
        entry["subresources"] = Value::Array(subs);
    }
    entry
}
