//! What the pool does unasked: looks at the cloud, sweeps for dead leases,
//! reclaims orphaned ENIs, publishes what others may know.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::audit::{AuditReport, Readings, audit};
use super::reconcile::{self, Evidence, Gone, Sight};
use super::snapshot::{CallSnapshot, of_state};
use super::state::{EniKey, Purpose, State};
use super::turn::Job;
use super::work::Subject;
use super::{Audit, CloudPorts, Pool};
use crate::actor::{Ctx, Deadline, Responder};
use crate::cloud::{self, EniKind, EniStatus, Lane, VSwitch};
use crate::model::{InstanceId, VSwitchId};
use crate::netns::{self, KernelInventory};

/// Looks are this far apart at least: reads are bounded.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// With an intact ledger the start waits no longer than this for the cloud.
const CLOUD_PATIENCE: Duration = Duration::from_secs(5);
/// Snapshots are published no more often than this.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// Orphans deleted per round.
const ORPHANS_PER_ROUND: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    /// ENIs with this node's tags.
    Ours,
    /// Also foreign ENIs of the instance, vSwitches and the type's limits.
    Everything,
}

#[derive(Debug, Default)]
pub(super) struct Looking {
    now: bool,
    /// Another look is scheduled.
    next: Option<Scope>,
    last: Option<Instant>,
    missed: BTreeSet<EniKey>,
}

/// What one look brought.
struct Seen {
    enis: Vec<cloud::Eni>,
    vswitches: Option<Vec<VSwitch>>,
    limits: Option<cloud::InstanceLimits>,
    everything: bool,
}

