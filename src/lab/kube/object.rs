//! Reading and writing objects as JSON trees. Absent reads as empty.

use jiff::Timestamp;
use serde_json::{Map, Value};

/// The text at a JSON pointer, or "".
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

pub fn int(object: &Value, pointer: &str) -> Option<i64> {
    object.pointer(pointer).and_then(Value::as_i64)
}

pub fn flag(object: &Value, pointer: &str) -> bool {
    object.pointer(pointer).and_then(Value::as_bool).unwrap_or(false)
}

pub fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

pub fn map<'a>(object: &'a Value, pointer: &str) -> Option<&'a Map<String, Value>> {
    object.pointer(pointer).and_then(Value::as_object)
}

pub fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

pub fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

pub fn uid(object: &Value) -> &str {
    text(object, "/metadata/uid")
}

pub fn labels(object: &Value) -> Option<&Map<String, Value>> {
    map(object, "/metadata/labels")
}

pub fn annotation<'a>(object: &'a Value, key: &str) -> &'a str {
    map(object, "/metadata/annotations").and_then(|m| m.get(key)).and_then(Value::as_str).unwrap_or("")
}

/// Marked for deletion.
pub fn deleting(object: &Value) -> bool {
    object.pointer("/metadata/deletionTimestamp").is_some_and(|v| !v.is_null())
}

pub fn revision(object: &Value) -> Option<u64> {
    text(object, "/metadata/resourceVersion").parse().ok()
}

/// The map at a path of plain keys, made where absent.
pub fn map_mut<'a>(object: &'a mut Value, path: &[&str]) -> &'a mut Map<String, Value> {
    let mut here = object;
    for key in path {
        here = as_map(here).entry((*key).to_owned()).or_insert(Value::Null);
    }
    as_map(here)
}

fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        // Just made an object.
        _ => unreachable!(),
    }
}

pub fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    map_mut(object, &["metadata"])
}

/// Set `value` at a path of plain keys.
pub fn set(object: &mut Value, path: &[&str], value: impl Into<Value>) {
    if let Some((last, parents)) = path.split_last() {
        map_mut(object, parents).insert((*last).to_owned(), value.into());
    }
}

/// Set a default: only where nothing is.
pub fn default(map: &mut Map<String, Value>, key: &str, value: impl Into<Value>) {
    match map.get(key) {
        None | Some(Value::Null) => {
            map.insert(key.to_owned(), value.into());
        }
        Some(_) => {}
    }
}

/// Whether a condition of this type has status True.
pub fn condition(object: &Value, kind: &str) -> bool {
    list(object, "/status/conditions").iter().any(|c| text(c, "/type") == kind && text(c, "/status") == "True")
}

/// The controlling owner: (kind, name, uid).
pub fn controller(object: &Value) -> Option<(&str, &str, &str)> {
    list(object, "/metadata/ownerReferences")
        .iter()
        .find(|r| flag(r, "/controller"))
        .map(|r| (text(r, "/kind"), text(r, "/name"), text(r, "/uid")))
}

/// An owner reference to `owner` as its controller.
pub fn controlled_by(owner: &Value) -> Value {
    serde_json::json!({
        "apiVersion": text(owner, "/apiVersion"), "kind": text(owner, "/kind"),
        "name": name(owner), "uid": uid(owner), "controller": true, "blockOwnerDeletion": true,
    })
}

/// Times in objects have whole seconds.
pub fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

pub fn time(object: &Value, pointer: &str) -> Option<Timestamp> {
    text(object, pointer).parse().ok()
}

/// A stable 64-bit hash (FNV-1a) of an object's canonical JSON.
pub fn hash(value: &Value) -> u64 {
    value
        .to_string()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// `number` in the letters that generated names use: no vowels, so no words.
pub fn letters(mut number: u64, length: usize) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let base = ALPHABET.len() as u64;
    (0..length)
        .map(|_| {
            let letter = ALPHABET[(number % base) as usize];
            number /= base;
            char::from(letter)
        })
        .collect()
}
