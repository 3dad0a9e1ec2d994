//! What is wrong with a Service on this node, in words.

use serde::{Deserialize, Serialize};

use super::model::ServiceName;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// The Service object cannot be.
    InvalidService,
    /// An EndpointSlice object cannot be.
    InvalidEndpoints,
    /// An address and port that another Service has.
    Conflict,
    /// There is no room for its entries.
    TableFull,
    /// There are no numbers left for its sets or backends.
    IdsExhausted,
    /// The kernel has refused an entry.
    Refused,
    /// The health check node port cannot be bound.
    HealthCheckPort,
}

impl Reason {
    pub const ALL: [Reason; 7] = [
        Reason::InvalidService,
        Reason::InvalidEndpoints,
        Reason::Conflict,
        Reason::TableFull,
        Reason::IdsExhausted,
        Reason::Refused,
        Reason::HealthCheckPort,
    ];

    /// As the reason of an Event, and a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Reason::InvalidService => "InvalidService",
            Reason::InvalidEndpoints => "InvalidEndpoints",
            Reason::Conflict => "ServiceAddressConflict",
            Reason::TableFull => "ServiceTableFull",
            Reason::IdsExhausted => "ServiceIdsExhausted",
            Reason::Refused => "ServiceWriteRefused",
            Reason::HealthCheckPort => "HealthCheckPortTaken",
        }
    }

    /// The same on every node: one of them says it for all.
    pub fn of_the_cluster(self) -> bool {
        matches!(self, Reason::InvalidService | Reason::InvalidEndpoints | Reason::Conflict)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The Service, or the EndpointSlice when that is what cannot be.
    pub about: ServiceName,
    pub uid: String,
    pub reason: Reason,
    pub message: String,
}

impl Problem {
    pub fn new(about: &ServiceName, uid: &str, reason: Reason, message: impl Into<String>) -> Self {
        Self { about: about.clone(), uid: uid.to_owned(), reason, message: message.into() }
    }
}
