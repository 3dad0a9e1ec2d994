//! OpenAPI, as much as `kubectl` asks of it: which kinds there are, and that
//! the server checks fields itself. Pure.
//!
//! The documents say `x-kubernetes-preserve-unknown-fields`, so that no client
//! second-guesses the server's own strict decoding, and do not offer
//! merge-patch metadata, so that `kubectl` uses what it has built in.

use serde_json::{Map, Value, json};

use super::kind::{KINDS, Kind, group_versions};

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// `/openapi/v3`
pub fn index() -> Value {
    let paths: Map<String, Value> = group_versions()
        .iter()
        .map(|(group, version)| {
            let path = path_of(group, version);
            let url = format!("/openapi/v3/{path}?hash=1");
            (path, json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({"paths": paths})
}

fn schema_name(kind: &Kind) -> String {
    let group = if kind.group.is_empty() { "core" } else { kind.group };
    let group = group.trim_end_matches(".k8s.io").trim_end_matches(".authorization");
    format!("io.k8s.api.{group}.{}.{}", kind.version, kind.kind)
}

fn schema(kind: &Kind) -> Value {
    let open =
        |text: &str| json!({"type": "object", "description": text, "x-kubernetes-preserve-unknown-fields": true});
    json!({
        "type": "object",
        "description": format!("{} objects, as Kubernetes v1.33 defines them.", kind.kind),
        "x-kubernetes-preserve-unknown-fields": true,
        "x-kubernetes-group-version-kind": [{"group": kind.group, "version": kind.version, "kind": kind.kind}],
        "properties": {
            "apiVersion": {"type": "string", "description": "The version of this object's schema."},
            "kind": {"type": "string", "description": "The kind of this object."},
            "metadata": open("Name, namespace, labels, annotations, owners."),
            "spec": open("What is wanted."),
            "status": open("What is the case."),
        },
    })
}

/// `/openapi/v3/api/v1`, `/openapi/v3/apis/GROUP/VERSION`
pub fn v3(group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<&Kind> = KINDS.iter().filter(|k| k.group == group && k.version == version).collect();
    if kinds.is_empty() {
        return None;
    }
    let schemas: Map<String, Value> = kinds.iter().map(|k| (schema_name(k), schema(k))).collect();
    let paths: Map<String, Value> = kinds.iter().map(|k| operations(k)).collect();
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.33.0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }))
}

fn operations(kind: &Kind) -> (String, Value) {
    let root = path_of(kind.group, kind.version);
    let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
    let query = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}});
    let gvk = json!({"group": kind.group, "version": kind.version, "kind": kind.kind});
    let reply = json!({"200": {"description": "OK", "content": {"application/json":
        {"schema": {"$ref": format!("#/components/schemas/{}", schema_name(kind))}}}}});
    let operation = |action: &str| {
        json!({
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk,
            "parameters": [query("dryRun"), query("fieldManager"), query("fieldValidation")], "responses": reply,
        })
    };
    let mut patch = operation("patch");
    patch["requestBody"] = json!({"content": {
        "application/apply-patch+yaml": {"schema": {"type": "object"}},
        "application/json-patch+json": {"schema": {"type": "object"}},
        "application/merge-patch+json": {"schema": {"type": "object"}},
    }});
    let path = format!("/{root}{scope}/{}/{{name}}", kind.plural);
    (path, json!({"get": operation("get"), "put": operation("put"), "patch": patch}))
}

/// `/openapi/v2` as JSON.
pub fn v2() -> Value {
    let definitions: Map<String, Value> = KINDS.iter().map(|k| (schema_name(k), schema(k))).collect();
    let paths: Map<String, Value> = KINDS
        .iter()
        .map(operations)
        .map(|(path, mut operations)| {
            for operation in operations.as_object_mut().into_iter().flat_map(Map::values_mut) {
                operation["responses"] = json!({"200": {"description": "OK"}});
                if let Some(map) = operation.as_object_mut() {
                    map.remove("requestBody");
                }
                for parameter in operation["parameters"].as_array_mut().into_iter().flatten() {
                    *parameter = json!({"name": parameter["name"], "in": "query", "type": "string"});
                }
            }
            (path, operations)
        })
        .collect();
    json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": "v1.33.0"}, "paths": paths,
           "definitions": definitions})
}

/// `/openapi/v2` in the protobuf form that `kubectl` before 1.27 insists on:
/// which kinds know `dryRun`, and no definitions, so that such a `kubectl`
/// checks nothing itself and merges by what it has built in.
pub fn v2_protobuf() -> Vec<u8> {
    let info = [field(1, b"Kubernetes"), field(2, b"v1.33.0")].concat();
    // Parameter > NonBodyParameter > QueryParameterSubSchema
    let query = [field(2, b"query"), field(4, b"dryRun")].concat();
    let parameter = field(1, &field(2, &field(3, &query)));
    let paths: Vec<u8> = KINDS
        .iter()
        .flat_map(|kind| {
            let gvk = format!("group: \"{}\"\nversion: {}\nkind: {}\n", kind.group, kind.version, kind.kind);
            let extension =
                [field(1, b"x-kubernetes-group-version-kind"), field(2, &field(2, gvk.as_bytes()))].concat();
            let patch = field(8, &[field(8, &parameter), field(13, &extension)].concat());
            let (path, _) = operations(kind);
            field(2, &[field(1, path.as_bytes()), field(2, &patch)].concat())
        })
        .collect();
    [field(1, b"2.0"), field(2, &info), field(8, &paths)].concat()
}

/// A field of bytes (wire type 2).
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend(bytes);
    out
}
