//! Clients in any namespace: ask a pod's port, ping an address, and a matrix of
//! who reaches whom. Only the socket is made inside the namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use futures::StreamExt;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::timeout_at;

use crate::lab::vpc::ns::{Netns, NsError};

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(transparent)]
    Ns(#[from] NsError),
    #[error("no answer from {0} in time")]
    Timeout(String),
    #[error("{0}: refused: nothing listens there")]
    Refused(String),
    #[error("{to}: {cause}")]
    Io { to: String, cause: io::Error },
}

/// What came back, and after how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub text: String,
    /// From the first packet to the answer.
    pub took: Duration,
}

/// A question to a server of [`super::Server`].
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Source address, when the namespace has several.
    pub from: Option<IpAddr>,
    pub to: SocketAddr,
    /// `peer` asks for the address seen; anything else for the name.
    pub question: &'a str,
    pub within: Duration,
}

impl<'a> Ask<'a> {
    pub fn new(to: SocketAddr) -> Self {
        Self { from: None, to, question: "who", within: Duration::from_secs(2) }
    }

    pub fn peer(to: SocketAddr) -> Self {
        Self { question: "peer", ..Self::new(to) }
    }

    pub fn from(self, from: IpAddr) -> Self {
        Self { from: Some(from), ..self }
    }

    pub fn within(self, within: Duration) -> Self {
        Self { within, ..self }
    }

    /// Connect by TCP and ask one line.
    pub async fn tcp(self, ns: &Netns) -> Result<Answer, AskError> {
        let v4 = self.to.is_ipv4();
        let socket = ns.run_async(move || if v4 { TcpSocket::new_v4() } else { TcpSocket::new_v6() }).await?;
        self.limit(async {
            let socket = socket?;
            if let Some(from) = self.from {
                socket.bind(SocketAddr::new(from, 0))?;
            }
            let begin = Instant::now();
            let mut stream = BufReader::new(socket.connect(self.to).await?);
            stream.get_ref().set_nodelay(true)?;
            stream.write_all(format!("{}\n", self.question).as_bytes()).await?;
            let mut text = String::new();
            if stream.read_line(&mut text).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(Answer { text: text.trim().to_owned(), took: begin.elapsed() })
        })
        .await
    }

    /// Ask in one UDP datagram.
    pub async fn udp(self, ns: &Netns) -> Result<Answer, AskError> {
        let any: IpAddr = if self.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let at = SocketAddr::new(self.from.unwrap_or(any), 0);
        let socket = ns.run_async(move || bind_udp(at)).await?;
        self.limit(async {
            let socket = socket?;
            socket.connect(self.to).await?;
            let begin = Instant::now();
            socket.send(self.question.as_bytes()).await?;
            let mut buffer = [0; 2048];
            let n = socket.recv(&mut buffer).await?;
            Ok(Answer { text: String::from_utf8_lossy(&buffer[..n]).trim().to_owned(), took: begin.elapsed() })
        })
        .await
    }

    async fn limit<T>(&self, work: impl Future<Output = io::Result<T>>) -> Result<T, AskError> {
        let to = self.to.to_string();
        bounded(to, self.within, work).await
    }
}

fn bind_udp(at: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(at)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

async fn bounded<T>(to: String, within: Duration, work: impl Future<Output = io::Result<T>>) -> Result<T, AskError> {
    match timeout_at(tokio::time::Instant::now() + within, work).await {
        Err(_) => Err(AskError::Timeout(to)),
        Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => Err(AskError::Refused(to)),
        Ok(Err(e)) if e.kind() == io::ErrorKind::TimedOut => Err(AskError::Timeout(to)),
        Ok(Err(cause)) => Err(AskError::Io { to, cause }),
        Ok(Ok(value)) => Ok(value),
    }
}

/// One ICMP echo; the time until its reply.
pub async fn ping(ns: &Netns, to: IpAddr, within: Duration) -> Result<Duration, AskError> {
    let socket = ns.run_async(move || open_icmp(to)).await?;
    let (id, sequence): (u16, u16) = (rand::random(), 1);
    bounded(to.to_string(), within, async {
        let socket = socket?;
        let begin = Instant::now();
        socket.send_to(&echo_request(to.is_ipv4(), id, sequence), SocketAddr::new(to, 0)).await?;
        let mut buffer = [0; 1500];
        loop {
            let (n, from) = socket.recv_from(&mut buffer).await?;
            if from.ip() == to && is_echo_reply(to.is_ipv4(), &buffer[..n], id) {
                return Ok(begin.elapsed());
            }
        }
    })
    .await
}

/// A raw ICMP socket. Its addresses are those of UDP with port zero, so tokio's
/// UDP socket can drive it.
fn open_icmp(to: IpAddr) -> io::Result<UdpSocket> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let fd: OwnedFd = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, protocol)?;
    UdpSocket::from_std(std::net::UdpSocket::from(fd))
}

fn echo_request(v4: bool, id: u16, sequence: u16) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = if v4 { 8 } else { 128 };
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    if v4 {
        // The kernel fills in the checksum of ICMPv6 only.
        let mut sum: u32 = packet.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    packet
}

fn is_echo_reply(v4: bool, packet: &[u8], id: u16) -> bool {
    // Raw IPv4 sockets deliver the IP header too.
    let header = if v4 { packet.first().map_or(0, |b| usize::from(b & 0xf) * 4) } else { 0 };
    let Some(icmp) = packet.get(header..) else { return false };
    icmp.first() == Some(if v4 { &0 } else { &129 }) && icmp.get(4..6) == Some(&id.to_be_bytes()[..])
}

/// One cell of a reachability matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    pub from: String,
    pub to: String,
    pub address: SocketAddr,
    /// Round-trip time, or why there is none.
    pub outcome: Result<Duration, String>,
}

/// A place to ask from.
#[derive(Clone, Debug)]
pub struct Source {
    pub name: String,
    pub ns: Netns,
}

/// A server, and the name it must answer with.
#[derive(Clone, Debug)]
pub struct Target {
    pub name: String,
    pub address: SocketAddr,
}

/// Every source asks every target by TCP, a few at a time. An answer with
/// another name than the target's is a failure.
pub async fn matrix(sources: &[Source], targets: &[Target], within: Duration) -> Vec<Reach> {
    let pairs = sources.iter().flat_map(|s| targets.iter().map(move |t| (s, t)));
    futures::stream::iter(pairs)
        .map(|(source, target)| async move {
            let outcome = match Ask::new(target.address).within(within).tcp(&source.ns).await {
                Ok(answer) if answer.text == target.name => Ok(answer.took),
                Ok(answer) => Err(format!("answered by {:?}", answer.text)),
                Err(e) => Err(e.to_string()),
            };
            Reach { from: source.name.clone(), to: target.name.clone(), address: target.address, outcome }
        })
        .buffered(8)
        .collect()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_request_has_a_valid_checksum_and_its_reply_is_recognised() {
        let request = echo_request(true, 0x1234, 1);
        let sum: u32 = request.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        let mut reply = vec![0x45; 1];
        reply.resize(20, 0);
        reply.extend([0, 0, 0, 0, 0x12, 0x34, 0, 1]);
        assert!(is_echo_reply(true, &reply, 0x1234));
        assert!(!is_echo_reply(true, &reply, 0x1235));
        assert!(!is_echo_reply(true, &reply[..3], 0x1234));
    }
}
