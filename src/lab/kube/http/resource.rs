//! Requests on objects.

use std::sync::Arc;

use axum::response::Response;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use super::negotiate::{self, Query, View};
use super::route::Target;
use super::{Server, json_response, stream};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::events;
use crate::lab::kube::kind::Kind;
use crate::lab::kube::object;
use crate::lab::kube::patch;
use crate::lab::kube::registry::{Ctx, DeleteOptions, Filter, Page, PatchKind, Sub, Written, scale_of};
use crate::lab::kube::selector::{Fields, Labels};
use crate::lab::kube::table;

pub async fn answer(
    server: &Arc<Server>,
    parts: &Parts,
    target: &Target,
    query: &Query,
    body: &[u8],
) -> Result<Response, ApiError> {
    let method = parts.method.as_str();
    let view = negotiate::view(&parts.headers)?;
    match (target.name.as_deref(), target.sub.as_deref()) {
        (None, _) => collection(server, parts, target, query, body, view).await,
        // `kubectl get NAME --watch` watches a collection of one; a watch on
        // the name itself is the old way to say the same.
        (Some(name), None) if method == "GET" && query.watch => {
            let filter = Filter {
                namespace: target.namespace.clone(),
                fields: Fields::parse(target.kind.kind, &format!("metadata.name={name}")).map_err(selector_error)?,
                labels: Labels::default(),
            };
            stream::watch(server, target.kind, filter, query, view)
        }
        (Some(name), None | Some("status" | "finalize")) => one(server, parts, target, name, query, body, view),
        (Some(name), Some("scale")) if target.kind.scale => scale(server, parts, target, name, query, body),
        (Some(name), Some("binding")) if target.kind.kind == "Pod" => {
            only(&parts.method, "POST")?;
            let binding = negotiate::body(&parts.headers, body)?;
            let node = object::text(&binding, "/target/name");
            let namespace = target.namespace.as_deref().unwrap_or("");
            server.registry.bind(&ctx(query, &parts.headers), namespace, name, node)?;
            Ok(json_response(StatusCode::CREATED, &success(target.kind, name, "")))
        }
        (Some(name), Some("eviction")) if target.kind.kind == "Pod" => {
            only(&parts.method, "POST")?;
            let eviction = negotiate::body(&parts.headers, body)?;
            let options = DeleteOptions::from_body(eviction.get("deleteOptions").unwrap_or(&Value::Null))?;
            let namespace = target.namespace.as_deref().unwrap_or("");
            server.registry.evict(&ctx(query, &parts.headers), namespace, name, &options)?;
            Ok(json_response(StatusCode::CREATED, &success(target.kind, name, "")))
        }
        (Some(_), Some("log" | "exec" | "attach" | "portforward")) if target.kind.kind == "Pod" => {
            let why = "the lab's API server has no way to a container: pods are network namespaces; see `ip netns`";
            Err(ApiError::new(501, "NotImplemented", why))
        }
        _ => Err(ApiError::no_resource()),
    }
}

fn only(method: &Method, wanted: &str) -> Result<(), ApiError> {
    if method.as_str() == wanted { Ok(()) } else { Err(ApiError::method_not_allowed()) }
}

fn selector_error(error: crate::lab::kube::selector::SelectorError) -> ApiError {
    ApiError::bad_request(error.to_string())
}

fn ctx(query: &Query, headers: &HeaderMap) -> Ctx {
    let agent = headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("");
    let agent = agent.split('/').next().unwrap_or("");
    let manager = if query.manager.is_empty() { agent } else { &query.manager };
    Ctx { manager: manager.to_owned(), dry_run: query.dry_run, validation: query.validation, now: Timestamp::now() }
}

