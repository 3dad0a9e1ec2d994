//! `fairway bench`: comparisons on one machine in one run, as ratios.

pub mod stats;
pub mod traffic;
