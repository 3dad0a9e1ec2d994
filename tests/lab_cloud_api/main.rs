//! The simulated cloud as a client meets it: signed requests over real sockets.
//!
//! The signer here is the test's own; `lab_cloud_sdk` drives the same server
//! with Alibaba's SDK.

#![allow(clippy::unwrap_used)]

mod effects;
mod enis;
mod keys;
mod service;
mod support;
