//! The envelope between the CNI shim and the agent, and what both check.
//!
//! Owner: this file is compiled into the agent (`fairway::cni::wire`) and into
//! the shim (`src/bin/fairway-cni.rs` includes it by path), so it uses std,
//! serde and serde_json only.
//!
//! One conversation is one connection: a frame there, a frame back. A frame is
//! a big-endian `u32` length and that many bytes of JSON. Lengths are bounded
//! before anything is allocated.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of this envelope. Shim and agent are installed from one image, but
/// for a moment during an upgrade they differ.
pub const WIRE_VERSION: u32 = 1;
/// Longest frame, and longest standard input of the shim. A pod's annotations
/// may be 256 KiB, escaped in JSON up to six times that, and come twice.
pub const MAX_FRAME: usize = 4 << 20;
/// Where the agent listens unless the network configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/fairway/cni.sock";
/// Where the shim leaves releases that the agent could not take.
pub const DEFAULT_SPOOL: &str = "/var/lib/fairway/spool";
/// CNI versions spoken, oldest first.
pub const SUPPORTED: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longest container id; it becomes a file name in the spool.
const MAX_CONTAINER_ID: usize = 200;
/// `IFNAMSIZ` less the terminating zero.
const MAX_IFNAME: usize = 15;
const MAX_PATH: usize = 4096;
const MAX_ARGS: usize = 64 << 10;

/// Well-known error codes of the CNI specification; from 100 on, ours.
pub mod code {
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    pub const UNSUPPORTED_FIELD: u32 = 2;
    pub const UNKNOWN_CONTAINER: u32 = 3;
    pub const INVALID_ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    pub const DECODE: u32 = 6;
    pub const INVALID_CONFIG: u32 = 7;
    pub const TRY_AGAIN: u32 = 11;
    pub const NOT_AVAILABLE: u32 = 50;
    pub const LIMITED_CONNECTIVITY: u32 = 51;
    /// CHECK found the kernel different from the lease.
    pub const CHECK_FAILED: u32 = 100;
    /// The node or the cloud has no address to give.
    pub const NO_ADDRESS: u32 = 101;
    /// The kernel refused to wire the namespace.
    pub const WIRING_FAILED: u32 = 102;
}

/// An error as the CNI specification prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    #[serde(rename = "cniVersion", default)]
    pub version: String,
    pub code: u32,
    pub msg: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { version: String::new(), code, msg: msg.into(), details: String::new() }
    }
    /// What the operator can do about it.
    pub fn remedy(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }
    /// In the version that the caller speaks; the newest when that is not known.
    pub fn in_version(mut self, version: &str) -> Self {
        self.version = if version.is_empty() { newest() } else { version }.to_owned();
        self
    }
}

impl std::fmt::Display for CniError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.msg)?;
        if !self.details.is_empty() {
            write!(f, ": {}", self.details)?;
        }
        Ok(())
    }
}

fn newest() -> &'static str {
    SUPPORTED[SUPPORTED.len() - 1]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    pub const ALL: [Command; 6] =
        [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status, Command::Version];

    pub fn name(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
            Command::Version => "VERSION",
        }
    }
    pub fn parse(s: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == s)
    }
    /// The first CNI version that knows the command.
    fn since(self) -> &'static str {
        match self {
            Command::Add | Command::Del | Command::Version => SUPPORTED[0],
            Command::Check => "0.4.0",
            Command::Gc | Command::Status => "1.1.0",
        }
    }
}

/// One CNI call, as the shim hands it to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub wire: u32,
    pub command: Command,
    #[serde(default)]
    pub container_id: String,
    #[serde(default)]
    pub netns: String,
    #[serde(default)]
    pub ifname: String,
    /// `CNI_ARGS`, unparsed.
    #[serde(default)]
    pub args: String,
    /// How long the shim will wait for the answer.
    pub budget_ms: u64,
    /// The network configuration from standard input.
    #[serde(default)]
    pub config: Value,
}

/// The agent's answer: what the shim prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Success; ADD has a result, the others print nothing.
    Done(Option<Value>),
    Failed(CniError),
}

/// The environment is checked by both sides: the shim answers without an agent,
/// and the agent trusts nobody.
pub fn check_environment(r: &Request) -> Result<(), CniError> {
    let mut bad: Vec<(&str, String)> = Vec::new();
    let attachment = matches!(r.command, Command::Add | Command::Del | Command::Check);
    if attachment {
        if let Some(why) = container_id_fault(&r.container_id) {
            bad.push(("CNI_CONTAINERID", why));
        }
        if let Some(why) = ifname_fault(&r.ifname) {
            bad.push(("CNI_IFNAME", why));
        }
        // The namespace may be gone when DEL comes.
        let wanted = r.command != Command::Del;
        if let Some(why) = netns_fault(&r.netns, wanted) {
            bad.push(("CNI_NETNS", why));
        }
        if r.args.len() > MAX_ARGS {
            bad.push(("CNI_ARGS", format!("is longer than {MAX_ARGS} bytes")));
        }
    }
    if bad.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = bad.iter().map(|(name, _)| *name).collect();
    let whys: Vec<String> = bad.iter().map(|(name, why)| format!("{name} {why}")).collect();
    let msg = format!("invalid environment variables: {}", names.join(", "));
    Err(CniError::new(code::INVALID_ENVIRONMENT, msg).remedy(whys.join("; ")))
}

