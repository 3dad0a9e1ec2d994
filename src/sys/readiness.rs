//! Waiting for an object's own descriptor in a Tokio runtime.

use std::io;
use std::os::fd::AsRawFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An object whose descriptor is its own for as long as it lives.
///
/// # Safety
/// `as_raw_fd` must answer one and the same open descriptor from first to last.
pub unsafe trait OwnsFd: AsRawFd {}

// SAFETY: the map's descriptor is the ring buffer's, which never changes it.
unsafe impl OwnsFd for crate::datapath::samples::Samples {}

/// To be told when it can be read. Fails outside of a runtime's own thread only
/// by a panic, as all of Tokio does.
pub fn readable<T: OwnsFd>(object: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the trait's promise, and the object is not to be had out of it.
    unsafe { AsyncFd::register_with_interest(object, Interest::READABLE) }.map_err(io::Error::from)
}
