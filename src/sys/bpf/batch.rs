//! Many entries of a map in one system call.
//!
//! Owner: whoever owns the map. A table that programs write to meanwhile is read
//! as it changes: what is in it all along is seen, what comes or goes may not be.

use std::io;
use std::os::fd::BorrowedFd;

use super::{bpf, raw};

pub(super) const MAP_LOOKUP_ELEM: libc::c_long = 1;
pub(super) const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
pub(super) const MAP_GET_NEXT_KEY: libc::c_long = 4;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const MAP_DELETE_BATCH: libc::c_long = 27;

/// The kernel has no batch calls, or not for this type of map (its ENOTSUPP has
/// no name in libc).
pub(super) fn is_unsupported(e: &io::Error) -> bool {
    const ENOTSUPP: i32 = 524;
    matches!(e.raw_os_error(), Some(ENOTSUPP | libc::EINVAL | libc::EOPNOTSUPP))
}

/// `struct { … } batch` of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
pub(super) struct BatchAttr {
    pub(super) in_batch: u64,
    pub(super) out_batch: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) count: u32,
    pub(super) map_fd: u32,
    pub(super) elem_flags: u64,
    pub(super) flags: u64,
}

/// The `MAP_*_ELEM` commands' member.
#[repr(C)]
#[derive(Default)]
pub(super) struct ElemAttr {
    pub(super) map_fd: u32,
    pub(super) _pad: u32,
    pub(super) key: u64,
    /// The next key, for `MAP_GET_NEXT_KEY`.
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// Entries of a map of which many are read or written at once. Kernels without
/// batch calls for its type (hashes: before 5.6; LPM tries: before 5.14) are served
/// one entry at a time.
///
/// `K` and `V` must be what the map was made with: whoever opens one has compared
/// its sizes.
pub struct Batch<'a, K, V> {
    map: BorrowedFd<'a>,
    kinds: std::marker::PhantomData<(K, V)>,
}

impl<'a, K: aya::Pod, V: aya::Pod> Batch<'a, K, V> {
    pub fn of(map: BorrowedFd<'a>) -> Self {
        Self { map, kinds: std::marker::PhantomData }
    }

    /// Puts every entry, in order. An error says how many were put before it.
    pub fn put(&self, keys: &[K], values: &[V]) -> Result<(), (usize, io::Error)> {
        assert_eq!(keys.len(), values.len(), "a value for every key");
        self.many(MAP_UPDATE_BATCH, keys, values.as_ptr() as u64, |i| self.put_one(&keys[i], &values[i]))
    }

    /// Removes every entry; one that is not there is removed.
    pub fn delete(&self, keys: &[K]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        while done < keys.len() {
            let rest = &keys[done..];
            match self.many(MAP_DELETE_BATCH, rest, 0, |i| self.delete_one(&rest[i])) {
                Ok(()) => return Ok(()),
                Err((n, e)) if e.raw_os_error() == Some(libc::ENOENT) => done += n + 1,
                Err((n, e)) => return Err((done + n, e)),
            }
        }
        Ok(())
    }

    fn many(
        &self,
        command: libc::c_long,
        keys: &[K],
        values: u64,
        one: impl Fn(usize) -> io::Result<()>,
    ) -> Result<(), (usize, io::Error)> {
        if keys.is_empty() {
            return Ok(());
        }
        let mut attr = BatchAttr {
            keys: keys.as_ptr() as u64,
            values,
            count: u32::try_from(keys.len()).map_err(|e| (0, io::Error::other(e)))?,
            map_fd: raw(self.map),
            ..Default::default()
        };
        // SAFETY: the arrays outlive the call and have `count` elements of the
        // map's sizes; these commands only read them.
        match unsafe { bpf(command, &mut attr) } {
            Ok(_) => Ok(()),
            // Before it looks at a map without batch calls the kernel sets no count.
            Err(e) if is_unsupported(&e) && attr.count as usize == keys.len() => {
                (0..keys.len()).try_for_each(|i| one(i).map_err(|e| (i, e)))
            }
            Err(e) => Err((attr.count as usize, e)),
        }
    }

