//! The registry over HTTP: paths, bodies, formats. Thin: no rule of the API
//! lives here.
//!
//! `route` says what a path means, `negotiate` what the client sends and wants
//! back, `resource` answers requests on objects, `stream` is watches.

pub(crate) mod negotiate;
mod resource;
pub(crate) mod route;
mod stream;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use http::{HeaderMap, Method, StatusCode, header};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::discovery;
use super::error::ApiError;
use super::kind::KINDS;
use super::openapi;
use super::registry::Registry;
use negotiate::Query;
use route::Route;

/// As the real server: what is larger is no object.
pub const BODY_LIMIT: usize = 3 * 1024 * 1024;
/// A body must arrive within this time.
const BODY_TIME: Duration = Duration::from_secs(30);

/// What every request sees.
pub struct Server {
    pub registry: Arc<Registry>,
    pub bookmark_every: Duration,
    /// True once the server ends.
    pub stop: watch::Receiver<bool>,
    pub counters: Counters,
}

/// What was asked of the server, for reports and tests.
#[derive(Default)]
pub struct Counters {
    requests: Mutex<BTreeMap<String, u64>>,
    pub watches: AtomicUsize,
    /// Every request is refused: the API server is away.
    pub away: AtomicBool,
}

impl Counters {
    /// Requests by `client verb resource`.
    pub fn requests(&self) -> BTreeMap<String, u64> {
        self.requests.lock().clone()
    }

    fn count(&self, headers: &HeaderMap, verb: &str, resource: &str) {
        let agent = headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("");
        let agent = agent.split(['/', ' ']).next().unwrap_or("");
        let key = format!("{agent} {verb} {resource}");
        let mut requests = self.requests.lock();
        // A client that makes up names must not fill the memory.
        if requests.len() < 4096 || requests.contains_key(&key) {
            *requests.entry(key).or_default() += 1;
        }
    }
}

pub fn router(server: Arc<Server>) -> Router {
    Router::new().fallback(handle).with_state(server)
}

async fn handle(State(server): State<Arc<Server>>, request: Request) -> Response {
    match answer(&server, request).await {
        Ok(response) => response,
        Err(error) => {
            let code = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let mut response = json_response(code, &error.status());
            if matches!(error.code, 429 | 503 | 504) {
                response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
            }
            response
        }
    }
}

async fn answer(server: &Arc<Server>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    if server.counters.away.load(Ordering::Relaxed) && !path.starts_with("/lab/") {
        return Err(ApiError::unavailable("the API server is away, as asked through /lab/away"));
    }
    let read = parts.method == Method::GET || parts.method == Method::HEAD;
    match route::parse(path)? {
        Route::Resource(target) => {
            let query = Query::parse(parts.uri.query().unwrap_or(""))?;
            let verb = if query.watch { "watch" } else { verb(&parts.method, target.name.is_some()) };
            let resource = match &target.sub {
                Some(sub) => format!("{}/{sub}", target.kind.resource()),
                None => target.kind.resource(),
            };
            server.counters.count(&parts.headers, verb, &resource);
            let body = read_body(body).await?;
            resource::answer(server, &parts, &target, &query, &body).await
        }
        Route::Lab(action) => lab(server, &parts.method, &action, parts.uri.query().unwrap_or("")),
        _ if !read => Err(ApiError::method_not_allowed()),
        route => {
            server.counters.count(&parts.headers, "get", path.split('/').nth(1).unwrap_or(""));
            document(&route, &parts.headers)
        }
    }
}

fn verb(method: &Method, named: bool) -> &'static str {
    match (method.as_str(), named) {
        ("GET" | "HEAD", true) => "get",
        ("GET" | "HEAD", false) => "list",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", true) => "delete",
        ("DELETE", false) => "deletecollection",
        _ => "other",
    }
}

async fn read_body(body: Body) -> Result<axum::body::Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIME, axum::body::to_bytes(body, BODY_LIMIT)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_limit(&error) => Err(ApiError::body_too_large(BODY_LIMIT)),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the body could not be read: {error}"))),
        Err(_) => Err(ApiError::new(408, "Timeout", "the body did not arrive in time")),
    }
}

