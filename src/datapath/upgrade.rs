//! From one layout of the maps to the next, without a gap.
//!
//! A map that is the same in both is carried over: the same map is pinned in the
//! new directory too, and old and new programs share it. One that has changed is
//! made anew, its entries converted where somebody has written down how; the rest
//! has to be filled from what the cluster and the leases say. Until that is done
//! the old programs stay where they are, with the old maps
//! (docs/decisions/0009). The old directory is there as long as that is not
//! finished: a start after a crash takes up where the last one ended.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use aya::maps::MapInfo;
use fairway_ebpf_abi::{
    BACKENDS, Backend, CLASS_NETS, CLASSES, FRONTENDS, LAYOUT_VERSION, LINKS, NAMESPACES, NODE, PODS, RULES, SLOTS,
    SOURCE_RANGES, SlotKey,
};

use super::pins::Pins;
use super::programs;
use crate::service::diff::{BACKEND_MARK, SET_MARK};
use crate::sys::bpf::{self, Batch, Convert};

/// Maps that speak of one another: they are carried over together or not at all.
const TOGETHER: [&[&str]; 2] = [&[FRONTENDS, SLOTS, BACKENDS, SOURCE_RANGES], &[LINKS, PODS, NAMESPACES]];
/// Maps that are filled from Services, and from the leases of pods.
const OF_SERVICES: [&str; 4] = [FRONTENDS, SLOTS, BACKENDS, SOURCE_RANGES];
const OF_POLICIES: [&str; 3] = [CLASSES, CLASS_NETS, RULES];
const OF_PODS: [&str; 4] = [LINKS, PODS, NAMESPACES, NODE];

/// What an entry of a map in an older layout is in this one.
#[derive(Clone, Copy, Debug)]
pub struct Converter {
    pub map: &'static str,
    pub from: u32,
    pub to: u32,
    pub entry: Convert,
}

/// Every change of layout that can be gone through with its entries.
pub const CONVERTERS: &[Converter] = &[];

/// Which layout the maps have.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub version: u32,
    /// Maps that count as changed although they look the same: what an entry means
    /// has changed.
    pub changed: &'static [&'static str],
    pub converters: &'static [Converter],
}

impl Layout {
    pub const CURRENT: Layout = Layout { version: LAYOUT_VERSION, changed: &[], converters: CONVERTERS };
}

impl Default for Layout {
    fn default() -> Self {
        Self::CURRENT
    }
}

/// How far the way from an older layout is.
#[derive(Debug, Default)]
pub(super) struct Upgrade {
    /// The older one, while it is there.
    from: Option<(u32, PathBuf)>,
    /// Maps that were made anew although there were earlier ones.
    emptied: BTreeSet<&'static str>,
    pub carried: usize,
}

impl Upgrade {
    /// Before anything is loaded: carries over what is the same. `replaced` are
    /// maps of this very layout that were not what they should be.
    pub(super) fn begin(pins: &Pins, layout: &Layout, replaced: &[&'static str]) -> io::Result<Self> {
        let mut upgrade = Self { emptied: replaced.iter().copied().collect(), ..Self::default() };
        upgrade.close();
        // What spoke of one that is gone goes with it; earlier programs keep theirs.
        for name in &upgrade.emptied {
            match fs::remove_file(pins.map(name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        let Some((version, dir)) = pins.predecessor()? else { return Ok(upgrade) };
        let mut alike = Vec::new();
        for name in programs::names() {
            let theirs = dir.join("maps").join(name);
            if !fs::exists(&theirs)? {
                continue;
            }
            if layout.changed.contains(&name) || programs::mismatch(name, &theirs)?.is_some() {
                upgrade.emptied.insert(name);
            } else {
                alike.push((name, theirs));
            }
        }
        upgrade.close();
        for (name, theirs) in alike.into_iter().filter(|(name, _)| !upgrade.emptied.contains(name)) {
            let (map, ours) = (bpf::open_pinned(&theirs)?, pins.map(name));
            // Of an earlier try.
            match fs::remove_file(&ours) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            bpf::pin(map.as_fd(), &ours)?;
            upgrade.carried += 1;
        }
        pins.take_sockets(&dir)?;
        upgrade.from = Some((version, dir));
        Ok(upgrade)
    }

    fn close(&mut self) {
        for group in TOGETHER {
            if group.iter().any(|name| self.emptied.contains(name)) {
                self.emptied.extend(group);
            }
        }
    }

    /// The new maps are there: what can be converted is. Done again it brings what
    /// has changed in the old ones; with `keep` only what is not in the new ones.
    pub(super) fn convert(&self, pins: &Pins, layout: &Layout, keep: bool) -> io::Result<()> {
        let Some((version, dir)) = &self.from else { return Ok(()) };
        let known = |c: &&Converter| (c.from, c.to) == (*version, layout.version) && self.emptied.contains(c.map);
        for converter in layout.converters.iter().filter(known) {
            let (theirs, ours) = (dir.join("maps").join(converter.map), pins.map(converter.map));
            let sizes = |path: &PathBuf| -> io::Result<_> {
                let info = MapInfo::from_pin(path).map_err(io::Error::other)?;
                Ok((info.key_size() as usize, info.value_size() as usize))
            };
            let (old, new) = (bpf::open_pinned(&theirs)?, bpf::open_pinned(&ours)?);
            let copied =
                bpf::copy((old.as_fd(), sizes(&theirs)?), (new.as_fd(), sizes(&ours)?), converter.entry, keep)?;
            tracing::info!(map = converter.map, from = version, to = layout.version, copied, "Converted a map");
        }
        Ok(())
    }

    /// Numbers that backends of the old tables had are not given to others: flows
    /// and affinities, which are carried over, still mean them.
    pub(super) fn keep_marks(&self, pins: &Pins) -> io::Result<()> {
        let Some((_, dir)) = self.from.as_ref().filter(|_| self.emptied.contains(SLOTS)) else { return Ok(()) };
        let theirs = dir.join("maps").join(SLOTS);
        if programs::mismatch(SLOTS, &theirs)?.is_some() {
            return Ok(());
        }
        let (old, new) = (bpf::open_pinned(&theirs)?, bpf::open_pinned(&pins.map(SLOTS))?);
        let (old, new) = (Batch::<SlotKey, Backend>::of(old.as_fd()), Batch::<SlotKey, Backend>::of(new.as_fd()));
        for mark in [BACKEND_MARK, SET_MARK] {
            if let (Some(value), None) = (old.get(&mark)?, new.get(&mark)?) {
                new.put(&[mark], &[value]).map_err(|(_, e)| e)?;
            }
        }
        Ok(())
    }

    /// Maps that are empty and would be missed.
    pub(super) fn awaits(&self) -> Awaits {
        Awaits {
            services: OF_SERVICES.iter().any(|name| self.emptied.contains(name)),
            pods: OF_PODS.iter().any(|name| self.emptied.contains(name)),
            policies: OF_POLICIES.iter().any(|name| self.emptied.contains(name)),
        }
    }

    /// Whether what is known of pods begins anew.
    pub(super) fn forgets_pods(&self) -> bool {
        self.emptied.contains(LINKS)
    }

    pub(super) fn emptied(&self) -> impl Iterator<Item = &'static str> {
        self.emptied.iter().copied()
    }
}

/// What has to be written before the new programs can take over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Awaits {
    /// Services, by a complete sync.
    pub services: bool,
    /// Pods and their ways, by wiring each again.
    pub pods: bool,
    /// Policies' tables, by a complete look.
    pub policies: bool,
}

impl Awaits {
    pub fn any(&self) -> bool {
        self.services || self.pods || self.policies
    }
}
