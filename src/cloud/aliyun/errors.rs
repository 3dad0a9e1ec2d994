//! Error answers reduced to what a caller can act on. Pure.
//!
//! `{RequestId, HostId, Code, Message, Recommend}`. Only an answer that has a
//! code is an answer of the cloud's: a bare 404 of some proxy must not pass for
//! "this ENI does not exist".

use std::time::Duration;

use serde::Deserialize;

use super::Product;
use crate::cloud::provider::{Api, Failure};
use crate::cloud::{CloudError, CloudErrorKind};

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Refusal {
    code: Option<String>,
    message: Option<String>,
    request_id: Option<String>,
}

/// `None` when the call succeeded and its body is worth decoding.
pub fn refusal(api: Api, status: u16, retry_after: Option<Duration>, body: &[u8]) -> Option<Failure> {
    if (200..300).contains(&status) {
        return None;
    }
    let refusal: Refusal = serde_json::from_slice(body).unwrap_or_default();
    let Some(code) = refusal.code.filter(|code| is_code(code)) else {
        if status == 429 {
            return Some(failure(api, "Throttling", "HTTP 429", None, retry_after));
        }
        let cause = format!("HTTP {status} without the cloud's error code");
        return Some(unreadable(api.name(), &cause, None).into());
    };
    let message = printable(&refusal.message.unwrap_or_default(), 400);
    let request_id = refusal.request_id.map(|id| printable(&id, 64));
    let mut failure = failure(api, &code, &message, request_id, retry_after);
    if status == 429 && !matches!(failure.error.kind, CloudErrorKind::Throttled { .. }) {
        failure.error.kind = CloudErrorKind::Throttled { retry_after: retry_after.unwrap_or_default() };
    }
    if status >= 500 && failure.error.kind == CloudErrorKind::Rejected {
        failure.error.kind = CloudErrorKind::Transport;
        failure.error.remedy = "the cloud's service has a fault; nothing to do if it passes".to_owned();
    }
    Some(failure)
}

/// True for refusals that newer keys may mend.
pub fn keys_are_stale(code: &str) -> bool {
    code.starts_with("InvalidSecurityToken") || code.starts_with("InvalidAccessKeyId")
}

/// An answer that makes no sense; what the call did is unknown.
pub(crate) fn unreadable(action: &str, cause: &str, request_id: Option<String>) -> CloudError {
    let remedy = "check that the endpoint is the cloud's API and no proxy answers in its place";
    CloudError {
        request_id,
        ..CloudError::new(CloudErrorKind::Transport, action, format!("unreadable answer: {cause}"), remedy)
    }
}

fn failure(api: Api, code: &str, message: &str, request_id: Option<String>, retry_after: Option<Duration>) -> Failure {
    let (kind, remedy) = classify(api, code, retry_after.unwrap_or_default());
    let error = CloudError {
        kind,
        action: api.name().to_owned(),
        code: Some(code.to_owned()),
        message: message.to_owned(),
        request_id,
        remedy,
    };
    Failure { error, account_wide: code == "Throttling.User" }
}

