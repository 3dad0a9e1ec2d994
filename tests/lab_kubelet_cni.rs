//! The lab's kubelet calls plugins as kubelet with containerd does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab_kubelet_support;
mod lab_vpc_support;

use std::path::Path;
use std::time::Duration;

use fairway::lab::kubelet::RequestError;
use fairway::lab::vpc::ns::Netns;
use fairway::lab::workload::client::Ask;
use lab_kubelet_support::*;
use lab_vpc_support::{Cleanup, lab_id, missing, sh, skip};
use serde_json::{Value, json};

macro_rules! rig {
    ($test:literal, $letter:literal, $conf:expr, $plugins:expr) => {{
        if let Some(missing) = missing() {
            return skip($test, missing);
        }
        let id = lab_id($letter);
        let cleanup = Cleanup(id.clone());
        (Rig::start(&id, $conf, $plugins).await, cleanup)
    }};
}

const BOTH: &[&str] = &["first", "second"];

#[tokio::test]
async fn a_pod_passes_through_the_chain_and_back_in_reverse() {
    let (rig, _cleanup) = rig!("a_pod_passes_through_the_chain_and_back_in_reverse", 'n', Some(chain("1.1.0")), BOTH);
    let mut web = pod("web-0", "u1");
    web["metadata"]["annotations"] = json!({"kubernetes.io/egress-bandwidth": "20M", "fairway.dev/mode": "exclusive"});
    web["spec"]["containers"][0]["ports"][0]["hostPort"] = json!(80);
    rig.apply(web.clone());
    let status = rig.api.running("u1").await;
    assert!(is_ready(&status));
    let record = rig.record("web-0");
    let netns = record.netns.clone().unwrap();
    assert!(netns.to_str().unwrap().starts_with("/var/run/netns/cni-") && netns.exists());
    // The address of the sandbox's interface, not the host's.
    let last = u8::from_str_radix(&record.sandboxes[0][..2], 16).unwrap();
    assert_eq!(status.pod_ip.as_deref(), Some(format!("10.8.0.{last}").as_str()));
    assert_eq!(status.pod_ips.unwrap().len(), 1);
    // Noted for `lab down`, and its ports answer in its namespace.
    let note = rig.node.dirs().sandboxes.join(&record.sandboxes[0]);
    assert_eq!(std::fs::read_to_string(&note).unwrap().trim(), netns.to_str().unwrap());
    let ns = Netns::open(&netns).unwrap();
    let to = "127.0.0.1:8080".parse().unwrap();
    assert_eq!(Ask::new(to).tcp(&ns).await.unwrap().text, "web-0");
    assert_eq!(Ask::new(to).udp(&ns).await.unwrap().text, "web-0");
    drop(ns);
    rig.kubelet.check("default", "web-0").await.unwrap();

    rig.apply(deleting(web, 30));
    rig.api.until("web-0 ended", |api| api.ended.lock().first().cloned()).await;
    assert!(!netns.exists() && !note.exists());
    let order = rig.order();
    assert_eq!(order, ["first ADD", "second ADD", "first CHECK", "second CHECK", "second DEL", "first DEL"]);

    let calls: Vec<Call> = rig.calls().into_iter().filter(|c| c.verb() != "STATUS").collect();
    let (add1, add2, del2, del1) = (&calls[0], &calls[1], &calls[4], &calls[5]);
    let node_ns = format!("net:[{}]", rig.node.ns().identity().unwrap().1);
    for call in &calls {
        assert_eq!(call.netns, node_ns, "plugins run in the node's namespace");
        assert_eq!(call.env["CNI_NETNS"], netns.to_str().unwrap());
        assert_eq!(call.env["CNI_CONTAINERID"], record.sandboxes[0]);
        assert_eq!(call.env["CNI_IFNAME"], "eth0");
        assert_eq!(call.stdin["name"], "test");
        assert_eq!(call.stdin["cniVersion"], "1.1.0");
        for part in ["K8S_POD_NAMESPACE=default", "K8S_POD_NAME=web-0", "K8S_POD_UID=u1", "IgnoreUnknown=1"] {
            assert!(call.env["CNI_ARGS"].split(';').any(|a| a == part), "{part}");
        }
    }
    assert_eq!(add1.stdin["own"], 1);
    assert_eq!(add1.stdin.get("prevResult"), None);
    assert_eq!(
        add1.stdin["runtimeConfig"]["bandwidth"],
        json!({"EgressRate": 20_000_000, "EgressBurst": 4_294_967_295u32})
    );
    let annotations = &add1.stdin["runtimeConfig"]["io.kubernetes.cri.pod-annotations"];
    assert_eq!(annotations["fairway.dev/mode"], "exclusive");
    assert_eq!(add1.stdin["runtimeConfig"].get("portMappings"), None);
    assert_eq!(add2.stdin["prevResult"]["interfaces"][0]["name"], "first");
    assert_eq!(add2.stdin["runtimeConfig"]["portMappings"][0]["hostPort"], 80);
    // DEL: every plugin gets the chain's result, and the same runtimeConfig.
    for del in [del2, del1] {
        assert_eq!(del.stdin["prevResult"]["interfaces"][0]["name"], "second");
    }
    assert_eq!(del1.stdin["runtimeConfig"], add1.stdin["runtimeConfig"]);
}

