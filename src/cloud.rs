//! CloudApi: the actor that owns the cloud's API.
//!
//! Purpose: every call to the cloud goes through here, signed, throttled (one
//! limiter per API and an adaptive one), retried only when that is safe, inside
//! the deadline its message carries. Three lanes: a pod is waiting, refill,
//! release; a release never delays a pod.
//!
//! Owner of: HTTP clients, credentials, limiters. State after a restart: none;
//! Pool replays what was in flight from its ledger.

mod calls;
mod client;
mod gate;

/// Alibaba Cloud.
pub mod aliyun;
/// The `cloud` section of the configuration.
pub mod config;
/// Access keys: static, from files, from the instance's RAM role.
pub mod credentials;
/// The HTTP client.
pub mod http;
/// The seam for other clouds.
pub mod provider;
/// Which failures are tried again, and when. Pure.
pub mod retry;
/// Counters and latencies.
pub mod stats;
/// Rates, lanes and slots. Pure.
pub mod throttle;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::rc::Rc;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use tracing::Instrument as _;

use self::client::{Caller, Client};
use self::provider::Provider;
use crate::actor::{Actor, Ctx, Handles, Message, Responder, StartError};
use crate::model::{ClientToken, EniId, InstanceId, Mac, SecurityGroupId, VSwitchId};

pub use self::config::Config;
pub use self::stats::{CloudSnapshot, CloudStats};

/// Who is waiting for the answer; lower is more urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lane {
    PodWaiting,
    Refill,
    Release,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EniStatus {
    Creating,
    Available,
    Attaching,
    InUse,
    Detaching,
    Deleting,
    #[serde(other)]
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EniKind {
    Primary,
    Secondary,
    #[serde(other)]
    Other,
}

/// An ENI as the cloud describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eni {
    pub id: EniId,
    pub mac: Mac,
    pub status: EniStatus,
    pub kind: EniKind,
    pub instance: Option<InstanceId>,
    pub vswitch: VSwitchId,
    pub vpc: String,
    pub zone: String,
    pub security_groups: Vec<SecurityGroupId>,
    /// The ENI's own first address; also in `ipv4`.
    pub primary4: Ipv4Addr,
    /// All private IPv4 addresses, the primary one first.
    pub ipv4: Vec<Ipv4Addr>,
    pub ipv6: Vec<Ipv6Addr>,
    pub tags: BTreeMap<String, String>,
    pub queues: Option<u32>,
    pub delete_on_release: bool,
    pub description: String,
    /// RFC 3339, as the cloud said it.
    pub created: String,
}

/// What an instance type may hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceLimits {
    pub type_name: String,
    /// ENIs, the primary one included.
    pub enis: u32,
    pub ipv4_per_eni: u32,
    pub ipv6_per_eni: u32,
    pub queues_per_secondary_eni: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VSwitch {
    pub id: VSwitchId,
    pub zone: String,
    pub cidr4: Ipv4Net,
    pub cidr6: Option<Ipv6Net>,
    pub available: u32,
}

/// Who this node is, from the metadata service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub instance: InstanceId,
    pub instance_type: String,
    pub region: String,
    pub zone: String,
    pub vpc: String,
    pub vswitch: VSwitchId,
    pub primary_mac: Mac,
}

/// An ENI of this instance as the metadata service shows it; lags the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataEni {
    pub id: EniId,
    pub mac: Mac,
    pub vswitch: VSwitchId,
    pub primary4: Ipv4Addr,
    pub ipv4: Vec<Ipv4Addr>,
    pub ipv6: Vec<Ipv6Addr>,
}

/// Cause of a failed call, reduced to what a caller can act on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloudErrorKind {
    /// The vSwitch has no free address.
    VSwitchExhausted,
    /// The instance holds as many ENIs as its type allows.
    InstanceEniLimit,
    /// The ENI holds as many addresses as the instance type allows.
    InstanceIpLimit,
    /// Another quota of the account (security group, region).
    QuotaExceeded,
    /// The credentials may not do this action.
    Forbidden,
    /// Refused for its rate; worth trying again after this long.
    Throttled {
        retry_after: Duration,
    },
    NotFound,
    /// Another operation on the same resource is in progress.
    Conflict,
    /// The resource is in a state that does not allow this.
    InvalidState,
    /// The same client token was used with other parameters.
    TokenMismatch,
    /// No answer, or an unreadable one; the effect is unknown.
    Transport,
    /// The deadline passed; the effect is unknown.
    Deadline,
    /// The cloud refused the request for a reason that retrying cannot mend.
    Rejected,
}

/// A failed call: which action, why, and what the operator can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{action}: {message}{}; {remedy}", .code.as_ref().map(|c| format!(" ({c})")).unwrap_or_default())]
pub struct CloudError {
    pub kind: CloudErrorKind,
    pub action: String,
    /// The cloud's own code, e.g. `InvalidVSwitchId.IpNotEnough`.
    pub code: Option<String>,
    pub message: String,
    pub request_id: Option<String>,
    pub remedy: String,
}

impl CloudError {
    /// True when the call may have had its effect although it failed.
    pub fn effect_unknown(&self) -> bool {
        matches!(self.kind, CloudErrorKind::Transport | CloudErrorKind::Deadline)
    }
}

