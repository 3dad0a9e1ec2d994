//! CniServer behind the real shim: conversations, faults, the socket.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "cni_support/shim.rs"]
mod shim;
#[path = "cni_support/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fairway::cluster::{NodeInfo, Owner, PodInfo};
use fairway::cni::wire;
use fairway::model::{AttachMode, Bandwidth, PodKey};
use fairway::netns::{Finding, WireError};
use fairway::pool::PoolError;
use serde_json::json;
use world::{World, id, until};

#[test]
fn a_pod_gets_its_address_in_every_version_and_gives_it_back() {
    let world = World::up();
    for (n, version) in wire::SUPPORTED.iter().enumerate() {
        let sandbox = format!("s{n}");
        let config = world.conf(version);
        let result = shim::Call::new("ADD", &sandbox, &config).run().ok().json();
        assert_eq!(result["cniVersion"], *version);
        assert_eq!(result["interfaces"][1]["name"], "eth0");
        assert_eq!(result["interfaces"][1]["sandbox"], "/run/no-such-namespace");
        assert_eq!(result["ips"][0]["address"], format!("10.9.0.{}/32", n + 1));
        assert_eq!(result["ips"][0].get("version").is_some(), *version < "1.0.0");
        assert_eq!(result["interfaces"][1].get("mtu").is_some(), *version == "1.1.0");
        assert!(world.model.lock().confirmed.contains(&id(&sandbox)));
        let gone = shim::Call::new("DEL", &sandbox, &config).run().ok();
        assert_eq!(gone.stdout, "");
        assert!(world.holders().is_empty());
    }
    until("events are recorded", || world.model.lock().events.len() == 8);
    let model = world.model.lock();
    let added = model.events.iter().find(|e| e.reason == "AddressAssigned").unwrap();
    assert_eq!(world::about(added), "default/pod-s0");
    assert!(added.note.starts_with("address 10.9.0.1 from ENI eni-1 in "), "{}", added.note);
}

#[test]
fn steps_come_in_order_and_a_release_undoes_them_in_reverse() {
    let world = World::up();
    world.model.lock().log.clear();
    world.call("ADD", "a").run().ok();
    world.call("DEL", "a").run().ok();
    let log: Vec<_> = world.model.lock().log.iter().filter(|l| l.ends_with(" a")).cloned().collect();
    assert_eq!(log, ["Allocate a", "Wire a", "Confirm a", "BeginRelease a", "Unwire a", "FinishRelease a"]);
}

#[test]
fn add_repeated_for_a_sandbox_gives_the_same_address() {
    let world = World::up();
    let first = world.call("ADD", "a").run().ok().json();
    let second = world.call("ADD", "a").run().ok().json();
    assert_eq!(first, second);
    assert_eq!(world.holders(), ["a"]);
}

#[test]
fn a_pod_s_new_sandbox_keeps_its_address_when_the_old_one_is_deleted_late() {
    let world = World::up();
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0";
    world.call("ADD", "old").with("CNI_ARGS", args).run().ok();
    let new = world.call("ADD", "new").with("CNI_ARGS", args).run().ok().json();
    world.call("DEL", "old").with("CNI_ARGS", args).run().ok();
    assert_eq!(world.holders(), ["new"]);
    let again = world.call("ADD", "new").with("CNI_ARGS", args).run().ok().json();
    assert_eq!(new, again);
}

#[test]
fn the_recorded_calls_of_containerd_are_served() {
    for text in
        [include_str!("testdata/cni/containerd-1.6.20.json"), include_str!("testdata/cni/containerd-2.3.4.json")]
    {
        let world = World::up();
        let recorded: serde_json::Value = serde_json::from_str(text).unwrap();
        for call in recorded["calls"].as_array().unwrap() {
            let mut stdin = call["stdin"].clone();
            for key in ["socket", "spoolDir", "timeoutSeconds"] {
                stdin[key] = world.conf("1.0.0")[key].clone();
            }
            let mut replay = shim::Call::new("", "", &stdin);
            for (key, value) in call["env"].as_object().unwrap() {
                replay = replay.with(key, value.as_str().unwrap());
            }
            let out = replay.run().ok();
            let printed = call["env"]["CNI_COMMAND"] == "ADD";
            assert_eq!(out.stdout.is_empty(), !printed, "{call}");
        }
        assert!(world.holders().is_empty(), "all were deleted in the end");
        let model = world.model.lock();
        assert!(model.asked.iter().all(|a| a.pod == PodKey::new("default", "web-0")));
        if recorded["runtime"].as_str().unwrap().contains("2.3.4") {
            let limits = Bandwidth { ingress_bps: Some(10_000_000), egress_bps: Some(20_000_000) };
            assert!(model.asked.iter().all(|a| a.bandwidth == limits));
        }
    }
}

