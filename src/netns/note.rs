//! What a host link says of its attachment, in the kernel itself (pure).
//!
//! Written as the link's alias with the message that sets the new link up; read
//! by `Inventory`, for the day the ledger is lost: a DEL then still finds what
//! it is about. Where not everything fits into an alias, the attachment comes
//! first, then the namespace, then who the pod is.
//!
//! Invariant: what is read is outside input, for whoever may change links on the
//! node may write it. The kernel bounds its length; here it is parsed strictly,
//! and believed only on the link whose name follows from the attachment it says.

use std::path::PathBuf;

use super::names::{link_names, valid_ifname};
use super::{Attached, Note};
use crate::model::{AttachmentId, Bandwidth, Lease, PodKey, Traffic};

/// First word of every note: the format.
const FORMAT: &str = "fairway1";
/// The kernel takes 255 bytes with the final zero.
const MOST: usize = 254;
/// Stands for what is not known or does not fit.
const NONE: &str = "-";

/// The alias of a lease's host link; none when not even the attachment fits or
/// can be written.
pub(super) fn write(lease: &Lease) -> Option<String> {
    let word =
        |text: String| Some(text).filter(|t| !t.is_empty() && t != NONE && t.bytes().all(|b| b.is_ascii_graphic()));
    let AttachmentId { sandbox, ifname } = &lease.attachment;
    let mut words = [word(sandbox.0.clone()), word(ifname.clone()), asked(lease), None, None, None];
    if words[..2].contains(&None) {
        return None;
    }
    let pod = (!lease.pod.namespace.is_empty()).then(|| lease.pod.to_string());
    for (at, text) in [(3, lease.netns.to_str().map(str::to_owned)), (4, pod), (5, lease.pod_uid.clone())] {
        let before = words[at].take();
        words[at] = text.and_then(word);
        if join(&words).len() > MOST {
            words[at] = before;
        }
    }
    Some(join(&words)).filter(|text| text.len() <= MOST)
}

/// What was asked for the pod: `in/out` in bits per second, and letters.
fn asked(lease: &Lease) -> Option<String> {
    let rate = |bps: Option<u64>| bps.map(|b| b.to_string()).unwrap_or_default();
    let Bandwidth { ingress_bps, egress_bps } = lease.bandwidth;
    let mut traffic = lease.traffic;
    let letters: String = LETTERS.iter().filter(|(_, of)| *of(&mut traffic)).map(|(letter, _)| *letter).collect();
    let letters = if letters.is_empty() { letters } else { format!(":{letters}") };
    let asked = format!("{}/{}{letters}", rate(ingress_bps), rate(egress_bps));
    (asked != "/").then_some(asked)
}

/// How [`Traffic`] is written.
const LETTERS: [(char, fn(&mut Traffic) -> &mut bool); 2] =
    [('h', |t| &mut t.host_ports), ('p', |t| &mut t.per_packet)];

fn join(words: &[Option<String>]) -> String {
    let words = words.iter().map(|w| w.as_deref().unwrap_or(NONE));
    std::iter::once(FORMAT).chain(words).collect::<Vec<_>>().join(" ")
}

/// The note on a host link, if it is one and of this very link.
pub fn read(prefix: &str, link: &str, alias: &str) -> Option<Attached> {
    let mut words = alias.split(' ');
    if alias.len() > MOST || words.next() != Some(FORMAT) {
        return None;
    }
    let mut next = || words.next().filter(|w| !w.is_empty() && w.bytes().all(|b| b.is_ascii_graphic()));
    let [sandbox, ifname, asked, netns, pod, uid] = [next()?, next()?, next()?, next()?, next()?, next()?];
    if words.next().is_some() || !is_id(sandbox) || !valid_ifname(ifname) {
        return None;
    }
    let attachment = AttachmentId { sandbox: sandbox.into(), ifname: ifname.to_owned() };
    if link_names(prefix, &attachment).host != link {
        return None;
    }
    let known = |word: &'_ str| (word != NONE).then(|| word.to_owned());
    let netns = known(netns).map(PathBuf::from);
    let (bandwidth, traffic) = read_asked(asked)?;
    let note = Note {
        attachment,
        bandwidth,
        traffic,
        netns: netns
            .filter(|path| path.is_absolute() && path.components().all(|c| c != std::path::Component::ParentDir)),
        pod: known(pod).and_then(|pod| {
            let (namespace, name) = pod.split_once('/')?;
            (is_id(namespace) && is_id(name)).then(|| PodKey::new(namespace, name))
        }),
        pod_uid: known(uid).filter(|uid| is_id(uid)),
    };
    Some(Attached { link: link.to_owned(), note, addresses: Vec::new() })
}

/// As CNI writes container ids; Kubernetes' names and UIDs are narrower.
fn is_id(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphanumeric())
        && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

