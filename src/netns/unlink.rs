//! Removing veth pairs: many at once, and without waiting for the kernel to free
//! them.
//!
//! `RTM_DELLINK` takes a link out of every table, for which it waits several
//! times until no processor looks at it any more, announces that, and then
//! sleeps until no reference is left, tens of milliseconds in which nothing more
//! can happen to the pod. Two things follow. Whoever wants a pair removed waits
//! for the announcement only; the request itself ends on a thread of its own.
//! And pairs that are to go at the same time go in one request, which waits once
//! for all of them: they are put into a group, and the group is removed.
//!
//! Owner: the actor has one such thread, in its network namespace. Invariant: on
//! success the link was seen to be gone, and its programs' pins are.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::oneshot;

use super::message;
use super::nl::{Nl, NlError, Request};

const LINK_GROUP: u32 = 1;
/// How soon a removal is noticed that failed, or whose announcement was lost.
const LOOK_MS: u16 = 10;
/// Threads that wait for the kernel; with more removals it is waited for here.
const MOST: usize = 64;
/// Removed in one request.
const BATCH: usize = 20;

/// What is left to do when the link is gone.
type Then = Box<dyn FnOnce() -> Result<(), NlError> + Send>;

/// One pair to be removed, by the index of its host link.
struct Doomed {
    index: u32,
    then: Then,
    tell: oneshot::Sender<Result<(), NlError>>,
}

impl Doomed {
    fn end(self, result: Result<(), NlError>) {
        let _ = self.tell.send(result.and_then(|()| (self.then)()));
    }
}

/// Where removals are asked for. The thread ends with the last clone.
#[derive(Clone)]
pub(super) struct Unlinker {
    queue: Sender<Doomed>,
}

impl Unlinker {
    /// Removes links of the calling thread's namespace.
    pub(super) fn start() -> io::Result<Self> {
        let (queue, inbox) = channel();
        std::thread::Builder::new().name("unlink".into()).stack_size(128 << 10).spawn(move || serve(&inbox))?;
        Ok(Self { queue })
    }

    /// Asked for now; the result comes when the link is gone and `then` is done.
    pub(super) fn remove(
        &self,
        index: u32,
        then: impl FnOnce() -> Result<(), NlError> + Send + 'static,
    ) -> oneshot::Receiver<Result<(), NlError>> {
        let (tell, result) = oneshot::channel();
        // Without the thread the sender is dropped, and the receiver sees that.
        let _ = self.queue.send(Doomed { index, then: Box::new(then), tell });
        result
    }
}

/// What a removal is that was never answered.
pub(super) fn unanswered() -> NlError {
    NlError::io("remove link", &io::Error::other("the thread that removes links has ended"))
}

fn serve(inbox: &Receiver<Doomed>) {
    let waiting = Arc::new(AtomicUsize::new(0));
    while let Ok(first) = inbox.recv() {
        // What came while the batch before was being removed goes together.
        let batch = std::iter::once(first).chain(inbox.try_iter().take(BATCH - 1));
        let mut batch: BTreeMap<u32, Vec<Doomed>> = batch.fold(BTreeMap::new(), |mut all, doomed| {
            all.entry(doomed.index).or_default().push(doomed);
            all
        });
        if let Err(e) = remove(&mut batch, &waiting) {
            answer_all(batch, &Err(e));
        }
    }
}

fn answer_all(batch: BTreeMap<u32, Vec<Doomed>>, result: &Result<(), NlError>) {
    for doomed in batch.into_values().flatten() {
        doomed.end(result.clone());
    }
}

