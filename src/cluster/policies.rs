//! The watches that NetworkPolicies need: of these, of all pods, of namespaces.
//!
//! Owner: ClusterWatch. Objects are converted as they come, page by page, and
//! dropped; what is kept of a pod elsewhere is its addresses, and its labels where
//! no other pod has the same. One that cannot be is noted, and what was known of it
//! stands.

use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::core::DeserializeGuard;
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use parking_lot::Mutex;

use super::services::{meta, meta_of, paged};
use super::watches::stream;
use super::{Config, Health};
use crate::policy::convert::{self, Shared};
use crate::policy::index::{Index, Kind};

/// Words that the three watches have in common.
pub(super) type Words = Arc<Mutex<Shared>>;

/// Runs as long as the actor.
pub(super) async fn policies(client: Client, config: Arc<Config>, index: Index, words: Words, health: Arc<Health>) {
    let mut events = std::pin::pin!(stream::<NetworkPolicy>(Api::all(client), paged(&config)));
    while let Some(item) = events.next().await {
        let Some(event) = health.seen("networkpolicies", item) else { continue };
        let words = &mut words.lock();
        match event {
            Event::Init => index.list_begins(Kind::Policies),
            Event::InitDone => index.list_ends(Kind::Policies),
            Event::InitApply(guard) | Event::Apply(guard) => {
                let (name, uid) = (convert::name(meta_of(&guard), words), meta_of(&guard).uid.clone());
                let Some(name) = name else { continue };
                let converted = match guard.0 {
                    Ok(object) => convert::policy(&object, words).map_err(|e| e.to_string()),
                    Err(invalid) => Err(invalid.error),
                };
                match converted {
                    Ok(policy) => index.policy(name, Some(policy)),
                    Err(why) => index.refused(Kind::Policies, name, &uid.unwrap_or_default(), &why),
                }
            }
            Event::Delete(guard) => {
                if let Some(name) = convert::name(&meta(guard), words) {
                    index.policy(name, None);
                }
            }
        }
    }
}

/// Runs as long as the actor.
pub(super) async fn pods(client: Client, config: Arc<Config>, index: Index, words: Words, health: Arc<Health>) {
    let mut events = std::pin::pin!(stream::<Pod>(Api::all(client), paged(&config)));
    while let Some(item) = events.next().await {
        let Some(event) = health.seen("all pods", item) else { continue };
        let words = &mut words.lock();
        match event {
            Event::Init => index.list_begins(Kind::Pods),
            Event::InitDone => index.list_ends(Kind::Pods),
            Event::InitApply(guard) | Event::Apply(guard) => {
                let (name, uid) = (convert::name(meta_of(&guard), words), meta_of(&guard).uid.clone());
                let Some(name) = name else { continue };
                let converted = match guard.0 {
                    Ok(object) => convert::pod(&object, words).map_err(|e| e.to_string()),
                    Err(invalid) => Err(invalid.error),
                };
                match converted {
                    Ok(pod) => index.pod(name, pod),
                    Err(why) => index.refused(Kind::Pods, name, &uid.unwrap_or_default(), &why),
                }
            }
            Event::Delete(guard) => {
                if let Some(name) = convert::name(&meta(guard), words) {
                    index.pod(name, None);
                }
            }
        }
    }
}

/// Runs as long as the actor.
pub(super) async fn namespaces(client: Client, config: Arc<Config>, index: Index, words: Words, health: Arc<Health>) {
    let mut events = std::pin::pin!(stream::<Namespace>(Api::all(client), paged(&config)));
    while let Some(item) = events.next().await {
        let Some(event) = health.seen("namespaces", item) else { continue };
        let words = &mut words.lock();
        match event {
            Event::Init => index.list_begins(Kind::Namespaces),
            Event::InitDone => index.list_ends(Kind::Namespaces),
            Event::InitApply(guard) | Event::Apply(guard) => namespace(&guard, words, &index),
            Event::Delete(guard) => {
                if let Some(name) = meta(guard).name {
                    index.namespace(words.word(&name), None);
                }
            }
        }
    }
}

fn namespace(guard: &DeserializeGuard<Namespace>, words: &mut Shared, index: &Index) {
    let meta = meta_of(guard);
    let Some(name) = &meta.name else { return };
    let name = words.word(name);
    match convert::labels(meta, words) {
        Ok(labels) => index.namespace(name, Some(labels)),
        Err(why) => {
            let uid = meta.uid.clone().unwrap_or_default();
            index.refused(
                Kind::Namespaces,
                crate::policy::model::Name { namespace: name.clone(), name },
                &uid,
                &why.to_string(),
            );
        }
    }
}
