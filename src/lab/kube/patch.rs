//! The four ways to change an object in place. Pure.
//!
//! - `json`: RFC 6902 operations
//! - `merge`: RFC 7386
//! - `strategic`: lists merged by the keys in `schema`
//! - `apply`: server-side apply, over sets of owned `fields`

pub mod apply;
pub mod fields;
pub mod json;
pub mod schema;
pub mod strategic;

use serde_json::{Map, Value};

/// RFC 7386: objects merge, null removes, everything else replaces.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            if value.is_null() {
                target.remove(key);
            } else {
                merge(target.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }
}
