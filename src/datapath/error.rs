//! What can go wrong with programs and maps, in words that name the remedy.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;
use aya::programs::ProgramError;
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
    let mut cause = match error.downcast_ref() {
        Some(ProgramError::LoadError { io_error, verifier_log }) => {
            format!("{io_error}{}", last_words(&verifier_log.to_string()))
        }
        _ => error.to_string(),
    };
    let mut source = error.source();
    while let Some(inner) = source {
        let text = inner.to_string();
        if inner.downcast_ref::<io::Error>().is_some_and(|e| e.raw_os_error() == Some(libc::EPERM)) {
            cause.push_str(": the process needs CAP_BPF and CAP_NET_ADMIN, before kernel 5.8 CAP_SYS_ADMIN");
        } else if !cause.contains(&text) {
            cause = format!("{cause}: {text}");
        }
        source = inner.source();
    }
    DatapathError::Refused { what: what.to_owned(), cause }
}

/// The end of what the verifier said, which may be megabytes: there is the reason.
fn last_words(log: &str) -> String {
    const LINES: usize = 3;
    let statistics = ["processed ", "verification time", "stack depth"];
    let said = |line: &&str| !line.trim().is_empty() && !statistics.iter().any(|s| line.starts_with(s));
    let mut lines: Vec<&str> = log.lines().rev().filter(said).take(LINES).collect();
    lines.reverse();
    if lines.is_empty() { String::new() } else { format!("; the verifier says: {}", lines.join(" / ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_how_the_verifier_ended() {
        let log = "0: R1=ctx()\n1: (b7) r0 = 0\n2: (61) r2 = *(u32 *)(r1 +999)\ninvalid bpf_context access off=999 size=4\n\
                   processed 3 insns (limit 1000000) max_states_per_insn 0\n";
        let text = last_words(log);
        assert!(text.starts_with("; the verifier says: 1: (b7) r0 = 0 / 2: (61) r2"), "{text}");
        assert!(text.ends_with("off=999 size=4"), "{text}");
        assert_eq!(last_words(""), "");
        // It refuses by EACCES, which is no matter of rights.
        #[derive(Debug, thiserror::Error)]
        #[error("load")]
        struct Outer(#[source] io::Error);
        let rights = |errno| refusal("x", &Outer(io::Error::from_raw_os_error(errno))).to_string();
        assert!(rights(libc::EPERM).contains("CAP_BPF") && !rights(libc::EACCES).contains("CAP_BPF"));
    }
}
