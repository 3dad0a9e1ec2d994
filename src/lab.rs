//! A whole VPC on one machine: simulated cloud, Kubernetes stand-in, nodes.

pub mod fabric;
pub mod kubelet;
pub mod node;
pub mod vpc;
pub mod workload;
