//! `fairway lab up` without holding the terminal: the lab is a process of its
//! own in the background, which this one only watches until it is ready.
//!
//! Owner of: nothing. The background process holds the lab's claim and answers
//! on its [`control`](super::control) socket; both processes write nothing to
//! each other but the log file, so the lab does not depend on who started it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cli::Interrupt;
use super::control::{self, Answer, Ask};
use super::node::down::{self, DownError, LOG_FILE, Life};
use super::vpc::name::{LabId, STATE_ROOT, make_dir};

/// What this program is called with to be the background process.
pub const FLAG: &str = "background";

/// Start the lab by this program's own arguments, and wait until it is up.
/// False when it did not come up; why has been printed then.
pub async fn up(id: &LabId, mut interrupt: Interrupt) -> anyhow::Result<bool> {
    let state = id.state_dir();
    if let Life::Running(pid) = down::life(id) {
        bail!(DownError::Running(id.clone(), pid.to_string()));
    }
    make_dir(&state).with_context(|| state.display().to_string())?;
    let path = state.join(LOG_FILE);
    let at = || path.display().to_string();
    let log = File::create(&path).with_context(at)?;
    let mut written = File::open(&path).with_context(at)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg(format!("--{FLAG}"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting the lab's process")?;
    let up = wait(&mut child, &state, &mut written, &mut interrupt).await;
    if !matches!(up, Ok(true)) {
        leave_nothing(id, &path);
        return up;
    }
    if let Answer::About(text) = control::ask(&state, &Ask::About, &|_| ()).await? {
        println!("{text}");
    }
    println!("Process {} runs lab {id} and logs to {}.", child.id(), path.display());
    println!("fairway lab down --id {id} takes it down.");
    Ok(true)
}

async fn wait(child: &mut Child, state: &Path, written: &mut File, interrupt: &mut Interrupt) -> anyhow::Result<bool> {
    loop {
        show(written);
        if child.try_wait()?.is_some() {
            show(written);
            return Ok(false);
        }
        if control::is_up(state).await {
            show(written);
            return Ok(true);
        }
        // Another process's log has no event to wait for.
        let pause = tokio::time::sleep(Duration::from_millis(50));
        tokio::select! {
            () = pause => {}
            () = interrupt.wait() => {
                let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
                child.wait()?;
                show(written);
                return Ok(false);
            }
        }
    }
}

/// Pass on what the lab has written since the last time.
fn show(written: &mut File) {
    let mut text = Vec::new();
    if written.read_to_end(&mut text).is_ok() {
        let _ = io::stderr().write_all(&text);
    }
}

/// The log of a lab that did not come so far as to claim its folder.
fn leave_nothing(id: &LabId, log: &Path) {
    if matches!(down::life(id), Life::Running(_)) {
        return;
    }
    let _ = std::fs::remove_file(log);
    let _ = std::fs::remove_dir(id.state_dir());
    let _ = std::fs::remove_dir(STATE_ROOT);
}

/// In the background process: let go of the terminal and the folder.
pub fn let_go() -> anyhow::Result<()> {
    nix::unistd::setsid().context("a session of its own")?;
    Ok(std::env::set_current_dir("/")?)
}
