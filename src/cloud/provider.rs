//! The seam for other clouds: what a provider must be able to do.
//!
//! Each method is one wire call, tried once: splitting, paging, throttling,
//! retrying and statistics are the same for every cloud and live in `client`
//! and `calls`. A provider says how its own limits and errors are called.

use std::net::{Ipv4Addr, Ipv6Addr};

use futures::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

use super::{CloudError, CloudErrorKind, CreateEni, DescribeEnis, Eni, Identity, InstanceLimits, MetadataEni, VSwitch};
use crate::model::{ClientToken, EniId, InstanceId, VSwitchId};

/// What is limited, counted and measured apart from the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Api {
    CreateNetworkInterface,
    AttachNetworkInterface,
    DetachNetworkInterface,
    DeleteNetworkInterface,
    AssignPrivateIpAddresses,
    UnassignPrivateIpAddresses,
    AssignIpv6Addresses,
    UnassignIpv6Addresses,
    DescribeNetworkInterfaces,
    DescribeInstanceTypes,
    DescribeVSwitches,
    /// The metadata service, all its paths together.
    Metadata,
}

impl Api {
    pub const ALL: [Api; 12] = [
        Api::CreateNetworkInterface,
        Api::AttachNetworkInterface,
        Api::DetachNetworkInterface,
        Api::DeleteNetworkInterface,
        Api::AssignPrivateIpAddresses,
        Api::UnassignPrivateIpAddresses,
        Api::AssignIpv6Addresses,
        Api::UnassignIpv6Addresses,
        Api::DescribeNetworkInterfaces,
        Api::DescribeInstanceTypes,
        Api::DescribeVSwitches,
        Api::Metadata,
    ];

    /// The name on the wire, in metric labels and in errors.
    pub fn name(self) -> &'static str {
        match self {
            Api::CreateNetworkInterface => "CreateNetworkInterface",
            Api::AttachNetworkInterface => "AttachNetworkInterface",
            Api::DetachNetworkInterface => "DetachNetworkInterface",
            Api::DeleteNetworkInterface => "DeleteNetworkInterface",
            Api::AssignPrivateIpAddresses => "AssignPrivateIpAddresses",
            Api::UnassignPrivateIpAddresses => "UnassignPrivateIpAddresses",
            Api::AssignIpv6Addresses => "AssignIpv6Addresses",
            Api::UnassignIpv6Addresses => "UnassignIpv6Addresses",
            Api::DescribeNetworkInterfaces => "DescribeNetworkInterfaces",
            Api::DescribeInstanceTypes => "DescribeInstanceTypes",
            Api::DescribeVSwitches => "DescribeVSwitches",
            Api::Metadata => "Metadata",
        }
    }

    /// True when the call changes something at the cloud.
    pub fn mutates(self) -> bool {
        !matches!(
            self,
            Api::DescribeNetworkInterfaces | Api::DescribeInstanceTypes | Api::DescribeVSwitches | Api::Metadata
        )
    }

    pub fn index(self) -> usize {
        self as usize
    }
}

/// A failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub error: CloudError,
    /// Throttled for what the whole account does, not for this API alone.
    pub account_wide: bool,
}

impl From<CloudError> for Failure {
    fn from(error: CloudError) -> Self {
        Self { error, account_wide: false }
    }
}

impl CloudError {
    /// A failure that carries no code of the cloud's.
    pub(crate) fn new(
        kind: CloudErrorKind,
        action: &str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            action: action.to_owned(),
            code: None,
            message: message.into(),
            request_id: None,
            remedy: remedy.into(),
        }
    }
}

/// Part of a listing; `next` asks for the following part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next: Option<String>,
}

/// How much one call may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallLimits {
    /// Addresses of a new ENI, the primary one included.
    pub create_ipv4: u32,
    pub create_ipv6: u32,
    /// IPv6 addresses per assign or unassign call.
    pub ipv6: usize,
    /// ENI ids per describe call.
    pub describe_ids: usize,
}

/// One attempt of one call. Not `Send`: it stays on CloudApi's thread.
pub type Attempt<'a, T> = LocalBoxFuture<'a, Result<T, Failure>>;

/// A cloud's API. Repeating a mutating call must be safe: those with a token
/// answer a repetition with what the first one did.
pub trait Provider {
    fn limits(&self) -> CallLimits;
    fn create_eni<'a>(&'a self, request: &'a CreateEni) -> Attempt<'a, Eni>;
    fn attach_eni<'a>(&'a self, eni: &'a EniId, instance: &'a InstanceId) -> Attempt<'a, ()>;
    fn detach_eni<'a>(&'a self, eni: &'a EniId, instance: &'a InstanceId) -> Attempt<'a, ()>;
    fn delete_eni<'a>(&'a self, eni: &'a EniId) -> Attempt<'a, ()>;
    fn assign_ipv4<'a>(&'a self, eni: &'a EniId, count: u32, token: &'a ClientToken) -> Attempt<'a, Vec<Ipv4Addr>>;
    fn unassign_ipv4<'a>(&'a self, eni: &'a EniId, addresses: &'a [Ipv4Addr]) -> Attempt<'a, ()>;
    fn assign_ipv6<'a>(&'a self, eni: &'a EniId, count: u32, token: &'a ClientToken) -> Attempt<'a, Vec<Ipv6Addr>>;
    fn unassign_ipv6<'a>(&'a self, eni: &'a EniId, addresses: &'a [Ipv6Addr]) -> Attempt<'a, ()>;
    /// One page of the ENIs that pass the filter; `ids` is the share of
    /// `filter.ids` this call asks for.
    fn describe_enis<'a>(
        &'a self,
        filter: &'a DescribeEnis,
        ids: &'a [EniId],
        page: Option<&'a str>,
    ) -> Attempt<'a, Page<Eni>>;
    fn describe_instance_type<'a>(&'a self, type_name: &'a str) -> Attempt<'a, InstanceLimits>;
    fn describe_vswitches<'a>(&'a self, id: Option<&'a VSwitchId>, page: Option<&'a str>)
    -> Attempt<'a, Page<VSwitch>>;
    fn who_am_i(&self) -> Attempt<'_, Identity>;
    fn metadata_enis(&self) -> Attempt<'_, Vec<MetadataEni>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_api_has_its_own_index_and_its_name_is_its_config_key() {
        for (i, api) in Api::ALL.into_iter().enumerate() {
            assert_eq!(api.index(), i);
            assert_eq!(serde_json::to_value(api).unwrap(), api.name());
        }
    }
}
