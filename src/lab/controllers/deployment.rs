//! Deployment → ReplicaSets: one per template, rolled over within the bounds
//! of `maxSurge` and `maxUnavailable`.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Controller, Key, Queue, controller_key, event, key, owned, pods, set_status, with_condition};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, annotation, flag, int, map_mut, text};
use crate::lab::kube::registry::{Ctx, DeleteOptions, Registry, Sub, WatchEvent};

pub struct Deployments;

const HASH: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";

impl Controller for Deployments {
    const NAME: &'static str = "deployment-controller";
    type Key = Key;

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![named("Deployment"), named("ReplicaSet"), named("Pod")]
    }

    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<Key>) {
        let Some(object) = event.object() else { return };
        match (kind.kind, event) {
            ("Deployment", _) => queue.add(key(object)),
            ("ReplicaSet", _) => {
                if let Some(owner) = controller_key(object, "Deployment") {
                    queue.add(owner);
                }
            }
            // `Recreate` waits for the last old pod. The ReplicaSet's name is
            // the Deployment's and one more word.
            ("Pod", WatchEvent::Deleted(_)) => {
                if let Some((namespace, set)) = controller_key(object, "ReplicaSet")
                    && let Some((deployment, _)) = set.rsplit_once('-')
                {
                    queue.add((namespace, deployment.to_owned()));
                }
            }
            _ => {}
        }
    }

    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, (namespace, name): &Key) -> Result<Option<Duration>, ApiError> {
        let Some(deployment) = api.find(named("Deployment"), namespace, name) else { return Ok(None) };
        if object::deleting(&deployment) {
            return Ok(None);
        }
        let mut sets = owned(api, named("ReplicaSet"), &deployment);
        sets.sort_by_key(|set| revision(set));
        let current = sets.iter().position(|set| same_template(&deployment, set));
        if !flag(&deployment, "/spec/paused") || current.is_some() {
            let new = match current {
                Some(at) => renew(api, ctx, sets.remove(at), &sets)?,
                None => create(api, ctx, &deployment, &sets)?,
            };
            roll(api, ctx, &deployment, &new, &sets)?;
            mark(api, ctx, &deployment, &new)?;
            forget(api, ctx, &deployment, &sets)?;
        }
        report(api, ctx, &deployment)
    }
}

fn revision(set: &Value) -> i64 {
    annotation(set, REVISION).parse().unwrap_or(0)
}

fn replicas(object: &Value) -> i64 {
    int(object, "/spec/replicas").unwrap_or(1)
}

/// Available pods that are to stay: the status may not know yet of a size that
/// was just reduced.
fn available(set: &Value) -> i64 {
    int(set, "/status/availableReplicas").unwrap_or(0).min(replicas(set))
}

fn same_template(deployment: &Value, set: &Value) -> bool {
    let hash = set.pointer("/spec/template/metadata/labels").and_then(|l| l.get(HASH)).and_then(Value::as_str);
    let Some(template) = deployment.pointer("/spec/template") else { return false };
    set.pointer("/spec/template") == Some(&pods::labelled(template, HASH, hash.unwrap_or("")))
}

fn create(api: &Registry, ctx: &Ctx, deployment: &Value, old: &[Arc<Value>]) -> Result<Arc<Value>, ApiError> {
    let template = deployment.pointer("/spec/template").cloned().unwrap_or_default();
    let collisions = int(deployment, "/status/collisionCount").unwrap_or(0);
    let hash = object::letters(object::hash(&json!([template, collisions])), 10);
    let next = old.iter().map(|set| revision(set)).max().unwrap_or(0) + 1;
    let mut selector = deployment.pointer("/spec/selector").cloned().unwrap_or_default();
    map_mut(&mut selector, &["matchLabels"]).insert(HASH.into(), hash.clone().into());
    let template = pods::labelled(&template, HASH, &hash);
    let mut notes = object::map(deployment, "/metadata/annotations").cloned().unwrap_or_default();
    notes.remove("kubectl.kubernetes.io/last-applied-configuration");
    notes.insert(REVISION.into(), next.to_string().into());
    let set = json!({
        "metadata": {
            "name": format!("{}-{hash}", object::name(deployment)),
            "labels": template.pointer("/metadata/labels"), "annotations": notes,
            "ownerReferences": [object::controlled_by(deployment)],
        },
        "spec": {"replicas": 0, "selector": selector, "template": template,
                 "minReadySeconds": int(deployment, "/spec/minReadySeconds").unwrap_or(0)},
    });
    match api.create(ctx, named("ReplicaSet"), object::namespace(deployment), set) {
        Ok(written) => Ok(written.object),
        Err(error) => {
            if error.reason == "AlreadyExists" {
                // Another template, or another owner, has this name.
                let status = json!({"collisionCount": collisions + 1});
                set_status(api, ctx, named("Deployment"), deployment, status)?;
            }
            Err(error)
        }
    }
}

