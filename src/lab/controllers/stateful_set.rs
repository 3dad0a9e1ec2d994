//! StatefulSet → Pods with ordinals: the same name comes back after its pod is
//! gone; changes go from the highest ordinal down, one at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Controller, Key, Queue, controller_key, event, key, owned, pods, set_status};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, int, list, map_mut, text};
use crate::lab::kube::registry::{Ctx, DeleteOptions, Registry, WatchEvent};

pub struct StatefulSets;

const REVISION: &str = "controller-revision-hash";

impl Controller for StatefulSets {
    const NAME: &'static str = "statefulset-controller";
    type Key = Key;

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![named("StatefulSet"), named("Pod")]
    }

    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<Key>) {
        let Some(object) = event.object() else { return };
        if kind.kind == "StatefulSet" {
            queue.add(key(object));
        } else if let Some(owner) = controller_key(object, "StatefulSet") {
            queue.add(owner);
        }
    }

    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, (namespace, name): &Key) -> Result<Option<Duration>, ApiError> {
        let kind = named("StatefulSet");
        let Some(set) = api.find(kind, namespace, name) else { return Ok(None) };
        if object::deleting(&set) {
            return Ok(None);
        }
        let update = revision(api, ctx, &set)?;
        let mut current = text(&set, "/status/currentRevision").to_owned();
        if current.is_empty() {
            current.clone_from(&update);
        }
        let again = self.step(api, ctx, &set, &current, &update)?;
        self.report(api, ctx, &set, &current, &update)?;
        Ok(again)
    }
}

fn ordinal(set: &Value, pod: &Value) -> Option<i64> {
    object::name(pod).strip_prefix(object::name(set))?.strip_prefix('-')?.parse().ok()
}

/// First ordinal, and one past the last.
fn range(set: &Value) -> (i64, i64) {
    let start = int(set, "/spec/ordinals/start").unwrap_or(0);
    (start, start + int(set, "/spec/replicas").unwrap_or(1).max(0))
}

/// The revision of the present template, recorded.
fn revision(api: &Registry, ctx: &Ctx, set: &Value) -> Result<String, ApiError> {
    let kind = named("ControllerRevision");
    let template = set.pointer("/spec/template").cloned().unwrap_or_default();
    let name = format!("{}-{}", object::name(set), object::letters(object::hash(&template), 10));
    let namespace = object::namespace(set);
    if api.find(kind, namespace, &name).is_some() {
        return Ok(name);
    }
    let next = owned(api, kind, set).iter().filter_map(|r| int(r, "/revision")).max().unwrap_or(0) + 1;
    let record = json!({
        "metadata": {"name": name, "labels": set.pointer("/spec/selector/matchLabels"),
                     "ownerReferences": [object::controlled_by(set)]},
        "data": {"spec": {"template": template}}, "revision": next,
    });
    api.create(ctx, kind, namespace, record)?;
    Ok(name)
}

impl StatefulSets {
    /// The one next thing to do.
    fn step(
        &self,
        api: &Registry,
        ctx: &Ctx,
        set: &Value,
        current: &str,
        update: &str,
    ) -> Result<Option<Duration>, ApiError> {
        let pods_kind = named("Pod");
        let namespace = object::namespace(set);
        let ordered = text(set, "/spec/podManagementPolicy") != "Parallel";
        let min_ready = int(set, "/spec/minReadySeconds").unwrap_or(0);
        let partition = int(set, "/spec/updateStrategy/rollingUpdate/partition").unwrap_or(0);
        let (start, end) = range(set);
        let have: BTreeMap<i64, Arc<Value>> = owned(api, pods_kind, set)
            .into_iter()
            .filter_map(|pod| ordinal(set, &pod).map(|number| (number, pod)))
            .collect();
        let remove = |pod: &Value| -> Result<(), ApiError> {
            let name = object::name(pod);
            api.delete(ctx, pods_kind, namespace, name, &DeleteOptions::default())?;
            let message = format!("delete Pod {name} in StatefulSet {} successful", object::name(set));
            event(api, ctx, set, false, "SuccessfulDelete", &message);
            Ok(())
        };
        for number in start..end {
            let healthy = match have.get(&number) {
                None => {
                    // Below the partition the old template still holds.
                    let revision = if number - start < partition { current } else { update };
                    self.make(api, ctx, set, number, revision)?;
                    false
                }
                Some(pod) if pods::finished(pod) && !object::deleting(pod) => {
                    remove(pod)?;
                    false
                }
                Some(pod) if object::deleting(pod) => false,
                Some(pod) => match pods::available(pod, min_ready, ctx.now) {
                    Ok(()) => true,
                    Err(Some(seconds)) if ordered => return Ok(Some(Duration::from_secs(seconds.max(1) as u64))),
                    Err(_) => false,
                },
            };
            if ordered && !healthy {
                return Ok(None);
            }
        }
        for (_, pod) in have.iter().rev().filter(|(number, _)| !(start..end).contains(number)) {
            if !object::deleting(pod) {
                remove(pod)?;
            }
            if ordered {
                return Ok(None);
            }
        }
        if text(set, "/spec/updateStrategy/type") != "RollingUpdate" {
            return Ok(None);
        }
        for number in ((start + partition).min(end)..end).rev() {
            let Some(pod) = have.get(&number) else { return Ok(None) };
            let old = object::labels(pod).and_then(|l| l.get(REVISION)).and_then(Value::as_str) != Some(update);
            if old && !object::deleting(pod) {
                remove(pod)?;
                return Ok(None);
            }
            if object::deleting(pod) || !pods::ready(pod) {
                return Ok(None);
            }
        }
        Ok(None)
    }

