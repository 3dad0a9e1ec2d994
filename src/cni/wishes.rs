//! What a pod asks of its network: bandwidth, an ENI of its own, its address
//! kept.
//!
//! Pure. Said by `runtimeConfig`, else by the pod's annotations, else by the
//! node's label and the agent's configuration. A value that cannot be read is
//! an error with the annotation's name, never a guess: a pod that asked for a
//! limit must not run without one. An empty value asks for nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::wire::{CniError, brief, clip, code};
use crate::model::{AttachMode, Bandwidth};

/// Pod annotation and node label: `exclusive` or `shared`.
pub const ENI: &str = "fairway.io/eni";
/// Pod annotation: how long the address is kept for the pod's name.
pub const RESERVATION: &str = "fairway.io/address-reservation";
/// Pod annotation: where Services are resolved, `socket` or `packet`.
pub const SERVICES: &str = "fairway.io/services";
pub const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
pub const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// As kubelet bounds them: 1 kbit/s to 1 Pbit/s.
const MIN_RATE: u128 = 1_000;
const MAX_RATE: u128 = 1_000_000_000_000_000;
/// A reservation holds an address that nobody else can use.
const MAX_RESERVATION: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wishes {
    pub mode: AttachMode,
    pub bandwidth: Bandwidth,
    pub reserve: Option<Duration>,
    /// Services packet by packet: for service meshes and sandboxed runtimes.
    pub per_packet: bool,
}

/// What is known about the pod and its node when ADD comes.
#[derive(Clone, Debug, Default)]
pub struct Known<'a> {
    /// `runtimeConfig.bandwidth`.
    pub runtime_bandwidth: Option<&'a Value>,
    pub annotations: Option<&'a BTreeMap<String, String>>,
    pub node_labels: Option<&'a BTreeMap<String, String>>,
    pub stateful: bool,
    pub default_mode: AttachMode,
    /// How long a StatefulSet pod's address is kept; none for not at all.
    pub stateful_reserve: Option<Duration>,
}

pub fn decide(known: &Known<'_>) -> Result<Wishes, CniError> {
    let said = |key: &str| known.annotations.and_then(|a| a.get(key)).map(|v| v.trim()).filter(|v| !v.is_empty());
    let mode = mode(known.annotations, known.node_labels, known.default_mode)?;
    let bandwidth = match known.runtime_bandwidth {
        Some(value) => runtime_bandwidth(value)?,
        None => Bandwidth {
            ingress_bps: said(INGRESS).map(|v| rate(INGRESS, v)).transpose()?,
            egress_bps: said(EGRESS).map(|v| rate(EGRESS, v)).transpose()?,
        },
    };
    let reserve = match said(RESERVATION) {
        Some(value) => reservation(value)?,
        None => known.stateful_reserve.filter(|_| known.stateful),
    };
    let per_packet = match said(SERVICES) {
        None | Some("socket") => false,
        Some("packet") => true,
        Some(other) => return Err(refuse(&format!("annotation {SERVICES}"), other, "socket or packet")),
    };
    Ok(Wishes { mode, bandwidth, reserve, per_packet })
}

fn refuse(what: &str, value: &str, want: &str) -> CniError {
    CniError::new(code::INVALID_CONFIG, format!("{what} is {:?}", clip(value))).remedy(format!("it must be {want}"))
}

/// How a pod is attached: its own word, else its node's, else the default. Also
/// for those who expect a pod before its ADD.
pub fn mode(
    annotations: Option<&BTreeMap<String, String>>,
    node_labels: Option<&BTreeMap<String, String>>,
    default: AttachMode,
) -> Result<AttachMode, CniError> {
    let says = |map: Option<&BTreeMap<String, String>>| {
        map.and_then(|m| m.get(ENI)).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    };
    let (kind, value) = match (says(annotations), says(node_labels)) {
        (Some(value), _) => ("annotation", value),
        (None, Some(value)) => ("node label", value),
        (None, None) => return Ok(default),
    };
    match value.as_str() {
        "exclusive" => Ok(AttachMode::Exclusive),
        "shared" => Ok(AttachMode::Veth),
        other => Err(refuse(&format!("{kind} {ENI}"), other, "exclusive or shared")),
    }
}

