//! A pod's sandbox: its namespace and its attachment to the network.
//!
//! Invariant: a note with the namespace's path is on disk before the namespace
//! is made and until it is removed, so `lab down` finds it after a crash.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::cni::{Attachment, CniError, Runner, Timed};
use super::conf::{ConfError, Identity, RuntimeConfig, pod_ips};
use super::spec::PodRef;
use crate::lab::vpc::link::{LinkError, Links};
use crate::lab::vpc::ns::{self, NETNS_DIR, Netns, NsError};
use crate::lab::vpc::os;

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("failed to setup network for sandbox: {0}")]
    Cni(#[from] CniError),
    #[error("failed to setup network for sandbox: {0}")]
    Conf(#[from] ConfError),
    #[error(transparent)]
    Ns(#[from] NsError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("sandbox: {0}")]
    Io(#[from] io::Error),
    #[error("plugin result has no address for the pod")]
    NoAddress,
}

/// A sandbox on the network.
#[derive(Debug)]
pub struct Sandbox {
    pub id: String,
    pub ips: Vec<IpAddr>,
    /// How long namespace and ADD took.
    pub made_in: (Duration, Duration),
    attachment: Attachment,
    ns_path: PathBuf,
    note: PathBuf,
    /// `None` once the namespace was taken away without DEL.
    ns: Option<Netns>,
}

/// Sandboxes that exist for the plugins: from before ADD until DEL succeeded.
/// GC must name all of them.
pub type Live = Mutex<BTreeSet<String>>;

/// What a new sandbox is for.
pub struct Wanted<'a> {
    pub pod: &'a PodRef,
    pub runtime: RuntimeConfig,
    pub notes: &'a std::path::Path,
    pub live: &'a Live,
}

/// A sandbox that could not be made; what could not be undone is to be
/// disconnected later.
#[derive(Debug)]
pub struct Failed {
    pub error: SandboxError,
    pub leftover: Option<Box<Sandbox>>,
}

impl<E: Into<SandboxError>> From<E> for Failed {
    fn from(e: E) -> Self {
        Self { error: e.into(), leftover: None }
    }
}

impl Sandbox {
    /// Namespace, then ADD. A failed ADD is followed by DEL for the same
    /// sandbox, and the next try is a new one, as with containerd.
    pub async fn create(runner: &Runner, wanted: Wanted<'_>, log: &mut Vec<Timed>) -> Result<Self, Failed> {
        let begin = Instant::now();
        let list = runner.load()?;
        let id = hex::encode(rand::random::<[u8; 32]>());
        let name = format!("cni-{}", uuid());
        let ns_path = PathBuf::from(NETNS_DIR).join(&name);
        let note = wanted.notes.join(&id);
        fs::write(&note, format!("{}\n", ns_path.display()))?;
        let ns = match Netns::create(&name) {
            Ok(ns) => ns,
            Err(e) => {
                let _ = fs::remove_file(&note);
                return Err(e.into());
            }
        };
        let who = Identity {
            container_id: id.clone(),
            netns: ns_path.display().to_string(),
            pod_namespace: wanted.pod.namespace.clone(),
            pod_name: wanted.pod.name.clone(),
            pod_uid: wanted.pod.uid.clone(),
        };
        let attachment = Attachment { list, who, runtime: wanted.runtime, result: None };
        let ns_took = begin.elapsed();
        wanted.live.lock().insert(id.clone());
        let mut sandbox =
            Self { id, ips: Vec::new(), made_in: (ns_took, Duration::ZERO), attachment, ns_path, note, ns: Some(ns) };
        let begin = Instant::now();
        match sandbox.connect(runner, log).await {
            Ok(()) => {
                sandbox.made_in.1 = begin.elapsed();
                Ok(sandbox)
            }
            Err(error) => match sandbox.disconnect(runner, wanted.live, log).await {
                Ok(()) => {
                    sandbox.remove()?;
                    Err(Failed { error, leftover: None })
                }
                Err(_) => Err(Failed { error, leftover: Some(Box::new(sandbox)) }),
            },
        }
    }

    async fn connect(&mut self, runner: &Runner, log: &mut Vec<Timed>) -> Result<(), SandboxError> {
        if let Some(ns) = &self.ns {
            os::loopback(&Links::open(ns).await?).await?;
        }
        let result = runner.add(&mut self.attachment, log).await?;
        self.ips = pod_ips(&result);
        if self.ips.is_empty() { Err(SandboxError::NoAddress) } else { Ok(()) }
    }

    /// The namespace, to open sockets in. Do not keep it.
    pub fn ns(&self) -> Option<&Netns> {
        self.ns.as_ref()
    }

    pub fn ns_path(&self) -> &std::path::Path {
        &self.ns_path
    }

    /// The plugin chain's result.
    pub fn result(&self) -> Option<&serde_json::Value> {
        self.attachment.result.as_ref()
    }

    pub async fn check(&self, runner: &Runner, log: &mut Vec<Timed>) -> Result<(), CniError> {
        runner.check(&self.attachment, log).await
    }

    /// DEL. May be repeated.
    pub async fn disconnect(&mut self, runner: &Runner, live: &Live, log: &mut Vec<Timed>) -> Result<(), CniError> {
        if self.ns.is_none() {
            self.attachment.who.netns.clear();
        }
        runner.del(&self.attachment, log).await?;
        live.lock().remove(&self.id);
        Ok(())
    }

    /// The namespace dies with all that is in it, without a DEL.
    pub fn lose_namespace(&mut self) -> io::Result<()> {
        self.ns = None;
        ns::remove(&self.ns_path)
    }

    /// After DEL: the namespace and the note go.
    pub fn remove(mut self) -> io::Result<()> {
        self.lose_namespace()?;
        fs::remove_file(&self.note)
    }
}

/// A random UUID, as containerd names namespaces.
fn uuid() -> String {
    let mut raw: [u8; 16] = rand::random();
    raw[6] = raw[6] & 0x0f | 0x40;
    raw[8] = raw[8] & 0x3f | 0x80;
    let hex = hex::encode(raw);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
