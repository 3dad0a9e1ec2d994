//! What the API server refuses, said as it says it. Pure.
//!
//! Checks the rules that mistakes in manifests hit; the decoder has already
//! checked types. `old` is the stored object on updates.

mod network;
mod workload;

pub use network::family;

use serde_json::Value;

use super::error::{ApiError, Cause};
use super::kind::Kind;
use super::object;
use super::selector::{Labels, valid_key, valid_value};

/// Collects what is wrong with one object.
#[derive(Default)]
pub struct Issues {
    causes: Vec<Cause>,
}

impl Issues {
    fn add(&mut self, field: impl Into<String>, reason: &'static str, message: String) {
        // A hostile object has thousands of wrong entries; a person reads ten.
        if self.causes.len() < 10 {
            self.causes.push(Cause { field: field.into(), reason, message });
        }
    }

    pub fn required(&mut self, field: impl Into<String>, hint: &str) {
        let message = if hint.is_empty() { "Required value".into() } else { format!("Required value: {hint}") };
        self.add(field, "FieldValueRequired", message);
    }

    pub fn invalid(&mut self, field: impl Into<String>, value: impl std::fmt::Display, hint: &str) {
        let mut value = value.to_string();
        if value.len() > 200 {
            value = value.chars().take(200).collect::<String>() + "…";
        }
        self.add(field, "FieldValueInvalid", format!("Invalid value: {value}: {hint}"));
    }

    pub fn invalid_text(&mut self, field: impl Into<String>, value: &str, hint: &str) {
        self.invalid(field, format_args!("\"{value}\""), hint);
    }

    pub fn one_of(&mut self, field: impl Into<String>, value: &str, allowed: &[&str]) {
        if !allowed.contains(&value) {
            let list: Vec<String> = allowed.iter().map(|a| format!("\"{a}\"")).collect();
            let message = format!("Unsupported value: \"{value}\": supported values: {}", list.join(", "));
            self.add(field, "FieldValueNotSupported", message);
        }
    }

    pub fn duplicate(&mut self, field: impl Into<String>, value: &str) {
        self.add(field, "FieldValueDuplicate", format!("Duplicate value: \"{value}\""));
    }

    pub fn forbidden(&mut self, field: impl Into<String>, hint: &str) {
        self.add(field, "FieldValueForbidden", format!("Forbidden: {hint}"));
    }

    pub fn immutable(&mut self, field: &str, old: Option<&Value>, new: &Value) {
        let Some(old) = old else { return };
        let pointer = format!("/{}", field.replace('.', "/"));
        if old.pointer(&pointer) != new.pointer(&pointer) {
            let value = new.pointer(&pointer).cloned().unwrap_or_default();
            self.invalid(field, value, "field is immutable");
        }
    }
}

pub fn check(kind: &Kind, object: &Value, old: Option<&Value>) -> Result<(), ApiError> {
    let mut issues = Issues::default();
    metadata(kind, object, &mut issues);
    match kind.kind {
        "Pod" => workload::pod(object, old, &mut issues),
        "Deployment" | "ReplicaSet" | "DaemonSet" => workload::controller(kind, object, old, &mut issues),
        "StatefulSet" => {
            workload::controller(kind, object, old, &mut issues);
            workload::stateful_set(object, old, &mut issues);
        }
        "Service" => network::service(object, old, &mut issues),
        "EndpointSlice" => network::endpoint_slice(object, old, &mut issues),
        "NetworkPolicy" => network::policy(object, &mut issues),
        "Ingress" => network::ingress(object, &mut issues),
        "ConfigMap" | "Secret" => frozen(object, old, &mut issues),
        "RoleBinding" | "ClusterRoleBinding" => issues.immutable("roleRef", old, object),
        _ => {}
    }
    if issues.causes.is_empty() { Ok(()) } else { Err(ApiError::invalid(kind, object::name(object), issues.causes)) }
}

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or \
                         '.', and must start and end with an alphanumeric character";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
                     start and end with an alphanumeric character";