#[test]
fn del_of_what_is_not_there_is_done() {
    let world = World::up();
    world.call("DEL", "never-added").without("CNI_NETNS").run().ok();
    world.call("ADD", "a").run().ok();
    for _ in 0..3 {
        world.call("DEL", "a").run().ok();
    }
    assert!(world.holders().is_empty() && world.spooled().is_empty());
}

#[test]
fn a_failed_step_undoes_the_ones_before_it() {
    let world = World::up();
    for (n, step) in ["Allocate", "Wire", "Confirm"].into_iter().enumerate() {
        let sandbox = format!("s{n}");
        world.model.lock().failing.insert(step, 1);
        let out = world.call("ADD", &sandbox).run();
        assert_ne!(out.exit, 0);
        assert!(out.json()["details"].as_str().unwrap().contains("a test says so"), "{}", out.stdout);
        let model = world.model.lock();
        assert!(model.leases.is_empty() && model.wired.is_empty() && model.releasing.is_empty(), "{step}");
    }
    until("failures are events", || world.model.lock().events.iter().filter(|e| e.warning).count() == 3);
    assert!(world.spooled().is_empty());
}

#[test]
fn an_add_that_ran_out_of_time_leaves_nothing() {
    let world = World::up();
    world.model.lock().slow.insert("Wire", Duration::from_secs(30));
    let mut config = world.conf("1.0.0");
    config["timeoutSeconds"] = json!(2);
    let out = shim::Call::new("ADD", "a", &config).run();
    assert_eq!(out.code(), 11, "{}", out.stdout);
    assert!(out.took < Duration::from_secs(3));
    let model = world.model.lock();
    assert!(model.leases.is_empty() && model.wired.is_empty());
}

#[test]
fn an_undo_that_fails_is_done_later() {
    let world = World::up();
    world.model.lock().failing.extend([("Wire", 1), ("Unwire", 2)]);
    assert_eq!(world.call("ADD", "a").run().code(), 102);
    until("the release is taken up again", || world.holders().is_empty() && world.spooled().is_empty());
    assert_eq!(world.model.lock().failing["Unwire"], 0);
}

#[test]
fn a_release_cut_short_is_finished_before_the_next_add() {
    let world = World::up();
    world.call("ADD", "a").run().ok();
    world.model.lock().releasing.insert(id("a"));
    world.call("ADD", "a").run().ok();
    let model = world.model.lock();
    assert_eq!(model.leases[&id("a")].v4.octets()[3], 2, "leased afresh after the release");
    assert!(model.releasing.is_empty());
}

#[test]
fn a_release_that_fails_now_is_spooled_and_done_later() {
    for step in ["BeginRelease", "Unwire", "FinishRelease"] {
        let world = World::up();
        world.call("ADD", "a").run().ok();
        world.model.lock().failing.insert(step, 3);
        world.call("DEL", "a").run().ok();
        until("the release is done", || world.holders().is_empty() && world.spooled().is_empty());
    }
}

