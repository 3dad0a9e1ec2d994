//! One attachment as its pins and the kernel tell it: what it is, whether it is
//! where it should be, and taking it off.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use fairway_ebpf_abi::Endpoint;

use super::hook::{self, Device, Direction, Place, chain};
use super::pins::{self, PinName, pin_of};
use super::{Attached, DatapathError, Via, clsact};
use crate::model::AttachmentId;
use crate::sys::bpf;

pub(super) struct Entry {
    pub place: Place,
    pub endpoint: Endpoint,
    pub dir: PathBuf,
}

impl Entry {
    /// For a directory that may not be an attachment's at all: what can be taken
    /// off by its name is.
    pub(super) fn unknown(dir: &Path) -> Self {
        let name = dir.file_name().and_then(|name| PinName::decode(name.to_str()?));
        let (place, endpoint) = name.map_or((Place::InPod, 0), |name| (name.place, name.endpoint));
        Self { place, endpoint, dir: dir.to_owned() }
    }

    /// An error when the pins are not a pair of one kind on the chains they should
    /// be on.
    pub(super) fn describe(&self, attachment: &AttachmentId) -> Result<Attached, DatapathError> {
        let wrong = |cause| DatapathError::Pins { path: self.dir.clone(), cause };
        let mut found = [None; 2];
        for (slot, direction) in found.iter_mut().zip(Direction::BOTH) {
            let object = bpf::open_pinned(&pin_of(&self.dir, direction)).map_err(wrong)?;
            *slot = match bpf::kind(object.as_fd()).map_err(wrong)? {
                bpf::Kind::Link => bpf::tcx_link(object.as_fd())
                    .map_err(wrong)?
                    .filter(|link| link.chain == chain(self.place, direction))
                    .map(|link| (Via::Tcx, link.ifindex, link.program_id)),
                bpf::Kind::Program => {
                    let program = bpf::program_id(object.as_fd()).map_err(wrong)?;
                    let here = self.place == Place::HostSide && nix::net::if_::if_indextoname(self.endpoint).is_ok();
                    Some((Via::Clsact, here.then_some(self.endpoint), program))
                }
                _ => None,
            };
        }
        match found {
            [Some((via, ifindex, egress)), Some((other, same, ingress))] if via == other && ifindex == same => {
                let mode = self.place.into();
                let programs = [egress, ingress];
                Ok(Attached { attachment: attachment.clone(), mode, via, ifindex, programs, short: false })
            }
            _ => Err(wrong(io::Error::other("the pins are not a pair of programs on one device"))),
        }
    }

    /// Whether there is still a device with something of ours on it. A host-side
    /// index alone would not do: another device may have it by now.
    pub(super) fn is_alive(&self) -> bool {
        let on_chain = |direction| -> io::Result<bool> {
            let object = bpf::open_pinned(&pin_of(&self.dir, direction))?;
            Ok(match (bpf::kind(object.as_fd())?, self.place) {
                (bpf::Kind::Link, Place::HostSide) => {
                    bpf::tcx_link(object.as_fd())?.is_some_and(|link| link.ifindex == Some(self.endpoint))
                }
                (bpf::Kind::Link, Place::InPod) => bpf::tcx_link(object.as_fd())?.is_some_and(|l| l.ifindex.is_some()),
                // Whichever program it runs: a crash may have come between the
                // pin's replacement and the filter's.
                (bpf::Kind::Program, Place::HostSide) => {
                    clsact::program_on(self.endpoint, chain(self.place, direction))?.is_some()
                }
                // Out of reach from here.
                (bpf::Kind::Program, Place::InPod) => true,
                _ => false,
            })
        };
        Direction::BOTH.into_iter().all(|direction| on_chain(direction).unwrap_or(false))
    }

    /// Whether these programs are on this very device.
    pub(super) fn is_on(&self, device: Device<'_>) -> io::Result<bool> {
        device.enter(|ifindex| {
            for direction in Direction::BOTH {
                let chain = chain(self.place, direction);
                let object = match bpf::open_pinned(&pin_of(&self.dir, direction)) {
                    Ok(object) => object,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
                    Err(e) => return Err(e),
                };
                let on = match bpf::kind(object.as_fd())? {
                    bpf::Kind::Link => hook::tcx_is_on(object.as_fd(), ifindex, chain)?,
                    bpf::Kind::Program => clsact::program_on(ifindex, chain)? == Some(bpf::program_id(object.as_fd())?),
                    _ => false,
                };
                if !on {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// Takes the programs off their device as far as it can be reached, then
    /// removes the pins.
    pub(super) fn discard(&self) -> io::Result<()> {
        for direction in Direction::BOTH {
            if let Ok(object) = bpf::open_pinned(&pin_of(&self.dir, direction))
                && bpf::kind(object.as_fd())? == bpf::Kind::Link
            {
                // Fails when the device is gone, and the link is off it by that.
                let _ = bpf::link_detach(object.as_fd());
            } else if self.place == Place::HostSide {
                clsact::detach(self.endpoint, chain(self.place, direction))?;
            }
        }
        pins::remove(&self.dir)
    }
}
