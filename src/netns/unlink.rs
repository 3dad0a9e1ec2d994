//! Removing a link without waiting for the kernel to free it.
//!
//! `RTM_DELLINK` takes a link out of every table at once and then sleeps until
//! no processor can hold a reference, tens of milliseconds in which nothing
//! more can happen to the pod. The kernel announces the first part. Whoever
//! removes a link here waits for that announcement; the request itself ends on
//! a thread of its own.
//!
//! Owner: the wiring thread that asks. Invariant: on success the link was seen
//! to be gone.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::nl::{Nl, NlError, Request};

const LINK_GROUP: u32 = 1;
/// How soon a removal is noticed that failed, or whose announcement was lost.
const LOOK_MS: u16 = 10;
/// Threads that wait for the kernel; more removals wait for it themselves.
const MOST: usize = 64;

static WAITING: AtomicUsize = AtomicUsize::new(0);

struct Place;

impl Place {
    fn take() -> Option<Self> {
        let free = |n: usize| (n < MOST).then_some(n + 1);
        WAITING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok().map(|_| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        WAITING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Remove the link with this index by `request`, in the calling thread's
/// namespace, of which `nl` is a socket.
pub(super) fn remove(nl: &mut Nl, index: u32, request: Request) -> Result<(), NlError> {
    let (Some(place), Ok(mut announcements)) = (Place::take(), Announcements::open(index)) else {
        return nl.all(vec![request]).map(drop);
    };
    let what = request.what.clone();
    let failed = |e: &io::Error| NlError::io(what.clone(), e);
    let (tell, ended) = mpsc::sync_channel(1);
    let work = move || {
        let _place = place;
        let mut own = match Nl::open() {
            Ok(own) => own,
            Err(e) => return drop(tell.send(Err(NlError::io("netlink socket", &e)))),
        };
        let _ = tell.send(own.all(vec![request]).map(drop));
    };
    std::thread::Builder::new().name("unlink".into()).stack_size(128 << 10).spawn(work).map_err(|e| failed(&e))?;
    loop {
        if announcements.seen().map_err(|e| failed(&e))? {
            return Ok(());
        }
        match ended.try_recv() {
            Ok(result) => return result,
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => return Err(failed(&io::Error::other("its thread ended"))),
        }
    }
}

/// What the kernel says about links of this namespace.
struct Announcements {
    socket: Socket,
    index: u32,
    buffer: Vec<u8>,
}

impl Announcements {
    fn open(index: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(LINK_GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, index, buffer: vec![0; 16 << 10] })
    }

    /// Waits for a moment at most.
    fn seen(&mut self) -> io::Result<bool> {
        let mut wait = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wait, PollTimeout::from(LOOK_MS)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        loop {
            match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(len) if removes(&self.buffer[..len], self.index) => return Ok(true),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // Some were lost: the end of the request is waited for.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Whether a datagram says that the link is gone. The bridge code says
/// something of the same type about a port that only leaves its bridge, in its
/// own family.
fn removes(mut datagram: &[u8], index: u32) -> bool {
    while datagram.len() >= 32 {
        let word = |at: usize| u32::from_ne_bytes([datagram[at], datagram[at + 1], datagram[at + 2], datagram[at + 3]]);
        let len = word(0) as usize;
        let kind = u16::from_ne_bytes([datagram[4], datagram[5]]);
        if kind == libc::RTM_DELLINK && datagram[16] == libc::AF_UNSPEC as u8 && word(20) == index {
            return true;
        }
        if len < 16 {
            return false;
        }
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, family: i32, index: u32) -> Vec<u8> {
        let mut m = vec![0; 32];
        m[..4].copy_from_slice(&32u32.to_ne_bytes());
        m[4..6].copy_from_slice(&kind.to_ne_bytes());
        m[16] = family as u8;
        m[20..24].copy_from_slice(&index.to_ne_bytes());
        m
    }

    #[test]
    fn only_the_end_of_this_very_link_counts() {
        let gone = message(libc::RTM_DELLINK, libc::AF_UNSPEC, 7);
        assert!(removes(&gone, 7));
        assert!(!removes(&gone, 8));
        assert!(!removes(&message(libc::RTM_NEWLINK, libc::AF_UNSPEC, 7), 7));
        assert!(!removes(&message(libc::RTM_DELLINK, libc::AF_BRIDGE, 7), 7));
        let after_another = [message(libc::RTM_NEWLINK, libc::AF_UNSPEC, 7), gone].concat();
        assert!(removes(&after_another, 7));
        for cut in 0..32 {
            assert!(!removes(&after_another[..cut], 7));
        }
    }
}