#[test]
fn releases_made_while_the_agent_was_away_are_done_before_it_is_ready() {
    let mut world = World::up();
    for sandbox in ["a", "b", "c"] {
        world.call("ADD", sandbox).run().ok();
    }
    world.stop();
    for sandbox in ["a", "b"] {
        world.call("DEL", sandbox).run().ok();
    }
    // A shim that was killed left a draft; a hand left a damaged entry.
    std::fs::write(world.config.spool_dir.join(".9.x@eth0.del"), "{").unwrap();
    std::fs::write(world.config.spool_dir.join("c@eth0.del"), "garbage").unwrap();
    // The pool is not up at first either.
    {
        let mut model = world.model.lock();
        model.pool_error = Some(PoolError::Reconciling);
        model.failing.insert("BeginRelease", 4);
    }
    world.start();
    until("the socket is served", || world.config.socket.exists());
    let early = world.call("STATUS", "").run();
    if early.exit != 0 {
        assert_eq!(early.code(), 50);
    } else {
        assert!(world.holders().is_empty(), "ready before the spool was taken up");
    }
    world.wait_ready();
    assert!(world.holders().is_empty());
    assert!(world.spooled().is_empty());
}

#[test]
fn a_release_spooled_beside_a_running_agent_is_noticed() {
    let world = World::up();
    world.call("ADD", "a").run().ok();
    // This shim knows the right spool and the wrong socket.
    let mut config = world.conf("1.0.0");
    config["socket"] = json!(world.dir.path().join("elsewhere.sock"));
    let began = Instant::now();
    shim::Call::new("DEL", "a", &config).run().ok();
    until("the file is noticed", || world.holders().is_empty() && world.spooled().is_empty());
    assert!(began.elapsed() < Duration::from_secs(10), "noticed, not found by the regular look");
}

#[test]
fn status_says_why_it_is_not_ready() {
    let world = World::up();
    let mut model = world.model.lock();
    model.pool_error = Some(PoolError::Reconciling);
    model.failing.insert("Leases", 1);
    drop(model);
    let out = world.call("STATUS", "").run();
    assert_eq!(out.code(), 50);
    assert!(out.json()["details"].as_str().unwrap().contains("reconciling"), "{}", out.stdout);
    world.call("STATUS", "").run().ok();
}

#[test]
fn calls_for_one_attachment_wait_for_each_other_and_others_do_not() {
    let world = World::up();
    world.model.lock().slow.extend([("Wire", Duration::from_millis(150)), ("Unwire", Duration::from_millis(50))]);
    let mut all = Vec::new();
    for sandbox in ["a", "b", "c", "d"] {
        for command in ["ADD", "DEL", "ADD"] {
            all.push(world.call(command, sandbox).spawn());
        }
    }
    for child in all {
        assert!(child.wait_with_output().unwrap().status.success());
    }
    let model = world.model.lock();
    assert!(!model.overlapped, "two conversations for one attachment were at work at once");
    assert!(model.most_at_once >= 2, "pods waited for each other");
}

#[test]
fn gc_releases_what_the_runtime_does_not_know_and_nothing_else() {
    let world = World::up();
    for sandbox in ["a", "b", "c"] {
        world.call("ADD", sandbox).run().ok();
    }
    let mut config = world.conf("1.1.0");
    config["cni.dev/valid-attachments"] =
        json!([{"containerID": "b", "ifname": "eth0"}, {"containerID": "x", "ifname": "eth0"}]);
    world.model.lock().failing.insert("Unwire", 1);
    let out = shim::Call::new("GC", "", &config).run();
    assert_eq!(out.code(), 11, "one could not be released: {}", out.stdout);
    assert_eq!(world.holders().len(), 2, "the other one was");
    shim::Call::new("GC", "", &config).run().ok();
    assert_eq!(world.holders(), ["b"]);
    let mut none = world.conf("1.1.0");
    assert_eq!(shim::Call::new("GC", "", &none).run().code(), 7, "no list is not an empty list");
    assert_eq!(world.holders(), ["b"]);
    none["cni.dev/valid-attachments"] = json!([]);
    shim::Call::new("GC", "", &none).run().ok();
    assert!(world.holders().is_empty());
}

