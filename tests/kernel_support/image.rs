//! What the guest has: an archive of programs with their libraries, modules, the
//! list of tests, and an `init` that runs them one after the other.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;
use super::kernel::Kernel;

/// The first process of the guest. Works through as many lists as it has
/// processors, says on the console what begins and how it ended, and ends the
/// machine after the last. `@` marks what is ours; the time is the machine's
/// since it was started.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin HOME=/tmp TMPDIR=/tmp FAIRWAY_EMULATED=1
busybox mount -t devtmpfs none /dev
busybox mount -t proc none /proc
busybox mount -t sysfs none /sys
busybox mount -t tmpfs none /tmp
busybox mount -t tmpfs none /run
busybox mount -t bpf none /sys/fs/bpf
busybox mount -t cgroup2 none /sys/fs/cgroup
busybox mkdir /run/netns
uptime() { read -r up rest < /proc/uptime; echo "$up"; }
while read -r module; do busybox insmod "/modules/$module" || echo "@module $module"; done < /modules/list
/bin/ip link set lo up
# One of the lists speaks at a time: who has read the line has the turn.
busybox mkfifo /tmp/turn
exec 9<> /tmp/turn
echo >&9
work() {
    export FAIRWAY_SKIPPED=/tmp/skipped.$1
    while read -r limit binary name; do
        echo "@begin $1 $(uptime) $binary::$name"
        : > "$FAIRWAY_SKIPPED"
        busybox timeout -s KILL "$limit" "/tests/$binary" "$name" --exact --nocapture --test-threads=1 \
            < /dev/null > "/tmp/said.$1" 2>&1 9>&-
        status=$?
        read -r turn <&9
        echo "@said $1"
        [ $status = 0 ] || busybox cat "/tmp/said.$1"
        echo
        busybox sed "s/^/@/" "$FAIRWAY_SKIPPED"
        echo "@end $1 $(uptime) $status"
        echo >&9
    done < "/tests/list.$1"
}
echo "@booted $(uptime)"
work 0 &
work 1
wait
echo @done
busybox poweroff -f
"#;

pub struct Image {
    archive: Archive,
    /// One for each of the guest's processors.
    lists: [String; 2],
    next: usize,
}

impl Image {
    pub fn new(kernel: &Kernel, modules: &[&str]) -> Result<Self, String> {
        let mut image = Self { archive: Archive::default(), lists: Default::default(), next: 0 };
        for folder in ["/proc", "/sys", "/dev", "/tmp", "/run"] {
            image.archive.folder(folder);
        }
        image.archive.symlink("/var/run", "/run");
        image.archive.device("/dev/console", (5, 1));
        image.archive.file("/etc/passwd", b"root:x:0:0:root:/:/bin/sh\n");
        image.archive.file("/init", INIT.as_bytes());
        let mut list = String::new();
        for (name, content) in kernel.with_dependencies(modules) {
            image.archive.file(&format!("/modules/{name}"), &content);
            list += &format!("{name}\n");
        }
        image.archive.file("/modules/list", list.as_bytes());
        image.program("busybox")?;
        Ok(image)
    }

    /// A program of this machine, as `/bin/<name>`.
    pub fn program(&mut self, name: &str) -> Result<(), String> {
        let path = std::env::var("PATH").unwrap_or_default();
        let folders = path.split(':').chain(["/usr/sbin", "/sbin"]).map(Path::new);
        let found = folders.map(|f| f.join(name)).find(|p| p.is_file());
        let found = found.ok_or_else(|| format!("the program {name}"))?;
        self.executable(&found, &format!("/bin/{name}"));
        Ok(())
    }

    /// These tests of a binary, in a guest that gives each `limit` seconds.
    pub fn tests(&mut self, binary: &Path, suite: &str, names: &[String], limit: u64) {
        self.executable(binary, &format!("/tests/{suite}"));
        for name in names {
            self.lists[self.next] += &format!("{limit} {suite} {name}\n");
            self.next = (self.next + 1) % self.lists.len();
        }
    }

    /// A file with the libraries it is linked to, which lie where they do here.
    pub fn executable(&mut self, from: &Path, to: &str) {
        if self.archive.contains(to) {
            return;
        }
        self.archive.file(to, &std::fs::read(from).unwrap());
        for library in libraries(from) {
            if !self.archive.contains(&library) {
                self.archive.file(&library, &std::fs::read(&library).unwrap());
            }
        }
    }

    pub fn finish(mut self) -> Vec<u8> {
        for (n, list) in self.lists.iter().enumerate() {
            self.archive.file(&format!("/tests/list.{n}"), list.as_bytes());
        }
        self.archive.finish()
    }
}

/// As `ldd` names them; none of a static program.
fn libraries(program: &Path) -> Vec<String> {
    let said = Command::new("ldd").arg(program).output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let path = |line: &str| {
        let after = line.split_once("=>").map_or(line, |(_, path)| path);
        after.split_whitespace().next().filter(|p| p.starts_with('/')).map(str::to_owned)
    };
    said.lines().filter_map(path).collect()
}

/// The names of a test binary's tests.
pub fn names(binary: &Path) -> Vec<String> {
    let said = Command::new(binary).args(["--list", "--format", "terse"]).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    said.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// The test binaries of these names, as cargo builds them, which has done so by
/// the time this runs.
pub fn binaries(suites: &[&str]) -> Vec<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["test", "--no-run", "--workspace", "--locked", "--offline"]);
    cargo.args(["--quiet", "--message-format", "json"]);
    // What cargo and the runner say to a test would make build scripts run again.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "NEXTEST"]
            .iter()
            .any(|p| text.starts_with(p))
        {
            cargo.env_remove(name);
        }
    }
    for suite in suites {
        cargo.args(["--test", suite]);
    }
    let built = cargo.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let messages: Vec<serde_json::Value> =
        built.stdout.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let of = |suite: &&str| {
        let artifact = messages.iter().find(|m| m["target"]["name"] == **suite && m["executable"].is_string());
        PathBuf::from(artifact.unwrap()["executable"].as_str().unwrap())
    };
    suites.iter().map(of).collect()
}
