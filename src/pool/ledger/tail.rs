//! What was written since the database was: a file that only grows, in the
//! ledger's folder.
//!
//! A write to it is one system call and outlives the process, whatever kills it;
//! the database takes two flushes and its own threads for the same. What must
//! outlive the machine at once goes to the database instead, and takes along
//! what is here. Every frame carries the number of the tail it belongs to: the
//! database knows the number of the present one, so that a tail that it has
//! taken in already is never read again.
//!
//! Invariant: a frame that is not whole, and all that follows it, was never
//! acknowledged, or its disk is damaged; what came before it stands.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::Write;

pub(super) const FILE: &str = "tail";
/// Number, length of the body, start of the digest over both and the body.
const HEAD: usize = 8 + 4 + 8;
/// No batch comes near; a length beyond it is damage.
const LONGEST: usize = 16 << 20;

pub(super) struct Tail {
    file: File,
    len: u64,
    number: u64,
}

impl Tail {
    /// Open the tail with this number in a folder that exists, and read what is
    /// in it. One with another number is emptied.
    pub(super) fn open(folder: &Path, number: u64) -> io::Result<(Self, Vec<Write>)> {
        let path = folder.join(FILE);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let (writes, whole) = read(&bytes, number);
        if whole < bytes.len() {
            file.set_len(whole as u64)?;
        }
        Ok((Self { file, len: whole as u64, number }, writes))
    }

    /// All of it or nothing, and after a failure nothing more.
    pub(super) fn append(&mut self, writes: &[Write]) -> io::Result<()> {
        let frame = frame(self.number, &encode(writes)?);
        self.file.write_all_at(&frame, self.len)?;
        self.len += frame.len() as u64;
        Ok(())
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Begin again, empty, with a number that the database knows.
    pub(super) fn restart(&mut self, number: u64) {
        self.number = number;
        self.len = 0;
        // If it cannot be cut, its frames have an old number all the same.
        let _ = self.file.set_len(0);
    }
}

/// What the bytes of a tail say, and how many of them are whole frames.
pub(crate) fn read(bytes: &[u8], number: u64) -> (Vec<Write>, usize) {
    let mut writes = Vec::new();
    let mut rest = bytes;
    while let Some((frame, after)) = next(rest, number) {
        writes.extend(frame);
        rest = after;
    }
    (writes, bytes.len() - rest.len())
}

pub(crate) fn frame(number: u64, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + body.len());
    frame.extend(number.to_be_bytes());
    frame.extend((body.len() as u32).to_be_bytes());
    frame.extend(digest(number, body));
    frame.extend(body);
    frame
}

/// Values are text, as `records` makes them; as text they are half as long and
/// written in a fifth of the time.
pub(crate) fn encode(writes: &[Write]) -> io::Result<Vec<u8>> {
    let text = |(key, value): &Write| -> io::Result<(String, Option<String>)> {
        let value = value.as_ref().map(|v| String::from_utf8(v.clone())).transpose().map_err(io::Error::other)?;
        Ok((key.clone(), value))
    };
    Ok(serde_json::to_vec(&writes.iter().map(text).collect::<io::Result<Vec<_>>>()?)?)
}

fn decode(body: &[u8]) -> Option<Vec<Write>> {
    let writes: Vec<(String, Option<String>)> = serde_json::from_slice(body).ok()?;
    Some(writes.into_iter().map(|(key, value)| (key, value.map(String::into_bytes))).collect())
}

fn digest(number: u64, body: &[u8]) -> [u8; 8] {
    let mut hash = Sha256::new();
    hash.update(number.to_be_bytes());
    hash.update(body);
    let mut start = [0; 8];
    start.copy_from_slice(&hash.finalize()[..8]);
    start
}

/// The first frame, if it is whole and of this tail.
fn next(bytes: &[u8], number: u64) -> Option<(Vec<Write>, &[u8])> {
    let head = bytes.get(..HEAD)?;
    let len = u32::from_be_bytes(head[8..12].try_into().ok()?) as usize;
    if head[..8] != number.to_be_bytes() || len > LONGEST {
        return None;
    }
    let body = bytes.get(HEAD..HEAD + len)?;
    if head[12..] != digest(number, body) {
        return None;
    }
    Some((decode(body)?, &bytes[HEAD + len..]))
}