fn is_limit(error: &axum::Error) -> bool {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = source {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// The documents that describe the server.
fn document(route: &Route, headers: &HeaderMap) -> Result<Response, ApiError> {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    let found = |value: Option<Value>| value.ok_or_else(ApiError::no_resource);
    let aggregated = |core: bool, plain: Value| {
        let version = ["v2", "v2beta1"].into_iter().find(|version| {
            accept.split(',').any(|range| {
                range.contains("g=apidiscovery.k8s.io")
                    && range.split(';').any(|p| p.trim().strip_prefix("v=") == Some(version))
            })
        });
        match version {
            None => json_response(StatusCode::OK, &plain),
            Some(version) => {
                let format = format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
                typed_response(StatusCode::OK, &format, &discovery::aggregated(core, version))
            }
        }
    };
    let value = match route {
        Route::Core => return Ok(aggregated(true, discovery::api_versions())),
        Route::Groups => return Ok(aggregated(false, discovery::groups())),
        Route::Group(name) => found(discovery::one_group(name))?,
        Route::Resources(group, version) => found(discovery::resources(group, version))?,
        Route::Version => discovery::version(),
        Route::Healthy => return Ok(plain_response("ok")),
        Route::OpenApiIndex => openapi::index(),
        Route::OpenApi(group, version) => found(openapi::v3(group, version))?,
        Route::OpenApiV2 => {
            if accept.contains("protobuf") && !accept.contains("json") {
                // The format's own name (it has an @) is one that Go cannot parse.
                let format = "application/octet-stream";
                let mut response = Response::new(Body::from(openapi::v2_protobuf()));
                response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(format));
                return Ok(response);
            }
            openapi::v2()
        }
        Route::Root => json!({"paths": ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v2",
                                        "/openapi/v3", "/readyz", "/version"]}),
        Route::Resource(_) | Route::Lab(_) => return Err(ApiError::no_resource()),
    };
    Ok(json_response(StatusCode::OK, &value))
}

/// What no real server has: breaking things on request, and counts.
fn lab(server: &Server, method: &Method, action: &str, query: &str) -> Result<Response, ApiError> {
    let done = |what: &str| json_response(StatusCode::OK, &json!({"status": "Success", "message": what}));
    match (method.as_str(), action) {
        ("POST", "cut-watches") => {
            server.registry.cut_watches(query.contains("abort"));
            Ok(done("every watch was ended"))
        }
        ("POST", "compact") => {
            server.registry.compact();
            Ok(done("the history was forgotten"))
        }
        ("POST", "away") => {
            server.counters.away.store(true, Ordering::Relaxed);
            server.registry.cut_watches(true);
            Ok(done("requests are refused until POST /lab/back"))
        }
        ("POST", "back") => {
            server.counters.away.store(false, Ordering::Relaxed);
            Ok(done("requests are served"))
        }
        ("GET", "stats") => Ok(json_response(StatusCode::OK, &stats(server))),
        (_, "cut-watches" | "compact" | "away" | "back" | "stats") => Err(ApiError::method_not_allowed()),
        _ => Err(ApiError::no_resource()),
    }
}

/// Objects by kind, requests by client, verb and resource, open watches.
pub fn stats(server: &Server) -> Value {
    let objects: BTreeMap<String, usize> = KINDS
        .iter()
        .filter(|kind| std::ptr::eq(kind.stored(), *kind))
        .map(|kind| (kind.resource(), server.registry.count(kind)))
        .collect();
    json!({
        "objects": objects,
        "requests": server.counters.requests(),
        "watches": server.counters.watches.load(Ordering::Relaxed),
        "revision": server.registry.revision(),
    })
}

fn json_response(code: StatusCode, value: &impl Serialize) -> Response {
    typed_response(code, "application/json", value)
}

fn typed_response(code: StatusCode, format: &str, value: &impl Serialize) -> Response {
    // A tree of JSON always serialises.
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = code;
    if let Ok(format) = header::HeaderValue::from_str(format) {
        response.headers_mut().insert(header::CONTENT_TYPE, format);
    }
    response
}

fn plain_response(text: &'static str) -> Response {
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