/// Answers each of the batch when its link is gone; those that are left in it
/// were not.
fn remove(batch: &mut BTreeMap<u32, Vec<Doomed>>, waiting: &Arc<AtomicUsize>) -> Result<(), NlError> {
    let failed = |e: &io::Error| NlError::io("remove link", e);
    let indexes: Vec<u32> = batch.keys().copied().collect();
    let announcements = Announcements::open();
    let (Ok(mut announcements), true) = (announcements, waiting.fetch_add(1, Ordering::Relaxed) < MOST) else {
        waiting.fetch_sub(1, Ordering::Relaxed);
        let result = ask(&indexes);
        answer_all(std::mem::take(batch), &result);
        return Ok(());
    };
    let (tell, ended) = sync_channel(1);
    let work = {
        let waiting = waiting.clone();
        move || {
            let _ = tell.send(ask(&indexes));
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
    };
    if let Err(e) = std::thread::Builder::new().name("unlink-wait".into()).stack_size(128 << 10).spawn(work) {
        waiting.fetch_sub(1, Ordering::Relaxed);
        return Err(failed(&e));
    }
    while !batch.is_empty() {
        announcements.wait().map_err(|e| failed(&e))?;
        loop {
            let gone = announcements.next(batch).map_err(|e| failed(&e))?;
            let Some(gone) = gone else { break };
            for doomed in batch.remove(&gone).into_iter().flatten() {
                doomed.end(Ok(()));
            }
        }
        match ended.try_recv() {
            Ok(result) => {
                answer_all(std::mem::take(batch), &result);
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Err(failed(&io::Error::other("its thread ended"))),
        }
    }
    Ok(())
}

/// Returns when the kernel has freed them, on a socket of its own.
fn ask(indexes: &[u32]) -> Result<(), NlError> {
    let mut own = Nl::open().map_err(|e| NlError::io("netlink socket", &e))?;
    let each = || -> Vec<Request> { indexes.iter().map(|index| message::remove_link(*index)).collect() };
    if indexes.len() > 1 {
        let together = own.all(message::remove_links(indexes, GROUP.fetch_add(1, Ordering::Relaxed)));
        // Alone, whatever it was that did not work together.
        return together.or_else(|_| own.all(each())).map(drop);
    }
    own.all(each()).map(drop)
}

/// Numbers of groups, each used once; far from those that people use.
static GROUP: AtomicU32 = AtomicU32::new(0xfa19_0000);

/// What the kernel says about links of this namespace.
struct Announcements {
    socket: Socket,
    buffer: Vec<u8>,
    /// Of the datagram in the buffer, what has not been looked at.
    rest: std::ops::Range<usize>,
}

impl Announcements {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(LINK_GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, buffer: vec![0; 16 << 10], rest: 0..0 })
    }

    /// For a moment at most.
    fn wait(&mut self) -> io::Result<()> {
        let mut wait = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wait, PollTimeout::from(LOOK_MS)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The next of these links that is gone, of what has been announced.
    fn next<T>(&mut self, of: &BTreeMap<u32, T>) -> io::Result<Option<u32>> {
        loop {
            while let Some((removed, rest)) = first(&self.buffer[self.rest.clone()]) {
                self.rest.start = self.rest.end - rest.len();
                if let Some(index) = removed.filter(|index| of.contains_key(index)) {
                    return Ok(Some(index));
                }
            }
            match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(len) => self.rest = 0..len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // Some were lost: the end of the request is waited for.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// The link that a datagram's first message says is gone, if it says that, and
/// the rest of the datagram. The bridge code says something of the same type
/// about a port that only leaves its bridge, in its own family.
fn first(datagram: &[u8]) -> Option<(Option<u32>, &[u8])> {
    if datagram.len() < 32 {
        return None;
    }
    let word = |at: usize| u32::from_ne_bytes([datagram[at], datagram[at + 1], datagram[at + 2], datagram[at + 3]]);
    let len = word(0) as usize;
    let kind = u16::from_ne_bytes([datagram[4], datagram[5]]);
    let gone = kind == libc::RTM_DELLINK && datagram[16] == libc::AF_UNSPEC as u8;
    let rest = if len < 16 { &[] } else { datagram.get(len.next_multiple_of(4)..).unwrap_or_default() };
    Some((gone.then(|| word(20)), rest))
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

    fn removed(mut datagram: &[u8]) -> Vec<u32> {
        let mut all = Vec::new();
        while let Some((removed, rest)) = first(datagram) {
            all.extend(removed);
            datagram = rest;
        }
        all
    }

    #[test]
    fn only_the_end_of_links_counts() {
        let gone = |index| message(libc::RTM_DELLINK, libc::AF_UNSPEC, index);
        assert_eq!(removed(&gone(7)), [7]);
        assert!(removed(&message(libc::RTM_NEWLINK, libc::AF_UNSPEC, 7)).is_empty());
        assert!(removed(&message(libc::RTM_DELLINK, libc::AF_BRIDGE, 7)).is_empty());
        let several = [message(libc::RTM_NEWLINK, libc::AF_UNSPEC, 7), gone(7), gone(8)].concat();
        assert_eq!(removed(&several), [7, 8]);
        for cut in 0..32 {
            assert!(removed(&several[..cut + 32]).is_empty());
        }
    }
}