/// A set that is current again, after a roll back, is the newest revision.
fn renew(api: &Registry, ctx: &Ctx, set: Arc<Value>, others: &[Arc<Value>]) -> Result<Arc<Value>, ApiError> {
    let newest = others.iter().map(|set| revision(set)).max().unwrap_or(0);
    if revision(&set) > newest {
        return Ok(set);
    }
    let key = (object::namespace(&set), object::name(&set));
    let changed = api.modify(ctx, named("ReplicaSet"), key, Sub::Main, |set| {
        map_mut(set, &["metadata", "annotations"]).insert(REVISION.into(), (newest + 1).to_string().into());
        true
    })?;
    Ok(changed.unwrap_or(set))
}

fn scale(api: &Registry, ctx: &Ctx, deployment: &Value, set: &Value, to: i64) -> Result<(), ApiError> {
    let from = replicas(set);
    if from == to {
        return Ok(());
    }
    let key = (object::namespace(set), object::name(set));
    api.modify(ctx, named("ReplicaSet"), key, Sub::Main, |set| {
        object::set(set, &["spec", "replicas"], to);
        true
    })?;
    let way = if to > from { "up" } else { "down" };
    let message = format!("Scaled {way} replica set {} from {from} to {to}", object::name(set));
    event(api, ctx, deployment, false, "ScalingReplicaSet", &message);
    Ok(())
}

fn roll(api: &Registry, ctx: &Ctx, deployment: &Value, new: &Value, old: &[Arc<Value>]) -> Result<(), ApiError> {
    let wanted = replicas(deployment);
    if text(deployment, "/spec/strategy/type") == "Recreate" {
        for set in old {
            scale(api, ctx, deployment, set, 0)?;
        }
        let left = old.iter().any(|set| !owned(api, named("Pod"), set).iter().all(|pod| pods::finished(pod)));
        return if left { Ok(()) } else { scale(api, ctx, deployment, new, wanted) };
    }
    let steps = plan(deployment, new, old);
    scale(api, ctx, deployment, new, steps.new)?;
    for (set, to) in old.iter().zip(steps.old) {
        scale(api, ctx, deployment, set, to)?;
    }
    Ok(())
}

/// The next sizes in a rolling update.
#[derive(Debug, PartialEq, Eq)]
pub struct Steps {
    pub new: i64,
    pub old: Vec<i64>,
}

