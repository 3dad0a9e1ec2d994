//! `fairway bench`: comparisons on one machine in one run, as ratios.

pub mod cni;
pub mod overlay;
pub mod stats;
pub mod traffic;
