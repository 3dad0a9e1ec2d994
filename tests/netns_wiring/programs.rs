//! The hook for programs, and what happens when a wiring thread dies in it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fairway::agent::programs::Programs;
use fairway::datapath::{Datapath, Options, Via};
use fairway::model::AttachMode::{Exclusive, Veth};
use fairway::model::{AttachmentId, Bandwidth};
use fairway::netns::{Attachment, Inventory, Placed, PodPrograms, PrepareEni, Unwire, Verify, Wire, WireError};

use crate::support::*;

#[derive(Default)]
struct Probe {
    calls: Mutex<Vec<String>>,
    refuse: AtomicBool,
    die: AtomicBool,
    /// As on a kernel where a device that moves loses its programs; the pod.
    loses: Mutex<Option<String>>,
    /// What was told last, by name.
    uplink: Mutex<Option<Told>>,
}

type Told = (Option<String>, Vec<std::net::IpAddr>);

impl PodPrograms for Probe {
    fn attach(&self, to: &Attachment<'_>) -> Result<Placed, String> {
        if self.die.swap(false, Ordering::SeqCst) {
            panic!("the loader died");
        }
        if self.refuse.load(Ordering::SeqCst) {
            return Err("the verifier said no".to_owned());
        }
        // We are in the node's namespace, and the device is there.
        let links: serde_json::Value = serde_json::from_str(&ip("-j link")).unwrap();
        let by_index = |index: u32| links.as_array().unwrap().iter().find(|l| l["ifindex"] == index);
        let link = by_index(to.host_ifindex).unwrap();
        assert_eq!(link["ifname"], to.host_ifname);
        let up = link["flags"].as_array().unwrap().contains(&"UP".into());
        let eni = to.eni_ifindex.map(|i| by_index(i).unwrap()["address"].as_str().unwrap().to_owned());
        self.calls.lock().unwrap().push(format!("attach up={up} eni={eni:?}"));
        let Some(pod) = &*self.loses.lock().unwrap() else { return Ok(Placed::Yes) };
        if to.eni_ifindex.is_some() {
            return Ok(Placed::OnceInside);
        }
        let inside = &show(pod, "link show eth0")[0];
        assert_eq!(inside["address"], to.lease.eni.mac.to_string());
        assert!(!inside["flags"].as_array().unwrap().contains(&"UP".into()), "no packet has passed: {inside}");
        self.calls.lock().unwrap().push("inside".to_owned());
        Ok(Placed::Yes)
    }
    fn detach(&self, from: &AttachmentId) -> Result<(), String> {
        self.calls.lock().unwrap().push(format!("detach {}", from.ifname));
        Ok(())
    }
    fn verify(&self, _: &Attachment<'_>) -> Result<Vec<String>, String> {
        Ok(if self.refuse.load(Ordering::SeqCst) { vec!["it is not attached".to_owned()] } else { Vec::new() })
    }
    fn pinned(&self) -> Result<Vec<String>, String> {
        Ok(vec!["one".to_owned()])
    }
    fn eni_up(&self, _: u32) -> Result<(), String> {
        Ok(())
    }
    fn eni_gone(&self, _: u32) -> Result<(), String> {
        Ok(())
    }
    fn node_addresses(&self, _: &[std::net::IpAddr]) -> Result<(), String> {
        Ok(())
    }
    fn uplink(&self, device: Option<(u32, &[std::net::IpAddr])>) -> Result<(), String> {
        let name = device.and_then(|(index, _)| nix::net::if_::if_indextoname(index).ok());
        let own = device.map(|(_, own)| own.to_vec()).unwrap_or_default();
        *self.uplink.lock().unwrap() = Some((name.map(|n| n.to_string_lossy().into_owned()), own));
        Ok(())
    }
}

