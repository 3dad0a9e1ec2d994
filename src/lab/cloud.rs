//! The simulated cloud: API, metadata service, injected faults.

mod calls;
pub mod catalog;
pub mod config;
mod error;
pub mod faults;
mod idempotency;
pub mod metadata;
mod params;
mod signature;
pub mod state;
mod throttle;

pub use calls::{Call, CallReport};
pub use error::ApiError;