    fn put_one(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = ElemAttr {
            map_fd: raw(self.map),
            key: std::ptr::from_ref(key) as u64,
            value: std::ptr::from_ref(value) as u64,
            ..Default::default()
        };
        // SAFETY: key and value outlive the call and have the map's sizes.
        unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    fn delete_one(&self, key: &K) -> io::Result<()> {
        let key = std::ptr::from_ref(key) as u64;
        let mut attr = ElemAttr { map_fd: raw(self.map), key, ..Default::default() };
        // SAFETY: the key outlives the call and has the map's size.
        unsafe { bpf(MAP_DELETE_ELEM, &mut attr) }.map(drop)
    }

    /// Every entry. With writers at work some may be missed.
    pub fn read_all(&self) -> io::Result<Vec<(K, V)>>
    where
        K: Default,
        V: Default,
    {
        let (mut found, mut at) = (Vec::new(), Cursor::default());
        while !self.read_some(&mut at, 4096, &mut found)? {}
        Ok(found)
    }

    /// Some `room` entries from where `at` stands, which moves on; whether the
    /// end was reached, where the next reading begins anew. Without batch calls
    /// that is the whole map at once.
    pub fn read_some(&self, at: &mut Cursor, room: usize, found: &mut Vec<(K, V)>) -> io::Result<bool>
    where
        K: Default,
        V: Default,
    {
        let (mut keys, mut values) = (vec![K::default(); room], vec![V::default(); room]);
        loop {
            let (keys_at, values_at) = (keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64);
            // SAFETY: the arrays are writable for `keys.len()` elements of the map's
            // sizes, of which any bytes are a value.
            match unsafe { lookup(self.map, size_of::<K>(), at, keys_at, values_at, keys.len()) } {
                Ok((n, last)) => {
                    found.extend(keys.iter().copied().zip(values.iter().copied()).take(n));
                    return Ok(last);
                }
                // A bucket with more entries than there is room for.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    let room = keys.len() * 2;
                    keys.resize(room, K::default());
                    values.resize(room, V::default());
                }
                Err(e) if at.first && is_unsupported(&e) => {
                    found.extend(self.walk()?);
                    return Ok(true);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// One entry.
    pub fn get(&self, key: &K) -> io::Result<Option<V>>
    where
        V: Default,
    {
        let mut value = V::default();
        let mut attr = ElemAttr {
            map_fd: raw(self.map),
            key: std::ptr::from_ref(key) as u64,
            value: &raw mut value as u64,
            ..Default::default()
        };
        // SAFETY: the key is readable and the value writable, both of the map's
        // sizes; any bytes are a value.
        match unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) } {
            Ok(_) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Key by key.
    fn walk(&self) -> io::Result<Vec<(K, V)>>
    where
        K: Default,
        V: Default,
    {
        let mut found = Vec::new();
        let mut key: Option<K> = None;
        loop {
            let mut next = K::default();
            let mut attr = ElemAttr {
                map_fd: raw(self.map),
                key: key.as_ref().map_or(0, |key| std::ptr::from_ref(key) as u64),
                value: &raw mut next as u64,
                ..Default::default()
            };
            // SAFETY: both keys outlive the call and have the map's size.
            match unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) } {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
                Err(e) => return Err(e),
            }
            if let Some(value) = self.get(&next)? {
                found.push((next, value));
            }
            key = Some(next);
        }
    }
}

/// Where a reading of a map has come to.
#[derive(Clone, Debug)]
pub struct Cursor {
    pub(super) first: bool,
    /// A hash's is the number of a bucket, any other map's is a key.
    position: [u64; Self::WORDS],
}

impl Cursor {
    const WORDS: usize = 8;
}

impl Default for Cursor {
    fn default() -> Self {
        Self { first: true, position: [0; Self::WORDS] }
    }
}

/// Reads up to `count` entries; how many it was, and whether they were the last.
///
/// # Safety
/// `keys` and `values` must be writable for `count` elements of the map's sizes.
pub(super) unsafe fn lookup(
    map: BorrowedFd<'_>,
    key_size: usize,
    at: &mut Cursor,
    keys: u64,
    values: u64,
    count: usize,
) -> io::Result<(usize, bool)> {
    if key_size > size_of_val(&at.position) {
        return Err(io::Error::other("a key too large for a cursor"));
    }
    let mut to = [0; Cursor::WORDS];
    let mut attr = BatchAttr {
        in_batch: if at.first { 0 } else { at.position.as_ptr() as u64 },
        out_batch: to.as_mut_ptr() as u64,
        keys,
        values,
        count: u32::try_from(count).map_err(io::Error::other)?,
        map_fd: raw(map),
        ..Default::default()
    };
    // SAFETY: both positions have room for a bucket's number and for a key; the
    // caller vouches for the arrays.
    let last = match unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) } {
        Ok(_) => false,
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => true,
        Err(e) => return Err(e),
    };
    *at = if last { Cursor::default() } else { Cursor { first: false, position: to } };
    Ok((attr.count as usize, last))
}
