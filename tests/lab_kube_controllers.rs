//! The lab's controllers and scheduler, against a kubelet that says every pod
//! is well.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "testdata/lab_kube/support.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fairway::lab::kube::kind::named;
use fairway::lab::kube::registry::{DeleteOptions, Filter, PatchKind, Registry, Sub, WatchEvent, WatchStart};
use fairway::lab::kube::{KubeConfig, KubeLab, object};
use serde_json::{Value, json};
use support::{ctx, deployment, kubelet, names, node, pod, ready, running, start, until};

fn cluster(nodes: usize) -> KubeLab {
    let (lab, _) = start(KubeConfig::default());
    for n in 0..nodes {
        node(lab.registry(), &format!("n{n}"), json!({"cpu": "8", "pods": "100"}));
    }
    lab
}

fn ready_pods(pods: &[Arc<Value>]) -> usize {
    pods.iter().filter(|p| object::condition(p, "Ready") && !object::deleting(p)).count()
}

fn merge(api: &Registry, kind: &str, name: &str, patch: Value) {
    api.patch(&ctx(), named(kind), ("default", name), Sub::Main, PatchKind::Merge, &patch).unwrap();
}

#[tokio::test]
async fn a_deployment_becomes_spread_pods_and_a_slice() {
    let lab = cluster(3);
    let api = lab.registry();
    let _kubelet = kubelet(api);
    lab.apply(deployment("web", 6)).unwrap();
    lab.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "labels": {"team": "a"}},
        "spec": {"selector": {"app": "web"}, "ipFamilyPolicy": "PreferDualStack",
                 "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}}))
        .unwrap();
    until(api, "Deployment", "default", "six available", |all| {
        object::int(&all[0], "/status/availableReplicas") == Some(6)
    })
    .await;
    let pods = lab.list("Pod");
    let mut per_node: BTreeMap<&str, usize> = BTreeMap::new();
    for pod in &pods {
        *per_node.entry(object::text(pod, "/spec/nodeName")).or_default() += 1;
    }
    assert_eq!(per_node.into_values().collect::<Vec<_>>(), [2, 2, 2], "two on each node");

    let of_web = |all: &[Arc<Value>]| -> Vec<Arc<Value>> {
        let named = |s: &&Arc<Value>| object::labels(s).is_some_and(|l| l["kubernetes.io/service-name"] == "web");
        all.iter().filter(named).cloned().collect()
    };
    until(api, "EndpointSlice", "default", "a slice of six in each family", |all| {
        let slices = of_web(all);
        slices.len() == 2
            && slices.iter().all(|s| {
                let endpoints = object::list(s, "/endpoints");
                endpoints.len() == 6 && endpoints.iter().all(|e| object::flag(e, "/conditions/ready"))
            })
    })
    .await;
    let slices = of_web(&lab.list("EndpointSlice"));
    let families: BTreeSet<&str> = slices.iter().map(|s| object::text(s, "/addressType")).collect();
    assert_eq!(families, BTreeSet::from(["IPv4", "IPv6"]));
    let slice = slices.iter().find(|s| object::text(s, "/addressType") == "IPv4").unwrap();
    assert_eq!(slice["ports"], json!([{"name": "http", "port": 8080, "protocol": "TCP"}]));
    assert_eq!(object::labels(slice).unwrap()["team"], "a", "a Service's labels are on its slices");
    for endpoint in object::list(slice, "/endpoints") {
        let name = object::text(endpoint, "/targetRef/name");
        let pod = pods.iter().find(|p| object::name(p) == name).expect("targetRef names a pod");
        assert_eq!(object::text(endpoint, "/targetRef/uid"), object::uid(pod));
        assert_eq!(object::text(endpoint, "/nodeName"), object::text(pod, "/spec/nodeName"));
        assert_eq!(endpoint["addresses"][0], pod["status"]["podIP"]);
        assert_eq!(endpoint["zone"], "z1");
    }
    until(api, "Endpoints", "default", "the older Endpoints", |all| {
        all.iter().any(|e| object::name(e) == "web" && object::list(e, "/subsets/0/addresses").len() == 6)
    })
    .await;

    lab.delete("Deployment", "default", "web").unwrap();
    until(api, "Pod", "default", "no pods", |all| all.is_empty()).await;
    until(api, "ReplicaSet", "default", "no ReplicaSets", |all| all.is_empty()).await;
    until(api, "EndpointSlice", "default", "empty slices", |all| {
        of_web(all).iter().all(|s| object::list(s, "/endpoints").is_empty())
    })
    .await;
    lab.delete("Service", "default", "web").unwrap();
    until(api, "EndpointSlice", "default", "no slices", |all| of_web(all).is_empty()).await;
    lab.stop().await;
}

