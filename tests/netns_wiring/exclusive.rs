//! Exclusive ENIs.

use std::time::{Duration, Instant};

use fairway::model::AttachMode::{Exclusive, Veth};
use fairway::model::{Bandwidth, EniRef};
use fairway::netns::{Inventory, PrepareEni, Unwire, Verify, Wire, WireError};

use crate::support::*;

/// The ENI is at home: down, with its own name, without an address.
fn at_home(lab: &Lab, eni: &EniRef) {
    let name = format!("eni{}", eni.mac.to_string().replace(':', ""));
    let link = &show(&lab.node, &format!("link show {name}"))[0];
    assert_eq!(link["address"], eni.mac.to_string());
    assert!(!link["flags"].as_array().unwrap().contains(&"UP".into()), "{link}");
    let left = ip(&format!("-n {} -o addr show dev {name}", lab.node));
    assert_eq!(left.trim(), "");
}

#[test]
fn an_exclusive_pod_has_the_eni_and_a_link_to_its_node() {
    let Some(lab) = Lab::here("an_exclusive_pod_has_the_eni_and_a_link_to_its_node") else { return };
    let (own, shared) = (lab.eni(1), lab.eni(2));
    let (ns, lease) = lab.pod(&own, 21, Exclusive);
    let (other_ns, other) = lab.pod(&shared, 22, Veth);
    // A listener as node-local DNS would have it.
    ip(&format!("-n {} addr add 169.254.20.10/32 dev lo", lab.node));
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: shared.clone(), shared: true }).await.unwrap();
        let before = snapshot(&lab.node);
        let prepared = wirer.ask(PrepareEni { eni: own.clone(), shared: false }).await.unwrap();
        assert_eq!(prepared.ifname, "eth1");
        assert_eq!(before, snapshot(&lab.node), "an exclusive ENI is not configured on the node");
        wirer.ask(Wire { lease: other.clone() }).await.unwrap();
        let without = snapshot(&lab.node);
        let wired = wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        assert_eq!(wired.pod_mac, own.mac);
        assert_eq!(wired.mtu, 8500);
        assert_eq!(show(&ns, "link show eth0")[0]["address"], own.mac.to_string());
        assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);

        // The VPC, both ways, both families.
        let (v4, v6) = (lease.v4, lease.v6.unwrap());
        for (at, from) in [(OUTSIDE4.into(), v4.into()), (std::net::IpAddr::V6(OUTSIDE6), v6.into())] {
            let outside = listen(&lab.router, at);
            assert_eq!(whoami(&ns, outside.at), Ok(from));
        }
        let in_pod = listen(&ns, v4);
        assert_eq!(whoami(&lab.router, in_pod.at), Ok(own.subnet.gateway4.into()));
        // The node and the pod, over the host link: the ENI sees nothing of it.
        let quiet = lab.received(1);
        assert_eq!(whoami(&lab.node, in_pod.at), Ok(NODE4.into()));
        let in_pod6 = listen(&ns, v6);
        assert_eq!(whoami(&lab.node, in_pod6.at), Ok(NODE6.into()));
        for at in [NODE4, std::net::Ipv4Addr::new(169, 254, 20, 10)] {
            let on_node = listen(&lab.node, at);
            assert_eq!(whoami(&ns, on_node.at), Ok(v4.into()), "{at}");
        }
        let on_node6 = listen(&lab.node, NODE6);
        assert_eq!(whoami(&ns, on_node6.at), Ok(v6.into()));
        // Five conversations would be 30 packets; some are the kernel's own (MLD).
        assert!(lab.received(1) - quiet < 8, "{quiet} {}", lab.received(1));
        // Another pod of the node: through the VPC, both ways.
        let counters = [lab.received(1), lab.received(2)];
        assert_eq!(whoami(&other_ns, in_pod.at), Ok(other.v4.into()));
        let in_other = listen(&other_ns, other.v4);
        assert_eq!(whoami(&ns, in_other.at), Ok(v4.into()));
        let now = [lab.received(1), lab.received(2)];
        assert!(now[0] > counters[0] && now[1] > counters[1], "{counters:?} {now:?}");

        // Again, and back.
        let first = (snapshot(&lab.node), snapshot(&ns));
        assert_eq!(wirer.ask(Wire { lease: lease.clone() }).await.unwrap(), wired);
        assert_eq!(first, (snapshot(&lab.node), snapshot(&ns)));
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        at_home(&lab, &own);
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        at_home(&lab, &own);
        let keep = |s: &str| {
            s.lines().filter(|l| !l.contains("eth1") && !l.contains("eni0")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(keep(&without), keep(&snapshot(&lab.node)));
        let inventory = wirer.ask(Inventory {}).await.unwrap();
        assert!(inventory.enis.contains(&(own.mac, format!("eni{}", own.mac.to_string().replace(':', "")))));
        assert_eq!(inventory.host_links.len(), 1);
        // From its new name into a pod once more.
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let outside = listen(&lab.router, OUTSIDE4);
        assert_eq!(whoami(&ns, outside.at), Ok(v4.into()));
        // Given to shared pods; a DEL that is repeated then leaves it to them.
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        wirer.ask(PrepareEni { eni: own.clone(), shared: true }).await.unwrap();
        let (third_ns, third) = lab.pod(&own, 23, Veth);
        wirer.ask(Wire { lease: third.clone() }).await.unwrap();
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        assert_eq!(whoami(&third_ns, outside.at), Ok(third.v4.into()));
        assert_eq!(wirer.ask(Verify { lease: third }).await.unwrap(), []);
    });
}

