//! Raw system calls and the only unsafe code.
//!
//! Purpose: what std and nix do not offer, each behind a safe function with its
//! reason. Nothing here knows a pod or a lease.

/// bpf(2) where aya has no call for it.
pub mod bpf;
/// The clock that eBPF programs read.
pub mod clock;
/// Sockets: found by what is stored in them, and ended.
pub mod diag;
/// Children that die with the lab.
pub mod lab_exec;
/// How much of the allocator's memory the process keeps.
pub mod memory;
/// Network namespaces: open with validation, identity, enter and come back.
pub mod netns;
// `entry`, its start, and `patience`, waiting with a deadline, are the shim's.
/// Descriptors that an async runtime waits for.
pub mod readiness;
/// Kernel settings below /proc/sys, written only when they differ.
pub mod sysctl;
