//! What host links say of their attachments, in the models.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fairway::model::*;
use fairway::netns::{Attached, Note};

/// Whether the host link of an attachment says whose it is: of every second.
pub fn noted(attachment: &AttachmentId) -> bool {
    attachment.sandbox.as_str().bytes().map(u32::from).sum::<u32>() % 2 == 0
}

/// What a host link of this attachment says.
pub fn says(attachment: &AttachmentId, v4: Ipv4Addr, v6: Option<Ipv6Addr>, pod: &PodKey) -> Attached {
    let note = Note {
        attachment: attachment.clone(),
        netns: Some(format!("/var/run/netns/{}", attachment.sandbox).into()),
        bandwidth: Bandwidth::default(),
        traffic: Default::default(),
        pod: Some(pod.clone()),
        pod_uid: None,
    };
    let addresses = std::iter::once(IpAddr::V4(v4)).chain(v6.map(IpAddr::V6)).collect();
    Attached { link: attachment.to_string(), note, addresses }
}