async fn collection(
    server: &Arc<Server>,
    parts: &Parts,
    target: &Target,
    query: &Query,
    body: &[u8],
    view: View,
) -> Result<Response, ApiError> {
    let kind = target.kind;
    let registry = &server.registry;
    let filter = || -> Result<Filter, ApiError> {
        Ok(Filter {
            namespace: target.namespace.clone(),
            labels: Labels::parse(&query.labels).map_err(selector_error)?,
            fields: Fields::parse(kind.kind, &query.fields).map_err(selector_error)?,
        })
    };
    match parts.method.as_str() {
        "GET" | "HEAD" if query.watch => stream::watch(server, kind, filter()?, query, view),
        "GET" | "HEAD" => list(server, kind, &filter()?, query, view),
        "POST" => {
            let object = negotiate::body(&parts.headers, body)?;
            if kind.namespaced && target.namespace.is_none() {
                return Err(ApiError::method_not_allowed());
            }
            let namespace = target.namespace.as_deref().unwrap_or("");
            let written = registry.create(&ctx(query, &parts.headers), kind, namespace, object)?;
            Ok(reply(kind, view, query, &written, StatusCode::CREATED))
        }
        "DELETE" => {
            let options = delete_options(query, &parts.headers, body)?;
            let gone = registry.delete_collection(&ctx(query, &parts.headers), kind, &filter()?, &options)?;
            let items: Vec<_> = gone.iter().map(|o| events::outward(kind, o)).collect();
            let meta = json!({"resourceVersion": registry.revision().to_string()});
            Ok(json_response(StatusCode::OK, &List::new(kind, meta, items)))
        }
        _ => Err(ApiError::method_not_allowed()),
    }
}

/// A list, without copying its items.
#[derive(Serialize)]
struct List<T: Serialize> {
    kind: String,
    #[serde(rename = "apiVersion")]
    api_version: String,
    metadata: Value,
    items: Vec<T>,
}

impl<T: Serialize> List<T> {
    fn new(kind: &Kind, metadata: Value, items: Vec<T>) -> Self {
        Self { kind: format!("{}List", kind.kind), api_version: kind.api_version(), metadata, items }
    }
}

fn list(server: &Server, kind: &Kind, filter: &Filter, query: &Query, view: View) -> Result<Response, ApiError> {
    let exact = match query.revision_match.as_str() {
        "" | "NotOlderThan" => false,
        "Exact" => true,
        other => return Err(ApiError::bad_request(format!("resourceVersionMatch \"{other}\" is not supported"))),
    };
    if !query.revision_match.is_empty() && query.revision.is_none() {
        return Err(ApiError::bad_request("resourceVersionMatch is forbidden unless resourceVersion is provided"));
    }
    if exact && query.revision()?.is_none() {
        return Err(ApiError::bad_request("resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\""));
    }
    if !query.token.is_empty() && query.revision()?.is_some() {
        return Err(ApiError::bad_request("specifying resource version is not allowed when using continue"));
    }
    let page = Page { limit: query.limit, token: query.token.clone(), revision: query.revision()?, exact };
    let listing = server.registry.list(kind, filter, &page)?;
    let mut meta = json!({"resourceVersion": listing.revision.to_string()});
    if let Some(token) = &listing.token {
        meta["continue"] = token.as_str().into();
        // The real server does not know how many more match a selector.
        if filter.labels.is_empty() && filter.fields.is_empty() {
            meta["remainingItemCount"] = listing.remaining.into();
        }
    }
    Ok(match view {
        View::Plain => {
            let items: Vec<_> = listing.items.iter().map(|o| events::outward(kind, o)).collect();
            json_response(StatusCode::OK, &List::new(kind, meta, items))
        }
        View::Table => {
            let items: Vec<&Value> = listing.items.iter().map(|o| &**o).collect();
            json_response(StatusCode::OK, &table::table(kind, &items, meta, query.include, Timestamp::now()))
        }
        View::Partial => {
            let items: Vec<Value> = listing.items.iter().map(|o| table::partial(o)).collect();
            let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                              "metadata": meta, "items": items});
            json_response(StatusCode::OK, &list)
        }
    })
}