#[tokio::test]
async fn a_rolling_update_stays_within_its_bounds() {
    let lab = cluster(2);
    let api = lab.registry();
    let mut first = deployment("web", 4);
    first["spec"]["strategy"] = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1}});
    let _kubelet = kubelet(api);
    lab.apply(first.clone()).unwrap();
    until(api, "Pod", "default", "four ready", |all| ready_pods(all) == 4).await;

    // Replay every change of every pod: never more than 5, never fewer than 3 ready.
    let mut watch = api.watch(named("Pod"), Filter::default(), WatchStart::State).unwrap();
    first["spec"]["template"]["spec"]["containers"][0]["image"] = "image:2".into();
    lab.apply(first).unwrap();
    let done = |d: &Value| {
        object::int(d, "/status/updatedReplicas") == Some(4)
            && object::int(d, "/status/replicas") == Some(4)
            && object::int(d, "/status/availableReplicas") == Some(4)
            && object::int(d, "/status/observedGeneration") == object::int(d, "/metadata/generation")
    };
    until(api, "Deployment", "default", "the new revision", |all| done(&all[0])).await;
    let mut now: BTreeMap<String, Arc<Value>> = BTreeMap::new();
    let mut settled = false;
    loop {
        let events = watch.poll().unwrap();
        if events.is_empty() {
            break;
        }
        for event in events {
            match event {
                WatchEvent::Added(pod) | WatchEvent::Modified(pod) => drop(now.insert(object::name(&pod).into(), pod)),
                WatchEvent::Deleted(pod) => drop(now.remove(object::name(&pod))),
                WatchEvent::Synced(_) => {}
            }
            let pods: Vec<_> = now.values().cloned().collect();
            settled |= ready_pods(&pods) == 4;
            let alive = pods.iter().filter(|p| !object::deleting(p)).count();
            assert!(alive <= 5, "{alive} pods at once");
            assert!(!settled || ready_pods(&pods) >= 3, "{} ready pods", ready_pods(&pods));
        }
    }
    assert!(now.values().all(|p| p["spec"]["containers"][0]["image"] == "image:2"));
    assert_eq!(lab.list("ReplicaSet").len(), 2, "the old revision is kept for a way back");
    lab.stop().await;
}

