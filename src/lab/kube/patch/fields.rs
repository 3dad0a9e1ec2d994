//! Sets of fields, as `managedFields` keeps them (the FieldsV1 format).
//!
//! A set is a tree; a node that is `here` is a member itself. Keys are spelled
//! as in FieldsV1: `f:name`, `k:{"name":"x"}`, `v:"x"`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::schema::{self, List};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    pub here: bool,
    pub children: BTreeMap<String, Fields>,
}

/// Written by the server itself; nobody owns them.
const UNOWNED: &[&str] = &[
    "apiVersion",
    "kind",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "metadata.resourceVersion",
    "metadata.generation",
    "metadata.creationTimestamp",
    "metadata.deletionTimestamp",
    "metadata.deletionGracePeriodSeconds",
    "metadata.selfLink",
    "metadata.managedFields",
    "metadata.generateName",
];

impl Fields {
    fn member() -> Self {
        Self { here: true, children: BTreeMap::new() }
    }

    pub fn is_empty(&self) -> bool {
        !self.here && self.children.is_empty()
    }

    /// Every field that `object` sets.
    pub fn of(object: &Value) -> Self {
        collect(object, &mut Vec::new())
    }

    pub fn from_value(value: &Value) -> Self {
        let mut fields = Self::default();
        for (key, below) in value.as_object().into_iter().flatten() {
            if key == "." {
                fields.here = true;
            } else {
                let mut child = Self::from_value(below);
                if child.is_empty() {
                    child.here = true;
                }
                fields.children.insert(key.clone(), child);
            }
        }
        fields
    }

    pub fn to_value(&self) -> Value {
        let mut map = Map::new();
        if self.here && !self.children.is_empty() {
            map.insert(".".into(), Value::Object(Map::new()));
        }
        for (key, child) in &self.children {
            map.insert(key.clone(), child.to_value());
        }
        Value::Object(map)
    }

    pub fn union(&mut self, other: &Fields) {
        self.here |= other.here;
        for (key, child) in &other.children {
            self.children.entry(key.clone()).or_default().union(child);
        }
    }

    /// Remove the members of `other`.
    pub fn subtract(&mut self, other: &Fields) {
        self.here &= !other.here;
        for (key, child) in &other.children {
            if let Some(mine) = self.children.get_mut(key) {
                mine.subtract(child);
                if mine.is_empty() {
                    self.children.remove(key);
                }
            }
        }
    }

    pub fn contains(&self, path: &[String]) -> bool {
        match path.split_first() {
            None => self.here,
            Some((first, rest)) => self.children.get(first).is_some_and(|child| child.contains(rest)),
        }
    }

    /// The paths of all members.
    pub fn members(&self) -> Vec<Vec<String>> {
        let mut all = Vec::new();
        self.walk(&mut Vec::new(), &mut all);
        all
    }

    fn walk(&self, path: &mut Vec<String>, all: &mut Vec<Vec<String>>) {
        if self.here {
            all.push(path.clone());
        }
        for (key, child) in &self.children {
            path.push(key.clone());
            child.walk(path, all);
            path.pop();
        }
    }
}

fn collect<'a>(value: &'a Value, path: &mut Vec<&'a str>) -> Fields {
    match value {
        Value::Object(map) if path.is_empty() || !(map.is_empty() || schema::atomic_map(path)) => {
            let mut fields = Fields::default();
            for (key, below) in map {
                path.push(key);
                let unowned = path.len() <= 2 && UNOWNED.contains(&path.join(".").as_str());
                if !unowned && !below.is_null() {
                    let child = collect(below, path);
                    if !child.is_empty() {
                        fields.children.insert(format!("f:{key}"), child);
                    }
                }
                path.pop();
            }
            fields
        }
        Value::Array(items) if !items.is_empty() => match schema::list(path) {
            List::Atomic => Fields::member(),
            List::Set => Fields {
                here: false,
                children: items.iter().map(|item| (format!("v:{item}"), Fields::member())).collect(),
            },
            List::Map { keys, .. } => {
                let mut fields = Fields::default();
                for item in items {
                    let mut child = collect(item, path);
                    child.here = true;
                    fields.children.insert(item_key(item, keys), child);
                }
                fields
            }
        },
        _ => Fields::member(),
    }
}

/// The name of a list item: its key fields. A port's protocol defaults to TCP.
pub fn item_key(item: &Value, keys: &[&str]) -> String {
    let mut map = Map::new();
    for key in keys {
        match item.get(*key) {
            Some(value) if !value.is_null() => {
                map.insert((*key).to_owned(), value.clone());
            }
            _ if *key == "protocol" => {
                map.insert((*key).to_owned(), "TCP".into());
            }
            _ => {}
        }
    }
    format!("k:{}", Value::Object(map))
}

/// The position in `items` that a `k:` or `v:` step names.
fn position(items: &[Value], step: &str) -> Option<usize> {
    if let Some(scalar) = step.strip_prefix("v:") {
        let wanted: Value = serde_json::from_str(scalar).ok()?;
        return items.iter().position(|item| *item == wanted);
    }
    let text = step.strip_prefix("k:")?;
    let Ok(Value::Object(wanted)) = serde_json::from_str::<Value>(text) else { return None };
    let keys: Vec<&str> = wanted.keys().map(String::as_str).collect();
    items.iter().position(|item| item_key(item, &keys) == *step)
}

/// What is at a path of FieldsV1 steps.
pub fn lookup<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(object, |here, step| match step.strip_prefix("f:") {
        Some(field) => here.get(field),
        None => {
            let items = here.as_array()?;
            items.get(position(items, step)?)
        }
    })
}

/// Remove what is at a path of FieldsV1 steps; emptied parents stay.
pub fn remove(object: &mut Value, path: &[String]) {
    let Some((last, parents)) = path.split_last() else { return };
    let mut here = object;
    for step in parents {
        let next = match step.strip_prefix("f:") {
            Some(field) => here.get_mut(field),
            None => match here.as_array_mut() {
                Some(items) => position(items, step).and_then(|at| items.get_mut(at)),
                None => None,
            },
        };
        match next {
            Some(next) => here = next,
            None => return,
        }
    }
    match (last.strip_prefix("f:"), here) {
        (Some(field), Value::Object(map)) => {
            map.remove(field);
        }
        (None, Value::Array(items)) => {
            if let Some(at) = position(items, last) {
                items.remove(at);
            }
        }
        _ => {}
    }
}

/// A path as people write it: `.spec.containers[name="x"].image`.
pub fn readable(path: &[String]) -> String {
    let mut text = String::new();
    for step in path {
        if let Some(field) = step.strip_prefix("f:") {
            text.push('.');
            text.push_str(field);
        } else if let Some(scalar) = step.strip_prefix("v:") {
            text.push_str(&format!("[={scalar}]"));
        } else if let Some(Ok(Value::Object(keys))) = step.strip_prefix("k:").map(serde_json::from_str::<Value>) {
            let keys: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            text.push_str(&format!("[{}]", keys.join(",")));
        }
    }
    text
}
