//! What cleans up: dependents of what is gone, namespaces on their way out,
//! pods of nodes that left, events past their time. It also gives each new
//! namespace its default ServiceAccount.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Controller, Queue};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{self, KINDS, Kind, named};
use crate::lab::kube::object::{self, flag, list, text};
use crate::lab::kube::registry::{Ctx, DeleteOptions, Filter, Registry, Sub, WatchEvent};

/// How long events are kept, as in a real cluster.
const EVENT_AGE: i64 = 3600;
const SWEEP: Duration = Duration::from_secs(60);
/// A namespace is emptied this long after its deletion: who deletes a manifest
/// deletes what is in the namespace, too, and should find it.
const NAMESPACE_GRACE: Duration = Duration::from_secs(1);

/// Kind (by table), namespace, name.
type Place = (usize, String, String);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// Are this object's owners still there?
    Dependent(Place),
    /// Is this object waiting for its dependents?
    Owner(Place),
    Namespace(String),
    LostNode(String),
    Sweep,
}

#[derive(Default)]
pub struct Collector {
    /// Owner's uid → what refers to it.
    dependents: BTreeMap<String, BTreeSet<Place>>,
    terminating: BTreeSet<String>,
    /// Those of them whose grace is over.
    emptied: BTreeSet<String>,
    sweeping: bool,
}

fn place(kind: &Kind, object: &Value) -> Place {
    (kind.index(), object::namespace(object).to_owned(), object::name(object).to_owned())
}

impl Controller for Collector {
    const NAME: &'static str = "garbage-collector";
    type Key = Task;

    fn kinds(&self) -> Vec<&'static Kind> {
        KINDS.iter().filter(|kind| kind.kind != "Event").collect()
    }

    fn reset(&mut self) {
        *self = Self { sweeping: self.sweeping, ..Self::default() };
    }

    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<Task>) {
        let Some(object) = event.object() else { return };
        let here = place(kind, object);
        if !self.sweeping {
            self.sweeping = true;
            queue.add_after(Task::Sweep, SWEEP);
        }
        let gone = matches!(event, WatchEvent::Deleted(_));
        for owner in list(object, "/metadata/ownerReferences") {
            let known = self.dependents.entry(text(owner, "/uid").to_owned()).or_default();
            if gone {
                known.remove(&here);
                if let Some(owner) = owner_place(owner, object::namespace(object)) {
                    queue.add(Task::Owner(owner));
                }
            } else if known.insert(here.clone()) {
                queue.add(Task::Dependent(here.clone()));
            }
        }
        if gone {
            for dependent in self.dependents.remove(object::uid(object)).unwrap_or_default() {
                queue.add(Task::Dependent(dependent));
            }
            let space = object::namespace(object);
            if self.terminating.contains(space) && self.emptied.contains(space) {
                queue.add(Task::Namespace(space.to_owned()));
            }
        } else if object::deleting(object) && !list(object, "/metadata/finalizers").is_empty() {
            queue.add(Task::Owner(here));
        }
        match kind.kind {
            "Namespace" => {
                let name = object::name(object).to_owned();
                match (gone, object::deleting(object)) {
                    (true, _) => {
                        self.terminating.remove(&name);
                        self.emptied.remove(&name);
                    }
                    (false, false) => queue.add(Task::Namespace(name)),
                    (false, true) => {
                        queue.add_after(Task::Namespace(name.clone()), NAMESPACE_GRACE);
                        self.terminating.insert(name);
                    }
                }
            }
            "Node" if gone => queue.add(Task::LostNode(object::name(object).to_owned())),
            _ => {}
        }
    }

    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, task: &Task) -> Result<Option<Duration>, ApiError> {
        match task {
            Task::Dependent(place) => dependent(api, ctx, place).map(|()| None),
            Task::Owner(place) => self.owner(api, ctx, place).map(|()| None),
            Task::Namespace(name) => {
                if self.terminating.contains(name) {
                    self.emptied.insert(name.clone());
                }
                namespace(api, ctx, name).map(|()| None)
            }
            Task::LostNode(name) => lost_node(api, ctx, name).map(|()| None),
            Task::Sweep => {
                sweep(api, ctx);
                Ok(Some(SWEEP))
            }
        }
    }
}

/// Where an owner reference points; none for kinds the lab does not have.
fn owner_place(reference: &Value, namespace: &str) -> Option<Place> {
    let kind = kind::by_gvk(text(reference, "/apiVersion"), text(reference, "/kind"))?;
    let namespace = if kind.namespaced { namespace } else { "" };
    Some((kind.index(), namespace.to_owned(), text(reference, "/name").to_owned()))
}