#[tokio::test]
async fn recreate_waits_for_the_last_old_pod() {
    let lab = cluster(1);
    let api = lab.registry();
    let _kubelet = kubelet(api);
    let mut body = deployment("web", 2);
    body["spec"]["strategy"] = json!({"type": "Recreate"});
    lab.apply(body.clone()).unwrap();
    until(api, "Pod", "default", "two ready", |all| ready_pods(all) == 2).await;
    let mut watch = api.watch(named("Pod"), Filter::default(), WatchStart::State).unwrap();
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "image:2".into();
    lab.apply(body).unwrap();
    until(api, "Pod", "default", "two new ones", |all| {
        ready_pods(all) == 2 && all.iter().all(|p| p["spec"]["containers"][0]["image"] == "image:2")
    })
    .await;
    let mut images: BTreeMap<String, String> = BTreeMap::new();
    for event in watch.poll().unwrap() {
        match event {
            WatchEvent::Deleted(pod) => drop(images.remove(object::name(&pod))),
            event => {
                let pod = event.object().unwrap();
                let image = object::text(pod, "/spec/containers/0/image").to_owned();
                images.insert(object::name(pod).into(), image);
            }
        }
        let kinds: BTreeSet<&String> = images.values().collect();
        assert!(kinds.len() <= 1, "old and new side by side: {images:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_stateful_set_brings_the_same_names_back_in_order() {
    let lab = cluster(2);
    let api = lab.registry();
    let mut created = api.watch(named("Pod"), Filter::default(), WatchStart::Now).unwrap();
    let _kubelet = kubelet(api);
    let mut body = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"},
        "spec": {"serviceName": "db", "replicas": 3, "selector": {"matchLabels": {"app": "db"}},
                 "template": {"metadata": {"labels": {"app": "db"}},
                              "spec": {"containers": [{"name": "main", "image": "image:1"}]}}},
    });
    lab.apply(body.clone()).unwrap();
    until(api, "Pod", "default", "three ready", |all| ready_pods(all) == 3).await;
    let mut order = Vec::new();
    let mut seen_ready = BTreeSet::new();
    for event in created.poll().unwrap() {
        let pod = event.object().unwrap();
        if matches!(event, WatchEvent::Added(_)) {
            order.push(object::name(pod).to_owned());
            assert_eq!(seen_ready.len(), order.len() - 1, "one is ready before the next is made");
        } else if object::condition(pod, "Ready") {
            seen_ready.insert(object::name(pod).to_owned());
        }
    }
    assert_eq!(order, ["db-0", "db-1", "db-2"]);
    let one = lab.get("Pod", "default", "db-1").unwrap();
    assert_eq!((object::text(&one, "/spec/hostname"), object::text(&one, "/spec/subdomain")), ("db-1", "db"));

    api.delete(&ctx(), named("Pod"), "default", "db-1", &DeleteOptions::default()).unwrap();
    until(api, "Pod", "default", "another db-1", |all| {
        ready_pods(all) == 3 && all.iter().any(|p| object::name(p) == "db-1" && object::uid(p) != object::uid(&one))
    })
    .await;

    let mut changes = api.watch(named("Pod"), Filter::default(), WatchStart::Now).unwrap();
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "image:2".into();
    lab.apply(body.clone()).unwrap();
    until(api, "StatefulSet", "default", "the update", |all| {
        all[0]["status"]["observedGeneration"] == all[0]["metadata"]["generation"]
            && object::int(&all[0], "/status/updatedReplicas") == Some(3)
            && object::int(&all[0], "/status/readyReplicas") == Some(3)
            && all[0]["status"]["currentRevision"] == all[0]["status"]["updateRevision"]
    })
    .await;
    let gone: Vec<String> = changes
        .poll()
        .unwrap()
        .into_iter()
        .filter(|e| matches!(e, WatchEvent::Deleted(_)))
        .map(|e| object::name(e.object().unwrap()).to_owned())
        .collect();
    assert_eq!(gone, ["db-2", "db-1", "db-0"], "from the highest ordinal down");

    merge(api, "StatefulSet", "db", json!({"spec": {"replicas": 1}}));
    until(api, "Pod", "default", "db-0 alone", |all| names(all) == ["db-0"]).await;
    lab.stop().await;
}

