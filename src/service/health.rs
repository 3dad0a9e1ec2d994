//! Health check node ports: whether a load balancer should send here.
//!
//! Owner: ServiceMap. One listener for each port, on all addresses of the node:
//! 200 when the Service has a ready endpoint here, 503 when it has none. A load
//! balancer asks one short question at a time; who holds connections open, or
//! opens many, is cut off.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use super::model::ServiceName;

const CONVERSATION: Duration = Duration::from_secs(5);
const AT_ONCE: usize = 64;
const LONGEST_REQUEST: usize = 8192;
/// After an error that the next accept would have too.
const PAUSE: Duration = Duration::from_millis(100);

/// What a port answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub service: ServiceName,
    pub local_ready: usize,
    /// This node's tables are up to date.
    pub healthy: bool,
}

/// All listeners; dropped, they close.
#[derive(Default)]
pub struct HealthPorts {
    open: BTreeMap<u16, (watch::Sender<Answer>, JoinHandle<()>)>,
}

impl Drop for HealthPorts {
    fn drop(&mut self) {
        self.open.values().for_each(|(_, task)| task.abort());
    }
}

impl HealthPorts {
    /// Answer these from here on, and no others. Whose port cannot be bound is
    /// answered, with the reason; asked again it is tried again.
    pub fn set(&mut self, wanted: BTreeMap<u16, Answer>) -> Vec<(ServiceName, String)> {
        self.open.retain(|port, (_, task)| {
            let stays = wanted.contains_key(port) && !task.is_finished();
            if !stays {
                task.abort();
            }
            stays
        });
        let mut failed = Vec::new();
        for (port, answer) in wanted {
            match self.open.get(&port) {
                Some((say, _)) => drop(say.send_replace(answer)),
                None => match bind(port) {
                    Ok(listener) => {
                        let (say, said) = watch::channel(answer);
                        self.open.insert(port, (say, tokio::spawn(serve(listener, said))));
                    }
                    Err(e) => {
                        let why = format!("health check node port {port} cannot be bound: {e}");
                        failed.push((answer.service, why));
                    }
                },
            }
        }
        failed
    }

    pub fn ports(&self) -> impl Iterator<Item = u16> {
        self.open.keys().copied()
    }
}

/// Both families by one socket, where the node has both.
fn bind(port: u16) -> std::io::Result<TcpListener> {
    let any6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let any4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let bound = std::net::TcpListener::bind(any6).or_else(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => Err(e),
        _ => std::net::TcpListener::bind(any4),
    })?;
    bound.set_nonblocking(true)?;
    TcpListener::from_std(bound)
}

async fn serve(listener: TcpListener, answer: watch::Receiver<Answer>) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let answer = answer.borrow().clone();
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(CONVERSATION, converse(stream, answer)).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// One request, of whatever path, and its answer.
async fn converse(mut stream: TcpStream, answer: Answer) -> std::io::Result<()> {
    let mut request = Vec::with_capacity(512);
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        if request.len() > LONGEST_REQUEST || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    stream.write_all(response(&answer).as_bytes()).await?;
    stream.shutdown().await
}

fn response(answer: &Answer) -> String {
    let status = if answer.local_ready > 0 && answer.healthy { "200 OK" } else { "503 Service Unavailable" };
    let body = json!({
        "service": {"namespace": &*answer.service.namespace, "name": &*answer.service.name},
        "localEndpoints": answer.local_ready,
        "serviceProxyHealthy": answer.healthy,
    })
    .to_string();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        answer.local_ready,
        body.len()
    )
}
