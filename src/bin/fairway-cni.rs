//! The CNI shim: kubelet's runtime starts it for every call.
//!
//! Purpose: pass the call to the agent over a Unix socket and print what comes
//! back. Answers VERSION alone, checks what can be checked without the agent,
//! has a deadline of its own, and never loses a release: a DEL that the agent
//! cannot take now is left in the spool and reported as done.
//!
//! Uses std, serde and serde_json only, ships as a static program (`shim/`,
//! `build/shim.rs`), and starts no thread on its usual way: it lives for a fraction
//! of a millisecond besides what the agent takes.
#![cfg_attr(not(test), no_main)]

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

#[cfg(not(test))]
#[path = "../sys/entry.rs"]
mod entry;
#[path = "../sys/patience.rs"]
mod patience;
// Each side uses its part of these.
#[allow(dead_code)]
#[path = "../cni/spool.rs"]
mod spool;
#[allow(dead_code)]
#[path = "../cni/wire.rs"]
mod wire;

use patience::{Conversation, Patient};
use wire::{CniError, Command, Request, Response, code};

/// Kubelet gives a runtime call two minutes; what is left is for the runtime
/// and for the plugins chained after us.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(110);
const MAX_TIMEOUT_SECONDS: u64 = 600;
/// A release is not worth waiting longer for: the spool takes it.
const DEL_PATIENCE: Duration = Duration::from_secs(5);
/// STATUS comes every five seconds and holds the node's readiness.
const STATUS_PATIENCE: Duration = Duration::from_secs(4);
const STDIN_PATIENCE: Duration = Duration::from_secs(10);
const DISK_PATIENCE: Duration = Duration::from_secs(10);

/// The exit code.
#[cfg_attr(test, allow(dead_code))]
fn start() -> i32 {
    let began = Instant::now();
    let mut version = String::new();
    let (text, exit) = match run(began, &mut version) {
        Ok(None) => return 0,
        Ok(Some(result)) => (result.to_string(), 0),
        Err(e) => (error_text(e, &version), 1),
    };
    // A runtime that does not read its answer gets none.
    let _ = writeln!(io::stdout(), "{text}");
    exit
}

fn error_text(e: CniError, version: &str) -> String {
    let e = if e.version.is_empty() { e.in_version(version) } else { e };
    json!(e).to_string()
}

fn run(began: Instant, version: &mut String) -> Result<Option<Value>, CniError> {
    let command = command()?;
    let stdin = read_stdin(began + STDIN_PATIENCE);
    if command == Command::Version {
        return stdin.and_then(|bytes| versions(&bytes)).map(Some);
    }
    let mut request = Request {
        wire: wire::WIRE_VERSION,
        command,
        container_id: var("CNI_CONTAINERID")?,
        netns: var("CNI_NETNS")?,
        ifname: var("CNI_IFNAME")?,
        args: var("CNI_ARGS")?,
        budget_ms: 0,
        config: decode(&stdin?)?,
    };
    if let Some(v) = request.config.get("cniVersion").and_then(Value::as_str) {
        wire::clip(v).clone_into(version);
    }
    wire::check_version(&request.config, command)?;
    wire::check_environment(&request)?;
    if command == Command::Add {
        refuse_own_namespace(&request.netns)?;
    }
    let conf = Conf::read(&request.config)?;

    let patience = match command {
        Command::Del => conf.timeout.min(DEL_PATIENCE),
        Command::Status => conf.timeout.min(STATUS_PATIENCE),
        _ => conf.timeout,
    };
    let left = patience.saturating_sub(began.elapsed());
    request.budget_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    let entry = spool::Entry::of(&request);
    let answer = ask_agent(&conf.socket, &request, began + patience);
    match (command, answer) {
        (_, Ok(Response::Done(result))) => Ok(result),
        (Command::Del, Err(why)) => spool_release(conf.spool, entry, &why),
        (Command::Del, Ok(Response::Failed(e))) if e.code == code::TRY_AGAIN => {
            spool_release(conf.spool, entry, &e.to_string())
        }
        (_, Ok(Response::Failed(e))) => Err(e),
        (_, Err(why)) => Err(agent_away(command, &why)),
    }
}

fn command() -> Result<Command, CniError> {
    let name = var("CNI_COMMAND")?;
    Command::parse(&name).ok_or_else(|| {
        let known: Vec<_> = Command::ALL.iter().map(|c| c.name()).collect();
        let why = if name.is_empty() { "is missing".into() } else { format!("is {:?}", wire::clip(&name)) };
        let remedy = format!("CNI_COMMAND {why}; a container runtime sets it to one of {}", known.join(", "));
        CniError::new(code::INVALID_ENVIRONMENT, "invalid environment variables: CNI_COMMAND").remedy(remedy)
    })
}

fn var(name: &str) -> Result<String, CniError> {
    match env::var(name) {
        Ok(value) => Ok(value),
        Err(env::VarError::NotPresent) => Ok(String::new()),
        Err(env::VarError::NotUnicode(_)) => {
            let msg = format!("invalid environment variables: {name}");
            Err(CniError::new(code::INVALID_ENVIRONMENT, msg).remedy(format!("{name} is not UTF-8")))
        }
    }
}

