//! A GET from the debug endpoint, over TCP or a Unix socket.

use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::debug::Listen;

/// More than any view of a full node; what is beyond is not ours.
const LONGEST: usize = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(90);

#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error("no agent answers at {0}: {1}; is it running on this node? (--endpoint names another address)")]
    Unreachable(String, String),
    #[error("the agent's answer to {0} is not understood: {1}")]
    Unreadable(String, String),
    #[error("{0}: {1}")]
    Refused(StatusCode, String),
}

/// The agent's answer to `GET path`, parsed.
pub async fn get(endpoint: &Listen, path: &str) -> Result<Value, StatusError> {
    let text = get_text(endpoint, path).await?;
    serde_json::from_slice(&text).map_err(|e| StatusError::Unreadable(path.to_owned(), e.to_string()))
}

/// The agent's answer to `GET path`, as it came.
pub async fn get_text(endpoint: &Listen, path: &str) -> Result<Bytes, StatusError> {
    let (name, asked) = match endpoint {
        Listen::Tcp(addr) => (
            addr.to_string(),
            tokio::time::timeout(PATIENCE, async { ask(TcpStream::connect(addr).await, path).await }).await,
        ),
        Listen::Unix(socket) => (
            socket.display().to_string(),
            tokio::time::timeout(PATIENCE, async { ask(UnixStream::connect(socket).await, path).await }).await,
        ),
    };
    let (status, body) = match asked {
        Err(_) => return Err(StatusError::Unreachable(name, "no answer in time".to_owned())),
        Ok(Err(e)) => return Err(StatusError::Unreachable(name, e.to_string())),
        Ok(Ok(answer)) => answer,
    };
    if status.is_success() {
        return Ok(body);
    }
    Err(StatusError::Refused(status, String::from_utf8_lossy(&body).trim().to_owned()))
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn ask<S>(stream: std::io::Result<S>, path: &str) -> Result<(StatusCode, Bytes), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream?)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::get(path).header("host", "localhost").body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), LONGEST).collect().await?.to_bytes();
    driver.abort();
    Ok((status, body))
}