/// The taxonomy: what a code means and what the operator can do.
fn classify(api: Api, code: &str, retry_after: Duration) -> (CloudErrorKind, String) {
    use CloudErrorKind as Kind;
    let ram = match Product::of(api) {
        Product::Ecs => "ecs",
        Product::Vpc => "vpc",
    };
    let (kind, remedy): (Kind, &str) = match code {
        "Throttling.User" => {
            (Kind::Throttled { retry_after }, "the account calls the API too often; other tools share its quota")
        }
        _ if code == "Throttling" || code.starts_with("Throttling.") => (
            Kind::Throttled { retry_after },
            "this API is called too often in this region; other tools share its quota",
        ),
        "InvalidVSwitchId.IpNotEnough" | "QuotaExceeded.PrivateIpAddress" => (
            Kind::VSwitchExhausted,
            "add a vSwitch with free addresses to the pool's configuration, or free some in this one",
        ),
        "EniPerInstanceLimitExceeded" => {
            (Kind::InstanceEniLimit, "detach unused ENIs from the instance or use a larger instance type")
        }
        _ if code.starts_with("InvalidOperation.Ipv4CountExceeded")
            || code.starts_with("InvalidOperation.Ipv6CountExceeded")
            || code.ends_with("Ipv4CountExceeded")
            || code.ends_with("Ipv6CountExceeded") =>
        {
            (Kind::InstanceIpLimit, "another ENI takes the next addresses; a larger instance type holds more per ENI")
        }
        _ if code.starts_with("SecurityGroupInstanceLimitExceed") => {
            (Kind::QuotaExceeded, "use another security group or an enterprise one, or have its quota raised")
        }
        _ if code.starts_with("QuotaExceed") || code.contains("LimitExceed") => {
            (Kind::QuotaExceeded, "have this quota raised in the cloud's quota centre, or free what counts against it")
        }
        _ if keys_are_stale(code)
            || code == "MissingSecurityToken"
            || code.starts_with("SignatureDoesNotMatch")
            || code.starts_with("IncompleteSignature") =>
        {
            (Kind::Forbidden, "check the access key, or the instance's RAM role, that cloud.credentials names")
        }
        _ if code.starts_with("Forbidden") || code.starts_with("NoPermission") || code.starts_with("AccessDenied") => {
            let remedy = format!("grant the RAM action {ram}:{} to the role or user of this node", api.name());
            return (Kind::Forbidden, remedy);
        }
        // Must come before NotFound in general: same meaning for the caller.
        "InvalidIp.IpUnassigned" => (Kind::NotFound, "nothing to do: the address is no longer assigned"),
        _ if code.ends_with("NotFound") || code.ends_with(".NotExist") => {
            (Kind::NotFound, "check that the resource exists in this region and account")
        }
        "Operation.Conflict"
        | "OperationConflict"
        | "IdempotentProcessing"
        | "Idempotent.Processing"
        | "LastTokenProcessing" => {
            (Kind::Conflict, "nothing to do: another operation on the same resource is still running")
        }
        _ if code.starts_with("Idempotent") || code.starts_with("Idempotence") => {
            (Kind::TokenMismatch, "nothing to do: the next try uses a new client token")
        }
        _ if code.starts_with("InvalidOperation.InvalidEniState")
            || code.starts_with("InvalidEniState")
            || code.starts_with("IncorrectEniStatus")
            || code.starts_with("IncorrectInstanceStatus")
            || code.starts_with("InvalidOperation.InvalidEcsState") =>
        {
            (Kind::InvalidState, "nothing to do if it passes; else look at the ENI and the instance in the console")
        }
        // A fresh nonce is all it takes; the first copy may have been executed.
        "SignatureNonceUsed" => (Kind::Transport, "nothing to do: the next try uses a new nonce"),
        _ if code.starts_with("InternalError") || code.starts_with("ServiceUnavailable") || code == "UnknownError" => {
            (Kind::Transport, "the cloud's service has a fault; nothing to do if it passes")
        }
        _ if code.starts_with("InvalidTimeStamp") => {
            (Kind::Rejected, "set this node's clock: it differs from the cloud's by more than 15 minutes")
        }
        _ => (
            Kind::Rejected,
            "look the code up in the cloud's API reference; check the vSwitches, security groups and tags configured",
        ),
    };
    (kind, remedy.to_owned())
}

