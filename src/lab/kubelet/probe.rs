//! Readiness probes, sent from the node's namespace as kubelet's are.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::time::{Instant, sleep_until, timeout};

use super::spec::{ProbeKind, Readiness};
use crate::lab::vpc::ns::Netns;

/// The probes of one pod's containers and what they have found.
#[derive(Debug)]
pub struct Probes {
    containers: Vec<State>,
}

#[derive(Debug)]
struct State {
    /// `None` is ready from the start.
    probe: Option<Readiness>,
    ready: bool,
    successes: u32,
    failures: u32,
    next: Instant,
}

impl Probes {
    pub fn start(probes: Vec<Option<Readiness>>) -> Self {
        let state = |probe: Option<Readiness>| State {
            ready: probe.is_none(),
            next: Instant::now() + probe.as_ref().map(|p| p.initial_delay).unwrap_or_default(),
            probe,
            successes: 0,
            failures: 0,
        };
        Self { containers: probes.into_iter().map(state).collect() }
    }

    /// Readiness per container.
    pub fn ready(&self) -> Vec<bool> {
        self.containers.iter().map(|c| c.ready).collect()
    }

    /// Probe what is due; returns when some container's readiness has changed.
    /// May be dropped at any time and called again.
    pub async fn changed(&mut self, node: &Netns, pod: IpAddr) {
        loop {
            let due = self.containers.iter_mut().filter(|c| c.probe.is_some()).min_by_key(|c| c.next);
            let Some(State { probe: Some(probe), ready, successes, failures, next }) = due else {
                return std::future::pending().await;
            };
            sleep_until(*next).await;
            let ok = ask(node, pod, &probe.how, probe.timeout).await;
            *next = Instant::now() + probe.period;
            (*successes, *failures) = if ok { (*successes + 1, 0) } else { (0, *failures + 1) };
            let was = *ready;
            if *successes >= probe.success {
                *ready = true;
            } else if *failures >= probe.failure {
                *ready = false;
            }
            if *ready != was {
                return;
            }
        }
    }
}

async fn ask(node: &Netns, pod: IpAddr, how: &ProbeKind, within: Duration) -> bool {
    let work = async {
        match how {
            ProbeKind::Succeeds => Ok(true),
            ProbeKind::Tcp(port) => connect(node, SocketAddr::new(pod, *port)).await.map(|_| true),
            ProbeKind::Http { port, path } => {
                let to = SocketAddr::new(pod, *port);
                let mut stream = connect(node, to).await?;
                let request = format!(
                    "GET {path} HTTP/1.1\r\nHost: {to}\r\nUser-Agent: kube-probe/lab\r\nConnection: close\r\n\r\n"
                );
                stream.write_all(request.as_bytes()).await?;
                let mut head = Vec::new();
                stream.take(64).read_to_end(&mut head).await?;
                let text = String::from_utf8_lossy(&head).into_owned();
                let code = text.split(' ').nth(1).and_then(|c| c.parse::<u16>().ok());
                Ok::<_, io::Error>(code.is_some_and(|c| (200..400).contains(&c)))
            }
        }
    };
    matches!(timeout(within, work).await, Ok(Ok(true)))
}

async fn connect(node: &Netns, to: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let v4 = to.is_ipv4();
    let socket = node.run_async(move || if v4 { TcpSocket::new_v4() } else { TcpSocket::new_v6() }).await;
    socket.map_err(io::Error::other)??.connect(to).await
}
