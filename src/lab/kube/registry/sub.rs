//! The scale and binding subresources.

use serde_json::{Value, json};

use super::write::Change;
use super::{Ctx, Registry, Sub, Written};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, text};

/// An object's `Scale`.
pub fn scale_of(object: &Value) -> Value {
    let selector = object::map(object, "/spec/selector/matchLabels")
        .map(|labels| {
            let pairs: Vec<String> =
                labels.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or(""))).collect();
            pairs.join(",")
        })
        .unwrap_or_default();
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": object::name(object), "namespace": object::namespace(object), "uid": object::uid(object),
            "resourceVersion": text(object, "/metadata/resourceVersion"),
            "creationTimestamp": text(object, "/metadata/creationTimestamp"),
        },
        "spec": {"replicas": object::int(object, "/spec/replicas").unwrap_or(0)},
        "status": {"replicas": object::int(object, "/status/replicas").unwrap_or(0), "selector": selector},
    })
}

impl Registry {
    /// Change the replicas through a `Scale`, or a patch of one.
    pub fn scale(
        &self,
        ctx: &Ctx,
        kind: &Kind,
        namespace: &str,
        name: &str,
        change: impl FnOnce(Value) -> Result<Value, ApiError>,
    ) -> Result<Value, ApiError> {
        let mut state = self.state.lock();
        let old = state.store.get(kind, namespace, name).cloned().ok_or_else(|| ApiError::not_found(kind, name))?;
        let scale = change(scale_of(&old))?;
        let revision = text(&scale, "/metadata/resourceVersion");
        if !revision.is_empty() && revision != text(&old, "/metadata/resourceVersion") {
            return Err(ApiError::modified(kind, name));
        }
        let replicas = match scale.pointer("/spec/replicas") {
            None | Some(Value::Null) => 0,
            Some(value) => value
                .as_i64()
                .filter(|n| (0..=i64::from(i32::MAX)).contains(n))
                .ok_or_else(|| ApiError::bad_request("spec.replicas must be a non-negative integer"))?,
        };
        let mut new = (*old).clone();
        object::set(&mut new, &["spec", "replicas"], replicas);
        let Written { object, .. } =
            self.replace(&mut state, ctx, Change { kind, sub: Sub::Main, track: true }, old, new)?;
        Ok(scale_of(&object))
    }

    /// Give a pod its node.
    pub fn bind(&self, ctx: &Ctx, namespace: &str, name: &str, node: &str) -> Result<(), ApiError> {
        let pods = named("Pod");
        let mut state = self.state.lock();
        let old = state.store.get(pods, namespace, name).cloned().ok_or_else(|| ApiError::not_found(pods, name))?;
        if node.is_empty() {
            return Err(ApiError::bad_request("a Binding needs target.name, the node"));
        }
        let bound = text(&old, "/spec/nodeName");
        if !bound.is_empty() {
            let why = format!("pod {name} is already assigned to node \"{bound}\"");
            return Err(ApiError::conflict(pods, name, &why));
        }
        if object::deleting(&old) {
            return Err(ApiError::conflict(pods, name, "the pod is being deleted, cannot be assigned to a host"));
        }
        let mut new = (*old).clone();
        object::set(&mut new, &["spec", "nodeName"], node);
        let now = object::rfc3339(ctx.now);
        let conditions = object::map_mut(&mut new, &["status"]).entry("conditions").or_insert_with(|| json!([]));
        if let Value::Array(conditions) = conditions {
            conditions.retain(|c| text(c, "/type") != "PodScheduled");
            conditions.push(json!({"type": "PodScheduled", "status": "True", "lastTransitionTime": now,
                                   "lastProbeTime": null}));
        }
        self.replace(&mut state, ctx, Change { kind: pods, sub: Sub::Binding, track: true }, old, new).map(drop)
    }
}
