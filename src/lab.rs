//! A whole VPC on one machine.

pub mod controllers;
pub mod kube;
pub mod manifest;