/// Kubelet's key is `ingressRate`; containerd writes `IngressRate`. Bursts are
/// not ours to shape.
fn runtime_bandwidth(value: &Value) -> Result<Bandwidth, CniError> {
    let bad = |what: &str, value: &Value| {
        let msg = format!("invalid network configuration: runtimeConfig.{what} is {}", brief(value));
        CniError::new(code::INVALID_CONFIG, msg)
            .remedy("it is a number of bits per second, from 1000 on, 0 for no limit")
    };
    let map = value.as_object().ok_or_else(|| bad("bandwidth", value))?;
    let one = |name: &str| {
        let found = map.iter().find(|(key, v)| key.eq_ignore_ascii_case(name) && !v.is_null());
        let Some((_, value)) = found else { return Ok(None) };
        match value.as_u64() {
            Some(0) => Ok(None),
            Some(bps) if (MIN_RATE..=MAX_RATE).contains(&u128::from(bps)) => Ok(Some(bps)),
            _ => Err(bad(&format!("bandwidth.{name}"), value)),
        }
    };
    Ok(Bandwidth { ingress_bps: one("ingressRate")?, egress_bps: one("egressRate")? })
}

fn rate(annotation: &str, value: &str) -> Result<u64, CniError> {
    let want = "a Kubernetes quantity of bits per second between 1k and 1P, such as 10M";
    let whole = quantity(value).filter(|bps| (MIN_RATE..=MAX_RATE).contains(bps));
    whole
        .and_then(|bps| u64::try_from(bps).ok())
        .ok_or_else(|| refuse(&format!("annotation {annotation}"), value, want))
}

/// A Kubernetes quantity, rounded up to a whole number. `None` when it is not
/// one, is negative, or is beyond anything that makes sense here.
pub fn quantity(s: &str) -> Option<u128> {
    if s.len() > 64 || !s.is_ascii() {
        return None;
    }
    let s = s.strip_prefix('+').unwrap_or(s);
    let end = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, suffix) = s.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || fraction.contains('.') {
        return None;
    }
    let (mut times, mut per) = scale(suffix)?;
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let mantissa: u128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    let mut places = u32::try_from(fraction.len()).ok()?;
    // Cancel powers of ten before multiplying: "0.000001E" is one tera.
    while places > 0 && times.is_multiple_of(10) {
        times /= 10;
        places -= 1;
    }
    per = per.checked_mul(10u128.checked_pow(places)?)?;
    Some(mantissa.checked_mul(times)?.div_ceil(per))
}

/// Multiplier and divisor of a quantity's suffix.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    let binary = |power: u32| Some((1u128 << (10 * power), 1));
    let decimal = |power: u32| Some((10u128.pow(power), 1));
    match suffix {
        "" => Some((1, 1)),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1_000)),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            match exponent {
                0..=18 => decimal(exponent.unsigned_abs()),
                -18..=-1 => Some((1, 10u128.pow(exponent.unsigned_abs()))),
                _ => None,
            }
        }
    }
}

fn reservation(value: &str) -> Result<Option<Duration>, CniError> {
    let want = "a duration such as 10m or 1h30m, at most 24h, or 0 for none";
    match duration(value).filter(|d| *d <= MAX_RESERVATION) {
        None => Err(refuse(&format!("annotation {RESERVATION}"), value, want)),
        Some(Duration::ZERO) => Ok(None),
        some => Ok(some),
    }
}

/// Hours, minutes and seconds, as Kubernetes writes durations; a plain `0` too.
pub fn duration(s: &str) -> Option<Duration> {
    if s == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = s;
    let mut seconds: u64 = 0;
    let mut last = u64::MAX;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..end].parse().ok()?;
        let unit = match rest.as_bytes()[end] {
            b'h' => 3600,
            b'm' => 60,
            b's' => 1,
            _ => return None,
        };
        // Each unit once, the larger first.
        if unit >= last {
            return None;
        }
        last = unit;
        seconds = seconds.checked_add(number.checked_mul(unit)?)?;
        rest = &rest[end + 1..];
    }
    (last != u64::MAX).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests;
