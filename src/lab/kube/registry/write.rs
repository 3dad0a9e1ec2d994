//! Create, update and patch: decode, default, allocate, validate, record, store.

use std::sync::Arc;

use serde_json::{Value, json};

use super::shape::{decoded, identified, merged, prune, same, same_but, uid};
use super::{Ctx, Registry, State};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::events;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, metadata};
use crate::lab::kube::patch::{self, apply};
use crate::lab::kube::{defaults, validate};

/// Which part of an object a write may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sub {
    Main,
    Status,
    /// The scheduler's decision: the node, and the condition that says so.
    Binding,
    /// The namespace's own finalizers.
    Finalize,
}

impl Sub {
    fn name(self) -> &'static str {
        match self {
            Sub::Main => "",
            Sub::Status => "status",
            Sub::Binding => "binding",
            Sub::Finalize => "finalize",
        }
    }
}

/// What a write is about.
#[derive(Clone, Copy)]
pub(super) struct Change<'a> {
    pub(super) kind: &'a Kind,
    pub(super) sub: Sub,
    /// Changed fields go to the writer; an apply has settled that itself.
    pub(super) track: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchKind {
    Json,
    Merge,
    Strategic,
    /// Server-side apply; the flag forces conflicts.
    Apply(bool),
}

/// The outcome of a write.
#[derive(Debug)]
pub struct Written {
    pub object: Arc<Value>,
    pub warnings: Vec<String>,
    pub created: bool,
}

impl Registry {
    pub fn create(&self, ctx: &Ctx, kind: &Kind, namespace: &str, object: Value) -> Result<Written, ApiError> {
        let mut state = self.state.lock();
        self.create_in(&mut state, ctx, kind, namespace, object)
    }

    /// Replace an object, or its status.
    pub fn update(
        &self,
        ctx: &Ctx,
        kind: &Kind,
        namespace: &str,
        name: &str,
        sub: Sub,
        new: Value,
    ) -> Result<Written, ApiError> {
        let mut state = self.state.lock();
        let new = identified(kind, namespace, Some(name), new)?;
        let old = state.store.get(kind, namespace, name).cloned().ok_or_else(|| ApiError::not_found(kind, name))?;
        self.replace(&mut state, ctx, Change { kind, sub, track: true }, old, new)
    }

    pub fn patch(
        &self,
        ctx: &Ctx,
        kind: &Kind,
        key: (&str, &str),
        sub: Sub,
        how: PatchKind,
        body: &Value,
    ) -> Result<Written, ApiError> {
        let (namespace, name) = key;
        let mut state = self.state.lock();
        if let PatchKind::Apply(force) = how {
            let change = Change { kind, sub, track: false };
            return self.apply_in(&mut state, ctx, change, key, force, body.clone());
        }
        let old = state.store.get(kind, namespace, name).cloned().ok_or_else(|| ApiError::not_found(kind, name))?;
        // The patch is written against the view that the caller reads.
        let view = events::outward(kind, &old);
        let new = match how {
            PatchKind::Json => {
                patch::json::apply(&view, body).map_err(|e| ApiError::new(422, "Invalid", e.to_string()))?
            }
            PatchKind::Strategic => {
                patch::strategic::apply(&view, body).map_err(|e| ApiError::bad_request(e.to_string()))?
            }
            _ => {
                if !body.is_object() {
                    return Err(ApiError::bad_request("a merge patch must be an object"));
                }
                let mut new = view.into_owned();
                patch::merge(&mut new, body);
                new
            }
        };
        let new = identified(kind, namespace, Some(name), new)?;
        self.replace(&mut state, ctx, Change { kind, sub, track: true }, old, new)
    }

    /// Change an object in place; `change` returns false to leave it alone. For
    /// the controllers: no conflicts, since nobody comes between.
    pub fn modify(
        &self,
        ctx: &Ctx,
        kind: &Kind,
        key: (&str, &str),
        sub: Sub,
        change: impl FnOnce(&mut Value) -> bool,
    ) -> Result<Option<Arc<Value>>, ApiError> {
        let (namespace, name) = key;
        let mut state = self.state.lock();
        let old = state.store.get(kind, namespace, name).cloned().ok_or_else(|| ApiError::not_found(kind, name))?;
        let mut new = (*old).clone();
        if !change(&mut new) {
            return Ok(None);
        }
        self.replace(&mut state, ctx, Change { kind, sub, track: true }, old, new).map(|written| Some(written.object))
    }

