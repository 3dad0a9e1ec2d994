//! Shared ENIs, veth mode.

use std::time::{Duration, Instant};

use fairway::model::{AttachMode::Veth, Bandwidth};
use fairway::netns::{ForgetEni, Inventory, PrepareEni, SpreadReceive, Unwire, Verify, Wire, WireError};

use crate::support::*;

#[test]
fn pods_reach_everyone_by_their_own_eni() {
    let Some(lab) = Lab::here("pods_reach_everyone_by_their_own_eni") else { return };
    let (one, two) = (lab.eni(1), lab.eni(2));
    // An ENI's first address is as good as any other.
    let (a_ns, a) = lab.pod(&one, 10, Veth);
    let (b_ns, b) = lab.pod(&two, 22, Veth);
    ip(&format!("-n {a_ns} link set lo down"));
    lab.run(async |wirer| {
        for eni in [&one, &two] {
            let prepared = wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
            assert_eq!(prepared.mtu, 8500);
        }
        for lease in [&a, &b] {
            let wired = wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
            assert_eq!(wired.mtu, 8500, "the MTU is the ENI's");
        }
        let outside4 = listen(&lab.router, OUTSIDE4);
        let outside6 = listen(&lab.router, OUTSIDE6);
        // The router's strict reverse-path filter drops what comes by the wrong
        // ENI, so an answer proves the way; the counters say it once more.
        let before = [lab.received(0), lab.received(1), lab.received(2)];
        for (ns, lease) in [(&a_ns, &a), (&b_ns, &b)] {
            assert_eq!(whoami(ns, outside4.at), Ok(lease.v4.into()));
            assert_eq!(whoami(ns, outside6.at), Ok(lease.v6.unwrap().into()));
        }
        let after = [lab.received(0), lab.received(1), lab.received(2)];
        assert!(after[1] > before[1] && after[2] > before[2], "{before:?} {after:?}");
        let local = listen(&a_ns, std::net::Ipv4Addr::LOCALHOST);
        assert!(whoami(&a_ns, local.at).is_ok(), "the loopback is up");
        // From outside in.
        let in_a = listen(&a_ns, a.v4);
        assert_eq!(whoami(&lab.router, in_a.at), Ok(one.subnet.gateway4.into()));
        // Pods of one node, whatever their ENI; neither packet leaves the node.
        let before = [lab.received(1), lab.received(2)];
        assert_eq!(whoami(&b_ns, in_a.at), Ok(b.v4.into()));
        let in_b6 = listen(&b_ns, b.v6.unwrap());
        assert_eq!(whoami(&a_ns, in_b6.at), Ok(a.v6.unwrap().into()));
        let now = [lab.received(1), lab.received(2)];
        assert!(now[0] - before[0] < 5 && now[1] - before[1] < 5, "{before:?} {now:?}");
        // The node and its pods, with the node's own address.
        assert_eq!(whoami(&lab.node, in_a.at), Ok(NODE4.into()));
        assert_eq!(whoami(&lab.node, in_b6.at), Ok(NODE6.into()));
        for (at, from) in [(NODE4.into(), a.v4.into()), (std::net::IpAddr::V6(NODE6), a.v6.unwrap().into())] {
            let on_node = listen(&lab.node, at);
            assert_eq!(whoami(&a_ns, on_node.at), Ok(from));
        }
        for lease in [&a, &b] {
            assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
        }
    });
}

#[test]
fn a_pod_cannot_send_with_anothers_source() {
    let Some(lab) = Lab::here("a_pod_cannot_send_with_anothers_source") else { return };
    let eni = lab.eni(1);
    let (a_ns, a) = lab.pod(&eni, 21, Veth);
    let (_, b) = lab.pod(&eni, 22, Veth);
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        wirer.ask(Wire { lease: a.clone() }).await.unwrap();
        wirer.ask(Wire { lease: b.clone() }).await.unwrap();
        ip(&format!("-n {a_ns} addr add {}/32 dev eth0", b.v4));
        let outside = within(&lab.router, || std::net::UdpSocket::bind((OUTSIDE4, 0)).unwrap());
        let to = outside.local_addr().unwrap();
        within(&a_ns, || {
            for source in [b.v4, a.v4] {
                std::net::UdpSocket::bind((source, 0)).unwrap().send_to(source.to_string().as_bytes(), to).unwrap();
            }
        });
        outside.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut text = [0; 64];
        let (n, _) = outside.recv_from(&mut text).unwrap();
        assert_eq!(
            std::str::from_utf8(&text[..n]).unwrap(),
            a.v4.to_string(),
            "only the honest packet, which came last"
        );
    });
}

