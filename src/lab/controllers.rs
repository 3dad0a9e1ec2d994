//! What makes a cluster out of the API server: the controllers and the
//! scheduler, in the lab's process, against the same registry that serves HTTP.
//!
//! A [`Controller`] follows some kinds and puts keys of what may need work into
//! its [`Queue`]; `reconcile` brings one key into order and may be called any
//! number of times. Each runs in a task of its own; none keeps the registry
//! locked, none waits for another.
//!
//! - [`deployment`], [`replica_set`], [`stateful_set`]: pods from templates
//! - [`endpoints`]: EndpointSlices and Endpoints of Services
//! - [`scheduler`]: pods to nodes
//! - [`balancers`]: load balancers of Services, where there is a router
//! - [`collector`]: owners, namespaces, lost nodes, old events

pub mod balancers;
pub mod collector;
pub mod deployment;
pub mod endpoints;
pub mod pods;
pub mod replica_set;
pub mod scheduler;
pub mod stateful_set;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::kube::error::ApiError;
use super::kube::kind::{Kind, named};
use super::kube::object;
use super::kube::registry::{Ctx, Filter, Registry, Sub, WatchEvent, WatchStart, Watcher};

/// Namespace and name.
pub type Key = (String, String);

pub trait Controller: Send + 'static {
    const NAME: &'static str;
    type Key: Ord + Hash + Clone + std::fmt::Debug + Send;

    /// The kinds it follows.
    fn kinds(&self) -> Vec<&'static Kind>;

    /// Something changed: what may need work?
    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<Self::Key>);

    /// Changes were missed; what was remembered of them is not to be trusted.
    /// All that exists is observed again after this.
    fn reset(&mut self) {}

    /// Bring one thing into order. Some duration: look again after it.
    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, key: &Self::Key) -> Result<Option<Duration>, ApiError>;
}

/// What needs work now, and what later.
pub struct Queue<K> {
    ready: BTreeSet<K>,
    later: BTreeMap<Instant, Vec<K>>,
    failures: HashMap<K, u32>,
}

impl<K: Ord + Hash + Clone> Queue<K> {
    fn new() -> Self {
        Self { ready: BTreeSet::new(), later: BTreeMap::new(), failures: HashMap::new() }
    }

    pub fn add(&mut self, key: K) {
        self.ready.insert(key);
    }

    pub fn add_after(&mut self, key: K, delay: Duration) {
        self.later.entry(Instant::now() + delay).or_default().push(key);
    }

    fn due(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.later.first_entry().filter(|entry| *entry.key() <= now) {
            self.ready.extend(entry.remove());
        }
    }

    fn failed(&mut self, key: K) -> Duration {
        let count = self.failures.entry(key.clone()).or_default();
        *count = (*count + 1).min(8);
        let delay = Duration::from_millis(25 << *count);
        self.add_after(key, delay);
        delay
    }
}

/// Keys worked on before other tasks get their turn.
const TURN: usize = 50;

/// Start all of them; they end when `stop` turns true.
pub fn spawn(registry: &Arc<Registry>, stop: &watch::Receiver<bool>, tasks: &mut JoinSet<()>) {
    tasks.spawn(run(replica_set::ReplicaSets, registry.clone(), stop.clone()));
    tasks.spawn(run(deployment::Deployments, registry.clone(), stop.clone()));
    tasks.spawn(run(stateful_set::StatefulSets, registry.clone(), stop.clone()));
    tasks.spawn(run(endpoints::EndpointsOfServices::default(), registry.clone(), stop.clone()));
    tasks.spawn(run(scheduler::Scheduler, registry.clone(), stop.clone()));
    tasks.spawn(run(collector::Collector::default(), registry.clone(), stop.clone()));
}

pub(super) async fn run<C: Controller>(mut controller: C, registry: Arc<Registry>, mut stop: watch::Receiver<bool>) {
    let mut queue = Queue::new();
    let open = |kind| registry.watch(kind, Filter::default(), WatchStart::State).ok();
    let mut watchers: Vec<Watcher> = controller.kinds().into_iter().filter_map(open).collect();
    while !*stop.borrow() {
        let mut missed = false;
        for watcher in &mut watchers {
            loop {
                match watcher.poll() {
                    Ok(events) if events.is_empty() => break,
                    Ok(events) => {
                        let kind = watcher.kind();
                        events.iter().for_each(|event| controller.observe(kind, event, &mut queue));
                    }
                    Err(_) => {
                        missed = true;
                        break;
                    }
                }
            }
        }
        if missed {
            controller.reset();
            watchers = controller.kinds().into_iter().filter_map(open).collect();
            continue;
        }
        queue.due();
        let ctx = Ctx::new(C::NAME);
        for _ in 0..TURN {
            let Some(key) = queue.ready.pop_first() else { break };
            match controller.reconcile(&registry, &ctx, &key) {
                Ok(again) => {
                    queue.failures.remove(&key);
                    if let Some(delay) = again {
                        queue.add_after(key, delay);
                    }
                }
                Err(error) => {
                    let again_ms = queue.failed(key.clone()).as_millis() as u64;
                    tracing::debug!(controller = C::NAME, ?key, %error, again_ms, "Could not reconcile");
                }
            }
        }
        if !queue.ready.is_empty() {
            tokio::task::yield_now().await;
            continue;
        }
        let alarm = queue.later.keys().next().copied();
        let changes = watchers.iter_mut().map(|watcher| Box::pin(watcher.changed()));
        tokio::select! {
            _ = futures::future::select_all(changes) => {}
            () = sleep_until(alarm) => {}
            _ = stop.changed() => {}
        }
    }
}

