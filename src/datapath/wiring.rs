//! The datapath as NetnsWirer's wiring threads use it.
//!
//! They come in parallel, in the node's namespace; the lock is held for the third
//! of a millisecond that an attachment takes.

use std::os::fd::AsFd;

use parking_lot::Mutex;

use super::{Attached, Counters, Datapath, DatapathError, Device};
use crate::model::{AttachMode, AttachmentId};
use crate::netns::{Attachment, PodPrograms};
use crate::sys::netns::Netns;

/// A [`Datapath`] for many threads.
pub struct PodDatapath(Mutex<Datapath>);

impl PodDatapath {
    pub fn new(datapath: Datapath) -> Self {
        Self(Mutex::new(datapath))
    }

    /// As [`Datapath::attached`].
    pub fn attached(&self) -> Result<Vec<Attached>, DatapathError> {
        self.0.lock().attached()
    }

    /// As [`Datapath::counters`].
    pub fn counters(&self) -> Result<Vec<(AttachmentId, Counters)>, DatapathError> {
        self.0.lock().counters()
    }

    /// As [`Datapath::retain`].
    pub fn retain(&self, live: impl Fn(&AttachmentId) -> bool) -> Result<Vec<AttachmentId>, DatapathError> {
        self.0.lock().retain(live)
    }

    /// Hands the device that carries the programs to `job`; `None` when it is one
    /// that would lose them by moving and has yet to move.
    fn at_device<R>(
        &self,
        to: &Attachment<'_>,
        job: impl FnOnce(&mut Datapath, Device<'_>) -> Result<R, DatapathError>,
    ) -> Result<Option<R>, String> {
        let mut datapath = self.0.lock();
        let text = |e: DatapathError| e.to_string();
        match (to.lease.mode, to.eni_ifindex) {
            (AttachMode::Veth, _) => job(&mut datapath, Device::index(to.host_ifindex)).map(Some).map_err(text),
            (AttachMode::Exclusive, Some(_)) if !datapath.moves_with_device() => Ok(None),
            (AttachMode::Exclusive, Some(eni)) => job(&mut datapath, Device::index(eni)).map(Some).map_err(text),
            (AttachMode::Exclusive, None) => {
                let netns = Netns::open(&to.lease.netns).map_err(|e| e.to_string())?;
                let device = Device::named(&to.lease.attachment.ifname).inside(netns.as_fd());
                job(&mut datapath, device).map(Some).map_err(text)
            }
        }
    }
}

impl PodPrograms for PodDatapath {
    fn attach(&self, to: &Attachment<'_>) -> Result<(), String> {
        let (attachment, mode) = (&to.lease.attachment, to.lease.mode);
        self.at_device(to, |datapath, device| datapath.attach(attachment, mode, device)).map(|_| ())
    }

    fn detach(&self, from: &AttachmentId) -> Result<(), String> {
        self.0.lock().detach(from).map_err(|e| e.to_string())
    }

    fn verify(&self, of: &Attachment<'_>) -> Result<Vec<String>, String> {
        let on = self.at_device(of, |datapath, device| datapath.verify(&of.lease.attachment, device))?;
        Ok(match on {
            Some(true) => Vec::new(),
            Some(false) => vec![format!("the programs of {} are not on its device", of.lease.attachment)],
            None => vec![format!("the ENI of {} has not moved into the pod", of.lease.attachment)],
        })
    }

    fn pinned(&self) -> Result<Vec<String>, String> {
        let attached = self.attached().map_err(|e| e.to_string())?;
        Ok(attached.into_iter().map(|a| a.attachment.to_string()).collect())
    }
}