#[test]
fn wiring_twice_changes_nothing_and_unwiring_twice_leaves_nothing() {
    let Some(lab) = Lab::shaping("wiring_twice_changes_nothing_and_unwiring_twice_leaves_nothing") else { return };
    let eni = lab.eni(1);
    let (ns, mut lease) = lab.pod(&eni, 21, Veth);
    lease.bandwidth = Bandwidth { ingress_bps: Some(10_000_000), egress_bps: Some(20_000_000) };
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        let untouched = (snapshot(&lab.node), snapshot(&ns));
        let wired = wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let index = |v: serde_json::Value| v[0]["ifindex"].as_u64().unwrap();
        let host = format!("link show {}", wired.host_ifname.as_ref().unwrap());
        let first =
            (snapshot(&lab.node), snapshot(&ns), index(show(&lab.node, &host)), index(show(&ns, "link show eth0")));
        let link = &show(&ns, "link show eth0")[0];
        assert_eq!(link["address"], wired.pod_mac.to_string());
        assert_eq!(show(&lab.node, &host)[0]["address"], wired.host_mac.unwrap().to_string());
        assert_eq!(wirer.ask(Wire { lease: lease.clone() }).await.unwrap(), wired);
        let second =
            (snapshot(&lab.node), snapshot(&ns), index(show(&lab.node, &host)), index(show(&ns, "link show eth0")));
        assert_eq!(first, second);
        assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        assert_eq!(first.0, snapshot(&lab.node));

        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        assert_eq!(untouched, (snapshot(&lab.node), snapshot(&ns)));
        let findings = wirer.ask(Verify { lease: lease.clone() }).await.unwrap();
        for what in ["link", "address", "route", "rule", "neighbour", "qdisc"] {
            assert!(findings.iter().any(|f| f.what == what), "{what} missing in {findings:?}");
        }
    });
}

#[test]
fn every_damage_is_found_and_repaired() {
    let Some(lab) = Lab::shaping("every_damage_is_found_and_repaired") else { return };
    let eni = lab.eni(1);
    let (ns, mut lease) = lab.pod(&eni, 21, Veth);
    lease.bandwidth = Bandwidth { ingress_bps: Some(10_000_000), egress_bps: Some(20_000_000) };
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        let wired = wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let host = wired.host_ifname.unwrap();
        let (v4, v6) = (lease.v4, lease.v6.unwrap());
        let node = &lab.node;
        let healthy = (snapshot(node), snapshot(&ns));
        let damages = [
            ("link", format!("ip -n {ns} link set eth0 down")),
            ("link", format!("ip -n {ns} link set eth0 mtu 1400")),
            ("link", format!("ip -n {node} link set {host} down")),
            ("link", format!("ip -n {node} link del {host}")),
            ("address", format!("ip -n {ns} addr del {v4}/32 dev eth0")),
            ("address", format!("ip -n {ns} addr del {v6}/128 dev eth0")),
            ("address", format!("ip -n {ns} addr add 10.0.1.99/32 dev eth0")),
            ("route", format!("ip -n {ns} route del default")),
            ("route", format!("ip -n {ns} -6 route del default")),
            ("route", format!("ip -n {node} route del {v4}")),
            ("route", format!("ip -n {node} -6 route del {v6}")),
            ("route", format!("ip -n {node} route flush table {}", u32::from(eni.primary4))),
            ("rule", format!("ip -n {node} rule del from {v4}")),
            ("rule", format!("ip -n {node} rule del to {v4}")),
            ("rule", format!("ip -n {node} -6 rule del from {v6}")),
            ("neighbour", format!("ip -n {ns} neigh del 169.254.1.1 dev eth0")),
            (
                "neighbour",
                format!("ip -n {ns} neigh replace 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent"),
            ),
            ("neighbour", format!("ip -n {node} neigh del {v6} dev {host}")),
            ("qdisc", format!("tc -n {ns} qdisc del dev eth0 root")),
            ("qdisc", format!("tc -n {node} qdisc replace dev {host} root tbf rate 99mbit burst 100kb limit 100kb")),
        ];
        for (what, damage) in damages {
            let mut words = damage.split_whitespace();
            let status = std::process::Command::new(words.next().unwrap()).args(words).status().unwrap();
            assert!(status.success(), "{damage}");
            let findings = wirer.ask(Verify { lease: lease.clone() }).await.unwrap();
            assert!(findings.iter().any(|f| f.what == what), "{damage}: {findings:?}");
            wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
            assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), [], "{damage}");
            assert_eq!(healthy, (snapshot(node), snapshot(&ns)), "{damage}");
        }
    });
}