#[tokio::test]
async fn a_failed_add_is_undone_and_tried_again_with_a_new_sandbox() {
    let (rig, _cleanup) =
        rig!("a_failed_add_is_undone_and_tried_again_with_a_new_sandbox", 'o', Some(chain("1.1.0")), BOTH);
    rig.fail("second", "ADD", true);
    rig.apply(pod("web-0", "u1"));
    let message = rig.api.until("the reason is shown", |api| api.last("u1").and_then(|s| s.message)).await;
    assert!(message.contains("told to fail") && message.contains("second"), "{message}");
    while rig.record("web-0").failure_count < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    rig.fail("second", "ADD", false);
    rig.api.running("u1").await;
    let calls: Vec<Call> = rig.calls().into_iter().filter(|c| c.verb() != "STATUS").collect();
    let undone: Vec<String> = calls[..4].iter().map(|c| format!("{} {}", c.plugin, c.verb())).collect();
    assert_eq!(undone, ["first ADD", "second ADD", "second DEL", "first DEL"]);
    assert_eq!(calls[0].env["CNI_CONTAINERID"], calls[3].env["CNI_CONTAINERID"]);
    assert_ne!(calls[0].env["CNI_CONTAINERID"], calls[4].env["CNI_CONTAINERID"]);
    assert!(!Path::new(&calls[0].env["CNI_NETNS"]).exists());
    let record = rig.record("web-0");
    assert!(record.failure_count >= 2 && record.attempts >= 3 && record.sandboxes.len() == 1, "{record:?}");
}

#[tokio::test]
async fn a_failing_status_makes_the_node_unready_and_holds_adds_back() {
    let (rig, _cleanup) = rig!("a_failing_status_makes_the_node_unready_and_holds_adds_back", 'p', None, BOTH);
    // No configuration yet.
    let first = rig.api.until("the node is reported", |api| api.node.lock().last().cloned()).await;
    assert!(first.unwrap_err().contains("cni plugin not initialized"));
    rig.fail("second", "STATUS", true);
    rig.apply(pod("web-0", "u1"));
    std::fs::write(rig.node.dirs().net_d.join("10-test.conflist"), chain("1.1.0").to_string()).unwrap();
    rig.api
        .until("STATUS fails", |api| {
            api.node.lock().last().filter(|r| r.as_ref().is_err_and(|e| e.contains("told to fail"))).cloned()
        })
        .await
        .unwrap_err();
    let status = rig.calls().into_iter().find(|c| c.verb() == "STATUS").unwrap();
    assert_eq!((status.env["CNI_CONTAINERID"].as_str(), status.env["CNI_NETNS"].as_str()), ("", ""));
    assert_eq!(status.stdin.get("runtimeConfig"), None);
    assert_eq!(rig.order(), Vec::<String>::new(), "no ADD while STATUS fails");
    rig.fail("second", "STATUS", false);
    rig.api.running("u1").await;
    assert_eq!(rig.api.node.lock().last().unwrap(), &Ok(()));
    // Failing again: running pods stay.
    rig.fail("second", "STATUS", true);
    rig.api.until("NotReady", |api| api.node.lock().last().filter(|r| r.is_err()).cloned()).await.unwrap_err();
    assert_eq!(rig.api.last("u1").unwrap().phase.as_deref(), Some("Running"));
    rig.apply(pod("web-1", "u2"));
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(rig.order(), ["first ADD", "second ADD"]);
    // A pod that never came so far ends without a call.
    rig.apply(deleting(pod("web-1", "u2"), 30));
    rig.api.until("web-1 ended", |api| api.ended.lock().first().cloned()).await;
    assert_eq!(rig.order(), ["first ADD", "second ADD"]);
}

