//! Queries, bodies in, formats out. Pure.

use http::{HeaderMap, header};
use serde_json::Value;

use crate::lab::kube::error::ApiError;
use crate::lab::kube::protobuf::{self, ProtobufError};
use crate::lab::kube::registry::{PatchKind, Validation};
use crate::lab::kube::table::Include;
use crate::lab::manifest;

/// How objects go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Plain,
    Table,
    Partial,
}

/// The parameters this server knows; others are ignored, as is usual.
#[derive(Clone, Debug, Default)]
pub struct Query {
    pub watch: bool,
    pub labels: String,
    pub fields: String,
    pub limit: usize,
    pub token: String,
    pub revision: Option<String>,
    pub revision_match: String,
    pub timeout: Option<u64>,
    pub bookmarks: bool,
    pub initial: Option<bool>,
    pub manager: String,
    pub validation: Validation,
    pub dry_run: bool,
    pub force: bool,
    pub grace: Option<i64>,
    pub propagation: Option<String>,
    pub include: Include,
}

impl Query {
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let mut query = Self::default();
        let uri: http::Uri = format!("/?{text}").parse().map_err(|_| ApiError::bad_request("malformed query"))?;
        let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&uri)
            .map_err(|e| ApiError::bad_request(format!("malformed query: {e}")))?;
        for (key, value) in pairs.0 {
            let number = |what: &str| {
                value
                    .parse::<u64>()
                    .map_err(|_| ApiError::bad_request(format!("{what}: \"{value}\" is not a number from 0 on")))
            };
            let truth = || match value.as_str() {
                "" | "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                other => Err(ApiError::bad_request(format!("{key}: \"{other}\" is not true or false"))),
            };
            match key.as_str() {
                "watch" => query.watch = truth()?,
                "labelSelector" => query.labels = value,
                "fieldSelector" => query.fields = value,
                "limit" => query.limit = number("limit")? as usize,
                "continue" => query.token = value,
                "resourceVersion" if !value.is_empty() => query.revision = Some(value),
                "resourceVersionMatch" => query.revision_match = value,
                "timeoutSeconds" => query.timeout = Some(number("timeoutSeconds")?),
                "allowWatchBookmarks" => query.bookmarks = truth()?,
                "sendInitialEvents" => query.initial = Some(truth()?),
                "fieldManager" => query.manager = checked_manager(value)?,
                "fieldValidation" => {
                    query.validation = match value.as_str() {
                        "" | "Warn" => Validation::Warn,
                        "Ignore" => Validation::Ignore,
                        "Strict" => Validation::Strict,
                        other => {
                            return Err(ApiError::bad_request(format!(
                                "fieldValidation: \"{other}\" is none of Ignore, Warn, Strict"
                            )));
                        }
                    }
                }
                "dryRun" => match value.as_str() {
                    "" => {}
                    "All" => query.dry_run = true,
                    other => return Err(ApiError::bad_request(format!("dryRun: \"{other}\" is not All"))),
                },
                "force" => query.force = truth()?,
                "gracePeriodSeconds" => query.grace = Some(number("gracePeriodSeconds")? as i64),
                "propagationPolicy" => query.propagation = Some(value),
                "includeObject" => {
                    query.include = match value.as_str() {
                        "Object" => Include::Object,
                        "None" => Include::Nothing,
                        _ => Include::Metadata,
                    }
                }
                _ => {}
            }
        }
        Ok(query)
    }

    /// The revision as a number; "0" means any and is none.
    pub fn revision(&self) -> Result<Option<u64>, ApiError> {
        match self.revision.as_deref() {
            None | Some("0") => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|_| ApiError::bad_request(format!("Invalid value: \"{text}\": invalid resourceVersion"))),
        }
    }
}

fn checked_manager(value: String) -> Result<String, ApiError> {
    if value.len() > 128 || value.chars().any(|c| c.is_control()) {
        return Err(ApiError::bad_request("fieldManager: at most 128 printable characters"));
    }
    Ok(value)
}

/// The first format in the Accept header that this server can write.
pub fn view(headers: &HeaderMap) -> Result<View, ApiError> {
    let Some(accept) = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).filter(|a| !a.trim().is_empty())
    else {
        return Ok(View::Plain);
    };
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or("");
        // JSON is YAML, so a client that wants YAML is served too.
        if !matches!(media, "application/json" | "application/yaml" | "application/*" | "*/*") {
            continue;
        }
        let parameters: Vec<&str> = parts.collect();
        let shape = parameters.iter().find_map(|p| p.strip_prefix("as="));
        match shape {
            None => return Ok(View::Plain),
            Some("Table") if parameters.contains(&"v=v1") => return Ok(View::Table),
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") if parameters.contains(&"v=v1") => {
                return Ok(View::Partial);
            }
            Some(_) => {}
        }
    }
    Err(ApiError::not_acceptable())
}

fn media(headers: &HeaderMap) -> String {
    let text = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("application/json");
    text.split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

fn json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|e| ApiError::bad_request(format!("the body is not JSON: {e}")))
}

fn yaml(body: &[u8]) -> Result<Value, ApiError> {
    manifest::one(body).map_err(|e| ApiError::bad_request(e.to_string()))
}

/// An object in the body; null when there is none.
pub fn body(headers: &HeaderMap, body: &[u8]) -> Result<Value, ApiError> {
    let media = media(headers);
    match media.as_str() {
        _ if body.is_empty() => Ok(Value::Null),
        "application/json" | "" => json(body),
        "application/yaml" | "application/x-yaml" | "text/yaml" => yaml(body),
        "application/vnd.kubernetes.protobuf" => protobuf::decode(body).map_err(|error| match error {
            ProtobufError::Malformed(_) => ApiError::bad_request(error.to_string()),
            _ => ApiError::new(415, "UnsupportedMediaType", error.to_string()),
        }),
        other => Err(ApiError::unsupported_body(other)),
    }
}

/// A patch in the body.
pub fn patch(headers: &HeaderMap, force: bool, body: &[u8]) -> Result<(PatchKind, Value), ApiError> {
    match media(headers).as_str() {
        "application/json-patch+json" => Ok((PatchKind::Json, json(body)?)),
        "application/merge-patch+json" => Ok((PatchKind::Merge, json(body)?)),
        "application/strategic-merge-patch+json" => Ok((PatchKind::Strategic, json(body)?)),
        // What begins as JSON is read as JSON: kube-rs sends that.
        "application/apply-patch+yaml" => match serde_json::from_slice(body) {
            Ok(value) => Ok((PatchKind::Apply(force), value)),
            Err(_) => Ok((PatchKind::Apply(force), yaml(body)?)),
        },
        other => Err(ApiError::new(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format ({other}) - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, \
                 application/apply-patch+yaml"
            ),
        )),
    }
}
