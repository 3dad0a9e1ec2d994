//! ReplicaSet → Pods.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Controller, Key, Queue, controller_key, event, key, owned, pods, set_status};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, int};
use crate::lab::kube::registry::{Ctx, DeleteOptions, Registry, Sub, WatchEvent};
use crate::lab::kube::selector::Labels;

pub struct ReplicaSets;

/// Pods made in one go; the rest follows at once.
const BURST: usize = 100;

impl Controller for ReplicaSets {
    const NAME: &'static str = "replicaset-controller";
    type Key = Key;

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![named("ReplicaSet"), named("Pod")]
    }

    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<Key>) {
        let Some(object) = event.object() else { return };
        if kind.kind == "ReplicaSet" {
            queue.add(key(object));
        } else if let Some(owner) = controller_key(object, "ReplicaSet") {
            queue.add(owner);
        }
    }

    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, (namespace, name): &Key) -> Result<Option<Duration>, ApiError> {
        let kind = named("ReplicaSet");
        let Some(set) = api.find(kind, namespace, name) else { return Ok(None) };
        if object::deleting(&set) {
            return Ok(None);
        }
        adopt(api, ctx, &set)?;
        let mine = owned(api, named("Pod"), &set);
        let mut active: Vec<_> = mine.iter().filter(|pod| pods::active(pod)).collect();
        let wanted = int(&set, "/spec/replicas").unwrap_or(1).max(0) as usize;
        let mut again = None;
        if active.len() < wanted {
            let missing = wanted - active.len();
            if missing > BURST {
                again = Some(Duration::ZERO);
            }
            for _ in 0..missing.min(BURST) {
                let template = set.pointer("/spec/template").cloned().unwrap_or_default();
                let mut pod = pods::from_template(&set, &template);
                pod["metadata"]["generateName"] = format!("{name}-").into();
                let made = api.create(ctx, named("Pod"), namespace, pod).inspect_err(|error| {
                    event(api, ctx, &set, true, "FailedCreate", &format!("Error creating: {error}"));
                })?;
                let made = object::name(&made.object);
                event(api, ctx, &set, false, "SuccessfulCreate", &format!("Created pod: {made}"));
            }
        } else if active.len() > wanted {
            active.sort_by_key(|pod| pods::expendable(pod));
            for pod in &active[..active.len() - wanted] {
                let gone = object::name(pod);
                api.delete(ctx, named("Pod"), namespace, gone, &DeleteOptions::default())?;
                event(api, ctx, &set, false, "SuccessfulDelete", &format!("Deleted pod: {gone}"));
            }
        }
        let min_ready = int(&set, "/spec/minReadySeconds").unwrap_or(0);
        let mine = owned(api, named("Pod"), &set);
        let (mut total, mut ready, mut available) = (0, 0, 0);
        for pod in mine.iter().filter(|pod| pods::active(pod)) {
            total += 1;
            ready += i64::from(pods::ready(pod));
            match pods::available(pod, min_ready, ctx.now) {
                Ok(()) => available += 1,
                Err(Some(seconds)) => again = again.or(Some(Duration::from_secs(seconds.max(1) as u64))),
                Err(None) => {}
            }
        }
        let status = json!({
            "replicas": total, "fullyLabeledReplicas": total, "readyReplicas": ready, "availableReplicas": available,
            "observedGeneration": int(&set, "/metadata/generation").unwrap_or(1),
        });
        set_status(api, ctx, kind, &set, status)?;
        Ok(again)
    }
}

/// Matching pods that nobody controls are taken over; controlled ones that do
/// not match any more are let go.
fn adopt(api: &Registry, ctx: &Ctx, set: &Value) -> Result<(), ApiError> {
    let Some(Ok(selector)) = set.pointer("/spec/selector").map(Labels::from_object) else { return Ok(()) };
    for pod in api.within(named("Pod"), object::namespace(set)) {
        let matches = selector.matches(object::labels(&pod));
        let owner = object::controller(&pod).map(|(_, _, uid)| uid);
        let change: fn(&mut Vec<Value>, &Value) = match owner {
            None if matches && pods::active(&pod) => |references, set| references.push(object::controlled_by(set)),
            Some(uid) if uid == object::uid(set) && !matches => {
                |references, set| references.retain(|r| object::text(r, "/uid") != object::uid(set))
            }
            _ => continue,
        };
        api.modify(ctx, named("Pod"), (object::namespace(&pod), object::name(&pod)), Sub::Main, |pod| {
            let references = object::metadata(pod).entry("ownerReferences").or_insert_with(|| json!([]));
            if let Value::Array(references) = references {
                change(references, set);
            }
            true
        })?;
    }
    Ok(())
}
