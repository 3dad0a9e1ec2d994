//! Rules for pods and the objects that make them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Issues, LABEL, PORT_NAME, is_label, is_port_name, is_subdomain, port_number, selector};
use crate::lab::kube::kind::Kind;
use crate::lab::kube::object::{self, list, text};
use crate::lab::kube::quantity;

pub fn pod(object: &Value, old: Option<&Value>, issues: &mut Issues) {
    match old {
        None => pod_spec(object, "spec", issues),
        Some(old) => pod_update(object, old, issues),
    }
}

/// A pod's spec is fixed, but for images, a deadline and more tolerations;
/// the scheduler sets the node through the binding.
fn pod_update(object: &Value, old: &Value, issues: &mut Issues) {
    let bare = |pod: &Value| {
        let mut spec = pod.get("spec").cloned().unwrap_or_default();
        for group in ["containers", "initContainers"] {
            for one in spec.get_mut(group).and_then(Value::as_array_mut).into_iter().flatten() {
                object::map_mut(one, &[]).remove("image");
                object::map_mut(one, &[]).remove("imagePullPolicy");
            }
        }
        let spec_map = object::map_mut(&mut spec, &[]);
        for mutable in ["activeDeadlineSeconds", "tolerations", "ephemeralContainers", "schedulingGates"] {
            spec_map.remove(mutable);
        }
        spec
    };
    if bare(object) != bare(old) {
        issues.forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`, \
             `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations` (only additions to \
             existing tolerations)",
        );
    }
    let kept = list(old, "/spec/tolerations").iter().all(|t| list(object, "/spec/tolerations").contains(t));
    if !kept {
        issues.forbidden("spec.tolerations", "existing tolerations may not be removed or changed");
    }
}

fn pod_spec(object: &Value, path: &str, issues: &mut Issues) {
    let pointer = format!("/{}", path.replace('.', "/"));
    let empty = Value::Null;
    let spec = object.pointer(&pointer).unwrap_or(&empty);
    if list(spec, "/containers").is_empty() {
        issues.required(format!("{path}.containers"), "");
    }
    let mut names = BTreeSet::new();
    for group in ["initContainers", "containers"] {
        for (index, one) in list(spec, &format!("/{group}")).iter().enumerate() {
            container(one, &format!("{path}.{group}[{index}]"), &mut names, issues);
        }
    }
    let mut volumes = BTreeSet::new();
    for (index, volume) in list(spec, "/volumes").iter().enumerate() {
        let name = text(volume, "/name");
        if !is_label(name) {
            issues.invalid_text(format!("{path}.volumes[{index}].name"), name, LABEL);
        }
        if !volumes.insert(name) {
            issues.duplicate(format!("{path}.volumes[{index}].name"), name);
        }
    }
    for claim in list(object, "/spec/volumeClaimTemplates") {
        volumes.insert(text(claim, "/metadata/name"));
    }
    for (index, one) in list(spec, "/containers").iter().enumerate() {
        for (mount, entry) in list(one, "/volumeMounts").iter().enumerate() {
            let name = text(entry, "/name");
            if !volumes.contains(name) {
                let field = format!("{path}.containers[{index}].volumeMounts[{mount}].name");
                issues.add(field, "FieldValueNotFound", format!("Not found: \"{name}\""));
            }
        }
    }
    issues.one_of(format!("{path}.restartPolicy"), text(spec, "/restartPolicy"), &["Always", "OnFailure", "Never"]);
    issues.one_of(
        format!("{path}.dnsPolicy"),
        text(spec, "/dnsPolicy"),
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    );
    for field in ["hostname", "subdomain"] {
        let name = text(spec, &format!("/{field}"));
        if !name.is_empty() && !is_label(name) {
            issues.invalid_text(format!("{path}.{field}"), name, LABEL);
        }
    }
    if object::int(spec, "/terminationGracePeriodSeconds").is_some_and(|s| s < 0) {
        issues.invalid(
            format!("{path}.terminationGracePeriodSeconds"),
            "negative",
            "must be greater than or equal to 0",
        );
    }
}

fn container<'a>(one: &'a Value, path: &str, names: &mut BTreeSet<&'a str>, issues: &mut Issues) {
    let name = text(one, "/name");
    if name.is_empty() {
        issues.required(format!("{path}.name"), "");
    } else if !is_label(name) {
        issues.invalid_text(format!("{path}.name"), name, LABEL);
    } else if !names.insert(name) {
        issues.duplicate(format!("{path}.name"), name);
    }
    if text(one, "/image").trim().is_empty() {
        issues.required(format!("{path}.image"), "");
    }
    let mut ports = BTreeSet::new();
    for (index, port) in list(one, "/ports").iter().enumerate() {
        let place = format!("{path}.ports[{index}]");
        port_number(format!("{place}.containerPort"), port.get("containerPort"), issues);
        if port.get("hostPort").is_some_and(|p| p.as_i64() != Some(0)) {
            port_number(format!("{place}.hostPort"), port.get("hostPort"), issues);
        }
        issues.one_of(format!("{place}.protocol"), text(port, "/protocol"), &["SCTP", "TCP", "UDP"]);
        let name = text(port, "/name");
        if !name.is_empty() && !is_port_name(name) {
            issues.invalid_text(format!("{place}.name"), name, PORT_NAME);
        }
        if !name.is_empty() && !ports.insert(name) {
            issues.duplicate(format!("{place}.name"), name);
        }
    }
    for (index, variable) in list(one, "/env").iter().enumerate() {
        if text(variable, "/name").is_empty() {
            issues.required(format!("{path}.env[{index}].name"), "");
        }
    }
    for kind in ["requests", "limits"] {
        for (resource, amount) in object::map(one, &format!("/resources/{kind}")).into_iter().flatten() {
            let amount = amount.as_str().unwrap_or("");
            if quantity::milli(amount).is_none_or(|q| q < 0) {
                issues.invalid_text(
                    format!("{path}.resources.{kind}[{resource}]"),
                    amount,
                    "must be a quantity such as 500m, 2 or 64Mi, greater than or equal to 0",
                );
            }
        }
    }
}

pub fn controller(kind: &Kind, object: &Value, old: Option<&Value>, issues: &mut Issues) {
    if object::int(object, "/spec/replicas").is_some_and(|n| n < 0) {
        issues.invalid("spec.replicas", "negative", "must be greater than or equal to 0");
    }
    super::labels(object, "spec.template.metadata", issues);
    if let Some(selector) = selector(object, "spec.selector", issues) {
        let labels = object::map(object, "/spec/template/metadata/labels");
        if selector.is_empty() {
            issues.required("spec.selector", "an empty selector would match every pod");
        } else if !selector.matches(labels) {
            let shown = labels.map_or("{}".to_owned(), |l| Value::Object(l.clone()).to_string());
            issues.invalid("spec.template.metadata.labels", shown, "`selector` does not match template `labels`");
        }
    } else if object.pointer("/spec/selector").is_none() {
        issues.required("spec.selector", "");
    }
    issues.immutable("spec.selector", old, object);
    pod_spec(object, "spec.template.spec", issues);
    issues.one_of("spec.template.spec.restartPolicy", text(object, "/spec/template/spec/restartPolicy"), &["Always"]);
    if kind.kind == "Deployment" {
        issues.one_of("spec.strategy.type", text(object, "/spec/strategy/type"), &["Recreate", "RollingUpdate"]);
        let rolling = object.pointer("/spec/strategy/rollingUpdate");
        if text(object, "/spec/strategy/type") == "Recreate" && rolling.is_some() {
            issues.forbidden("spec.strategy.rollingUpdate", "may not be specified when strategy `type` is 'Recreate'");
        }
        let zero = |field: &str| {
            let value = rolling.and_then(|r| r.get(field));
            value.is_some_and(|v| v.as_i64() == Some(0) || v.as_str() == Some("0%"))
        };
        if zero("maxSurge") && zero("maxUnavailable") {
            issues.invalid("spec.strategy.rollingUpdate.maxUnavailable", 0, "may not be 0 when `maxSurge` is 0");
        }
    }
}

pub fn stateful_set(object: &Value, old: Option<&Value>, issues: &mut Issues) {
    let service = text(object, "/spec/serviceName");
    if !service.is_empty() && !is_subdomain(service) {
        issues.invalid_text("spec.serviceName", service, LABEL);
    }
    issues.one_of("spec.podManagementPolicy", text(object, "/spec/podManagementPolicy"), &["OrderedReady", "Parallel"]);
    let Some(old) = old else { return };
    for fixed in ["serviceName", "podManagementPolicy", "volumeClaimTemplates"] {
        let pointer = format!("/spec/{fixed}");
        if old.pointer(&pointer) != object.pointer(&pointer) {
            issues.forbidden(
                "spec",
                "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', \
                 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and \
                 'minReadySeconds' are forbidden",
            );
            return;
        }
    }
}
