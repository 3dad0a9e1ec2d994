//! What this node writes: Events, its own status, the Lease.
//!
//! Owner: ClusterWatch. Each is a loop of its own that ends with the actor; a
//! request that does not come back in time is given up and made again later,
//! with growing pauses while the API is away.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use governor::{Quota, RateLimiter};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use parking_lot::Mutex;
use rand::Rng as _;
use tokio::sync::{Notify, watch};

use super::election::{Election, Seen, Step};
use super::events::{Delivery, Events};
use super::status::{self, Desired};
use super::{Config, Facts, Health, Publisher};

const REQUEST: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// As kubelet renews its own conditions.
const HEARTBEAT: Duration = Duration::from_secs(300);
/// Two writers of one node's status must not race each other.
const STATUS_PAUSE: Duration = Duration::from_secs(1);

/// Why a request failed, as far as it matters here.
enum Fault {
    /// Worth making again.
    Passing(String),
    NotFound,
    Conflict,
    /// Never going to succeed.
    Final(String),
}

async fn ask<T>(patience: Duration, request: impl Future<Output = kube::Result<T>>) -> Result<T, Fault> {
    match tokio::time::timeout(patience, request).await {
        Err(_) => Err(Fault::Passing(format!("no answer within {} ms", patience.as_millis()))),
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) => Err(match status.code {
            404 => Fault::NotFound,
            409 => Fault::Conflict,
            408 | 429 | 500.. => Fault::Passing(status.message.clone()),
            _ => Fault::Final(format!("{} ({})", status.message, status.code)),
        }),
        Ok(Err(e)) => Err(Fault::Passing(e.to_string())),
    }
}

/// Longer and longer pauses, each a little different.
struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Self(FIRST_PAUSE)
    }
    async fn take(&mut self) {
        let full = self.0;
        self.0 = (full * 2).min(MAX_PAUSE);
        tokio::time::sleep(full.mul_f64(rand::rng().random_range(0.8..=1.0))).await;
    }
}

/// Events a second, and at once: thousands of nodes start pods at the same time,
/// and the API server has better to do. Warnings about one pod fold together, so
/// that what waits is of many pods.
const EVENTS_PER_SECOND: NonZeroU32 = NonZeroU32::new(20).unwrap();
const EVENTS_AT_ONCE: NonZeroU32 = NonZeroU32::new(50).unwrap();

/// Deliver the buffer, one after the other.
pub(super) async fn events(
    client: Client,
    buffer: Arc<Mutex<Events>>,
    more: Arc<Notify>,
    facts: Facts,
    health: Arc<Health>,
) {
    let mut pause = Pause::new();
    let pace = RateLimiter::direct(Quota::per_second(EVENTS_PER_SECOND).allow_burst(EVENTS_AT_ONCE));
    loop {
        let uid = facts.node.borrow().as_ref().map(|n| n.uid.clone()).unwrap_or_default();
        let Some(delivery) = buffer.lock().next(Timestamp::now(), &uid) else {
            more.notified().await;
            continue;
        };
        pace.until_ready().await;
        match (deliver(&client, &delivery).await, &delivery) {
            // It was made by an attempt whose answer got lost.
            (Ok(()), _) | (Err(Fault::Conflict), Delivery::Create { .. }) => {
                buffer.lock().delivered(Timestamp::now());
                pause = Pause::new();
            }
            (Err(Fault::NotFound), Delivery::Repeat { .. }) => buffer.lock().series_gone(),
            (Err(Fault::Passing(why)), _) => {
                health.fault("events", &why);
                pause.take().await;
            }
            (Err(Fault::Conflict), Delivery::Repeat { .. }) => pause.take().await,
            (Err(Fault::NotFound), Delivery::Create { .. }) => {
                tracing::debug!("An Event's namespace is gone");
                buffer.lock().refused();
            }
            (Err(Fault::Final(why)), _) => {
                health.fault("events", &why);
                tracing::warn!(error = why, "The API refuses an Event; see the agent's RBAC for events.k8s.io");
                buffer.lock().refused();
            }
        }
    }
}

async fn deliver(client: &Client, delivery: &Delivery) -> Result<(), Fault> {
    let broken = |e: serde_json::Error| Fault::Final(e.to_string());
    match delivery {
        Delivery::Create { namespace, body } => {
            let event: Event = serde_json::from_value(body.clone()).map_err(broken)?;
            let api = Api::<Event>::namespaced(client.clone(), namespace);
            ask(REQUEST, api.create(&PostParams::default(), &event)).await.map(drop)
        }
        Delivery::Repeat { namespace, name, body } => {
            let api = Api::<Event>::namespaced(client.clone(), namespace);
            ask(REQUEST, api.patch(name, &PatchParams::default(), &Patch::Merge(body))).await.map(drop)
        }
    }
}

