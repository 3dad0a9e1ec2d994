//! Network namespaces.
//!
//! A namespace is named by a path that somebody else wrote, so opening one
//! validates it: it must be a network namespace (nsfs, and of the network kind),
//! and it is identified by device and inode, never by its path, which may come
//! to name another namespace. Entering is for plain threads with a home to come
//! back to: a thread that cannot come back ends rather than serve the next job
//! in the wrong namespace. Never call this on a pooled thread of an executor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs};

/// `f_type` of nsfs (linux/magic.h); nix has no name for it.
const NSFS: FsType = FsType(0x6e73_6673);
/// `ioctl(NS_GET_NSTYPE)`: `_IO(0xb7, 0x3)`.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("{0}: no such network namespace")]
    Gone(PathBuf),
    #[error("{0} is not a network namespace")]
    NotNetns(PathBuf),
    #[error("{path}: {cause}")]
    Io { path: PathBuf, cause: io::Error },
}

/// What a namespace is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsId {
    pub dev: u64,
    pub inode: u64,
}

/// An open network namespace: it lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    id: NetnsId,
}

impl Netns {
    /// Open and validate. A missing path is [`NetnsError::Gone`], and so is a
    /// plain empty file, which is what an unmounted namespace leaves behind.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let io = |cause| NetnsError::Io { path: path.to_owned(), cause };
        // Non-blocking: the path may name a FIFO.
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = match file {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(NetnsError::Gone(path.to_owned()));
            }
            Err(e) => return Err(io(e)),
        };
        let meta = file.metadata().map_err(io)?;
        let fs = fstatfs(&file).map_err(|e| io(e.into()))?;
        if fs.filesystem_type() != NSFS {
            let unmounted = meta.is_file() && meta.len() == 0;
            let path = path.to_owned();
            return Err(if unmounted { NetnsError::Gone(path) } else { NetnsError::NotNetns(path) });
        }
        if namespace_kind(file.as_fd()).map_err(io)? != libc::CLONE_NEWNET {
            return Err(NetnsError::NotNetns(path.to_owned()));
        }
        Ok(Self::of(file, &meta))
    }

    /// The calling thread's namespace.
    pub fn current() -> io::Result<Self> {
        let file = File::open("/proc/thread-self/ns/net")?;
        let meta = file.metadata()?;
        Ok(Self::of(file, &meta))
    }

    fn of(file: File, meta: &std::fs::Metadata) -> Self {
        Self { fd: file.into(), id: NetnsId { dev: meta.dev(), inode: meta.ino() } }
    }

    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Move the calling thread here, for good. For threads of their own.
    pub fn enter(&self) -> io::Result<()> {
        setns(&self.fd, CloneFlags::CLONE_NEWNET).map_err(Into::into)
    }

    /// Run `work` in here and take the calling thread back to `home`. When it
    /// cannot come back the thread unwinds: it must not take another job.
    pub fn within<T>(&self, home: &Netns, work: impl FnOnce() -> T) -> io::Result<T> {
        struct Return<'a>(&'a Netns);
        impl Drop for Return<'_> {
            fn drop(&mut self) {
                if let Err(e) = self.0.enter() {
                    tracing::error!(error = %e, "A thread cannot return to its network namespace; it ends");
                    if !std::thread::panicking() {
                        std::panic::resume_unwind(Box::new(format!("stuck in a foreign network namespace: {e}")));
                    }
                }
            }
        }
        self.enter()?;
        let _return = Return(home);
        Ok(work())
    }

    /// The kernel's name for this namespace as eBPF programs see it
    /// (`bpf_get_netns_cookie`). Needs Linux 5.14; `None` before.
    pub fn cookie(&self, home: &Netns) -> io::Result<Option<u64>> {
        let socket = self.within(home, || std::net::UdpSocket::bind("0.0.0.0:0"))??;
        cookie_of(socket.as_fd())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn namespace_kind(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // SAFETY: the descriptor is open for the borrow's life; this request takes
    // no argument and only returns a number.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind) }
}

/// The cookie of the namespace that a socket is in. Needs Linux 5.14; `None` before.
pub fn cookie_of(socket: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers are to locals that outlive the call, and `len` says
    // how many bytes the kernel may write.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    match rc {
        0.. => Ok(Some(cookie)),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_namespaces_are_opened() {
        assert!(matches!(Netns::open(Path::new("/no/such/path")), Err(NetnsError::Gone(_))));
        assert!(matches!(Netns::open(Path::new("/etc/hostname/below")), Err(NetnsError::Gone(_))));
        assert!(matches!(Netns::open(Path::new("/etc/passwd")), Err(NetnsError::NotNetns(_))));
        assert!(matches!(Netns::open(Path::new("/")), Err(NetnsError::NotNetns(_))));
        assert!(matches!(Netns::open(Path::new("/dev/zero")), Err(NetnsError::NotNetns(_))));
        assert!(matches!(Netns::open(Path::new("/proc/self/ns/mnt")), Err(NetnsError::NotNetns(_))));
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Netns::open(empty.path()), Err(NetnsError::Gone(_))));
        let own = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(own.id(), Netns::current().unwrap().id());
    }
}
