//! What the ledger, the cloud, the kernel and the cluster say, made one again.
//!
//! Pure: steps out of readings. Used after every start (also with an empty
//! ledger: everything is then adopted and recovered), whenever a call's answer
//! makes the ledger's view doubtful, and from time to time.
//!
//! Rules: an ENI is known by its id or by the token it was created with. An
//! address that the kernel or a pod still uses is never idle. What the cloud
//! does not show is believed lost only when it was missing before as well, for
//! the API answers from caches.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::cloud::{self, EniKind, EniStatus, VSwitch};
use crate::model::{
    AttachMode, AttachmentId, ClientToken, EniId, EniRef, InstanceId, Lease, PodKey, Subnet, VSwitchId,
};
use crate::netns::{KernelInventory, Note};

use super::demand::{BoundPod, BoundPods};
use super::state::{AddressState, Device, Eni, EniKey, Held, LeasePhase, MADE_UP, Phase, Purpose, State, Time};
use super::step::Step;

pub const TAG_CLUSTER: &str = "fairway.io/cluster";
pub const TAG_NODE: &str = "fairway.io/node";
pub const TAG_TOKEN: &str = "fairway.io/token";
pub const TAG_PURPOSE: &str = "fairway.io/purpose";

/// The tags by which this node's ENIs are found. The node is named by its
/// instance, which no other node ever is.
pub fn owner_tags(cluster: &str, instance: &InstanceId) -> BTreeMap<String, String> {
    [(TAG_CLUSTER, cluster), (TAG_NODE, instance.as_str())].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
}

pub fn eni_tags(
    cluster: &str,
    instance: &InstanceId,
    token: &ClientToken,
    purpose: Purpose,
) -> BTreeMap<String, String> {
    let mut tags = owner_tags(cluster, instance);
    tags.insert(TAG_TOKEN.to_owned(), token.0.clone());
    tags.insert(TAG_PURPOSE.to_owned(), purpose.as_str().to_owned());
    tags
}

/// The IPv4 gateway is a block's last address but two, the IPv6 gateway its last
/// but eight.
pub fn subnet(vswitch: &VSwitch) -> Subnet {
    let gateway4 = |net: Ipv4Net| Ipv4Addr::from(u32::from(net.broadcast()).saturating_sub(2));
    let gateway6 = |net: Ipv6Net| Ipv6Addr::from(u128::from(net.broadcast()).saturating_sub(8));
    Subnet {
        cidr4: vswitch.cidr4,
        gateway4: gateway4(vswitch.cidr4),
        cidr6: vswitch.cidr6,
        gateway6: vswitch.cidr6.map(gateway6),
    }
}

pub fn eni_ref(eni: &cloud::Eni, vswitch: &VSwitch) -> EniRef {
    EniRef {
        id: eni.id.clone(),
        mac: eni.mac,
        vswitch: eni.vswitch.clone(),
        primary4: eni.primary4,
        subnet: subnet(vswitch),
    }
}

/// One look at the cloud.
pub struct Sight<'a> {
    /// ENIs of this instance and ENIs with this node's tags.
    pub enis: &'a [cloud::Eni],
    pub vswitches: &'a BTreeMap<VSwitchId, VSwitch>,
    /// ENIs with a call in flight, now or while looking: not judged.
    pub busy: &'a dyn Fn(EniKey) -> bool,
    /// ENIs the look before did not show either.
    pub missed: &'a BTreeSet<EniKey>,
    pub quarantine: Duration,
}

