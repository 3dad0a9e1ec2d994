//! RFC 6902: a list of operations, all or none.

use serde_json::Value;

/// Operations in one patch, as the real server bounds them.
const MOST: usize = 10_000;
/// What `copy` may add to an object in all, in values: thirty of them could make
/// a billion from one.
const MOST_COPIED: usize = 200_000;
/// Levels an object may come to: everything that reads one calls itself for each.
/// JSON that comes in has 128 at most.
const DEEPEST: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct JsonPatchError(String);

fn wrong(message: impl Into<String>) -> JsonPatchError {
    JsonPatchError(message.into())
}

/// Apply every operation of `patch`, or report the first that fails.
pub fn apply(target: &Value, patch: &Value) -> Result<Value, JsonPatchError> {
    let Some(operations) = patch.as_array() else {
        return Err(wrong("a JSON patch must be a list of operations"));
    };
    if operations.len() > MOST {
        return Err(wrong(format!("a JSON patch may have {MOST} operations at most")));
    }
    let mut result = target.clone();
    let mut copied = 0;
    for operation in operations {
        step(&mut result, operation, &mut copied)?;
    }
    Ok(result)
}

fn step(target: &mut Value, operation: &Value, copied: &mut usize) -> Result<(), JsonPatchError> {
    let word = |key: &str| operation.get(key).and_then(Value::as_str);
    let need = |key: &str| word(key).ok_or_else(|| wrong(format!("operation lacks \"{key}\"")));
    let value = || operation.get("value").cloned().ok_or_else(|| wrong("operation lacks \"value\""));
    let path = need("path")?;
    match need("op")? {
        "add" => add(target, path, value()?),
        "remove" => remove(target, path).map(drop),
        "replace" => {
            let value = value()?;
            not_too_deep(path, &value)?;
            let slot = target.pointer_mut(path).ok_or_else(|| missing(path))?;
            *slot = value;
            Ok(())
        }
        "copy" => {
            let from = need("from")?;
            let original = target.pointer(from).ok_or_else(|| missing(from))?;
            *copied = copied.saturating_add(size(original));
            if *copied > MOST_COPIED {
                return Err(wrong(format!("the patch copies more than {MOST_COPIED} values")));
            }
            let copy = original.clone();
            add(target, path, copy)
        }
        "move" => {
            let from = need("from")?;
            if path.strip_prefix(from).is_some_and(|rest| rest.starts_with('/')) {
                return Err(wrong(format!("cannot move {from} into itself")));
            }
            let moved = remove(target, from)?;
            add(target, path, moved)
        }
        "test" => {
            let wanted = value()?;
            let found = target.pointer(path).unwrap_or(&Value::Null);
            if *found == wanted { Ok(()) } else { Err(wrong(format!("testing path {path} failed"))) }
        }
        other => Err(wrong(format!("unknown operation \"{other}\""))),
    }
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum(),
        // A long text weighs as much as many numbers.
        Value::String(text) => text.len() / 32,
        _ => 0,
    }
}

fn depth(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn not_too_deep(path: &str, value: &Value) -> Result<(), JsonPatchError> {
    if path.matches('/').count() + depth(value) > DEEPEST {
        return Err(wrong(format!("the object would have more than {DEEPEST} levels")));
    }
    Ok(())
}

fn missing(path: &str) -> JsonPatchError {
    wrong(format!("path {path} does not exist"))
}

/// The parent's pointer and the last, unescaped, word.
fn split(path: &str) -> Result<(&str, String), JsonPatchError> {
    let (parent, last) = path.rsplit_once('/').ok_or_else(|| wrong(format!("\"{path}\" is not a JSON pointer")))?;
    Ok((parent, last.replace("~1", "/").replace("~0", "~")))
}

fn index(word: &str, length: usize) -> Result<usize, JsonPatchError> {
    let plain = word == "0" || (!word.starts_with('0') && word.bytes().all(|b| b.is_ascii_digit()));
    match word.parse::<usize>() {
        Ok(index) if plain && index < length => Ok(index),
        _ => Err(wrong(format!("index \"{word}\" is out of bounds"))),
    }
}

fn add(target: &mut Value, path: &str, value: Value) -> Result<(), JsonPatchError> {
    not_too_deep(path, &value)?;
    if path.is_empty() {
        *target = value;
        return Ok(());
    }
    let (parent, last) = split(path)?;
    match target.pointer_mut(parent) {
        Some(Value::Object(map)) => {
            map.insert(last, value);
        }
        Some(Value::Array(list)) if last == "-" => list.push(value),
        Some(Value::Array(list)) => {
            let at = index(&last, list.len() + 1)?;
            list.insert(at, value);
        }
        _ => return Err(missing(path)),
    }
    Ok(())
}

fn remove(target: &mut Value, path: &str) -> Result<Value, JsonPatchError> {
    if path.is_empty() {
        return Err(wrong("cannot remove the whole object"));
    }
    let (parent, last) = split(path)?;
    match target.pointer_mut(parent) {
        Some(Value::Object(map)) => map.remove(&last).ok_or_else(|| missing(path)),
        Some(Value::Array(list)) => {
            let at = index(&last, list.len())?;
            Ok(list.remove(at))
        }
        _ => Err(missing(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn copies_do_not_grow_without_end() {
        // Two places that each take a copy of all there is: it grows as Fibonacci's numbers do.
        let places = ["/a", "/b"].map(|path| json!({"op": "copy", "from": "", "path": path}));
        let patch: Vec<Value> = places.iter().cycle().take(40).cloned().collect();
        let refused = apply(&json!({"a": 1, "b": 1}), &Value::Array(patch)).unwrap_err();
        assert!(refused.to_string().contains("copies more than"), "{refused}");
    }

    #[test]
    fn an_object_does_not_grow_deeper_than_one_can_walk() {
        // Each puts all that is there one level down.
        let down = [
            json!({"op": "add", "path": "/b", "value": {}}),
            json!({"op": "move", "from": "/a", "path": "/b/a"}),
            json!({"op": "move", "from": "/b", "path": "/a"}),
        ];
        let patch: Vec<Value> = down.iter().cycle().take(3 * 1000).cloned().collect();
        let refused = apply(&json!({"a": 1}), &Value::Array(patch)).unwrap_err();
        assert!(refused.to_string().contains("levels"), "{refused}");
    }
}
