//! The stand-in, as the real kube-rs client sees it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "testdata/lab_kube/support.rs"]
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fairway::lab::kube::KubeConfig;
use fairway::lab::kube::kind::named;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Pod, Service};
use kube::api::{
    Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, VersionMatch, WatchEvent, WatchParams,
};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use serde_json::json;
use support::{client, deployment, pod, quiet, start};

fn config_map(name: &str, value: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
        data: Some(BTreeMap::from([("value".to_owned(), value.to_owned())])),
        ..ConfigMap::default()
    }
}

fn code(error: &kube::Error) -> (u16, String) {
    match error {
        kube::Error::Api(status) => (status.code, status.reason.clone()),
        other => panic!("not an answer of the API: {other}"),
    }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.unwrap_or_else(|_| panic!("never saw {what}"))
}

/// A watcher's view: what it knows after each event.
struct View {
    known: BTreeMap<String, String>,
    relists: usize,
}

impl View {
    fn new() -> Self {
        Self { known: BTreeMap::new(), relists: 0 }
    }

    fn take(&mut self, event: watcher::Event<ConfigMap>) {
        let value = |object: &ConfigMap| object.data.as_ref().unwrap()["value"].clone();
        match event {
            watcher::Event::Init => {
                self.known.clear();
                self.relists += 1;
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.known.insert(object.name_any(), value(&object));
            }
            watcher::Event::InitDone => {}
            watcher::Event::Delete(object) => {
                self.known.remove(&object.name_any());
            }
        }
    }
}

async fn watcher_survives(config: watcher::Config) {
    let (lab, address) = quiet();
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    for n in 0..5 {
        maps.create(&PostParams::default(), &config_map(&format!("m{n}"), "old")).await.unwrap();
    }
    let mut events = watcher(maps.clone(), config).boxed();
    let mut view = View::new();
    async fn reach(
        events: &mut (impl futures::Stream<Item = Result<watcher::Event<ConfigMap>, watcher::Error>> + Unpin),
        view: &mut View,
        wanted: &[(&str, &str)],
    ) {
        let wanted: BTreeMap<String, String> = wanted.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        soon(&format!("{wanted:?}"), async {
            while view.known != wanted {
                // An error is what a broken connection looks like; the watcher goes on.
                if let Ok(event) = events.next().await.unwrap() {
                    view.take(event);
                }
            }
        })
        .await;
    }
    let first = [("m0", "old"), ("m1", "old"), ("m2", "old"), ("m3", "old"), ("m4", "old")];
    reach(&mut events, &mut view, &first).await;
    assert_eq!(view.relists, 1);

    // A cut alone is resumed from the last revision: nothing is listed again.
    for abruptly in [false, true] {
        lab.cut_watches(abruptly);
        let name = if abruptly { "abrupt" } else { "orderly" };
        maps.create(&PostParams::default(), &config_map(name, "new")).await.unwrap();
        let mut wanted = first.to_vec();
        wanted.push((name, "new"));
        reach(&mut events, &mut view, &wanted).await;
        maps.delete(name, &DeleteParams::default()).await.unwrap();
        reach(&mut events, &mut view, &first).await;
    }
    assert_eq!(view.relists, 1, "a cut watch must be resumable");

    // Behind a compaction it is not: 410, and a new list that has it all.
    lab.set_away(true);
    let map = |name: &str, value: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"value": value}});
    lab.apply(map("m0", "changed")).unwrap();
    lab.delete("ConfigMap", "default", "m1").unwrap();
    lab.apply(map("late", "new")).unwrap();
    lab.compact();
    lab.set_away(false);
    let last = [("late", "new"), ("m0", "changed"), ("m2", "old"), ("m3", "old"), ("m4", "old")];
    reach(&mut events, &mut view, &last).await;
    assert_eq!(view.relists, 2, "history was forgotten, so there must be one list more");
    drop(events);
    lab.stop().await;
}