#[test]
fn check_compares_the_result_the_lease_and_the_kernel() {
    let world = World::up();
    let mut config = world.conf("1.0.0");
    let check = |config: &serde_json::Value, sandbox: &str| shim::Call::new("CHECK", sandbox, config).run();
    assert_eq!(check(&config, "a").code(), 7, "CHECK needs prevResult");
    let result = shim::Call::new("ADD", "a", &config).run().ok().json();
    config["prevResult"] = result.clone();
    assert_eq!(check(&config, "a").ok().stdout, "");
    assert_eq!(check(&config, "b").code(), 3);
    let found = Finding { what: "route".into(), detail: "default is missing".into() };
    world.model.lock().findings = vec![found; 20];
    let out = check(&config, "a");
    assert_eq!(out.code(), 100);
    let msg = out.json()["msg"].as_str().unwrap().to_owned();
    assert!(msg.contains("route: default is missing") && msg.contains("12 more"), "{msg}");
    world.model.lock().findings.clear();
    config["prevResult"]["ips"][0]["address"] = json!("10.9.0.77/32");
    assert_eq!(check(&config, "a").code(), 100);
    config["prevResult"] = json!({"ips": result["ips"], "interfaces": []});
    assert_eq!(check(&config, "a").code(), 6);
}

#[test]
fn a_chain_s_earlier_result_is_passed_on() {
    let world = World::up();
    let mut config = world.conf("1.0.0");
    config["prevResult"] = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "net1", "sandbox": "/run/no-such-namespace"}],
        "ips": [{"address": "192.0.2.7/24", "interface": 0}],
        "dns": {"nameservers": ["192.0.2.53"]},
    });
    let result = shim::Call::new("ADD", "a", &config).run().ok().json();
    assert_eq!(result["interfaces"][0]["name"], "net1");
    assert_eq!(result["ips"][0], json!({"address": "192.0.2.7/24", "interface": 0}));
    assert_eq!(result["ips"][1], json!({"address": "10.9.0.1/32", "interface": 2}));
    assert_eq!(result["dns"]["nameservers"], json!(["192.0.2.53"]));
    config["prevResult"]["interfaces"][0]["name"] = json!("eth0");
    assert_eq!(shim::Call::new("ADD", "b", &config).run().code(), 7);
    assert_eq!(world.holders(), ["a"], "the refused one was undone");
}

fn pod(annotations: &[(&str, &str)], owner: &str) -> PodInfo {
    let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let owner = Some(Owner { kind: owner.into(), name: "web".into() });
    PodInfo { uid: "uid-a".into(), annotations, owner, ..PodInfo::default() }
}

#[test]
fn what_a_pod_wishes_comes_from_the_watch_cache() {
    let world = World::up();
    let wishes = [("fairway.io/eni", "exclusive"), ("kubernetes.io/egress-bandwidth", "5M")];
    world.publish_pod(PodKey::new("default", "pod-a"), pod(&wishes, "StatefulSet"));
    let result = world.call("ADD", "a").run().ok().json();
    assert_eq!(result["ips"][0], json!({"address": "10.9.0.1/24", "gateway": "10.9.0.253", "interface": 1}));
    let model = world.model.lock();
    assert_eq!(model.asked[0].mode, AttachMode::Exclusive);
    assert_eq!(model.asked[0].bandwidth, Bandwidth { ingress_bps: None, egress_bps: Some(5_000_000) });
    assert_eq!(model.asked[0].reserve, Some(Duration::from_secs(300)));
    assert_eq!(model.asked[0].pod_uid.as_deref(), Some("uid-a"));
}

#[test]
fn what_the_runtime_says_about_a_pod_wins_over_the_cache() {
    let world = World::up();
    world.publish_pod(PodKey::new("default", "pod-a"), pod(&[("fairway.io/eni", "exclusive")], "ReplicaSet"));
    world.publish_node(NodeInfo {
        labels: BTreeMap::from([("fairway.io/eni".to_owned(), "exclusive".to_owned())]),
        ..NodeInfo::default()
    });
    let mut config = world.conf("1.1.0");
    config["runtimeConfig"] = json!({"io.kubernetes.cri.pod-annotations": {
        "fairway.io/eni": "shared", "fairway.io/address-reservation": "10m"}});
    shim::Call::new("ADD", "a", &config).run().ok();
    world.call("ADD", "b").run().ok();
    let model = world.model.lock();
    assert_eq!((model.asked[0].mode, model.asked[0].reserve), (AttachMode::Veth, Some(Duration::from_secs(600))));
    assert_eq!(model.asked[1].mode, AttachMode::Exclusive, "the node's label holds for the others");
}

