//! NetworkPolicies, compiled for this node.
//!
//! - data: [`model`], [`convert`] (from the API), [`index`] (from ClusterWatch), [`tables`]
//! - deciding, pure: [`compile`], from [`peers`] (who rules speak of) and
//!   [`profile`] (what rules open)

pub mod compile;
pub mod convert;
pub mod index;
pub mod model;
pub mod peers;
pub mod profile;
pub mod tables;
