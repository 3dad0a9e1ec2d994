//! A synchronous rtnetlink socket that takes many requests in one system call.
//!
//! Purpose: the hot path of wiring. The kernel works through a datagram of
//! requests in order, inside `sendto`, and goes on after one that failed. Only
//! the last is asked to be acknowledged: errors come unasked, and what was not
//! an error by then was done.
//! Owner: one wiring thread, or one job for a pod's namespace. A socket stays in
//! the namespace it was opened in, whatever its thread does later.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// One message to the kernel, what it is for, and which errors mean "as wished".
#[derive(Debug)]
pub(super) struct Request {
    pub(super) what: String,
    pub(super) message: RouteNetlinkMessage,
    pub(super) flags: u16,
    pub(super) fine: &'static [i32],
}

/// Errors of a removal that mean it is already gone.
pub(super) const GONE: &[i32] = &[libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::ENXIO, libc::EADDRNOTAVAIL];
/// Errors of an addition that mean it is already there.
pub(super) const THERE: &[i32] = &[libc::EEXIST];

/// What the kernel said, with its own words when it gave some.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {cause}")]
pub(super) struct NlError {
    pub(super) what: String,
    pub(super) errno: i32,
    pub(super) cause: String,
}

impl NlError {
    pub(super) fn io(what: impl Into<String>, e: &io::Error) -> Self {
        Self { what: what.into(), errno: e.raw_os_error().unwrap_or(0), cause: e.to_string() }
    }
}

pub(super) type Answer = Result<Vec<RouteNetlinkMessage>, NlError>;

pub(super) struct Nl {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// As large as the parts in which the kernel sends lists.
const RECEIVE: usize = 32 * 1024;
/// Keeps the answers to one batch well inside the socket's receive buffer.
const BATCH: usize = 48;

impl Nl {
    /// Open in the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Short acknowledgements, errors in words, dumps filtered in the kernel.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE] })
    }

    /// The cookie of the namespace the socket is in; `None` before Linux 5.14.
    pub(super) fn netns_cookie(&self) -> Option<u64> {
        crate::sys::netns::cookie_of(self.socket.as_fd()).ok().flatten()
    }

    /// The number that another namespace has in this one; it is given one if it has
    /// none, and keeps it as long as it lives.
    pub(super) fn netns_number(&mut self, of: BorrowedFd<'_>) -> Option<i32> {
        let message = |id: Option<i32>| {
            let mut message = NsidMessage::default();
            message.attributes.push(NsidAttribute::Fd(of.as_raw_fd().cast_unsigned()));
            message.attributes.extend(id.map(NsidAttribute::Id));
            message
        };
        let request = |message, fine| Request { what: "number of the namespace".to_owned(), message, flags: 0, fine };
        let requests = vec![
            request(RouteNetlinkMessage::NewNsId(message(Some(-1))), THERE),
            request(RouteNetlinkMessage::GetNsId(message(None)), &[]),
        ];
        let answers = self.all(requests).ok()?;
        let number = |message: &RouteNetlinkMessage| match message {
            RouteNetlinkMessage::NewNsId(found) => found.attributes.iter().find_map(|a| match a {
                NsidAttribute::Id(id) if *id >= 0 => Some(*id),
                _ => None,
            }),
            _ => None,
        };
        answers.iter().flatten().find_map(number)
    }

    /// Send everything; each answer stands at its request's place. An error of
    /// one request is in its answer, errors of the socket are the outer ones.
    pub(super) fn batch(&mut self, requests: Vec<Request>) -> Result<Vec<Answer>, NlError> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut rest = requests.into_iter().peekable();
        while rest.peek().is_some() {
            let part: Vec<Request> = rest.by_ref().take(BATCH).collect();
            answers.extend(self.batch_of(part)?);
        }
        Ok(answers)
    }

    /// Like [`Nl::batch`], for those that must all succeed; answers only.
    pub(super) fn all(&mut self, requests: Vec<Request>) -> Result<Vec<Vec<RouteNetlinkMessage>>, NlError> {
        self.batch(requests)?.into_iter().collect()
    }

    /// Ask for a list.
    pub(super) fn dump(&mut self, what: &str, message: RouteNetlinkMessage) -> Answer {
        let request = Request { what: what.to_owned(), message, flags: NLM_F_DUMP, fine: &[] };
        let mut answers = self.batch_of(vec![request])?;
        answers.pop().unwrap_or_else(|| Ok(Vec::new()))
    }

    fn batch_of(&mut self, requests: Vec<Request>) -> Result<Vec<Answer>, NlError> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(requests.len() * 128);
        let mut waiting: Vec<Waiting> = Vec::with_capacity(requests.len());
        let last = requests.len().saturating_sub(1);
        for (n, request) in requests.into_iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            header.sequence_number = self.sequence;
            let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request.message));
            message.header.flags = NLM_F_REQUEST | request.flags | if n == last { NLM_F_ACK } else { 0 };
            message.finalize();
            let at = bytes.len();
            bytes.resize(at + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut bytes[at..]);
            waiting.push(Waiting { what: request.what, fine: request.fine, got: Vec::new(), result: None });
        }
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        self.socket.send(&bytes, 0).map_err(|e| NlError::io("netlink send", &e))?;
        while waiting.last().is_some_and(|w| w.result.is_none()) {
            // Not blocking for long: the kernel has answered inside `send`.
            let len = self.socket.recv(&mut &mut self.buffer[..], 0).map_err(|e| NlError::io("netlink receive", &e))?;
            sort(&self.buffer[..len], first, &mut waiting);
        }
        Ok(waiting.into_iter().map(|w| w.result.unwrap_or(Ok(())).map(|()| w.got)).collect())
    }
}

