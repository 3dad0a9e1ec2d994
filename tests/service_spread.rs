//! Promise: the packet path spreads flows evenly over 3, 10 and 100 backends, also
//! those of one client whose ports follow one another. (The socket path's even
//! choice is a test of `service_sockets`.)
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datapath_support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;

use datapath_support::{Node, Services, TestPod, UDP};
use fairway_ebpf_abi::{EVENT_CHOSEN, SCOPE_INSIDE};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Which of the backends has a datagram; it is taken.
fn hit(backends: &[UdpSocket]) -> usize {
    let mut waiting: Vec<PollFd> = backends.iter().map(|b| PollFd::new(b.as_fd(), PollFlags::POLLIN)).collect();
    assert_eq!(poll(&mut waiting, PollTimeout::from(2000u16)).unwrap(), 1, "one backend has it");
    let at = waiting.iter().position(|fd| fd.any() == Some(true)).unwrap();
    assert_eq!(backends[at].recv(&mut [0; 4]).unwrap(), 1);
    at
}

#[test]
fn flows_of_the_packet_path_are_spread_evenly() {
    let Some(node) = Node::new("flows_of_the_packet_path_are_spread_evenly") else { return };
    let (mut datapath, _) = node.open();
    let (client, server) = (TestPod::new(2), TestPod::new(3));
    for pod in [&client, &server] {
        pod.attach(&mut datapath, |way| way.per_packet = true);
    }
    let mut services = Services::of(&datapath);
    let mut flows = 0;
    for (family, count, tries) in [(4, 3usize, 1500u16), (4, 10, 2000), (4, 100, 5000), (6, 10, 2000)] {
        let (own, there, vip): (IpAddr, IpAddr, IpAddr) = match family {
            4 => (client.v4.into(), server.v4.into(), Ipv4Addr::new(10, 96, 0, 1).into()),
            _ => (client.v6.into(), server.v6.into(), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1).into()),
        };
        let bind = |_| server.netns.run(|| UdpSocket::bind((there, 0)).unwrap());
        let backends: Vec<UdpSocket> = (0..count).map(bind).collect();
        let addresses: Vec<SocketAddr> = backends.iter().map(|b| b.local_addr().unwrap()).collect();
        // A Service of its own: no flow is there yet.
        let at = SocketAddr::new(vip, 1000 + count as u16);
        services.put(count as u32 * 10 + family, at, UDP, SCOPE_INSIDE, 0, &addresses);
        let mut counts = vec![0f64; count];
        client.netns.run(|| {
            for n in 0..tries {
                let socket = UdpSocket::bind((own, 10_000 + n)).unwrap();
                socket.send_to(b"x", at).unwrap();
                counts[hit(&backends)] += 1.0;
            }
        });
        flows += u64::from(tries);
        assert_eq!(datapath.service_events().unwrap()[EVENT_CHOSEN as usize], flows, "each flow was given a backend");
        let expected = f64::from(tries) / count as f64;
        let chi2: f64 = counts.iter().map(|n| (n - expected).powi(2) / expected).sum();
        // Wilson and Hilferty's approximation of the 0.99999 quantile.
        let df = (count - 1) as f64;
        let limit = df * (1.0 - 2.0 / (9.0 * df) + 4.265 * (2.0 / (9.0 * df)).sqrt()).powi(3);
        println!("IPv{family}, {count} backends: chi-square {chi2:.1}, limit {limit:.1}");
        assert!(chi2 < limit, "{count} backends: chi-square {chi2:.1}, limit {limit:.1}: {counts:?}");
    }
}
