//! What went wrong inside, in the words of CNI: code, cause, remedy.
//!
//! Pure. A code says what the runtime should do: 11 for what passes by itself,
//! 3 when nothing is left to clean up, 100 and above for what a person must
//! look at. The sentence is the one that Events and logs carry too.

use super::wire::{CniError, code};
use crate::actor::AskError;
use crate::cloud::{CloudError, CloudErrorKind};
use crate::netns::{Finding, WireError};
use crate::policy::PolicyError;
use crate::pool::PoolError;

/// Errors of other actors, as CNI codes.
pub trait ToCni: std::fmt::Display {
    fn code(&self) -> u32;
    /// It is not serving yet.
    fn away(&self) -> bool;
}

pub fn cni<E: ToCni>(what: &str, error: AskError<E>) -> CniError {
    let code = match &error {
        AskError::Domain(e) => e.code(),
        AskError::Busy { .. } | AskError::Timeout { .. } | AskError::Unavailable { .. } => code::TRY_AGAIN,
    };
    CniError::new(code, what).remedy(error.to_string())
}

impl ToCni for PoolError {
    fn code(&self) -> u32 {
        match self {
            PoolError::NodeFull { .. } | PoolError::NoPlace { .. } => code::NO_ADDRESS,
            PoolError::Cloud(e) if passes(e) => code::TRY_AGAIN,
            PoolError::Cloud(_) => code::NO_ADDRESS,
            PoolError::Ledger(_) => code::IO,
            PoolError::Waiting { .. } | PoolError::Reconciling | PoolError::BeingReleased(_) => code::TRY_AGAIN,
        }
    }
    fn away(&self) -> bool {
        matches!(self, PoolError::Reconciling)
    }
}

fn passes(e: &CloudError) -> bool {
    matches!(
        e.kind,
        CloudErrorKind::Throttled { .. }
            | CloudErrorKind::Conflict
            | CloudErrorKind::InvalidState
            | CloudErrorKind::TokenMismatch
            | CloudErrorKind::Transport
            | CloudErrorKind::Deadline
    )
}

impl ToCni for WireError {
    fn code(&self) -> u32 {
        match self {
            WireError::NamespaceGone(_) => code::UNKNOWN_CONTAINER,
            WireError::DeviceMissing(_) | WireError::Unavailable => code::TRY_AGAIN,
            WireError::Kernel { .. } => code::WIRING_FAILED,
        }
    }
    fn away(&self) -> bool {
        matches!(self, WireError::Unavailable)
    }
}

impl ToCni for PolicyError {
    fn code(&self) -> u32 {
        match self {
            PolicyError::NotAttached(_) => code::WIRING_FAILED,
            PolicyError::Refused(_) | PolicyError::NotYet(_) | PolicyError::NoSuchPod(_) => code::TRY_AGAIN,
        }
    }
    fn away(&self) -> bool {
        matches!(self, PolicyError::NotYet(_))
    }
}

/// CHECK's answer when the kernel is not what the lease says.
pub fn differs(findings: &[Finding]) -> CniError {
    let all: Vec<String> = findings.iter().take(8).map(|f| format!("{}: {}", f.what, f.detail)).collect();
    let more = findings.len().saturating_sub(8);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    CniError::new(code::CHECK_FAILED, format!("the pod's network differs from its lease: {}{more}", all.join("; ")))
        .remedy("the runtime may repeat ADD for this sandbox, or delete the pod")
}

/// A release that could not be done. It will be repeated, whatever was in its
/// way: the shim spools what is answered with code 11.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Unreleased {
    pub error: CniError,
    /// Another actor is not up yet: nothing was really tried.
    pub actor_away: bool,
}

impl Unreleased {
    pub fn because<E: ToCni>(what: &str, error: AskError<E>) -> Self {
        let actor_away = match &error {
            AskError::Domain(e) => e.away(),
            AskError::Unavailable { .. } => true,
            AskError::Busy { .. } | AskError::Timeout { .. } => false,
        };
        Self { error: CniError { code: code::TRY_AGAIN, ..cni(what, error) }, actor_away }
    }
}

impl From<Unreleased> for CniError {
    fn from(e: Unreleased) -> Self {
        e.error
    }
}
