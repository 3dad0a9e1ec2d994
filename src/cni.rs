//! CniServer.
pub mod result;
pub mod spec;
pub mod spool;
pub mod wire;
pub mod wishes;