/// Steps that bring the ledger to what the cloud shows, and the ENIs it lacks.
pub fn with_cloud(state: &State, sight: &Sight<'_>, now: Time) -> (Vec<Step>, BTreeSet<EniKey>) {
    let mut steps = Vec::new();
    let mut missing = BTreeSet::new();
    let mut known: BTreeSet<&EniId> = state.enis.values().filter_map(|e| e.eni.as_ref().map(|e| &e.id)).collect();
    for (key, record) in &state.enis {
        let found = sight.enis.iter().find(|e| match &record.eni {
            Some(ours) => ours.id == e.id,
            None => e.tags.get(TAG_TOKEN).is_some_and(|t| *t == record.token.0),
        });
        if let Some(found) = found {
            known.insert(&found.id);
        }
        if (sight.busy)(*key) {
            // Not judged now, and not forgotten: whoever looks looks again.
            if found.is_none() && sight.missed.contains(key) {
                missing.insert(*key);
            }
            continue;
        }
        match found {
            Some(seen) => seen_eni(state, *key, record, seen, sight, now, &mut steps),
            None if matches!(record.phase, Phase::Creating { .. } | Phase::Lost) => {}
            None if record.phase == Phase::Deleting => steps.push(Step::EniDeleted { key: *key }),
            None if sight.missed.contains(key) => steps.push(Step::EniLost { key: *key }),
            None => {
                missing.insert(*key);
            }
        }
    }
    let mut number = state.meta.next;
    for seen in sight.enis.iter().filter(|e| !known.contains(&e.id) && is_ours(state, e)) {
        if let Some(step) = adopt(state, seen, EniKey(number), sight) {
            steps.push(step);
            number += 1;
        }
    }
    (steps, missing)
}

/// Attached secondary ENIs that are not this node's to manage.
pub fn foreign(state: &State, enis: &[cloud::Eni]) -> u32 {
    let here = |e: &&cloud::Eni| e.instance.as_ref() == Some(&state.meta.instance) && e.kind != EniKind::Primary;
    let recorded = |e: &cloud::Eni| state.enis.values().any(|r| r.eni.as_ref().is_some_and(|r| r.id == e.id));
    enis.iter().filter(here).filter(|e| !is_ours(state, e) && !recorded(e)).count() as u32
}

fn is_ours(state: &State, eni: &cloud::Eni) -> bool {
    let tags = owner_tags(&state.meta.cluster, &state.meta.instance);
    eni.kind != EniKind::Primary && tags.iter().all(|(k, v)| eni.tags.get(k) == Some(v))
}

fn seen_eni(
    state: &State,
    key: EniKey,
    record: &Eni,
    seen: &cloud::Eni,
    sight: &Sight<'_>,
    now: Time,
    steps: &mut Vec<Step>,
) {
    use EniStatus::{Attaching, Available, InUse};
    let here = seen.instance.as_ref().is_none_or(|i| *i == state.meta.instance || i.as_str().is_empty());
    let attached = here && matches!(seen.status, InUse | Attaching);
    match record.phase {
        Phase::Creating { .. } => {
            let Some(vswitch) = sight.vswitches.get(&seen.vswitch) else { return };
            let eni = Box::new(eni_ref(seen, vswitch));
            steps.push(Step::EniCreated { key, eni, ipv4: seen.ipv4.clone(), ipv6: seen.ipv6.clone() });
            if attached {
                steps.push(Step::EniAttaching { key, accepted: true });
            }
        }
        Phase::Lost => {}
        // It cannot be deleted while it is attached.
        Phase::Deleting if attached => steps.push(Step::EniDetaching { key, accepted: false }),
        Phase::Deleting => {}
        // Another instance has it: it will not come back.
        _ if !here => steps.push(Step::EniLost { key }),
        Phase::Attaching { accepted } if attached != accepted && (attached || seen.status == Available) => {
            steps.push(Step::EniAttaching { key, accepted: attached });
        }
        Phase::Attaching { .. } => sync(state, key, seen, now, steps),
        Phase::Ready if seen.status == Available => steps.push(Step::EniAttaching { key, accepted: false }),
        Phase::Ready => sync(state, key, seen, now, steps),
        Phase::Draining => {}
        Phase::Detaching { .. } if seen.status == Available => steps.push(Step::EniDetached { key }),
        Phase::Detaching { accepted: true } if seen.status == InUse => {
            steps.push(Step::EniDetaching { key, accepted: false });
        }
        Phase::Detaching { .. } => {}
    }
}