/// Make the node's status say what is desired, whoever else writes it.
pub(super) async fn node_status(
    client: Client,
    config: Arc<Config>,
    mut desired: watch::Receiver<Desired>,
    facts: Facts,
    health: Arc<Health>,
) {
    let api = Api::<Node>::all(client);
    let mut node = facts.node.clone();
    let mut pause = Pause::new();
    let mut beaten = Instant::now();
    loop {
        let want = desired.borrow_and_update().clone();
        let have = node.borrow_and_update().clone();
        let heartbeat = beaten.elapsed() >= HEARTBEAT;
        let patch = have.and_then(|have| status::patch(&want, &have, heartbeat, Timestamp::now()));
        if let Some(patch) = patch {
            let params = PatchParams::default();
            let patch = Patch::Strategic(patch);
            match ask(REQUEST, api.patch_status(&config.node_name, &params, &patch)).await {
                Ok(_) => {
                    pause = Pause::new();
                    beaten = Instant::now();
                    tokio::time::sleep(STATUS_PAUSE).await;
                }
                Err(fault) => {
                    health.fault("nodes/status", &words(fault));
                    pause.take().await;
                }
            }
            continue;
        }
        tokio::select! {
            changed = desired.changed() => if changed.is_err() { return },
            changed = node.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(HEARTBEAT.saturating_sub(beaten.elapsed()).max(STATUS_PAUSE)) => {}
        }
    }
}

fn words(fault: Fault) -> String {
    match fault {
        Fault::Passing(why) | Fault::Final(why) => why,
        Fault::NotFound => "not found".into(),
        Fault::Conflict => "someone else has changed it".into(),
    }
}

/// Take part in the election for as long as the actor lives.
pub(super) async fn election(client: Client, config: Arc<Config>, publisher: Publisher, health: Arc<Health>) {
    let api = Api::<Lease>::namespaced(client, &config.lease_namespace);
    let mut election = Election::new(&config.node_name, Duration::from_secs(config.lease_seconds.max(1)));
    // A publisher that ends leads no more.
    let _step_back = StepBack(publisher.leader.clone());
    loop {
        if let Err(fault) = campaign(&api, &config, &mut election).await {
            health.fault("leases", &words(fault));
        }
        let leads = election.leads(Instant::now());
        publisher.leader.send_if_modified(|was| {
            let changed = *was != leads;
            if changed {
                tracing::info!(leader = leads, "Leadership of the cluster's Fairway agents");
            }
            *was = leads;
            changed
        });
        tokio::time::sleep(election.period().mul_f64(rand::rng().random_range(0.8..=1.0))).await;
    }
}

struct StepBack(watch::Sender<bool>);

impl Drop for StepBack {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

async fn campaign(api: &Api<Lease>, config: &Config, election: &mut Election) -> Result<(), Fault> {
    let patience = election.period() / 2;
    let found = ask(patience, api.get_opt(&config.lease_name)).await?;
    let seen = found.as_ref().map(|lease| seen(lease, config));
    let sent = Instant::now();
    let step = election.decide(seen.as_ref(), sent);
    let written = match (step, found) {
        (Step::Wait, _) => return Ok(()),
        (Step::Take | Step::Renew, Some(mut lease)) => {
            // The resource version that was read goes along: a write in between
            // makes this one fail.
            let taken = step == Step::Take;
            lease.metadata.managed_fields = None;
            fill(lease.spec.get_or_insert_default(), config, taken);
            ask(patience, api.replace(&config.lease_name, &PostParams::default(), &lease)).await
        }
        (_, _) => {
            let mut lease = Lease::default();
            lease.metadata.name = Some(config.lease_name.clone());
            lease.metadata.namespace = Some(config.lease_namespace.clone());
            fill(lease.spec.get_or_insert_default(), config, true);
            ask(patience, api.create(&PostParams::default(), &lease)).await
        }
    };
    match written {
        Ok(_) => {
            election.held(sent);
            Ok(())
        }
        // Another candidate was faster.
        Err(Fault::Conflict) => Ok(()),
        Err(fault) => Err(fault),
    }
}

fn seen(lease: &Lease, config: &Config) -> Seen {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
    Seen {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: Duration::from_secs(seconds.unwrap_or(config.lease_seconds)),
        stamp: lease.metadata.resource_version.clone().unwrap_or_default(),
    }
}

fn fill(spec: &mut LeaseSpec, config: &Config, taken: bool) {
    let now = MicroTime(Timestamp::now());
    spec.holder_identity = Some(config.node_name.clone());
    spec.lease_duration_seconds = i32::try_from(config.lease_seconds).ok();
    spec.renew_time = Some(now.clone());
    if taken {
        spec.acquire_time = Some(now);
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(-1).saturating_add(1));
    }
}
