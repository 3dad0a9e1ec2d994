//! The calls the state asks for: started when it is durable, answered into the
//! next turn.

use std::time::Duration;

use tokio::time::Instant;

use super::outcome::{Answer, Trouble};
use super::plan::back_off;
use super::reconcile::eni_tags;
use super::state::{EniKey, LeasePhase, Phase};
use super::turn::Job;
use super::work::{Subject, Work, due};
use super::{CloudPorts, NetnsPorts, Pool};
use crate::actor::{AskError, Ctx, Deadline};
use crate::cloud::{self, CloudError, Lane, VSwitch};
use crate::model::EniRef;
use crate::netns::{self, WireError};

impl Pool {
    pub(super) fn start_calls(&mut self, ctx: &mut Ctx<'_, Self>) {
        let now = self.clock.now();
        let busy = self.running.keys().copied().collect();
        let retry = |subject: Subject| self.retries.get(&subject).map(|(at, _)| *at);
        let pods_wait = !self.waiting.is_empty();
        for work in due(&self.state, &busy, retry, now) {
            let subject = work.subject();
            self.running.insert(subject, (work.name(), Instant::now()));
            if let Subject::Eni(key) = subject {
                self.touched.insert(key, Instant::now());
            }
            let call = self.call(&work, work.lane(pods_wait));
            ctx.spawn(call, move |pool, result, ctx| {
                if let Err(trouble) = &result {
                    tracing::warn!(call = work.name(), subject = ?subject, %trouble, "Call failed");
                    pool.back_off(subject);
                } else {
                    pool.retries.remove(&subject);
                }
                pool.jobs.push(Job::Answered { work, result });
                pool.turn(ctx);
            });
        }
        if self.state.enis.values().any(|e| matches!(e.phase, Phase::Detaching { accepted: true })) {
            self.look_soon(super::duties::Scope::Ours, ctx);
        }
    }

    pub(super) fn end_call(&mut self, subject: Subject) {
        self.running.remove(&subject);
        if let Subject::Eni(key) = subject {
            self.touched.insert(key, Instant::now());
            if !self.state.enis.contains_key(&key) {
                self.touched.remove(&key);
                self.retries.remove(&subject);
            }
        }
    }

    /// Holds in the state cover most failures; this covers the rest.
    fn back_off(&mut self, subject: Subject) {
        let failures = self.retries.get(&subject).map_or(0, |(_, n)| *n) + 1;
        self.retries.insert(subject, (self.clock.now().plus(back_off(failures)), failures));
    }

    fn call(&self, work: &Work, lane: Lane) -> impl Future<Output = Result<Answer, Trouble>> + 'static {
        let call = self.describe_call(work, lane);
        let (cloud, netns) = (self.cloud.clone(), self.netns.clone());
        let (timeout, device) = (self.config.call_timeout, self.config.device_timeout);
        async move {
            match call {
                Some(call) => make(call, &cloud, &netns, timeout, device).await,
                // The state moved on between planning and calling.
                None => Err(Trouble::Unanswered("not ready for this call yet".to_owned())),
            }
        }
    }

    fn describe_call(&self, work: &Work, lane: Lane) -> Option<Call> {
        let instance = self.state.meta.instance.clone();
        let eni = |key: &EniKey| self.state.enis.get(key)?.eni.clone();
        Some(match work {
            Work::Create { key } => {
                let record = self.state.enis.get(key)?;
                let Phase::Creating { ipv4, ipv6 } = record.phase else { return None };
                if self.security_groups.is_empty() {
                    return None;
                }
                let tags = eni_tags(&self.config.cluster_id, &instance, &record.token, record.purpose);
                let message = cloud::CreateEni {
                    vswitch: record.vswitch.clone(),
                    security_groups: self.security_groups.clone(),
                    ipv4,
                    ipv6,
                    tags,
                    description: format!("Fairway pods on {instance}"),
                    token: record.token.clone(),
                    lane,
                };
                Call::Create(message, self.demand.vswitches.get(&record.vswitch).cloned())
            }
            Work::Attach { key } => Call::Attach(cloud::AttachEni { eni: eni(key)?.id, instance, lane }),
            Work::Prepare { key } => {
                let shared = self.state.enis.get(key)?.purpose == super::state::Purpose::Shared;
                Call::Prepare(netns::PrepareEni { eni: eni(key)?, shared })
            }
            Work::AssignIpv4 { key } => {
                let assign = self.state.enis.get(key)?.assign4.clone()?;
                Call::Assign4(cloud::AssignIpv4 { eni: eni(key)?.id, count: assign.count, token: assign.token, lane })
            }
            Work::AssignIpv6 { key } => {
                let assign = self.state.enis.get(key)?.assign6.clone()?;
                Call::Assign6(cloud::AssignIpv6 { eni: eni(key)?.id, count: assign.count, token: assign.token, lane })
            }
            Work::UnassignIpv4 { key, addresses } => {
                Call::Unassign4(cloud::UnassignIpv4 { eni: eni(key)?.id, addresses: addresses.clone(), lane })
            }
            Work::UnassignIpv6 { key, addresses } => {
                Call::Unassign6(cloud::UnassignIpv6 { eni: eni(key)?.id, addresses: addresses.clone(), lane })
            }
            Work::Detach { key } => {
                let eni = eni(key)?;
                Call::Detach(cloud::DetachEni { eni: eni.id.clone(), instance, lane }, eni)
            }
            Work::Delete { key } => Call::Delete(cloud::DeleteEni { eni: eni(key)?.id, lane }),
            Work::Unwire { v4 } => {
                let held = self.state.addresses.get(v4)?.held()?;
                if held.phase != LeasePhase::Collecting {
                    return None;
                }
                Call::Unwire(netns::Unwire { lease: held.lease.clone() })
            }
        })
    }
}

