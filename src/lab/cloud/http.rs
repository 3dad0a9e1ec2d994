//! The HTTP plumbing shared by API, metadata service and admin interface.
//!
//! Purpose: accept, TLS, bounded requests, orderly end; and the one thing
//! ordinary servers do not offer, closing a connection instead of answering.
//! Owner: each server task. Invariants: connections, header size, body size and
//! the time to send a request are bounded.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const MAX_CONNECTIONS: usize = 2048;
const MAX_HEADERS: usize = 64 * 1024;
const MAX_BODY: usize = 64 * 1024;
const READ_TIME: Duration = Duration::from_secs(20);
const TLS_TIME: Duration = Duration::from_secs(10);
/// Answers in progress may be finished for this long after a stop.
const GRACE: Duration = Duration::from_secs(2);

/// A complete request.
#[derive(Debug)]
pub struct Call {
    pub head: http::request::Parts,
    pub body: Bytes,
    pub peer: SocketAddr,
}

impl Call {
    pub fn path(&self) -> &str {
        self.head.uri.path()
    }

    pub fn query(&self) -> &str {
        self.head.uri.query().unwrap_or_default()
    }
}

/// What happens to the connection.
#[derive(Debug)]
pub enum Answer {
    Reply(Response<Full<Bytes>>),
    /// Close it without a word.
    Drop,
}

impl Answer {
    pub fn new(status: u16, content_type: &str, body: impl Into<Bytes>) -> Self {
        let mut response = Response::new(Full::new(body.into()));
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if let Ok(value) = content_type.parse() {
            response.headers_mut().insert(http::header::CONTENT_TYPE, value);
        }
        Answer::Reply(response)
    }

    pub fn json(status: u16, value: &impl serde::Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::new(status, "application/json;charset=utf-8", body),
            Err(error) => Self::new(500, "text/plain", error.to_string()),
        }
    }

    pub fn text(status: u16, text: impl Into<Bytes>) -> Self {
        Self::new(status, "text/plain", text)
    }
}

/// One of the servers.
pub trait Handler: Send + Sync + 'static {
    /// False: connections are closed as soon as they are made.
    fn accepts(&self) -> bool {
        true
    }

    fn handle(self: Arc<Self>, call: Call) -> BoxFuture<'static, Answer>;
}

/// Serves `listener` until `stop`; connections run on `tasks`.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    handler: Arc<dyn Handler>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(pair) => pair,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                // Out of descriptors: give the connections a moment to end.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else { continue };
        if !handler.accepts() {
            continue;
        }
        let _ = stream.set_nodelay(true);
        let (tls, handler, stop) = (tls.clone(), handler.clone(), stop.clone());
        tasks.spawn(async move {
            let _permit = permit;
            match tls {
                None => connection(stream, peer, handler, stop).await,
                Some(tls) => match tokio::time::timeout(TLS_TIME, tls.accept(stream)).await {
                    Ok(Ok(stream)) => connection(stream, peer, handler, stop).await,
                    Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                    Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
                },
            }
        });
    }
}

/// The connection is to be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("connection closed on purpose")]
struct Closed;

async fn connection<S>(stream: S, peer: SocketAddr, handler: Arc<dyn Handler>, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let handler = handler.clone();
        async move {
            let (head, body) = request.into_parts();
            let answer = match read_body(body).await {
                Ok(body) => handler.handle(Call { head, body, peer }).await,
                Err(status) => Answer::text(status, "the request's body is too large or too slow"),
            };
            match answer {
                Answer::Reply(response) => Ok(response),
                Answer::Drop => Err(Closed),
            }
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_TIME)
        .max_buf_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    let _ = tokio::time::timeout(GRACE, connection).await;
}

async fn read_body(body: Incoming) -> Result<Bytes, u16> {
    match tokio::time::timeout(READ_TIME, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(_)) => Err(413),
        Err(_) => Err(408),
    }
}