#[test]
fn the_programs_are_told_which_device_carries_the_nodes_own_traffic() {
    let test = "the_programs_are_told_which_device_carries_the_nodes_own_traffic";
    if skipped(test) {
        return;
    }
    let lab = Lab::new();
    let probe = Arc::new(Probe::default());
    let told = |probe: &Probe| probe.uplink.lock().unwrap().clone();
    let own = |device: &str, more: &[&str]| {
        let more = more.iter().map(|ip| ip.parse().unwrap());
        Some((Some(device.to_owned()), [NODE4.into(), NODE6.into()].into_iter().chain(more).collect::<BTreeSet<_>>()))
    };
    let as_set = |told: Option<Told>| told.map(|(device, own)| (device, own.into_iter().collect::<BTreeSet<_>>()));
    lab.run_with(probe.clone(), async |_| {
        let until = async |wanted: Option<(Option<String>, BTreeSet<_>)>| {
            let deadline = Instant::now() + Duration::from_secs(5);
            while as_set(told(&probe)) != wanted {
                assert!(Instant::now() < deadline, "{:?}", told(&probe));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        until(own("eth0", &[])).await;
        ip(&format!("-n {} addr add 10.0.0.77/24 dev eth0", lab.node));
        until(own("eth0", &["10.0.0.77"])).await;
    });
}

#[test]
fn programs_are_in_place_before_a_packet_can_pass() {
    if skipped("programs_are_in_place_before_a_packet_can_pass") {
        return;
    }
    let lab = Lab::new();
    let (shared, own) = (lab.eni(1), lab.eni(2));
    let (_, veth) = lab.pod(&shared, 21, Veth);
    let (_, exclusive) = lab.pod(&own, 22, Exclusive);
    let probe = Arc::new(Probe::default());
    let calls = || std::mem::take(&mut *probe.calls.lock().unwrap());
    lab.run_with(probe.clone(), async |wirer| {
        wirer.ask(PrepareEni { eni: shared.clone(), shared: true }).await.unwrap();
        wirer.ask(Wire { lease: veth.clone() }).await.unwrap();
        assert_eq!(calls(), ["attach up=false eni=None"]);
        wirer.ask(Wire { lease: veth.clone() }).await.unwrap();
        assert_eq!(calls(), ["attach up=true eni=None"], "again, in case it was lost");
        wirer.ask(Wire { lease: exclusive.clone() }).await.unwrap();
        assert_eq!(calls(), [format!("attach up=false eni={:?}", Some(own.mac.to_string()))], "before the ENI moves");
        assert_eq!(wirer.ask(Inventory {}).await.unwrap().pinned, ["one"]);
        wirer.ask(Unwire { lease: exclusive.clone() }).await.unwrap();
        assert_eq!(calls(), ["detach eth0"]);

        probe.refuse.store(true, Ordering::SeqCst);
        let findings = wirer.ask(Verify { lease: veth.clone() }).await.unwrap();
        assert_eq!(findings.iter().map(|f| &*f.what).collect::<Vec<_>>(), ["program"]);
        let before = snapshot(&lab.node);
        let refused = wirer.ask(Wire { lease: exclusive.clone() }).await.unwrap_err();
        assert!(refused.to_string().contains("the verifier said no"), "{refused}");
        assert_eq!(before, snapshot(&lab.node), "a pod without its program is not wired");
    });
}

#[test]
fn programs_that_a_move_would_lose_are_attached_inside_before_the_eni_is_up() {
    if skipped("programs_that_a_move_would_lose_are_attached_inside_before_the_eni_is_up") {
        return;
    }
    let lab = Lab::new();
    let own = lab.eni(1);
    // As a system that configures every device would leave it.
    ip(&format!("-n {} link set eth1 up", lab.node));
    let (ns, lease) = lab.pod(&own, 21, Exclusive);
    let probe = Arc::new(Probe { loses: Mutex::new(Some(ns.clone())), ..Probe::default() });
    lab.run_with(probe.clone(), async |wirer| {
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        let first = format!("attach up=false eni={:?}", Some(own.mac.to_string()));
        assert_eq!(*probe.calls.lock().unwrap(), [&*first, "attach up=false eni=None", "inside"]);
        let outside = listen(&lab.router, OUTSIDE4);
        assert_eq!(whoami(&ns, outside.at), Ok(lease.v4.into()));
        wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
        // Refused inside: the ENI goes home again.
        let before = snapshot(&lab.node);
        probe.refuse.store(true, Ordering::SeqCst);
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap_err();
        assert_eq!(before, snapshot(&lab.node));
    });
}

#[test]
fn an_exclusive_pod_has_its_programs_however_this_kernel_attaches_them() {
    let test = "an_exclusive_pod_has_its_programs_however_this_kernel_attaches_them";
    if skipped(test) {
        return;
    }
    for in_pod in [Via::Tcx, Via::Clsact] {
        let lab = Lab::new();
        let Some(bpffs) = Bpffs::mount(test) else { return };
        if cannot_shape(test, &lab) {
            return;
        }
        let open = || {
            let options = Options { in_pod, ..Options::default() };
            Arc::new(Programs::new(Datapath::open_with(bpffs.0.path(), options).unwrap().0, true))
        };
        let own = lab.eni(1);
        let (ns, mut lease) = lab.pod(&own, 21, Exclusive);
        lease.bandwidth = Bandwidth { ingress_bps: Some(30_000_000), egress_bps: Some(30_000_000) };
        let outside = listen(&lab.router, OUTSIDE4);
        let programs = open();
        let moved = |programs: &Programs| {
            let seen = &programs.view()[0];
            let count = |key: &str| seen[key].as_u64().unwrap();
            (count("ingress_packets"), count("egress_packets"))
        };
        lab.run_with(programs.clone(), async |wirer| {
            wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
            assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
            assert_eq!(whoami(&ns, outside.at), Ok(lease.v4.into()));
            let (ingress, egress) = moved(&programs);
            assert!(ingress >= 4 && egress >= 4, "both sides of a conversation: {ingress} {egress}");
            // Taken away, with the limit that hangs beside them.
            if programs.view()[0]["via"] == "clsact" {
                let tc = ["-n", &ns, "qdisc", "del", "dev", "eth0", "clsact"];
                assert!(std::process::Command::new("tc").args(tc).status().unwrap().success());
                let findings = wirer.ask(Verify { lease: lease.clone() }).await.unwrap();
                let whats: Vec<_> = findings.iter().map(|f| &*f.what).collect();
                assert_eq!(whats, ["qdisc", "program"], "{findings:?}");
            }
            wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
            assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
        });
        drop(programs);
        // The agent is another one now.
        let programs = open();
        programs.take_up(std::slice::from_ref(&lease));
        lab.run_with(programs.clone(), async |wirer| {
            assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
            let before = moved(&programs);
            assert_eq!(whoami(&ns, outside.at), Ok(lease.v4.into()));
            let after = moved(&programs);
            assert!(after.0 > before.0 && after.1 > before.1, "{before:?} {after:?}");
            wirer.ask(Unwire { lease: lease.clone() }).await.unwrap();
            assert_eq!(wirer.ask(Inventory {}).await.unwrap().pinned, [] as [&str; 0]);
        });
        let home = format!("eni{}", own.mac.to_string().replace(':', ""));
        let tc = ["-n", &lab.node, "qdisc", "show", "dev", &home];
        let left = std::process::Command::new("tc").args(tc).output().unwrap().stdout;
        assert!(!String::from_utf8(left).unwrap().contains("clsact"), "it comes home as it went");
    }
}

#[test]
fn a_wiring_thread_that_dies_is_replaced_and_its_pod_is_wired_later() {
    if skipped("a_wiring_thread_that_dies_is_replaced_and_its_pod_is_wired_later") {
        return;
    }
    let lab = Lab::new();
    let eni = lab.eni(1);
    let (ns, lease) = lab.pod(&eni, 21, Veth);
    let probe = Arc::new(Probe::default());
    lab.run_with(probe.clone(), async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        probe.die.store(true, Ordering::SeqCst);
        let died = wirer.ask(Wire { lease: lease.clone() }).await;
        assert_eq!(died, Err(WireError::Unavailable));
        // Half made, and nobody holds its lock any more.
        wirer.ask(Wire { lease: lease.clone() }).await.unwrap();
        assert_eq!(wirer.ask(Verify { lease: lease.clone() }).await.unwrap(), []);
        let outside = listen(&lab.router, OUTSIDE4);
        assert_eq!(whoami(&ns, outside.at), Ok(lease.v4.into()));
    });
}

#[test]
fn an_undo_does_not_overtake_what_it_undoes() {
    if skipped("an_undo_does_not_overtake_what_it_undoes") {
        return;
    }
    let lab = Lab::new();
    let eni = lab.eni(1);
    let pods: Vec<_> = (21..41).map(|host| lab.pod(&eni, host, Veth)).collect();
    lab.run(async |wirer| {
        wirer.ask(PrepareEni { eni: eni.clone(), shared: true }).await.unwrap();
        let before = snapshot(&lab.node);
        // Each undo is sent while its wire is still waiting its turn.
        let both = pods.iter().map(|(_, lease)| {
            let (wire, undo) = (Wire { lease: lease.clone() }, Unwire { lease: lease.clone() });
            let (first, then) = (wirer.clone(), wirer.clone());
            async move { tokio::join!(first.ask(wire), then.ask(undo)) }
        });
        for (wired, undone) in futures::future::join_all(both).await {
            wired.unwrap();
            undone.unwrap();
        }
        assert_eq!(before, snapshot(&lab.node));
    });
}
