//! A machine that boots a kernel with an archive and ends by itself.
//!
//! Emulated, not virtual: it needs no /dev/kvm, and two minutes instead of ten
//! seconds. Its console is all that comes out.

use std::collections::BTreeMap;
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
        .args(["-accel", "tcg,thread=multi", "-cpu", "Nehalem,+rdrand", "-smp", "2", "-m", "1024", "-nodefaults"])
        // It has no disk and no network, and a restart ends it.
        .args(["-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(archive)
        // A panic ends it at once. Warnings are shown: one of them is a failure.
        // Measures against processors that guess cost an emulated one a lot.
        .args([
            "-append",
            "mitigations=off console=ttyS0 panic=-1 oops=panic loglevel=5 random.trust_cpu=on no_timer_check",
        ])
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

/// What is known of a test that has begun.
#[derive(Default)]
struct Open {
    name: String,
    began: f64,
    skipped: Vec<String>,
    said: String,
}

/// From the console; what init says there begins with `@`.
pub fn parse(console: String) -> Report {
    let mut report =
        Report { tests: Vec::new(), booted: 0.0, modules: Vec::new(), complete: false, console: String::new() };
    // By the list they are from.
    let mut open: BTreeMap<&str, Open> = BTreeMap::new();
    let mut speaks = "";
    for line in console.lines() {
        let Some(ours) = line.strip_prefix('@') else {
            if let Some(test) = open.get_mut(speaks) {
                test.said += line;
                test.said.push('\n');
            }
            continue;
        };
        let (word, rest) = ours.split_once(' ').unwrap_or((ours, ""));
        let mut words = rest.splitn(3, ' ');
        let mut next = || words.next().unwrap_or_default();
        match word {
            "module" => report.modules.push(rest.to_owned()),
            "booted" => report.booted = rest.parse().unwrap_or_default(),
            "begin" => {
                let (list, began, name) = (next(), next(), next());
                let began = began.parse().unwrap_or_default();
                open.insert(list, Open { name: name.to_owned(), began, ..Open::default() });
            }
            "said" => speaks = rest,
            "SKIPPED:" => {
                if let Some(test) = open.get_mut(speaks) {
                    test.skipped.push(rest.to_owned());
                }
            }
            "end" => {
                let (list, now, status) = (next(), next(), next());
                speaks = "";
                if let Some(Open { name, began, skipped, said }) = open.remove(list) {
                    let outcome = match (status, skipped.is_empty()) {
                        ("0", true) => Outcome::Passed,
                        ("0", false) => Outcome::Skipped(skipped),
                        // How `timeout` says that it had to kill.
                        ("137" | "143", _) => Outcome::Failed(format!("killed after its time was over\n{said}")),
                        _ => Outcome::Failed(format!("status {status}\n{said}")),
                    };
                    report.tests.push((name, outcome, now.parse().unwrap_or(began) - began));
                }
            }
            "done" => report.complete = true,
            _ => {}
        }
    }
    for test in open.into_values() {
        report.tests.push((test.name, Outcome::Failed("the machine ended during this test".to_owned()), 0.0));
    }
    report.console = console;
    report
}
