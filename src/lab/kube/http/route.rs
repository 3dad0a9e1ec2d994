//! What a path means. Pure.

use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{self, Kind};

/// Objects of one kind: all, those of a namespace, or one, or a part of one.
pub struct Target {
    pub kind: &'static Kind,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub sub: Option<String>,
}

pub enum Route {
    Resource(Target),
    Root,
    Core,
    Groups,
    Group(String),
    Resources(String, String),
    Version,
    Healthy,
    OpenApiIndex,
    OpenApi(String, String),
    OpenApiV2,
    Lab(String),
}

pub fn parse(path: &str) -> Result<Route, ApiError> {
    let words: Vec<String> = path
        .split('/')
        .filter(|w| !w.is_empty())
        .map(decoded)
        .collect::<Option<_>>()
        .ok_or_else(|| ApiError::bad_request("the path is not valid UTF-8 after percent-decoding"))?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let route = match words[..] {
        [] => Route::Root,
        ["api"] => Route::Core,
        ["apis"] => Route::Groups,
        ["version"] => Route::Version,
        ["healthz" | "readyz" | "livez", ..] => Route::Healthy,
        ["openapi", "v2"] => Route::OpenApiV2,
        ["openapi", "v3"] => Route::OpenApiIndex,
        ["openapi", "v3", "api", version] => Route::OpenApi(String::new(), version.into()),
        ["openapi", "v3", "apis", group, version] => Route::OpenApi(group.into(), version.into()),
        ["api", version] => Route::Resources(String::new(), version.into()),
        ["apis", group] => Route::Group(group.into()),
        ["apis", group, version] => Route::Resources(group.into(), version.into()),
        ["api", version, ref rest @ ..] => Route::Resource(target("", version, rest)?),
        ["apis", group, version, ref rest @ ..] => Route::Resource(target(group, version, rest)?),
        ["lab", action] => Route::Lab(action.into()),
        _ => return Err(ApiError::no_resource()),
    };
    Ok(route)
}

fn target(group: &str, version: &str, rest: &[&str]) -> Result<Target, ApiError> {
    let (namespace, rest) = match rest {
        // A namespace's own parts, not resources in it.
        ["namespaces", _, "status" | "finalize"] | ["namespaces"] | ["namespaces", _] => (None, rest),
        ["namespaces", namespace, inner @ ..] => (Some((*namespace).to_owned()), inner),
        _ => (None, rest),
    };
    let (plural, name, sub) = match *rest {
        [plural] => (plural, None, None),
        [plural, name] => (plural, Some(name), None),
        [plural, name, sub] => (plural, Some(name), Some(sub)),
        _ => return Err(ApiError::no_resource()),
    };
    let kind = kind::by_path(group, version, plural).ok_or_else(ApiError::no_resource)?;
    if namespace.is_some() != kind.namespaced && (namespace.is_some() || name.is_some()) {
        return Err(ApiError::no_resource());
    }
    Ok(Target { kind, namespace, name: name.map(str::to_owned), sub: sub.map(str::to_owned) })
}

fn decoded(word: &str) -> Option<String> {
    if !word.contains('%') {
        return Some(word.to_owned());
    }
    let bytes = word.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'%' {
            let hex = std::str::from_utf8(bytes.get(at + 1..at + 3)?).ok()?;
            out.push(u8::from_str_radix(hex, 16).ok()?);
            at += 3;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8(out).ok()
}