#[tokio::test]
async fn a_watcher_resumes_after_a_cut_and_lists_again_after_410() {
    watcher_survives(watcher::Config::default().any_semantic()).await;
}

#[tokio::test]
async fn a_watcher_with_streaming_lists_does_the_same() {
    watcher_survives(watcher::Config::default().streaming_lists()).await;
}

#[tokio::test]
async fn a_watcher_with_small_pages_sees_everything() {
    let (_lab, address) = quiet();
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    for n in 0..25 {
        maps.create(&PostParams::default(), &config_map(&format!("m{n:02}"), "x")).await.unwrap();
    }
    let mut events = watcher(maps, watcher::Config::default().page_size(4)).boxed();
    let mut view = View::new();
    soon("25 objects", async {
        while view.known.len() < 25 {
            view.take(events.next().await.unwrap().unwrap());
        }
    })
    .await;
}

#[tokio::test]
async fn pages_show_one_moment_and_expire_with_the_history() {
    let (lab, address) = quiet();
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    for n in 0..10 {
        maps.create(&PostParams::default(), &config_map(&format!("m{n}"), "x")).await.unwrap();
    }
    let first = maps.list(&ListParams::default().limit(4)).await.unwrap();
    assert_eq!((first.items.len(), first.metadata.remaining_item_count), (4, Some(6)));
    maps.delete("m9", &DeleteParams::default()).await.unwrap();
    maps.create(&PostParams::default(), &config_map("m55", "x")).await.unwrap();
    let token = first.metadata.continue_.clone().unwrap();
    let rest = maps.list(&ListParams::default().limit(100).continue_token(&token)).await.unwrap();
    let names: Vec<String> = rest.items.iter().map(|o| o.name_any()).collect();
    assert_eq!(names, ["m4", "m5", "m6", "m7", "m8", "m9"], "the second page shows the moment of the first");
    assert_eq!(rest.metadata.resource_version, first.metadata.resource_version);
    lab.compact();
    let error = maps.list(&ListParams::default().limit(4).continue_token(&token)).await.unwrap_err();
    assert_eq!(code(&error), (410, "Expired".into()));
    let error = maps.list(&ListParams::default().continue_token("garbage")).await.unwrap_err();
    assert_eq!(code(&error).0, 400);
}

#[tokio::test]
async fn list_honours_the_revision_asked_for() {
    let (_lab, address) = quiet();
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    maps.create(&PostParams::default(), &config_map("a", "x")).await.unwrap();
    let version = maps.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    let exact = ListParams::default().at(&version).matching(VersionMatch::Exact);
    assert_eq!(maps.list(&exact).await.unwrap().items.len(), 1);
    maps.create(&PostParams::default(), &config_map("b", "x")).await.unwrap();
    assert_eq!(code(&maps.list(&exact).await.unwrap_err()).0, 410);
    let later: u64 = version.parse::<u64>().unwrap() + 1000;
    let future = ListParams::default().at(&later.to_string()).matching(VersionMatch::NotOlderThan);
    assert_eq!(code(&maps.list(&future).await.unwrap_err()), (504, "Timeout".into()));
}

