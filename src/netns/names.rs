//! Names, addresses and table numbers that follow from what they are for (pure).
//!
//! Nothing here is remembered: after a crash or a reboot the same attachment and
//! the same ENI get the same names again, so what is in the kernel can be told
//! to be ours, and whose, without a record.

use std::net::Ipv4Addr;

use sha2::{Digest as _, Sha256};

use crate::model::{AttachmentId, Mac};

/// Longest name of a network device.
pub const IFNAMSIZ: usize = 15;

/// Hex digits of the attachment's hash in a host link's name.
const DIGITS: usize = 12;

/// Everything derived from one attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkNames {
    /// The host link: the host's side of a veth pair. In exclusive mode the
    /// pod's side of the host link has the same name in the pod's namespace.
    pub host: String,
    pub host_mac: Mac,
    /// The MAC of the other side of the veth pair.
    pub pod_mac: Mac,
}

/// `prefix` and 12 hex digits. Hardware addresses are derived too: both ends can
/// be made neighbours of each other without reading anything back, and address
/// policies of the node's OS leave explicit ones alone.
pub fn link_names(prefix: &str, attachment: &AttachmentId) -> LinkNames {
    let hash = Sha256::new()
        .chain_update(attachment.sandbox.as_str())
        .chain_update([0])
        .chain_update(&attachment.ifname)
        .finalize();
    let mac = |at: usize| {
        let mut bytes = [0u8; 6];
        bytes.copy_from_slice(&hash[at..at + 6]);
        // Locally administered, unicast.
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Mac(bytes)
    };
    let digits = hex::encode(&hash[..DIGITS / 2]);
    LinkNames { host: format!("{prefix}{digits}"), host_mac: mac(8), pod_mac: mac(16) }
}

/// How long a host link's name is.
pub(super) fn host_link_len(prefix: &str) -> usize {
    prefix.len() + DIGITS
}

/// Whether a device name is one [`link_names`] could have made.
pub fn is_host_link(prefix: &str, name: &str) -> bool {
    name.strip_prefix(prefix)
        .is_some_and(|d| d.len() == DIGITS && d.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
}

/// The device that takes a limited exclusive pod's incoming traffic through a
/// queue, in the pod's namespace.
pub fn shaper(host_link: &str) -> String {
    format!("{}i", &host_link[..host_link.len().min(IFNAMSIZ - 1)])
}

/// What an exclusive ENI is called when it has come back to the node.
pub fn eni_home_name(mac: Mac) -> String {
    format!("eni{}", hex::encode(mac.0))
}

/// The routing table of an ENI: `base` plus the ENI's primary IPv4 address as a
/// number. The VPC makes it unique and never changes it in the ENI's life, so
/// the number survives reboots and is never passed on to another ENI, as an
/// interface index would be; two ENIs can never share a table, as they could by
/// a hash. `ip rule` shows it as a decimal.
pub fn eni_table(base: u32, primary: Ipv4Addr) -> u32 {
    match base.wrapping_add(u32::from(primary)) {
        // 0 and 252..=255 are the kernel's own tables.
        t @ (0 | 252..=255) => t.wrapping_add(0x8000_0000),
        t => t,
    }
}

/// Whether the kernel would take this as a device name; it comes from outside.
pub fn valid_ifname(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= IFNAMSIZ
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(sandbox: &str, ifname: &str) -> AttachmentId {
        AttachmentId { sandbox: sandbox.into(), ifname: ifname.into() }
    }

    #[test]
    fn names_are_stable_short_and_distinct() {
        let a = link_names("fw", &attachment("abc", "eth0"));
        assert_eq!(a, link_names("fw", &attachment("abc", "eth0")));
        assert_ne!(a.host, link_names("fw", &attachment("abc", "net1")).host);
        // No confusion between where the sandbox ends and the interface begins.
        assert_ne!(a.host, link_names("fw", &attachment("abce", "th0")).host);
        assert!(a.host.len() <= IFNAMSIZ && is_host_link("fw", &a.host));
        assert!(shaper(&a.host).len() <= IFNAMSIZ && shaper(&a.host) != a.host);
        assert_ne!(a.host_mac, a.pod_mac);
        assert_eq!(a.host_mac.0[0] & 3, 2);
        assert!(!is_host_link("fw", "fwtest"));
        assert!(!is_host_link("fw", "eni00163e0aff01"));
    }

    #[test]
    fn hostile_interface_names_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "a:b", "e%d", "sixteen-letters-", "ü", "a\n"] {
            assert!(!valid_ifname(bad), "{bad:?}");
        }
        for good in ["eth0", "net1", "a.b-c_d"] {
            assert!(valid_ifname(good), "{good:?}");
        }
    }
}
