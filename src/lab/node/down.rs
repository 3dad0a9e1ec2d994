//! `fairway lab down`: finds and removes everything of a lab, by name.
//!
//! Works after a crash of the lab and as often as one likes: nothing here needs
//! the lab's memory. Order: the lab process, agents (cgroups), whoever else sits
//! in the lab's namespaces, mounts, namespaces of pods and of machines, folders.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup;
use crate::lab::vpc::name::{LabId, STATE_ROOT, make_dir};
use crate::lab::vpc::ns;

const STOP_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum DownError {
    #[error("lab {0} is running already (process {1}); end it, or run `fairway lab down`")]
    Running(LabId, String),
    #[error("{what}: {cause}")]
    Io { what: String, cause: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> DownError {
    let what = path.display().to_string();
    move |cause| DownError::Io { what, cause }
}

/// The lab's state folder, held by one process at a time.
#[derive(Debug)]
pub struct Claim {
    _lock: Flock<File>,
}

/// Take the lab's state folder for this process; refuses while another has it.
pub fn claim(id: &LabId) -> Result<Claim, DownError> {
    let dir = id.state_dir();
    make_dir(&dir).map_err(at(&dir))?;
    let path = dir.join("lab.pid");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => {
            lock.set_len(0).map_err(at(&path))?;
            fs::write(&path, std::process::id().to_string()).map_err(at(&path))?;
            Ok(Claim { _lock: lock })
        }
        Err(_) => Err(DownError::Running(id.clone(), fs::read_to_string(&path).unwrap_or_default())),
    }
}

/// What was found and removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub processes: Vec<i32>,
    pub cgroups: Vec<PathBuf>,
    pub mounts: Vec<PathBuf>,
    pub namespaces: Vec<PathBuf>,
    pub folders: Vec<PathBuf>,
}

impl Swept {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Ids of labs that have a state folder or a namespace.
pub fn labs() -> Vec<LabId> {
    let mut ids = BTreeSet::new();
    for entry in fs::read_dir(STATE_ROOT).into_iter().flatten().flatten() {
        ids.extend(entry.file_name().to_string_lossy().parse::<LabId>());
    }
    for path in ns::list("fwl-").unwrap_or_default() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let id = name.split('-').nth(1).and_then(|id| id.parse::<LabId>().ok());
        ids.extend(id);
    }
    ids.into_iter().collect()
}

/// Remove everything of the lab; a second time there is nothing. Goes on after
/// a failure and reports the first. Blocks.
pub fn sweep(id: &LabId) -> Result<Swept, DownError> {
    let mut swept = Swept::default();
    let mut first = None;
    let mut note = |result: Result<(), DownError>| {
        if let Err(e) = result
            && first.is_none()
        {
            first = Some(e);
        }
    };
    note(end_lab_process(id, &mut swept));
    for path in cgroup::list(&id.prefix()) {
        swept.processes.extend(cgroup::processes(&path));
        note(cgroup::remove(&path).map_err(at(&path)));
        swept.cgroups.push(path);
    }
    let mut namespaces = pod_namespaces(&id.state_dir());
    namespaces.extend(ns::list(&id.prefix()).unwrap_or_default());
    for pid in inhabitants(&namespaces) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        swept.processes.push(pid);
    }
    let mounts = mounts_below(&id.state_dir());
    for path in mounts.into_iter().rev() {
        note(match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
            Err(e) => Err(at(&path)(e.into())),
        });
        swept.mounts.push(path);
    }
    for path in namespaces {
        note(ns::remove(&path).map_err(at(&path)));
        swept.namespaces.push(path);
    }
    let dir = id.state_dir();
    // Never walk into a mount that would not go.
    if dir.exists() && mounts_below(&dir).is_empty() {
        note(fs::remove_dir_all(&dir).map_err(at(&dir)));
        // Gone too when this was the last lab.
        let _ = fs::remove_dir(STATE_ROOT);
        swept.folders.push(dir);
    }
    match first {
        Some(e) => Err(e),
        None => Ok(swept),
    }
}

/// Ask the lab's process to end, and wait; it is told by its lock, so a process
/// that happens to have its old id is left alone.
fn end_lab_process(id: &LabId, swept: &mut Swept) -> Result<(), DownError> {
    let path = id.state_dir().join("lab.pid");
    let Ok(file) = File::open(&path) else { return Ok(()) };
    let pid: Option<i32> = fs::read_to_string(&path).ok().and_then(|s| s.trim().parse().ok());
    let Err((file, _)) = Flock::lock(file, FlockArg::LockSharedNonblock) else { return Ok(()) };
    let Some(pid) = pid.filter(|pid| *pid > 1 && *pid != std::process::id().cast_signed()) else { return Ok(()) };
    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    swept.processes.push(pid);
    if !released(file, Instant::now() + STOP_WITHIN) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    Ok(())
}

/// Wait until the lock is free; false when it is not in time.
fn released(mut file: File, until: Instant) -> bool {
    while Instant::now() < until {
        // A file lock has no event to wait for together with a timeout.
        std::thread::sleep(Duration::from_millis(20));
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => return true,
            Err((back, _)) => file = back,
        }
    }
    false
}

/// Namespaces of pods, as the lab's kubelets noted them before making them.
pub(in crate::lab) fn pod_namespaces(state: &Path) -> Vec<PathBuf> {
    let nodes = fs::read_dir(state).into_iter().flatten().flatten();
    let notes = nodes.flat_map(|n| fs::read_dir(n.path().join("sandboxes")).into_iter().flatten().flatten());
    notes
        .filter_map(|note| fs::read_to_string(note.path()).ok())
        .map(|line| PathBuf::from(line.trim()))
        // A note is data: only names that kubelets give are believed.
        .filter(|p| p.parent() == Some(Path::new(ns::NETNS_DIR)))
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cni-")) && p.exists())
        .collect()
}

/// Processes in any of these namespaces, except this one.
fn inhabitants(namespaces: &[PathBuf]) -> Vec<i32> {
    let identity = |m: fs::Metadata| (m.dev(), m.ino());
    let own = fs::metadata("/proc/self/ns/net").ok().map(identity);
    let ours: BTreeSet<(u64, u64)> =
        namespaces.iter().filter_map(|p| fs::metadata(p).ok().map(identity)).filter(|i| Some(*i) != own).collect();
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let inside = fs::metadata(entry.path().join("ns/net")).is_ok_and(|m| ours.contains(&identity(m)));
        if inside && pid != std::process::id().cast_signed() {
            pids.push(pid);
        }
    }
    pids
}

/// Mount points at or below `dir`, in the order they were mounted.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|p| p.starts_with(dir)).collect()
}
