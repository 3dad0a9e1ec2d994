//! CniServer.
pub mod spool;
pub mod wire;
