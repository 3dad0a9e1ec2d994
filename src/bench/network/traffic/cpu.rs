//! Processor time, read from the kernel's scheduler: to the nanosecond, and of
//! these threads alone, whatever else the machine does.
//!
//! What a thread sends is carried to the other end's socket by soft interrupts
//! that run on its time; what they leave over runs in `ksoftirqd`, which has to
//! be counted too.

use std::fs;
use std::time::Duration;

fn schedstat(path: &str) -> Duration {
    let text = fs::read_to_string(path).unwrap_or_default();
    let nanoseconds = text.split_whitespace().next().and_then(|n| n.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

/// A thread of this process.
pub fn of_thread(id: i32) -> Duration {
    schedstat(&format!("/proc/self/task/{id}/schedstat"))
}

/// The calling thread.
pub fn of_this_thread() -> Duration {
    schedstat("/proc/thread-self/schedstat")
}

/// The kernel's threads for soft interrupts, of all cores.
#[derive(Debug)]
pub struct Softirqd(Vec<String>);

impl Softirqd {
    /// None are found where other processes are not to be seen.
    pub fn find() -> Self {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let is_one = |path: &std::path::Path| {
            fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"))
        };
        let found = all.map(|entry| entry.path()).filter(|path| is_one(path));
        Self(found.map(|path| path.join("schedstat").to_string_lossy().into_owned()).collect())
    }

    pub fn used(&self) -> Duration {
        self.0.iter().map(|path| schedstat(path)).sum()
    }
}
