//! ServiceMap: Services without kube-proxy.

pub mod adopt;
pub mod book;
pub mod choose;
pub mod claims;
pub mod compile;
pub mod convert;
pub mod diff;
pub mod ids;
pub mod index;
pub mod maps;
pub mod model;
pub mod place;
pub mod problem;
pub mod sync;