fn one(
    server: &Server,
    parts: &Parts,
    target: &Target,
    name: &str,
    query: &Query,
    body: &[u8],
    view: View,
) -> Result<Response, ApiError> {
    let (kind, registry) = (target.kind, &server.registry);
    if kind.namespaced && target.namespace.is_none() {
        return Err(ApiError::no_resource());
    }
    let namespace = target.namespace.as_deref().unwrap_or("");
    let sub = match target.sub.as_deref() {
        None => Sub::Main,
        Some("status") if kind.status => Sub::Status,
        Some("finalize") if kind.kind == "Namespace" => Sub::Finalize,
        Some(_) => return Err(ApiError::no_resource()),
    };
    let ctx = ctx(query, &parts.headers);
    match parts.method.as_str() {
        "GET" | "HEAD" => {
            let object = registry.get(kind, namespace, name)?;
            Ok(shown(kind, view, query, &object, StatusCode::OK))
        }
        "PUT" => {
            let object = negotiate::body(&parts.headers, body)?;
            let written = registry.update(&ctx, kind, namespace, name, sub, object)?;
            Ok(reply(kind, view, query, &written, StatusCode::OK))
        }
        "PATCH" => {
            let (how, patch) = negotiate::patch(&parts.headers, query.force, body)?;
            let ctx = match how {
                // An apply without a manager is refused, not attributed.
                PatchKind::Apply(_) => Ctx { manager: query.manager.clone(), ..ctx },
                _ => ctx,
            };
            let written = registry.patch(&ctx, kind, (namespace, name), sub, how, &patch)?;
            let code = if written.created { StatusCode::CREATED } else { StatusCode::OK };
            Ok(reply(kind, view, query, &written, code))
        }
        "DELETE" if sub == Sub::Main => {
            let options = delete_options(query, &parts.headers, body)?;
            let deleted = registry.delete(&ctx, kind, namespace, name, &options)?;
            if deleted.gone && kind.kind != "Pod" {
                let status = success(kind, name, object::uid(&deleted.object));
                return Ok(json_response(StatusCode::OK, &status));
            }
            Ok(shown(kind, view, query, &deleted.object, StatusCode::OK))
        }
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn scale(
    server: &Server,
    parts: &Parts,
    target: &Target,
    name: &str,
    query: &Query,
    body: &[u8],
) -> Result<Response, ApiError> {
    let (kind, registry) = (target.kind, &server.registry);
    let namespace = target.namespace.as_deref().unwrap_or("");
    let ctx = ctx(query, &parts.headers);
    let scale = match parts.method.as_str() {
        "GET" | "HEAD" => scale_of(&*registry.get(kind, namespace, name)?),
        "PUT" => {
            let wanted = negotiate::body(&parts.headers, body)?;
            registry.scale(&ctx, kind, namespace, name, |_| Ok(wanted))?
        }
        "PATCH" => {
            let (how, change) = negotiate::patch(&parts.headers, query.force, body)?;
            registry.scale(&ctx, kind, namespace, name, |mut scale| match how {
                PatchKind::Json => {
                    patch::json::apply(&scale, &change).map_err(|e| ApiError::new(422, "Invalid", e.to_string()))
                }
                _ => {
                    patch::merge(&mut scale, &change);
                    Ok(scale)
                }
            })?
        }
        _ => return Err(ApiError::method_not_allowed()),
    };
    Ok(json_response(StatusCode::OK, &scale))
}

fn delete_options(query: &Query, headers: &HeaderMap, body: &[u8]) -> Result<DeleteOptions, ApiError> {
    let mut options = DeleteOptions::from_body(&negotiate::body(headers, body)?)?;
    options.grace = query.grace.or(options.grace);
    options.propagation = query.propagation.clone().or(options.propagation);
    if options.grace.is_some_and(|seconds| seconds < 0) {
        // As the real server: negative means at once, but not by force.
        options.grace = Some(1);
    }
    Ok(options)
}

fn success(kind: &Kind, name: &str, uid: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
           "details": {"name": name, "group": kind.group, "kind": kind.plural, "uid": uid}})
}

fn shown(kind: &Kind, view: View, query: &Query, object: &Value, code: StatusCode) -> Response {
    match view {
        View::Plain => json_response(code, &events::outward(kind, object)),
        View::Table => {
            let meta = json!({"resourceVersion": object::text(object, "/metadata/resourceVersion")});
            json_response(code, &table::table(kind, &[object], meta, query.include, Timestamp::now()))
        }
        View::Partial => json_response(code, &table::partial(object)),
    }
}

fn reply(kind: &Kind, view: View, query: &Query, written: &Written, code: StatusCode) -> Response {
    let mut response = shown(kind, view, query, &written.object, code);
    for warning in &written.warnings {
        let text = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{text}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}