#[test]
fn hostile_and_dead_namespaces_are_told_apart() {
    let Some(lab) = Lab::here("hostile_and_dead_namespaces_are_told_apart") else { return };
    let eni = lab.eni(1);
    let (ns, lease) = lab.pod(&eni, 21, Veth);
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        let before = snapshot(&lab.node);
        let with = |path: &str| {
            let mut lease = lease.clone();
            lease.netns = path.into();
            lease
        };
        let gone = wirer.ask(Wire { lease: with("/var/run/netns/fwt-no-such") }).await;
        assert!(matches!(gone, Err(WireError::NamespaceGone(_))), "{gone:?}");
        let own = wirer.ask(Wire { lease: with(&format!("/var/run/netns/{}", lab.node)) }).await.unwrap_err();
        assert!(own.to_string().contains("node's own namespace"), "{own}");
        let file = wirer.ask(Wire { lease: with("/etc/passwd") }).await.unwrap_err();
        assert!(file.to_string().contains("not a network namespace"), "{file}");
        let mut bad = lease.clone();
        bad.attachment.ifname = "../eth0".into();
        assert!(wirer.ask(Wire { lease: bad }).await.unwrap_err().to_string().contains("cannot name"));
        let mut unknown = lease.clone();
        unknown.eni = lab.eni_ref(9);
        let missing = wirer.ask(Wire { lease: unknown }).await;
        assert!(matches!(missing, Err(WireError::DeviceMissing(_))), "{missing:?}");

        // Somebody else's interface is in our place: said, and left alone.
        ip(&format!("-n {ns} link add eth0 type bridge"));
        let taken = wirer.ask(Wire { lease: lease.clone() }).await.unwrap_err();
        assert!(taken.to_string().contains("another"), "{taken}");
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        assert_eq!(show(&ns, "link show eth0")[0]["linkinfo"]["info_kind"], "bridge");
        ip(&format!("-n {ns} link del eth0"));
        assert_eq!(before, snapshot(&lab.node), "a failed wire leaves nothing");

        // The namespace dies before its DEL.
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        lab.drop_namespace(&ns);
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        assert_eq!(before, snapshot(&lab.node));
        let findings = wirer.ask(Verify { lease }).await.unwrap();
        assert_eq!(findings[0].what, "namespace");
    });
}

