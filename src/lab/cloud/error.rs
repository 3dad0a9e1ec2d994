//! ApiError: a refusal in the cloud's own words.
//!
//! Purpose: HTTP status, code and message exactly as clients of the real API
//! see them, so that what they do about each is tested. Owner: every part of
//! the API. Invariant: a message never carries a secret.

use std::fmt::Display;

/// What goes into the error answer besides the request id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status} {code}: {message}")]
pub struct ApiError {
    pub status: u16,
    pub code: String,
    pub message: String,
    /// When a throttled caller may come again.
    pub retry_after_ms: Option<u64>,
}

impl ApiError {
    pub fn new(status: u16, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: message.into(), retry_after_ms: None }
    }

    pub fn missing(parameter: &str) -> Self {
        let message = format!(
            "The input parameter \"{parameter}\" that is mandatory for processing this request is not supplied."
        );
        Self::new(400, format!("MissingParameter.{parameter}"), message)
    }

    pub fn invalid(parameter: &str, why: impl Display) -> Self {
        Self::new(
            400,
            format!("InvalidParameter.{parameter}"),
            format!("The specified parameter {parameter} is not valid: {why}."),
        )
    }

    pub fn both(one: &str, other: &str) -> Self {
        let message = format!("The parameters {one} and {other} cannot be specified at the same time.");
        Self::new(400, "InvalidParameter.Conflict", message)
    }

    pub fn unsupported(parameter: &str) -> Self {
        Self::new(400, "UnsupportedParameter", format!("The parameter {parameter} is unsupported."))
    }

    pub fn eni_not_found(id: &str) -> Self {
        Self::new(404, "InvalidEniId.NotFound", format!("The specified EniId \"{id}\" is not found."))
    }

    pub fn instance_not_found(id: &str) -> Self {
        Self::new(404, "InvalidEcsId.NotFound", format!("The specified EcsId \"{id}\" is not found."))
    }

    pub fn vswitch_not_found(id: &str) -> Self {
        Self::new(404, "InvalidVSwitchId.NotFound", format!("The specified VSwitchId \"{id}\" is not found."))
    }

    pub fn security_group_not_found(id: &str) -> Self {
        let message = format!("The specified SecurityGroupId \"{id}\" is not found.");
        Self::new(404, "InvalidSecurityGroupId.NotFound", message)
    }

    pub fn eni_state(expected: &str, is: impl Display) -> Self {
        let message = format!(
            "The operation is not allowed in the current ENI state. Expecting status is \"{expected}\" while current status is \"{is}\"."
        );
        Self::new(400, "InvalidOperation.InvalidEniState", message)
    }

    pub fn eni_type(why: impl Display) -> Self {
        let message = format!("The operation is not allowed in the current ENI type: {why}.");
        Self::new(403, "InvalidOperation.InvalidEniType", message)
    }

    pub fn conflict(id: &str) -> Self {
        let message = format!("The operation conflicts with another task on \"{id}\", please try again later.");
        Self::new(403, "Operation.Conflict", message)
    }

    pub fn not_enough(vswitch: &str) -> Self {
        let message = format!("The specified VSwitch \"{vswitch}\" has not enough IpAddress.");
        Self::new(403, "InvalidVSwitchId.IpNotEnough", message)
    }

    pub fn count4(limit: u32) -> Self {
        let message = format!("The number of IPv4 addresses of the ENI exceeds the limit of {limit}.");
        Self::new(403, "InvalidOperation.Ipv4CountExceeded", message)
    }

    pub fn count6(limit: u32) -> Self {
        let message = format!("The number of IPv6 addresses of the ENI exceeds the limit of {limit}.");
        Self::new(403, "InvalidOperation.Ipv6CountExceeded", message)
    }

    pub fn enis_per_instance(limit: u32) -> Self {
        let message = format!("The number of ENIs exceeds the limit of {limit} for the type of the instance.");
        Self::new(403, "EniPerInstanceLimitExceeded", message)
    }

    pub fn ip_invalid(ip: impl Display, vswitch: &str) -> Self {
        let message = format!("The specified IP \"{ip}\" is not valid in the CIDR block of VSwitch \"{vswitch}\".");
        Self::new(403, "InvalidVSwitchId.IpInvalid", message)
    }

    pub fn ip_assigned(ip: impl Display) -> Self {
        Self::new(403, "InvalidIp.IpAssigned", format!("The specified IP \"{ip}\" has been assigned."))
    }

    pub fn ip_unassigned(ip: impl Display) -> Self {
        Self::new(403, "InvalidIp.IpUnassigned", format!("The specified IP \"{ip}\" is not assigned on this ENI."))
    }

    pub fn ip_repeated(ip: impl Display) -> Self {
        Self::new(403, "InvalidIp.IpRepeated", format!("The specified IP \"{ip}\" is repeated."))
    }

    pub fn internal(why: impl Display) -> Self {
        Self::new(500, "InternalError", format!("The request processing has failed due to some unknown error: {why}."))
    }
}