fn read_stdin(deadline: Instant) -> Result<Vec<u8>, CniError> {
    let mut bytes = Vec::with_capacity(4096);
    let limit = wire::MAX_FRAME as u64;
    // std's own reader keeps a buffer, of which poll(2) knows nothing.
    let stdin = io::stdin().as_fd().try_clone_to_owned().map(File::from);
    let read = stdin.and_then(|inner| Patient { inner, deadline }.take(limit + 1).read_to_end(&mut bytes));
    match read {
        Err(e) if e.kind() == io::ErrorKind::TimedOut => {
            Err(CniError::new(code::IO, "standard input did not end in time"))
        }
        Err(e) => Err(CniError::new(code::IO, "the network configuration cannot be read").remedy(e.to_string())),
        Ok(_) if bytes.len() as u64 > limit => {
            Err(CniError::new(code::IO, format!("the network configuration is longer than {limit} bytes")))
        }
        Ok(_) => Ok(bytes),
    }
}

fn decode(bytes: &[u8]) -> Result<Value, CniError> {
    match serde_json::from_slice(bytes) {
        Ok(config @ Value::Object(_)) => Ok(config),
        Ok(_) => Err(CniError::new(code::DECODE, "the network configuration is not a JSON object")),
        Err(e) => Err(CniError::new(code::DECODE, "the network configuration is not JSON").remedy(e.to_string())),
    }
}

/// VERSION names the version it was asked in; an empty input is fine.
fn versions(stdin: &[u8]) -> Result<Value, CniError> {
    let asked = if stdin.trim_ascii().is_empty() { json!({}) } else { decode(stdin)? };
    let newest = wire::SUPPORTED[wire::SUPPORTED.len() - 1];
    let version = asked.get("cniVersion").and_then(Value::as_str).filter(|v| !v.is_empty()).unwrap_or(newest);
    Ok(json!({ "cniVersion": wire::clip(version), "supportedVersions": wire::SUPPORTED }))
}

/// Wiring the runtime's own namespace as if it were a pod's would cut the node
/// off. A namespace that cannot be looked at is the agent's to judge.
fn refuse_own_namespace(netns: &str) -> Result<(), CniError> {
    let id = |p: &str| std::fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    match (id("/proc/self/ns/net"), id(netns)) {
        (Some(own), Some(pod)) if own == pod => {
            let msg = "invalid environment variables: CNI_NETNS";
            let remedy = format!("CNI_NETNS {netns} is the runtime's own network namespace, not a container's");
            Err(CniError::new(code::INVALID_ENVIRONMENT, msg).remedy(remedy))
        }
        _ => Ok(()),
    }
}

/// What the shim itself takes from the network configuration.
struct Conf {
    socket: PathBuf,
    spool: PathBuf,
    timeout: Duration,
}

impl Conf {
    fn read(config: &Value) -> Result<Self, CniError> {
        let path = |key: &str, default: &str| match config.get(key) {
            None => Ok(PathBuf::from(default)),
            Some(Value::String(s)) if s.starts_with('/') && !s.contains('\0') => Ok(PathBuf::from(s)),
            Some(other) => Err(bad_key(key, other, "an absolute path")),
        };
        let timeout = match config.get("timeoutSeconds") {
            None => DEFAULT_TIMEOUT,
            Some(v) => match v.as_u64() {
                Some(s @ 1..=MAX_TIMEOUT_SECONDS) => Duration::from_secs(s),
                _ => return Err(bad_key("timeoutSeconds", v, &format!("a number from 1 to {MAX_TIMEOUT_SECONDS}"))),
            },
        };
        Ok(Self {
            socket: path("socket", wire::DEFAULT_SOCKET)?,
            spool: path("spoolDir", wire::DEFAULT_SPOOL)?,
            timeout,
        })
    }
}

fn bad_key(key: &str, value: &Value, want: &str) -> CniError {
    let msg = format!("invalid network configuration: {key} is {}", wire::brief(value));
    CniError::new(code::INVALID_CONFIG, msg).remedy(format!("{key} is {want}"))
}

/// The agent's answer, or in words why there is none.
fn ask_agent(socket: &Path, request: &Request, deadline: Instant) -> Result<Response, String> {
    let asked = Conversation::connect(socket, deadline)
        .map_err(|e| format!("connect: {e}"))
        .and_then(|mut stream| wire::converse(&mut stream, request).map_err(|e| e.to_string()));
    asked.map_err(|why| {
        let why = if Instant::now() < deadline { why } else { format!("no answer within {} ms", request.budget_ms) };
        format!("{}: {why}", socket.display())
    })
}

fn agent_away(command: Command, why: &str) -> CniError {
    let remedy = format!("{why}; see whether the fairway agent on this node runs, the call may be repeated");
    match command {
        Command::Status => CniError::new(code::NOT_AVAILABLE, "the fairway agent is not available").remedy(remedy),
        _ => CniError::new(code::TRY_AGAIN, "the fairway agent does not answer, try again later").remedy(remedy),
    }
}

fn spool_release(dir: PathBuf, entry: spool::Entry, why: &str) -> Result<Option<Value>, CniError> {
    let name = dir.display().to_string();
    let stored = within(DISK_PATIENCE, move || spool::store(Path::new(&dir), &entry));
    let failed = match stored {
        Some(Ok(())) => return Ok(None),
        Some(Err(e)) => e.to_string(),
        None => "the disk does not answer".to_owned(),
    };
    let remedy = format!("{why}; and the release cannot be spooled in {name}: {failed}; free or repair the disk");
    Err(CniError::new(code::TRY_AGAIN, "the fairway agent does not answer, try again later").remedy(remedy))
}

/// Run what may block beside us, and wait no longer than `patience`: the
/// process ends with us, whatever became of it.
fn within<T: Send + 'static>(patience: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (tell, result) = mpsc::sync_channel(1);
    let beside = thread::Builder::new().stack_size(256 << 10).spawn(move || {
        let _ = tell.send(work());
    });
    beside.ok()?;
    result.recv_timeout(patience).ok()
}