    fn create_in(
        &self,
        state: &mut State,
        ctx: &Ctx,
        kind: &Kind,
        namespace: &str,
        object: Value,
    ) -> Result<Written, ApiError> {
        let mut object = identified(kind, namespace, None, object)?;
        let meta = metadata(&mut object);
        if meta.get("resourceVersion").and_then(Value::as_str).is_some_and(|rv| !rv.is_empty()) {
            return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
        }
        for system in ["uid", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"] {
            meta.remove(system);
        }
        let base = meta.get("generateName").and_then(Value::as_str).unwrap_or("").to_owned();
        if !base.is_empty() && meta.get("name").and_then(Value::as_str).unwrap_or("").is_empty() {
            let cut: String = base.chars().take(58).collect();
            let free = (0..8)
                .map(|_| format!("{cut}{}", object::letters(rand::random(), 5)))
                .find(|name| state.store.get(kind, namespace, name).is_none());
            meta.insert("name".into(), free.unwrap_or_default().into());
        }
        meta.insert("uid".into(), uid().into());
        meta.insert("creationTimestamp".into(), object::rfc3339(ctx.now).into());
        if kind.generation {
            meta.insert("generation".into(), 1.into());
        }
        // A node brings its status along; for others it is what happens later.
        if kind.status && kind.kind != "Node" {
            object::map_mut(&mut object, &[]).remove("status");
        }
        let (mut object, warnings) = decoded(ctx, kind, object)?;
        let name = object::name(&object).to_owned();
        if kind.namespaced {
            check_namespace(state, kind, namespace, &name)?;
        }
        if state.store.get(kind, namespace, &name).is_some() {
            return Err(ApiError::already_exists(kind, &name));
        }
        if kind.kind == "Namespace" {
            object::set(&mut object, &["spec", "finalizers"], json!(["kubernetes"]));
        }
        self.complete(state, kind, None, &mut object)?;
        own(ctx, kind, Sub::Main, None, &mut object);
        if ctx.dry_run {
            return Ok(Written { object: Arc::new(object), warnings, created: true });
        }
        if kind.kind == "Service" {
            state.services.commit(None, Some(&object));
        }
        let object = state.store.put(kind, object);
        self.announce(kind, state);
        Ok(Written { object, warnings, created: true })
    }

    /// Defaults, addresses, rules.
    fn complete(&self, state: &mut State, kind: &Kind, old: Option<&Value>, new: &mut Value) -> Result<(), ApiError> {
        defaults::apply(kind, new);
        if kind.kind == "Service" {
            state.services.prepare(old, new).map_err(|causes| ApiError::invalid(kind, object::name(new), causes))?;
        }
        validate::check(kind, new, old)
    }

