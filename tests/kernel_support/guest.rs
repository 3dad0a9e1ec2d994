//! A machine that boots a kernel with an archive and ends by itself.
//!
//! Emulated, not virtual: it needs no /dev/kvm, and two minutes instead of ten
//! seconds. Its console is all that comes out.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub const EMULATOR: &str = "qemu-system-x86_64";

/// How one test in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Skipped(Vec<String>),
    Failed(String),
}

pub struct Report {
    /// Suite and name of each test with its outcome and its seconds.
    pub tests: Vec<(String, Outcome, f64)>,
    /// Seconds until the first test began, by the guest's clock.
    pub booted: f64,
    /// Modules that did not load.
    pub modules: Vec<String>,
    /// The machine has gone through its whole list.
    pub complete: bool,
    pub console: String,
}

/// Boots, and returns when the machine has ended or `limit` has passed.
pub fn run(kernel: &Path, archive: &Path, limit: Duration) -> Report {
    let mut machine = Command::new(EMULATOR)
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024", "-nodefaults"])
        // It has no disk and no network, and a restart ends it.
        .args(["-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(archive)
        // A panic ends it at once. Warnings are shown: one of them is a failure.
        .args(["-append", "console=ttyS0 panic=-1 oops=panic loglevel=5 random.trust_cpu=on no_timer_check"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(machine.id() as i32);
    let (ended, ending) = mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        // The sender goes when the machine has ended.
        if ending.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    let mut console = String::new();
    let mut lines = BufReader::new(machine.stdout.take().unwrap());
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).unwrap_or(0) > 0 {
        let text = String::from_utf8_lossy(&line).replace('\r', "");
        if text.starts_with('@') {
            print!("{text}");
        }
        console += &text;
        line.clear();
    }
    // Its output has ended; it is not reaped yet, so its number is still its own.
    drop(ended);
    guard.join().unwrap();
    machine.wait().unwrap();
    parse(console)
}

/// From the console; what init says there begins with `@`.
pub fn parse(console: String) -> Report {
    let mut report =
        Report { tests: Vec::new(), booted: 0.0, modules: Vec::new(), complete: false, console: String::new() };
    let mut current: Option<(String, Vec<String>, String)> = None;
    let mut clock = None;
    for line in console.lines() {
        let Some((word, rest)) = line.strip_prefix('@').map(|l| l.split_once(' ').unwrap_or((l, ""))) else {
            if let Some((_, _, said)) = &mut current {
                *said += line;
                said.push('\n');
            }
            continue;
        };
        match word {
            "module" => report.modules.push(rest.to_owned()),
            "booted" => {
                report.booted = rest.parse().unwrap_or_default();
                clock = Some(report.booted);
            }
            "begin" => current = Some((rest.replacen(' ', "::", 1), Vec::new(), String::new())),
            "SKIPPED:" => {
                if let Some((_, skipped, _)) = &mut current {
                    skipped.push(rest.to_owned());
                }
            }
            "end" => {
                let (status, now) = rest.split_once(' ').unwrap_or((rest, ""));
                let now: f64 = now.parse().unwrap_or_default();
                if let Some((name, skipped, said)) = current.take() {
                    let outcome = match (status, skipped.is_empty()) {
                        ("0", true) => Outcome::Passed,
                        ("0", false) => Outcome::Skipped(skipped),
                        // How `timeout` says that it had to kill.
                        ("137" | "143", _) => Outcome::Failed(format!("killed after its time was over\n{said}")),
                        _ => Outcome::Failed(format!("status {status}\n{said}")),
                    };
                    report.tests.push((name, outcome, now - clock.unwrap_or(now)));
                }
                clock = Some(now);
            }
            "done" => report.complete = true,
            _ => {}
        }
    }
    if let Some((name, _, said)) = current {
        report.tests.push((name, Outcome::Failed(format!("the machine ended during this test\n{said}")), 0.0));
    }
    report.console = console;
    report
}