#[test]
fn a_pod_that_the_watch_shows_a_moment_late_is_waited_for() {
    let world = World::up();
    let old = PodInfo { uid: "uid-of-the-pod-before".into(), ..pod(&[], "StatefulSet") };
    world.publish_pod(PodKey::new("default", "pod-a"), old);
    let child = world.call("ADD", "a").spawn();
    std::thread::sleep(Duration::from_millis(40));
    world.publish_pod(PodKey::new("default", "pod-a"), pod(&[("fairway.io/eni", "exclusive")], "StatefulSet"));
    assert!(child.wait_with_output().unwrap().status.success());
    assert_eq!(world.model.lock().asked[0].pod_uid.as_deref(), Some("uid-a"));
}

#[test]
fn a_hostile_annotation_fails_that_pod_alone_with_a_clear_error() {
    let world = World::up();
    let hostile = [
        ("kubernetes.io/ingress-bandwidth", "-1T"),
        ("fairway.io/eni", "yes please"),
        ("fairway.io/address-reservation", "for ever"),
    ];
    for (n, (key, value)) in hostile.into_iter().enumerate() {
        let mut config = world.conf("1.1.0");
        config["runtimeConfig"] = json!({"io.kubernetes.cri.pod-annotations": {key: value}});
        let out = shim::Call::new("ADD", &format!("s{n}"), &config).run();
        assert_eq!(out.code(), 7);
        assert!(out.json()["msg"].as_str().unwrap().contains(key), "{}", out.stdout);
    }
    assert!(world.model.lock().asked.is_empty(), "nothing was allocated");
    world.call("ADD", "a").run().ok();
}

#[test]
fn errors_of_other_actors_keep_their_meaning() {
    let world = World::up();
    let pool = [
        (PoolError::NodeFull { in_use: 30, limit: 30 }, 101),
        (PoolError::NoPlace { shared: 1, limit: 3 }, 101),
        (PoolError::Ledger("no space left".into()), 5),
        (PoolError::Reconciling, 11),
    ];
    for (error, code) in pool {
        let mut model = world.model.lock();
        model.pool_error = Some(error);
        model.failing.insert("Allocate", 1);
        drop(model);
        assert_eq!(world.call("ADD", "a").run().code(), code);
    }
    let wire = [
        (WireError::NamespaceGone("/n".into()), 3),
        (WireError::DeviceMissing("eni-1".into()), 11),
        (WireError::Unavailable, 11),
    ];
    for (error, code) in wire {
        let mut model = world.model.lock();
        model.wire_error = Some(error);
        model.failing.insert("Wire", 1);
        drop(model);
        assert_eq!(world.call("ADD", "a").run().code(), code);
    }
    assert!(world.holders().is_empty());
}

fn reply(stream: &mut UnixStream) -> serde_json::Value {
    let mut all = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let _ = stream.read_to_end(&mut all);
    assert!(all.len() > 4, "no answer");
    assert_eq!(u32::from_be_bytes(all[..4].try_into().unwrap()) as usize, all.len() - 4);
    serde_json::from_slice(&all[4..]).unwrap()
}

