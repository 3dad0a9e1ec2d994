//! What the pool knows, as plain data: ENIs, addresses, leases, holds.
//!
//! Owner: the Pool actor keeps one `State`, equal to what the ledger holds on
//! disk. It is a value: a turn clones it (records are shared by `Arc`), applies
//! steps to the clone, writes the difference, and only then lets the clone take
//! its place. Nothing here does IO or reads a clock.
//!
//! Invariants (see [`State::check`]): an address exists once and belongs to an
//! ENI that exists; an IPv6 address is paired with one IPv4 address; an
//! attachment holds at most one address; an exclusive ENI has one address.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cloud::InstanceLimits;
use crate::model::{AttachMode, AttachmentId, ClientToken, EniRef, InstanceId, IpStack, Lease, PodKey, VSwitchId};

/// Milliseconds since the Unix epoch. Wall time, because cool-downs outlive the
/// process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    pub fn plus(self, d: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
    /// How long ago `earlier` was; zero when it lies ahead.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// An ENI's number in the ledger. It exists before the cloud has named the ENI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EniKey(pub u64);

impl fmt::Display for EniKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:010}", self.0)
    }
}

/// What an ENI is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Its addresses go to many pods (veth mode).
    Shared,
    /// The ENI itself goes to one pod.
    Exclusive,
}

impl From<AttachMode> for Purpose {
    fn from(mode: AttachMode) -> Self {
        match mode {
            AttachMode::Veth => Purpose::Shared,
            AttachMode::Exclusive => Purpose::Exclusive,
        }
    }
}

impl Purpose {
    pub fn as_str(self) -> &'static str {
        match self {
            Purpose::Shared => "shared",
            Purpose::Exclusive => "exclusive",
        }
    }
    pub fn mode(self) -> AttachMode {
        match self {
            Purpose::Shared => AttachMode::Veth,
            Purpose::Exclusive => AttachMode::Exclusive,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "phase")]
pub enum Phase {
    /// The create call with this record's token may or may not have been made.
    Creating {
        ipv4: u32,
        ipv6: u32,
    },
    /// Exists; the attach call has been accepted or not yet; no device so far.
    Attaching {
        accepted: bool,
    },
    /// Attached and its device is prepared.
    Ready,
    /// Nothing is leased from it any more; goes when the last lease does.
    Draining,
    Detaching {
        accepted: bool,
    },
    /// Detached (or never attached).
    Deleting,
    /// The cloud no longer has it, but leases on it are still being undone.
    Lost,
}

/// An assign call that may or may not have been made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assign {
    pub token: ClientToken,
    pub count: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub ifname: String,
    pub rx_queues: u32,
    /// The cores each receive queue is spread over, as prepared.
    #[serde(default)]
    pub receive_cores: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eni {
    pub purpose: Purpose,
    pub vswitch: VSwitchId,
    /// Of the create call; also a tag on the ENI, so that it is found again.
    pub token: ClientToken,
    #[serde(flatten)]
    pub phase: Phase,
    /// Known once the cloud has created it.
    pub eni: Option<EniRef>,
    /// Known once the device was prepared.
    pub device: Option<Device>,
    pub assign4: Option<Assign>,
    pub assign6: Option<Assign>,
    /// IPv6 addresses on the ENI that no IPv4 address is paired with yet.
    #[serde(default)]
    pub spare6: BTreeSet<Ipv6Addr>,
}