impl Pool {
    /// The start: the kernel always, the cloud if it answers; a ledger that may
    /// lack leases is not believed without it.
    pub(super) fn reconcile(&mut self, ctx: &mut Ctx<'_, Self>) {
        let began = Instant::now();
        let rebuilt = self.report.rebuilt();
        let patience = if rebuilt { self.config.call_timeout } else { CLOUD_PATIENCE };
        let query = self.query(Scope::Everything, Lane::PodWaiting);
        let (cloud, inventory) = (self.cloud.clone(), self.netns.inventory.clone());
        let readings = async move {
            let deadline = Deadline::after(patience);
            let kernel = inventory.ask(netns::Inventory {}, deadline);
            let (seen, kernel) = futures::join!(look(&cloud, query, deadline), kernel);
            (seen, kernel.map_err(|e| e.to_string()))
        };
        self.looking.now = true;
        ctx.spawn(readings, move |pool, (seen, kernel), ctx| {
            pool.looking.now = false;
            let again = |pool: &mut Pool, why: String, ctx: &mut Ctx<'_, Pool>| {
                tracing::warn!(why, "Reconciliation has to wait");
                pool.publish(ctx);
                ctx.after(Duration::from_secs(1), |pool, ctx| pool.reconcile(ctx));
            };
            let kernel = match kernel {
                Ok(kernel) => kernel,
                Err(why) => return again(pool, why, ctx),
            };
            let mut steps = match seen {
                Ok(seen) => {
                    let steps = pool.take_in(seen, began);
                    if !pool.looking.missed.is_empty() {
                        pool.look_soon(Scope::Ours, ctx);
                    }
                    steps
                }
                Err(why) if rebuilt => return again(pool, why, ctx),
                Err(why) => {
                    tracing::warn!(why, "The cloud does not answer; serving from the ledger");
                    pool.look_soon(Scope::Everything, ctx);
                    Vec::new()
                }
            };
            let mut state = pool.state.clone();
            let now = pool.clock.now();
            steps.retain(|step| state.apply(step, now).is_ok());
            steps.extend(reconcile::with_node(&state, &kernel, &pool.demand.bound, rebuilt));
            pool.jobs.push(Job::Found { steps, first: true });
            pool.turn(ctx);
        });
    }

    pub(super) fn look_soon(&mut self, scope: Scope, ctx: &mut Ctx<'_, Self>) {
        let scheduled = self.looking.next.is_some();
        self.looking.next = self.looking.next.max(Some(scope));
        if scheduled {
            return;
        }
        let since = self.looking.last.map_or(Duration::ZERO, |t| t.elapsed());
        let delay = LOOK_EVERY.saturating_sub(since).max(Duration::from_millis(200));
        ctx.after(delay, |pool, ctx| {
            let scope = pool.looking.next.take();
            pool.look(scope.unwrap_or(Scope::Ours), ctx);
        });
    }

    pub(super) fn look(&mut self, scope: Scope, ctx: &mut Ctx<'_, Self>) {
        if self.looking.now || !self.reconciled {
            return self.look_soon(scope, ctx);
        }
        self.looking.now = true;
        let began = Instant::now();
        self.looking.last = Some(began);
        let lane = if self.waiting.is_empty() { Lane::Refill } else { Lane::PodWaiting };
        let (cloud, query) = (self.cloud.clone(), self.query(scope, lane));
        let deadline = Deadline::after(self.config.call_timeout);
        let seen = async move { look(&cloud, query, deadline).await };
        ctx.spawn(seen, move |pool, seen, ctx| {
            pool.looking.now = false;
            match seen {
                Ok(seen) => {
                    let steps = pool.take_in(seen, began);
                    if !pool.looking.missed.is_empty() {
                        pool.look_soon(Scope::Ours, ctx);
                    }
                    pool.jobs.push(Job::Found { steps, first: false });
                    pool.turn(ctx);
                }
                Err(why) => {
                    tracing::warn!(why, "Cannot look at the cloud");
                    pool.look_soon(scope, ctx);
                }
            }
        });
    }

    fn query(&self, scope: Scope, lane: Lane) -> Query {
        let configured = self.config.vswitches.iter().chain(&self.demand.own_vswitch);
        let recorded = self.state.enis.values().map(|e| &e.vswitch);
        Query {
            instance: self.state.meta.instance.clone(),
            tags: reconcile::owner_tags(&self.config.cluster_id, &self.state.meta.instance),
            type_name: self.state.meta.limits.type_name.clone(),
            vswitches: configured.chain(recorded).cloned().collect(),
            known: self.demand.vswitches.keys().cloned().collect(),
            scope,
            lane,
        }
    }

    /// Facts are remembered; differences become steps.
    fn take_in(&mut self, seen: Seen, began: Instant) -> Vec<super::step::Step> {
        for vswitch in seen.vswitches.into_iter().flatten() {
            self.demand.vswitches.insert(vswitch.id.clone(), vswitch);
        }
        if self.security_groups.is_empty() {
            let primary = seen.enis.iter().find(|e| e.kind == EniKind::Primary);
            self.security_groups = primary.map(|e| e.security_groups.clone()).unwrap_or_default();
        }
        let recently = |key: &EniKey| self.touched.get(key).is_some_and(|t| *t + Duration::from_secs(2) >= began);
        // Waiting for a device changes nothing in the cloud; an ENI that is gone
        // from there would be waited for in vain.
        let changing = |key| self.running.get(&Subject::Eni(key)).is_some_and(|(work, _)| *work != "prepare");
        let busy = |key: EniKey| changing(key) || recently(&key);
        let sight = Sight {
            enis: &seen.enis,
            vswitches: &self.demand.vswitches,
            busy: &busy,
            missed: &self.looking.missed,
            quarantine: self.config.quarantine,
        };
        let (mut steps, missing) = reconcile::with_cloud(&self.state, &sight, self.clock.now());
        if seen.everything {
            let foreign = reconcile::foreign(&self.state, &seen.enis);
            let limits = seen.limits.unwrap_or_else(|| self.state.meta.limits.clone());
            if foreign != self.state.meta.foreign || limits != self.state.meta.limits {
                steps.push(super::step::Step::Learn { limits, foreign });
            }
        }
        self.looking.missed = missing;
        steps
    }

    /// Find leases whose sandbox or pod is gone.
    pub(super) fn sweep(&mut self, ctx: &mut Ctx<'_, Self>) {
        if !self.reconciled {
            return;
        }
        let paths: BTreeSet<PathBuf> = self.state.leases().map(|(_, h)| h.lease.netns.clone()).collect();
        let recovered = self.state.leases().any(|(_, h)| h.recovered);
        let inventory = self.netns.inventory.clone();
        let readings = async move {
            let present = tokio::task::spawn_blocking(move || {
                paths.into_iter().filter(|p| p.exists()).collect::<BTreeSet<PathBuf>>()
            });
            let kernel = match recovered {
                true => inventory.ask(netns::Inventory {}, Deadline::after(Duration::from_secs(10))).await.ok(),
                false => None,
            };
            (present.await, kernel)
        };
        ctx.spawn(readings, |pool, (present, kernel), ctx| {
            // Without a reading nothing is concluded.
            if let Ok(present) = present {
                pool.judge(&present, kernel.as_ref());
                pool.turn(ctx);
            }
        });
    }

    fn judge(&mut self, present: &BTreeSet<PathBuf>, kernel: Option<&KernelInventory>) {
        let now = self.clock.now();
        let netns_exists = |path: &std::path::Path| present.contains(path);
        let evidence = Evidence { netns_exists: &netns_exists, kernel, pods: &self.demand.bound };
        let mut since = BTreeMap::new();
        self.demand.gone.clear();
        for (_, held) in self.state.leases() {
            let Some(why) = reconcile::gone(held, &evidence) else { continue };
            let key = (held.lease.attachment.clone(), why);
            // A lease younger than this sweep's readings may not be in them.
            let first = self.gone_since.get(&key).copied().unwrap_or(now);
            let patience = match why {
                Gone::Sandbox => self.config.sandbox_gone_after,
                Gone::Pod => self.config.pod_gone_after,
            };
            if now.since(first) >= patience {
                tracing::info!(attachment = %key.0, pod = %held.lease.pod, ?why, "Collecting a lease without an owner");
                self.demand.gone.insert(key.0.clone());
            }
            since.insert(key, first);
        }
        self.gone_since = since;
    }

    /// The elected node deletes unattached ENIs of this cluster that no node
    /// claims.
    pub(super) fn reclaim(&mut self, ctx: &mut Ctx<'_, Self>) {
        if !*self.elected.borrow() {
            self.orphans.clear();
            return;
        }
        if self.reclaiming || !self.reconciled {
            return;
        }
        self.reclaiming = true;
        let tags = [(reconcile::TAG_CLUSTER.to_owned(), self.config.cluster_id.clone())].into();
        let lane = Lane::Release;
        let message =
            cloud::DescribeEnis { ids: Vec::new(), instance: None, tags, status: Some(EniStatus::Available), lane };
        let (port, deadline) = (self.cloud.enis.clone(), Deadline::after(self.config.call_timeout));
        ctx.spawn(async move { port.ask(message, deadline).await }, |pool, seen, ctx| {
            let enis = match seen {
                Ok(enis) => enis,
                Err(error) => {
                    tracing::warn!(%error, "Cannot look for orphaned ENIs");
                    pool.reclaiming = false;
                    return;
                }
            };
            let (delay, now) = (pool.config.orphan_delay, pool.clock.now());
            let mut found = reconcile::orphans(&pool.state, &enis, &mut pool.orphans, delay, now);
            found.truncate(ORPHANS_PER_ROUND);
            let (delete, timeout) = (pool.cloud.delete.clone(), pool.config.call_timeout);
            let work = async move {
                for eni in found {
                    let message = cloud::DeleteEni { eni: eni.clone(), lane: Lane::Release };
                    match delete.ask(message, Deadline::after(timeout)).await {
                        Ok(()) => tracing::info!(%eni, "Deleted an ENI that no node claimed"),
                        Err(error) => tracing::warn!(%eni, %error, "Cannot delete an ENI that no node claims"),
                    }
                }
            };
            ctx.spawn(work, |pool, (), _| pool.reclaiming = false);
        });
    }

    /// Findings that two audits in a row agree on: what is merely in motion has
    /// moved on by then.
    pub(super) fn audit(&mut self, to: Responder<Audit>, ctx: &mut Ctx<'_, Self>) {
        self.audit_once(ctx, move |_, first, ctx| {
            if first.findings.is_empty() || to.deadline().remaining() < Duration::from_secs(3) {
                return to.ok(first);
            }
            ctx.after(Duration::from_secs(2), move |pool, ctx| {
                pool.audit_once(ctx, move |_, mut second, _| {
                    second.findings.retain(|f| first.findings.contains(f));
                    to.ok(second);
                });
            });
        });
    }

    fn audit_once(
        &mut self,
        ctx: &mut Ctx<'_, Self>,
        then: impl FnOnce(&mut Self, AuditReport, &mut Ctx<'_, Self>) + 'static,
    ) {
        let query = self.query(Scope::Everything, Lane::PodWaiting);
        let (cloud, inventory) = (self.cloud.clone(), self.netns.inventory.clone());
        let deadline = Deadline::after(self.config.call_timeout);
        let readings =
            async move { futures::join!(look(&cloud, query, deadline), inventory.ask(netns::Inventory {}, deadline)) };
        ctx.spawn(readings, |pool, (seen, kernel), ctx| {
            let report = {
                let enis = seen.as_ref().ok().map(|s| s.enis.as_slice());
                let readings = Readings { cloud: enis, kernel: kernel.as_ref().ok(), pods: &pool.demand.bound };
                let state: &State = &pool.state;
                audit(state, &readings)
            };
            then(pool, report, ctx);
        });
    }

    pub(super) fn publish(&mut self, ctx: &mut Ctx<'_, Self>) {
        if !self.publishing {
            self.publishing = true;
            ctx.after(PUBLISH_EVERY, |pool, _| {
                pool.publishing = false;
                pool.publish_now();
            });
        }
    }

    fn publish_now(&mut self) {
        let mut snapshot = of_state(&self.state, self.config.max_enis, self.clock.now());
        snapshot.reconciled = self.reconciled;
        snapshot.waiting = self.waiting.len();
        snapshot.waiting_reason = self.waiting.first().map(|w| self.why_waiting(Purpose::from(w.request.mode)));
        snapshot.in_flight = self
            .running
            .iter()
            .map(|(subject, (call, since))| CallSnapshot {
                call: (*call).to_owned(),
                subject: match subject {
                    Subject::Eni(key) => {
                        let eni = self.state.enis.get(key).and_then(|e| e.eni.as_ref());
                        eni.map_or_else(|| format!("eni/{key}"), |e| e.id.to_string())
                    }
                    Subject::Lease(v4) => v4.to_string(),
                },
                age_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
            })
            .collect();
        snapshot.steps = self.steps.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        snapshot.ledger = self.report.clone();
        snapshot.ledger_error = self.ledger_error.clone();
        self.snapshots.send_replace(Arc::new(snapshot));
    }
}

