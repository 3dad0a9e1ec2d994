//! NetnsWirer against the real kernel: what it makes is read back with `ip -j`
//! and used by real packets.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod exclusive;
mod notes;
mod programs;
mod shared;
mod support;