#[tokio::test]
async fn writes_are_refused_as_the_real_server_refuses_them() {
    let (_lab, address) = quiet();
    let client = client(address);
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let post = PostParams::default();
    let made = maps.create(&post, &config_map("a", "1")).await.unwrap();
    assert_eq!(code(&maps.create(&post, &config_map("a", "1")).await.unwrap_err()), (409, "AlreadyExists".into()));
    assert_eq!(code(&maps.get("b").await.unwrap_err()), (404, "NotFound".into()));
    assert_eq!(code(&maps.delete("b", &DeleteParams::default()).await.unwrap_err()), (404, "NotFound".into()));

    let mut newer = made.clone();
    newer.data.as_mut().unwrap().insert("value".into(), "2".into());
    let newer = maps.replace("a", &post, &newer).await.unwrap();
    assert_eq!(code(&maps.replace("a", &post, &made).await.unwrap_err()), (409, "Conflict".into()));
    assert_eq!(newer.uid(), made.uid());
    let same = maps.replace("a", &post, &newer).await.unwrap();
    assert_eq!(same.resource_version(), newer.resource_version(), "a write that changes nothing is none");

    let elsewhere: Api<ConfigMap> = Api::namespaced(client.clone(), "nowhere");
    assert_eq!(code(&elsewhere.create(&post, &config_map("a", "1")).await.unwrap_err()).0, 404);
    let bad = maps.create(&post, &config_map("Not A Name", "1")).await.unwrap_err();
    assert_eq!(code(&bad), (422, "Invalid".into()));

    let wrong = DeleteParams {
        preconditions: Some(kube::api::Preconditions { uid: Some("other".into()), resource_version: None }),
        ..DeleteParams::default()
    };
    assert_eq!(code(&maps.delete("a", &wrong).await.unwrap_err()).0, 409);
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    maps.create(&dry, &config_map("dry", "1")).await.unwrap();
    assert!(maps.get_opt("dry").await.unwrap().is_none(), "a dry run leaves nothing behind");

    let mut generated = config_map("", "1");
    generated.metadata.name = None;
    generated.metadata.generate_name = Some("made-".into());
    let (one, two) = (maps.create(&post, &generated).await.unwrap(), maps.create(&post, &generated).await.unwrap());
    assert!(one.name_any().starts_with("made-") && one.name_any() != two.name_any());
}