#[tokio::test]
async fn before_1_1_0_nobody_is_asked_for_status_or_gc() {
    let (rig, _cleanup) = rig!("before_1_1_0_nobody_is_asked_for_status_or_gc", 'q', Some(chain("1.0.0")), BOTH);
    rig.apply(pod("web-0", "u1"));
    rig.api.running("u1").await;
    rig.kubelet.gc().await.unwrap();
    let verbs: Vec<String> = rig.calls().iter().map(|c| c.verb().to_owned()).collect();
    assert_eq!(verbs, ["ADD", "ADD"]);
}

#[tokio::test]
async fn the_new_sandboxs_add_comes_before_the_old_ones_late_del() {
    let (rig, _cleanup) =
        rig!("the_new_sandboxs_add_comes_before_the_old_ones_late_del", 'r', Some(chain("1.1.0")), BOTH);
    rig.apply(pod("web-0", "u1"));
    rig.api.running("u1").await;
    let late = Duration::from_millis(200);
    rig.kubelet.restart_sandbox("default", "web-0", late).await.unwrap();
    let order = rig.until_calls("the late DEL", |o| o.last().is_some_and(|c| c == "first DEL")).await;
    assert_eq!(order, ["first ADD", "second ADD", "first ADD", "second ADD", "second DEL", "first DEL"]);
    let calls: Vec<Call> = rig.calls().into_iter().filter(|c| c.verb() != "STATUS").collect();
    assert_eq!(calls[5].env["CNI_CONTAINERID"], calls[0].env["CNI_CONTAINERID"]);
    // The namespace dies first: DEL comes without one, as from containerd.
    let netns = rig.record("web-0").netns.unwrap();
    rig.kubelet.kill_sandbox("default", "web-0", Duration::ZERO).await.unwrap();
    assert!(!netns.exists());
    rig.until_calls("the second late DEL", |o| o.iter().filter(|c| *c == "first DEL").count() == 2).await;
    let last = rig.calls().into_iter().rfind(|c| c.verb() == "DEL").unwrap();
    assert_eq!(last.env["CNI_NETNS"], "");
    let record = rig.record("web-0");
    assert_eq!(record.sandboxes.len(), 3);
    // The pod's ports answer in its newest namespace.
    let ns = Netns::open(&record.netns.unwrap()).unwrap();
    assert_eq!(Ask::new("127.0.0.1:8080".parse().unwrap()).tcp(&ns).await.unwrap().text, "web-0");
}

#[tokio::test]
async fn a_recreated_pod_of_the_same_name_is_added_before_the_old_one_is_deleted() {
    let (rig, _cleanup) = rig!(
        "a_recreated_pod_of_the_same_name_is_added_before_the_old_one_is_deleted",
        's',
        Some(chain("1.1.0")),
        BOTH
    );
    let old = pod("web-0", "u1");
    rig.apply(old.clone());
    rig.api.running("u1").await;
    // DEL of the old one fails for a while, as on a busy node.
    rig.fail("second", "DEL", true);
    rig.force_delete(old);
    rig.apply(pod("web-0", "u2"));
    rig.api.running("u2").await;
    rig.fail("second", "DEL", false);
    let order = rig.until_calls("the late DEL", |o| o.last().is_some_and(|c| c == "first DEL")).await;
    let adds = order.iter().rposition(|c| c == "second ADD").unwrap();
    assert!(adds < order.iter().position(|c| c == "first DEL").unwrap(), "{order:?}");
    assert!(rig.api.ended.lock().is_empty(), "a pod deleted by force is not deleted again");
    assert_eq!(rig.record("web-0").pod.uid, "u2");
}