fn is_code(code: &str) -> bool {
    (1..=128).contains(&code.len()) && code.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Foreign text made fit for a log line.
pub(crate) fn printable(text: &str, most: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, code: &str) -> Failure {
        let body = format!(r#"{{"RequestId":"R-1","HostId":"h","Code":"{code}","Message":"said so","Recommend":"x"}}"#);
        refusal(Api::CreateNetworkInterface, status, None, body.as_bytes()).unwrap()
    }

    #[test]
    fn every_code_the_reference_system_handles_has_its_kind() {
        use CloudErrorKind as Kind;
        let throttled = Kind::Throttled { retry_after: Duration::ZERO };
        for (code, kind) in [
            ("Throttling", throttled.clone()),
            ("Throttling.User", throttled.clone()),
            ("Throttling.Api", throttled.clone()),
            ("Throttling.Anything.New", throttled),
            ("InternalError", Kind::Transport),
            ("ServiceUnavailable", Kind::Transport),
            ("Operation.Conflict", Kind::Conflict),
            ("InvalidVSwitchId.IpNotEnough", Kind::VSwitchExhausted),
            ("QuotaExceeded.PrivateIpAddress", Kind::VSwitchExhausted),
            ("EniPerInstanceLimitExceeded", Kind::InstanceEniLimit),
            ("InvalidOperation.Ipv4CountExceeded", Kind::InstanceIpLimit),
            ("InvalidOperation.Ipv6CountExceeded", Kind::InstanceIpLimit),
            ("SecurityGroupInstanceLimitExceed", Kind::QuotaExceeded),
            ("InvalidIp.IpUnassigned", Kind::NotFound),
            ("InvalidEniId.NotFound", Kind::NotFound),
            ("InvalidEcsId.NotFound", Kind::NotFound),
            ("InvalidOperation.InvalidEniState", Kind::InvalidState),
            ("IdempotentFailed", Kind::TokenMismatch),
            ("IdempotentParameterMismatch", Kind::TokenMismatch),
            ("Forbidden.RAM", Kind::Forbidden),
            ("InvalidAccessKeyId.NotFound", Kind::Forbidden),
            ("SignatureDoesNotMatch", Kind::Forbidden),
            ("SignatureNonceUsed", Kind::Transport),
            ("InvalidTimeStamp.Expired", Kind::Rejected),
            ("InvalidOperation.InvalidEniType", Kind::Rejected),
            ("MissingSecurityToken", Kind::Forbidden),
            ("MissingParameter", Kind::Rejected),
        ] {
            let failure = refused(400, code);
            assert_eq!(failure.error.kind, kind, "{code}");
            assert_eq!(failure.account_wide, code == "Throttling.User", "{code}");
            assert!(!failure.error.remedy.is_empty());
            assert_eq!(failure.error.request_id.as_deref(), Some("R-1"));
        }
    }

    #[test]
    fn a_forbidden_call_names_the_ram_action_that_is_missing() {
        let text = refused(403, "Forbidden.RAM").error.to_string();
        assert_eq!(
            text,
            "CreateNetworkInterface: said so (Forbidden.RAM); \
             grant the RAM action ecs:CreateNetworkInterface to the role or user of this node"
        );
        let body = br#"{"Code":"Forbidden.RAM"}"#;
        let vpc = refusal(Api::DescribeVSwitches, 403, None, body).unwrap();
        assert!(vpc.error.remedy.contains("vpc:DescribeVSwitches"));
    }

    #[test]
    fn http_429_is_throttling_whatever_its_body() {
        let after = Some(Duration::from_secs(7));
        for body in [&b""[..], b"<html>slow down</html>", br#"{"Code":"Busy","Message":"m"}"#] {
            let failure = refusal(Api::AttachNetworkInterface, 429, after, body).unwrap();
            assert_eq!(failure.error.kind, CloudErrorKind::Throttled { retry_after: Duration::from_secs(7) });
        }
    }

    #[test]
    fn an_error_page_that_is_not_the_clouds_never_means_not_found() {
        for (status, body) in [(404, "<html>404</html>"), (403, ""), (400, r#"{"Code":7}"#), (502, "{}"), (301, "")] {
            let failure = refusal(Api::DetachNetworkInterface, status, None, body.as_bytes()).unwrap();
            assert_eq!(failure.error.kind, CloudErrorKind::Transport, "{status}");
            assert!(failure.error.effect_unknown());
        }
        assert_eq!(refused(503, "SomethingNew").error.kind, CloudErrorKind::Transport);
    }

    #[test]
    fn foreign_text_is_bounded_and_has_no_control_characters() {
        let body = serde_json::json!({"Code": "X", "Message": format!("a\nb\u{1b}[31m{}", "y".repeat(9_999))});
        let error = refusal(Api::DescribeVSwitches, 400, None, body.to_string().as_bytes()).unwrap().error;
        assert!(error.message.chars().count() == 400 && !error.message.contains(['\n', '\u{1b}']));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_taken(status in 100u16..600, body: Vec<u8>) {
            let _ = refusal(Api::DescribeVSwitches, status, None, &body);
        }
    }
}
