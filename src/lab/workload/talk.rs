//! The conversation: a line is answered with the name, `peer` with the address
//! the question came from, an HTTP request with either (`/peer`). Who says
//! nothing is told the name after a moment, so that `nc` shows it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::Speaks;

/// Connections one listener serves at a time; others wait in its backlog.
const MAX_CONNECTIONS: usize = 1024;
const MAX_LINE: usize = 8 * 1024;
const UNASKED: Duration = Duration::from_millis(200);
const IDLE: Duration = Duration::from_secs(3600);

pub(super) struct Voice {
    pub(super) name: String,
    pub(super) speaks: Speaks,
}

impl Voice {
    fn answer(&self, question: &[u8], peer: SocketAddr) -> String {
        let from = peer.ip().to_canonical();
        match (question.trim_ascii(), self.speaks) {
            (b"peer", _) => format!("{from}\n"),
            (_, Speaks::Name) => format!("{}\n", self.name),
            (_, Speaks::Peer) => format!("{} {from}\n", self.name),
        }
    }

    fn http(&self, head: &[u8], peer: SocketAddr) -> String {
        let path = head.split(|b| *b == b' ').nth(1).unwrap_or_default();
        let body = self.answer(path.strip_prefix(b"/").unwrap_or(path), peer);
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    }
}

pub(super) async fn udp(socket: &UdpSocket, voice: &Voice) {
    let mut buffer = vec![0; 2048];
    loop {
        // Errors of a UDP socket are about single peers (ICMP); it goes on.
        if let Ok((n, peer)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(voice.answer(&buffer[..n], peer).as_bytes(), peer).await;
        }
    }
}

pub(super) async fn tcp(listener: &TcpListener, voice: &Voice) {
    let mut open = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if open.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, peer)) => open.push(connection(stream, peer, voice)),
                // Out of descriptors: let connections end first.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = open.next() => {}
        }
    }
}

async fn connection(mut stream: TcpStream, peer: SocketAddr, voice: &Voice) -> io::Result<()> {
    let _ = stream.set_nodelay(true);
    let mut data = Vec::new();
    match timeout(UNASKED, stream.read_buf(&mut data)).await {
        Err(_) => stream.write_all(voice.answer(b"", peer).as_bytes()).await?,
        Ok(Ok(0)) => return Ok(()),
        Ok(read) => drop(read?),
    }
    if [&b"GET "[..], b"HEAD ", b"POST "].iter().any(|m| data.starts_with(m)) {
        while !data.windows(4).any(|w| w == b"\r\n\r\n") {
            if data.len() > MAX_LINE || timeout(IDLE, stream.read_buf(&mut data)).await?? == 0 {
                return Ok(());
            }
        }
        stream.write_all(voice.http(&data, peer).as_bytes()).await?;
        return stream.shutdown().await;
    }
    loop {
        while let Some(end) = data.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = data.drain(..=end).collect();
            stream.write_all(voice.answer(&line, peer).as_bytes()).await?;
        }
        if data.len() > MAX_LINE || timeout(IDLE, stream.read_buf(&mut data)).await?? == 0 {
            return Ok(());
        }
    }
}
