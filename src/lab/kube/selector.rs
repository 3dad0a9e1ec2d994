//! Label and field selectors: parsed once, matched often. Pure.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::object;

/// A selector string or object that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(String);

fn wrong(message: impl Into<String>) -> SelectorError {
    SelectorError(message.into())
}

/// A conjunction of requirements on labels. Empty matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    In(BTreeSet<String>),
    /// Also true when the label is absent.
    NotIn(BTreeSet<String>),
    Exists,
    Absent,
    Above(i64),
    Below(i64),
}

impl Requirement {
    fn matches(&self, labels: Option<&Map<String, Value>>) -> bool {
        let value = labels.and_then(|l| l.get(&self.key)).and_then(Value::as_str);
        let number = || value.and_then(|v| v.parse::<i64>().ok());
        match &self.test {
            Test::In(set) => value.is_some_and(|v| set.contains(v)),
            Test::NotIn(set) => value.is_none_or(|v| !set.contains(v)),
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
            Test::Above(limit) => number().is_some_and(|n| n > *limit),
            Test::Below(limit) => number().is_some_and(|n| n < *limit),
        }
    }
}

impl Labels {
    pub fn matches(&self, labels: Option<&Map<String, Value>>) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn requirements(&self) -> &[Requirement] {
        &self.0
    }

    /// The query parameter: `a=b,c!=d,e in (x,y),f notin (z),g,!h,i>1`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text)? {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    continue;
                }
                return Err(wrong(format!("unable to parse requirement: found '' in \"{text}\"")));
            }
            requirements.push(parse_requirement(part)?);
        }
        Ok(Self(requirements))
    }

    /// A map of exact values, as in a Service.
    pub fn exact(map: &Map<String, Value>) -> Self {
        let requirement = |(key, value): (&String, &Value)| Requirement {
            key: key.clone(),
            test: Test::In([value.as_str().unwrap_or("").to_owned()].into()),
        };
        Self(map.iter().map(requirement).collect())
    }

    /// A `LabelSelector` object: matchLabels and matchExpressions.
    pub fn from_object(selector: &Value) -> Result<Self, SelectorError> {
        let mut all = object::map(selector, "/matchLabels").map(Self::exact).unwrap_or_default();
        for expression in object::list(selector, "/matchExpressions") {
            all.0.push(Self::expression(expression)?);
        }
        Ok(all)
    }

    /// One expression of a label selector or of a node selector term.
    pub fn expression(expression: &Value) -> Result<Requirement, SelectorError> {
        let key = object::text(expression, "/key");
        check_key(key)?;
        let values: BTreeSet<String> =
            object::list(expression, "/values").iter().map(|v| v.as_str().unwrap_or("").to_owned()).collect();
        let number = || {
            let one = if values.len() == 1 { values.first() } else { None };
            one.and_then(|v| v.parse().ok())
                .ok_or_else(|| wrong(format!("for Gt and Lt, \"{key}\" needs exactly one integer")))
        };
        let some = |values: BTreeSet<String>| {
            if values.is_empty() {
                Err(wrong(format!("for In and NotIn, values of \"{key}\" must not be empty")))
            } else {
                Ok(values)
            }
        };
        let test = match object::text(expression, "/operator") {
            "In" => Test::In(some(values)?),
            "NotIn" => Test::NotIn(some(values)?),
            "Exists" => Test::Exists,
            "DoesNotExist" => Test::Absent,
            "Gt" => Test::Above(number()?),
            "Lt" => Test::Below(number()?),
            other => return Err(wrong(format!("\"{other}\" is not a valid label selector operator"))),
        };
        Ok(Requirement { key: key.to_owned(), test })
    }
}

