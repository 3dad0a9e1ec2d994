//! CNI calls as a runtime makes them: a process per call, timed from outside.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::bench::stats::quantile;
use crate::lab::vpc::ns::{NsError, OwnedNetns};

/// A plugin and the node it runs on.
#[derive(Clone, Debug)]
pub struct Subject {
    pub name: &'static str,
    /// The node's network namespace.
    pub node: PathBuf,
    pub plugin: PathBuf,
    /// The network configuration, as the runtime would pass it on stdin.
    pub config: String,
}

/// One pod sandbox: a namespace and the identity the runtime gives it.
#[derive(Clone, Debug)]
pub struct Sandbox {
    pub id: String,
    pub netns: PathBuf,
    pub pod: String,
}

/// How long each call of a batch took, and the whole batch.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub calls: Vec<Duration>,
    pub wall: Duration,
}

impl Batch {
    pub fn milliseconds(&self, q: f64) -> f64 {
        let mut values: Vec<f64> = self.calls.iter().map(|d| d.as_secs_f64() * 1e3).collect();
        quantile(&mut values, q).unwrap_or(f64::NAN)
    }
    /// One after the other.
    pub fn extend(&mut self, by: Batch) {
        self.calls.extend(by.calls);
        self.wall += by.wall;
    }
    pub fn per_second(&self) -> f64 {
        self.calls.len() as f64 / self.wall.as_secs_f64()
    }
}

/// Run `command` for every sandbox, `parallel` at a time.
pub fn batch(subject: &Subject, command: &'static str, sandboxes: &[Sandbox], parallel: usize) -> io::Result<Batch> {
    let next = AtomicUsize::new(0);
    let took = Mutex::new(Vec::with_capacity(sandboxes.len()));
    let began = Instant::now();
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..parallel.max(1))
            .map(|_| {
                scope.spawn(|| {
                    // Plugins run where the runtime does: in the node's namespace.
                    enter(&subject.node)?;
                    while let Some(sandbox) = sandboxes.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let once = Instant::now();
                        call(subject, command, sandbox)?;
                        let once = once.elapsed();
                        took.lock().unwrap_or_else(|broken| broken.into_inner()).push(once);
                    }
                    Ok(())
                })
            })
            .collect();
        lanes.into_iter().try_for_each(|lane| lane.join().unwrap_or_else(|_| Err(io::Error::other("a lane panicked"))))
    })?;
    let wall = began.elapsed();
    Ok(Batch { calls: took.into_inner().unwrap_or_else(|broken| broken.into_inner()), wall })
}

fn enter(namespace: &Path) -> io::Result<()> {
    let file = std::fs::File::open(namespace)?;
    Ok(nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?)
}

fn call(subject: &Subject, command: &str, sandbox: &Sandbox) -> io::Result<()> {
    let args = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={}",
        sandbox.pod, sandbox.id
    );
    let path = subject.plugin.parent().unwrap_or(Path::new("/opt/cni/bin"));
    let mut child = Command::new(&subject.plugin)
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &sandbox.id)
        .env("CNI_NETNS", &sandbox.netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", args)
        .env("CNI_PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(subject.config.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{} {command} for {}: {}{}",
        subject.name,
        sandbox.pod,
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

/// Fresh namespaces, removed when dropped.
pub struct Sandboxes {
    namespaces: Vec<OwnedNetns>,
}

/// The name of the pod in sandbox number `n`.
pub fn pod_name(n: usize) -> String {
    format!("bench-{n}")
}

impl Sandboxes {
    /// Names start with `prefix`, which must be unique on this machine.
    pub fn create(prefix: &str, count: usize) -> Result<Self, NsError> {
        let namespaces = (0..count).map(|n| OwnedNetns::create(&format!("{prefix}{n}"))).collect::<Result<_, _>>()?;
        Ok(Self { namespaces })
    }

    /// The first `count`, under ids that nobody has used if `batch` is new.
    pub fn of(&self, batch: &str, count: usize) -> Vec<Sandbox> {
        let namespaces = self.namespaces.iter().take(count).enumerate();
        namespaces
            .map(|(n, ns)| Sandbox { id: format!("{batch}x{n:04}"), netns: ns.path().to_owned(), pod: pod_name(n) })
            .collect()
    }
}

/// The reference plugins' configurations, with `host-local` addresses kept in
/// `data`.
pub fn reference(plugin: &'static str, dir: &Path, node: &Path, data: &Path) -> Subject {
    let mut config = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": plugin,
        "type": plugin,
        "ipMasq": false,
        "ipam": {
            "type": "host-local",
            "dataDir": data,
            "ranges": [[{ "subnet": if plugin == "ptp" { "10.250.0.0/16" } else { "10.251.0.0/16" } }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    });
    if plugin == "bridge" {
        config["bridge"] = "cnibench0".into();
        config["isGateway"] = true.into();
    }
    Subject { name: plugin, node: node.to_owned(), plugin: dir.join(plugin), config: config.to_string() }
}