    fn make(&self, api: &Registry, ctx: &Ctx, set: &Value, number: i64, revision: &str) -> Result<(), ApiError> {
        let namespace = object::namespace(set);
        let recorded = api.find(named("ControllerRevision"), namespace, revision);
        let template = recorded
            .as_deref()
            .and_then(|r| r.pointer("/data/spec/template"))
            .or_else(|| set.pointer("/spec/template"))
            .cloned()
            .unwrap_or_default();
        let mut pod = pods::from_template(set, &template);
        let name = format!("{}-{number}", object::name(set));
        let labels = map_mut(&mut pod, &["metadata", "labels"]);
        labels.insert(REVISION.into(), revision.into());
        labels.insert("statefulset.kubernetes.io/pod-name".into(), name.clone().into());
        labels.insert("apps.kubernetes.io/pod-index".into(), number.to_string().into());
        pod["metadata"]["name"] = name.clone().into();
        pod["spec"]["hostname"] = name.clone().into();
        let service = text(set, "/spec/serviceName");
        if !service.is_empty() {
            pod["spec"]["subdomain"] = service.into();
        }
        for claim in list(set, "/spec/volumeClaimTemplates") {
            let claim = object::name(claim);
            let volume = json!({"name": claim, "persistentVolumeClaim": {"claimName": format!("{claim}-{name}")}});
            let volumes = map_mut(&mut pod, &["spec"]).entry("volumes").or_insert_with(|| json!([]));
            if let Value::Array(volumes) = volumes {
                volumes.retain(|v| text(v, "/name") != claim);
                volumes.push(volume);
            }
        }
        api.create(ctx, named("Pod"), namespace, pod)?;
        let message = format!("create Pod {name} in StatefulSet {} successful", object::name(set));
        event(api, ctx, set, false, "SuccessfulCreate", &message);
        Ok(())
    }

    fn report(&self, api: &Registry, ctx: &Ctx, set: &Value, current: &str, update: &str) -> Result<(), ApiError> {
        let mine = owned(api, named("Pod"), set);
        let (start, end) = range(set);
        let min_ready = int(set, "/spec/minReadySeconds").unwrap_or(0);
        let count = |test: &dyn Fn(&Value) -> bool| mine.iter().filter(|pod| test(pod)).count();
        let at = |revision: &str| {
            let revision = revision.to_owned();
            move |pod: &Value| {
                pods::active(pod) && object::labels(pod).and_then(|l| l.get(REVISION)) == Some(&Value::from(&*revision))
            }
        };
        let ready = count(&|pod| pods::active(pod) && pods::ready(pod));
        let updated = count(&at(update));
        let wanted = usize::try_from(end - start).unwrap_or(0);
        // The update is complete: what was new is now current.
        let current = if updated == wanted && ready == wanted { update } else { current };
        let status = json!({
            "observedGeneration": int(set, "/metadata/generation").unwrap_or(1),
            "replicas": mine.len(), "readyReplicas": ready,
            "availableReplicas": count(&|p| pods::active(p) && pods::available(p, min_ready, ctx.now).is_ok()),
            "currentReplicas": count(&at(current)), "updatedReplicas": updated,
            "currentRevision": current, "updateRevision": update, "collisionCount": 0,
        });
        set_status(api, ctx, named("StatefulSet"), set, status)
    }
}
