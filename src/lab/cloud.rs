//! The simulated cloud: API, metadata service, injected faults.

pub mod catalog;
pub mod config;
mod error;
pub mod metadata;
pub mod state;

pub use error::ApiError;