#[test]
fn a_half_made_exclusive_pod_is_finished() {
    let Some(lab) = Lab::shaping("a_half_made_exclusive_pod_is_finished") else { return };
    let own = lab.eni(1);
    let (ns, mut lease) = lab.pod(&own, 21, Exclusive);
    lease.bandwidth = Bandwidth { ingress_bps: Some(30_000_000), egress_bps: Some(50_000_000) };
    lab.run(async |wirer| {
        // The agent died after the move; the name is the old one.
        ip(&format!("-n {} link set eth1 netns {ns}", lab.node));
        let wired = wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        assert_eq!(wired.mtu, 8500);
        assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
        let host = wired.host_ifname.unwrap();
        let (v4, node) = (lease.v4, &lab.node);
        let healthy = (snapshot(node), snapshot(&ns));
        let damages = [
            ("link", format!("ip -n {node} link del {host}")),
            ("link", format!("ip -n {ns} link set eth0 down")),
            ("link", format!("ip -n {ns} link set eth0 netns {node} name eth7")),
            ("link", format!("ip -n {ns} link del {host}i")),
            ("address", format!("ip -n {ns} addr del {v4}/32 dev eth0")),
            ("address", format!("ip -n {ns} addr del {v4}/32 dev {host}")),
            ("sysctl", format!("ip netns exec {ns} sysctl -qw net.ipv4.conf.{host}.rp_filter=1")),
            ("route", format!("ip -n {ns} route del {NODE4}")),
            ("route", format!("ip -n {ns} route del 169.254.0.0/16")),
            ("route", format!("ip -n {node} route del {v4}")),
            ("neighbour", format!("ip -n {ns} neigh del 169.254.1.1 dev {host}")),
            ("qdisc", format!("tc -n {ns} qdisc del dev eth0 root")),
            ("qdisc", format!("tc -n {ns} qdisc del dev eth0 clsact")),
            ("sysctl", format!("ip netns exec {ns} sysctl -qw net.ipv6.conf.eth0.accept_ra=1")),
        ];
        for (what, damage) in damages {
            let mut words = damage.split_whitespace();
            let status = std::process::Command::new(words.next().unwrap()).args(words).status().unwrap();
            assert!(status.success(), "{damage}");
            let findings = wirer.ask(Verify { lease: lease.clone() }).await.unwrap();
            assert!(findings.iter().any(|f| f.what == what), "{damage}: {findings:?}");
            wirer.ask(Wire { lease: lease.clone() }).await.unwrap_or_else(|e| panic!("{damage}: {e}"));
            assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), [], "{damage}");
            assert_eq!(healthy, (snapshot(node), snapshot(&ns)), "{damage}");
        }
        // Something else took the interface's name while the ENI was away.
        ip(&format!("-n {ns} link set eth0 netns {node} name eth7"));
        ip(&format!("-n {ns} link add eth0 type bridge"));
        // Said before anything is touched when there is something to see, and
        // undone when the kernel says so half way.
        for fresh in [false, true] {
            if fresh {
                ip(&format!("-n {node} link del {host}"));
            }
            let taken = wirer.ask(Wire { lease: lease.clone() }).await.unwrap_err();
            assert!(matches!(taken, WireError::Kernel { .. }), "{taken}");
        }
        at_home(&lab, &own);
        assert_eq!(show(&ns, "link show eth0")[0]["linkinfo"]["info_kind"], "bridge");
        ip(&format!("-n {ns} link del eth0"));
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        at_home(&lab, &own);
        let left = ip(&format!("-n {ns} -o link"));
        assert_eq!(left.lines().count(), 1, "{left}");
    });
}

