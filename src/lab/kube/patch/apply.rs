//! Server-side apply, and who manages which field after any other write.
//!
//! A manager's applied configuration is its whole wish: fields it no longer
//! mentions, and that nobody else manages, go; a field another manager holds at
//! another value is a conflict, unless forced.

use serde_json::{Map, Value, json};

use super::fields::{self, Fields, item_key};
use super::schema::{self, List};

/// One entry of `metadata.managedFields`.
#[derive(Clone, Debug)]
struct Entry {
    manager: String,
    operation: String,
    subresource: String,
    time: String,
    api_version: String,
    fields: Fields,
}

/// Who writes, when, through which subresource ("" for none).
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    pub manager: &'a str,
    pub subresource: &'a str,
    pub api_version: &'a str,
    pub now: &'a str,
}

fn entries(object: &Value) -> Vec<Entry> {
    let list = object.pointer("/metadata/managedFields").and_then(Value::as_array);
    let word = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    list.into_iter()
        .flatten()
        .map(|entry| Entry {
            manager: word(entry, "manager"),
            operation: word(entry, "operation"),
            subresource: word(entry, "subresource"),
            time: word(entry, "time"),
            api_version: word(entry, "apiVersion"),
            fields: Fields::from_value(entry.get("fieldsV1").unwrap_or(&Value::Null)),
        })
        .collect()
}

fn store(object: &mut Value, entries: Vec<Entry>) {
    let list: Vec<Value> = entries
        .into_iter()
        .filter(|entry| !entry.fields.is_empty())
        .map(|entry| {
            let mut value = json!({
                "manager": entry.manager, "operation": entry.operation, "apiVersion": entry.api_version,
                "time": entry.time, "fieldsType": "FieldsV1", "fieldsV1": entry.fields.to_value(),
            });
            if !entry.subresource.is_empty() {
                value["subresource"] = entry.subresource.into();
            }
            value
        })
        .collect();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        if list.is_empty() {
            metadata.remove("managedFields");
        } else {
            metadata.insert("managedFields".into(), Value::Array(list));
        }
    }
}

/// After a write that is not an apply: changed fields go to the writer.
pub fn track(old: Option<&Value>, new: &mut Value, writer: Writer<'_>) {
    // Whoever writes the list itself is believed; an empty one starts afresh.
    let mut known = match new.pointer("/metadata/managedFields") {
        Some(_) => entries(new),
        None => old.map(entries).unwrap_or_default(),
    };
    let now = Fields::of(new);
    let changed = match old {
        None => now.clone(),
        Some(old) => differing(&now, old, new),
    };
    for entry in &mut known {
        let mine =
            entry.operation == "Update" && entry.manager == writer.manager && entry.subresource == writer.subresource;
        if !mine {
            entry.fields.subtract(&changed);
        }
        let mut gone = entry.fields.clone();
        gone.subtract(&now);
        entry.fields.subtract(&gone);
    }
    if !changed.is_empty() {
        own(&mut known, writer, "Update", |fields| fields.union(&changed));
    }
    store(new, known);
}

/// The fields of `now` that `new` has otherwise than `old`.
fn differing(now: &Fields, old: &Value, new: &Value) -> Fields {
    let mut changed = Fields::default();
    for path in now.members() {
        // Items of keyed lists are members too: they count when they appear.
        let item = path.last().is_some_and(|step| step.starts_with("k:"));
        let same = match fields::lookup(old, &path) {
            None => false,
            Some(_) if item => true,
            before => before == fields::lookup(new, &path),
        };
        if !same {
            insert(&mut changed, &path);
        }
    }
    changed
}

fn own(known: &mut Vec<Entry>, writer: Writer<'_>, operation: &str, change: impl FnOnce(&mut Fields)) {
    let place = known.iter().position(|entry| {
        entry.operation == operation && entry.manager == writer.manager && entry.subresource == writer.subresource
    });
    let mut entry = match place {
        Some(place) => known.remove(place),
        None => Entry {
            manager: writer.manager.to_owned(),
            operation: operation.to_owned(),
            subresource: writer.subresource.to_owned(),
            time: String::new(),
            api_version: String::new(),
            fields: Fields::default(),
        },
    };
    let before = entry.fields.clone();
    change(&mut entry.fields);
    if entry.fields != before || entry.time.is_empty() {
        entry.time = writer.now.to_owned();
        entry.api_version = writer.api_version.to_owned();
    }
    known.insert(place.unwrap_or(known.len()), entry);
}

