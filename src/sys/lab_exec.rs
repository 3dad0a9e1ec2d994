//! What a child of the lab does between fork and exec.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

/// Make children of `command` join the cgroup whose `cgroup.procs` is given and
/// die when the thread that starts them ends, however it ends.
pub fn bind_to_parent(command: &mut Command, cgroup_procs: Option<File>) {
    let parent: Pid = getpid();
    let setup = move || -> io::Result<()> {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the line above.
        if getppid() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        if let Some(mut procs) = cgroup_procs.as_ref() {
            procs.write_all(b"0")?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child of a threaded process. It
    // only makes system calls (prctl, getppid, write) on values made before the
    // fork: it takes no lock and allocates nothing, and neither do its errors.
    unsafe { command.pre_exec(setup) };
}
