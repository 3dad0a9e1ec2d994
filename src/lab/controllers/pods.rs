//! Pods and their templates: what the workload controllers share. Pure.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::lab::kube::object::{self, list, map_mut, text};

/// A pod from a template, controlled by `owner`.
pub fn from_template(owner: &Value, template: &Value) -> Value {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": {}});
    if let Some(meta) = object::map(template, "/metadata") {
        for field in ["labels", "annotations", "finalizers"] {
            if let Some(value) = meta.get(field) {
                pod["metadata"][field] = value.clone();
            }
        }
    }
    pod["metadata"]["namespace"] = object::namespace(owner).into();
    pod["metadata"]["ownerReferences"] = json!([object::controlled_by(owner)]);
    pod["spec"] = template.get("spec").cloned().unwrap_or_default();
    pod
}

/// Neither finished nor on its way out.
pub fn active(pod: &Value) -> bool {
    !object::deleting(pod) && !finished(pod)
}

pub fn finished(pod: &Value) -> bool {
    matches!(text(pod, "/status/phase"), "Succeeded" | "Failed")
}

pub fn ready(pod: &Value) -> bool {
    object::condition(pod, "Ready")
}

/// Ready for at least this long; else, when it will be, in seconds.
pub fn available(pod: &Value, min_ready: i64, now: Timestamp) -> Result<(), Option<i64>> {
    let since =
        list(pod, "/status/conditions").iter().find(|c| text(c, "/type") == "Ready" && text(c, "/status") == "True");
    let Some(since) = since else { return Err(None) };
    if min_ready <= 0 {
        return Ok(());
    }
    let since = object::time(since, "/lastTransitionTime").unwrap_or(now);
    let left = since.as_second() + min_ready - now.as_second();
    if left <= 0 { Ok(()) } else { Err(Some(left)) }
}

/// A template with one label more.
pub fn labelled(template: &Value, key: &str, value: &str) -> Value {
    let mut template = template.clone();
    map_mut(&mut template, &["metadata", "labels"]).insert(key.to_owned(), value.into());
    template
}

/// Which of too many pods goes first: unscheduled, not running, not ready, young.
pub fn expendable(pod: &Value) -> (bool, bool, bool, std::cmp::Reverse<String>) {
    (
        !text(pod, "/spec/nodeName").is_empty(),
        text(pod, "/status/phase") == "Running",
        ready(pod),
        std::cmp::Reverse(format!("{}{}", text(pod, "/metadata/creationTimestamp"), object::name(pod))),
    )
}

/// An absolute number or a percentage of `total`.
pub fn share(value: Option<&Value>, total: i64, round_up: bool) -> i64 {
    match value {
        Some(Value::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let hundredths = total.saturating_mul(percent.clamp(0, 1000));
            if round_up { (hundredths + 99) / 100 } else { hundredths / 100 }
        }
        Some(number) => number.as_i64().unwrap_or(0).max(0),
        None => 0,
    }
}
