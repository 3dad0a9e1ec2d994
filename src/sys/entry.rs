//! Where the CNI shim starts: in C's `main`, without what std does before Rust's.
//!
//! That looks up the stack of a thread that needs no guard page of its own and
//! prepares for its overflow, which costs a shim that lives for a millisecond a
//! tenth of it. What is left out and wanted is done here.

use std::ffi::{c_char, c_int};

const SIGPIPE: c_int = 13;
const SIG_IGN: usize = 1;

// SAFETY: as in signal(2), with the handler as the number that it may be.
unsafe extern "C" {
    safe fn signal(number: c_int, handler: usize) -> usize;
}

// SAFETY: no other `main` is linked: the program has `no_main`.
#[unsafe(no_mangle)]
extern "C" fn main(_: c_int, _: *const *const c_char) -> c_int {
    // An agent that closes early is an error to be handled, not the end.
    signal(SIGPIPE, SIG_IGN);
    crate::start()
}
