//! Steps: the only ways the pool's state changes, and the fail points on them.
//!
//! Every step is journalled: the ledger writes its outcome before anyone is told
//! and before the call it announces is made. The names here are the fail points'
//! names, generated with the enum, so a step without one cannot exist.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::cloud::InstanceLimits;
use crate::model::{ClientToken, EniRef, Lease, VSwitchId};

use super::state::{Device, EniKey, Hold, HoldKey, Phase, Purpose};

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal { $($field:ident : $ty:ty),* $(,)? })*) => {
        /// One journalled transition.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[$doc])* $name { $($field: $ty),* }),* }

        impl Step {
            /// Every step's name.
            pub const NAMES: &'static [&'static str] = &[$($text),*];

            pub fn name(&self) -> &'static str {
                match self { $(Step::$name { .. } => $text),* }
            }
        }
    };
}

steps! {
    // Leases.
    /// Give an idle or reserved address to an attachment.
    Lease = "lease" { lease: Box<Lease>, reserve: Option<Duration> }
    /// The attachment is wired.
    Confirm = "confirm" { v4: Ipv4Addr }
    /// The attachment is being unwired; by the pool itself when `collect`.
    Unwire = "unwire" { v4: Ipv4Addr, collect: bool }
    /// Nobody uses the address any more: it cools down or stays reserved.
    Release = "release" { v4: Ipv4Addr, quarantine: Duration }
    /// Its cool-down or reservation has ended.
    Settle = "settle" { v4: Ipv4Addr }
    /// An address in use that the ledger did not know as such.
    Recover = "recover" { lease: Box<Lease>, collect: bool }

    // ENIs.
    CreateEni = "create-eni" { key: EniKey, purpose: Purpose, vswitch: VSwitchId, ipv4: u32, ipv6: u32 }
    EniCreated = "eni-created" { key: EniKey, eni: Box<EniRef>, ipv4: Vec<Ipv4Addr>, ipv6: Vec<Ipv6Addr> }
    /// The create call had no effect and will not be repeated.
    CreateFailed = "create-failed" { key: EniKey }
    /// The cloud accepted the attach call, or turned out not to have.
    EniAttaching = "eni-attaching" { key: EniKey, accepted: bool }
    EniReady = "eni-ready" { key: EniKey, device: Device }
    DrainEni = "drain-eni" { key: EniKey }
    DetachEni = "detach-eni" { key: EniKey }
    /// The cloud accepted the detach call, or turned out not to have.
    EniDetaching = "eni-detaching" { key: EniKey, accepted: bool }
    EniDetached = "eni-detached" { key: EniKey }
    EniDeleted = "eni-deleted" { key: EniKey }
    /// The cloud does not have it (any more).
    EniLost = "eni-lost" { key: EniKey }
    /// An ENI of ours that the ledger did not know. Its addresses cool down:
    /// who used them last is not known either.
    AdoptEni = "adopt-eni" {
        key: EniKey, purpose: Purpose, token: ClientToken, phase: Phase,
        eni: Box<EniRef>, ipv4: Vec<Ipv4Addr>, ipv6: Vec<Ipv6Addr>, quarantine: Duration,
    }

    // Addresses.
    AssignIpv4 = "assign-ipv4" { key: EniKey, count: u32 }
    Ipv4Assigned = "ipv4-assigned" { key: EniKey, addresses: Vec<Ipv4Addr> }
    AssignIpv6 = "assign-ipv6" { key: EniKey, count: u32 }
    Ipv6Assigned = "ipv6-assigned" { key: EniKey, addresses: Vec<Ipv6Addr> }
    /// The assign call had no effect and will not be repeated.
    AssignFailed = "assign-failed" { key: EniKey, ipv6: bool }
    /// Give addresses back to the cloud.
    ReleaseAddresses = "release-addresses" { addresses: Vec<Ipv4Addr> }
    Ipv6Released = "ipv6-released" { key: EniKey, addresses: Vec<Ipv6Addr> }
    Ipv4Released = "ipv4-released" { key: EniKey, addresses: Vec<Ipv4Addr> }
    /// The cloud's list of an ENI's addresses differs from the ledger's.
    SyncEni = "sync-eni" { key: EniKey, add4: Vec<Ipv4Addr>, add6: Vec<Ipv6Addr>, drop4: Vec<Ipv4Addr>, drop6: Vec<Ipv6Addr> }

    // Knowledge.
    Hold = "hold" { key: HoldKey, hold: Hold }
    Unhold = "unhold" { key: HoldKey }
    Learn = "learn" { limits: InstanceLimits, foreign: u32 }
}

/// When a fail point kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// The step is decided, nothing is written.
    Before,
    /// The step is durable, nobody knows it and its call is not made.
    After,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a fail point: want STEP:before|after[:N] with STEP one of {names}", names = Step::NAMES.join(", "))]
pub struct BadFailPoint {
    given: String,
}

/// Kill this process at a step, for crash tests. Compiled in always, so that
/// what is tested is what is shipped; read once, when the pool starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailPoint {
    at: Option<(&'static str, Moment)>,
    /// Kills at the `nth` time, counted from 1.
    nth: u32,
    seen: u32,
}

impl FailPoint {
    pub const ENV: &'static str = "FAIRWAY_FAIL_POINT";

    pub fn from_env() -> Result<Self, BadFailPoint> {
        match std::env::var(Self::ENV) {
            Ok(text) if !text.is_empty() => Self::parse(&text),
            _ => Ok(Self::default()),
        }
    }

    /// `create-eni:after` or, for the third time, `create-eni:after:3`.
    pub fn parse(text: &str) -> Result<Self, BadFailPoint> {
        let bad = || BadFailPoint { given: text.to_owned() };
        let mut parts = text.split(':');
        let name = parts.next().and_then(|n| Step::NAMES.iter().find(|s| **s == n)).ok_or_else(bad)?;
        let moment = match parts.next() {
            Some("before") => Moment::Before,
            Some("after") => Moment::After,
            _ => return Err(bad()),
        };
        let nth = match parts.next() {
            None => 1,
            Some(n) => n.parse().ok().filter(|n| *n > 0).ok_or_else(bad)?,
        };
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self { at: Some((name, moment)), nth, seen: 0 })
    }

    /// True when the process is to die before these steps are written.
    pub fn before(&mut self, steps: &[&'static str]) -> bool {
        self.reached(steps, Moment::Before)
    }

    /// True when it is to die now that they are.
    pub fn after(&mut self, steps: &[&'static str]) -> bool {
        self.reached(steps, Moment::After)
    }

    fn reached(&mut self, steps: &[&'static str], now: Moment) -> bool {
        let Some((name, _)) = self.at.filter(|(_, moment)| *moment == now) else { return false };
        self.seen += steps.iter().filter(|s| **s == name).count() as u32;
        self.seen >= self.nth
    }
}

/// How often each step was taken, for `/metrics`.
pub type StepCounts = BTreeMap<&'static str, u64>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_can_be_a_fail_point() {
        for name in Step::NAMES {
            for moment in ["before", "after", "after:7"] {
                FailPoint::parse(&format!("{name}:{moment}")).unwrap();
            }
        }
        let mut unique = Step::NAMES.to_vec();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), Step::NAMES.len());
    }

    #[test]
    fn a_wrong_fail_point_is_refused_with_the_list_of_steps() {
        for bad in ["", "lease", "lease:", "lease:during", "no-such-step:before", "lease:after:0", "lease:after:1:2"] {
            let error = FailPoint::parse(bad).unwrap_err().to_string();
            assert!(error.contains("create-eni"), "{error}");
        }
    }
}