#[tokio::test]
async fn endpoints_say_who_is_ready_and_who_is_leaving() {
    let lab = cluster(1);
    let api = lab.registry();
    lab.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"},
        "spec": {"clusterIP": "None", "selector": {"app": "x"}, "ports": [{"name": "web", "port": 80, "targetPort": "http"}]}}))
        .unwrap();
    let make = |name: &str, port: i64, v4: &str| {
        let mut body = pod(name, json!({"app": "x"}), "n0");
        body["spec"]["containers"][0]["ports"][0]["containerPort"] = port.into();
        body["spec"]["hostname"] = name.into();
        body["spec"]["subdomain"] = "s".into();
        api.create(&ctx(), named("Pod"), "default", body).unwrap();
        api.modify(&ctx(), named("Pod"), ("default", name), Sub::Status, |p| {
            running(p, v4, "fd00::1");
            true
        })
        .unwrap();
    };
    make("a", 8080, "10.0.0.1");
    make("b", 8080, "10.0.0.2");
    // The same port name, another number: a slice of its own.
    make("c", 9090, "10.0.0.3");
    type Seen = BTreeMap<String, (i64, bool, bool, bool)>;
    let seen = |all: &[Arc<Value>]| -> Seen {
        let mut found = Seen::new();
        for slice in all.iter().filter(|s| object::name(s).starts_with("s-")) {
            assert!(object::labels(slice).unwrap().contains_key("service.kubernetes.io/headless"));
            for e in object::list(slice, "/endpoints") {
                assert_eq!(e["hostname"], e["targetRef"]["name"], "named for DNS");
                let flag = |name: &str| object::flag(e, &format!("/conditions/{name}"));
                let port = object::int(slice, "/ports/0/port").unwrap();
                let state = (port, flag("ready"), flag("serving"), flag("terminating"));
                found.insert(object::text(e, "/addresses/0").to_owned(), state);
            }
        }
        found
    };
    let wanted = |list: &[(&str, (i64, bool, bool, bool))]| -> Seen {
        list.iter().map(|(ip, state)| ((*ip).to_owned(), *state)).collect()
    };
    let (up, port) = ((8080, true, true, false), 9090);
    let all = wanted(&[("10.0.0.1", up), ("10.0.0.2", up), ("10.0.0.3", (port, true, true, false))]);
    until(api, "EndpointSlice", "default", "three ready", |s| seen(s) == all).await;

    api.modify(&ctx(), named("Pod"), ("default", "b"), Sub::Status, |p| {
        ready(p, false);
        true
    })
    .unwrap();
    api.delete(&ctx(), named("Pod"), "default", "c", &DeleteOptions::default()).unwrap();
    let leaving =
        wanted(&[("10.0.0.1", up), ("10.0.0.2", (8080, false, false, false)), ("10.0.0.3", (port, false, true, true))]);
    until(api, "EndpointSlice", "default", "one unready, one leaving", |s| seen(s) == leaving).await;
    api.delete(&ctx(), named("Pod"), "default", "c", &DeleteOptions::grace(0)).unwrap();
    let left = wanted(&[("10.0.0.1", up), ("10.0.0.2", (8080, false, false, false))]);
    until(api, "EndpointSlice", "default", "two left", |s| seen(s) == left).await;
    lab.stop().await;
}

