//! Samples of what the packet path did, as they come out of the kernel's ring
//! buffer.
//!
//! Owner: whoever opened it; there must be one reader at a time, for what one has
//! taken no other sees. The buffer is pinned: what happened while no agent ran is
//! in it, as far as it had room.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use aya::maps::{Map, MapData, RingBuf};
use fairway_ebpf_abi::{SAMPLES, Sample};
use tokio::io::unix::AsyncFd;

use super::DatapathError;
use super::pins::Pins;
use crate::sys::readiness;

/// The buffer's reading end.
pub struct Samples(RingBuf<MapData>);

impl Samples {
    /// The map has been compared with what this build takes it for.
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let path = pins.map(SAMPLES);
        let unlike = |cause: String| DatapathError::Pins { path: path.clone(), cause: io::Error::other(cause) };
        let map = MapData::from_pin(&path).map_err(|e| unlike(e.to_string()))?;
        RingBuf::try_from(Map::RingBuf(map)).map(Self).map_err(|e| unlike(e.to_string()))
    }

    /// The oldest that is there.
    pub fn take(&mut self) -> Option<Sample> {
        loop {
            let entry = self.0.next()?;
            // Entries of another size are another version's: the layout's version
            // is part of the path, so there are none.
            if let Some(sample) = Sample::from_bytes(&entry) {
                return Some(sample);
            }
        }
    }

    /// To be waited for, in a Tokio runtime.
    pub fn listen(self) -> io::Result<Listening> {
        readiness::readable(self).map(Listening)
    }
}

impl AsRawFd for Samples {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

pub struct Listening(AsyncFd<Samples>);

impl Listening {
    /// The next one, when it comes. Given up half way nothing is lost.
    pub async fn next(&mut self) -> io::Result<Sample> {
        loop {
            if let Some(sample) = self.0.get_mut().take() {
                return Ok(sample);
            }
            let mut ready = self.0.readable_mut().await?;
            // Whoever finds the buffer empty has to look again after that is
            // noted: what comes in between tells of itself.
            match ready.get_inner_mut().take() {
                Some(sample) => return Ok(sample),
                None => ready.clear_ready(),
            }
        }
    }
}
