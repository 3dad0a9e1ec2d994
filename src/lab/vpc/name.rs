//! Names of everything a lab makes in the kernel and on disk.
//!
//! Invariant: a name starts with `fwl-<id>-`, or its path lies below the lab's
//! state folder, so that `down` finds it after a crash.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where labs keep their state; a tmpfs on most machines.
pub const STATE_ROOT: &str = "/run/fairway-lab";

/// A lab's id: one to twelve lower-case letters and digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LabId(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a lab id; use one to twelve lower-case letters and digits")]
pub struct BadLabId(String);

impl FromStr for LabId {
    type Err = BadLabId;
    fn from_str(s: &str) -> Result<Self, BadLabId> {
        let fits = (1..=12).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if fits { Ok(Self(s.to_owned())) } else { Err(BadLabId(s.to_owned())) }
    }
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl LabId {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What every kernel name of this lab starts with.
    pub fn prefix(&self) -> String {
        format!("fwl-{}-", self.0)
    }

    /// The kernel name of one part, e.g. `fwl-d1-vpc`.
    pub fn name(&self, part: &str) -> String {
        format!("fwl-{}-{part}", self.0)
    }

    pub fn state_dir(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.0)
    }
}

/// Make a folder below the state root. Another lab that goes down may take the
/// empty root away in between, so this tries again.
pub fn make_dir(path: &Path) -> io::Result<()> {
    let mut tries = 0..5;
    loop {
        match std::fs::create_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries.next().is_some() => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_cannot_escape_its_folder_or_prefix() {
        for bad in ["", "..", "a/b", "a-b", "A", "thirteenchars"] {
            assert!(bad.parse::<LabId>().is_err(), "{bad:?}");
        }
        assert_eq!("d1".parse::<LabId>().unwrap().name("vpc"), "fwl-d1-vpc");
    }
}