#[tokio::test]
async fn gc_names_every_sandbox_whose_del_has_not_succeeded() {
    let (rig, _cleanup) = rig!("gc_names_every_sandbox_whose_del_has_not_succeeded", 't', Some(chain("1.1.0")), BOTH);
    for (name, uid) in [("a", "u1"), ("b", "u2"), ("c", "u3")] {
        rig.apply(pod(name, uid));
        rig.api.running(uid).await;
    }
    rig.force_delete(pod("a", "u1"));
    rig.until_calls("DEL of a", |o| o.last().is_some_and(|c| c == "first DEL")).await;
    rig.fail("second", "DEL", true);
    rig.force_delete(pod("b", "u2"));
    rig.until_calls("DEL of b fails", |o| o.last().is_some_and(|c| c == "second DEL")).await;
    rig.kubelet.gc().await.unwrap();
    let gc = rig.calls().into_iter().rfind(|c| c.verb() == "GC").unwrap();
    let named: std::collections::BTreeSet<String> = gc.stdin["cni.dev/valid-attachments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| a["containerID"].as_str().unwrap().to_owned())
        .collect();
    let expected = ["b", "c"].map(|n| rig.record(n).sandboxes[0].clone());
    assert_eq!(named, expected.into_iter().collect());
    rig.fail("second", "DEL", false);
    rig.kubelet.teardown().await;
    let left: Vec<_> = std::fs::read_dir(&rig.node.dirs().sandboxes).unwrap().collect();
    assert!(left.is_empty(), "teardown leaves no sandbox: {left:?}");
}

#[tokio::test]
async fn readiness_and_grace_are_honoured() {
    let (rig, _cleanup) = rig!("readiness_and_grace_are_honoured", 'u', None, BOTH);
    // Host network: probes reach it at the node's own address, without CNI.
    let mut web = pod("web-0", "u1");
    web["spec"]["hostNetwork"] = json!(true);
    web["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"port": 8080, "path": "/ready"}, "initialDelaySeconds": 1, "periodSeconds": 1});
    web["spec"]["containers"][0]["lifecycle"] = json!({"preStop": {"sleep": {"seconds": 1}}});
    web["spec"]["containers"].as_array_mut().unwrap().push(json!({"name": "never", "readinessProbe":
        {"tcpSocket": {"port": 9}, "periodSeconds": 1}}));
    let begin = std::time::Instant::now();
    rig.apply(web.clone());
    let first = |s: &k8s_openapi::api::core::v1::PodStatus| s.container_statuses.as_ref().unwrap()[0].ready;
    rig.api.until("the first container is ready", |api| api.last("u1").filter(first)).await;
    assert!(begin.elapsed() >= Duration::from_secs(1), "the initial delay was skipped");
    let status = rig.api.last("u1").unwrap();
    assert!(!is_ready(&status) && !status.container_statuses.unwrap()[1].ready);
    assert_eq!(status.pod_ip.as_deref(), Some("127.0.0.1"));
    rig.kubelet.set_ready("default", "web-0", Some(true)).unwrap();
    rig.api.until("ready by request", |api| api.last("u1").filter(is_ready)).await;
    rig.kubelet.kill_containers("default", "web-0").await.unwrap();
    let restarted =
        |s: &k8s_openapi::api::core::v1::PodStatus| s.container_statuses.as_ref().unwrap()[0].restart_count == 1;
    rig.api.until("the restart is counted", |api| api.last("u1").filter(restarted)).await;

    // It serves on through its preStop, then ends.
    let begin = std::time::Instant::now();
    rig.apply(deleting(web, 30));
    let to = "127.0.0.1:8080".parse().unwrap();
    assert_eq!(Ask::new(to).tcp(rig.node.ns()).await.unwrap().text, "web-0");
    rig.api.until("web-0 ended", |api| api.ended.lock().first().cloned()).await;
    assert!(begin.elapsed() >= Duration::from_secs(1), "the grace period was cut short");
    assert!(Ask::new(to).tcp(rig.node.ns()).await.is_err());
    assert_eq!(rig.api.last("u1").unwrap().phase.as_deref(), Some("Succeeded"));
    assert_eq!(
        rig.kubelet.kill_containers("default", "web-9").await,
        Err(RequestError::NoPod("default".into(), "web-9".into()))
    );
    assert!(rig.kubelet.kill_containers("default", "web-0").await.is_err());
}

#[tokio::test]
async fn the_reference_plugins_wire_a_pod() {
    const NAME: &str = "the_reference_plugins_wire_a_pod";
    if let Some(missing) = missing() {
        return skip(NAME, missing);
    }
    let dir = Path::new("/usr/lib/cni");
    if !dir.join("ptp").exists() {
        return skip(NAME, "reference plugins (apt-get install containernetworking-plugins)");
    }
    let id = lab_id('w');
    let _cleanup = Cleanup(id.clone());
    let data = tempfile::tempdir().unwrap();
    let conf: Value = json!({"cniVersion": "1.0.0", "name": "ref", "plugins": [
        {"type": "ptp", "ipam": {"type": "host-local", "dataDir": data.path(), "subnet": "10.8.7.0/24"}},
        {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}}]});
    let rig = Rig::start(&id, Some(conf), &[]).await;
    for plugin in ["ptp", "host-local", "tuning"] {
        rig.node.install_plugin(plugin, &dir.join(plugin)).unwrap();
    }
    rig.apply(pod("web-0", "u1"));
    let ip: std::net::IpAddr = rig.api.running("u1").await.pod_ip.unwrap().parse().unwrap();
    let to = std::net::SocketAddr::new(ip, 8080);
    assert_eq!(Ask::new(to).tcp(rig.node.ns()).await.unwrap().text, "web-0");
    let ns = Netns::open(&rig.record("web-0").netns.unwrap()).unwrap();
    assert_eq!(sh(&ns, "cat /proc/sys/net/ipv4/conf/eth0/arp_filter").trim(), "1");
    drop(ns);
    rig.apply(deleting(pod("web-0", "u1"), 0));
    rig.api.until("web-0 ended", |api| api.ended.lock().first().cloned()).await;
    assert!(!sh(rig.node.ns(), "ip -o link").contains("veth"));
    let record = rig.record("web-0");
    let calls: Vec<String> = record.calls.iter().map(|c| format!("{} {}", c.plugin, c.verb)).collect();
    assert_eq!(calls, ["ptp ADD", "tuning ADD", "tuning DEL", "ptp DEL"]);
    assert!(record.ended && record.phases.add.is_some() && record.phases.ready.is_some());
}

#[tokio::test]
async fn two_hundred_pods_answer_without_a_thread_each() {
    const NAME: &str = "two_hundred_pods_answer_without_a_thread_each";
    if let Some(missing) = missing() {
        return skip(NAME, missing);
    }
    let loopback = Path::new("/usr/lib/cni/loopback");
    if !loopback.exists() {
        return skip(NAME, "reference plugins (apt-get install containernetworking-plugins)");
    }
    let id = lab_id('x');
    let _cleanup = Cleanup(id.clone());
    let conf = json!({"cniVersion": "1.0.0", "name": "many", "plugins": [{"type": "loopback"}]});
    let rig = Rig::start(&id, Some(conf), &[]).await;
    rig.node.install_plugin("loopback", loopback).unwrap();
    let begin = std::time::Instant::now();
    for i in 0..200 {
        rig.apply(pod(&format!("p{i}"), &format!("u{i}")));
    }
    for i in 0..200 {
        rig.api.running(&format!("u{i}")).await;
    }
    let started = begin.elapsed();
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(threads < 32, "{threads} threads");
    for i in (0..200).step_by(7) {
        let ns = Netns::open(&rig.record(&format!("p{i}")).netns.unwrap()).unwrap();
        let answer = Ask::new("127.0.0.1:8080".parse().unwrap()).tcp(&ns).await.unwrap();
        assert_eq!(answer.text, format!("p{i}"));
    }
    let begin = std::time::Instant::now();
    rig.kubelet.teardown().await;
    println!("200 pods started in {started:?}, ended in {:?}, {threads} threads", begin.elapsed());
    assert_eq!(std::fs::read_dir(&rig.node.dirs().sandboxes).unwrap().count(), 0);
}
