//! This build's programs in the place of earlier ones: at once where both use the
//! same maps, else when the new maps are filled.
//!
//! Each device and each door is swapped atomically; all of them together take some
//! milliseconds, in which old and new programs work side by side, each on its own
//! maps.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use super::entry::Entry;
use super::hook::{Direction, Place};
use super::pins::{self, pin_of};
use super::upgrade::Upgrade;
use super::{Datapath, DatapathError, Uplink, Via, clsact, sockets};
use crate::model::AttachmentId;
use crate::sys::bpf;

/// What waits for the take-over.
#[derive(Debug)]
pub(super) struct Held {
    upgrade: Upgrade,
    /// Attachments that run an earlier process's programs.
    pub earlier: BTreeSet<AttachmentId>,
    /// The root of the cgroup tree, once asked for.
    pub sockets: Option<PathBuf>,
    pub guard: Option<PathBuf>,
    /// What was asked for meanwhile: ENIs, links of pods with an ENI of their own,
    /// and which device is the node's own.
    pub enis: BTreeSet<u32>,
    pub links: BTreeSet<u32>,
    pub uplink: Option<Option<Uplink>>,
}

impl Held {
    pub(super) fn new(upgrade: Upgrade) -> Self {
        Self {
            upgrade,
            earlier: BTreeSet::new(),
            sockets: None,
            guard: None,
            enis: BTreeSet::new(),
            links: BTreeSet::new(),
            uplink: None,
        }
    }
}

impl Datapath {
    /// Whether earlier programs are in force until [`Datapath::take_over`].
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Puts this build's programs in force everywhere, and removes what only the
    /// earlier ones used. Says which attachments could not be taken over: these are
    /// taken off. After an error it may be tried again.
    pub fn take_over(&mut self) -> Result<Vec<String>, DatapathError> {
        let Some(held) = self.held.take() else { return Ok(Vec::new()) };
        match self.swap(&held) {
            Ok(left) => {
                self.ways.settled();
                Ok(left)
            }
            Err(e) => {
                self.held = Some(held);
                Err(e)
            }
        }
    }

    fn swap(&mut self, held: &Held) -> Result<Vec<String>, DatapathError> {
        let layout = self.layout;
        let maps = |cause| DatapathError::Pins { path: self.pins.map(""), cause };
        // What has changed in the old maps since they were converted.
        held.upgrade.convert(&self.pins, &layout, false).map_err(maps)?;
        let mut left = Vec::new();
        for attachment in &held.earlier {
            let Some(entry) = self.known.get(attachment) else { continue };
            let (place, endpoint, dir) = (entry.place, entry.endpoint, entry.dir.clone());
            let entry = Entry { place, endpoint, dir };
            let updated = entry.describe(attachment).and_then(|attached| self.update(&entry, attached.via));
            if let Err(e) = updated {
                tracing::warn!(%attachment, error = %e, "A pod's programs cannot be taken over; they are removed");
                left.push(format!("{attachment}: {e}"));
                self.detach(attachment)?;
            }
        }
        if let Some(root) = &held.sockets {
            sockets::attach(&self.pins, &mut self.shared, root)?;
        }
        if let Some(root) = &held.guard {
            sockets::attach_guard(&self.pins, &mut self.shared, root)?;
        }
        if let Some(uplink) = held.uplink {
            self.set_uplink(uplink)?;
        }
        // Devices that have gone meanwhile are nobody's loss.
        for ifindex in &held.enis {
            if let Err(e) = self.attach_eni(*ifindex) {
                tracing::warn!(ifindex, error = %e, "An ENI's program cannot be taken over");
            }
        }
        for ifindex in &held.links {
            if let Err(e) = self.attach_link(*ifindex) {
                tracing::warn!(ifindex, error = %e, "A link's program cannot be taken over");
            }
        }
        self.renew_links()?;
        // And what the old programs wrote while they were being replaced.
        let maps = |cause| DatapathError::Pins { path: self.pins.map(""), cause };
        held.upgrade.convert(&self.pins, &layout, true).map_err(maps)?;
        for version in self.pins.other_versions().map_err(maps)? {
            pins::remove(&version).map_err(maps)?;
        }
        let carried = held.upgrade.carried;
        if carried > 0 {
            let anew = held.upgrade.emptied().collect::<Vec<_>>().join(" ");
            tracing::info!(layout = layout.version, carried, anew, "An earlier layout of the maps is taken over");
        }
        Ok(left)
    }

    /// Whether doors on the cgroup tree are pinned.
    pub(super) fn has_sockets(&self) -> bool {
        !sockets::attached(&self.pins).is_empty()
    }

    /// Swaps this build's programs in, where they can be reached.
    fn update(&mut self, entry: &Entry, via: Via) -> Result<(), DatapathError> {
        if (via, entry.place) == (Via::Clsact, Place::InPod) {
            return Ok(());
        }
        let pins = |cause| DatapathError::Pins { path: entry.dir.clone(), cause };
        let mut own;
        let programs = match entry.place {
            Place::HostSide => &mut self.shared,
            Place::InPod => {
                own = self.loader.load(entry.endpoint)?;
                &mut own
            }
        };
        let pair = programs.pair(entry.place)?;
        for (direction, (fd, _)) in Direction::BOTH.into_iter().zip(&pair) {
            let pin = pin_of(&entry.dir, direction);
            match via {
                Via::Tcx => bpf::open_pinned(&pin).and_then(|link| bpf::link_update(link.as_fd(), *fd)),
                Via::Clsact => pins::replace(*fd, &pin),
            }
            .map_err(pins)?;
        }
        match via {
            Via::Tcx => Ok(()),
            Via::Clsact => clsact::attach(&pair, entry.endpoint).map_err(pins),
        }
    }
}