#[test]
fn an_address_that_moved_on_keeps_its_rules() {
    let Some(lab) = Lab::here("an_address_that_moved_on_keeps_its_rules") else { return };
    let (one, two) = (lab.eni(1), lab.eni(2));
    let (_, old) = lab.pod(&one, 21, Veth);
    let (new_ns, mut new) = lab.pod(&two, 22, Veth);
    // The same address, leased to a new sandbox before the old one's DEL came;
    // the cloud has it on another ENI by now.
    (new.v4, new.v6) = (old.v4, old.v6);
    lab.assign(&two, new.v4.into());
    lab.assign(&two, new.v6.unwrap().into());
    lab.run(async |wirer| {
        for eni in [&one, &two] {
            wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        }
        wirer.ask(Wire { lease: old.clone() }).await.unwrap();
        wirer.ask(Wire { lease: new.clone() }).await.unwrap();
        let outside = listen(&lab.router, OUTSIDE4);
        assert_eq!(whoami(&new_ns, outside.at), Ok(new.v4.into()), "the newer sandbox has the address");
        wirer.ask(Unwire { lease: old }).await.unwrap();
        assert_eq!(wirer.ask(Verify { lease: new.clone() }).await.unwrap(), []);
        assert_eq!(whoami(&new_ns, outside.at), Ok(new.v4.into()));
        // The same sandbox with another address: the old one leaves no trace.
        let mut changed = new.clone();
        changed.v4 = std::net::Ipv4Addr::new(10, 0, 2, 77);
        changed.v6 = None;
        wirer.ask(Wire { lease: changed.clone() }).await.unwrap();
        let kernel = snapshot(&lab.node) + &snapshot(&new_ns);
        assert!(!kernel.contains(&new.v4.to_string()) && !kernel.contains(&new.v6.unwrap().to_string()), "{kernel}");
        assert_eq!(wirer.ask(Verify { lease: changed }).await.unwrap(), []);
    });
}

#[test]
fn two_hundred_pods_are_wired_in_parallel() {
    let Some(lab) = Lab::here("two_hundred_pods_are_wired_in_parallel") else { return };
    let eni = lab.eni(1);
    let pods: Vec<_> = (11..211).map(|host| lab.pod(&eni, host, Veth)).collect();
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        let before = snapshot(&lab.node);
        // One alone first: what a single ADD costs.
        let mut alone = Vec::new();
        for (_, lease) in &pods[..20] {
            let began = Instant::now();
            wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
            alone.push(began.elapsed());
        }
        alone.sort();
        let began = Instant::now();
        let results =
            futures::future::join_all(pods[20..].iter().map(|(_, l)| wirer.ask(Wire { lease: l.clone() }))).await;
        let wired = began.elapsed();
        assert!(results.iter().all(Result::is_ok), "{:?}", results.iter().find(|r| r.is_err()));
        let inventory = wirer.ask(Inventory {}).await.unwrap();
        assert_eq!(inventory.host_links.len(), 200);
        assert_eq!(inventory.routed.len(), 400);
        assert_eq!(inventory.ruled.len(), 400, "the ENI's own is not a pod's");
        let checks = futures::future::join_all(pods.iter().map(|(_, l)| wirer.ask(Verify { lease: l.clone() }))).await;
        assert!(checks.iter().all(|c| c.as_ref().is_ok_and(Vec::is_empty)), "{checks:?}");
        let outside = listen(&lab.router, OUTSIDE4);
        for (ns, lease) in pods.iter().step_by(40) {
            assert_eq!(whoami(ns, outside.at), Ok(lease.v4.into()));
        }
        let began = Instant::now();
        let results = futures::future::join_all(pods.iter().map(|(_, l)| wirer.ask(Unwire { lease: l.clone() }))).await;
        assert!(results.iter().all(Result::is_ok), "{:?}", results.iter().find(|r| r.is_err()));
        println!(
            "one Wire: median {:?}, worst {:?}; 180 in parallel {wired:?}; 200 Unwire {:?}",
            alone[10],
            alone[19],
            began.elapsed()
        );
        assert_eq!(before, snapshot(&lab.node));
    });
}

#[test]
fn bandwidth_is_kept_in_both_directions() {
    let Some(lab) = Lab::shaping("bandwidth_is_kept_in_both_directions") else { return };
    let eni = lab.eni(1);
    let (ns, mut lease) = lab.pod(&eni, 21, Veth);
    lease.bandwidth = Bandwidth { ingress_bps: Some(20_000_000), egress_bps: Some(40_000_000) };
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let into = throughput(&lab.router, &ns, lease.v4.into());
        let out = throughput(&ns, &lab.router, OUTSIDE4.into());
        println!("ingress {:.1} of 20 Mbit/s, egress {:.1} of 40 Mbit/s", into / 1e6, out / 1e6);
        assert!((at_least(14e6)..22.5e6).contains(&into), "{into}");
        assert!((at_least(28e6)..45e6).contains(&out), "{out}");
        // Taken away again, the limits go.
        lease.bandwidth = Bandwidth::default();
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let free = throughput(&lab.router, &ns, lease.v4.into());
        assert!(free > at_least(100e6), "{free}");
    });
}

