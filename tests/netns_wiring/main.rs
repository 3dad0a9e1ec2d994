//! NetnsWirer against the real kernel: what it makes is read back with `ip -j`
//! and used by real packets.

mod exclusive;
mod programs;
mod shared;
mod support;