#[derive(Clone)]
struct Query {
    instance: InstanceId,
    tags: BTreeMap<String, String>,
    type_name: String,
    vswitches: BTreeSet<VSwitchId>,
    known: BTreeSet<VSwitchId>,
    scope: Scope,
    lane: Lane,
}

async fn look(ports: &CloudPorts, query: Query, deadline: Deadline) -> Result<Seen, String> {
    let Query { instance, tags, type_name, vswitches, known, scope, lane } = query;
    let describe = |instance: Option<InstanceId>, tags: BTreeMap<String, String>| {
        ports.enis.ask(cloud::DescribeEnis { ids: Vec::new(), instance, tags, status: None, lane }, deadline)
    };
    let mut enis = describe(None, tags).await.map_err(|e| e.to_string())?;
    let everything = scope == Scope::Everything;
    let mut limits = None;
    if everything {
        let attached = describe(Some(instance), BTreeMap::new()).await.map_err(|e| e.to_string())?;
        let known: BTreeSet<_> = enis.iter().map(|e| e.id.clone()).collect();
        enis.extend(attached.into_iter().filter(|e| !known.contains(&e.id)));
        let message = cloud::DescribeInstanceType { type_name, lane };
        limits = ports.instance_type.ask(message, deadline).await.ok();
    }
    let mut ids = if everything { vswitches } else { BTreeSet::new() };
    ids.extend(enis.iter().map(|e| e.vswitch.clone()).filter(|v| !known.contains(v)));
    let mut read = None;
    if !ids.is_empty() {
        let message = cloud::DescribeVSwitches { ids: ids.into_iter().collect(), lane };
        read = Some(ports.vswitches.ask(message, deadline).await.map_err(|e| e.to_string())?);
    }
    Ok(Seen { enis, vswitches: read, limits, everything })
}
