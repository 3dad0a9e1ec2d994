//! Shared by the tests of Services: a random world, its oracle, a reader of tables.

pub mod oracle;
pub mod reader;
pub mod world;