/// Pure: as many new pods as the surge allows, as few old ones as availability
/// allows; broken old pods go first.
pub fn plan(deployment: &Value, new: &Value, old: &[Arc<Value>]) -> Steps {
    let wanted = replicas(deployment);
    let rolling = deployment.pointer("/spec/strategy/rollingUpdate");
    let surge = pods::share(rolling.and_then(|r| r.get("maxSurge")), wanted, true);
    let mut missing = pods::share(rolling.and_then(|r| r.get("maxUnavailable")), wanted, false);
    if surge == 0 && missing == 0 {
        missing = 1;
    }
    let missing = missing.min(wanted);
    let mut sizes: Vec<i64> = old.iter().map(|set| replicas(set)).collect();
    let before = replicas(new);
    let total = before + sizes.iter().sum::<i64>();
    let room = (wanted + surge - total).max(0);
    let grown = if before >= wanted { wanted } else { (before + room).min(wanted) };

    let least = wanted - missing;
    let total = before + sizes.iter().sum::<i64>();
    let starting = (before - available(new)).max(0);
    let mut budget = (total - least - starting).max(0);
    if budget == 0 {
        return Steps { new: grown, old: sizes };
    }
    for (size, set) in sizes.iter_mut().zip(old) {
        let broken = (*size - available(set)).max(0).min(budget);
        *size -= broken;
        budget -= broken;
    }
    let up: i64 = available(new) + old.iter().map(|set| available(set)).sum::<i64>();
    let mut spare = (up - least).max(0);
    for (size, set) in sizes.iter_mut().zip(old) {
        let gone = (*size).min(available(set)).min(spare);
        *size -= gone;
        spare -= gone;
    }
    Steps { new: grown, old: sizes }
}

/// The Deployment shows its newest revision.
fn mark(api: &Registry, ctx: &Ctx, deployment: &Value, new: &Value) -> Result<(), ApiError> {
    let number = annotation(new, REVISION).to_owned();
    if annotation(deployment, REVISION) == number {
        return Ok(());
    }
    let key = (object::namespace(deployment), object::name(deployment));
    api.modify(ctx, named("Deployment"), key, Sub::Main, |deployment| {
        map_mut(deployment, &["metadata", "annotations"]).insert(REVISION.into(), number.into());
        true
    })?;
    Ok(())
}

fn forget(api: &Registry, ctx: &Ctx, deployment: &Value, old: &[Arc<Value>]) -> Result<(), ApiError> {
    let keep = int(deployment, "/spec/revisionHistoryLimit").unwrap_or(10).max(0) as usize;
    let idle: Vec<_> =
        old.iter().filter(|set| replicas(set) == 0 && int(set, "/status/replicas").unwrap_or(0) == 0).collect();
    for set in idle.iter().take(idle.len().saturating_sub(keep)) {
        api.delete(ctx, named("ReplicaSet"), object::namespace(set), object::name(set), &DeleteOptions::default())?;
    }
    Ok(())
}

fn report(api: &Registry, ctx: &Ctx, deployment: &Value) -> Result<Option<Duration>, ApiError> {
    let sets = owned(api, named("ReplicaSet"), deployment);
    let sum = |pointer: &str| sets.iter().map(|set| int(set, pointer).unwrap_or(0)).sum::<i64>();
    let wanted = replicas(deployment);
    let total = sum("/status/replicas");
    let available = sum("/status/availableReplicas");
    let updated = sets
        .iter()
        .filter(|set| same_template(deployment, set))
        .map(|set| int(set, "/status/replicas").unwrap_or(0))
        .sum::<i64>();
    let rolling = deployment.pointer("/spec/strategy/rollingUpdate/maxUnavailable");
    let enough = available >= wanted - pods::share(rolling, wanted, false);
    let (reason, message) = match enough {
        true => ("MinimumReplicasAvailable", "Deployment has minimum availability."),
        false => ("MinimumReplicasUnavailable", "Deployment does not have minimum availability."),
    };
    let mut shown = deployment.clone();
    shown["status"]["conditions"] = with_condition(deployment, "Available", enough, reason, message, ctx);
    let done = updated == wanted && total == wanted && available == wanted;
    let (reason, message) = match done {
        true => ("NewReplicaSetAvailable", "The newest ReplicaSet has successfully progressed."),
        false => ("ReplicaSetUpdated", "The newest ReplicaSet is progressing."),
    };
    let status = json!({
        "observedGeneration": int(deployment, "/metadata/generation").unwrap_or(1),
        "replicas": total, "updatedReplicas": updated, "readyReplicas": sum("/status/readyReplicas"),
        "availableReplicas": available, "unavailableReplicas": (wanted.max(total) - available).max(0),
        "conditions": with_condition(&shown, "Progressing", true, reason, message, ctx),
    });
    set_status(api, ctx, named("Deployment"), deployment, status)?;
    Ok(None)
}
