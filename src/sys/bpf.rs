//! bpf(2) where aya has no door: tcx links by descriptor, what a link is
//! attached to, what is attached to a device.
//!
//! Owner: `crate::datapath`, on its worker thread. Every call is stateless;
//! a device's index is looked up in the calling thread's network namespace.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

mod batch;
mod bytes;

pub use batch::{Batch, Cursor};
pub use bytes::{Convert, copy, count, sum_per_cpu};

const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

const LINK_TYPE_TCX: u32 = 11;
const F_BEFORE: u32 = 1 << 3;
const LINK_TYPE_CGROUP: u32 = 3;

/// Where in a socket's life a program on a cgroup runs; the values are
/// `enum bpf_attach_type`'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CgroupHook {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Setsockopt = 22,
    Getpeername4 = 29,
    Getpeername6 = 30,
}

impl CgroupHook {
    const ALL: [Self; 9] = [
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Setsockopt,
        Self::Getpeername4,
        Self::Getpeername6,
    ];
}

/// Which chain of a device; the values are `enum bpf_attach_type`'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TcxChain {
    Ingress = 46,
    Egress = 47,
}

/// What kind of object a pin or descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Map,
    Program,
    Link,
    Other,
}

/// A tcx link, as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcxLink {
    pub link_id: u32,
    pub program_id: u32,
    /// Index in the device's own namespace; `None` when the device is gone.
    pub ifindex: Option<u32>,
    pub chain: TcxChain,
}

/// The leading fields of `union bpf_attr`'s members used here, all of which the
/// kernel reads as "the rest is zero".
#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    info_len: u32,
    info: u64,
}