async fn sleep_until(alarm: Option<Instant>) {
    match alarm {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// The key of an object.
pub fn key(object: &Value) -> Key {
    (object::namespace(object).to_owned(), object::name(object).to_owned())
}

/// The key of an object's controller, if that is of this kind.
pub fn controller_key(object: &Value, kind: &str) -> Option<Key> {
    let (owner, name, _) = object::controller(object)?;
    (owner == kind).then(|| (object::namespace(object).to_owned(), name.to_owned()))
}

/// What belongs to this controller: its references say so.
pub fn owned(api: &Registry, kind: &Kind, owner: &Value) -> Vec<Arc<Value>> {
    let uid = object::uid(owner);
    let mut all = api.within(kind, object::namespace(owner));
    all.retain(|object| object::controller(object).is_some_and(|(_, _, owner)| owner == uid));
    all
}

/// Write `status` fields; unchanged ones cost nothing.
pub fn set_status(api: &Registry, ctx: &Ctx, kind: &Kind, of: &Value, fields: Value) -> Result<(), ApiError> {
    let key = (object::namespace(of), object::name(of));
    let change = |object: &mut Value| {
        let status = object::map_mut(object, &["status"]);
        for (name, value) in fields.as_object().into_iter().flatten() {
            if value.is_null() {
                status.remove(name);
            } else {
                status.insert(name.clone(), value.clone());
            }
        }
        true
    };
    match api.modify(ctx, kind, key, Sub::Status, change) {
        // Gone in the meantime: its deletion is an event of its own.
        Err(error) if error.code == 404 => Ok(()),
        other => other.map(drop),
    }
}

/// A condition list with this condition in it; its time moves when it turns.
pub fn with_condition(of: &Value, kind: &str, status: bool, reason: &str, message: &str, ctx: &Ctx) -> Value {
    let mut all = object::list(of, "/status/conditions").to_vec();
    let now = object::rfc3339(ctx.now);
    let status = if status { "True" } else { "False" };
    let before = all.iter().find(|c| object::text(c, "/type") == kind);
    if before.is_some_and(|c| object::text(c, "/status") == status && object::text(c, "/reason") == reason) {
        return Value::Array(all);
    }
    let turned = match before {
        Some(c) if object::text(c, "/status") == status => object::text(c, "/lastTransitionTime").to_owned(),
        _ => now.clone(),
    };
    all.retain(|c| object::text(c, "/type") != kind);
    all.push(json!({"type": kind, "status": status, "reason": reason, "message": message,
                    "lastTransitionTime": turned, "lastUpdateTime": now}));
    Value::Array(all)
}

/// Record an event about an object; the same again counts up.
pub fn event(api: &Registry, ctx: &Ctx, about: &Value, warning: bool, reason: &str, message: &str) {
    let events = named("Event");
    let namespace = match object::namespace(about) {
        "" => "default",
        namespace => namespace,
    };
    let identity = json!([object::uid(about), reason, message]);
    let name = format!("{}.{:016x}", object::name(about), object::hash(&identity));
    let now = object::rfc3339(ctx.now);
    let again = api.modify(ctx, events, (namespace, &name), Sub::Main, |event| {
        let count = object::int(event, "/count").unwrap_or(1) + 1;
        object::set(event, &["count"], count);
        object::set(event, &["lastTimestamp"], now.clone());
        true
    });
    if again.is_ok() {
        return;
    }
    let event = json!({
        "metadata": {"name": name},
        "involvedObject": {
            "kind": object::text(about, "/kind"), "apiVersion": object::text(about, "/apiVersion"),
            "name": object::name(about), "namespace": object::namespace(about), "uid": object::uid(about),
            "resourceVersion": object::text(about, "/metadata/resourceVersion"),
        },
        "type": if warning { "Warning" } else { "Normal" }, "reason": reason, "message": message,
        "source": {"component": ctx.manager}, "reportingComponent": ctx.manager, "reportingInstance": "",
        "firstTimestamp": now, "lastTimestamp": now, "count": 1,
    });
    // An event is a courtesy; its subject's namespace may be gone.
    let _ = api.create(ctx, events, namespace, event);
}