pub fn container_id_fault(id: &str) -> Option<String> {
    let mut chars = id.chars();
    let well_formed = chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    if id.is_empty() {
        Some("is missing".into())
    } else if id.len() > MAX_CONTAINER_ID {
        Some(format!("is longer than {MAX_CONTAINER_ID} characters"))
    } else if !well_formed {
        Some("may hold letters, digits, '_', '.' and '-', and starts with a letter or digit".into())
    } else {
        None
    }
}

pub fn ifname_fault(name: &str) -> Option<String> {
    if name.is_empty() {
        Some("is missing".into())
    } else if name.len() > MAX_IFNAME {
        Some(format!("is longer than {MAX_IFNAME} characters"))
    } else if name == "." || name == ".." {
        Some("is not a link name".into())
    } else if name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        Some("holds a slash, a colon, a space or a control character".into())
    } else {
        None
    }
}

fn netns_fault(path: &str, wanted: bool) -> Option<String> {
    if path.is_empty() {
        wanted.then(|| "is missing".into())
    } else if !path.starts_with('/') || path.len() > MAX_PATH || path.contains('\0') {
        Some("is not an absolute path".into())
    } else {
        None
    }
}

/// The version in a network configuration, known to us and to the command.
pub fn check_version(config: &Value, command: Command) -> Result<&str, CniError> {
    let version = match config.get("cniVersion") {
        None => "",
        Some(Value::String(s)) => s,
        Some(other) => {
            let msg = format!("cniVersion is not a string but {}", brief(other));
            return Err(CniError::new(code::DECODE, msg));
        }
    };
    let at = |v: &str| SUPPORTED.iter().position(|s| *s == v);
    let Some(have) = at(version) else {
        let msg = "incompatible CNI version".to_owned();
        let remedy = format!(
            "the network configuration says {:?}, this plugin speaks {}; correct cniVersion in the conflist",
            clip(version),
            SUPPORTED.join(", ")
        );
        return Err(CniError::new(code::INCOMPATIBLE_VERSION, msg).remedy(remedy));
    };
    if at(command.since()).is_some_and(|first| have < first) {
        let msg = format!("incompatible CNI version: {} needs {} or newer", command.name(), command.since());
        let remedy = format!("the network configuration says {version:?}");
        return Err(CniError::new(code::INCOMPATIBLE_VERSION, msg).remedy(remedy).in_version(version));
    }
    Ok(SUPPORTED[have])
}

/// A value for an error message: never longer than a line.
pub fn brief(value: &Value) -> String {
    clip(&value.to_string()).to_owned()
}

pub fn clip(s: &str) -> &str {
    let mut end = s.len().min(120);
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    &s[..end]
}

/// A frame ready to be written.
pub fn frame<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, value)?;
    let body = out.len() - 4;
    if body > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{body} bytes do not fit in a frame")));
    }
    out[..4].copy_from_slice(&(body as u32).to_be_bytes());
    Ok(out)
}

/// The length that a frame's head announces, when it is acceptable.
pub fn body_len(head: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_be_bytes(head) as usize;
    if len == 0 || len > MAX_FRAME {
        let msg = format!("a frame of {len} bytes is announced, 1 to {MAX_FRAME} are accepted");
        return Err(io::Error::new(io::ErrorKind::InvalidData, msg));
    }
    Ok(len)
}

/// The shim's side of a conversation, over blocking streams.
pub fn converse(stream: &mut (impl Read + Write), request: &Request) -> io::Result<Response> {
    let sent = stream.write_all(&frame(request)?).and_then(|()| stream.flush());
    let received = receive(stream);
    // An agent that refuses early closes before it has read everything: its
    // answer says more than the broken pipe.
    match (sent, received) {
        (_, Ok(response)) => Ok(response),
        (Err(e), Err(_)) => Err(e),
        (Ok(()), Err(e)) => Err(e),
    }
}

fn receive(stream: &mut impl Read) -> io::Result<Response> {
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let len = body_len(head)?;
    // Room for an ordinary answer at once; what is announced beyond it is made
    // room for as it comes.
    let mut body = Vec::with_capacity(len.min(4096) + 1);
    stream.by_ref().take(len as u64).read_to_end(&mut body)?;
    if body.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pipe(io::Cursor<Vec<u8>>);
    impl Read for Pipe {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.0.read(out)
        }
    }
    impl Write for Pipe {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn request() -> Request {
        Request {
            wire: WIRE_VERSION,
            command: Command::Gc,
            container_id: String::new(),
            netns: String::new(),
            ifname: String::new(),
            args: String::new(),
            budget_ms: 5,
            config: Value::Null,
        }
    }

    #[test]
    fn an_answer_given_before_the_request_was_read_is_still_seen() {
        let early = Response::Failed(CniError::new(code::TRY_AGAIN, "busy"));
        let mut pipe = Pipe(io::Cursor::new(frame(&early).unwrap()));
        assert_eq!(converse(&mut pipe, &request()).unwrap(), early);
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        assert!(body_len([0; 4]).is_err());
        assert!(body_len([0xff; 4]).is_err());
        assert_eq!(body_len((MAX_FRAME as u32).to_be_bytes()).unwrap(), MAX_FRAME);
    }

    #[test]
    fn a_frame_cut_short_is_an_error() {
        let whole = frame(&Response::Done(None)).unwrap();
        for cut in 0..whole.len() {
            let mut pipe = Pipe(io::Cursor::new(whole[..cut].to_vec()));
            assert!(converse(&mut pipe, &request()).is_err());
        }
    }
}
