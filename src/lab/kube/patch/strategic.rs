//! Strategic merge patch: RFC 7386 plus lists that merge by key, and the
//! directives `$patch`, `$retainKeys`, `$setElementOrder/…` and
//! `$deleteFromPrimitiveList/…`.

use serde_json::{Map, Value};

use super::schema::{self, List};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StrategicError(String);

const ORDER: &str = "$setElementOrder/";
const REMOVE: &str = "$deleteFromPrimitiveList/";

/// `patch` over `target`.
pub fn apply(target: &Value, patch: &Value) -> Result<Value, StrategicError> {
    let (Value::Object(live), Value::Object(patch)) = (target, patch) else {
        return Err(StrategicError("a strategic merge patch must be an object".into()));
    };
    let merged = merge_map(live, patch, &mut Vec::new())?;
    Ok(Value::Object(merged))
}

type Path<'a> = Vec<&'a str>;

fn merge_map<'a>(
    live: &Map<String, Value>,
    patch: &'a Map<String, Value>,
    path: &mut Path<'a>,
) -> Result<Map<String, Value>, StrategicError> {
    match patch.get("$patch").map(|d| d.as_str().unwrap_or("")) {
        None | Some("merge") => {}
        Some("replace") => return Ok(without_directives(patch)),
        Some("delete") => return Ok(Map::new()),
        Some(other) => return Err(StrategicError(format!("unknown $patch directive \"{other}\""))),
    }
    let mut result = live.clone();
    if let Some(retain) = patch.get("$retainKeys").and_then(Value::as_array) {
        result.retain(|key, _| retain.iter().any(|k| k.as_str() == Some(key)));
    }
    for (key, list) in patch {
        if let Some(field) = key.strip_prefix(REMOVE) {
            let gone = list.as_array().map_or(&[][..], Vec::as_slice);
            if let Some(Value::Array(here)) = result.get_mut(field) {
                here.retain(|item| !gone.contains(item));
            }
        }
    }
    for (key, value) in patch {
        if key.starts_with('$') {
            continue;
        }
        path.push(key);
        let order = patch.get(&format!("{ORDER}{key}")).and_then(Value::as_array);
        match value {
            Value::Null => {
                result.remove(key);
            }
            Value::Object(patch) => {
                let empty = Map::new();
                let live = result.get(key).and_then(Value::as_object).unwrap_or(&empty);
                let merged = merge_map(live, patch, path)?;
                let deleted = patch.get("$patch").and_then(Value::as_str) == Some("delete");
                if deleted {
                    result.remove(key);
                } else {
                    result.insert(key.clone(), Value::Object(merged));
                }
            }
            Value::Array(items) => {
                let live = result.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
                let merged = merge_list(live, items, order, path)?;
                result.insert(key.clone(), Value::Array(merged));
            }
            scalar => {
                result.insert(key.clone(), scalar.clone());
            }
        }
        path.pop();
    }
    // An order may come without changes to the list itself.
    for (key, order) in patch {
        let Some(field) = key.strip_prefix(ORDER) else { continue };
        if patch.contains_key(field) {
            continue;
        }
        path.push(field);
        let rule = schema::list(path);
        path.pop();
        if let (Some(Value::Array(here)), Some(order)) = (result.get_mut(field), order.as_array()) {
            *here = ordered(std::mem::take(here), order, rule);
        }
    }
    Ok(result)
}

fn merge_list<'a>(
    live: &[Value],
    patch: &'a [Value],
    order: Option<&Vec<Value>>,
    path: &mut Path<'a>,
) -> Result<Vec<Value>, StrategicError> {
    let rule = schema::list(path);
    let merged = match rule {
        List::Atomic => return Ok(patch.iter().map(cleaned).collect()),
        List::Set => {
            let mut merged = live.to_vec();
            for item in patch {
                if !merged.contains(item) {
                    merged.push(item.clone());
                }
            }
            merged
        }
        List::Map { strategic, .. } => {
            let directive = |item: &Value| item.get("$patch").and_then(Value::as_str).map(str::to_owned);
            if patch.iter().any(|item| directive(item).as_deref() == Some("replace")) {
                return Ok(patch
                    .iter()
                    .filter(|item| directive(item).as_deref() != Some("replace"))
                    .map(cleaned)
                    .collect());
            }
            let mut merged = live.to_vec();
            for item in patch {
                let Some(fields) = item.as_object() else {
                    return Err(StrategicError(format!("items of {} must be objects", path.join("."))));
                };
                let Some(key) = item.get(strategic) else {
                    return Err(StrategicError(format!(
                        "map: {item} does not contain declared merge key: {strategic}"
                    )));
                };
                let place = merged.iter().position(|m| m.get(strategic) == Some(key));
                match (directive(item).as_deref(), place) {
                    (Some("delete"), _) => merged.retain(|m| m.get(strategic) != Some(key)),
                    (_, Some(place)) => {
                        let empty = Map::new();
                        let here = merged[place].as_object().unwrap_or(&empty);
                        merged[place] = Value::Object(merge_map(here, fields, path)?);
                    }
                    (_, None) => merged.push(Value::Object(merge_map(&Map::new(), fields, path)?)),
                }
            }
            merged
        }
    };
    Ok(match order {
        Some(order) => ordered(merged, order, rule),
        None => merged,
    })
}

/// `items` in the wanted order; those it does not name stay behind the item
/// they stood behind.
fn ordered(items: Vec<Value>, order: &[Value], rule: List) -> Vec<Value> {
    let same = |item: &Value, wanted: &Value| match rule {
        List::Map { strategic, .. } => item.get(strategic).is_some() && item.get(strategic) == wanted.get(strategic),
        _ => item == wanted,
    };
    let wanted = |item: &Value| order.iter().position(|w| same(item, w));
    let mut result: Vec<Value> = items.iter().filter(|i| wanted(i).is_some()).cloned().collect();
    result.sort_by_key(|item| wanted(item));
    let mut previous: Option<Value> = None;
    for item in items {
        if wanted(&item).is_none() {
            let after = previous.as_ref().and_then(|p| result.iter().position(|r| r == p));
            result.insert(after.map_or(0, |at| at + 1), item.clone());
        }
        previous = Some(item);
    }
    result
}

fn without_directives(map: &Map<String, Value>) -> Map<String, Value> {
    map.iter().filter(|(key, _)| !key.starts_with('$')).map(|(key, value)| (key.clone(), cleaned(value))).collect()
}

/// A value from a patch as content: no directives, no nulls.
fn cleaned(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            Value::Object(without_directives(map).into_iter().filter(|(_, value)| !value.is_null()).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(cleaned).collect()),
        other => other.clone(),
    }
}