#[tokio::test]
async fn patches_of_all_four_kinds_do_what_they_say() {
    let (_lab, address) = quiet();
    let client = client(address);
    let deployments: Api<Deployment> = Api::default_namespaced(client.clone());
    let object: Deployment = serde_json::from_value(deployment("web", 2)).unwrap();
    deployments.create(&PostParams::default(), &object).await.unwrap();
    let params = PatchParams::default();

    let sidecar = json!({"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "side:1"}]}}}});
    let after = deployments.patch("web", &params, &Patch::Strategic(sidecar)).await.unwrap();
    let containers = |d: &Deployment| -> Vec<String> {
        let spec = d.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
        spec.containers.iter().map(|c| format!("{}={}", c.name, c.image.as_deref().unwrap_or(""))).collect()
    };
    assert_eq!(containers(&after), ["main=image:1", "side=side:1"], "strategic merges containers by name");
    let gone = json!({"spec": {"template": {"spec": {"containers": [{"name": "side", "$patch": "delete"}]}}}});
    let after = deployments.patch("web", &params, &Patch::Strategic(gone)).await.unwrap();
    assert_eq!(containers(&after), ["main=image:1"]);

    let replaced = json!({"spec": {"template": {"spec": {"containers": [{"name": "only", "image": "only:1"}]}}}});
    let after = deployments.patch("web", &params, &Patch::Merge(replaced)).await.unwrap();
    assert_eq!(containers(&after), ["only=only:1"], "a merge patch replaces lists");

    let operations = json!([{"op": "test", "path": "/spec/replicas", "value": 2},
                            {"op": "replace", "path": "/spec/replicas", "value": 7}]);
    let operations: kube::api::Patch<Deployment> = Patch::Json(serde_json::from_value(operations).unwrap());
    let after = deployments.patch("web", &params, &operations).await.unwrap();
    assert_eq!(after.spec.as_ref().unwrap().replicas, Some(7));
    let error = deployments.patch("web", &params, &operations).await.unwrap_err();
    assert_eq!(code(&error).0, 422, "a failed test refuses the whole patch");
    assert_eq!(after.metadata.generation, Some(5), "each change of the spec counts once");

    let status = json!({"status": {"replicas": 3}, "spec": {"replicas": 99}});
    let after = deployments.patch_status("web", &params, &Patch::Merge(status)).await.unwrap();
    assert_eq!(after.status.as_ref().unwrap().replicas, Some(3));
    assert_eq!(after.spec.as_ref().unwrap().replicas, Some(7), "the status subresource leaves the spec alone");
    assert_eq!(after.metadata.generation, Some(5));

    let scale = deployments.patch_scale("web", &params, &Patch::Merge(json!({"spec": {"replicas": 4}}))).await.unwrap();
    assert_eq!(scale.spec.unwrap().replicas, Some(4));
}

#[tokio::test]
async fn server_side_apply_reports_conflicts_and_removes_what_is_no_longer_wished() {
    let (_lab, address) = quiet();
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    let wish = |data: serde_json::Value| {
        Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": data}))
    };
    let (alice, bob) = (PatchParams::apply("alice"), PatchParams::apply("bob"));
    maps.patch("m", &alice, &wish(json!({"a": "1", "b": "1"}))).await.unwrap();
    maps.patch("m", &bob, &wish(json!({"c": "1", "b": "1"}))).await.unwrap();
    let error = maps.patch("m", &bob, &wish(json!({"a": "2", "b": "1"}))).await.unwrap_err();
    let kube::Error::Api(status) = &error else { panic!("{error}") };
    assert_eq!(status.code, 409);
    assert!(status.message.contains("conflict with \"alice\": .data.a"), "{}", status.message);
    let forced = maps.patch("m", &bob.clone().force(), &wish(json!({"a": "2", "b": "1"}))).await.unwrap();
    let data = forced.data.unwrap();
    assert_eq!(data.get("a").map(String::as_str), Some("2"));
    assert!(!data.contains_key("c"), "bob no longer wishes for c and nobody else does");
    let left = maps.patch("m", &bob, &wish(json!({"a": "2"}))).await.unwrap().data.unwrap();
    assert!(left.contains_key("b"), "alice still wishes for b");
    let error = maps.patch("m", &alice, &wish(json!({"a": "1", "b": "1"}))).await.unwrap_err();
    assert_eq!(code(&error).0, 409, "after the forced apply, a is bob's");

    // A plain update takes what it changes.
    let mut object = maps.get("m").await.unwrap();
    object.data.as_mut().unwrap().insert("a".into(), "3".into());
    maps.replace("m", &PostParams { field_manager: Some("carol".into()), ..PostParams::default() }, &object)
        .await
        .unwrap();
    let error = maps.patch("m", &bob, &wish(json!({"a": "2"}))).await.unwrap_err();
    let kube::Error::Api(status) = &error else { panic!("{error}") };
    assert!(status.message.contains("\"carol\" using v1"), "{}", status.message);
}

#[tokio::test]
async fn a_watch_shows_objects_entering_and_leaving_its_selector() {
    let (_lab, address) = quiet();
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    let start = maps.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    let mut events = maps.watch(&WatchParams::default().labels("tier in (a,b)"), &start).await.unwrap().boxed();
    let label = |value: &str| Patch::Merge(json!({"metadata": {"labels": {"tier": value}}}));
    maps.create(&PostParams::default(), &config_map("m", "x")).await.unwrap();
    for value in ["a", "b", "c"] {
        maps.patch("m", &PatchParams::default(), &label(value)).await.unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < 3 {
        match soon("an event", events.try_next()).await.unwrap().unwrap() {
            WatchEvent::Added(_) => seen.push("added"),
            WatchEvent::Modified(_) => seen.push("modified"),
            WatchEvent::Deleted(last) => {
                assert_eq!(last.labels()["tier"], "b", "the last state that matched");
                seen.push("deleted");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, ["added", "modified", "deleted"]);
}

#[tokio::test]
async fn a_quiet_watch_hears_bookmarks_and_ends_in_time() {
    let (lab, address) =
        start(KubeConfig { controllers: false, bookmark_every: Duration::from_millis(50), ..KubeConfig::default() });
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    let start = maps.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    let params = WatchParams { timeout: Some(1), bookmarks: true, ..WatchParams::default() };
    let mut events = maps.watch(&params, &start).await.unwrap().boxed();
    // Changes of another kind move the bookmark on.
    lab.apply(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}})).unwrap();
    let moved = soon("a later bookmark", async {
        loop {
            let Some(WatchEvent::Bookmark(mark)) = events.try_next().await.unwrap() else { panic!("not a bookmark") };
            if mark.metadata.resource_version > start {
                return mark.metadata.resource_version;
            }
        }
    })
    .await;
    assert!(moved.parse::<u64>().unwrap() > start.parse::<u64>().unwrap());
    soon("the end of the watch", async { while events.try_next().await.unwrap().is_some() {} }).await;
    assert_eq!(lab.stats()["watches"], 0, "an ended watch is not counted any more");
}

#[tokio::test]
async fn a_pod_is_deleted_in_two_steps() {
    let (_lab, address) = quiet();
    let pods: Api<Pod> = Api::default_namespaced(client(address));
    let body: Pod = serde_json::from_value(pod("p", json!({}), "n1")).unwrap();
    pods.create(&PostParams::default(), &body).await.unwrap();
    let marked = pods.delete("p", &DeleteParams::default()).await.unwrap().left().expect("the pod itself");
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30), "its own terminationGracePeriodSeconds");
    assert!(marked.metadata.deletion_timestamp.is_some());
    let sooner = DeleteParams { grace_period_seconds: Some(5), ..DeleteParams::default() };
    let marked = pods.delete("p", &sooner).await.unwrap().left().unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(5));
    let later = DeleteParams { grace_period_seconds: Some(60), ..DeleteParams::default() };
    let marked = pods.delete("p", &later).await.unwrap().left().unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(5), "grace only becomes shorter");
    assert!(pods.get_opt("p").await.unwrap().is_some());
    pods.delete("p", &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await.unwrap();
    assert!(pods.get_opt("p").await.unwrap().is_none());

    // Unscheduled: nothing runs, nothing to wait for.
    let body: Pod = serde_json::from_value(pod("q", json!({}), "")).unwrap();
    pods.create(&PostParams::default(), &body).await.unwrap();
    pods.delete("q", &DeleteParams::default()).await.unwrap();
    assert!(pods.get_opt("q").await.unwrap().is_none());
}

