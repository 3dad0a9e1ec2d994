//! Maps whose types are not this build's, or do not matter: counted, copied from
//! one layout to another, summed up, all as bytes.
//!
//! Owner: whoever owns the map, as in [`super::batch`].

use std::io;
use std::os::fd::BorrowedFd;

use super::batch::{Cursor, ElemAttr, MAP_GET_NEXT_KEY, MAP_LOOKUP_ELEM, MAP_UPDATE_ELEM, is_unsupported, lookup};
use super::{bpf, raw};

/// How many entries a map has; `value_size` is what the kernel copies for one
/// (of all CPUs, for a map that has one value for each).
pub fn count(map: BorrowedFd<'_>, key_size: usize, value_size: usize) -> io::Result<usize> {
    let (mut all, mut at, mut room) = (0, Cursor::default(), 1024);
    loop {
        // Words, so that the kernel's copies are aligned whatever they are of.
        let mut keys = vec![0u64; (room * key_size).div_ceil(8)];
        let mut values = vec![0u64; (room * value_size).div_ceil(8)];
        let (keys_at, values_at) = (keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64);
        // SAFETY: both have room for that many elements of these sizes.
        match unsafe { lookup(map, key_size, &mut at, keys_at, values_at, room) } {
            Ok((n, last)) => {
                all += n;
                if last {
                    return Ok(all);
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => room *= 2,
            Err(e) if at.first && is_unsupported(&e) => return walk_keys(map, key_size),
            Err(e) => return Err(e),
        }
    }
}

/// As [`count`], where there are no batch calls.
fn walk_keys(map: BorrowedFd<'_>, key_size: usize) -> io::Result<usize> {
    let (mut key, mut next) = (vec![0u8; key_size], vec![0u8; key_size]);
    let mut all = 0;
    loop {
        let mut attr = ElemAttr {
            map_fd: raw(map),
            key: if all == 0 { 0 } else { key.as_ptr() as u64 },
            value: next.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: both outlive the call and have the key's size.
        match unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => all += 1,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(all),
            Err(e) => return Err(e),
        }
        std::mem::swap(&mut key, &mut next);
    }
}

/// The sum over all CPUs of a number in a per-CPU array.
pub fn sum_per_cpu(map: BorrowedFd<'_>, index: u32, cpus: usize) -> io::Result<u64> {
    let mut values = vec![0u64; cpus];
    let mut attr = ElemAttr {
        map_fd: raw(map),
        key: &raw const index as u64,
        value: values.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the key is readable; the value has room for one number of each
    // possible CPU, which is what the kernel copies.
    unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) }?;
    Ok(values.iter().sum())
}

/// What an entry of one map is in another of a newer layout; `None` drops it.
pub type Convert = fn(key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)>;

/// The sizes of a map's keys and values.
pub type Sizes = (usize, usize);

/// Copies what is in `from` to `to`; entries that are there already stay as they
/// are if `keep`. How many were copied. For hashes that are not per CPU.
pub fn copy(
    from: (BorrowedFd<'_>, Sizes),
    to: (BorrowedFd<'_>, Sizes),
    convert: Convert,
    keep: bool,
) -> io::Result<usize> {
    const NOEXIST: u64 = 1;
    const ROOM: usize = 1024;
    let ((old, (old_key, old_value)), (new, (new_key, new_value))) = (from, to);
    let (mut copied, mut at, mut room) = (0, Cursor::default(), ROOM);
    loop {
        let (mut keys, mut values) = (vec![0u8; room * old_key], vec![0u8; room * old_value]);
        let (keys_at, values_at) = (keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64);
        // SAFETY: both have room for that many elements of the old map's sizes,
        // which the caller has read from it.
        let (n, last) = match unsafe { lookup(old, old_key, &mut at, keys_at, values_at, room) } {
            Ok(read) => read,
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(e) => return Err(e),
        };
        for (key, value) in keys.chunks_exact(old_key).zip(values.chunks_exact(old_value)).take(n) {
            let Some((key, value)) = convert(key, value) else { continue };
            if (key.len(), value.len()) != (new_key, new_value) {
                return Err(io::Error::other("converted to entries of other sizes than the map's"));
            }
            let mut attr = ElemAttr {
                map_fd: raw(new),
                key: key.as_ptr() as u64,
                value: value.as_ptr() as u64,
                flags: if keep { NOEXIST } else { 0 },
                ..Default::default()
            };
            // SAFETY: key and value outlive the call and have the new map's sizes,
            // compared above.
            match unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) } {
                Ok(_) => copied += 1,
                Err(e) if keep && e.raw_os_error() == Some(libc::EEXIST) => {}
                Err(e) => return Err(e),
            }
        }
        if last {
            return Ok(copied);
        }
    }
}