/// `struct bpf_link_info` as far as its tcx member.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    _pad: u32,
    ifindex: u32,
    attach_type: u32,
    _rest: [u64; 8],
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    _pad: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkDetachAttr {
    link_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct ProgQueryAttr {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    _pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// # Safety
/// Pointers inside `attr` must be valid for what `command` does with them.
unsafe fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<i32> {
    // SAFETY: `attr` is a live, initialised, padding-free structure whose size is
    // passed along; the caller vouches for the pointers in it.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret as i32) }
}

/// # Safety
/// As [`bpf`]; `command` must answer with a new descriptor.
unsafe fn bpf_fd<A>(command: libc::c_long, attr: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for the pointers and that a descriptor, which
    // nobody else owns, comes back.
    unsafe { bpf(command, attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// Opens whatever is pinned at `path`.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, ..Default::default() };
    // SAFETY: `path` is a C string that outlives the call; OBJ_GET only reads it.
    unsafe { bpf_fd(OBJ_GET, &mut attr) }
}

/// Pins `object` at `path`, which must not exist.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, fd: raw(object), file_flags: 0 };
    // SAFETY: `path` is a C string that outlives the call; OBJ_PIN only reads it.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// What kind of object `fd` is.
pub fn kind(fd: BorrowedFd<'_>) -> io::Result<Kind> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", raw(fd)))?;
    Ok(match target.to_str() {
        Some("anon_inode:bpf-map") => Kind::Map,
        Some("anon_inode:bpf-prog") => Kind::Program,
        Some("anon_inode:bpf_link" | "anon_inode:bpf-link") => Kind::Link,
        _ => Kind::Other,
    })
}

/// Attaches a program at the head of a device's chain. The program stays
/// attached while the descriptor is open or pinned. Fails with EINVAL on kernels
/// without tcx (before 6.6).
pub fn tcx_attach(program: BorrowedFd<'_>, ifindex: u32, chain: TcxChain) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: raw(program),
        ifindex,
        attach_type: chain as u32,
        flags: F_BEFORE,
        ..Default::default()
    };
    // SAFETY: no pointers in it; LINK_CREATE answers with a new descriptor.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

/// Attaches a program to a cgroup, beside others that are there. It stays while
/// the descriptor is open or pinned.
pub fn cgroup_attach(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, hook: CgroupHook) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: raw(program),
        // The kernel calls it `target_fd` here.
        ifindex: raw(cgroup),
        attach_type: hook as u32,
        ..Default::default()
    };
    // SAFETY: no pointers in it; LINK_CREATE answers with a new descriptor.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

/// The id of the cgroup a link is on and its hook; `None` for other links.
pub fn cgroup_link(link: BorrowedFd<'_>) -> io::Result<Option<(u64, CgroupHook)>> {
    /// `struct bpf_link_info` as far as its cgroup member.
    #[repr(C)]
    #[derive(Default)]
    struct CgroupLinkInfo {
        link_type: u32,
        id: u32,
        prog_id: u32,
        _pad: u32,
        cgroup_id: u64,
        attach_type: u32,
        _rest: [u32; 15],
    }
    let mut info = CgroupLinkInfo::default();
    let info_len = size_of::<CgroupLinkInfo>() as u32;
    let mut attr = InfoAttr { fd: raw(link), info_len, info: std::ptr::from_mut(&mut info) as u64 };
    // SAFETY: `info` is writable for `info_len` bytes and outlives the call; any
    // bytes are a value of it.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let hook = CgroupHook::ALL.into_iter().find(|hook| *hook as u32 == info.attach_type);
    // The id is 0 when the cgroup is gone.
    Ok(hook.filter(|_| info.link_type == LINK_TYPE_CGROUP && info.cgroup_id != 0).map(|hook| (info.cgroup_id, hook)))
}

/// Swaps the program behind a link, atomically.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr { link_fd: raw(link), new_prog_fd: raw(program), ..Default::default() };
    // SAFETY: no pointers in it.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

/// Takes the program off its device now, whoever else holds the link. A pinned
/// link's own removal is deferred by the kernel.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetachAttr { link_fd: raw(link) };
    // SAFETY: no pointers in it.
    unsafe { bpf(LINK_DETACH, &mut attr) }.map(drop)
}

/// Describes a tcx link; `None` when `link` is a link of another type.
pub fn tcx_link(link: BorrowedFd<'_>) -> io::Result<Option<TcxLink>> {
    let mut info = LinkInfo::default();
    let mut attr =
        InfoAttr { fd: raw(link), info_len: size_of::<LinkInfo>() as u32, info: std::ptr::from_mut(&mut info) as u64 };
    // SAFETY: `info` is writable for `info_len` bytes and outlives the call; any
    // bytes are a value of it.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let chain = match info.attach_type {
        46 => TcxChain::Ingress,
        47 => TcxChain::Egress,
        _ => return Ok(None),
    };
    Ok((info.link_type == LINK_TYPE_TCX).then_some(TcxLink {
        link_id: info.id,
        program_id: info.prog_id,
        ifindex: (info.ifindex != 0).then_some(info.ifindex),
        chain,
    }))
}

/// The kernel's id of a program.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // `struct bpf_prog_info` begins with type and id.
    let mut info = [0u32; 2];
    let mut attr = InfoAttr { fd: raw(program), info_len: size_of_val(&info) as u32, info: info.as_mut_ptr() as u64 };
    // SAFETY: `info` is writable for `info_len` bytes and outlives the call.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let [_, id] = info;
    Ok(id)
}

/// The ids of the links on one chain of a device, first to run first.
pub fn tcx_links_on(ifindex: u32, chain: TcxChain) -> io::Result<Vec<u32>> {
    // The kernel allows at most 64 programs on a chain.
    let mut programs = [0u32; 64];
    let mut links = [0u32; 64];
    let mut attr = ProgQueryAttr {
        ifindex,
        attach_type: chain as u32,
        prog_ids: programs.as_mut_ptr() as u64,
        link_ids: links.as_mut_ptr() as u64,
        count: programs.len() as u32,
        ..Default::default()
    };
    // SAFETY: both arrays are writable for `count` elements and outlive the call.
    unsafe { bpf(PROG_QUERY, &mut attr) }?;
    Ok(links.into_iter().take(attr.count as usize).filter(|id| *id != 0).collect())
}