/// Idle addresses are believed gone when the cloud has had this long to show them.
const SHOWN_AFTER: Duration = Duration::from_secs(60);

fn sync(state: &State, key: EniKey, seen: &cloud::Eni, now: Time, steps: &mut Vec<Step>) {
    let (cloud4, cloud6): (BTreeSet<Ipv4Addr>, BTreeSet<Ipv6Addr>) =
        (seen.ipv4.iter().copied().collect(), seen.ipv6.iter().copied().collect());
    let gone = |s: &AddressState| match s {
        AddressState::Idle { since } => now.since(*since) >= SHOWN_AFTER,
        AddressState::Releasing { .. } => true,
        _ => false,
    };
    let mut ours4 = BTreeSet::new();
    let mut ours6: BTreeSet<Ipv6Addr> = state.enis.get(&key).map(|e| e.spare6.clone()).unwrap_or_default();
    let (mut drop4, mut drop6) = (Vec::new(), Vec::new());
    drop6.extend(ours6.iter().filter(|ip| !cloud6.contains(*ip)));
    for (ip, address) in state.of_eni(key) {
        ours4.insert(ip);
        ours6.extend(address.v6);
        if gone(&address.state) {
            drop6.extend(address.v6.filter(|ip6| !cloud6.contains(ip6)));
            if !cloud4.contains(&ip) {
                drop4.push(ip);
            }
        }
    }
    let add4: Vec<Ipv4Addr> = cloud4.difference(&ours4).copied().collect();
    let add6: Vec<Ipv6Addr> = cloud6.difference(&ours6).copied().collect();
    if !(add4.is_empty() && add6.is_empty() && drop4.is_empty() && drop6.is_empty()) {
        steps.push(Step::SyncEni { key, add4, add6, drop4, drop6 });
    }
}

fn adopt(state: &State, seen: &cloud::Eni, key: EniKey, sight: &Sight<'_>) -> Option<Step> {
    let elsewhere = seen.instance.as_ref().is_some_and(|i| *i != state.meta.instance && !i.as_str().is_empty());
    let phase = match seen.status {
        EniStatus::InUse | EniStatus::Attaching if !elsewhere => Phase::Attaching { accepted: true },
        EniStatus::Detaching => Phase::Detaching { accepted: true },
        EniStatus::Available => Phase::Deleting,
        _ => return None,
    };
    let purpose = match seen.tags.get(TAG_PURPOSE).map(String::as_str) {
        Some("exclusive") => Purpose::Exclusive,
        _ => Purpose::Shared,
    };
    let token = seen.tags.get(TAG_TOKEN).cloned().unwrap_or_else(|| format!("adopted-{}", seen.id));
    let eni = Box::new(eni_ref(seen, sight.vswitches.get(&seen.vswitch)?));
    let serves = matches!(phase, Phase::Attaching { .. });
    let list = |on: bool| if on { (seen.ipv4.clone(), seen.ipv6.clone()) } else { Default::default() };
    let (ipv4, ipv6) = list(serves);
    let quarantine = sight.quarantine;
    Some(Step::AdoptEni { key, purpose, token: ClientToken(token), phase, eni, ipv4, ipv6, quarantine })
}

