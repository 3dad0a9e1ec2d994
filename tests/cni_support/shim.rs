//! Runs the real shim as a container runtime would.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The shim that ships; the plain one where the build had no static C library.
pub const PROGRAM: &str =
    if env!("FAIRWAY_SHIM").is_empty() { env!("CARGO_BIN_EXE_fairway-cni") } else { env!("FAIRWAY_SHIM") };

/// What a runtime sees of a call.
#[derive(Debug)]
pub struct Outcome {
    pub exit: i32,
    pub stdout: String,
    pub took: Duration,
}

impl Outcome {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in {:?}", self.stdout))
    }
    /// The error code on stdout; such an answer exits non-zero.
    #[track_caller]
    pub fn code(&self) -> u64 {
        let error = self.json();
        assert_ne!(self.exit, 0, "{error}");
        assert!(error["msg"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
        assert!(error["cniVersion"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
        error["code"].as_u64().unwrap()
    }
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.exit, 0, "{}", self.stdout);
        self
    }
}

#[derive(Clone, Debug)]
pub struct Call {
    pub env: Vec<(String, String)>,
    pub stdin: Vec<u8>,
}

impl Call {
    /// A call for a pod named after its sandbox, in a namespace that is not ours.
    pub fn new(command: &str, sandbox: &str, config: &Value) -> Self {
        let pod =
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-{sandbox};K8S_POD_UID=uid-{sandbox}");
        let env = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", sandbox),
            ("CNI_NETNS", "/run/no-such-namespace"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
            ("CNI_ARGS", &pod),
        ];
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Self { env, stdin: config.to_string().into_bytes() }
    }
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.env.retain(|(k, _)| k != key);
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }
    pub fn without(mut self, key: &str) -> Self {
        self.env.retain(|(k, _)| k != key);
        self
    }
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }
    pub fn spawn(&self) -> Child {
        let mut command = Command::new(PROGRAM);
        command.env_clear().envs(self.env.iter().map(|(k, v)| (k, v)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let bytes = self.stdin.clone();
        // The shim may refuse before it has read everything.
        std::thread::spawn(move || stdin.write_all(&bytes));
        child
    }
    pub fn run(&self) -> Outcome {
        let began = Instant::now();
        let out = self.spawn().wait_with_output().unwrap();
        let stdout = String::from_utf8(out.stdout).unwrap();
        Outcome { exit: out.status.code().unwrap_or(-1), stdout, took: began.elapsed() }
    }
}

/// A network configuration that leads to a folder of this test.
pub fn conf(version: &str, dir: &Path) -> Value {
    json!({
        "cniVersion": version,
        "name": "fairway",
        "type": "fairway-cni",
        "socket": dir.join("cni.sock"),
        "spoolDir": dir.join("spool"),
        "timeoutSeconds": 10,
    })
}
