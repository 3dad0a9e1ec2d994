//! Map keys, values and constants shared by Fairway's kernel and user side.
//!
//! Every type here is plain old data with a fixed layout: no padding that the
//! verifier would see uninitialised, all fields naturally aligned. The layout
//! is asserted at compile time.
#![no_std]

/// Version of the map layouts; part of the pin directory's name. Raise it when
/// a key, a value or a map's meaning changes.
pub const LAYOUT_VERSION: u32 = 1;
