//! The socket path's programs on the root of the cgroup tree.
//!
//! One link per door, pinned below `sockets/`, so that connections are resolved
//! while no agent runs. The root is where every process of the machine is; a
//! cgroup that only looks like it (a container's own, under a cgroup namespace)
//! would leave most of them out without a word, so it is refused.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::DatapathError;
use super::pins::Pins;
use super::programs::Programs;
use crate::sys::bpf::{self, CgroupHook};

/// Program names and where they go.
pub(super) const DOORS: [(&str, CgroupHook); 8] = [
    ("sock_connect4", CgroupHook::Connect4),
    ("sock_connect6", CgroupHook::Connect6),
    ("sock_sendmsg4", CgroupHook::Sendmsg4),
    ("sock_sendmsg6", CgroupHook::Sendmsg6),
    ("sock_recvmsg4", CgroupHook::Recvmsg4),
    ("sock_recvmsg6", CgroupHook::Recvmsg6),
    ("sock_getpeername4", CgroupHook::Getpeername4),
    ("sock_getpeername6", CgroupHook::Getpeername6),
];

/// The root of the cgroup v2 tree, wherever it is mounted; `at` names it.
pub fn cgroup_root(at: Option<&Path>) -> Result<PathBuf, DatapathError> {
    let missing = |cause: &str| DatapathError::Cgroup { path: at.map(Path::to_owned), cause: cause.to_owned() };
    let candidates = match at {
        Some(path) => vec![path.to_owned()],
        None => mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()),
    };
    if candidates.is_empty() {
        return Err(missing("no cgroup v2 tree is mounted; mount one with `mount -t cgroup2 none /sys/fs/cgroup`"));
    }
    // The root alone has no `cgroup.events`.
    let is_root = |path: &&PathBuf| path.join("cgroup.procs").is_file() && !path.join("cgroup.events").exists();
    candidates.iter().find(is_root).cloned().ok_or_else(|| {
        missing("is not the root of the machine's cgroup v2 tree; in a container, mount the host's /sys/fs/cgroup")
    })
}

/// Mount points of cgroup2 file systems.
fn mounts(mountinfo: &str) -> Vec<PathBuf> {
    let point = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    };
    mountinfo.lines().filter_map(point).collect()
}

/// Where pods set options of their sockets.
pub(super) const GUARD: (&str, CgroupHook) = ("sock_setsockopt", CgroupHook::Setsockopt);

/// Attaches this build's programs, or swaps them in where earlier ones are.
pub(super) fn attach(pins: &Pins, programs: &mut Programs, root: &Path) -> Result<(), DatapathError> {
    attach_all(pins, programs, root, &DOORS)
}

pub(super) fn attach_guard(pins: &Pins, programs: &mut Programs, root: &Path) -> Result<(), DatapathError> {
    attach_all(pins, programs, root, &[GUARD])
}

fn attach_all(
    pins: &Pins,
    programs: &mut Programs,
    root: &Path,
    doors: &[(&str, CgroupHook)],
) -> Result<(), DatapathError> {
    let fail = |cause: io::Error| DatapathError::Cgroup { path: Some(root.to_owned()), cause: cause.to_string() };
    let dir = pins.sockets().map_err(fail)?;
    let cgroup = File::open(root).map_err(fail)?;
    let id = cgroup.metadata().map_err(fail)?.ino();
    for (name, hook) in doors.iter().copied() {
        let program = programs.socket_door(name)?;
        let pin = dir.join(name);
        let there = match bpf::open_pinned(&pin) {
            Ok(link) => bpf::cgroup_link(link.as_fd()).map_err(fail)?.filter(|l| *l == (id, hook)).map(|_| link),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(fail(e)),
        };
        match there {
            Some(link) => bpf::link_update(link.as_fd(), program).map_err(fail)?,
            None => {
                let link = bpf::cgroup_attach(program, cgroup.as_fd(), hook).map_err(fail)?;
                // What was pinned there was on another tree.
                let _ = fs::remove_file(&pin);
                bpf::pin(link.as_fd(), &pin).map_err(fail)?;
            }
        }
    }
    Ok(())
}

/// The hooks that are in force now, read from the kernel.
pub(super) fn attached(pins: &Pins) -> Vec<&'static str> {
    let Ok(dir) = pins.sockets() else { return Vec::new() };
    let there = |(name, hook): &(&str, CgroupHook)| {
        let link = bpf::open_pinned(&dir.join(name)).ok()?;
        bpf::cgroup_link(link.as_fd()).ok()?.filter(|(_, on)| on == hook)
    };
    DOORS.iter().filter(|door| there(door).is_some()).map(|(name, _)| *name).collect()
}

/// Takes them off.
pub(super) fn detach(pins: &Pins) -> Result<(), DatapathError> {
    let fail = |cause: io::Error| DatapathError::Cgroup { path: None, cause: cause.to_string() };
    let dir = pins.sockets().map_err(fail)?;
    for (name, _) in DOORS.into_iter().chain([GUARD]) {
        let pin = dir.join(name);
        if let Ok(link) = bpf::open_pinned(&pin) {
            let _ = bpf::link_detach(link.as_fd());
        }
    }
    super::pins::remove(&dir).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unified_tree_is_found_beside_version_1() {
        let text = "33 24 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
                    34 24 0:30 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(mounts(text), [PathBuf::from("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn what_is_not_the_root_is_refused_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["cgroup.procs", "cgroup.events"] {
            fs::write(folder.path().join(file), "").unwrap();
        }
        let error = cgroup_root(Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("mount the host's"), "{error}");
    }
}
