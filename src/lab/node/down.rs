//! `fairway lab down`: finds and removes everything of a lab, by name.
//!
//! Works after a crash of the lab and as often as one likes: nothing here needs
//! the lab's memory. Order: the lab process, agents (cgroups), whoever else sits
//! in the lab's namespaces, mounts, namespaces of pods and of machines, folders.

use std::collections::BTreeSet;
use std::fmt;
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

const STOP_WITHIN: Duration = Duration::from_secs(20);
/// In a lab's state folder: the process that has claimed it.
const PID_FILE: &str = "lab.pid";
/// In a lab's state folder: what a lab in the background says.
pub const LOG_FILE: &str = "lab.log";

#[derive(Debug, thiserror::Error)]
pub enum DownError {
    #[error(
        "lab {0} is running already (process {1}); take it down with `fairway lab down --id {0}`, or choose another --id"
    )]
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
    let path = dir.join(PID_FILE);
    let mut tries = 0..10;
    loop {
        make_dir(&dir).map_err(at(&dir))?;
        let file = match File::options().create(true).truncate(false).write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(at(&path))?,
        };
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            // Perhaps somebody only looks whether it is held, for a moment.
            if tries.next().is_some() {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            return Err(DownError::Running(id.clone(), fs::read_to_string(&path).unwrap_or_default()));
        };
        // Whoever had it may have removed the folder between the two steps.
        let same = |there: fs::Metadata| lock.metadata().is_ok_and(|m| m.ino() == there.ino());
        if fs::metadata(&path).is_ok_and(same) {
            lock.set_len(0).map_err(at(&path))?;
            fs::write(&path, std::process::id().to_string()).map_err(at(&path))?;
            return Ok(Claim { _lock: lock });
        }
    }
}

/// Whether somebody runs a lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    /// By this process.
    Running(i32),
    /// Its process is gone without having taken it down.
    Dead,
    /// No process ever claimed it: parts of a lab that run on their own.
    Unclaimed,
}

pub fn life(id: &LabId) -> Life {
    let path = id.state_dir().join(PID_FILE);
    let Ok(file) = File::open(&path) else { return Life::Unclaimed };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => Life::Dead,
        Err(_) => {
            let pid = fs::read_to_string(&path).ok().and_then(|s| s.trim().parse().ok());
            Life::Running(pid.unwrap_or_default())
        }
    }
}

/// Labs whose process died and left them behind.
pub fn dead() -> Vec<LabId> {
    labs().into_iter().filter(|id| life(id) == Life::Dead).collect()
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

    /// The lab's process was ended, and has removed everything itself.
    pub fn only_ended(&self) -> bool {
        let left = self.cgroups.len() + self.mounts.len() + self.namespaces.len() + self.folders.len();
        left == 0 && !self.processes.is_empty()
    }
}

impl fmt::Display for Swept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.processes.len(), "processes"),
            (self.cgroups.len(), "cgroups"),
            (self.mounts.len(), "mounts"),
            (self.namespaces.len(), "namespaces"),
            (self.folders.len(), "folders"),
        ];
        let some: Vec<String> = all.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        f.write_str(&if some.is_empty() { "nothing".to_owned() } else { some.join(", ") })
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
    let ended = end_lab_process(id, &mut swept);
    let rest = sweep_parts(id, &mut swept, true);
    ended.and(rest).map(|()| swept)
}

/// As [`sweep`], by the process that has claimed the lab: at its start, when
/// its claim and log stay, and at its end.
pub fn sweep_claimed(id: &LabId, _claim: &Claim, end: bool) -> Result<Swept, DownError> {
    let mut swept = Swept::default();
    sweep_parts(id, &mut swept, end).map(|()| swept)
}

fn sweep_parts(id: &LabId, swept: &mut Swept, all: bool) -> Result<(), DownError> {
    let mut first = None;
    let mut note = |result: Result<(), DownError>| {
        if let Err(e) = result
            && first.is_none()
        {
            first = Some(e);
        }
    };
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
        note(remove_folder(&dir, all, swept));
    }
    first.map_or(Ok(()), Err)
}

/// The state folder with all in it, or all but what its process keeps there.
fn remove_folder(dir: &Path, all: bool, swept: &mut Swept) -> Result<(), DownError> {
    if all {
        swept.folders.push(dir.to_owned());
        fs::remove_dir_all(dir).map_err(at(dir))?;
        // Gone too when this was the last lab.
        let _ = fs::remove_dir(STATE_ROOT);
        return Ok(());
    }
    for entry in fs::read_dir(dir).map_err(at(dir))?.flatten() {
        let path = entry.path();
        if [PID_FILE, LOG_FILE].iter().any(|kept| entry.file_name() == *kept) {
            continue;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(at(&path))?;
        swept.folders.push(path);
    }
    Ok(())
}

/// Ask the lab's process to end, and wait; it is told by its lock, so a process
/// that happens to have its old id is left alone.
fn end_lab_process(id: &LabId, swept: &mut Swept) -> Result<(), DownError> {
    let path = id.state_dir().join(PID_FILE);
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
