//! Service → EndpointSlices (and the older Endpoints): who serves, where, on
//! which ports, ready or not, going or not.
//!
//! - [`slices`]: which slices there should be; pure
//!
//! Invariant: the names of a Service's slices are remembered as soon as they
//! are made, not when their event comes, so none is made twice.

pub mod slices;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Controller, Key, Queue, key};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::kind::{Kind, named};
use crate::lab::kube::object::{self, list, map, text};
use crate::lab::kube::registry::{Ctx, DeleteOptions, Registry, Sub, WatchEvent};
use crate::lab::kube::selector::Labels;
use slices::{Endpoint, Have, Wanted};

pub(super) const SERVICE: &str = "kubernetes.io/service-name";
const MANAGER: &str = "endpointslice.kubernetes.io/managed-by";
const OURS: &str = "endpointslice-controller.k8s.io";
const MIRROR: &str = "endpointslicemirroring-controller.k8s.io";
const ENDPOINTS_MANAGER: &str = "endpoints.kubernetes.io/managed-by";
const HEADLESS: &str = "service.kubernetes.io/headless";

#[derive(Default)]
pub struct EndpointsOfServices {
    selectors: HashMap<Key, Labels>,
    /// Services by one pair of their selector: a pod asks for its own labels
    /// only, not all Services.
    by_pair: HashMap<(String, String, String), BTreeSet<Key>>,
    pods: HashMap<Key, BTreeSet<Key>>,
    slices: HashMap<Key, BTreeSet<String>>,
}

impl Controller for EndpointsOfServices {
    const NAME: &'static str = "endpointslice-controller";
    type Key = Key;

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![named("EndpointSlice"), named("Service"), named("Pod"), named("Endpoints")]
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn observe(&mut self, kind: &'static Kind, event: &WatchEvent, queue: &mut Queue<Key>) {
        let Some(object) = event.object() else { return };
        let gone = matches!(event, WatchEvent::Deleted(_));
        let here = key(object);
        match kind.kind {
            "Service" => {
                self.index(&here, if gone { None } else { map(object, "/spec/selector") });
                queue.add(here);
            }
            "Pod" => {
                let now = if gone { BTreeSet::new() } else { self.services_of(object) };
                let before = self.pods.insert(here.clone(), now.clone()).unwrap_or_default();
                if gone {
                    self.pods.remove(&here);
                }
                before.union(&now).for_each(|service| queue.add(service.clone()));
            }
            "EndpointSlice" => {
                let Some(service) = service_of(object) else { return };
                let known = self.slices.entry(service.clone()).or_default();
                if gone {
                    if known.remove(object::name(object)) {
                        queue.add(service);
                    }
                } else {
                    known.insert(object::name(object).to_owned());
                }
            }
            // By hand, for a Service without a selector.
            _ => {
                let label = |key: &str| object::labels(object).and_then(|l| l.get(key));
                if label(ENDPOINTS_MANAGER).is_none() {
                    queue.add(here);
                }
            }
        }
    }

    fn reconcile(&mut self, api: &Registry, ctx: &Ctx, key: &Key) -> Result<Option<Duration>, ApiError> {
        let (namespace, name) = key;
        let endpoints = api.find(named("Endpoints"), namespace, name);
        let managed = |e: &Value| object::labels(e).is_some_and(|l| l.contains_key(ENDPOINTS_MANAGER));
        let service = api.find(named("Service"), namespace, name).filter(|s| !object::deleting(s));
        let Some(service) = service else {
            self.slices.remove(key);
            if endpoints.is_some_and(|e| managed(&e)) {
                gone(api.delete(ctx, named("Endpoints"), namespace, name, &DeleteOptions::default()))?;
            }
            return Ok(None);
        };
        if text(&service, "/spec/type") == "ExternalName" {
            return Ok(None);
        }
        let (wanted, manager) = match map(&service, "/spec/selector").filter(|s| !s.is_empty()) {
            Some(selector) => {
                let selector = Labels::exact(selector);
                let mut pods = api.within(named("Pod"), namespace);
                pods.retain(|pod| selector.matches(object::labels(pod)));
                let zones = zones(api, &pods);
                self.write_endpoints(api, ctx, &service, &pods)?;
                (slices::from_pods(&service, &pods, &zones), OURS)
            }
            None => match endpoints.filter(|e| !managed(e)) {
                Some(endpoints) => (slices::from_endpoints(&endpoints), MIRROR),
                None if self.slices.get(key).is_none_or(BTreeSet::is_empty) => return Ok(None),
                None => (Vec::new(), MIRROR),
            },
        };
        self.write_slices(api, ctx, &service, wanted, manager)?;
        Ok(None)
    }
}

/// Deleted now or before.
fn gone<T>(result: Result<T, ApiError>) -> Result<(), ApiError> {
    match result {
        Err(error) if error.code == 404 => Ok(()),
        other => other.map(drop),
    }
}

/// The Service of a slice that this controller made.
fn service_of(slice: &Value) -> Option<Key> {
    let labels = object::labels(slice)?;
    let word = |key: &str| labels.get(key).and_then(Value::as_str);
    matches!(word(MANAGER), Some(OURS | MIRROR)).then_some(())?;
    Some((object::namespace(slice).to_owned(), word(SERVICE)?.to_owned()))
}

