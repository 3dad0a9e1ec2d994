//! Engine: the account, made to happen.
//!
//! Purpose: take the core's decisions under one lock, wait as long as the real
//! cloud would, call the fabric, publish to the metadata service. Owner: the
//! servers share it. Invariants: the lock is never held over a wait; a client
//! that goes away does not interrupt an effect; an address reaches the fabric
//! before the answer that names it, and leaves the fabric before it is free.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::calls::CallLog;
use super::config::{CloudConfig, Latencies};
use super::credentials::KeyRing;
use super::error::ApiError;
use super::faults::Faults;
use super::idempotency::Tokens;
use super::metadata::{InstanceView, Views};
use super::signature::Nonces;
use super::state::{Account, CreateEni, EniStatus, Instance, Millis, RegisterInstance, Want};
use super::throttle::Throttle;
use crate::lab::fabric::{Fabric, FabricError, InstancePlace};

const MAX_FABRIC_ERRORS: usize = 256;
/// How long the removal of an instance waits for changes in progress.
const REMOVAL_WAIT: Duration = Duration::from_secs(30);

/// Everything that changes, behind the one lock.
pub(super) struct World {
    pub account: Account,
    pub tokens: Tokens,
    pub faults: Faults,
    pub throttle: Throttle,
    pub calls: CallLog,
    pub views: Views,
    pub keys: KeyRing,
    pub nonces: Nonces,
    pub rng: StdRng,
    /// What the packet side could not do; the lab's audit wants none.
    pub fabric_errors: Vec<String>,
}

pub(super) struct Engine {
    pub config: CloudConfig,
    pub stop: CancellationToken,
    pub tasks: TaskTracker,
    world: Mutex<World>,
    fabric: Arc<dyn Fabric>,
    /// An ENI has stopped being busy.
    settled: Notify,
    started: (Millis, tokio::time::Instant),
}

impl Engine {
    /// `config` has been validated.
    pub fn new(config: CloudConfig, fabric: Arc<dyn Fabric>) -> Arc<Self> {
        let world = World {
            account: Account::new(&config),
            tokens: Tokens::default(),
            faults: Faults::default(),
            throttle: Throttle::new(config.throttle.clone()),
            calls: CallLog::default(),
            views: Views::default(),
            keys: KeyRing::new(config.keys.clone(), config.sts_lifetime_seconds),
            nonces: Nonces::default(),
            // Not the account's generator: faults and jitter must not change
            // which addresses are given.
            rng: StdRng::seed_from_u64(config.seed.wrapping_add(1)),
            fabric_errors: Vec::new(),
        };
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arc::new(Self {
            config,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            world: Mutex::new(world),
            fabric,
            settled: Notify::new(),
            started: (unix.as_millis() as Millis, tokio::time::Instant::now()),
        })
    }

    pub fn now(&self) -> Millis {
        self.started.0 + self.started.1.elapsed().as_millis() as u64
    }

    pub fn started_ms(&self) -> Millis {
        self.started.0
    }