    fn apply_in(
        &self,
        state: &mut State,
        ctx: &Ctx,
        change: Change<'_>,
        (namespace, name): (&str, &str),
        force: bool,
        wish: Value,
    ) -> Result<Written, ApiError> {
        let Change { kind, sub, .. } = change;
        if ctx.manager.is_empty() {
            return Err(ApiError::bad_request(
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
            ));
        }
        let mut wish = identified(kind, namespace, Some(name), wish)?;
        if wish.pointer("/metadata/managedFields").is_some() {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        defaults::quantities(&mut wish);
        prune(&mut wish);
        let api_version = kind.api_version();
        let now = object::rfc3339(ctx.now);
        let writer =
            apply::Writer { manager: &ctx.manager, subresource: sub.name(), api_version: &api_version, now: &now };
        let Some(old) = state.store.get(kind, namespace, name).cloned() else {
            if sub != Sub::Main {
                return Err(ApiError::not_found(kind, name));
            }
            if wish.pointer("/metadata/uid").is_some() {
                return Err(ApiError::modified(kind, name));
            }
            let blank = json!({"metadata": {}});
            let object = apply::apply(&blank, &wish, writer, true).map_err(|c| ApiError::apply_conflicts(&c))?;
            return self.create_in(state, ctx, kind, namespace, object);
        };
        let mut new = apply::apply(&old, &wish, writer, force).map_err(|c| ApiError::apply_conflicts(&c))?;
        // Whoever applies without a revision means any.
        let revision = wish.pointer("/metadata/resourceVersion").cloned();
        let meta = metadata(&mut new);
        match revision {
            Some(revision) => meta.insert("resourceVersion".into(), revision),
            None => meta.remove("resourceVersion"),
        };
        self.replace(state, ctx, change, old, new)
    }

    /// Put `new` in place of `old`.
    pub(super) fn replace(
        &self,
        state: &mut State,
        ctx: &Ctx,
        Change { kind, sub, track }: Change<'_>,
        old: Arc<Value>,
        new: Value,
    ) -> Result<Written, ApiError> {
        let name = object::name(&old).to_owned();
        let namespace = object::namespace(&old).to_owned();
        let expected = object::text(&new, "/metadata/resourceVersion").to_owned();
        if !expected.is_empty() && expected != object::text(&old, "/metadata/resourceVersion") {
            return Err(ApiError::modified(kind, &name));
        }
        let uid = object::uid(&new);
        if !uid.is_empty() && uid != object::uid(&old) {
            let why =
                format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", object::uid(&old));
            return Err(ApiError::conflict(kind, &name, &why));
        }
        let (decoded, warnings) = decoded(ctx, kind, new)?;
        let mut new = merged(kind, sub, &old, decoded);
        // A binding changes what nobody else may change.
        let reference = (sub != Sub::Binding).then_some(&*old);
        self.complete(state, kind, reference, &mut new)?;
        if kind.generation && !same_but(Some(&old), Some(&new), &["metadata", "status"]) {
            let generation = object::int(&old, "/metadata/generation").unwrap_or(0) + 1;
            metadata(&mut new).insert("generation".into(), generation.into());
        }
        if track {
            own(ctx, kind, sub, Some(&old), &mut new);
        }
        if same(&old, &new) {
            return Ok(Written { object: old, warnings, created: false });
        }
        if ctx.dry_run {
            return Ok(Written { object: Arc::new(new), warnings, created: false });
        }
        // What waits for deletion goes with its last finalizer.
        let waiting = object::deleting(&new)
            && object::list(&new, "/metadata/finalizers").is_empty()
            && object::int(&new, "/metadata/deletionGracePeriodSeconds").unwrap_or(0) == 0
            && (kind.kind != "Namespace" || object::list(&new, "/spec/finalizers").is_empty());
        if waiting {
            self.forget(state, kind, &namespace, &name);
            return Ok(Written { object: Arc::new(new), warnings, created: false });
        }
        if kind.kind == "Service" {
            state.services.commit(Some(&old), Some(&new));
        }
        let object = state.store.put(kind, new);
        self.announce(kind, state);
        Ok(Written { object, warnings, created: false })
    }

    /// Take an object out of the store.
    pub(super) fn forget(&self, state: &mut State, kind: &Kind, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let last = state.store.remove(kind, namespace, name)?;
        if kind.kind == "Service" {
            state.services.commit(Some(&last), None);
        }
        self.announce(kind, state);
        Some(last)
    }
}

fn own(ctx: &Ctx, kind: &Kind, sub: Sub, old: Option<&Value>, new: &mut Value) {
    let api_version = kind.stored().api_version();
    let now = object::rfc3339(ctx.now);
    let manager = if ctx.manager.is_empty() { "unknown" } else { &ctx.manager };
    let writer = apply::Writer { manager, subresource: sub.name(), api_version: &api_version, now: &now };
    // An object that was created by an apply has its owner already.
    if old.is_none() && new.pointer("/metadata/managedFields").is_some() {
        return;
    }
    apply::track(old, new, writer);
}

fn check_namespace(state: &State, kind: &Kind, namespace: &str, name: &str) -> Result<(), ApiError> {
    let namespaces = named("Namespace");
    let Some(found) = state.store.get(namespaces, "", namespace) else {
        return Err(ApiError::not_found(namespaces, namespace));
    };
    // Events about the end are welcome.
    if object::deleting(found) && kind.kind != "Event" {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        return Err(ApiError::forbidden(kind, name, &why));
    }
    Ok(())
}
