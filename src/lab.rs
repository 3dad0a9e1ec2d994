//! A whole VPC on one machine: simulated cloud, Kubernetes stand-in, nodes.
//!
//! The lab and the agent share no wire or signing code and no state: nothing
//! below imports `crate::cloud`, `crate::pool`, `crate::netns` or `crate::cni`.

/// `fairway lab …`.
pub mod cli;
/// The simulated cloud: API, metadata service, injected faults.
pub mod cloud;
/// Deployments, StatefulSets, EndpointSlices, a scheduler.
pub mod controllers;
/// `fairway lab demo`.
pub mod demo;
/// How the simulated cloud makes its answers true on the packet side.
pub mod fabric;
/// The Kubernetes API stand-in.
pub mod kube;
/// A kubelet per node: sandboxes, the conflist, probes.
pub mod kubelet;
/// Ordinary Kubernetes manifests, read.
pub mod manifest;
/// A node: namespace, primary ENI, agent process.
pub mod node;
/// What a lab shows.
pub mod report;
/// The whole lab assembled, from the VPC to the nodes' kubelets.
pub mod site;
/// The VPC: router, ENI devices, NAT gateway, load balancer, a VM.
pub mod vpc;
/// What runs in a pod, and clients that reach it.
pub mod workload;