enum Call {
    Create(cloud::CreateEni, Option<VSwitch>),
    Attach(cloud::AttachEni),
    Prepare(netns::PrepareEni),
    Assign4(cloud::AssignIpv4),
    Assign6(cloud::AssignIpv6),
    Unassign4(cloud::UnassignIpv4),
    Unassign6(cloud::UnassignIpv6),
    Detach(cloud::DetachEni, EniRef),
    Delete(cloud::DeleteEni),
    Unwire(netns::Unwire),
}

async fn make(
    call: Call,
    cloud: &CloudPorts,
    netns: &NetnsPorts,
    timeout: Duration,
    device: Duration,
) -> Result<Answer, Trouble> {
    let deadline = Deadline::after(timeout);
    Ok(match call {
        Call::Create(message, vswitch) => {
            let lane = message.lane;
            let eni = cloud.create.ask(message, deadline).await.map_err(from_cloud)?;
            let vswitch = match vswitch.filter(|v| v.id == eni.vswitch) {
                Some(vswitch) => vswitch,
                None => one_vswitch(cloud, &eni, lane, deadline).await?,
            };
            Answer::Created(Box::new(eni), Box::new(vswitch))
        }
        Call::Attach(message) => {
            cloud.attach.ask(message, deadline).await.map_err(from_cloud)?;
            Answer::Done
        }
        Call::Prepare(message) => {
            Answer::Prepared(netns.prepare.ask(message, Deadline::after(device)).await.map_err(from_kernel)?)
        }
        Call::Assign4(message) => Answer::Assigned4(cloud.assign4.ask(message, deadline).await.map_err(from_cloud)?),
        Call::Assign6(message) => Answer::Assigned6(cloud.assign6.ask(message, deadline).await.map_err(from_cloud)?),
        Call::Unassign4(message) => {
            cloud.unassign4.ask(message, deadline).await.map_err(from_cloud)?;
            Answer::Done
        }
        Call::Unassign6(message) => {
            cloud.unassign6.ask(message, deadline).await.map_err(from_cloud)?;
            Answer::Done
        }
        Call::Detach(message, eni) => {
            // The host must stop using it before the device goes.
            match netns.forget.ask(netns::ForgetEni { eni }, deadline).await {
                Ok(()) | Err(AskError::Domain(WireError::DeviceMissing(_))) => {}
                Err(error) => return Err(from_kernel(error)),
            }
            cloud.detach.ask(message, deadline).await.map_err(from_cloud)?;
            Answer::Done
        }
        Call::Delete(message) => {
            cloud.delete.ask(message, deadline).await.map_err(from_cloud)?;
            Answer::Done
        }
        Call::Unwire(message) => match netns.unwire.ask(message, deadline).await {
            Ok(()) | Err(AskError::Domain(WireError::NamespaceGone(_))) => Answer::Done,
            Err(error) => return Err(from_kernel(error)),
        },
    })
}

async fn one_vswitch(cloud: &CloudPorts, eni: &cloud::Eni, lane: Lane, deadline: Deadline) -> Result<VSwitch, Trouble> {
    let message = cloud::DescribeVSwitches { ids: vec![eni.vswitch.clone()], lane };
    let found = cloud.vswitches.ask(message, deadline).await.map_err(from_cloud)?;
    let missing = || Trouble::Unanswered(format!("the cloud does not show vSwitch {} of {}", eni.vswitch, eni.id));
    found.into_iter().find(|v| v.id == eni.vswitch).ok_or_else(missing)
}

fn from_cloud(error: AskError<CloudError>) -> Trouble {
    match error {
        AskError::Domain(error) => Trouble::Cloud(error),
        other => Trouble::Unanswered(other.to_string()),
    }
}

fn from_kernel(error: AskError<WireError>) -> Trouble {
    match error {
        AskError::Domain(error) => Trouble::Kernel(error.to_string()),
        other => Trouble::Unanswered(other.to_string()),
    }
}
