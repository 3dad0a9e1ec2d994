//! Fairway: a pod network for Kubernetes on a cloud VPC.
//!
//! The module map. One line per module; each `foo.rs` is the table of contents
//! of `foo/`. Where to start: `actors.md`, then [`agent`].

/// Our layer over actix: gates, handles, supervision, deadlines, watchdog.
pub mod actor;
/// The node process wired in one readable function.
pub mod agent;
/// Comparison harness behind `fairway bench`.
pub mod bench;
/// CloudApi actor: the cloud's API, throttled and retried; Alibaba provider.
pub mod cloud;
/// ClusterWatch actor: the only one that talks to the Kubernetes API.
pub mod cluster;
/// CniServer actor: kubelet's calls, through the shim and a Unix socket.
pub mod cni;
/// The agent's configuration file, validated.
pub mod config;
/// Loads, attaches, pins eBPF programs; the only module that knows bpffs paths.
pub mod datapath;
/// DebugHttp actor: /debug/actors, /metrics, /healthz, /readyz, the page.
pub mod debug;
/// Doors for `fuzz/targets` to parsers that are private to their module.
#[doc(hidden)]
pub mod fuzz;
/// `fairway install-cni`: the shim and the conflist, atomically.
pub mod install;
/// A whole VPC on one machine: simulated cloud, Kubernetes stand-in, nodes.
pub mod lab;
/// The names everyone shares: pods, attachments, ENIs, leases.
pub mod model;
/// NetnsWirer actor: links, addresses, routes and rules, over rtnetlink.
pub mod netns;
/// NetworkPolicies, compiled for this node.
pub mod policy;
/// Pool actor: the address ledger and the plan that keeps addresses warm.
pub mod pool;
/// ServiceMap actor: Kubernetes Services, from the API to the kernel maps.
pub mod service;
/// `fairway status` and `fairway trace`: the debug endpoint for a terminal.
pub mod status;
/// The only unsafe code and raw system calls.
pub mod sys;
/// Logs and spans.
pub mod telemetry;
