//! A whole VPC on one machine: simulated cloud, Kubernetes stand-in, nodes.
//!
//! The lab and the agent share no wire or signing code and no state: nothing
//! below imports `crate::cloud`, `crate::pool`, `crate::netns` or `crate::cni`.

/// The cloud or the API stand-in without the rest.
mod alone;
/// A lab that goes on when its starter has returned to the shell.
mod background;
/// `fairway lab …`.
pub mod cli;
/// The simulated cloud: API, metadata service, injected faults.
pub mod cloud;
/// The Kubernetes API that nodes belong to: the stand-in, or another server.
pub mod cluster;
/// How other processes speak with a lab that is up.
pub mod control;
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
/// `fairway lab run`: manifests in, a report out.
pub mod run;
/// The whole lab assembled, from the VPC to the nodes' kubelets.
pub mod site;
/// The VPC: router, ENI devices, NAT gateway, load balancer, a VM.
pub mod vpc;
/// What runs in a pod, and clients that reach it.
pub mod workload;