struct Waiting {
    what: String,
    fine: &'static [i32],
    got: Vec<RouteNetlinkMessage>,
    result: Option<Result<(), NlError>>,
}

/// Sort one datagram's messages to their requests.
fn sort(mut datagram: &[u8], first: u32, waiting: &mut [Waiting]) {
    while datagram.len() >= 16 {
        let len = u32::from_ne_bytes([datagram[0], datagram[1], datagram[2], datagram[3]]) as usize;
        if len < 16 || len > datagram.len() {
            break;
        }
        let message = &datagram[..len];
        datagram = &datagram[len.next_multiple_of(4).min(datagram.len())..];
        let sequence = u32::from_ne_bytes([message[8], message[9], message[10], message[11]]);
        // An answer to an earlier batch that was given up has another number.
        let Some(to) = waiting.get_mut(sequence.wrapping_sub(first) as usize) else { continue };
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).map(|m| m.payload) {
            Ok(NetlinkPayload::InnerMessage(inner)) => to.got.push(inner),
            Ok(NetlinkPayload::Error(e)) => to.finish(e.raw_code(), &e.header),
            Ok(NetlinkPayload::Done(done)) => to.finish(done.code, &[]),
            Ok(_) => {}
            // A device of somebody else with an attribute the parser does not
            // know must not stop the list.
            Err(error) => tracing::debug!(%error, what = to.what, "Skipped a netlink message"),
        }
    }
}

/// What a datagram of answers holds, for the first few requests of a socket.
pub(crate) fn messages(datagram: &[u8]) -> Vec<RouteNetlinkMessage> {
    let open = || Waiting { what: String::new(), fine: &[], got: Vec::new(), result: None };
    let mut waiting: Vec<Waiting> = (0..4).map(|_| open()).collect();
    sort(datagram, 0, &mut waiting);
    waiting.into_iter().flat_map(|w| w.got).collect()
}

impl Waiting {
    fn finish(&mut self, code: i32, rest: &[u8]) {
        if self.result.is_some() {
            return;
        }
        // No errno is that large; whoever sends it must not end the thread.
        let errno = code.saturating_abs();
        self.result = Some(if errno == 0 || self.fine.contains(&errno) {
            Ok(())
        } else {
            let mut cause = io::Error::from_raw_os_error(errno).to_string();
            if let Some(words) = kernel_words(rest) {
                cause = format!("{cause}: {words}");
            }
            Err(NlError { what: std::mem::take(&mut self.what), errno, cause })
        });
    }
}

/// The text of an extended acknowledgement: attribute 1 behind the echoed header.
fn kernel_words(error: &[u8]) -> Option<String> {
    let mut rest = error.get(16..)?;
    while rest.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]);
        let value = rest.get(4..len)?;
        if kind == 1 {
            return Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_code_that_no_kernel_sends_ends_nothing() {
        let mut answer = 20u32.to_ne_bytes().to_vec();
        // Type NLMSG_DONE, no flags, sequence 0, no port, the code.
        answer.extend_from_slice(&3u32.to_ne_bytes());
        answer.extend_from_slice(&[0; 8]);
        answer.extend_from_slice(&i32::MIN.to_ne_bytes());
        let mut waiting = vec![Waiting { what: "it".to_owned(), fine: &[], got: Vec::new(), result: None }];
        sort(&answer, 0, &mut waiting);
        assert!(matches!(&waiting[0].result, Some(Err(e)) if e.errno == i32::MAX));
    }
}
