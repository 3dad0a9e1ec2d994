//! Deletion: grace for pods, finalizers, what becomes of dependents.

use std::sync::Arc;

use jiff::{Span, Timestamp};
use serde_json::{Value, json};

use super::{Ctx, Filter, Registry, State, matching};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, metadata};

#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    pub grace: Option<i64>,
    /// Background when absent; or Foreground, Orphan.
    pub propagation: Option<String>,
    pub uid: Option<String>,
    pub revision: Option<String>,
}

#[derive(Debug)]
pub struct Deleted {
    /// The object as it is now, or was last.
    pub object: Arc<Value>,
    /// False: it is marked and waits for grace or finalizers.
    pub gone: bool,
}

impl DeleteOptions {
    pub fn grace(seconds: i64) -> Self {
        Self { grace: Some(seconds), ..Self::default() }
    }

    /// From the body of a request; parameters of the query come first.
    pub fn from_body(body: &Value) -> Result<Self, ApiError> {
        if !body.is_null() && !body.is_object() {
            return Err(ApiError::bad_request("DeleteOptions must be an object"));
        }
        let word = |pointer: &str| body.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let orphan = object::flag(body, "/orphanDependents").then(|| "Orphan".to_owned());
        Ok(Self {
            grace: object::int(body, "/gracePeriodSeconds"),
            propagation: word("/propagationPolicy").or(orphan),
            uid: word("/preconditions/uid"),
            revision: word("/preconditions/resourceVersion"),
        })
    }
}

impl Registry {
    pub fn delete(
        &self,
        ctx: &Ctx,
        kind: &Kind,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        let mut state = self.state.lock();
        self.delete_in(&mut state, ctx, kind, namespace, name, options)
    }

    pub fn delete_collection(
        &self,
        ctx: &Ctx,
        kind: &Kind,
        filter: &Filter,
        options: &DeleteOptions,
    ) -> Result<Vec<Arc<Value>>, ApiError> {
        let mut state = self.state.lock();
        let victims = matching(&state.store, kind, filter);
        for victim in &victims {
            let (namespace, name) = (object::namespace(victim), object::name(victim));
            self.delete_in(&mut state, ctx, kind, namespace, name, options)?;
        }
        Ok(victims)
    }

    /// Evict a pod: a deletion that disruption budgets may forbid.
    pub fn evict(&self, ctx: &Ctx, namespace: &str, name: &str, options: &DeleteOptions) -> Result<(), ApiError> {
        let mut state = self.state.lock();
        let pods = named("Pod");
        let pod = state.store.get(pods, namespace, name).cloned().ok_or_else(|| ApiError::not_found(pods, name))?;
        if object::condition(&pod, "Ready") {
            for budget in state.store.scan(named("PodDisruptionBudget"), Some(namespace)) {
                if let Some(why) = over_budget(&state, budget, &pod) {
                    return Err(ApiError::new(429, "TooManyRequests", why));
                }
            }
        }
        self.delete_in(&mut state, ctx, pods, namespace, name, options).map(drop)
    }

