//! What host links say of their attachments, in the models.

use std::net::{IpAddr, Ipv4Addr};

use fairway::model::*;
use fairway::netns::{Attached, Note};

/// Whether the host link of an attachment says whose it is: of every second.
pub fn noted(attachment: &AttachmentId) -> bool {
    attachment.sandbox.as_str().bytes().map(u32::from).sum::<u32>() % 2 == 0
}

/// What a host link of this attachment says.
pub fn attached(attachment: &AttachmentId, ip: Ipv4Addr, pod: &PodKey) -> Attached {
    let note = Note {
        attachment: attachment.clone(),
        netns: Some(format!("/var/run/netns/{}", attachment.sandbox).into()),
        bandwidth: Bandwidth::default(),
        pod: Some(pod.clone()),
        pod_uid: None,
    };
    Attached { link: attachment.to_string(), note, addresses: vec![IpAddr::V4(ip)] }
}
