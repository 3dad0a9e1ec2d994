//! A cgroup (version 2) per node, wherever the tree is mounted.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const EMPTY_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroup2 file system is mounted")]
    NotMounted,
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
}

/// A cgroup of ours. Dropping it kills what is in it and removes it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub fn create(name: &str) -> Result<Self, CgroupError> {
        let path = root().ok_or(CgroupError::NotMounted)?.join(name);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(CgroupError::Io { path, cause: e }),
            _ => Ok(Self { path }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.path) {
            tracing::warn!(target: "lab", "removing cgroup {}: {e}", self.path.display());
        }
    }
}

/// Where cgroup version 2 is mounted.
pub fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(cgroup2_mount)
}

/// The mount point, if this line of mountinfo is a cgroup2 mount.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (mount, kind) = line.split_once(" - ")?;
    kind.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
}

/// Cgroups directly below the root whose name starts with `prefix`.
pub fn list(prefix: &str) -> Vec<PathBuf> {
    let entries = root().and_then(|root| fs::read_dir(root).ok());
    let mut found: Vec<PathBuf> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(prefix) && e.path().is_dir())
        .map(|e| e.path())
        .collect();
    found.sort();
    found
}

/// Processes in the cgroup and those below it.
pub fn processes(path: &Path) -> Vec<i32> {
    let own = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = own.lines().filter_map(|l| l.parse().ok()).collect();
    pids.extend(children(path).iter().flat_map(|c| processes(c)));
    pids
}

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Kill what is in the cgroup, wait until it is empty, remove it. One that is
/// gone is success. Blocks.
pub fn remove(path: &Path) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let until = Instant::now() + EMPTY_WITHIN;
    // cgroup.kill is 5.14 and later.
    if fs::write(path.join("cgroup.kill"), "1").is_err() {
        for pid in processes(path) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
    wait_empty(path, until)?;
    for child in children(path) {
        remove(&child)?;
    }
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Wait for `populated 0`: the kernel signals changes of the file.
fn wait_empty(path: &Path, until: Instant) -> io::Result<()> {
    let events = path.join("cgroup.events");
    loop {
        let file = match File::open(&events) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        if !io::read_to_string(&file)?.contains("populated 1") {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} is still in use", path.display())));
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::from(100u8));
        poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_among_others() {
        let v1 = "33 24 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu";
        let v2 = "34 24 0:30 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw";
        assert_eq!(cgroup2_mount(v1), None);
        assert_eq!(cgroup2_mount(v2), Some("/sys/fs/cgroup/unified".into()));
    }
}