#[test]
fn an_eni_is_awaited_prepared_restored_and_forgotten() {
    if skipped("an_eni_is_awaited_prepared_restored_and_forgotten") {
        return;
    }
    let mut lab = Lab::new();
    let sysfs = Sysfs::mount();
    lab.config.sysfs.clone_from(&sysfs.0);
    lab.config.spread_receive = SpreadReceive::Always;
    let expected = lab.eni_ref(1);
    let before = snapshot(&lab.node);
    lab.run(async |wirer| {
        let ask = PrepareEni { eni: expected.clone(), shared: true };
        let missing = wirer.ask_within(ask.clone(), Duration::from_millis(300)).await;
        assert!(matches!(missing, Err(WireError::DeviceMissing(_))), "{missing:?}");
        // It appears while somebody waits.
        let waiting = tokio::task::spawn_local({
            let wirer = wirer.clone();
            let ask = ask.clone();
            async move { wirer.ask(ask).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!waiting.is_finished());
        let began = Instant::now();
        let eni = lab.eni(1);
        let prepared = waiting.await.unwrap().unwrap();
        assert!(began.elapsed() < Duration::from_secs(1));
        assert_eq!((&*prepared.ifname, prepared.rx_queues), ("eth1", 2));
        let inventory = wirer.ask(Inventory {}).await.unwrap();
        let mask = sysfs.0.join("class/net/eth1/queues/rx-1/rps_cpus");
        if mask.exists() {
            if std::thread::available_parallelism().unwrap().get() == 2 {
                assert_eq!(prepared.receive_cores, ["0", "1"]);
            }
            assert_eq!(prepared.receive_cores.len(), 2);
            assert_ne!(std::fs::read_to_string(mask).unwrap().trim().trim_matches(['0', ',']), "");
            assert_eq!(inventory.receive, [("eth1".to_owned(), prepared.receive_cores.clone())]);
        } else {
            skip("an_eni_is_awaited_prepared_restored_and_forgotten: receive queues", "RPS in this kernel");
        }
        assert!(inventory.enis.contains(&(eni.mac, "eth1".to_owned())));
        // The device carries the node's address: all of the ENI's are pods'.
        let shown = show(&lab.node, "-4 addr show dev eth1");
        assert_eq!(shown[0]["addr_info"].as_array().unwrap().len(), 1);
        assert_eq!(
            shown[0]["addr_info"][0]["local"],
            show(&lab.node, "-4 addr show dev eth0")[0]["addr_info"][0]["local"]
        );

        // A flap takes the routes; they come back without anybody asking.
        let healthy = snapshot(&lab.node);
        ip(&format!("-n {} link set eth1 down", lab.node));
        let began = Instant::now();
        while snapshot(&lab.node) != healthy {
            assert!(began.elapsed() < Duration::from_secs(5), "{}\n!=\n{healthy}", snapshot(&lab.node));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }

        wirer.ask(ForgetEni { eni: eni.clone() }).await.unwrap();
        wirer.ask(ForgetEni { eni: eni.clone() }).await.unwrap();
        let left: Vec<String> =
            snapshot(&lab.node).lines().filter(|l| !l.contains("eth1")).map(str::to_owned).collect();
        let was: Vec<String> = before.lines().map(str::to_owned).collect();
        assert_eq!(left, was);
        assert_eq!(show(&lab.node, "link show eth1")[0]["operstate"], "DOWN");
        // Gone altogether.
        ip(&format!("-n {} link del eth1", lab.node));
        wirer.ask(ForgetEni { eni }).await.unwrap();
    });
}

#[test]
fn the_nodes_own_device_keeps_what_its_os_gave_it() {
    let Some(lab) = Lab::here("the_nodes_own_device_keeps_what_its_os_gave_it") else { return };
    let eni = lab.eni_ref(0);
    let (ns, lease) = lab.pod(&eni, 21, Veth);
    lab.run(async |wirer| {
        let before = snapshot(&lab.node);
        // The node's OS has learnt a route from a router's advertisement: when the
        // node becomes a router itself it must go on listening.
        ip(&format!("-n {} -6 route add default via fe80::99 dev eth0 proto ra metric 2048", lab.node));
        let accept_ra = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_ra").unwrap();
        assert_eq!(accept_ra().trim(), "1");
        let prepared = wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        assert_eq!(prepared.ifname, "eth0");
        assert_eq!(accept_ra().trim(), "2");
        ip(&format!("-n {} -6 route del default via fe80::99 dev eth0", lab.node));
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let outside = listen(&lab.router, OUTSIDE4);
        assert_eq!(whoami(&ns, outside.at), Ok(lease.v4.into()));
        assert_eq!(whoami(&lab.node, outside.at), Ok(NODE4.into()));
        wirer.ask(Unwire { lease }).await.unwrap();
        wirer.ask(ForgetEni { eni }).await.unwrap();
        assert_eq!(before, snapshot(&lab.node));
        assert_eq!(whoami(&lab.node, outside.at), Ok(NODE4.into()));
    });
}

#[test]
fn a_configured_mtu_wins_and_settings_are_per_device() {
    if skipped("a_configured_mtu_wins_and_settings_are_per_device") {
        return;
    }
    let mut lab = Lab::new();
    lab.config.mtu = Some(1400);
    let eni = lab.eni(1);
    let (ns, mut lease) = lab.pod(&eni, 21, Veth);
    lease.v6 = None;
    let conf =
        |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}")).unwrap().trim().to_owned();
    let others = ["all/rp_filter", "default/rp_filter", "eth0/rp_filter"].map(conf);
    lab.run(async |wirer| {
        assert_eq!(wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap().mtu, 1400);
        let wired = wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        assert_eq!(wired.mtu, 1400);
        let mtu = |ns: &str, dev: &str| show(ns, &format!("link show {dev}"))[0]["mtu"].as_u64();
        let host = wired.host_ifname.unwrap();
        for (ns, dev) in [(&ns, "eth0"), (&lab.node, &host), (&lab.node, "eth1")] {
            assert_eq!(mtu(ns, dev), Some(1400), "{dev}");
        }
        assert_eq!(conf(&format!("{host}/rp_filter")), "1", "strict: a pod's source is its own");
        assert_eq!(conf("eth1/rp_filter"), "2", "loose: policy routes");
        assert_eq!(others, ["all/rp_filter", "default/rp_filter", "eth0/rp_filter"].map(conf), "nobody else's");
        let v6 = show(&ns, "-6 addr show scope global");
        assert!(v6.as_array().unwrap().iter().all(|l| l["addr_info"].as_array().is_none_or(Vec::is_empty)), "{v6}");
        let outside = listen(&lab.router, OUTSIDE4);
        assert_eq!(whoami(&ns, outside.at), Ok(lease.v4.into()));
        assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
        wirer.ask(Unwire { lease }).await.unwrap();
    });
}

#[test]
fn a_namespace_has_one_identity_whatever_its_name() {
    if skipped("a_namespace_has_one_identity_whatever_its_name") {
        return;
    }
    use fairway::sys::netns::Netns;
    let lab = Lab::new();
    let open = |name: &str| Netns::open(&std::path::Path::new("/var/run/netns").join(name)).unwrap();
    let home = Netns::current().unwrap();
    let (node, router) = (open(&lab.node), open(&lab.router));
    assert_eq!(node.id(), home.id());
    assert_ne!(router.id(), home.id());
    let (a, b) = (node.cookie(&home).unwrap(), router.cookie(&home).unwrap());
    assert!(a.is_none() || a != b);
    // The thread is back home afterwards.
    assert_eq!(Netns::current().unwrap().id(), home.id());
}
