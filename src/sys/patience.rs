//! Waiting for a descriptor no longer than a deadline, without a thread to wait
//! in.
//!
//! For the CNI shim, which lives for a millisecond or two: a thread would cost
//! it a tenth of that. It includes this file by path and has std and serde only,
//! so the two calls that std does not offer are declared here.

use std::ffi::{c_int, c_short, c_ulong, c_ushort};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const AF_UNIX: c_int = 1;
const SOCK_STREAM: c_int = 1;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const POLLIN: c_short = 1;

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: c_short,
    revents: c_short,
}

#[repr(C)]
struct UnixAddress {
    family: c_ushort,
    path: [u8; 108],
}

// SAFETY: as in poll(2), socket(2) and connect(2).
unsafe extern "C" {
    fn poll(fds: *mut PollFd, count: c_ulong, timeout_ms: c_int) -> c_int;
    safe fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn connect(fd: c_int, address: *const UnixAddress, len: u32) -> c_int;
}

fn too_late() -> io::Error {
    io::ErrorKind::TimedOut.into()
}

/// What is left until `deadline`; an error when that is nothing.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(too_late()) } else { Ok(left) }
}

/// A reader of a descriptor that may never say anything.
pub struct Patient<R> {
    pub inner: R,
    pub deadline: Instant,
}

impl<R: Read + AsFd> Read for Patient<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let millis = left(self.deadline)?.as_millis() + 1;
            let mut waiting = PollFd { fd: self.inner.as_fd().as_raw_fd(), events: POLLIN, revents: 0 };
            // SAFETY: one entry, which outlives the call.
            let ready = unsafe { poll(&raw mut waiting, 1, c_int::try_from(millis).unwrap_or(c_int::MAX)) };
            match ready {
                0 => return Err(too_late()),
                1.. => return self.inner.read(buffer),
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    }
}

/// A conversation that ends at the deadline, whatever the other side does.
pub struct Conversation {
    stream: UnixStream,
    deadline: Instant,
}

impl Conversation {
    /// Waits also for a place in the listener's queue, as std would do for ever.
    pub fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        let mut address = UnixAddress { family: AF_UNIX as c_ushort, path: [0; 108] };
        let bytes = path.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.len() >= address.path.len() || bytes.contains(&0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its path cannot name a socket"));
        }
        address.path[..bytes.len()].copy_from_slice(bytes);
        let fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else knows.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        // The time limit of sending is also that of connecting.
        stream.set_write_timeout(Some(left(deadline)?))?;
        // SAFETY: the address is initialised, of the length that is said, and
        // outlives the call.
        let done = unsafe { connect(stream.as_raw_fd(), &raw const address, size_of::<UnixAddress>() as u32) };
        if done < 0 { Err(timely(io::Error::last_os_error())) } else { Ok(Self { stream, deadline }) }
    }
}

/// A time limit that has passed is reported as "would block".
fn timely(e: io::Error) -> io::Error {
    if e.kind() == io::ErrorKind::WouldBlock { too_late() } else { e }
}

impl Read for Conversation {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.deadline)?))?;
        self.stream.read(buffer).map_err(timely)
    }
}

impl Write for Conversation {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(left(self.deadline)?))?;
        self.stream.write(bytes).map_err(timely)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
