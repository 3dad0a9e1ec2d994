//! What lies where below the bpffs mount, and how it is named.
//!
//! ```text
//! <bpffs>/fairway/v<LAYOUT_VERSION>/maps/<MAP>
//!                                  /pods/<attachment>+<place><endpoint>/egress
//!                                                                      /ingress
//!                                  /sockets/<program>
//! ```
//!
//! `egress` and `ingress` are tcx links or, where the kernel has no tcx, the
//! programs that clsact filters run. The directory's name is all that must be
//! known of an attachment to take it up again. bpffs refuses dots in names, so
//! everything but letters, digits, `-` and `_` is written as `%XX`.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use fairway_ebpf_abi::{Endpoint, IN_POD};

use super::hook::{Direction, Place};
use crate::model::AttachmentId;
use crate::sys::bpf;

/// `f_type` of a BPF file system.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// Longest name a directory entry may have.
const NAME_MAX: usize = 255;

/// One attachment's pin directory, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PinName {
    pub attachment: AttachmentId,
    pub place: Place,
    pub endpoint: Endpoint,
}

impl PinName {
    /// `None` when the attachment's names are too long for a directory entry.
    pub(super) fn encode(&self) -> Option<String> {
        let mut out = String::new();
        escape(self.attachment.sandbox.as_str(), &mut out);
        out.push('+');
        escape(&self.attachment.ifname, &mut out);
        let place = match self.place {
            Place::HostSide => 'h',
            Place::InPod => 'p',
        };
        let _ = write!(out, "+{place}{}", self.endpoint);
        (out.len() <= NAME_MAX).then_some(out)
    }

    pub(super) fn decode(name: &str) -> Option<Self> {
        let mut parts = name.split('+');
        let (sandbox, ifname, tail) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || sandbox.is_empty() || ifname.is_empty() {
            return None;
        }
        let place = match tail.chars().next()? {
            'h' => Place::HostSide,
            'p' => Place::InPod,
            _ => return None,
        };
        let endpoint: Endpoint = tail.get(1..)?.parse().ok()?;
        if (endpoint >= IN_POD) != (place == Place::InPod) || endpoint == 0 {
            return None;
        }
        let attachment = AttachmentId { sandbox: unescape(sandbox)?.into(), ifname: unescape(ifname)? };
        let decoded = Self { attachment, place, endpoint };
        // One spelling per attachment, or two directories could mean the same.
        (decoded.encode().as_deref() == Some(name)).then_some(decoded)
    }
}

/// A pin directory's name as it is written, if it is one: the same.
pub(crate) fn respelled(name: &str) -> Option<String> {
    PinName::decode(name)?.encode()
}

fn escape(s: &str, out: &mut String) {
    for byte in s.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            out.push(byte.into());
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

fn unescape(s: &str) -> Option<String> {
    let mut out = Vec::with_capacity(s.len());
    let mut bytes = s.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let high = char::from(bytes.next()?).to_digit(16)?;
        let low = char::from(bytes.next()?).to_digit(16)?;
        out.push((high * 16 + low) as u8);
    }
    String::from_utf8(out).ok()
}

/// The pin directories of one agent.
#[derive(Debug)]
pub(super) struct Pins {
    /// `<bpffs>/fairway`
    root: PathBuf,
    /// `<bpffs>/fairway/v<LAYOUT_VERSION>`
    base: PathBuf,
}

impl Pins {
    /// Makes the directories. `Ok(None)` when `bpffs` is not a BPF file system.
    pub(super) fn open(bpffs: &Path, version: u32) -> io::Result<Option<Self>> {
        if nix::sys::statfs::statfs(bpffs)?.filesystem_type().0 as i64 != BPF_FS_MAGIC {
            return Ok(None);
        }
        let root = bpffs.join("fairway");
        let base = root.join(format!("v{version}"));
        fs::create_dir_all(base.join("maps"))?;
        fs::create_dir_all(base.join("pods"))?;
        Ok(Some(Self { root, base }))
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.base.join("maps").join(name)
    }

    pub(super) fn pod(&self, name: &str) -> PathBuf {
        self.base.join("pods").join(name)
    }