    fn delete_in(
        &self,
        state: &mut State,
        ctx: &Ctx,
        kind: &Kind,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        let old = state.store.get(kind, namespace, name).cloned().ok_or_else(|| ApiError::not_found(kind, name))?;
        let checks = [
            ("UID", &options.uid, object::uid(&old)),
            ("ResourceVersion", &options.revision, object::text(&old, "/metadata/resourceVersion")),
        ];
        for (what, wanted, found) in checks {
            if let Some(wanted) = wanted
                && wanted != found
            {
                let why =
                    format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}");
                return Err(ApiError::conflict(kind, name, &why));
            }
        }
        if kind.kind == "Namespace" && ["default", "kube-system", "kube-public", "kube-node-lease"].contains(&name) {
            return Err(ApiError::forbidden(kind, name, "this namespace may not be deleted"));
        }
        let mut new = (*old).clone();
        match options.propagation.as_deref() {
            None | Some("Background" | "") => {}
            Some("Foreground") => hold(&mut new, "foregroundDeletion"),
            Some("Orphan") => hold(&mut new, "orphan"),
            Some(other) => {
                return Err(ApiError::bad_request(format!(
                    "invalid propagationPolicy \"{other}\": one of Background, Foreground, Orphan"
                )));
            }
        }
        let grace = if kind.kind == "Pod" { pod_grace(&old, options.grace) } else { 0 };
        let held = !object::list(&new, "/metadata/finalizers").is_empty()
            || (kind.kind == "Namespace" && !object::list(&new, "/spec/finalizers").is_empty());
        if grace == 0 && !held {
            if ctx.dry_run {
                return Ok(Deleted { object: old, gone: true });
            }
            let object = self.forget(state, kind, namespace, name).unwrap_or(old);
            return Ok(Deleted { object, gone: true });
        }
        if object::deleting(&old) {
            let current = object::int(&old, "/metadata/deletionGracePeriodSeconds").unwrap_or(0);
            // Grace can only become shorter.
            if grace >= current {
                return Ok(Deleted { object: old, gone: false });
            }
        } else if kind.generation {
            let generation = object::int(&old, "/metadata/generation").unwrap_or(0) + 1;
            metadata(&mut new).insert("generation".into(), generation.into());
        }
        let end = ctx.now.checked_add(Span::new().seconds(grace)).unwrap_or(Timestamp::MAX);
        let meta = metadata(&mut new);
        meta.insert("deletionTimestamp".into(), object::rfc3339(end).into());
        meta.insert("deletionGracePeriodSeconds".into(), grace.into());
        if kind.kind == "Namespace" {
            object::set(&mut new, &["status", "phase"], "Terminating");
        }
        if ctx.dry_run {
            return Ok(Deleted { object: Arc::new(new), gone: false });
        }
        let object = state.store.put(kind, new);
        self.announce(kind, state);
        Ok(Deleted { object, gone: false })
    }
}

fn hold(object: &mut Value, finalizer: &str) {
    let finalizers = metadata(object).entry("finalizers").or_insert_with(|| json!([]));
    if let Value::Array(list) = finalizers
        && !list.iter().any(|f| f == finalizer)
    {
        list.push(finalizer.into());
    }
}

/// Seconds that a pod gets: none when nothing runs.
fn pod_grace(pod: &Value, asked: Option<i64>) -> i64 {
    let phase = object::text(pod, "/status/phase");
    if object::text(pod, "/spec/nodeName").is_empty() || phase == "Succeeded" || phase == "Failed" {
        return 0;
    }
    // A day is longer than any test and keeps the arithmetic sane.
    asked.or_else(|| object::int(pod, "/spec/terminationGracePeriodSeconds")).unwrap_or(30).clamp(0, 86_400)
}

fn over_budget(state: &State, budget: &Value, pod: &Value) -> Option<String> {
    use crate::lab::kube::selector::Labels;
    let selector = Labels::from_object(budget.pointer("/spec/selector")?).ok()?;
    if !selector.matches(object::labels(pod)) {
        return None;
    }
    let pods: Vec<_> = state
        .store
        .scan(named("Pod"), Some(object::namespace(pod)))
        .filter(|p| selector.matches(object::labels(p)))
        .collect();
    let healthy = pods.iter().filter(|p| object::condition(p, "Ready") && !object::deleting(p)).count() as i64;
    let total = pods.len() as i64;
    let share = |value: &Value| match value {
        Value::String(text) => {
            let percent: i64 = text.strip_suffix('%')?.parse().ok()?;
            Some((total.checked_mul(percent)? + 99) / 100)
        }
        number => number.as_i64(),
    };
    let floor = match (budget.pointer("/spec/minAvailable"), budget.pointer("/spec/maxUnavailable")) {
        (Some(least), _) => share(least)?,
        (_, Some(most)) => total - share(most)?,
        _ => return None,
    };
    let name = object::name(budget);
    (healthy - 1 < floor).then(|| {
        format!(
            "Cannot evict pod as it would violate the pod's disruption budget: the disruption budget {name} needs \
             {floor} healthy pods and has {healthy} currently"
        )
    })
}
