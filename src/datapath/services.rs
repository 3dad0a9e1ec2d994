//! The kernel's side of [`ServiceMaps`]: one batch call for a chunk.
//!
//! Owner: the worker of ServiceMap. Holds descriptors of its own, so that the
//! pinned maps are written without the lock of `Datapath`.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};

use fairway_ebpf_abi::{BACKENDS, Backend, FRONTENDS, Frontend, FrontendKey, SLOTS, SOURCE_RANGES, SlotKey, TrieKey};

use super::DatapathError;
use super::pins::Pins;
use crate::service::maps::{Chunk, ReadFailed, ServiceMaps, Tables, WriteFailed};
use crate::service::model::Range;
use crate::sys::bpf::{self, Batch};

/// The service maps as they are pinned.
pub struct KernelMaps {
    frontends: OwnedFd,
    slots: OwnedFd,
    backends: OwnedFd,
    ranges: OwnedFd,
}

impl KernelMaps {
    /// The maps have been compared with what this build takes them for.
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let open = |name| {
            let path = pins.map(name);
            bpf::open_pinned(&path).map_err(|cause| DatapathError::Pins { path, cause })
        };
        Ok(Self {
            frontends: open(FRONTENDS)?,
            slots: open(SLOTS)?,
            backends: open(BACKENDS)?,
            ranges: open(SOURCE_RANGES)?,
        })
    }

    fn frontends(&self) -> Batch<'_, FrontendKey, Frontend> {
        Batch::of(self.frontends.as_fd())
    }

    fn slots(&self) -> Batch<'_, SlotKey, Backend> {
        Batch::of(self.slots.as_fd())
    }

    fn backends(&self) -> Batch<'_, u32, Backend> {
        Batch::of(self.backends.as_fd())
    }

    fn ranges(&self) -> Batch<'_, TrieKey, u32> {
        Batch::of(self.ranges.as_fd())
    }

    fn read(&self) -> std::io::Result<Tables> {
        let ranges: BTreeSet<Range> =
            self.ranges().read_all()?.iter().map(|(k, _)| Range { prefix: k.prefix, key: k.key }).collect();
        Ok(Tables {
            frontends: self.frontends().read_all()?.into_iter().collect(),
            slots: self.slots().read_all()?.into_iter().collect(),
            backends: self.backends().read_all()?.into_iter().collect(),
            ranges,
        })
    }
}

impl ServiceMaps for KernelMaps {
    fn read_all(&mut self) -> Result<Tables, ReadFailed> {
        self.read().map_err(|e| ReadFailed(e.to_string()))
    }

    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), WriteFailed> {
        let wire = |ranges: &[Range]| -> Vec<TrieKey> {
            ranges.iter().map(|r| TrieKey { prefix: r.prefix, key: r.key }).collect()
        };
        let done = match chunk {
            Chunk::PutBackends(c) => self.backends().put(&c.iter().map(|b| b.id).collect::<Vec<_>>(), c),
            Chunk::PutSlots(c) => {
                let (keys, values): (Vec<_>, Vec<_>) = c.iter().copied().unzip();
                self.slots().put(&keys, &values)
            }
            Chunk::PutRanges(c) => self.ranges().put(&wire(c), &vec![0; c.len()]),
            Chunk::PutFrontends(c) => {
                let (keys, values): (Vec<_>, Vec<_>) = c.iter().copied().unzip();
                self.frontends().put(&keys, &values)
            }
            Chunk::DeleteFrontends(c) => self.frontends().delete(c),
            Chunk::DeleteSlots(c) => self.slots().delete(c),
            Chunk::DeleteRanges(c) => self.ranges().delete(&wire(c)),
            Chunk::DeleteBackends(c) => self.backends().delete(c),
        };
        done.map_err(|(index, e)| WriteFailed { index, cause: said(&chunk, &e) })
    }
}

fn said(chunk: &Chunk<'_>, e: &std::io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => format!("the kernel's map of {} is full", chunk.table()),
        Some(libc::ENOMEM) => format!("the kernel has no memory for {}", chunk.table()),
        _ => e.to_string(),
    }
}
