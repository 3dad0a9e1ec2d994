//! The two watches: this node's pods, and the node.
//!
//! Owner: ClusterWatch. kube's watcher lists again after a cut that it cannot
//! mend and after 410 Gone, and waits longer and longer while the API is away.

use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt as _};

use super::convert;
use super::index::{Change, Index};
use super::{Config, Health, NodeInfo, PodInfo, Publisher};
use crate::model::PodKey;

pub(super) type Item<K> = watcher::Result<Event<DeserializeGuard<K>>>;

/// Between lists, should a server forget faster than we read.
const NEW_LIST_PAUSE: Duration = Duration::from_secs(1);

fn watch_config(config: &Config, field: &str) -> watcher::Config {
    listed(config, watcher::Config::default().fields(field))
}

/// How the first list is to be had.
pub(super) fn listed(config: &Config, selected: watcher::Config) -> watcher::Config {
    if config.streaming_lists { selected.streaming_lists() } else { selected }
}

/// kube's watcher, begun anew when the server answers 410 Gone to the request
/// itself: it starts over by itself only when the stream says so.
pub(super) fn stream<K>(api: Api<DeserializeGuard<K>>, config: watcher::Config) -> impl Stream<Item = Item<K>>
where
    DeserializeGuard<K>:
        kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send,
    K: 'static,
{
    let begin = move || watcher(api.clone(), config.clone()).default_backoff().boxed();
    futures::stream::unfold((begin(), begin, false), |(mut events, begin, gone)| async move {
        if gone {
            tokio::time::sleep(NEW_LIST_PAUSE).await;
            events = begin();
        }
        let item = events.next().await?;
        let gone = matches!(&item, Err(watcher::Error::WatchStartFailed(kube::Error::Api(s))) if s.code == 410);
        Some((item, (events, begin, gone)))
    })
}

/// Runs as long as the actor.
pub(super) async fn pods(client: Client, config: Arc<Config>, publisher: Publisher, health: Arc<Health>) {
    let selected = watch_config(&config, &format!("spec.nodeName={}", config.node_name));
    let mut events = std::pin::pin!(stream::<Pod>(Api::all(client), selected));
    let mut index = Index::new(|pod: &PodInfo| &pod.uid);
    while let Some(item) = events.next().await {
        let change = health.seen("pods", item).and_then(pod_change);
        if let Some(now) = change.and_then(|change| index.take(change)) {
            publisher.pods.send_replace(Some(now));
        }
    }
}

fn pod_change(event: Event<DeserializeGuard<Pod>>) -> Option<Change<PodKey, PodInfo>> {
    match event {
        Event::Init => Some(Change::ListBegins),
        Event::InitDone => Some(Change::ListEnds),
        Event::InitApply(guard) => sound(guard).and_then(convert::pod).map(|(key, pod)| Change::Listed(key, pod)),
        Event::Apply(guard) => sound(guard).and_then(convert::pod).map(|(key, pod)| Change::Applied(key, pod)),
        // A malformed pod can be deleted all the same.
        Event::Delete(guard) => {
            let meta = guard.0.map_or_else(|invalid| invalid.metadata, |pod| pod.metadata);
            convert::pod_key(&meta).map(|key| Change::Deleted(key, meta.uid.unwrap_or_default()))
        }
    }
}

/// One malformed object must not end the watch of the others.
fn sound<K: kube::Resource<DynamicType = ()>>(guard: DeserializeGuard<K>) -> Option<K> {
    let name = guard.name_any();
    guard.0.map_err(|error| tracing::warn!(kind = %K::kind(&()), name, %error, "Skipping a malformed object")).ok()
}

pub(super) async fn node(client: Client, config: Arc<Config>, publisher: Publisher, health: Arc<Health>) {
    let selected = watch_config(&config, &format!("metadata.name={}", config.node_name));
    let mut events = std::pin::pin!(stream::<Node>(Api::all(client), selected));
    let mut index = Index::new(|node: &NodeInfo| &node.uid);
    while let Some(item) = events.next().await {
        let change = health.seen("nodes", item).and_then(node_change);
        if let Some(now) = change.and_then(|change| index.take(change)) {
            let node = now.values().next().cloned();
            if node.is_none() {
                tracing::warn!(
                    node = config.node_name,
                    "The cluster has no Node of this name; check the agent's node_name"
                );
            }
            publisher.node.send_replace(node);
        }
    }
}

fn node_change(event: Event<DeserializeGuard<Node>>) -> Option<Change<(), NodeInfo>> {
    match event {
        Event::Init => Some(Change::ListBegins),
        Event::InitDone => Some(Change::ListEnds),
        Event::InitApply(guard) => sound(guard).map(|node| Change::Listed((), convert::node(node))),
        Event::Apply(guard) => sound(guard).map(|node| Change::Applied((), convert::node(node))),
        Event::Delete(_) => Some(Change::Deleted((), String::new())),
    }
}
