//! After a start over programs of an earlier layout: when the new maps are filled,
//! this build's programs take over (docs/decisions/0009).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::programs::Programs;
use crate::actor::{Deadline, Port};
use crate::datapath::upgrade::Awaits;
use crate::datapath::upgrade::{CONVERTERS, Layout};
use crate::netns::Wire;
use crate::policy::Enforce;
use crate::policy::status::PolicySnapshot;
use crate::pool::Leases;
use crate::pool::snapshot::PoolSnapshot;
use crate::service::status::ServiceSnapshot;

/// What the take-over waits for, and whom it asks.
pub struct TakeOver {
    pub programs: Arc<Programs>,
    pub awaits: Awaits,
    pub pool: watch::Receiver<Arc<PoolSnapshot>>,
    /// None where Services are not carried.
    pub services: Option<watch::Receiver<Arc<ServiceSnapshot>>>,
    /// None where policies are not enforced.
    pub policies: Option<watch::Receiver<Arc<PolicySnapshot>>>,
    pub leases: Port<Leases>,
    pub wire: Port<Wire>,
    pub enforce: Option<Port<Enforce>>,
}

const AGAIN: Duration = Duration::from_secs(1);

impl TakeOver {
    /// Ends when this build's programs are in force everywhere they can be reached.
    pub async fn run(mut self) {
        if self.programs.is_held() && self.filled().await.is_some() {
            self.swap().await;
        }
        super::facts::programs_inside_pods(self.pool, self.leases, self.programs).await;
    }

    /// `None` when the agent ends before.
    async fn filled(&mut self) -> Option<()> {
        tracing::info!("Programs of an earlier layout stay in force until the new maps are filled");
        if let Some(services) = self.services.as_mut().filter(|_| self.awaits.services) {
            services.wait_for(|s| s.ready().is_ok()).await.ok()?;
        }
        if let Some(policies) = self.policies.as_mut().filter(|_| self.awaits.policies || self.awaits.pods) {
            policies.wait_for(|p| p.settled_ms_ago.is_some()).await.ok()?;
        }
        if !self.awaits.pods {
            return Some(());
        }
        self.pool.wait_for(|pool| pool.reconciled).await.ok()?;
        // Wiring again what is wired changes nothing but what programs know of it.
        loop {
            if let Ok(leases) = self.leases.ask(Leases {}, Deadline::after(Duration::from_secs(10))).await {
                for lease in leases {
                    let attachment = lease.attachment.clone();
                    let enforce = Enforce { attachment: attachment.clone(), pod: lease.pod.clone(), uid: None };
                    let wire = Wire { lease };
                    if let Err(error) = self.wire.ask(wire, Deadline::after(Duration::from_secs(10))).await {
                        tracing::warn!(%attachment, %error, "A pod does without the short way until its next check");
                    }
                    if let Some(port) = &self.enforce
                        && let Err(error) = port.ask(enforce, Deadline::after(Duration::from_secs(10))).await
                    {
                        tracing::warn!(%attachment, %error, "A pod's policies are in force a little later");
                    }
                }
                return Some(());
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn swap(&self) {
        loop {
            let programs = self.programs.clone();
            // System calls, of which each may wait for the kernel's network lock.
            match tokio::task::spawn_blocking(move || programs.take_over()).await {
                Ok(Ok(left)) => {
                    tracing::info!(left = left.len(), "This build's programs are in force");
                    return;
                }
                Ok(Err(error)) => tracing::error!(error, "This build's programs cannot take over yet"),
                Err(error) => tracing::error!(%error, "The take-over has failed"),
            }
            tokio::time::sleep(10 * AGAIN).await;
        }
    }
}

/// The layout of this build's maps. A build with debug assertions takes another
/// version, and maps that count as changed, from `FAIRWAY_LAYOUT`
/// (`3:FRONTENDS,FLOWS`), for tests of an upgrade; flows are then converted to
/// what they are.
pub fn layout() -> Layout {
    let wish = std::env::var("FAIRWAY_LAYOUT").ok().filter(|_| cfg!(debug_assertions));
    wish.and_then(|wish| wished(&wish)).unwrap_or(Layout { converters: CONVERTERS, ..Layout::CURRENT })
}

fn wished(wish: &str) -> Option<Layout> {
    use crate::datapath::upgrade::Converter;
    let (version, changed) = wish.split_once(':')?;
    let version = version.parse().ok()?;
    // Once in a process's life.
    let changed: Vec<&'static str> = changed.split(',').map(|name| &*name.to_owned().leak()).collect();
    let same = |key: &[u8], value: &[u8]| Some((key.to_vec(), value.to_vec()));
    let from = Layout::CURRENT.version;
    let converter = Converter { map: fairway_ebpf_abi::FLOWS, from, to: version, entry: same };
    Some(Layout { version, changed: changed.leak(), converters: vec![converter].leak() })
}
