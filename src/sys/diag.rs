//! sock_diag(7): finding connected UDP sockets, and ending them.
//!
//! Owner: whoever looks; a [`Diag`] stays in the namespace it was opened in. Needs
//! CAP_NET_ADMIN. A kernel may lack listing (CONFIG_INET_UDP_DIAG, often a module)
//! or ending (CONFIG_INET_DIAG_DESTROY): each is an error that says so. The
//! contents of socket storage are listed for TCP sockets alone.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike as _};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;

/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID: usize = 48;
/// Of a connected UDP socket.
const ESTABLISHED: u32 = 1 << 1;

/// A connected UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    family: u8,
    id: [u8; ID],
}

impl Connected {
    /// What eBPF programs know it by (`bpf_get_socket_cookie`).
    pub fn cookie(&self) -> u64 {
        let half = |at: usize| u64::from(number(&self.id, at).unwrap_or_default());
        half(44) << 32 | half(40)
    }

    /// The peer's port, in network byte order.
    pub fn peer_port(&self) -> u16 {
        u16::from_ne_bytes([self.id[2], self.id[3]])
    }

    /// The peer's address; v4 addresses in their mapped form.
    pub fn peer(&self) -> [u8; 16] {
        let mut to = [0; 16];
        if i32::from(self.family) == libc::AF_INET {
            to[10..12].fill(0xff);
            to[12..].copy_from_slice(&self.id[20..24]);
        } else {
            to.copy_from_slice(&self.id[20..36]);
        }
        to
    }
}

/// A sock_diag socket.
pub struct Diag {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Diag {
    /// Open in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel answers inside the call; should it not, nobody waits for ever.
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(5)).map_err(io::Error::from)?;
        Ok(Self { socket, buffer: vec![0; 32 * 1024], sequence: 0 })
    }

    /// The connected UDP sockets of the namespace.
    pub fn connected_udp(&mut self) -> io::Result<Vec<Connected>> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = header(family as u8, ESTABLISHED, &[0; ID]);
            self.ask(SOCK_DIAG_BY_FAMILY, DUMP, &request, |answer| found.extend(connected(answer)))?;
        }
        Ok(found)
    }

    /// Ends a socket: whoever waits at it is told ECONNABORTED. ENOENT when it is
    /// gone or no longer what it was.
    pub fn destroy_udp(&mut self, socket: &Connected) -> io::Result<()> {
        self.ask(SOCK_DESTROY, ACK, &header(socket.family, ESTABLISHED, &socket.id), |_| {})
    }

    fn ask(&mut self, kind: u16, flags: u16, request: &[u8], mut answer: impl FnMut(&[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(16 + request.len());
        bytes.extend(((16 + request.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((REQUEST | flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(request);
        self.socket.send(&bytes, 0)?;
        loop {
            let len = self.socket.recv(&mut &mut self.buffer[..], 0)?;
            for (kind, sequence, body) in messages(&self.buffer[..len]) {
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        let code = number(body, 0).map_or(0, |n| n as i32);
                        return if code >= 0 {
                            Ok(())
                        } else {
                            Err(io::Error::from_raw_os_error(code.saturating_neg()))
                        };
                    }
                    SOCK_DIAG_BY_FAMILY => answer(body),
                    _ => {}
                }
            }
        }
    }
}

/// `struct inet_diag_req_v2`.
fn header(family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut out = vec![family, libc::IPPROTO_UDP as u8, 0, 0];
    out.extend(states.to_ne_bytes());
    out.extend(id);
    out
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Type, sequence number and body of each message.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::try_from(number(datagram, 0)?).ok()?;
        let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
        let sequence = number(datagram, 8)?;
        let body = datagram.get(16..len)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, sequence, body))
    })
}

/// The socket that an answer tells of.
fn connected(answer: &[u8]) -> Option<Connected> {
    Some(Connected { family: *answer.first()?, id: answer.get(4..4 + ID)?.try_into().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_says_who_the_socket_is_and_whom_it_talks_to() {
        let mut answer = vec![0u8; 72];
        answer[0] = libc::AF_INET as u8;
        answer[6..8].copy_from_slice(&53u16.to_be_bytes());
        answer[24..28].copy_from_slice(&[10, 0, 0, 7]);
        answer[44..48].copy_from_slice(&2u32.to_ne_bytes());
        answer[48..52].copy_from_slice(&1u32.to_ne_bytes());
        let socket = connected(&answer).unwrap();
        assert_eq!((socket.peer_port(), socket.cookie()), (53u16.to_be(), 1 << 32 | 2));
        assert_eq!(std::net::Ipv6Addr::from(socket.peer()).to_ipv4_mapped().unwrap().to_string(), "10.0.0.7");
    }

    proptest! {
        #[test]
        fn answers_cut_short_or_of_nonsense_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            for (_, _, body) in messages(&bytes) {
                let _ = connected(body);
            }
            let _ = connected(&bytes).map(|c| (c.cookie(), c.peer()));
        }
    }
}
