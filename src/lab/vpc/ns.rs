//! Network namespaces by name, as `ip netns` shows them.
//!
//! A closure runs in a namespace on a plain thread of its own that ends with
//! it, so no thread that others use is ever left in the wrong namespace. What
//! it opens (sockets, files under /proc/sys) stays in that namespace.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Where named namespaces are mounted.
pub const NETNS_DIR: &str = "/var/run/netns";

#[derive(Debug, thiserror::Error)]
pub enum NsError {
    #[error("network namespace {name}: {step}: {cause}{}", remedy(.cause))]
    Io { name: String, step: &'static str, cause: io::Error },
    #[error("network namespace {name}: the thread in it panicked")]
    Panicked { name: String },
}

fn remedy(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::PermissionDenied => "; run as root (CAP_SYS_ADMIN and CAP_NET_ADMIN)",
        _ => "",
    }
}

/// A namespace held open. Clones share the handle; dropping it removes nothing.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    file: Arc<File>,
}

impl Netns {
    /// Make a namespace at `/var/run/netns/<name>` with loopback down, as
    /// `ip netns add` and containerd do. Fails when the name is taken.
    pub fn create(name: &str) -> Result<Self, NsError> {
        let fail = |step| move |cause: io::Error| NsError::Io { name: name.to_owned(), step, cause };
        let path = Path::new(NETNS_DIR).join(name);
        fs::create_dir_all(NETNS_DIR).map_err(fail("create folder"))?;
        File::create_new(&path).map_err(fail("create mount point"))?;
        let target = path.clone();
        let made = std::thread::Builder::new()
            .name("netns-create".into())
            .spawn(move || -> io::Result<()> {
                unshare(CloneFlags::CLONE_NEWNET)?;
                mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
                Ok(())
            })
            .map_err(fail("start thread"))?
            .join()
            .map_err(|_| NsError::Panicked { name: name.to_owned() })?;
        if let Err(cause) = made {
            let _ = fs::remove_file(&path);
            return Err(fail("unshare and mount")(cause));
        }
        Self::open(&path)
    }

    /// Open an existing namespace by its path.
    pub fn open(path: &Path) -> Result<Self, NsError> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let file = File::open(path).map_err(|cause| NsError::Io { name: name.clone(), step: "open", cause })?;
        Ok(Self { name, path: path.to_owned(), file: Arc::new(file) })
    }

    /// Open an existing namespace by its name below `/var/run/netns`.
    pub fn named(name: &str) -> Result<Self, NsError> {
        Self::open(&Path::new(NETNS_DIR).join(name))
    }

    /// The namespace this process runs in.
    pub fn current() -> Result<Self, NsError> {
        Self::open(Path::new("/proc/self/ns/net"))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The namespace's identity: device and inode.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let meta = self.file.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Run `f` in the namespace and wait for it.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, NsError> {
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name(format!("in-{}", self.name))
                .spawn_scoped(scope, || self.enter().map(|()| f()))
                .map_err(|e| self.io("start thread")(e))?
                .join()
                .map_err(|_| NsError::Panicked { name: self.name.clone() })?
                .map_err(self.io("enter"))
        })
    }

    /// As [`Self::run`], without blocking the calling task.
    pub async fn run_async<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<T, NsError> {
        let (tell, done) = tokio::sync::oneshot::channel();
        let here = self.clone();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name(format!("in-{}", self.name))
            .spawn(move || {
                // Sockets of tokio opened in `f` register with this runtime.
                let _guard = runtime.enter();
                let _ = tell.send(here.enter().map(|()| f()));
            })
            .map_err(self.io("start thread"))?;
        done.await.map_err(|_| NsError::Panicked { name: self.name.clone() })?.map_err(self.io("enter"))
    }

    /// Put the calling thread into the namespace, for good: only for threads
    /// made for it.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&*self.file, CloneFlags::CLONE_NEWNET)?)
    }

    /// Write sysctls of the namespace, named as below `/proc/sys/`.
    pub fn sysctl(&self, values: &[(&str, &str)]) -> Result<(), NsError> {
        self.run(|| {
            for (key, value) in values {
                fs::write(Path::new("/proc/sys").join(key), value)
                    .map_err(|e| io::Error::new(e.kind(), format!("{key}={value}: {e}")))?;
            }
            Ok(())
        })?
        .map_err(self.io("sysctl"))
    }

    fn io(&self, step: &'static str) -> impl FnOnce(io::Error) -> NsError + '_ {
        move |cause| NsError::Io { name: self.name.clone(), step, cause }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that stays in a namespace: for starting children there, which die
/// with the thread that started them.
#[derive(Clone, Debug)]
pub struct NsThread {
    name: String,
    jobs: std::sync::mpsc::Sender<Job>,
}

impl NsThread {
    /// Start the thread; it ends when the last clone is dropped. Must be called
    /// on a tokio runtime, which the jobs can use.
    pub fn start(ns: &Netns) -> Result<Self, NsError> {
        let (jobs, inbox) = std::sync::mpsc::channel::<Job>();
        let (tell, entered) = std::sync::mpsc::channel();
        let here = ns.clone();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name(format!("at-{}", ns.name))
            .spawn(move || {
                let _guard = runtime.enter();
                let _ = tell.send(here.enter());
                drop(here);
                while let Ok(job) = inbox.recv() {
                    job();
                }
            })
            .map_err(ns.io("start thread"))?;
        match entered.recv() {
            Ok(Ok(())) => Ok(Self { name: ns.name.clone(), jobs }),
            Ok(Err(e)) => Err(ns.io("enter")(e)),
            Err(_) => Err(NsError::Panicked { name: ns.name.clone() }),
        }
    }

    /// Run `f` on the thread, after what was asked before.
    pub async fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<T, NsError> {
        let (tell, done) = tokio::sync::oneshot::channel();
        let gone = || NsError::Panicked { name: self.name.clone() };
        self.jobs.send(Box::new(move || drop(tell.send(f())))).map_err(|_| gone())?;
        done.await.map_err(|_| gone())
    }
}

/// A namespace that is removed when its owner lets go of it.
#[derive(Debug)]
pub struct OwnedNetns(Netns);

impl OwnedNetns {
    pub fn create(name: &str) -> Result<Self, NsError> {
        Netns::create(name).map(Self)
    }
}

impl std::ops::Deref for OwnedNetns {
    type Target = Netns;
    fn deref(&self) -> &Netns {
        &self.0
    }
}

impl Drop for OwnedNetns {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.0.path) {
            tracing::warn!(target: "lab", "removing namespace {}: {e}", self.0.name);
        }
    }
}

/// Take a namespace's name away; the kernel ends it when nothing in it is open.
/// One that is gone is success.
pub fn remove(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(e) => return Err(e.into()),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Named namespaces whose name starts with `prefix`.
pub fn list(prefix: &str) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(NETNS_DIR) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