#[tokio::test]
async fn slices_hold_a_hundred_endpoints_at_most() {
    let lab = cluster(1);
    let api = lab.registry();
    lab.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "big"},
        "spec": {"selector": {"app": "x"}, "ports": [{"port": 80}]}}))
        .unwrap();
    for n in 0..250 {
        let name = format!("p{n:03}");
        api.create(&ctx(), named("Pod"), "default", pod(&name, json!({"app": "x"}), "n0")).unwrap();
        api.modify(&ctx(), named("Pod"), ("default", &name), Sub::Status, |p| {
            running(p, &format!("10.0.1.{}", n % 250 + 1), "fd00::1");
            true
        })
        .unwrap();
    }
    let sizes = |all: &[Arc<Value>]| -> Vec<usize> {
        all.iter()
            .filter(|s| object::name(s).starts_with("big-"))
            .map(|s| object::list(s, "/endpoints").len())
            .collect()
    };
    until(api, "EndpointSlice", "default", "250 endpoints", |all| sizes(all).iter().sum::<usize>() == 250).await;
    let found = sizes(&lab.list("EndpointSlice"));
    assert!(found.iter().all(|n| *n <= 100), "{found:?}");
    // One pod's change touches one slice.
    let mut watch = api.watch(named("EndpointSlice"), Filter::default(), WatchStart::Now).unwrap();
    api.modify(&ctx(), named("Pod"), ("default", "p007"), Sub::Status, |p| {
        ready(p, false);
        true
    })
    .unwrap();
    assert_eq!(watch.next().await.unwrap().len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn endpoints_written_by_hand_are_mirrored() {
    let lab = cluster(0);
    let api = lab.registry();
    lab.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "outside"},
                     "spec": {"ports": [{"port": 5432}]}}))
        .unwrap();
    lab.apply(json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "outside"},
                     "subsets": [{"addresses": [{"ip": "192.0.2.7"}], "ports": [{"port": 5432}]}]}))
        .unwrap();
    until(api, "EndpointSlice", "default", "the mirror", |all| {
        all.iter().any(|s| {
            object::name(s).starts_with("outside-") && object::text(s, "/endpoints/0/addresses/0") == "192.0.2.7"
        })
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn the_scheduler_respects_what_pods_and_nodes_say() {
    let (lab, _) = start(KubeConfig::default());
    let api = lab.registry();
    node(api, "a", json!({"cpu": "2", "pods": "10", "fairway.io/eni": "1"}));
    node(api, "b", json!({"cpu": "2", "pods": "10"}));
    node(api, "tainted", json!({"cpu": "2", "pods": "10"}));
    api.modify(&ctx(), named("Node"), ("", "tainted"), Sub::Main, |n| {
        n["spec"] = json!({"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]});
        true
    })
    .unwrap();
    let place = |name: &str, spec: Value| {
        let mut body = pod(name, json!({"app": name}), "");
        for (key, value) in spec.as_object().unwrap() {
            body["spec"][key] = value.clone();
        }
        api.create(&ctx(), named("Pod"), "default", body).unwrap();
    };
    let eni = json!([{"name": "main", "image": "i:1", "resources": {"limits": {"fairway.io/eni": 1}}}]);
    place("eni-1", json!({"containers": eni}));
    place("eni-2", json!({"containers": eni}));
    place("selected", json!({"nodeSelector": {"kubernetes.io/hostname": "b"}}));
    place(
        "tolerant",
        json!({"nodeSelector": {"kubernetes.io/hostname": "tainted"},
                             "tolerations": [{"key": "k", "operator": "Exists"}]}),
    );
    place("shy", json!({"nodeSelector": {"kubernetes.io/hostname": "tainted"}}));
    let greedy = json!([{"name": "main", "image": "i:1", "resources": {"requests": {"cpu": "1500m"}}}]);
    place("greedy-1", json!({"containers": greedy, "nodeSelector": {"kubernetes.io/hostname": "b"}}));
    place("greedy-2", json!({"containers": greedy, "nodeSelector": {"kubernetes.io/hostname": "b"}}));
    let anti = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "selected"}}}]}});
    place("apart", json!({"affinity": anti, "nodeSelector": {"kubernetes.io/hostname": "b"}}));
    let outcome = |name: &str| {
        let pod = lab.get("Pod", "default", name).unwrap();
        let why = object::list(&pod, "/status/conditions").iter().find(|c| c["type"] == "PodScheduled").cloned();
        let why = why.map(|c| object::text(&c, "/message").to_owned()).unwrap_or_default();
        (object::text(&pod, "/spec/nodeName").to_owned(), why)
    };
    until(api, "Pod", "default", "a decision about each", |all| {
        all.len() == 8 && all.iter().all(|p| !object::list(p, "/status/conditions").is_empty())
    })
    .await;
    assert_eq!(outcome("eni-1").0, "a");
    let (node_of, why) = outcome("eni-2");
    assert!(node_of.is_empty() && why.contains("Insufficient fairway.io/eni"), "{node_of} {why}");
    assert_eq!(outcome("selected").0, "b");
    assert_eq!(outcome("tolerant").0, "tainted");
    assert!(outcome("shy").1.contains("untolerated taint"), "{:?}", outcome("shy"));
    assert_eq!(outcome("greedy-1").0, "b");
    assert!(outcome("greedy-2").1.contains("Insufficient cpu"));
    assert!(outcome("apart").1.contains("anti-affinity"));
    assert!(lab.list("Event").iter().any(|e| e["reason"] == "FailedScheduling"));

    // Room is made: the waiting pod is placed.
    api.delete(&ctx(), named("Pod"), "default", "eni-1", &DeleteOptions::grace(0)).unwrap();
    until(api, "Pod", "default", "eni-2 on a", |all| {
        all.iter().any(|p| object::name(p) == "eni-2" && object::text(p, "/spec/nodeName") == "a")
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn a_deleted_namespace_takes_everything_with_it() {
    let lab = cluster(1);
    let api = lab.registry();
    let _kubelet = kubelet(api);
    lab.apply(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})).unwrap();
    let mut body = deployment("web", 2);
    body["metadata"]["namespace"] = "shop".into();
    lab.apply(body).unwrap();
    lab.apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "shop"}}))
        .unwrap();
    until(api, "Pod", "shop", "two ready", |all| ready_pods(all) == 2).await;
    assert!(lab.get("ServiceAccount", "shop", "default").is_some(), "a namespace has its ServiceAccount");
    assert!(!lab.delete("Namespace", "", "shop").unwrap(), "it ends when it is empty");
    let late = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "late", "namespace": "shop"}});
    let error = lab.apply(late).unwrap_err();
    assert_eq!(error.code, 403, "{error}");
    until(api, "Namespace", "", "no shop", |_| lab.get("Namespace", "", "shop").is_none()).await;
    for kind in ["Pod", "Deployment", "ReplicaSet", "ConfigMap", "Event", "ServiceAccount"] {
        assert!(api.within(named(kind), "shop").is_empty(), "{kind}s are left");
    }
    lab.stop().await;
}