/// After a start: the node's own side. `rebuilt` when the ledger was new, empty
/// or damaged, and may lack leases that exist.
pub fn with_node(state: &State, kernel: &KernelInventory, pods: &BoundPods, rebuilt: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    // Host sides are prepared again: the machine may have been rebooted.
    for (key, eni) in state.enis.iter().filter(|(_, e)| e.ready()) {
        let in_pod = eni.purpose == Purpose::Exclusive && state.of_eni(*key).any(|(_, a)| a.held().is_some());
        if !in_pod {
            steps.push(Step::EniAttaching { key: *key, accepted: true });
        }
    }
    // Whoever was releasing is gone.
    for (v4, _) in state.leases().filter(|(_, h)| h.phase == LeasePhase::Unwiring) {
        steps.push(Step::Unwire { v4, collect: true });
    }

    let shown = by_address(pods.iter().flat_map(|p| p.iter()).filter(|p| !p.terminated).map(|p| (&p.addresses, p)));
    let noted = by_address(kernel.attached.iter().map(|a| (&a.addresses, &a.note)));
    let v4s = |list: &[IpAddr]| list.iter().filter_map(v4_of).collect::<BTreeSet<_>>();
    let (routed, ruled) = (v4s(&kernel.routed), v4s(&kernel.ruled));
    // The cloud's lists do not pair the families. Known pairs come first; those
    // whose pair is not known take what is left, and what is left and in use is
    // nobody else's.
    let mut then = state.clone();
    for known in [true, false] {
        let free = then.addresses.clone();
        for (v4, address) in free.iter().filter(|(_, a)| a.held().is_none()) {
            let Some(eni) = state.enis.get(&address.eni) else { continue };
            let pod = shown.get(v4);
            // An attachment holds one address; the ledger's word comes first.
            let note = noted.get(v4).filter(|(note, _)| then.lease_of(&note.attachment).is_none());
            let v6 = note.and_then(|n| n.1).or(pod.and_then(|p| p.1));
            if v6.is_some() != known {
                continue;
            }
            let device_here = eni.eni.as_ref().is_some_and(|e| kernel.enis.iter().any(|(mac, _)| *mac == e.mac));
            let in_pod = rebuilt && eni.purpose == Purpose::Exclusive && !device_here;
            let stray = address.v6.is_some_and(|v6| kernel.routed.contains(&IpAddr::V6(v6)));
            // A rule alone is what a half-done release leaves behind.
            let used = routed.contains(v4) || pod.is_some() || in_pod || rebuilt && stray;
            if !used && !ruled.contains(v4) && !stray {
                continue;
            }
            let lease = recovered(*v4, v6, eni, pod.map(|p| p.0), note.map(|n| n.0));
            let Some(lease) = lease.map(Box::new) else { continue };
            let recover = Step::Recover { lease, collect: !used };
            // Only who holds what is of interest here, not since when.
            if then.apply(&recover, Time(0)).is_err() {
                continue;
            }
            steps.push(recover);
            if in_pod {
                let rx_queues = state.meta.limits.queues_per_secondary_eni.max(1);
                let device = Device { ifname: String::new(), rx_queues, receive_cores: Vec::new() };
                steps.push(Step::EniReady { key: address.eni, device });
            }
        }
    }
    steps
}

fn v4_of(ip: &IpAddr) -> Option<Ipv4Addr> {
    if let IpAddr::V4(v4) = ip { Some(*v4) } else { None }
}

/// Who has an IPv4 address, with the IPv6 address that goes with it.
fn by_address<'a, T>(
    all: impl Iterator<Item = (&'a Vec<IpAddr>, &'a T)>,
) -> BTreeMap<Ipv4Addr, (&'a T, Option<Ipv6Addr>)> {
    let mut found = BTreeMap::new();
    for (addresses, who) in all {
        let v6 = addresses.iter().find_map(|ip| if let IpAddr::V6(v6) = ip { Some(*v6) } else { None });
        found.extend(addresses.iter().filter_map(v4_of).map(|v4| (v4, (who, v6))));
    }
    found
}

/// A lease that the ledger lacks: what the host link says, and what the cluster
/// does, the rest made up. `v6`: what is known to go with the address.
fn recovered(
    v4: Ipv4Addr,
    v6: Option<Ipv6Addr>,
    eni: &Eni,
    shown: Option<&BoundPod>,
    note: Option<&Note>,
) -> Option<Lease> {
    let made_up = || AttachmentId { sandbox: format!("{MADE_UP}{v4}").into(), ifname: "eth0".to_owned() };
    let pod = note.and_then(|n| n.pod.clone());
    // Who has the address in the cluster may be another pod than the link's.
    let shown = shown.filter(|shown| pod.as_ref().is_none_or(|pod| *pod == shown.pod));
    Some(Lease {
        attachment: note.map_or_else(made_up, |n| n.attachment.clone()),
        pod_uid: note.and_then(|n| n.pod_uid.clone()).or(shown.map(|s| s.uid.clone())),
        pod: pod.or(shown.map(|s| s.pod.clone())).unwrap_or_else(|| PodKey::new("", format!("unknown-{v4}"))),
        mode: match eni.purpose {
            Purpose::Shared => AttachMode::Veth,
            Purpose::Exclusive => AttachMode::Exclusive,
        },
        eni: eni.eni.clone()?,
        v4,
        v6,
        netns: note.and_then(|n| n.netns.clone()).unwrap_or_default(),
        bandwidth: note.map(|n| n.bandwidth).unwrap_or_default(),
        traffic: note.map(|n| n.traffic).unwrap_or_default(),
    })
}