#[test]
fn garbage_on_the_socket_is_answered_and_hurts_nobody() {
    let world = World::up();
    world.call("ADD", "a").run().ok();
    let framed = |body: &[u8]| [&(body.len() as u32).to_be_bytes()[..], body].concat();
    let deep = "[".repeat(50_000);
    let garbage = [
        b"\0\0\0\0".to_vec(),
        b"\xff\xff\xff\xff".to_vec(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"\0\0\x10\0short".to_vec(),
        framed(b"not json"),
        framed(b"{}"),
        framed(deep.as_bytes()),
        framed(br#"{"wire":1,"command":"ADD","budget_ms":1,"config":{"cniVersion":"1.0.0","name":"n"}}"#),
        framed(br#"{"wire":1,"command":"VERSION","budget_ms":1000,"config":{"cniVersion":"1.0.0","name":"n"}}"#),
        framed(br#"{"wire":9,"command":"DEL","budget_ms":99999999999999,"container_id":"a","ifname":"eth0","config":{}}"#),
        framed(br#"{"wire":1,"command":"DEL","budget_ms":1000,"container_id":"../../a","ifname":"eth0","config":{"cniVersion":"1.0.0"}}"#),
    ];
    for bytes in garbage {
        let mut stream = UnixStream::connect(&world.config.socket).unwrap();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let answer = reply(&mut stream);
        let error = &answer["failed"];
        assert!(error["code"].as_u64().is_some_and(|c| c != 0) && error["msg"].is_string(), "{answer}");
    }
    assert_eq!(world.holders(), ["a"]);
    world.call("DEL", "a").run().ok();
}

#[test]
fn a_caller_that_sends_nothing_is_let_go() {
    let world = World::up();
    let mut silent = UnixStream::connect(&world.config.socket).unwrap();
    silent.write_all(b"\0\0").unwrap();
    assert_eq!(reply(&mut silent)["failed"]["code"], 5);
}

#[test]
fn conversations_are_bounded_and_the_next_is_told_to_try_again() {
    let mut world = World::new();
    world.config.max_conversations = 3;
    world.start();
    world.wait_ready();
    let idle: Vec<_> = (0..3).map(|_| UnixStream::connect(&world.config.socket).unwrap()).collect();
    until("the fourth is refused", || {
        let out = world.call("ADD", "a").run();
        out.exit != 0 && out.code() == 11 && out.json()["msg"].as_str().unwrap().contains("busy")
    });
    world.call("DEL", "b").run().ok();
    drop(idle);
    until("the others are gone", || world.call("ADD", "a").run().exit == 0);
    until("the spooled release is done", || world.spooled().is_empty());
}

#[test]
fn only_root_may_use_the_socket() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut world = World::new();
    world.config.peer_uids = vec![12345];
    world.start();
    until("the socket is served", || world.config.socket.exists());
    let mode = std::fs::metadata(&world.config.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let out = world.call("ADD", "a").run();
    assert_eq!(out.code(), 5);
    assert!(out.json()["msg"].as_str().unwrap().contains("may not use"), "{}", out.stdout);
    assert!(world.holders().is_empty());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let mut world = World::new();
    drop(std::os::unix::net::UnixListener::bind(&world.config.socket).unwrap());
    assert!(UnixStream::connect(&world.config.socket).is_err(), "nobody listens on it");
    world.start();
    world.wait_ready();
    let second = fairway::actor::run(async {
        let (_, facts) = fairway::cluster::facts();
        fairway::cni::CniServer::open(world.config.clone(), world::ports(&world.model), facts).await.err()
    });
    assert!(second.unwrap().to_string().contains("another agent"));
    world.call("STATUS", "").run().ok();
    world.stop();
    assert!(!world.config.socket.exists(), "an orderly stop takes the socket away");
}

#[test]
fn a_conversation_that_panics_fails_alone() {
    let world = World::up();
    world.call("ADD", "b").run().ok();
    world.model.lock().panics.extend(["Wire", "Unwire"]);
    assert_eq!(world.call("ADD", "a").run().code(), 11);
    world.call("DEL", "b").run().ok();
    // What was spooled is tried, panics too, and still nobody else notices.
    let tried = || world.model.lock().log.iter().filter(|l| *l == "Unwire b").count();
    until("the spooled release is tried again", || tried() >= 3);
    assert_eq!(world.registry.snapshot().iter().map(|a| a.restarts).sum::<u64>(), 0);
    world.model.lock().panics.clear();
    world.call("ADD", "a").run().ok();
    until("what was spooled is done", || world.holders() == ["a"]);
    world.call("STATUS", "").run().ok();
}

#[test]
fn the_server_that_lost_its_spool_comes_back_with_a_new_one() {
    let world = World::up();
    world.call("ADD", "a").run().ok();
    std::fs::remove_dir_all(&world.config.spool_dir).unwrap();
    until("a new spool", || world.config.spool_dir.is_dir());
    world.wait_ready();
    let restarts = || world.registry.snapshot().iter().map(|a| a.restarts).sum::<u64>();
    assert_eq!(restarts(), 1);
    let same = world.call("ADD", "a").run().ok().json();
    assert_eq!(same["ips"][0]["address"], "10.9.0.1/32");
}
