//! Building the pool: identity, ledger, limits. What is only transiently missing
//! is waited for; what an operator must mend is an error with the remedy.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use rand::Rng as _;

use super::config::Config;
use super::demand::Demand;
use super::desk::{Desk, DeskHandle};
use super::ledger::{Ledger, LedgerError, LedgerReport, SledStore};
use super::state::{Meta, State};
use super::step::FailPoint;
use super::{Clock, Deps, LedgerPlace, Pool};
use crate::actor::{AskError, Deadline, StartError, Worker, WorkerStartError};
use crate::cloud::{self, CloudErrorKind, Lane};
use crate::model::{InstanceId, IpStack};

/// Opening must not hang the node: sled may spin on damage.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

impl Pool {
    pub async fn start(deps: Deps) -> Result<Self, StartError> {
        let Deps { config, ledger, cloud, netns, bound, elected, snapshots } = deps;
        config.validate().map_err(StartError::new)?;
        let fail_point = FailPoint::from_env().map_err(StartError::new)?;

        let who = patiently("who this node is", || {
            cloud.who_am_i.ask(cloud::WhoAmI { lane: Lane::PodWaiting }, Deadline::after(Duration::from_secs(5)))
        })
        .await?;
        let (desk, found, report) = open(ledger, who.instance.clone(), fail_point).await?;
        let state = match found {
            Some(state) => adapt(state, &config)?,
            None => {
                let limits = patiently("what this instance type may hold", || {
                    let message =
                        cloud::DescribeInstanceType { type_name: who.instance_type.clone(), lane: Lane::PodWaiting };
                    cloud.instance_type.ask(message, Deadline::after(config.call_timeout))
                })
                .await?;
                let nonce = format!("{:08x}", rand::rng().random::<u32>());
                State::new(Meta {
                    instance: who.instance.clone(),
                    cluster: config.cluster_id.clone(),
                    nonce,
                    next: 1,
                    limits,
                    ip_stack: config.ip_stack,
                    foreign: 0,
                })
            }
        };
        if state.meta.ip_stack == IpStack::Dual && state.meta.limits.ipv6_per_eni == 0 {
            let name = &state.meta.limits.type_name;
            return Err(StartError(format!(
                "ip_stack is dual, but instance type {name} has no IPv6 addresses; use another type or ip_stack: ipv4"
            )));
        }
        tracing::info!(
            instance = %who.instance, new = report.new, damaged = report.damaged, moved_to = report.moved_to,
            enis = report.enis, leases = report.leases, "Ledger opened"
        );
        let demand = Demand { own_vswitch: Some(who.vswitch), bound: bound.borrow().clone(), ..Demand::default() };
        Ok(Self {
            security_groups: config.security_groups.clone(),
            config,
            cloud,
            netns,
            bound,
            elected,
            snapshots,
            desk,
            clock: Clock::start(),
            state,
            report,
            ledger_error: None,
            reconciled: false,
            jobs: Vec::new(),
            waiting: Vec::new(),
            committing: false,
            again: false,
            waker: None,
            expiry: None,
            publishing: false,
            settling: false,
            steps: BTreeMap::new(),
            running: BTreeMap::new(),
            touched: BTreeMap::new(),
            retries: BTreeMap::new(),
            last_error: None,
            demand,
            looking: Default::default(),
            gone_since: BTreeMap::new(),
            orphans: BTreeMap::new(),
            reclaiming: false,
        })
    }
}

/// A ledger of this instance under today's configuration.
fn adapt(mut state: State, config: &Config) -> Result<State, StartError> {
    if state.meta.cluster != config.cluster_id {
        return Err(StartError(format!(
            "the ledger belongs to cluster {:?}, the configuration says {:?}; drain the node and remove the ledger folder to move it",
            state.meta.cluster, config.cluster_id
        )));
    }
    if state.meta.ip_stack != config.ip_stack {
        std::sync::Arc::make_mut(&mut state.meta).ip_stack = config.ip_stack;
    }
    Ok(state)
}

async fn open(
    place: LedgerPlace,
    instance: InstanceId,
    fail_point: FailPoint,
) -> Result<(DeskHandle, Option<State>, LedgerReport), StartError> {
    // The worker of an embodiment that has just died may still hold the file.
    let mut attempts = 0;
    loop {
        match open_once(place.clone(), instance.clone(), fail_point.clone()).await {
            Err(OpenError::Ledger(LedgerError::InUse(_))) if attempts < 3 => {
                attempts += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(e) => return Err(StartError::new(e)),
            Ok(opened) => return Ok(opened),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Ledger(LedgerError),
    #[error("the ledger: {0}")]
    Thread(String),
}

async fn open_once(
    place: LedgerPlace,
    instance: InstanceId,
    fail_point: FailPoint,
) -> Result<(DeskHandle, Option<State>, LedgerReport), OpenError> {
    let folder = match place {
        LedgerPlace::Folder(folder) => folder,
        LedgerPlace::Memory(store) => {
            let (ledger, state) = Ledger::open(Box::new(store.clone())).map_err(OpenError::Ledger)?;
            let report = LedgerReport { new: state.is_none(), ..LedgerReport::default() };
            let ledger = std::rc::Rc::new(std::cell::RefCell::new(ledger));
            return Ok((DeskHandle::InPlace(ledger, store), state, report));
        }
    };
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let open = move || {
        let (ledger, state, report) = SledStore::open_ledger(&folder, &instance)?;
        let _ = tell.send((state, report));
        Ok(Desk { ledger, fail_point })
    };
    let started = tokio::time::timeout(OPEN_TIMEOUT, Worker::start("ledger", 16, open)).await;
    let desk = match started {
        Err(_) => return Err(OpenError::Thread(format!("opening takes more than {OPEN_TIMEOUT:?}"))),
        Ok(Err(WorkerStartError::Open(e))) => return Err(OpenError::Ledger(e)),
        Ok(Err(other)) => return Err(OpenError::Thread(format!("{other:?}"))),
        Ok(Ok(desk)) => desk,
    };
    let (state, report) = told.try_recv().map_err(|e| OpenError::Thread(e.to_string()))?;
    Ok((DeskHandle::Thread(desk), state, report))
}

/// Ask until there is an answer; only what retrying cannot mend is an error.
async fn patiently<T, F>(what: &str, ask: impl Fn() -> F) -> Result<T, StartError>
where
    F: Future<Output = Result<T, AskError<cloud::CloudError>>>,
{
    let mut wait = Duration::from_millis(200);
    loop {
        let error = match ask().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if let AskError::Domain(e) = &error
            && matches!(e.kind, CloudErrorKind::Forbidden | CloudErrorKind::Rejected | CloudErrorKind::NotFound)
        {
            return Err(StartError(format!("cannot learn {what}: {error}")));
        }
        tracing::warn!(%error, "Cannot learn {what} yet");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(5));
    }
}