#[tokio::test]
async fn dependents_go_or_stay_as_the_deletion_says() {
    let lab = cluster(1);
    let api = lab.registry();
    let _kubelet = kubelet(api);
    let delete = |name: &str, how: &str| {
        let options = DeleteOptions { propagation: Some(how.into()), ..DeleteOptions::default() };
        api.delete(&ctx(), named("Deployment"), "default", name, &options).unwrap()
    };
    lab.apply(deployment("front", 1)).unwrap();
    lab.apply(deployment("orphan", 1)).unwrap();
    until(api, "Pod", "default", "both", |all| ready_pods(all) == 2).await;

    assert!(!delete("front", "Foreground").gone, "it waits for its dependents");
    let mut gone = api.watch(named("Deployment"), Filter::default(), WatchStart::Now).unwrap();
    while lab.get("Deployment", "default", "front").is_some() {
        gone.next().await.unwrap();
    }
    let left = |prefix: &str| names(&lab.list("Pod")).iter().any(|n| n.starts_with(prefix));
    assert!(!left("front-"), "the owner outlived its pods");

    delete("orphan", "Orphan");
    until(api, "Deployment", "default", "no deployments", |all| all.is_empty()).await;
    let sets = lab.list("ReplicaSet");
    assert_eq!(sets.len(), 1);
    assert!(object::list(&sets[0], "/metadata/ownerReferences").is_empty());
    assert!(left("orphan-"), "the pods stay");

    // A node that is gone takes its pods along.
    lab.delete("Node", "", "n0").unwrap();
    until(api, "Pod", "default", "pods without a node", |all| {
        all.iter().all(|p| object::text(p, "/spec/nodeName").is_empty())
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn controllers_survive_a_compaction() {
    let lab = cluster(1);
    let api = lab.registry();
    let _kubelet = kubelet(api);
    for round in 0..5 {
        lab.apply(deployment("web", round + 1)).unwrap();
        lab.compact();
        lab.cut_watches(true);
    }
    until(api, "Deployment", "default", "five", |all| object::int(&all[0], "/status/readyReplicas") == Some(5)).await;
    lab.stop().await;
}
