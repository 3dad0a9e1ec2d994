//! What can go wrong with programs and maps, in words that name the remedy.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;
use fairway_ebpf_abi::MAX_ENDPOINTS;

use crate::model::AttachmentId;

#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    #[error("{0} is not a BPF file system; mount one with `mount -t bpf bpf {0}`")]
    NotBpffs(PathBuf),
    #[error("{path}: {cause}")]
    Pins { path: PathBuf, cause: io::Error },
    #[error("the kernel refused {what}: {cause}")]
    Refused { what: String, cause: String },
    #[error("the embedded eBPF object is not this build's: {0}; build again without FAIRWAY_EBPF_OBJECT")]
    Object(String),
    #[error("{attachment}: its names are too long to pin")]
    NameTooLong { attachment: AttachmentId },
    #[error("{attachment}: cannot attach to {device}: {cause}")]
    Attach { attachment: AttachmentId, device: String, cause: io::Error },
    #[error("all {MAX_ENDPOINTS} endpoint numbers are in use")]
    Full,
    #[error("counters: {0}")]
    Counters(MapError),
    #[error("addresses of pods: {0}")]
    Ways(MapError),
    #[error("Services at the socket: {}{cause}", path.as_ref().map(|p| format!("{}: ", p.display())).unwrap_or_default())]
    Cgroup { path: Option<PathBuf>, cause: String },
    #[error("cannot attach to ENI device {ifindex}: {cause}")]
    Eni { ifindex: u32, cause: io::Error },
}

/// With the cause's whole chain, and the remedy when it is a matter of rights.
pub(super) fn refusal(what: &str, error: &(dyn std::error::Error + 'static)) -> DatapathError {
    let mut cause = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let text = inner.to_string();
        if inner.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied) {
            cause.push_str(": the process needs CAP_BPF and CAP_NET_ADMIN, before kernel 5.8 CAP_SYS_ADMIN");
        } else if !cause.contains(&text) {
            cause = format!("{cause}: {text}");
        }
        source = inner.source();
    }
    DatapathError::Refused { what: what.to_owned(), cause }
}
