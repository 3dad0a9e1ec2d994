//! What host links say of their attachments, and who believes it.

use std::net::IpAddr;

use fairway::model::AttachMode::{Exclusive, Veth};
use fairway::model::{Bandwidth, Lease};
use fairway::netns::{Attached, Inventory, Note, PrepareEni, Wire};

use crate::support::*;

fn said(lease: &Lease, link: String) -> Attached {
    let note = Note {
        attachment: lease.attachment.clone(),
        netns: Some(lease.netns.clone()),
        bandwidth: lease.bandwidth,
        traffic: lease.traffic,
        pod: Some(lease.pod.clone()),
        pod_uid: lease.pod_uid.clone(),
    };
    let addresses = std::iter::once(IpAddr::V4(lease.v4)).chain(lease.v6.map(IpAddr::V6)).collect();
    Attached { link, note, addresses }
}

#[test]
fn a_host_link_says_whose_it_is_and_is_believed_on_no_other() {
    let Some(lab) = Lab::here("a_host_link_says_whose_it_is_and_is_believed_on_no_other") else { return };
    let (own, shared) = (lab.eni(1), lab.eni(2));
    let (_own_ns, exclusive) = lab.pod(&own, 21, Exclusive);
    let (_ns, mut veth) = lab.pod(&shared, 22, Veth);
    veth.bandwidth = Bandwidth { ingress_bps: Some(50_000_000), egress_bps: None };
    veth.traffic.per_packet = true;
    if cannot_shape("a_host_link_says_whose_it_is_and_is_believed_on_no_other, its limits", &lab) {
        veth.bandwidth = Bandwidth::default();
    }
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: shared.clone(), shared: true }).await.unwrap();
        wirer.ask(PrepareEni { eni: own.clone(), shared: false }).await.unwrap();
        let mut expected = Vec::new();
        for lease in [&veth, &exclusive] {
            let wired = wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
            expected.push(said(lease, wired.host_ifname.unwrap()));
        }
        assert_eq!(wirer.ask(Inventory {}).await.unwrap().attached, expected);
        // Wired again: it says the same.
        wirer.ask(Wire { lease: veth.clone() }).await.unwrap();
        assert_eq!(wirer.ask(Inventory {}).await.unwrap().attached, expected);

        // Rubbish, and the words of another link.
        let link = &expected[0].link;
        let other =
            show(&lab.node, &format!("link show {}", expected[1].link))[0]["ifalias"].as_str().unwrap().to_owned();
        for alias in ["uplink", other.as_str()] {
            let status = std::process::Command::new("ip")
                .args(["-n", &lab.node, "link", "set", "dev", link, "alias", alias])
                .status();
            assert!(status.unwrap().success());
            let inventory = wirer.ask(Inventory {}).await.unwrap();
            assert_eq!(inventory.attached, expected[1..]);
            assert_eq!(inventory.host_links.len(), 2);
        }
    });
}