#[tokio::test]
async fn a_finalizer_holds_an_object_until_it_is_removed() {
    let (_lab, address) = quiet();
    let maps: Api<ConfigMap> = Api::default_namespaced(client(address));
    let mut body = config_map("held", "x");
    body.metadata.finalizers = Some(vec!["fairway.io/test".into()]);
    maps.create(&PostParams::default(), &body).await.unwrap();
    maps.delete("held", &DeleteParams::default()).await.unwrap();
    assert!(maps.get("held").await.unwrap().metadata.deletion_timestamp.is_some());
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("held", &PatchParams::default(), &release).await.unwrap();
    assert!(maps.get_opt("held").await.unwrap().is_none());
}

#[tokio::test]
async fn events_are_one_set_of_objects_in_two_spellings() {
    let (_lab, address) = quiet();
    let client = client(address);
    let about = k8s_openapi::api::core::v1::ObjectReference {
        kind: Some("Pod".into()),
        name: Some("p".into()),
        namespace: Some("default".into()),
        uid: Some("u-1".into()),
        ..Default::default()
    };
    let recorder = kube::runtime::events::Recorder::new(client.clone(), "fairway-agent".into());
    let event = kube::runtime::events::Event {
        type_: kube::runtime::events::EventType::Warning,
        reason: "AddressesShort".into(),
        note: Some("no address for 3 s".into()),
        action: "Allocate".into(),
        secondary: None,
    };
    recorder.publish(&event, &about).await.unwrap();
    // The recorder sums repetitions up with a patch of the series.
    recorder.publish(&event, &about).await.unwrap();
    let core: Api<Event> = Api::default_namespaced(client.clone());
    let found = core
        .list(&ListParams::default().fields("involvedObject.name=p,involvedObject.uid=u-1,type=Warning"))
        .await
        .unwrap();
    assert_eq!(found.items.len(), 1);
    assert_eq!(found.items[0].message.as_deref(), Some("no address for 3 s"));
    assert_eq!(found.items[0].reporting_component.as_deref(), Some("fairway-agent"));
    let new: Api<k8s_openapi::api::events::v1::Event> = Api::default_namespaced(client);
    let found = new.list(&ListParams::default().fields("regarding.name=p")).await.unwrap();
    assert_eq!(found.items[0].note.as_deref(), Some("no address for 3 s"));
}