#[test]
fn an_eni_comes_back_from_a_namespace_that_died() {
    let Some(lab) = Lab::here("an_eni_comes_back_from_a_namespace_that_died") else { return };
    let own = lab.eni(1);
    let (ns, lease) = lab.pod(&own, 21, Exclusive);
    lab.run(async |wirer| {
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        lab.drop_namespace(&ns);
        // Hardware goes back to the first namespace by itself. Ours, a veth, dies
        // with its namespace: wait for that, then put it back as the lab does,
        // while Unwire waits for it.
        let began = Instant::now();
        while !ip(&format!("-n {} -o link", lab.router)).lines().all(|l| !l.contains(" r1@")) {
            assert!(began.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let waiting = tokio::task::spawn_local({
            let (wirer, lease) = (wirer.clone(), lease.clone());
            async move { wirer.ask(Unwire { lease }).await }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!waiting.is_finished(), "it waits for the device");
        lab.eni(1);
        waiting.await.unwrap().unwrap();
        at_home(&lab, &own);
        assert_eq!(wirer.ask(Inventory {}).await.unwrap().host_links, [] as [&str; 0]);
        // An ENI that is gone for good does not hold the DEL up for long.
        ip(&format!("-n {} link del eni00163e000001", lab.node));
        let began = Instant::now();
        wirer.ask_within(Unwire { lease: lease.clone() }, Duration::from_millis(400)).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(400));
        let missing = wirer.ask(Wire { lease }).await;
        assert!(matches!(missing, Err(WireError::NamespaceGone(_))), "{missing:?}");
    });
}

#[test]
fn exclusive_bandwidth_is_kept_in_both_directions() {
    let Some(lab) = Lab::shaping("exclusive_bandwidth_is_kept_in_both_directions") else { return };
    let own = lab.eni(1);
    let (ns, mut lease) = lab.pod(&own, 21, Exclusive);
    lease.bandwidth = Bandwidth { ingress_bps: Some(20_000_000), egress_bps: Some(40_000_000) };
    lab.run(async |wirer| {
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let into = throughput(&lab.router, &ns, lease.v4.into());
        let out = throughput(&ns, &lab.router, OUTSIDE4.into());
        println!("ingress {:.1} of 20 Mbit/s, egress {:.1} of 40 Mbit/s", into / 1e6, out / 1e6);
        assert!((at_least(14e6)..22.5e6).contains(&into), "{into}");
        assert!((at_least(28e6)..45e6).contains(&out), "{out}");
        lease.bandwidth = Bandwidth::default();
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let free = throughput(&lab.router, &ns, lease.v4.into());
        assert!(free > at_least(100e6), "{free}");
        assert!(!ip(&format!("-n {ns} -o link")).contains("ifb"), "the block device is gone");
    });
}
