//! Where a program meets a device: which chain, in whose network namespace, and
//! attaching by tcx. The older way is `clsact`.
//!
//! Owner: the thread that owns `Datapath`. A device in another namespace is
//! reached from a thread made for it, which ends there: a thread left in the
//! wrong namespace would poison later work.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::programs::SchedClassifier;
use nix::sched::{CloneFlags, setns};

use crate::model::AttachMode;
use crate::sys::bpf::{self, TcxChain};

/// Which side of the pod's link carries the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The host side of a veth pair, out of the pod's reach.
    HostSide,
    /// The device inside the pod.
    InPod,
}

impl From<AttachMode> for Place {
    fn from(mode: AttachMode) -> Self {
        match mode {
            AttachMode::Veth => Place::HostSide,
            AttachMode::Exclusive => Place::InPod,
        }
    }
}

impl From<Place> for AttachMode {
    fn from(place: Place) -> Self {
        match place {
            Place::HostSide => AttachMode::Veth,
            Place::InPod => AttachMode::Exclusive,
        }
    }
}

/// As the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Egress,
    Ingress,
}

impl Direction {
    pub(super) const BOTH: [Direction; 2] = [Direction::Egress, Direction::Ingress];
}

/// What leaves a pod enters the host side of its link.
pub(super) fn chain(place: Place, direction: Direction) -> TcxChain {
    match (place, direction) {
        (Place::HostSide, Direction::Egress) | (Place::InPod, Direction::Ingress) => TcxChain::Ingress,
        (Place::HostSide, Direction::Ingress) | (Place::InPod, Direction::Egress) => TcxChain::Egress,
    }
}

/// A network device, in the caller's network namespace or another one.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    which: Which<'a>,
    netns: Option<BorrowedFd<'a>>,
}

#[derive(Clone, Copy, Debug)]
enum Which<'a> {
    Name(&'a str),
    Index(u32),
}

impl<'a> Device<'a> {
    pub fn named(name: &'a str) -> Self {
        Self { which: Which::Name(name), netns: None }
    }

    pub fn index(ifindex: u32) -> Self {
        Self { which: Which::Index(ifindex), netns: None }
    }

    /// In this namespace instead of the caller's.
    pub fn inside(self, netns: BorrowedFd<'a>) -> Self {
        Self { netns: Some(netns), ..self }
    }

    /// Runs `job` with the device's index, on a thread in the device's namespace.
    pub(super) fn enter<R: Send>(&self, job: impl FnOnce(u32) -> io::Result<R> + Send) -> io::Result<R> {
        let here = move || {
            job(match self.which {
                Which::Name(name) => nix::net::if_::if_nametoindex(name)?,
                Which::Index(ifindex) => ifindex,
            })
        };
        let Some(netns) = self.netns else { return here() };
        std::thread::scope(|scope| {
            let inside = move || {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                here()
            };
            let thread = std::thread::Builder::new().name("datapath-netns".into()).spawn_scoped(scope, inside)?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the pod's namespace panicked")))
        })
    }
}

impl fmt::Display for Device<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.which {
            Which::Name(name) => f.write_str(name),
            Which::Index(ifindex) => write!(f, "device {ifindex}"),
        }
    }
}

/// Whether this kernel has tcx: one without it does not know the attach type.
pub(super) fn has_tcx() -> bool {
    const LOOPBACK: u32 = 1;
    bpf::tcx_links_on(LOOPBACK, TcxChain::Ingress).is_ok()
}

/// One chain's tcx link, found on the device itself rather than by number alone:
/// interface indexes repeat across namespaces.
pub(super) fn tcx_is_on(link: BorrowedFd<'_>, ifindex: u32, chain: TcxChain) -> io::Result<bool> {
    let Some(link) = bpf::tcx_link(link)? else { return Ok(false) };
    Ok(link.chain == chain && bpf::tcx_links_on(ifindex, chain)?.contains(&link.link_id))
}

pub(super) fn attach_tcx(program: &SchedClassifier, ifindex: u32, chain: TcxChain) -> io::Result<OwnedFd> {
    let fd = program.fd().map_err(io::Error::other)?;
    bpf::tcx_attach(fd.as_fd(), ifindex, chain)
}