#[tokio::test]
async fn a_pod_is_bound_once_and_evicted_within_its_budget() {
    let (lab, address) = quiet();
    let client = client(address);
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let body: Pod = serde_json::from_value(pod("p", json!({"app": "x"}), "")).unwrap();
    pods.create(&PostParams::default(), &body).await.unwrap();
    let bind = |client: &Client| {
        let body = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p"},
                          "target": {"kind": "Node", "name": "n7"}});
        let request = http::Request::post("/api/v1/namespaces/default/pods/p/binding")
            .header("content-type", "application/json")
            .body(serde_json::to_vec(&body).unwrap())
            .unwrap();
        let client = client.clone();
        async move { client.request::<serde_json::Value>(request).await }
    };
    bind(&client).await.unwrap();
    assert_eq!(pods.get("p").await.unwrap().spec.unwrap().node_name.as_deref(), Some("n7"));
    assert_eq!(code(&bind(&client).await.unwrap_err()).0, 409);

    lab.apply(json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "b"},
                     "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "x"}}}}))
        .unwrap();
    let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    pods.patch_status("p", &PatchParams::default(), &Patch::Merge(ready)).await.unwrap();
    let error = pods.evict("p", &Default::default()).await.unwrap_err();
    assert_eq!(code(&error).0, 429);
    lab.delete("PodDisruptionBudget", "default", "b").unwrap();
    pods.evict("p", &Default::default()).await.unwrap();
    assert!(pods.get("p").await.unwrap().metadata.deletion_timestamp.is_some());
}

