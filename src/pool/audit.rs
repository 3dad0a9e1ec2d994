//! The audit: ledger, cloud, kernel and cluster compared, by fresh readings.
//! Nothing is changed. An empty list of findings means that every address, ENI,
//! route and rule is accounted for exactly once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::cloud::{self, EniKind, EniStatus};
use crate::model::{AttachMode, EniId};
use crate::netns::KernelInventory;

use super::demand::BoundPods;
use super::reconcile::{TAG_TOKEN, owner_tags};
use super::state::{AddressState, LeasePhase, Phase, Purpose, State};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// The cloud has an ENI of this node that the ledger does not know.
    LeakedEni,
    /// The ledger has an ENI that the cloud does not.
    LostEni,
    /// The cloud assigned an address that the ledger does not know.
    LeakedAddress,
    /// The ledger has an address that the cloud has not assigned.
    LostAddress,
    /// One address twice: on two ENIs or in two leases.
    DoubledAddress,
    LeakedRoute,
    LeakedRule,
    LeakedLink,
    MissingRoute,
    MissingRule,
    MissingLink,
    MissingDevice,
    /// A lease whose pod the cluster does not know.
    StaleLease,
    /// A pod's status shows an address that no lease of it has.
    WrongPodAddress,
    /// The ledger contradicts itself.
    BrokenLedger,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AuditFinding {
    pub kind: FindingKind,
    pub what: String,
    pub detail: String,
}

/// `fairway status --audit`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditReport {
    pub enis: usize,
    pub addresses: usize,
    pub leases: usize,
    /// Readings that could not be had, and why.
    pub unknown: Vec<String>,
    pub findings: Vec<AuditFinding>,
}

impl AuditReport {
    pub fn clean(&self) -> bool {
        self.findings.is_empty() && self.unknown.is_empty()
    }
}

pub struct Readings<'a> {
    /// ENIs of this instance and ENIs with this node's tags.
    pub cloud: Option<&'a [cloud::Eni]>,
    pub kernel: Option<&'a KernelInventory>,
    pub pods: &'a BoundPods,
}

pub fn audit(state: &State, readings: &Readings<'_>) -> AuditReport {
    let mut audit = Audit { state, findings: BTreeSet::new() };
    if let Err(why) = state.check() {
        audit.find(FindingKind::BrokenLedger, "ledger", why);
    }
    let mut unknown = Vec::new();
    match readings.cloud {
        Some(enis) => audit.cloud(enis),
        None => unknown.push("cloud".to_owned()),
    }
    match readings.kernel {
        Some(kernel) => audit.kernel(kernel),
        None => unknown.push("kernel".to_owned()),
    }
    match readings.pods {
        Some(_) => audit.cluster(readings.pods),
        None => unknown.push("cluster".to_owned()),
    }
    AuditReport {
        enis: state.enis.len(),
        addresses: state.addresses.len(),
        leases: state.leases().count(),
        unknown,
        findings: audit.findings.into_iter().collect(),
    }
}

struct Audit<'a> {
    state: &'a State,
    findings: BTreeSet<AuditFinding>,
}

