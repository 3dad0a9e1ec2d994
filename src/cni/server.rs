//! The Unix socket: who may talk, how much, how long.
//!
//! Owner: CniServer. Invariants: the socket appears under its name with mode
//! 0600 or not at all; one agent at a time serves it; at most `max_open`
//! conversations; whatever arrives, the answer is a CNI error or a result.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tracing::Instrument as _;

use super::conversation::Desk;
use super::spec::{Call, PodArgs};
use super::stats::Stats;
use super::wire::{self, CniError, Request, Response, code};
use crate::actor::Deadline;

/// A shim sends its request at once.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
const REPLY_PATIENCE: Duration = Duration::from_secs(5);
/// Kept of the shim's time for the way back.
const REPLY_RESERVE: Duration = Duration::from_millis(100);
/// Requests are rarely longer.
const ORDINARY: usize = 16 << 10;
const MAX_BUDGET: Duration = Duration::from_secs(600);

/// A bound socket; its name goes away with it.
pub struct Bound {
    listener: UnixListener,
    path: PathBuf,
    // Released last: until then no other agent touches the name.
    _lock: File,
}

impl Bound {
    /// Bind under another name, then rename: a stale socket is replaced without
    /// a moment at which the name leads nowhere or to the wrong mode.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let context = |what: &'static str| move |e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
        if let Some(dir) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(context("create its folder"))?;
        }
        let beside = |suffix: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(beside(".lock"))?;
        if lock.try_lock().is_err() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent serves it; stop that one first"));
        }
        let fresh = beside(".new");
        match fs::remove_file(&fresh) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&fresh).map_err(context("bind"))?;
        fs::set_permissions(&fresh, Permissions::from_mode(0o600)).map_err(context("set its mode"))?;
        fs::rename(&fresh, path).map_err(context("rename into place"))?;
        Ok(Self { listener, path: path.to_owned(), _lock: lock })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Accept until the listener fails. Conversations end with this future.
pub async fn serve(bound: Bound, desk: Arc<Desk>, stats: Arc<Stats>) -> io::Error {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            Some(ended) = open.join_next(), if !open.is_empty() => {
                if let Err(error) = ended {
                    // The shim sees its connection end, and tries again or spools.
                    tracing::error!(%error, "A CNI conversation failed");
                }
            }
            accepted = bound.listener.accept() => match accepted {
                Ok((stream, _)) if open.len() >= desk.config.max_conversations => {
                    stats.refused();
                    refuse(&stream);
                }
                Ok((stream, _)) => {
                    open.spawn(converse(stream, desk.clone(), stats.clone()));
                }
                Err(error) if out_of_files(&error) => {
                    tracing::error!(%error, "CNI calls wait: raise the agent's limit of open files");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return error,
            }
        }
    }
}

fn out_of_files(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::ECONNABORTED))
}

/// A word and no more: a flood must not cost a task each.
fn refuse(stream: &UnixStream) {
    let busy =
        CniError::new(code::TRY_AGAIN, "the fairway agent is busy with as many calls as it accepts, try again later");
    if let Ok(frame) = wire::frame(&Response::Failed(busy)) {
        let _ = stream.try_write(&frame);
    }
}

async fn converse(mut stream: UnixStream, desk: Arc<Desk>, stats: Arc<Stats>) {
    let began = Instant::now();
    let response = match admit(&mut stream, &desk.config.peer_uids).await {
        Err(e) => {
            tracing::warn!(error = %e, "Refused what came over the CNI socket");
            stats.refused();
            Response::Failed(e.in_version(""))
        }
        Ok(request) => {
            let pod =
                PodArgs::parse(&request.args).ok().and_then(|p| p.key()).map(|k| k.to_string()).unwrap_or_default();
            let name = request.command.name();
            let span =
                tracing::info_span!("cni", command = name, container = %wire::clip(&request.container_id), pod = %pod);
            let open = stats.open(request.command, &pod, wire::clip(&request.container_id));
            let result = answer(request, &desk, began).instrument(span.clone()).await;
            open.close(result.as_ref().err());
            let _in_span = span.enter();
            match result {
                Ok(result) => Response::Done(result),
                Err(e) => {
                    tracing::warn!(code = e.code, error = %e, ms = began.elapsed().as_millis() as u64, "CNI call failed");
                    Response::Failed(e)
                }
            }
        }
    };
    let sent = async {
        stream.write_all(&wire::frame(&response)?).await?;
        stream.shutdown().await
    };
    if !matches!(tokio::time::timeout(REPLY_PATIENCE, sent).await, Ok(Ok(()))) {
        tracing::debug!("The CNI shim did not wait for its answer");
    }
}

/// Who it is, and what they ask.
async fn admit(stream: &mut UnixStream, uids: &[u32]) -> Result<Request, CniError> {
    let peer =
        stream.peer_cred().map_err(|e| CniError::new(code::IO, format!("who is calling cannot be told: {e}")))?;
    if !uids.contains(&peer.uid()) {
        let msg = format!("user {} may not use the CNI socket", peer.uid());
        return Err(CniError::new(code::IO, msg).remedy("container runtimes call it as root"));
    }
    let read = tokio::time::timeout(REQUEST_PATIENCE, read_frame(stream)).await;
    let body = match read {
        Err(_) => return Err(CniError::new(code::IO, "no complete request came in time")),
        Ok(Err(e)) => return Err(CniError::new(code::DECODE, "not a request of the CNI shim").remedy(e.to_string())),
        Ok(Ok(body)) => body,
    };
    serde_json::from_slice(&body)
        .map_err(|e| CniError::new(code::DECODE, "not a request of the CNI shim").remedy(e.to_string()))
}

async fn read_frame(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let len = wire::body_len(head)?;
    // Beyond an ordinary request it grows with what arrives, not with what is
    // announced.
    let mut body = Vec::with_capacity(len.min(ORDINARY) + 1);
    stream.take(len as u64).read_to_end(&mut body).await?;
    if body.len() < len {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{} of {len} bytes came", body.len())));
    }
    Ok(body)
}

async fn answer(request: Request, desk: &Desk, began: Instant) -> Result<Option<serde_json::Value>, CniError> {
    let call = Call::parse(&request)?;
    let version = call.version.name();
    let budget =
        Duration::from_millis(request.budget_ms).min(MAX_BUDGET).saturating_sub(began.elapsed() + REPLY_RESERVE);
    desk.answer(call, Deadline::after(budget)).await.map_err(|e| e.in_version(version))
}
