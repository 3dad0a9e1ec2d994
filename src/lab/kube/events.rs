//! Events have two spellings of one object: `v1` and `events.k8s.io/v1`. Stored
//! is `v1`; the other is translated at the door. Pure.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::kind::Kind;

/// (`v1`, `events.k8s.io/v1`)
const NAMES: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

fn renamed(
    mut map: Map<String, Value>,
    names: impl Iterator<Item = (&'static str, &'static str)>,
) -> Map<String, Value> {
    for (from, to) in names {
        if let Some(value) = map.remove(from) {
            map.insert(to.to_owned(), value);
        }
    }
    map
}

/// As stored.
pub fn inward(kind: &Kind, object: Value) -> Value {
    match object {
        Value::Object(map) if kind.group == "events.k8s.io" => {
            let mut map = renamed(map, NAMES.iter().map(|(core, new)| (*new, *core)));
            map.insert("apiVersion".into(), "v1".into());
            Value::Object(map)
        }
        other => other,
    }
}

/// As this view shows it.
pub fn outward<'a>(kind: &Kind, object: &'a Value) -> Cow<'a, Value> {
    match object {
        Value::Object(map) if kind.group == "events.k8s.io" => {
            let mut map = renamed(map.clone(), NAMES.iter().copied());
            map.insert("apiVersion".into(), "events.k8s.io/v1".into());
            Cow::Owned(Value::Object(map))
        }
        other => Cow::Borrowed(other),
    }
}