fn zones(api: &Registry, pods: &[Arc<Value>]) -> BTreeMap<String, String> {
    let names: BTreeSet<&str> = pods.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
    let zone = |name: &str| {
        let node = api.find(named("Node"), "", name)?;
        let zone = object::labels(&node)?.get("topology.kubernetes.io/zone")?.as_str()?.to_owned();
        Some((name.to_owned(), zone))
    };
    names.into_iter().filter_map(zone).collect()
}

impl EndpointsOfServices {
    fn index(&mut self, service: &Key, selector: Option<&serde_json::Map<String, Value>>) {
        let pair = |labels: &Labels| {
            let first = labels.requirements().first()?;
            let value = match &first.test {
                crate::lab::kube::selector::Test::In(values) => values.first()?.clone(),
                _ => return None,
            };
            Some((service.0.clone(), first.key.clone(), value))
        };
        if let Some(old) = self.selectors.remove(service)
            && let Some(pair) = pair(&old)
            && let Some(services) = self.by_pair.get_mut(&pair)
        {
            services.remove(service);
        }
        let Some(selector) = selector.filter(|s| !s.is_empty()) else { return };
        let labels = Labels::exact(selector);
        if let Some(pair) = pair(&labels) {
            self.by_pair.entry(pair).or_default().insert(service.clone());
        }
        self.selectors.insert(service.clone(), labels);
    }

    fn services_of(&self, pod: &Value) -> BTreeSet<Key> {
        let labels = object::labels(pod);
        let namespace = object::namespace(pod);
        labels
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| {
                self.by_pair.get(&(namespace.to_owned(), key.clone(), value.as_str()?.to_owned()))
            })
            .flatten()
            .filter(|service| self.selectors.get(*service).is_some_and(|s| s.matches(labels)))
            .cloned()
            .collect()
    }

    fn write_slices(
        &mut self,
        api: &Registry,
        ctx: &Ctx,
        service: &Value,
        wanted: Vec<Wanted>,
        manager: &str,
    ) -> Result<(), ApiError> {
        let kind = named("EndpointSlice");
        let key = key(service);
        let namespace = &key.0;
        let known = self.slices.entry(key.clone()).or_default();
        let stored: Vec<Arc<Value>> = known.iter().filter_map(|name| api.find(kind, namespace, name)).collect();
        let have: Vec<Have> = stored
            .iter()
            .map(|slice| Have {
                name: object::name(slice).to_owned(),
                family: text(slice, "/addressType").to_owned(),
                ports: list(slice, "/ports").to_vec(),
                endpoints: list(slice, "/endpoints").to_vec(),
            })
            .collect();
        let plan = slices::arrange(&have, wanted);
        let mut labels = object::labels(service).cloned().unwrap_or_default();
        labels.insert(SERVICE.into(), key.1.clone().into());
        labels.insert(MANAGER.into(), manager.into());
        if text(service, "/spec/clusterIP") == "None" {
            labels.insert(HEADLESS.into(), "".into());
        }
        for slice in plan.write {
            let endpoints: Vec<Value> = slice.endpoints.into_iter().map(|Endpoint(value)| value).collect();
            let Some(name) = slice.name else {
                let object = json!({
                    "metadata": {"generateName": format!("{}-", key.1), "labels": labels,
                                 "ownerReferences": [object::controlled_by(service)]},
                    "addressType": slice.family, "ports": slice.ports, "endpoints": endpoints,
                });
                let made = api.create(ctx, kind, namespace, object)?;
                known.insert(object::name(&made.object).to_owned());
                continue;
            };
            api.modify(ctx, kind, (namespace, &name), Sub::Main, |object| {
                object["ports"] = slice.ports.clone().into();
                object["endpoints"] = endpoints.into();
                object["metadata"]["labels"] = labels.clone().into();
                true
            })?;
        }
        for name in plan.delete {
            known.remove(&name);
            gone(api.delete(ctx, kind, namespace, &name, &DeleteOptions::default()))?;
        }
        Ok(())
    }

    fn write_endpoints(&self, api: &Registry, ctx: &Ctx, service: &Value, pods: &[Arc<Value>]) -> Result<(), ApiError> {
        let kind = named("Endpoints");
        let (namespace, name) = (object::namespace(service), object::name(service));
        let subsets = slices::subsets(service, pods);
        let mut labels = object::labels(service).cloned().unwrap_or_default();
        labels.insert(ENDPOINTS_MANAGER.into(), "endpoint-controller".into());
        if api.find(kind, namespace, name).is_none() {
            let object = json!({"metadata": {"name": name, "labels": labels}, "subsets": subsets});
            return api.create(ctx, kind, namespace, object).map(drop);
        }
        let written = api.modify(ctx, kind, (namespace, name), Sub::Main, |object| {
            object["subsets"] = subsets.into();
            object["metadata"]["labels"] = labels.into();
            true
        });
        gone(written)
    }
}
