//! RFC 6902: a list of operations, all or none.

use serde_json::Value;

/// Operations in one patch, as the real server bounds them.
const MOST: usize = 10_000;

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
    for operation in operations {
        step(&mut result, operation)?;
    }
    Ok(result)
}

fn step(target: &mut Value, operation: &Value) -> Result<(), JsonPatchError> {
    let word = |key: &str| operation.get(key).and_then(Value::as_str);
    let need = |key: &str| word(key).ok_or_else(|| wrong(format!("operation lacks \"{key}\"")));
    let value = || operation.get("value").cloned().ok_or_else(|| wrong("operation lacks \"value\""));
    let path = need("path")?;
    match need("op")? {
        "add" => add(target, path, value()?),
        "remove" => remove(target, path).map(drop),
        "replace" => {
            let slot = target.pointer_mut(path).ok_or_else(|| missing(path))?;
            *slot = value()?;
            Ok(())
        }
        "copy" => {
            let from = need("from")?;
            let copied = target.pointer(from).cloned().ok_or_else(|| missing(from))?;
            add(target, path, copied)
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