fn read_asked(word: &str) -> Option<(Bandwidth, Traffic)> {
    let (limits, letters) = word.split_once(':').unwrap_or((word, ""));
    let mut traffic = Traffic::default();
    for letter in letters.chars() {
        let (_, of) = LETTERS.iter().find(|(l, _)| *l == letter)?;
        *of(&mut traffic) = true;
    }
    if limits == NONE {
        return Some((Bandwidth::default(), traffic));
    }
    let (ingress, egress) = limits.split_once('/')?;
    let rate = |text: &str| match text {
        "" => Some(None),
        text => text.parse::<u64>().ok().map(Some),
    };
    Some((Bandwidth { ingress_bps: rate(ingress)?, egress_bps: rate(egress)? }, traffic))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AttachMode, EniRef, Mac, Subnet};

    fn lease() -> Lease {
        Lease {
            attachment: AttachmentId { sandbox: "ab".repeat(32).into(), ifname: "eth0".into() },
            pod: PodKey::new("kube-system", "coredns-5d78c9869d-abcde"),
            pod_uid: Some("8c1f7ed1-0a55-4f8a-8d58-1f1a4f7f1d11".into()),
            mode: AttachMode::Veth,
            eni: EniRef {
                id: "eni-1".into(),
                mac: Mac([2; 6]),
                vswitch: "vsw-1".into(),
                primary4: [10, 0, 0, 1].into(),
                subnet: Subnet {
                    cidr4: "10.0.0.0/20".parse().unwrap(),
                    gateway4: [10, 0, 15, 253].into(),
                    cidr6: None,
                    gateway6: None,
                },
            },
            v4: [10, 0, 0, 9].into(),
            v6: None,
            netns: "/var/run/netns/cni-8c1f7ed1-0a55-4f8a-8d58-1f1a4f7f1d11".into(),
            bandwidth: Bandwidth { ingress_bps: None, egress_bps: Some(1_000_000) },
            traffic: Traffic { host_ports: false, per_packet: true },
        }
    }

    fn back(lease: &Lease) -> Note {
        let text = write(lease).unwrap();
        assert!(text.len() <= MOST, "{text}");
        read("fw", &link_names("fw", &lease.attachment).host, &text).unwrap().note
    }

    proptest::proptest! {
        #[test]
        fn no_alias_makes_the_reader_panic_or_says_what_was_not_written(alias in "(fairway1 )?[ -~]{0,80}|\\PC{0,60}", link in "fw[0-9a-f]{12}") {
            if let Some(found) = read("fw", &link, &alias) {
                assert_eq!(link_names("fw", &found.note.attachment).host, link);
            }
        }
    }

    #[test]
    fn a_usual_pod_fits_with_all_that_is_said_of_it() {
        let lease = lease();
        let expected = Note {
            attachment: lease.attachment.clone(),
            netns: Some(lease.netns.clone()),
            bandwidth: lease.bandwidth,
            traffic: lease.traffic,
            pod: Some(lease.pod.clone()),
            pod_uid: lease.pod_uid.clone(),
        };
        assert_eq!(back(&lease), expected);
    }

    #[test]
    fn whatever_was_asked_comes_back() {
        let mut lease = lease();
        for (ingress_bps, egress_bps) in [(None, None), (Some(0), None), (Some(5), Some(u64::MAX))] {
            for (host_ports, per_packet) in [(false, false), (true, false), (false, true), (true, true)] {
                lease.bandwidth = Bandwidth { ingress_bps, egress_bps };
                lease.traffic = Traffic { host_ports, per_packet };
                let note = back(&lease);
                assert_eq!((note.bandwidth, note.traffic), (lease.bandwidth, lease.traffic));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out_from_the_end() {
        let mut long = lease();
        long.pod = PodKey::new("n".repeat(63), "p".repeat(20));
        let note = back(&long);
        assert_eq!((note.pod, note.pod_uid), (Some(long.pod.clone()), None));
        long.pod.name = "p".repeat(253);
        let note = back(&long);
        assert_eq!((note.pod, note.pod_uid), (None, long.pod_uid.clone()));
        long.netns = format!("/{}", "x".repeat(250)).into();
        assert_eq!(back(&long).netns, None);
        // A sandbox that no pod has a name for, and a path with a space.
        long.pod = PodKey::new("", "unknown");
        long.netns = "/a b".into();
        let note = back(&long);
        assert_eq!((note.pod, note.netns), (None, None));
        long.attachment.sandbox = "s".repeat(251).into();
        assert_eq!(write(&long), None);
    }

    #[test]
    fn a_note_is_believed_only_as_it_was_written_and_on_its_own_link() {
        let lease = lease();
        let host = link_names("fw", &lease.attachment).host;
        let text = write(&lease).unwrap();
        assert!(read("fw", &host, &text).is_some());
        assert_eq!(read("fw", "fw0123456789ab", &text), None, "of another link");
        for at in 0..text.len() {
            // Cut short it says less or nothing, and never something else.
            if let Some(cut) = read("fw", &host, &text[..at]) {
                assert_eq!(cut.note.attachment, lease.attachment);
            }
        }
        let sandbox = lease.attachment.sandbox.as_str();
        for bad in [
            String::new(),
            "uplink to rack 7".to_owned(),
            format!("fairway2 {sandbox} eth0 - - - -"),
            format!("fairway1 {sandbox} eth0 - - -"),
            format!("fairway1 {sandbox} eth0 - - - - -"),
            format!("fairway1 {sandbox} eth0  - - -"),
            format!("fairway1 {sandbox} eth0 1000 - - -"),
            format!("fairway1 {sandbox} eth0 x/1 - - -"),
            format!("fairway1 {sandbox} eth0 /:x - - -"),
            format!("fairway1 {sandbox} ../../e - - - -"),
            format!("fairway1 {sandbox}\n eth0 - - - -"),
            "fairway1 - eth0 - - - -".to_owned(),
            format!("fairway1 {sandbox} eth0 - - - {}", "u".repeat(300)),
        ] {
            assert_eq!(read("fw", &host, &bad), None, "{bad:?}");
        }
        for (words, what) in [
            ("- /run/../etc - -", "a path upwards"),
            ("- run/x - -", "no absolute path"),
            ("- - ns/a/b -", "no name"),
            ("- - - ü", "no UID"),
        ] {
            match read("fw", &host, &format!("fairway1 {sandbox} eth0 {words}")) {
                None => {}
                Some(found) => {
                    assert_eq!((found.note.netns, found.note.pod, found.note.pod_uid), (None, None, None), "{what}")
                }
            }
        }
    }
}
