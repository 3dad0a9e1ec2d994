//! The watches of Services and EndpointSlices.
//!
//! Owner: ClusterWatch. Objects are converted as they come, page by page, and
//! dropped; what is kept is in the index that ServiceMap reads. One that cannot
//! be is noted there, and what was known of it stands.

use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DeserializeGuard;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};

use super::watches::{listed, stream};
use super::{Config, Health};
use crate::service::convert::{self, Names};
use crate::service::index::{Index, Kind};
use crate::service::problem::Reason;

/// Objects in one page of a list: what is in memory at a time beside the index.
const PAGE: u32 = 250;
/// Slices of Services that have no address of their own are the most there are
/// in some clusters, and nobody here asks for them.
const SLICES: &str = "kubernetes.io/service-name,!service.kubernetes.io/headless";

pub(super) fn paged(config: &Config) -> watcher::Config {
    listed(config, watcher::Config::default()).page_size(PAGE)
}

/// Runs as long as the actor.
pub(super) async fn services(client: Client, config: Arc<Config>, index: Index, health: Arc<Health>) {
    let mut events = std::pin::pin!(stream::<Service>(Api::all(client), paged(&config)));
    let mut names = Names::default();
    while let Some(item) = events.next().await {
        let Some(event) = health.seen("services", item) else { continue };
        match event {
            Event::Init => index.list_begins(Kind::Services),
            Event::InitDone => index.list_ends(Kind::Services),
            Event::InitApply(guard) | Event::Apply(guard) => service(guard, &mut names, &index),
            Event::Delete(guard) => {
                if let Some(name) = convert::name(&meta(guard), &mut names) {
                    index.service(name, None);
                }
            }
        }
    }
}

pub(super) fn meta<K: kube::Resource<DynamicType = ()>>(guard: DeserializeGuard<K>) -> ObjectMeta {
    guard.0.map_or_else(|invalid| invalid.metadata, |mut object| std::mem::take(object.meta_mut()))
}

pub(super) fn meta_of<K: kube::Resource<DynamicType = ()>>(guard: &DeserializeGuard<K>) -> &ObjectMeta {
    match &guard.0 {
        Ok(object) => object.meta(),
        Err(invalid) => &invalid.metadata,
    }
}

fn service(guard: DeserializeGuard<Service>, names: &mut Names, index: &Index) {
    let meta = meta_of(&guard);
    let Some(name) = convert::name(meta, names) else { return };
    let uid = meta.uid.clone().unwrap_or_default();
    let converted = match guard.0 {
        Ok(object) => convert::service(object, names).map_err(|e| e.to_string()),
        Err(invalid) => Err(invalid.error),
    };
    match converted {
        Ok(service) => index.service(name, service),
        Err(why) => index.refused(Reason::InvalidService, name, &uid, &why),
    }
}

/// Runs as long as the actor.
pub(super) async fn slices(client: Client, config: Arc<Config>, index: Index, health: Arc<Health>) {
    let mut events = std::pin::pin!(stream::<EndpointSlice>(Api::all(client), paged(&config).labels(SLICES)));
    let mut names = Names::default();
    while let Some(item) = events.next().await {
        let Some(event) = health.seen("endpointslices", item) else { continue };
        match event {
            Event::Init => index.list_begins(Kind::Slices),
            Event::InitDone => index.list_ends(Kind::Slices),
            Event::InitApply(guard) | Event::Apply(guard) => slice(guard, &mut names, &index),
            Event::Delete(guard) => {
                if let Some(name) = convert::name(&meta(guard), &mut names) {
                    index.slice(name, None);
                }
            }
        }
    }
}

fn slice(guard: DeserializeGuard<EndpointSlice>, names: &mut Names, index: &Index) {
    let (meta, converted) = match guard.0 {
        Ok(mut object) => {
            let meta = std::mem::take(&mut object.metadata);
            (meta, convert::slice(object, names).map_err(|e| e.to_string()))
        }
        Err(invalid) => (invalid.metadata, Err(invalid.error)),
    };
    let Some(name) = convert::name(&meta, names) else { return };
    let Some(of) = convert::slice_owner(&meta, names) else { return index.slice(name, None) };
    match converted {
        Ok(slice) => index.slice(name, slice.map(|slice| (of, slice))),
        Err(why) => index.refused(Reason::InvalidEndpoints, name, &meta.uid.unwrap_or_default(), &why),
    }
}
