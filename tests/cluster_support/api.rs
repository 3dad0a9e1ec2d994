//! A Kubernetes API of two hundred lines: enough for kube's client, and as
//! unreliable as a test wants it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

#[derive(Default)]
pub struct Store {
    version: u64,
    /// By URL path.
    pub objects: BTreeMap<String, Value>,
    log: Vec<(u64, String, &'static str, Value)>,
    /// Watches from before this version are gone (410).
    oldest: u64,
    /// Answer writes with this code.
    pub fail_writes: Option<u16>,
    pub requests: Vec<String>,
    cuts: u64,
}

impl Store {
    fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let kind = if self.objects.contains_key(path) { "MODIFIED" } else { "ADDED" };
        self.objects.insert(path.into(), object.clone());
        self.log.push((self.version, path.into(), kind, object.clone()));
        object
    }
    fn remove(&mut self, path: &str) {
        self.version += 1;
        if let Some(mut object) = self.objects.remove(path) {
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.log.push((self.version, path.into(), "DELETED", object));
        }
    }
    pub fn events(&self) -> Vec<Value> {
        let found = self.objects.iter().filter(|(path, _)| path.contains("/events/"));
        found.map(|(_, event)| event.clone()).collect()
    }
}

#[derive(Clone)]
struct Shared {
    store: Arc<Mutex<Store>>,
    changed: watch::Sender<u64>,
}

pub struct Api {
    shared: Shared,
    address: Option<SocketAddr>,
    runtime: Option<tokio::runtime::Runtime>,
    pub dir: tempfile::TempDir,
}

pub const NODE: &str = "/api/v1/nodes/n1";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/fairway-leader";

impl Api {
    pub fn new() -> Self {
        let (changed, _) = watch::channel(0);
        let shared = Shared { store: Arc::default(), changed };
        let dir = tempfile::tempdir().unwrap();
        let mut api = Self { shared, address: None, runtime: None, dir };
        api.put(NODE, json!({"metadata": {"name": "n1", "uid": "node-uid", "labels": {"zone": "a"}},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "Hostname", "address": "n1"}],
                       "conditions": [{"type": "Ready", "status": "True"}]}}));
        api.up();
        api
    }

    /// The same address as before, so that clients find it again.
    pub fn up(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let at = self.address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
        // A connection of the client may hold the port for a moment.
        let listener = (0..200).find_map(|_| {
            let bound = runtime.block_on(tokio::net::TcpListener::bind(at)).ok();
            if bound.is_none() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            bound
        });
        let listener = listener.unwrap();
        self.address = Some(listener.local_addr().unwrap());
        let app = axum::Router::new().fallback(serve).with_state(self.shared.clone());
        runtime.spawn(async move { axum::serve(listener, app).await });
        self.runtime = Some(runtime);
    }

    /// Gone with all connections.
    pub fn down(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
        }
    }

    pub fn kubeconfig(&self) -> std::path::PathBuf {
        let path = self.dir.path().join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.address.unwrap())}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    pub fn store(&self) -> parking_lot::MutexGuard<'_, Store> {
        self.shared.store.lock()
    }
    fn announce(&self) {
        self.shared.changed.send_modify(|n| *n += 1);
    }
    pub fn put(&self, path: &str, object: Value) {
        self.store().put(path, object);
        self.announce();
    }
    pub fn remove(&self, path: &str) {
        self.store().remove(path);
        self.announce();
    }
    /// End every watch, as a proxy that times out does.
    pub fn cut(&self) {
        self.store().cuts += 1;
        self.announce();
    }
    /// Forget the past: watches must list again.
    pub fn compact(&self) {
        let mut store = self.store();
        store.oldest = store.version + 1;
        store.version += 1;
        store.log.clear();
        store.cuts += 1;
        drop(store);
        self.announce();
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.down();
    }
}

fn status(code: u16, reason: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason});
    (StatusCode::from_u16(code).unwrap(), body.to_string()).into_response()
}

fn selected(path: &str, object: &Value, collection: &str, selector: Option<&String>) -> bool {
    let namespaced = |root: &str, kind: &str| path.starts_with(root) && path.contains(kind);
    let in_it = match collection {
        "/api/v1/pods" => namespaced("/api/v1/namespaces/", "/pods/"),
        "/api/v1/services" => namespaced("/api/v1/namespaces/", "/services/"),
        SLICES => namespaced("/apis/discovery.k8s.io/v1/namespaces/", "/endpointslices/"),
        other => path.strip_prefix(other).is_some_and(|rest| rest.starts_with('/')),
    };
    in_it
        && selector.is_none_or(|s| match s.split_once('=') {
            Some(("spec.nodeName", node)) => object["spec"]["nodeName"] == node,
            Some(("metadata.name", name)) => object["metadata"]["name"] == name,
            _ => false,
        })
}