impl Audit<'_> {
    fn find(&mut self, kind: FindingKind, what: impl ToString, detail: impl Into<String>) {
        self.findings.insert(AuditFinding { kind, what: what.to_string(), detail: detail.into() });
    }

    fn cloud(&mut self, enis: &[cloud::Eni]) {
        let state = self.state;
        let tags = owner_tags(&state.meta.cluster, &state.meta.instance);
        let mut owner: BTreeMap<IpAddr, &EniId> = BTreeMap::new();
        for eni in enis.iter().filter(|e| e.kind != EniKind::Primary) {
            let record = state.enis.iter().find(|(_, r)| match &r.eni {
                Some(ours) => ours.id == eni.id,
                None => eni.tags.get(TAG_TOKEN).is_some_and(|t| *t == r.token.0),
            });
            let Some((key, record)) = record else {
                let ours = tags.iter().all(|(k, v)| eni.tags.get(k) == Some(v));
                if ours && eni.status != EniStatus::Deleting {
                    self.find(
                        FindingKind::LeakedEni,
                        &eni.id,
                        format!("{:?} in the cloud, not in the ledger", eni.status),
                    );
                }
                continue;
            };
            let v4 = eni.ipv4.iter().map(|ip| IpAddr::V4(*ip));
            for ip in v4.chain(eni.ipv6.iter().map(|ip| IpAddr::V6(*ip))) {
                if let Some(other) = owner.insert(ip, &eni.id) {
                    self.find(FindingKind::DoubledAddress, ip, format!("on {other} and on {}", eni.id));
                }
            }
            // While a call is open either side may be ahead.
            let settled = record.ready() && record.assign4.is_none() && record.assign6.is_none();
            if !settled {
                continue;
            }
            let ledger: BTreeSet<Ipv4Addr> = state.of_eni(*key).map(|(ip, _)| ip).collect();
            for ip in eni.ipv4.iter().filter(|ip| !ledger.contains(ip)) {
                self.find(FindingKind::LeakedAddress, ip, format!("on {}, not in the ledger", eni.id));
            }
            for (ip, address) in state.of_eni(*key) {
                let leaving = matches!(address.state, AddressState::Releasing { .. });
                if !leaving && !eni.ipv4.contains(&ip) {
                    self.find(FindingKind::LostAddress, ip, format!("in the ledger, not on {}", eni.id));
                }
                if let Some(ip6) = address.v6.filter(|ip6| !leaving && !eni.ipv6.contains(ip6)) {
                    self.find(FindingKind::LostAddress, ip6, format!("in the ledger, not on {}", eni.id));
                }
            }
            let known6 = |ip6| record.spare6.contains(ip6) || state.of_eni(*key).any(|(_, a)| a.v6 == Some(*ip6));
            for ip6 in eni.ipv6.iter().filter(|ip6| !known6(ip6)) {
                self.find(FindingKind::LeakedAddress, ip6, format!("on {}, not in the ledger", eni.id));
            }
        }
        for record in state.enis.values() {
            let Some(ours) = &record.eni else { continue };
            if record.phase != Phase::Deleting && !enis.iter().any(|e| e.id == ours.id) {
                self.find(
                    FindingKind::LostEni,
                    &ours.id,
                    format!("{:?} in the ledger, not in the cloud", record.phase),
                );
            }
        }
    }

    fn kernel(&mut self, kernel: &KernelInventory) {
        let state = self.state;
        let leased = |ip: &IpAddr| {
            state.leases().any(|(v4, h)| IpAddr::V4(v4) == *ip || h.lease.v6.map(IpAddr::V6) == Some(*ip))
        };
        for ip in kernel.routed.iter().filter(|ip| !leased(ip)) {
            self.find(FindingKind::LeakedRoute, ip, "a host route without a lease");
        }
        for ip in kernel.ruled.iter().filter(|ip| !leased(ip)) {
            self.find(FindingKind::LeakedRule, ip, "a policy rule without a lease");
        }
        let mut linked = 0;
        for (v4, held) in state.leases() {
            linked += 1;
            if held.phase != LeasePhase::Wired || held.lease.mode != AttachMode::Veth {
                continue;
            }
            for ip in [Some(IpAddr::V4(v4)), held.lease.v6.map(IpAddr::V6)].into_iter().flatten() {
                if !kernel.routed.contains(&ip) {
                    self.find(FindingKind::MissingRoute, ip, format!("leased to {}", held.lease.pod));
                }
                if !kernel.ruled.contains(&ip) {
                    self.find(FindingKind::MissingRule, ip, format!("leased to {}", held.lease.pod));
                }
            }
        }
        if kernel.host_links.len() > linked {
            let detail = format!("{} host links for {linked} leases", kernel.host_links.len());
            self.find(FindingKind::LeakedLink, "host links", detail);
        }
        let wired =
            state.leases().filter(|(_, h)| h.phase == LeasePhase::Wired && h.lease.mode == AttachMode::Veth).count();
        if kernel.host_links.len() < wired {
            let detail = format!("{} host links for {wired} wired leases", kernel.host_links.len());
            self.find(FindingKind::MissingLink, "host links", detail);
        }
        for (key, record) in state.enis.iter().filter(|(_, e)| e.ready()) {
            let in_pod = record.purpose == Purpose::Exclusive && state.of_eni(*key).any(|(_, a)| a.held().is_some());
            let Some(eni) = record.eni.as_ref().filter(|_| !in_pod) else { continue };
            if !kernel.enis.iter().any(|(mac, _)| *mac == eni.mac) {
                self.find(
                    FindingKind::MissingDevice,
                    &eni.id,
                    format!("no device with address {} on the node", eni.mac),
                );
            }
        }
    }

    fn cluster(&mut self, pods: &BoundPods) {
        let pods = pods.as_deref().map(Vec::as_slice).unwrap_or_default();
        for (v4, held) in self.state.leases().filter(|(_, h)| h.phase == LeasePhase::Wired) {
            if !pods.iter().any(|p| p.pod == held.lease.pod) {
                self.find(
                    FindingKind::StaleLease,
                    v4,
                    format!("leased to {}, which the cluster does not know", held.lease.pod),
                );
            }
        }
        let mut seen: BTreeMap<IpAddr, &crate::model::PodKey> = BTreeMap::new();
        for pod in pods.iter().filter(|p| !p.terminated) {
            for ip in &pod.addresses {
                if let Some(other) = seen.insert(*ip, &pod.pod) {
                    self.find(FindingKind::DoubledAddress, ip, format!("status of {other} and of {}", pod.pod));
                }
                let IpAddr::V4(v4) = ip else { continue };
                if !self.state.leases().any(|(ours, h)| ours == *v4 && h.lease.pod == pod.pod) {
                    self.find(
                        FindingKind::WrongPodAddress,
                        ip,
                        format!("status of {}, which has no lease of it", pod.pod),
                    );
                }
            }
        }
    }
}
