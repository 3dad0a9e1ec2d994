//! A whole VPC on one machine: simulated cloud, Kubernetes stand-in, nodes.
//!
//! The lab and the agent share no wire or signing code and no state: nothing
//! below imports `crate::cloud`, `crate::pool`, `crate::netns` or `crate::cni`.

/// The simulated cloud: API, metadata service, injected faults.
pub mod cloud;
/// How the simulated cloud makes its answers true on the packet side.
pub mod fabric;
