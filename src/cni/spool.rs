//! Releases that the agent could not take when kubelet asked for them.
//!
//! Owner: the shim writes, the agent's CniServer takes up; compiled into both
//! like `wire`, so std and serde only.
//!
//! Invariants: a release is on disk, flushed, before the shim tells kubelet
//! that the DEL is done. One file per attachment, named after it, so that
//! repeated DELs are one entry. A file appears under its name complete or not
//! at all. The spool is bounded by refusing, never by dropping.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::wire::{Request, WIRE_VERSION, container_id_fault, ifname_fault};

/// More pending releases than any node has pods: something is wrong, and
/// kubelet is told to try again instead.
pub const MAX_ENTRIES: usize = 4096;
const MAX_ENTRY: u64 = 128 << 10;
const SUFFIX: &str = ".del";

/// What is needed to release an attachment later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub wire: u32,
    pub container_id: String,
    pub ifname: String,
    #[serde(default)]
    pub netns: String,
    #[serde(default)]
    pub args: String,
}

impl Entry {
    pub fn of(request: &Request) -> Self {
        Self {
            wire: WIRE_VERSION,
            container_id: request.container_id.clone(),
            ifname: request.ifname.clone(),
            netns: request.netns.clone(),
            args: request.args.clone(),
        }
    }
}

/// A container id holds no `@`, so the first one separates.
pub fn file_name(container_id: &str, ifname: &str) -> String {
    format!("{container_id}@{ifname}{SUFFIX}")
}

/// The attachment that a file of the spool stands for, from its name alone: a
/// release survives even when the file's content does not.
pub fn parse_name(name: &str) -> Option<(&str, &str)> {
    let (id, ifname) = name.strip_suffix(SUFFIX)?.split_once('@')?;
    let ok = container_id_fault(id).is_none() && ifname_fault(ifname).is_none();
    ok.then_some((id, ifname))
}

/// Make the folder, and make sure it survives a crash of the machine.
pub fn prepare(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    match dir.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Make the release durable. Returns once it is on disk.
pub fn store(dir: &Path, entry: &Entry) -> io::Result<()> {
    prepare(dir)?;
    let name = file_name(&entry.container_id, &entry.ifname);
    let path = dir.join(&name);
    if !path.exists() && fs::read_dir(dir)?.take(MAX_ENTRIES + 1).count() > MAX_ENTRIES {
        return Err(io::Error::other(format!("{MAX_ENTRIES} releases are waiting in {}", dir.display())));
    }
    // Two shims may spool the same attachment at the same time.
    let draft = dir.join(format!(".{}.{}", std::process::id(), name));
    let written = write_durably(&draft, &serde_json::to_vec(entry)?).and_then(|()| fs::rename(&draft, &path));
    if let Err(e) = written {
        let _ = fs::remove_file(&draft);
        return Err(e);
    }
    File::open(dir)?.sync_all()
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// What waits, by file name. Drafts of a shim that was killed are not listed;
/// `sweep` removes them.
pub fn list(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in entries.take(2 * MAX_ENTRIES) {
        if let Ok(name) = entry?.file_name().into_string()
            && parse_name(&name).is_some()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Read an entry; a damaged or hostile file still names its attachment.
pub fn load(dir: &Path, name: &str) -> io::Result<Option<Entry>> {
    let Some((id, ifname)) = parse_name(name) else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    match File::open(dir.join(name)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?.take(MAX_ENTRY).read_to_end(&mut bytes)?,
    };
    let bare = || Entry {
        wire: WIRE_VERSION,
        container_id: id.to_owned(),
        ifname: ifname.to_owned(),
        netns: String::new(),
        args: String::new(),
    };
    let read = serde_json::from_slice::<Entry>(&bytes).ok();
    Ok(Some(read.filter(|e| e.container_id == id && e.ifname == ifname).unwrap_or_else(bare)))
}

/// The release is done.
pub fn remove(dir: &Path, container_id: &str, ifname: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(file_name(container_id, ifname))) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Remove drafts whose writer is gone. Call it when no shim can be at work on
/// one of this age.
pub fn sweep(dir: &Path, older_than: std::time::Duration) -> io::Result<usize> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        let draft = entry.file_name().as_encoded_bytes().starts_with(b".");
        let old = |p: &PathBuf| fs::metadata(p)?.modified()?.elapsed().map_err(io::Error::other);
        if draft && old(&entry.path()).is_ok_and(|age| age > older_than) {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str) -> Entry {
        Entry {
            wire: WIRE_VERSION,
            container_id: id.into(),
            ifname: "eth0".into(),
            netns: "/n".into(),
            args: "A=b".into(),
        }
    }

    #[test]
    fn what_is_stored_is_listed_loaded_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let spool = dir.path().join("a/b");
        store(&spool, &entry("c1")).unwrap();
        store(&spool, &entry("c1")).unwrap();
        assert_eq!(list(&spool).unwrap(), ["c1@eth0.del"]);
        assert_eq!(load(&spool, "c1@eth0.del").unwrap(), Some(entry("c1")));
        remove(&spool, "c1", "eth0").unwrap();
        remove(&spool, "c1", "eth0").unwrap();
        assert!(list(&spool).unwrap().is_empty());
    }

    #[test]
    fn a_release_survives_a_damaged_file() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [&b""[..], b"{", b"\xff\xff", b"{\"container_id\":\"other\"}"] {
            fs::write(dir.path().join("c1@eth0.del"), bytes).unwrap();
            let read = load(dir.path(), "c1@eth0.del").unwrap().unwrap();
            assert_eq!((read.container_id.as_str(), read.ifname.as_str()), ("c1", "eth0"));
        }
    }

    #[test]
    fn what_a_killed_shim_left_is_not_a_release_and_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".77.c1@eth0.del"), b"{").unwrap();
        fs::write(dir.path().join("readme"), b"").unwrap();
        fs::write(dir.path().join("..@eth0.del"), b"").unwrap();
        assert!(list(dir.path()).unwrap().is_empty());
        assert_eq!(sweep(dir.path(), std::time::Duration::from_secs(60)).unwrap(), 0, "its writer may live");
        assert_eq!(sweep(dir.path(), std::time::Duration::ZERO).unwrap(), 2);
        assert!(dir.path().join("readme").exists());
    }

    #[test]
    fn a_full_spool_refuses_and_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..=MAX_ENTRIES {
            fs::write(dir.path().join(file_name(&format!("c{n}"), "eth0")), b"").unwrap();
        }
        assert!(store(dir.path(), &entry("one-more")).is_err());
        assert!(store(dir.path(), &entry("c7")).is_ok(), "one that waits already may come again");
        assert_eq!(list(dir.path()).unwrap().len(), MAX_ENTRIES + 1);
    }
}