macro_rules! call {
    ($(#[$doc:meta])* $name:ident { $($field:ident : $ty:ty),* $(,)? } -> $reply:ty) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name { $(pub $field: $ty,)* pub lane: Lane }
        impl Message for $name {
            const NAME: &'static str = stringify!($name);
            type Reply = $reply;
            type Error = CloudError;
        }
    };
}

call!(
    /// Create a secondary ENI with all its addresses in one call. `ipv4` counts
    /// the primary address. The token must be in the ledger before the call.
    /// What one call cannot bring (50 IPv4, 10 IPv6) is left out: look at the
    /// answer, and assign the rest.
    CreateEni {
        vswitch: VSwitchId,
        security_groups: Vec<SecurityGroupId>,
        ipv4: u32,
        ipv6: u32,
        tags: BTreeMap<String, String>,
        description: String,
        token: ClientToken,
    } -> Eni
);
call!(
    /// Accepted, not finished: describe the ENI until it is `InUse`. Succeeds
    /// when it is attached to this instance already.
    AttachEni { eni: EniId, instance: InstanceId } -> ()
);
call!(
    /// Accepted, not finished: describe the ENI until it is `Available`.
    /// Succeeds when it is gone or no longer on this instance.
    DetachEni { eni: EniId, instance: InstanceId } -> ()
);
call!(
    /// Succeeds when it is gone already.
    DeleteEni { eni: EniId } -> ()
);
call!(
    /// The new addresses; all of them or none.
    AssignIpv4 { eni: EniId, count: u32, token: ClientToken } -> Vec<Ipv4Addr>
);
call!(
    /// Succeeds when they are gone already, some or all.
    UnassignIpv4 { eni: EniId, addresses: Vec<Ipv4Addr> } -> ()
);
call!(
    /// The new addresses; fewer than asked for when a later one of the calls it
    /// takes (ten each) was refused.
    AssignIpv6 { eni: EniId, count: u32, token: ClientToken } -> Vec<Ipv6Addr>
);
call!(
    /// Succeeds when they are gone already, some or all.
    UnassignIpv6 { eni: EniId, addresses: Vec<Ipv6Addr> } -> ()
);
call!(
    /// All pages. Empty filters mean "no restriction on this".
    DescribeEnis {
        ids: Vec<EniId>,
        instance: Option<InstanceId>,
        tags: BTreeMap<String, String>,
        status: Option<EniStatus>,
    } -> Vec<Eni>
);
call!(DescribeInstanceType { type_name: String } -> InstanceLimits);
call!(DescribeVSwitches { ids: Vec<VSwitchId> } -> Vec<VSwitch>);
call!(
    /// Who this node is. Answered from the metadata service.
    WhoAmI {} -> Identity
);
call!(
    /// The instance's ENIs as the metadata service shows them.
    MetadataEnis {} -> Vec<MetadataEni>
);

/// The actor. Every request is worked on beside the others; the throttle says
/// when it may go.
pub struct CloudApi {
    client: Rc<Client>,
}

impl CloudApi {
    /// What the factory of `Tree::child` calls; the counters outlive it.
    pub async fn new(config: &Config, stats: CloudStats) -> Result<Self, StartError> {
        config.validate().map_err(StartError::new)?;
        let config = config.clone();
        match config.provider {
            config::ProviderName::Aliyun => {
                let reads_files = config.clone();
                let http = tokio::task::spawn_blocking(move || aliyun::Aliyun::http(&reads_files));
                let http = http.await.map_err(StartError::new)?.map_err(StartError::new)?;
                let provider = aliyun::Aliyun::new(&config, http).map_err(StartError::new)?;
                Ok(Self::over(Box::new(provider), &config, stats))
            }
        }
    }

    /// Over a provider of one's own.
    pub fn over(provider: Box<dyn Provider>, config: &Config, stats: CloudStats) -> Self {
        Self { client: Rc::new(Client::new(provider, config, stats)) }
    }
}

impl Actor for CloudApi {
    const NAME: &'static str = "CloudApi";
}

macro_rules! handles {
    ($($message:ident => $operation:ident),* $(,)?) => {$(
        impl Handles<$message> for CloudApi {
            fn handle(&mut self, message: $message, to: Responder<$message>, ctx: &mut Ctx<'_, Self>) {
                let client = self.client.clone();
                let span = to.span().clone();
                let work = async move {
                    let gone = || to.abandoned();
                    let who = Caller::new(message.lane, to.deadline().instant(), &gone);
                    let result = client.$operation(&who, &message).await;
                    to.answer(result);
                };
                ctx.spawn(work.instrument(span), |_, (), _| {});
            }
        }
    )*};
}

handles!(
    CreateEni => create_eni,
    AttachEni => attach_eni,
    DetachEni => detach_eni,
    DeleteEni => delete_eni,
    AssignIpv4 => assign_ipv4,
    UnassignIpv4 => unassign_ipv4,
    AssignIpv6 => assign_ipv6,
    UnassignIpv6 => unassign_ipv6,
    DescribeEnis => describe_enis,
    DescribeInstanceType => describe_instance_type,
    DescribeVSwitches => describe_vswitches,
    WhoAmI => who_am_i,
    MetadataEnis => metadata_enis,
);