impl Eni {
    pub fn ready(&self) -> bool {
        self.phase == Phase::Ready
    }
    /// Occupies one of the instance's ENI places.
    pub fn occupies_place(&self) -> bool {
        !matches!(self.phase, Phase::Deleting | Phase::Lost)
    }
    /// Will serve addresses, now or soon.
    pub fn serves(&self) -> bool {
        matches!(self.phase, Phase::Creating { .. } | Phase::Attaching { .. } | Phase::Ready)
    }
    pub fn queues(&self) -> u32 {
        self.device.as_ref().map_or(1, |d| d.rx_queues).max(1)
    }
    pub fn is_primary_address(&self, v4: Ipv4Addr) -> bool {
        self.eni.as_ref().is_some_and(|e| e.primary4 == v4)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeasePhase {
    Wiring,
    Wired,
    /// Being undone by CniServer.
    Unwiring,
    /// Being undone by the pool itself: its sandbox is gone.
    Collecting,
}

/// A lease with what the pool remembers beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub lease: Lease,
    pub phase: LeasePhase,
    pub since: Time,
    pub reserve: Option<Duration>,
    /// Found in the kernel or the cluster after the ledger was lost, and its
    /// namespace or its pod is not known.
    #[serde(default)]
    pub recovered: bool,
}

/// How the sandbox of an attachment begins that nobody knows: only its address
/// was found.
pub const MADE_UP: &str = "recovered-";

/// Whether the runtime cannot know the attachment by this name.
pub fn made_up(attachment: &AttachmentId) -> bool {
    attachment.sandbox.as_str().starts_with(MADE_UP)
}

impl Held {
    pub fn going(&self) -> bool {
        matches!(self.phase, LeasePhase::Unwiring | LeasePhase::Collecting)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AddressState {
    Idle { since: Time },
    Leased(Box<Held>),
    Cooling { until: Time },
    Reserved { pod: PodKey, until: Time },
    Releasing { since: Time },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    pub eni: EniKey,
    pub v6: Option<Ipv6Addr>,
    pub state: AddressState,
}

impl Address {
    pub fn held(&self) -> Option<&Held> {
        match &self.state {
            AddressState::Leased(held) => Some(held),
            _ => None,
        }
    }
    pub fn idle_since(&self) -> Option<Time> {
        match self.state {
            AddressState::Idle { since } => Some(since),
            _ => None,
        }
    }
}

/// Something not to be tried before a moment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HoldKey {
    /// Take no address from this vSwitch.
    VSwitch(VSwitchId),
    /// Create no ENI.
    Create,
    /// Make no call for this ENI.
    Eni(EniKey),
}

impl fmt::Display for HoldKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HoldKey::VSwitch(id) => write!(f, "vswitch/{id}"),
            HoldKey::Create => f.write_str("create"),
            HoldKey::Eni(key) => write!(f, "eni/{key}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub until: Time,
    /// Failures in a row.
    pub failures: u32,
    /// The sentence an operator reads.
    pub reason: String,
    /// Waiting does not help by itself: fail those who wait.
    pub hopeless: bool,
}

/// Who this ledger belongs to, and its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    pub instance: InstanceId,
    pub cluster: String,
    /// Random, made with the ledger: tokens of a lost ledger are never repeated.
    pub nonce: String,
    /// The next number for ENIs and tokens.
    pub next: u64,
    pub limits: InstanceLimits,
    pub ip_stack: IpStack,
    /// Attached secondary ENIs that are not ours; they occupy places.
    pub foreign: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub meta: Arc<Meta>,
    pub enis: BTreeMap<EniKey, Arc<Eni>>,
    pub addresses: BTreeMap<Ipv4Addr, Arc<Address>>,
    pub holds: BTreeMap<HoldKey, Arc<Hold>>,
}

impl State {
    pub fn new(meta: Meta) -> Self {
        Self { meta: Arc::new(meta), enis: BTreeMap::new(), addresses: BTreeMap::new(), holds: BTreeMap::new() }
    }

    pub fn dual(&self) -> bool {
        self.meta.ip_stack == IpStack::Dual
    }

    /// How many addresses a shared ENI of this instance may serve.
    pub fn per_eni(&self) -> u32 {
        let limits = &self.meta.limits;
        if self.dual() { limits.ipv4_per_eni.min(limits.ipv6_per_eni) } else { limits.ipv4_per_eni }
    }