#[tokio::test]
async fn services_get_addresses_of_both_families_and_ports_of_their_own() {
    let (_lab, address) = quiet();
    let services: Api<Service> = Api::default_namespaced(client(address));
    let make = |name: &str, spec: serde_json::Value| -> Service {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap()
    };
    let post = PostParams::default();
    let port = json!([{"port": 80}]);
    let single = services.create(&post, &make("one", json!({"ports": port}))).await.unwrap().spec.unwrap();
    assert_eq!(single.ip_families.as_deref(), Some(&["IPv4".to_owned()][..]));
    let dual = make("two", json!({"ports": port, "ipFamilyPolicy": "RequireDualStack", "type": "NodePort"}));
    let dual = services.create(&post, &dual).await.unwrap().spec.unwrap();
    let ips = dual.cluster_ips.unwrap();
    assert!(ips[0].starts_with("172.21.") && ips[1].starts_with("fd00:21:"), "{ips:?}");
    let node_port = dual.ports.unwrap()[0].node_port.unwrap();
    assert!((30_000..=32_767).contains(&node_port));

    let taken = make("three", json!({"ports": port, "clusterIP": ips[0]}));
    let error = services.create(&post, &taken).await.unwrap_err();
    assert!(error.to_string().contains("already allocated"), "{error}");
    let outside = make("three", json!({"ports": port, "clusterIP": "10.9.9.9"}));
    assert_eq!(code(&services.create(&post, &outside).await.unwrap_err()).0, 422);
    let taken = make("three", json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": node_port}]}));
    assert_eq!(code(&services.create(&post, &taken).await.unwrap_err()).0, 422);
    let headless = make("four", json!({"ports": port, "clusterIP": "None", "selector": {"a": "b"}}));
    let headless = services.create(&post, &headless).await.unwrap().spec.unwrap();
    assert_eq!(headless.cluster_ips.as_deref(), Some(&["None".to_owned()][..]));

    // What a deleted Service had is free again.
    services.delete("two", &DeleteParams::default()).await.unwrap();
    let again = make(
        "five",
        json!({"ports": [{"port": 1, "nodePort": node_port}], "type": "NodePort",
                                    "clusterIP": ips[0]}),
    );
    services.create(&post, &again).await.unwrap();
    // Its address stays with it through a replacement that does not name it.
    let bare = make("five", json!({"ports": [{"port": 2}], "type": "ClusterIP"}));
    let replaced = services.replace("five", &post, &bare).await.unwrap().spec.unwrap();
    assert_eq!(replaced.cluster_ip.as_deref(), Some(ips[0].as_str()));
    let moved = json!({"spec": {"clusterIP": "172.21.9.9", "clusterIPs": ["172.21.9.9"]}});
    let error = services.patch("five", &PatchParams::default(), &Patch::Merge(moved)).await.unwrap_err();
    assert_eq!(code(&error).0, 422, "the address of a Service does not change");
}

#[tokio::test]
async fn ten_thousand_services_load_quickly() {
    let (lab, address) = start(KubeConfig::default());
    let client = client(address);
    let services: Api<Service> = Api::default_namespaced(client.clone());
    let begin = Instant::now();
    futures::stream::iter(0..10_000)
        .for_each_concurrent(16, |n| {
            let services = services.clone();
            async move {
                let body = json!({"metadata": {"name": format!("s{n:05}")},
                                  "spec": {"selector": {"app": format!("a{n}")}, "ports": [{"port": 80}]}});
                let body: Service = serde_json::from_value(body).unwrap();
                services.create(&PostParams::default(), &body).await.unwrap();
            }
        })
        .await;
    let created = begin.elapsed();
    let begin = Instant::now();
    let mut events = watcher(services, watcher::Config::default()).boxed();
    let mut count = 0;
    loop {
        match events.next().await.unwrap().unwrap() {
            watcher::Event::InitApply(_) => count += 1,
            watcher::Event::InitDone => break,
            _ => {}
        }
    }
    let listed = begin.elapsed();
    assert_eq!(count, 10_001, "ten thousand and `kubernetes`");
    let begin = Instant::now();
    let slices = named("EndpointSlice");
    let mut watch =
        lab.registry().watch(slices, Default::default(), fairway::lab::kube::registry::WatchStart::Now).unwrap();
    while lab.registry().count(slices) < 10_001 {
        soon("another slice", watch.next()).await.unwrap();
    }
    println!("created in {created:?}, listed in {listed:?}, slices {:?} later", begin.elapsed());
    // Processor time, client included: the machine may be busy with other tests.
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
    let spent = usage.user_time().tv_sec() + usage.system_time().tv_sec();
    assert!(spent < 60, "{spent} s of processor time for 10,000 Services");
    lab.stop().await;
}

#[tokio::test]
async fn a_stopped_lab_ends_its_watches_and_its_port() {
    let (lab, address) = quiet();
    let spaces: Api<Namespace> = Api::all(client(address));
    let mut events = spaces.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    for _ in 0..4 {
        soon("a namespace", events.try_next()).await.unwrap().unwrap();
    }
    let begin = Instant::now();
    lab.stop().await;
    assert!(begin.elapsed() < Duration::from_secs(3), "an open watch held the server for {:?}", begin.elapsed());
    assert!(soon("the end", events.try_next()).await.unwrap().is_none());
    assert!(std::net::TcpStream::connect(address).is_err(), "the port is free again");
}