/// Deleted, or gone already.
fn remove(api: &Registry, ctx: &Ctx, place: &Place, options: &DeleteOptions) -> Result<(), ApiError> {
    match api.delete(ctx, &KINDS[place.0], &place.1, &place.2, options) {
        Err(error) if error.code == 404 => Ok(()),
        // Replaced by a namesake since: that one is none of ours.
        Err(error) if error.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

fn dependent(api: &Registry, ctx: &Ctx, place: &Place) -> Result<(), ApiError> {
    let Some(object) = api.find(&KINDS[place.0], &place.1, &place.2) else { return Ok(()) };
    let references = list(&object, "/metadata/ownerReferences");
    if references.is_empty() || object::deleting(&object) {
        return Ok(());
    }
    let mut foreground = false;
    for reference in references {
        // An owner of a kind that is not kept here cannot be judged.
        let Some((kind, namespace, name)) = owner_place(reference, &place.1) else { return Ok(()) };
        if let Some(owner) = api.find(&KINDS[kind], &namespace, &name)
            && object::uid(&owner) == text(reference, "/uid")
        {
            let waits = list(&owner, "/metadata/finalizers").iter().any(|f| f == "foregroundDeletion");
            if !(object::deleting(&owner) && waits) {
                return Ok(());
            }
            foreground = true;
        }
    }
    let options = DeleteOptions {
        propagation: foreground.then(|| "Foreground".to_owned()),
        uid: Some(object::uid(&object).to_owned()),
        ..DeleteOptions::default()
    };
    remove(api, ctx, place, &options)
}

impl Collector {
    fn owner(&self, api: &Registry, ctx: &Ctx, place: &Place) -> Result<(), ApiError> {
        let kind = &KINDS[place.0];
        let Some(owner) = api.find(kind, &place.1, &place.2) else { return Ok(()) };
        if !object::deleting(&owner) {
            return Ok(());
        }
        let waits = |finalizer: &str| list(&owner, "/metadata/finalizers").iter().any(|f| f == finalizer);
        let uid = object::uid(&owner);
        let none = BTreeSet::new();
        let dependents = self.dependents.get(uid).unwrap_or(&none);
        let release = |finalizer: &str| {
            api.modify(ctx, kind, (&place.1, &place.2), Sub::Main, |owner| {
                if let Some(Value::Array(all)) = object::metadata(owner).get_mut("finalizers") {
                    all.retain(|f| f != finalizer);
                }
                true
            })
            .map(drop)
        };
        if waits("orphan") {
            for dependent in dependents {
                let written = api.modify(ctx, &KINDS[dependent.0], (&dependent.1, &dependent.2), Sub::Main, |object| {
                    if let Some(Value::Array(all)) = object::metadata(object).get_mut("ownerReferences") {
                        all.retain(|r| text(r, "/uid") != uid);
                    }
                    true
                });
                if let Err(error) = written
                    && error.code != 404
                {
                    return Err(error);
                }
            }
            return release("orphan");
        }
        if waits("foregroundDeletion") {
            let mut blocked = false;
            for at in dependents {
                let Some(object) = api.find(&KINDS[at.0], &at.1, &at.2) else { continue };
                blocked |= list(&object, "/metadata/ownerReferences")
                    .iter()
                    .any(|r| text(r, "/uid") == uid && flag(r, "/blockOwnerDeletion"));
                dependent(api, ctx, at)?;
            }
            if !blocked {
                return release("foregroundDeletion");
            }
        }
        Ok(())
    }
}

/// A new one gets its ServiceAccount; one that ends is emptied, then released.
fn namespace(api: &Registry, ctx: &Ctx, name: &str) -> Result<(), ApiError> {
    let Some(space) = api.find(named("Namespace"), "", name) else { return Ok(()) };
    if !object::deleting(&space) {
        let accounts = named("ServiceAccount");
        if api.find(accounts, name, "default").is_none() {
            api.create(ctx, accounts, name, json!({"metadata": {"name": "default"}}))?;
        }
        return Ok(());
    }
    let mut left = 0;
    // What makes pods goes before the pods, or it would try to replace them.
    let (makers, rest): (Vec<&Kind>, Vec<&Kind>) = KINDS
        .iter()
        .filter(|kind| kind.namespaced && std::ptr::eq(kind.stored(), *kind))
        .partition(|kind| kind.scale || kind.kind == "DaemonSet");
    for kind in makers.into_iter().chain(rest) {
        for object in api.within(kind, name) {
            if !object::deleting(&object) {
                remove(api, ctx, &place(kind, &object), &DeleteOptions::default())?;
            }
        }
        left += api.within(kind, name).len();
    }
    if left == 0 {
        let freed = api.modify(ctx, named("Namespace"), ("", name), Sub::Finalize, |space| {
            object::set(space, &["spec", "finalizers"], json!([]));
            true
        });
        match freed {
            Err(error) if error.code != 404 => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn lost_node(api: &Registry, ctx: &Ctx, name: &str) -> Result<(), ApiError> {
    if api.find(named("Node"), "", name).is_some() {
        return Ok(());
    }
    for pod in api.all(named("Pod"), &Filter::default()) {
        if text(&pod, "/spec/nodeName") == name {
            remove(api, ctx, &place(named("Pod"), &pod), &DeleteOptions::grace(0))?;
        }
    }
    Ok(())
}

fn sweep(api: &Registry, ctx: &Ctx) {
    let events = named("Event");
    for event in api.all(events, &Filter::default()) {
        let last = ["/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"]
            .iter()
            .find_map(|pointer| object::time(&event, pointer));
        if last.is_some_and(|last| ctx.now.as_second() - last.as_second() > EVENT_AGE) {
            // Gone already is as good.
            let _ = remove(api, ctx, &place(events, &event), &DeleteOptions::default());
        }
    }
}