fn split_outside_parentheses(text: &str) -> Result<Vec<&str>, SelectorError> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_i32, 0);
    for (index, letter) in text.char_indices() {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
        if !(0..=1).contains(&depth) {
            return Err(wrong(format!("unable to parse requirement: unbalanced parentheses in \"{text}\"")));
        }
    }
    if depth != 0 {
        return Err(wrong(format!("unable to parse requirement: missing ')' in \"{text}\"")));
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn parse_requirement(part: &str) -> Result<Requirement, SelectorError> {
    let (key, test) = if let Some(key) = part.strip_prefix('!') {
        (key.trim(), Test::Absent)
    } else if let Some((head, list)) = part.split_once('(') {
        let Some(list) = list.trim_end().strip_suffix(')') else {
            return Err(wrong(format!("unable to parse requirement: \"{part}\"")));
        };
        let values: BTreeSet<String> = list.split(',').map(|v| v.trim().to_owned()).collect();
        for value in &values {
            check_value(value)?;
        }
        match head.split_whitespace().collect::<Vec<_>>()[..] {
            [key, "in"] => (key, Test::In(values)),
            [key, "notin"] => (key, Test::NotIn(values)),
            _ => return Err(wrong(format!("unable to parse requirement: expected 'in' or 'notin' in \"{part}\""))),
        }
    } else if let Some((key, value)) = part.split_once("!=") {
        (key.trim(), Test::NotIn([checked(value)?].into()))
    } else if let Some((key, value)) = part.split_once("==") {
        (key.trim(), Test::In([checked(value)?].into()))
    } else if let Some((key, value)) = part.split_once('=') {
        (key.trim(), Test::In([checked(value)?].into()))
    } else if let Some((key, value)) = part.split_once('>') {
        (key.trim(), Test::Above(integer(value)?))
    } else if let Some((key, value)) = part.split_once('<') {
        (key.trim(), Test::Below(integer(value)?))
    } else {
        (part, Test::Exists)
    };
    check_key(key)?;
    Ok(Requirement { key: key.to_owned(), test })
}

fn checked(value: &str) -> Result<String, SelectorError> {
    check_value(value.trim())?;
    Ok(value.trim().to_owned())
}

fn integer(value: &str) -> Result<i64, SelectorError> {
    value.trim().parse().map_err(|_| wrong(format!("for 'Gt', 'Lt' operators, \"{value}\" must be an integer")))
}

fn check_key(key: &str) -> Result<(), SelectorError> {
    if valid_key(key) { Ok(()) } else { Err(wrong(format!("invalid label key \"{key}\""))) }
}

fn check_value(value: &str) -> Result<(), SelectorError> {
    if valid_value(value) { Ok(()) } else { Err(wrong(format!("invalid label value \"{value}\""))) }
}

/// A qualified name: optional DNS prefix, then 1 to 63 letters, digits, `-_.`.
pub fn valid_key(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    !name.is_empty() && valid_value(name) && prefix.is_none_or(super::validate::is_subdomain)
}

/// Empty, or 1 to 63 letters, digits, `-_.` that begin and end alphanumeric.
pub fn valid_value(value: &str) -> bool {
    let end = |c: Option<&u8>| c.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    value.len() <= 63
        && bytes.iter().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(c))
        && end(bytes.first())
        && end(bytes.last())
}

/// A conjunction of exact tests on fields. Empty matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields(Vec<(String, bool, String)>);

/// What may be selected besides `metadata.name` and `metadata.namespace`.
fn selectable(kind: &str) -> &'static [&'static str] {
    match kind {
        "Pod" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "Event" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "reason",
            "reportingComponent",
            "reportingController",
            "source",
            "type",
        ],
        "Node" => &["spec.unschedulable"],
        "Namespace" => &["status.phase"],
        "Secret" => &["type"],
        "Service" => &["spec.clusterIP", "spec.type"],
        "ReplicaSet" => &["status.replicas"],
        _ => &[],
    }
}

impl Fields {
    pub fn parse(kind: &str, text: &str) -> Result<Self, SelectorError> {
        let mut tests = Vec::new();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let (field, equal, value) = if let Some((field, value)) = part.split_once("!=") {
                (field, false, value)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, true, value)
            } else {
                return Err(wrong(format!("invalid selector: '{text}'; can't understand '{part}'")));
            };
            let known = ["metadata.name", "metadata.namespace"].contains(&field) || selectable(kind).contains(&field);
            if !known {
                return Err(wrong(format!("field label not supported: {field}")));
            }
            let stored = match field {
                "reportingController" => "reportingComponent".to_owned(),
                "source" => "source.component".to_owned(),
                other => other.replace("regarding.", "involvedObject."),
            };
            tests.push((stored, equal, value.to_owned()));
        }
        Ok(Self(tests))
    }

    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(field, equal, value)| {
            let found = field.split('.').try_fold(object, |here, key| here.get(key));
            let same = match found {
                None | Some(Value::Null) => value.is_empty() || value == "false",
                Some(Value::String(text)) => text == value,
                Some(other) => {
                    let text = other.to_string();
                    text == *value
                }
            };
            same == *equal
        })
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The one name asked for, when that is all that can match.
    pub fn name(&self) -> Option<&str> {
        self.0.iter().find(|(field, equal, _)| field == "metadata.name" && *equal).map(|(_, _, value)| value.as_str())
    }
}
