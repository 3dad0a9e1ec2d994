//! An archive in the form the kernel unpacks at boot: cpio, "newc".

use std::collections::BTreeSet;

const FILE: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;
const DEVICE: u32 = 0o020_000;
const SYMLINK: u32 = 0o120_000;

#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    number: u32,
    there: BTreeSet<String>,
}

impl Archive {
    /// A file that everybody may read and run, with the folders above it. Added
    /// again it changes nothing.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        if self.parents(path) {
            self.entry(path, FILE | 0o755, (0, 0), content);
        }
    }

    pub fn folder(&mut self, path: &str) {
        if self.parents(path) {
            self.entry(path, FOLDER | 0o755, (0, 0), b"");
        }
    }

    pub fn symlink(&mut self, path: &str, to: &str) {
        if self.parents(path) {
            self.entry(path, SYMLINK | 0o777, (0, 0), to.as_bytes());
        }
    }

    /// A character device.
    pub fn device(&mut self, path: &str, numbers: (u32, u32)) {
        if self.parents(path) {
            self.entry(path, DEVICE | 0o600, numbers, b"");
        }
    }

    pub fn contains(&self, path: &str) -> bool {
        self.there.contains(path)
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("/TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }

    /// False when `path` is there already.
    fn parents(&mut self, path: &str) -> bool {
        let above: Vec<&str> = path.match_indices('/').skip(1).map(|(at, _)| &path[..at]).collect();
        for folder in above {
            if self.there.insert(folder.to_owned()) {
                self.entry(folder, FOLDER | 0o755, (0, 0), b"");
            }
        }
        self.there.insert(path.to_owned())
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let name = path.trim_start_matches('/');
        self.number += 1;
        let size = u32::try_from(content.len()).expect("a file below 4 GB");
        // inode, mode, uid, gid, links, mtime, size, device of the file system,
        // device of the node, length of the name, checksum.
        let (major, minor) = device;
        let fields = [self.number, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
