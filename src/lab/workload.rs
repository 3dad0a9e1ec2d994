//! What runs "in" a pod, and clients that ask it.
//!
//! A pod's declared ports answer TCP and UDP with the pod's name. Sockets are
//! opened inside the pod's namespace and served from the lab's process by one
//! task per pod, so hundreds of pods cost hundreds of tasks and no process.
//!
//! Invariant: after [`Server::stop`] nothing of the pod is open, so its
//! namespace can end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;

use crate::lab::vpc::ns::Netns;

/// Asking from any namespace: TCP, UDP, ICMP, with times.
pub mod client;
/// One connection's conversation.
pub mod talk;

/// What an answer contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// The name.
    Name,
    /// The name and the address the question came from.
    Peer,
}

/// Open sockets and the task that answers on them.
#[derive(Debug)]
pub struct Server {
    task: Option<JoinHandle<()>>,
    ports: Vec<u16>,
}

impl Server {
    /// Answer on these ports, TCP and UDP, in the namespace. Without addresses
    /// it listens on all of them, of both families.
    pub async fn start(
        ns: &Netns,
        name: &str,
        addresses: &[IpAddr],
        ports: &[u16],
        speaks: Speaks,
    ) -> io::Result<Self> {
        let places: Vec<(Vec<IpAddr>, u16)> = ports
            .iter()
            .map(|port| {
                let any = || vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
                (if addresses.is_empty() { any() } else { addresses.to_vec() }, *port)
            })
            .collect();
        let sockets = ns.run_async(move || open(&places)).await.map_err(io::Error::other)??;
        let task = tokio::spawn(serve(sockets, name.to_owned(), speaks));
        Ok(Self { task: Some(task), ports: ports.to_vec() })
    }

    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Close every socket; returns when they are closed.
    pub async fn stop(mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

fn open(places: &[(Vec<IpAddr>, u16)]) -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for (addresses, port) in places {
        for address in addresses {
            let mut at = SocketAddr::new(*address, *port);
            let tcp = std::net::TcpListener::bind(at).or_else(|e| {
                // No IPv6 in this namespace.
                if !address.is_unspecified() || e.kind() == io::ErrorKind::AddrInUse {
                    return Err(e);
                }
                at.set_ip(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
                std::net::TcpListener::bind(at)
            })?;
            let udp = std::net::UdpSocket::bind(at)?;
            tcp.set_nonblocking(true)?;
            udp.set_nonblocking(true)?;
            sockets.push(Socket::Tcp(TcpListener::from_std(tcp)?));
            sockets.push(Socket::Udp(UdpSocket::from_std(udp)?));
        }
    }
    Ok(sockets)
}

async fn serve(sockets: Vec<Socket>, name: String, speaks: Speaks) {
    let voice = talk::Voice { name, speaks };
    let mut all: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
    for socket in &sockets {
        all.push(match socket {
            Socket::Tcp(listener) => Box::pin(talk::tcp(listener, &voice)),
            Socket::Udp(socket) => Box::pin(talk::udp(socket, &voice)),
        });
    }
    while all.next().await.is_some() {}
}