    /// ENI places for us: the type's limit without the primary ENI and those of
    /// others, at most `max_enis`.
    pub fn places(&self, max_enis: Option<u32>) -> u32 {
        let secondary = self.meta.limits.enis.saturating_sub(1).saturating_sub(self.meta.foreign);
        secondary.min(max_enis.unwrap_or(u32::MAX))
    }

    pub fn occupied_places(&self) -> u32 {
        self.enis.values().filter(|e| e.occupies_place()).count() as u32
    }

    pub fn of_eni(&self, key: EniKey) -> impl Iterator<Item = (Ipv4Addr, &Address)> {
        self.addresses.iter().filter(move |(_, a)| a.eni == key).map(|(ip, a)| (*ip, &**a))
    }

    pub fn count_of(&self, key: EniKey) -> u32 {
        self.of_eni(key).count() as u32
    }

    pub fn leases(&self) -> impl Iterator<Item = (Ipv4Addr, &Held)> {
        self.addresses.iter().filter_map(|(ip, a)| a.held().map(|h| (*ip, h)))
    }

    pub fn lease_of(&self, attachment: &AttachmentId) -> Option<(Ipv4Addr, &Held)> {
        self.leases().find(|(_, h)| h.lease.attachment == *attachment)
    }

    /// May this address be leased now (to anyone)?
    pub fn usable(&self, address: &Address) -> bool {
        matches!(address.state, AddressState::Idle { .. })
            && (!self.dual() || address.v6.is_some())
            && self.enis.get(&address.eni).is_some_and(|e| e.ready())
    }

    pub fn held_back(&self, key: &HoldKey, now: Time) -> Option<&Hold> {
        self.holds.get(key).filter(|h| h.until > now).map(|h| &**h)
    }

    /// Every invariant that does not depend on the outside world.
    pub fn check(&self) -> Result<(), String> {
        let mut v6: BTreeMap<Ipv6Addr, String> = BTreeMap::new();
        let mut attachments = BTreeSet::new();
        let mut claim6 = |ip: Ipv6Addr, by: String| match v6.insert(ip, by.clone()) {
            Some(other) => Err(format!("{ip} belongs to {other} and to {by}")),
            None => Ok(()),
        };
        for (ip, address) in &self.addresses {
            let Some(eni) = self.enis.get(&address.eni) else {
                return Err(format!("{ip} belongs to ENI {}, which does not exist", address.eni));
            };
            if let Some(ip6) = address.v6 {
                claim6(ip6, ip.to_string())?;
            }
            let Some(held) = address.held() else { continue };
            let lease = &held.lease;
            if lease.v4 != *ip || lease.v6 != address.v6 {
                return Err(format!("{ip} is leased as {} and {:?}", lease.v4, lease.v6));
            }
            if !attachments.insert(&lease.attachment) {
                return Err(format!("attachment {} holds two addresses", lease.attachment));
            }
            if eni.eni.as_ref().is_none_or(|e| e.id != lease.eni.id) {
                return Err(format!("{ip} is leased on {} but belongs to another ENI", lease.eni.id));
            }
        }
        let mut ids = BTreeSet::new();
        for (key, eni) in &self.enis {
            for ip6 in &eni.spare6 {
                claim6(*ip6, format!("ENI {key}"))?;
            }
            if key.0 >= self.meta.next {
                return Err(format!("ENI {key} is newer than the counter {}", self.meta.next));
            }
            if eni.eni.as_ref().is_some_and(|e| !ids.insert(&e.id)) {
                return Err(format!("ENI {key} is recorded twice"));
            }
            if eni.eni.is_none() != matches!(eni.phase, Phase::Creating { .. }) {
                return Err(format!("ENI {key} in {:?} with the cloud's facts {:?}", eni.phase, eni.eni.is_some()));
            }
        }
        Ok(())
    }
}
