//! What a request's body becomes before it is stored. Pure, but for `uid`.

use serde_json::{Value, json};

use super::{Ctx, Sub, Validation};
use crate::lab::kube::defaults;
use crate::lab::kube::error::ApiError;
use crate::lab::kube::events;
use crate::lab::kube::kind::Kind;
use crate::lab::kube::object::{self, metadata};

/// The body is an object of this kind, in this namespace, with this name.
pub(super) fn identified(kind: &Kind, namespace: &str, name: Option<&str>, object: Value) -> Result<Value, ApiError> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the body must be an object"));
    }
    let mut object = object;
    let version = kind.api_version();
    for (field, expected) in [("apiVersion", version.as_str()), ("kind", kind.kind)] {
        let map = object::map_mut(&mut object, &[]);
        match map.get(field).map(|v| v.as_str().unwrap_or("?").to_owned()) {
            None => {
                map.insert(field.into(), expected.into());
            }
            Some(given) if given == expected || given.is_empty() => {
                map.insert(field.into(), expected.into());
            }
            // The other view's spelling comes from the store itself.
            Some(given) if kind.kind == "Event" && field == "apiVersion" && given == "v1" => {}
            Some(given) => {
                let what = if field == "kind" { "kind" } else { "API version" };
                return Err(ApiError::bad_request(format!(
                    "the {what} in the data ({given}) does not match the expected {what} ({expected})"
                )));
            }
        }
    }
    if object.get("metadata").is_some_and(|m| !m.is_object() && !m.is_null()) {
        return Err(ApiError::bad_request("metadata must be an object"));
    }
    let meta = metadata(&mut object);
    if kind.namespaced {
        let given = meta.get("namespace").and_then(Value::as_str).unwrap_or("");
        if !given.is_empty() && given != namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        meta.insert("namespace".into(), namespace.into());
    } else {
        meta.remove("namespace");
    }
    if let Some(name) = name {
        let given = meta.get("name").and_then(Value::as_str).unwrap_or("");
        if !given.is_empty() && given != name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({given}) does not match the name on the URL ({name})"
            )));
        }
        meta.insert("name".into(), name.into());
    }
    Ok(object)
}

/// Through the decoder; unknown fields go, with a word about it.
pub(super) fn decoded(ctx: &Ctx, kind: &Kind, object: Value) -> Result<(Value, Vec<String>), ApiError> {
    let mut object = events::inward(kind, object);
    defaults::quantities(&mut object);
    let plain = object.as_object_mut().and_then(|map| map.remove("stringData"));
    let kind = kind.stored();
    let cannot = |why: String| {
        let name = kind.kind;
        ApiError::bad_request(format!("{name} in version \"{}\" cannot be handled as a {name}: {why}", kind.version))
    };
    let decoded = kind.decode(&object).map_err(cannot)?;
    let mut object = decoded.object;
    if let (Some(plain), "Secret") = (plain, kind.kind) {
        object::map_mut(&mut object, &[]).insert("stringData".into(), plain);
    }
    let unknown: Vec<String> = decoded.unknown.iter().map(|field| format!("unknown field \"{field}\"")).collect();
    match ctx.validation {
        Validation::Strict if !unknown.is_empty() => {
            Err(cannot(format!("strict decoding error: {}", unknown.join(", "))))
        }
        Validation::Warn => Ok((object, unknown)),
        _ => Ok((object, Vec::new())),
    }
}

/// What a write through `sub` makes of `old`.
pub(super) fn merged(kind: &Kind, sub: Sub, old: &Value, new: Value) -> Value {
    let mut result = match sub {
        Sub::Main | Sub::Binding => new,
        Sub::Status => {
            let mut result = old.clone();
            take(&mut result, &new, "status");
            let meta = new.get("metadata");
            // Who reports on pods and nodes may annotate them on the way.
            let keep: &[&str] = match kind.kind {
                "Pod" | "Node" => &["labels", "annotations", "managedFields"],
                _ => &["managedFields"],
            };
            for field in keep {
                match meta.and_then(|m| m.get(*field)) {
                    Some(value) => metadata(&mut result).insert((*field).into(), value.clone()),
                    None => metadata(&mut result).remove(*field),
                };
            }
            result
        }
        Sub::Finalize => {
            let mut result = old.clone();
            let finalizers = new.pointer("/spec/finalizers").cloned().unwrap_or_else(|| json!([]));
            object::set(&mut result, &["spec", "finalizers"], finalizers);
            result
        }
    };
    if sub == Sub::Main && kind.status {
        take(&mut result, old, "status");
    }
    let spec_kept = sub == Sub::Main && kind.kind == "Namespace";
    if spec_kept {
        take(&mut result, old, "spec");
    }
    let before = old.get("metadata").and_then(Value::as_object);
    let meta = metadata(&mut result);
    for system in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
        "resourceVersion",
    ] {
        match before.and_then(|m| m.get(system)) {
            Some(value) => meta.insert(system.into(), value.clone()),
            None => meta.remove(system),
        };
    }
    if object::deleting(old) {
        // Nothing may hold on to what is being deleted once it has let go.
        let had = object::list(old, "/metadata/finalizers");
        if let Some(Value::Array(finalizers)) = metadata(&mut result).get_mut("finalizers") {
            finalizers.retain(|f| had.contains(f));
        }
    }
    result
}

fn take(into: &mut Value, from: &Value, field: &str) {
    match from.get(field) {
        Some(value) => object::map_mut(into, &[]).insert(field.into(), value.clone()),
        None => object::map_mut(into, &[]).remove(field),
    };
}

/// The same entries, but for these keys.
pub(super) fn same_but(old: Option<&Value>, new: Option<&Value>, except: &[&str]) -> bool {
    let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) else { return old == new };
    let counted = |key: &&String| !except.contains(&key.as_str());
    a.keys().filter(counted).count() == b.keys().filter(counted).count()
        && a.iter().filter(|(key, _)| counted(key)).all(|(key, value)| b.get(key) == Some(value))
}

/// Equal, but for who last owned what when.
pub(super) fn same(old: &Value, new: &Value) -> bool {
    let (a, b) = (object::list(old, "/metadata/managedFields"), object::list(new, "/metadata/managedFields"));
    same_but(Some(old), Some(new), &["metadata"])
        && same_but(old.get("metadata"), new.get("metadata"), &["managedFields"])
        && a.len() == b.len()
        && a.iter().zip(b).all(|(a, b)| same_but(Some(a), Some(b), &["time"]))
}

pub(super) fn prune(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, below| !below.is_null());
            map.values_mut().for_each(prune);
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        _ => {}
    }
}

/// A random (version 4) UUID.
pub(super) fn uid() -> String {
    let bits = rand::random::<u128>() & !(0xf << 76) & !(0x3 << 62) | (4 << 76) | (2 << 62);
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