fn insert(set: &mut Fields, path: &[String]) {
    match path.split_first() {
        None => set.here = true,
        Some((first, rest)) => insert(set.children.entry(first.clone()).or_default(), rest),
    }
}

/// Apply `wish` over `live`. The error lists conflicts: ("manager", field).
pub fn apply(live: &Value, wish: &Value, writer: Writer<'_>, force: bool) -> Result<Value, Vec<(String, String)>> {
    let mut known = entries(live);
    let wanted = Fields::of(wish);
    let is_mine = |entry: &Entry| {
        entry.operation == "Apply" && entry.manager == writer.manager && entry.subresource == writer.subresource
    };
    let mut conflicts = Vec::new();
    let mut taken = Fields::default();
    for path in wanted.members() {
        if path.last().is_some_and(|step| step.starts_with("k:")) {
            continue;
        }
        if fields::lookup(live, &path) == fields::lookup(wish, &path) {
            continue;
        }
        for entry in known.iter().filter(|entry| !is_mine(entry)) {
            if entry.fields.contains(&path) {
                let using =
                    if entry.operation == "Update" { format!(" using {}", entry.api_version) } else { String::new() };
                conflicts.push((format!("\"{}\"{using}", entry.manager), fields::readable(&path)));
                insert(&mut taken, &path);
            }
        }
    }
    if !conflicts.is_empty() && !force {
        return Err(conflicts);
    }
    let mut merged = merge(Some(live), wish, &mut Vec::new());
    let mut others = Fields::default();
    let mut previous = Fields::default();
    for entry in &mut known {
        if is_mine(entry) {
            previous = entry.fields.clone();
        } else {
            entry.fields.subtract(&taken);
            others.union(&entry.fields);
        }
    }
    // Dropped wishes, items before their fields: an item without its key
    // would not be found any more.
    previous.subtract(&wanted);
    let mut dropped = previous.members();
    dropped.sort_by_key(Vec::len);
    for path in dropped {
        let held = below(&others, &path).is_some_and(|set| !set.is_empty());
        if !held && !fields_below(&wanted, &path) {
            fields::remove(&mut merged, &path);
        }
    }
    own(&mut known, writer, "Apply", |fields| *fields = wanted);
    store(&mut merged, known);
    Ok(merged)
}

fn below<'a>(set: &'a Fields, path: &[String]) -> Option<&'a Fields> {
    path.iter().try_fold(set, |set, step| set.children.get(step))
}

fn fields_below(set: &Fields, path: &[String]) -> bool {
    below(set, path).is_some_and(|set| !set.is_empty())
}

/// `wish` over `live` by the schema's list rules.
fn merge<'a>(live: Option<&Value>, wish: &'a Value, path: &mut Vec<&'a str>) -> Value {
    match (live, wish) {
        (Some(Value::Object(live)), Value::Object(wish)) if path.is_empty() || !schema::atomic_map(path) => {
            let mut result = live.clone();
            merge_into(&mut result, wish, path);
            Value::Object(result)
        }
        (_, Value::Object(wish)) => {
            let mut result = Map::new();
            merge_into(&mut result, wish, path);
            Value::Object(result)
        }
        (live, Value::Array(items)) => {
            let here = live.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            match schema::list(path) {
                List::Atomic => wish.clone(),
                List::Set => {
                    let mut all = here.to_vec();
                    all.extend(items.iter().filter(|item| !here.contains(item)).cloned());
                    Value::Array(all)
                }
                List::Map { keys, .. } => {
                    let mut all = here.to_vec();
                    for item in items {
                        let key = item_key(item, keys);
                        match all.iter().position(|have| item_key(have, keys) == key) {
                            Some(at) => all[at] = merge(Some(&all[at]), item, path),
                            None => all.push(merge(None, item, path)),
                        }
                    }
                    Value::Array(all)
                }
            }
        }
        _ => wish.clone(),
    }
}

fn merge_into<'a>(result: &mut Map<String, Value>, wish: &'a Map<String, Value>, path: &mut Vec<&'a str>) {
    for (key, value) in wish {
        if value.is_null() {
            continue;
        }
        path.push(key);
        let merged = merge(result.get(key), value, path);
        path.pop();
        result.insert(key.clone(), merged);
    }
}