    /// Where the links on the cgroup tree are; made if it is not there.
    pub(super) fn sockets(&self) -> io::Result<PathBuf> {
        let dir = self.base.join("sockets");
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// The pod directories of every layout version, ours first: a directory of
    /// another version is moved to ours when its programs are taken over.
    pub(super) fn pods(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = entries(&self.base.join("pods"))?;
        for version in self.other_versions()? {
            found.extend(entries(&version.join("pods"))?);
        }
        Ok(found)
    }

    /// The layout that was in force before ours, if it still is anywhere: its
    /// number and its directory. An upgrade removes it when it is done.
    pub(super) fn predecessor(&self) -> io::Result<Option<(u32, PathBuf)>> {
        let number = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix('v')?.parse::<u32>().ok();
        let others = self.other_versions()?;
        let known = others.into_iter().filter_map(|path| Some((number(&path)?, path)));
        Ok(known.filter(|(_, path)| path.join("maps").is_dir()).max())
    }

    /// The links on the cgroup tree that an earlier layout's directory holds.
    pub(super) fn take_sockets(&self, from: &Path) -> io::Result<()> {
        let (theirs, ours) = (from.join("sockets"), self.base.join("sockets"));
        if !theirs.is_dir() || ours.exists() {
            return Ok(());
        }
        fs::rename(theirs, ours)
    }

    /// Layout directories that are not ours.
    pub(super) fn other_versions(&self) -> io::Result<Vec<PathBuf>> {
        Ok(entries(&self.root)?.into_iter().filter(|path| *path != self.base).collect())
    }
}

/// The pin of one direction in a pod's directory.
pub(super) fn pin_of(dir: &Path, direction: Direction) -> PathBuf {
    dir.join(match direction {
        Direction::Egress => "egress",
        Direction::Ingress => "ingress",
    })
}

/// Pins a program in the place of the one pinned at `path`; at every instant one
/// of the two is there.
pub(super) fn replace(program: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let next = path.with_file_name("next");
    match fs::remove_file(&next) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    bpf::pin(program, &next)?;
    fs::rename(&next, path)
}

/// Removes a directory and what is pinned in it. Done again it is success.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(list) => {
            let mut paths = list.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
            paths.sort();
            Ok(paths)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(sandbox: &str, ifname: &str, place: Place, endpoint: Endpoint) -> PinName {
        PinName { attachment: AttachmentId { sandbox: sandbox.into(), ifname: ifname.into() }, place, endpoint }
    }

    #[test]
    fn a_pin_name_has_no_dot_and_no_slash() {
        let encoded = name("../a.b", "eth0.1", Place::HostSide, 7).encode().unwrap();
        assert_eq!(encoded, "%2E%2E%2Fa%2Eb+eth0%2E1+h7");
    }

    #[test]
    fn names_that_no_attachment_has_are_not_decoded() {
        for bad in
            ["", "a", "a+b", "a+b+h", "a+b+h0", "a+b+x1", "a+b+h1+", "a+b+p1", "a+b+h2147483648", "+b+h1", "a++h1"]
        {
            assert_eq!(PinName::decode(bad), None, "{bad:?}");
        }
        for other_spelling in ["a+b+h01", "a+b+h+1", "%61+b+h1", "a+b%2e+h1"] {
            assert_eq!(PinName::decode(other_spelling), None, "{other_spelling:?}");
        }
    }

    #[test]
    fn a_name_longer_than_a_directory_entry_is_refused() {
        assert_eq!(name(&"x".repeat(256), "eth0", Place::HostSide, 1).encode(), None);
    }

    proptest! {
        #[test]
        fn every_attachment_reads_back_from_its_pin_name(
            sandbox in ".{1,40}", ifname in ".{1,5}", in_pod: bool, number in 1u32..IN_POD,
        ) {
            let place = if in_pod { Place::InPod } else { Place::HostSide };
            let endpoint = if in_pod { number | IN_POD } else { number };
            let wanted = name(&sandbox, &ifname, place, endpoint);
            if let Some(encoded) = wanted.encode() {
                prop_assert_eq!(PinName::decode(&encoded), Some(wanted));
            }
        }

        #[test]
        fn decoding_garbage_does_not_panic(garbage in ".{0,300}") {
            let _ = PinName::decode(&garbage);
        }
    }
}
