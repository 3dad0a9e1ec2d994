//! The pod row: readiness, and the one word that says what state it is in.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{age, count, or_none};
use crate::lab::kube::object::{self, flag, int, list, text};

pub fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let statuses = list(pod, "/status/containerStatuses");
    let ready = statuses.iter().filter(|s| flag(s, "/ready")).count();
    let restarts: i64 = statuses.iter().map(|s| count(s, "/restartCount")).sum();
    let last = statuses
        .iter()
        .filter_map(|s| object::time(s, "/lastState/terminated/finishedAt"))
        .max()
        .filter(|_| restarts > 0);
    let restarts = match last {
        Some(last) => format!("{restarts} ({} ago)", super::human(now.as_second() - last.as_second())),
        None => restarts.to_string(),
    };
    let gates = list(pod, "/spec/readinessGates");
    let open = gates.iter().filter(|g| object::condition(pod, text(g, "/conditionType"))).count();
    vec![
        json!(object::name(pod)),
        json!(format!("{ready}/{}", list(pod, "/spec/containers").len())),
        json!(state(pod)),
        json!(restarts),
        json!(age(pod, "/metadata/creationTimestamp", now)),
        json!(or_none(text(pod, "/status/podIP"))),
        json!(or_none(text(pod, "/spec/nodeName"))),
        json!(or_none(text(pod, "/status/nominatedNodeName"))),
        json!(if gates.is_empty() { "<none>".into() } else { format!("{open}/{}", gates.len()) }),
    ]
}

/// One word: the phase, or the reason that explains it better.
fn state(pod: &Value) -> String {
    let mut word = match text(pod, "/status/reason") {
        "" => text(pod, "/status/phase"),
        reason => reason,
    }
    .to_owned();
    if list(pod, "/status/conditions")
        .iter()
        .any(|c| text(c, "/type") == "PodScheduled" && text(c, "/reason") == "SchedulingGated")
    {
        word = "SchedulingGated".into();
    }
    let total = list(pod, "/spec/initContainers").len();
    let mut starting = false;
    for (index, status) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
        if status.pointer("/state/terminated").is_some() && int(status, "/state/terminated/exitCode") == Some(0) {
            continue;
        }
        starting = true;
        word = match why(status) {
            Some(reason) if reason != "PodInitializing" => format!("Init:{reason}"),
            _ => format!("Init:{index}/{total}"),
        };
        break;
    }
    if !starting {
        let statuses = list(pod, "/status/containerStatuses");
        let mut running = false;
        for status in statuses.iter().rev() {
            match why(status) {
                Some(reason) => word = reason,
                None => running |= flag(status, "/ready") && status.pointer("/state/running").is_some(),
            }
        }
        if word == "Completed" && running {
            word = if object::condition(pod, "Ready") { "Running".into() } else { "NotReady".into() };
        }
    }
    if object::deleting(pod) {
        word = if text(pod, "/status/reason") == "NodeLost" { "Unknown".into() } else { "Terminating".into() };
    }
    word
}

/// Why a container does not run.
fn why(status: &Value) -> Option<String> {
    let waiting = text(status, "/state/waiting/reason");
    if !waiting.is_empty() {
        return Some(waiting.to_owned());
    }
    status.pointer("/state/terminated")?;
    let reason = text(status, "/state/terminated/reason");
    if !reason.is_empty() {
        return Some(reason.to_owned());
    }
    match int(status, "/state/terminated/signal").filter(|s| *s != 0) {
        Some(signal) => Some(format!("Signal:{signal}")),
        None => Some(format!("ExitCode:{}", count(status, "/state/terminated/exitCode"))),
    }
}