fn metadata(kind: &Kind, object: &Value, issues: &mut Issues) {
    let name = object::name(object);
    match kind.kind {
        _ if name.is_empty() => issues.required("metadata.name", "name or generateName is required"),
        "Namespace" | "Service" if !is_label(name) => issues.invalid_text("metadata.name", name, LABEL),
        // Their names only need to fit in a path.
        "Role" | "RoleBinding" | "ClusterRole" | "ClusterRoleBinding" => {
            let path = name.contains(['/', '%']) || name == "." || name == "..";
            if path {
                issues.invalid_text("metadata.name", name, "may not be '.' or '..' nor contain '/' or '%'");
            }
        }
        _ if !is_subdomain(name) => issues.invalid_text("metadata.name", name, SUBDOMAIN),
        _ => {}
    }
    labels(object, "metadata", issues);
    let annotations = object::map(object, "/metadata/annotations");
    let mut size = 0;
    for (key, value) in annotations.into_iter().flatten() {
        size += key.len() + value.as_str().map_or(0, str::len);
        if !valid_key(&key.to_lowercase()) {
            issues.invalid_text(
                "metadata.annotations",
                key,
                "name part must consist of alphanumeric characters, '-', '_' or '.'",
            );
        }
    }
    if size > 256 * 1024 {
        issues.add("metadata.annotations", "FieldValueTooLong", "Too long: may not be more than 262144 bytes".into());
    }
    for finalizer in object::list(object, "/metadata/finalizers") {
        if !valid_key(finalizer.as_str().unwrap_or("")) {
            issues.invalid("metadata.finalizers", finalizer, "name is invalid");
        }
    }
}

/// Labels below `path`.metadata or at `path`.labels.
fn labels(object: &Value, path: &str, issues: &mut Issues) {
    let pointer = format!("/{}/labels", path.replace('.', "/"));
    for (key, value) in object::map(object, &pointer).into_iter().flatten() {
        let value = value.as_str().unwrap_or("");
        if !valid_key(key) {
            issues.invalid_text(format!("{path}.labels"), key, "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character");
        }
        if !valid_value(value) {
            issues.invalid_text(format!("{path}.labels"), value, "a valid label must be an empty string or consist of at most 63 alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character");
        }
    }
}

fn selector(object: &Value, field: &str, issues: &mut Issues) -> Option<Labels> {
    let pointer = format!("/{}", field.replace('.', "/"));
    let value = object.pointer(&pointer)?;
    match Labels::from_object(value) {
        Ok(selector) => Some(selector),
        Err(error) => {
            issues.invalid(field, value, &error.to_string());
            None
        }
    }
}

fn frozen(object: &Value, old: Option<&Value>, issues: &mut Issues) {
    for key in object::map(object, "/data").into_iter().flatten().map(|(key, _)| key) {
        let fits = !key.is_empty()
            && key.len() <= 253
            && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !fits {
            issues.invalid_text(
                "data",
                key,
                "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
            );
        }
    }
    if old.is_some_and(|old| object::flag(old, "/immutable") && (old.get("data") != object.get("data"))) {
        issues.forbidden("data", "field is immutable when `immutable` is set");
    }
}

/// At most 253 characters of dot-separated labels.
pub fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && !name.is_empty() && name.split('.').all(label_shape)
}

/// At most 63 lower-case letters, digits and inner dashes.
pub fn is_label(name: &str) -> bool {
    name.len() <= 63 && label_shape(name)
}

fn label_shape(part: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    bytes.iter().all(|b| alphanumeric(b) || *b == b'-')
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
}

/// A port's name: at most 15 characters, one letter at least.
fn is_port_name(name: &str) -> bool {
    name.len() <= 15 && is_label(name) && name.bytes().any(|b| b.is_ascii_lowercase()) && !name.contains("--")
}

const PORT_NAME: &str = "must be no more than 15 characters: lower case letters, digits and '-', with at least one \
                         letter";

fn port_number(field: String, port: Option<&Value>, issues: &mut Issues) {
    match port.and_then(Value::as_i64) {
        Some(1..=65535) => {}
        Some(other) => issues.invalid(field, other, "must be between 1 and 65535, inclusive"),
        None => issues.required(field, ""),
    }
}