    /// The world, with the vSwitches exhausted that a fault says so.
    pub fn world(&self) -> MutexGuard<'_, World> {
        let mut world = self.world.lock();
        world.account.exhausted = world.faults.exhausted(self.now());
        world
    }

    fn scaled(&self, ms: u64) -> u64 {
        let spread = self.config.latency.spread;
        let jitter = 1.0 + self.world.lock().rng.random_range(-1.0..=1.0) * spread;
        (ms as f64 * jitter * self.config.latency_scale) as u64
    }

    pub fn metadata_lag(&self) -> u64 {
        (self.config.metadata_lag_ms as f64 * self.config.latency_scale) as u64
    }

    /// Waits as long as the real cloud would; an error when the lab ends.
    pub async fn delay(&self, of: impl Fn(&Latencies) -> u64) -> Result<(), ApiError> {
        self.sleep(self.scaled(of(&self.config.latency))).await
    }

    pub async fn sleep(&self, ms: u64) -> Result<(), ApiError> {
        let ended = || ApiError::new(503, "ServiceUnavailable", "The lab is going down.");
        if ms == 0 {
            return if self.stop.is_cancelled() { Err(ended()) } else { Ok(()) };
        }
        tokio::select! {
            () = self.stop.cancelled() => Err(ended()),
            () = tokio::time::sleep(Duration::from_millis(ms)) => Ok(()),
        }
    }

    fn publish(&self, world: &mut World, instance_id: &str) {
        if let Some(view) = InstanceView::of(&world.account, instance_id, self.config.role.as_deref()) {
            world.views.publish(instance_id, view, self.now());
        }
    }

    fn publish_of_eni(&self, world: &mut World, eni_id: &str) {
        if let Some(instance) = world.account.enis.get(eni_id).and_then(|eni| eni.instance.clone()) {
            self.publish(world, &instance);
        }
    }

    fn fabric_failed(world: &mut World, error: &FabricError) {
        tracing::warn!(%error, "the packet side failed");
        if world.fabric_errors.len() < MAX_FABRIC_ERRORS {
            world.fabric_errors.push(error.to_string());
        }
    }

    pub async fn create(&self, spec: &CreateEni) -> Result<String, ApiError> {
        self.world().account.check_create(spec)?;
        let took = self.scaled(self.config.latency.create);
        self.sleep(took).await?;
        let now = self.now();
        let mut world = self.world();
        let id = world.account.create(spec, now)?;
        world.account.spent(&id, took);
        Ok(id)
    }

    /// Returns when the ENI is Attaching; the rest happens later.
    pub async fn attach(self: &Arc<Self>, eni: &str, instance: &str) -> Result<(), ApiError> {
        self.world().account.check_attach(eni, instance)?;
        let (answer, whole) = (self.scaled(self.config.latency.attach_answer), self.scaled(self.config.latency.attach));
        self.sleep(answer).await?;
        let epoch = {
            let mut world = self.world();
            world.account.spent(eni, whole);
            world.account.begin_attach(eni, instance)?
        };
        let (engine, eni) = (self.clone(), eni.to_owned());
        self.tasks.spawn(async move {
            if engine.sleep(whole.saturating_sub(answer)).await.is_ok() {
                engine.finish_attach(&eni, epoch).await;
            }
        });
        Ok(())
    }

    async fn finish_attach(&self, eni: &str, epoch: u64) {
        let now = self.now();
        let port = {
            let mut world = self.world();
            if !world.account.is_current(eni, epoch, EniStatus::Attaching) || world.account.hold(eni).is_err() {
                return;
            }
            if world.faults.attach_fails(now) { None } else { world.account.port(eni) }
        };
        let result = match port {
            Some(port) => self.fabric.attach(port).await.map(|()| true),
            None => Ok(false),
        };
        let mut world = self.world();
        if let Err(error) = &result {
            Self::fabric_failed(&mut world, error);
        }
        world.account.finish_attach(eni, epoch, result.unwrap_or(false));
        self.publish_of_eni(&mut world, eni);
        drop(world);
        self.settled.notify_waiters();
    }

    /// Returns when the ENI is Detaching; the rest happens later.
    pub async fn detach(self: &Arc<Self>, eni: &str, instance: &str) -> Result<(), ApiError> {
        self.world().account.check_detach(eni, instance)?;
        let (answer, whole) = (self.scaled(self.config.latency.detach_answer), self.scaled(self.config.latency.detach));
        self.sleep(answer).await?;
        let epoch = {
            let mut world = self.world();
            let epoch = world.account.begin_detach(eni, instance)?;
            self.publish(&mut world, instance);
            epoch
        };
        let (engine, eni) = (self.clone(), eni.to_owned());
        self.tasks.spawn(async move {
            if engine.sleep(whole.saturating_sub(answer)).await.is_ok() {
                engine.finish_detach(&eni, epoch).await;
            }
        });
        Ok(())
    }

    async fn finish_detach(&self, eni: &str, epoch: u64) {
        {
            let mut world = self.world();
            if !world.account.is_current(eni, epoch, EniStatus::Detaching) || world.account.hold(eni).is_err() {
                return;
            }
        }
        let result = self.fabric.detach(eni).await;
        let mut world = self.world();
        if let Err(error) = &result {
            Self::fabric_failed(&mut world, error);
        }
        world.account.finish_detach(eni, epoch);
        drop(world);
        self.settled.notify_waiters();
    }

    pub async fn delete(&self, eni: &str) -> Result<(), ApiError> {
        let epoch = self.world().account.begin_delete(eni)?;
        let waited = self.delay(|l| l.delete).await;
        self.world().account.finish_delete(eni, epoch);
        waited
    }

    pub async fn assign4(&self, eni: &str, want: &Want<Ipv4Addr>) -> Result<Vec<Ipv4Addr>, ApiError> {
        self.hold(eni, |account| account.check_assign4(eni, want))?;
        let done = self.assign4_held(eni, want).await;
        self.release(eni);
        done
    }

    async fn assign4_held(&self, eni: &str, want: &Want<Ipv4Addr>) -> Result<Vec<Ipv4Addr>, ApiError> {
        self.delay(|l| l.assign).await?;
        let taken = self.world().account.assign4(eni, want)?;
        let applied = self.apply_addresses(eni, &[], &[]).await;
        if applied.is_err() {
            let _ = self.world().account.unassign4(eni, &taken);
        }
        applied.map(|()| taken)
    }

    pub async fn assign6(&self, eni: &str, want: &Want<Ipv6Addr>) -> Result<Vec<Ipv6Addr>, ApiError> {
        self.hold(eni, |account| account.check_assign6(eni, want))?;
        let done = self.assign6_held(eni, want).await;
        self.release(eni);
        done
    }

    async fn assign6_held(&self, eni: &str, want: &Want<Ipv6Addr>) -> Result<Vec<Ipv6Addr>, ApiError> {
        self.delay(|l| l.assign).await?;
        let taken = self.world().account.assign6(eni, want)?;
        let applied = self.apply_addresses(eni, &[], &[]).await;
        if applied.is_err() {
            let _ = self.world().account.unassign6(eni, &taken);
        }
        applied.map(|()| taken)
    }

    pub async fn unassign4(&self, eni: &str, list: &[Ipv4Addr]) -> Result<(), ApiError> {
        self.hold(eni, |account| account.check_unassign4(eni, list))?;
        let done = match self.delay(|l| l.unassign).await {
            Ok(()) => {
                self.apply_addresses(eni, list, &[]).await.and_then(|()| self.world().account.unassign4(eni, list))
            }
            Err(error) => Err(error),
        };
        self.release(eni);
        done
    }

    pub async fn unassign6(&self, eni: &str, list: &[Ipv6Addr]) -> Result<(), ApiError> {
        self.hold(eni, |account| account.check_unassign6(eni, list))?;
        let done = match self.delay(|l| l.unassign).await {
            Ok(()) => {
                self.apply_addresses(eni, &[], list).await.and_then(|()| self.world().account.unassign6(eni, list))
            }
            Err(error) => Err(error),
        };
        self.release(eni);
        done
    }

    fn hold(&self, eni: &str, check: impl FnOnce(&Account) -> Result<(), ApiError>) -> Result<(), ApiError> {
        let mut world = self.world();
        check(&world.account)?;
        world.account.hold(eni)
    }

    fn release(&self, eni: &str) {
        let mut world = self.world();
        world.account.release_hold(eni);
        self.publish_of_eni(&mut world, eni);
        drop(world);
        self.settled.notify_waiters();
    }

    /// Tells the fabric what an attached ENI holds, without `less4` and `less6`.
    async fn apply_addresses(&self, eni: &str, less4: &[Ipv4Addr], less6: &[Ipv6Addr]) -> Result<(), ApiError> {
        let Some(port) = self.world().account.port(eni) else { return Ok(()) };
        let v4 = port.v4.into_iter().filter(|ip| !less4.contains(ip)).collect();
        let v6 = port.v6.into_iter().filter(|ip| !less6.contains(ip)).collect();
        let result = self.fabric.set_addresses(eni, v4, v6).await;
        result.map_err(|error| {
            Self::fabric_failed(&mut self.world(), &error);
            ApiError::internal(error)
        })
    }

    /// Registers an instance; its primary ENI is attached on return.
    pub async fn register(&self, spec: &RegisterInstance) -> Result<Instance, ApiError> {
        let now = self.now();
        let (instance, port) = {
            let mut world = self.world();
            let instance = world.account.register(spec, now)?;
            world.account.hold(&instance.primary_eni)?;
            let port = world.account.port(&instance.primary_eni);
            (instance, port.ok_or_else(|| ApiError::internal("the primary ENI has no port"))?)
        };
        let place = InstancePlace { instance_id: instance.id.clone(), netns: instance.netns.clone() };
        let mut result = self.fabric.instance_added(place).await;
        if result.is_ok() {
            result = self.fabric.attach(port).await;
        }
        let Err(error) = result else {
            let mut world = self.world();
            world.account.finish_attach(&instance.primary_eni, 1, true);
            self.publish(&mut world, &instance.id);
            drop(world);
            self.settled.notify_waiters();
            return Ok(instance);
        };
        // Whatever half of it is there must not stay.
        let _ = self.fabric.detach(&instance.primary_eni).await;
        let _ = self.fabric.instance_removed(&instance.id).await;
        let mut world = self.world();
        Self::fabric_failed(&mut world, &error);
        world.account.finish_removal(&instance.id);
        Err(ApiError::internal(error))
    }

    /// Removes an instance: all its ENIs are detached, those that are
    /// DeleteOnRelease deleted.
    pub async fn remove(&self, instance_id: &str) -> Result<(), ApiError> {
        self.world().account.begin_removal(instance_id)?;
        let enis = tokio::time::timeout(REMOVAL_WAIT, self.hold_all(instance_id)).await;
        let enis = enis.map_err(|_| ApiError::conflict(instance_id))?;
        let mut failed = Vec::new();
        for eni in &enis {
            failed.extend(self.fabric.detach(eni).await.err());
        }
        failed.extend(self.fabric.instance_removed(instance_id).await.err());
        let mut world = self.world();
        failed.iter().for_each(|error| Self::fabric_failed(&mut world, error));
        world.account.finish_removal(instance_id);
        world.views.remove(instance_id);
        world.keys.revoke(instance_id);
        Ok(())
    }

    /// Waits until no ENI of the instance is being changed, then holds them all.
    async fn hold_all(&self, instance_id: &str) -> Vec<String> {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            {
                let mut world = self.world();
                let enis: Vec<_> = world.account.enis_of(instance_id).map(|e| (e.id.clone(), e.busy)).collect();
                if enis.iter().all(|(_, busy)| !busy) {
                    let ids: Vec<String> = enis.into_iter().map(|(id, _)| id).collect();
                    for id in &ids {
                        let _ = world.account.hold(id);
                    }
                    return ids;
                }
            }
            settled.await;
        }
    }

    pub fn request_id(&self) -> String {
        let raw = self.world.lock().rng.random::<u128>();
        let hex = format!("{raw:032X}");
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}