/// Why a lease's owner seems to be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gone {
    /// Its network namespace no longer exists.
    Sandbox,
    /// The cluster does not know the pod.
    Pod,
}

/// What a sweep over the leases reads.
pub struct Evidence<'a> {
    pub netns_exists: &'a dyn Fn(&std::path::Path) -> bool,
    /// Read only when there are recovered leases.
    pub kernel: Option<&'a KernelInventory>,
    pub pods: &'a BoundPods,
}

fn addresses(lease: &Lease) -> impl Iterator<Item = IpAddr> {
    std::iter::once(IpAddr::V4(lease.v4)).chain(lease.v6.map(IpAddr::V6))
}

/// Is the owner of this lease gone, as far as one reading can tell?
pub fn gone(held: &Held, evidence: &Evidence<'_>) -> Option<Gone> {
    let lease = &held.lease;
    // Not all is known by which others are judged: what the kernel shows decides.
    if held.recovered {
        let kernel = evidence.kernel?;
        let sandbox_gone = match lease.mode {
            AttachMode::Veth => !addresses(lease).any(|ip| kernel.routed.contains(&ip)),
            AttachMode::Exclusive => kernel.enis.iter().any(|(mac, _)| *mac == lease.eni.mac),
        };
        if sandbox_gone {
            return Some(Gone::Sandbox);
        }
        let pods = evidence.pods.as_ref()?;
        let shown = pods.iter().any(|p| !p.terminated && p.addresses.contains(&IpAddr::V4(lease.v4)));
        return (!shown).then_some(Gone::Pod);
    }
    if !(evidence.netns_exists)(&lease.netns) {
        return Some(Gone::Sandbox);
    }
    let pods = evidence.pods.as_ref()?;
    let same = |uid: &str| lease.pod_uid.as_deref().is_none_or(|ours| ours == uid);
    let known = pods.iter().any(|p| p.pod == lease.pod && same(&p.uid));
    (!known).then_some(Gone::Pod)
}

/// Unattached ENIs of this cluster that no node seems to claim, for the elected
/// node: seen so for `delay`, and not in this node's own ledger.
pub fn orphans(
    state: &State,
    seen: &[cloud::Eni],
    first_seen: &mut BTreeMap<EniId, Time>,
    delay: Duration,
    now: Time,
) -> Vec<EniId> {
    let own = |e: &cloud::Eni| {
        let token = e.tags.get(TAG_TOKEN);
        state.enis.values().any(|r| r.eni.as_ref().is_some_and(|r| r.id == e.id) || token == Some(&r.token.0))
    };
    let orphan = |e: &&cloud::Eni| {
        e.status == EniStatus::Available
            && e.kind != EniKind::Primary
            && e.tags.get(TAG_CLUSTER) == Some(&state.meta.cluster)
            && e.tags.contains_key(TAG_NODE)
            && !own(e)
    };
    let now_seen: BTreeSet<EniId> = seen.iter().filter(orphan).map(|e| e.id.clone()).collect();
    first_seen.retain(|id, _| now_seen.contains(id));
    for id in now_seen {
        first_seen.entry(id).or_insert(now);
    }
    first_seen.iter().filter(|(_, since)| now.since(**since) >= delay).map(|(id, _)| id.clone()).collect()
}