async fn serve(
    State(shared): State<Shared>,
    method: Method,
    uri: Uri,
    Query(query): Query<BTreeMap<String, String>>,
    body: Bytes,
) -> Response {
    let path = uri.path().to_owned();
    let watching = query.contains_key("watch");
    shared.store.lock().requests.push(format!("{method} {path}{}", if watching { " watch" } else { "" }));
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let selector = query.get("fieldSelector").cloned();
    let collection = matches!(path.as_str(), "/api/v1/pods" | "/api/v1/nodes" | "/api/v1/services" | SLICES);
    match (method.as_str(), collection) {
        ("GET", true) if watching => {
            let from = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
            watch_from(shared, path, selector, from)
        }
        ("GET", true) => {
            let store = shared.store.lock();
            let found = store.objects.iter().filter(|(p, o)| selected(p, o, &path, selector.as_ref()));
            let items: Vec<_> = found.map(|(_, o)| o.clone()).collect();
            let list = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": store.version.to_string()}, "items": items});
            list.to_string().into_response()
        }
        ("GET", false) => match shared.store.lock().objects.get(&path) {
            Some(object) => object.to_string().into_response(),
            None => status(404, "NotFound"),
        },
        (verb, _) => {
            let response = write(&mut shared.store.lock(), verb, &path, body);
            shared.changed.send_modify(|n| *n += 1);
            response
        }
    }
}

fn write(store: &mut Store, verb: &str, path: &str, body: Value) -> Response {
    if let Some(code) = store.fail_writes {
        return status(code, "AsTheTestWants");
    }
    let object = match verb {
        "POST" => {
            let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap_or("?"));
            if store.objects.contains_key(&path) {
                return status(409, "AlreadyExists");
            }
            return (StatusCode::CREATED, store.put(&path, body).to_string()).into_response();
        }
        "PUT" => match store.objects.get(path) {
            None => return status(404, "NotFound"),
            Some(old) if old["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] => {
                return status(409, "Conflict");
            }
            Some(_) => body,
        },
        "PATCH" => match store.objects.get(path.trim_end_matches("/status")) {
            None => return status(404, "NotFound"),
            Some(old) => merged(old.clone(), body),
        },
        _ => return status(405, "MethodNotAllowed"),
    };
    store.put(path.trim_end_matches("/status"), object).to_string().into_response()
}

/// Merge patch; lists of conditions by type.
fn merged(mut object: Value, patch: Value) -> Value {
    let Value::Object(patch) = patch else { return patch };
    for (key, value) in patch {
        let slot = &mut object[&key];
        if let (Value::Array(old), Value::Array(new)) = (&mut *slot, &value) {
            for item in new {
                match old.iter_mut().find(|o| o["type"] == item["type"]) {
                    Some(o) => *o = merged(o.clone(), item.clone()),
                    None => old.push(item.clone()),
                }
            }
        } else {
            *slot = merged(slot.take(), value);
        }
    }
    object
}

fn watch_from(shared: Shared, path: String, selector: Option<String>, from: u64) -> Response {
    let (oldest, cuts) = {
        let store = shared.store.lock();
        (store.oldest, store.cuts)
    };
    if from < oldest {
        return status(410, "Expired");
    }
    let changed = shared.changed.subscribe();
    let lines = futures::stream::unfold((shared, changed, from), move |(shared, mut changed, from)| {
        let (path, selector) = (path.clone(), selector.clone());
        async move {
            loop {
                changed.borrow_and_update();
                let (lines, version) = {
                    let store = shared.store.lock();
                    if store.cuts != cuts {
                        return None;
                    }
                    let new =
                        store.log.iter().filter(|(v, p, _, o)| *v > from && selected(p, o, &path, selector.as_ref()));
                    let lines: String =
                        new.map(|(_, _, kind, o)| json!({"type": kind, "object": o}).to_string() + "\n").collect();
                    (lines, store.version)
                };
                if !lines.is_empty() {
                    return Some((Ok::<_, Infallible>(lines), (shared, changed, version)));
                }
                changed.changed().await.ok()?;
            }
        }
    });
    Body::from_stream(lines).into_response()
}
