//! The stand-in's pure parts: selectors, patches, quantities, plans, manifests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use fairway::lab::controllers::deployment;
use fairway::lab::controllers::endpoints::slices::{self, Endpoint, Have, Wanted};
use fairway::lab::kube::kind::{KINDS, named};
use fairway::lab::kube::patch::apply::{self, Writer};
use fairway::lab::kube::patch::fields::Fields as FieldSet;
use fairway::lab::kube::patch::{self, json as json_patch, strategic};
use fairway::lab::kube::selector::{Fields, Labels};
use fairway::lab::kube::{protobuf, quantity};
use fairway::lab::manifest;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map("[a-d]", "[x-z]?", 0..5)
}

fn map(labels: &BTreeMap<String, String>) -> Map<String, Value> {
    labels.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect()
}

/// A requirement as text, as an expression object, and what it means.
#[derive(Clone, Debug)]
struct Term {
    key: String,
    operator: &'static str,
    values: Vec<String>,
}

fn term() -> impl Strategy<Value = Term> {
    let operator = prop::sample::select(vec!["In", "NotIn", "Exists", "DoesNotExist"]);
    ("[a-e]", operator, prop::collection::vec("[x-z]", 1..4)).prop_map(|(key, operator, values)| Term {
        key,
        operator,
        values: if matches!(operator, "In" | "NotIn") { values } else { Vec::new() },
    })
}

impl Term {
    fn text(&self) -> String {
        let list = self.values.join(", ");
        match self.operator {
            "In" => format!("{} in ({list})", self.key),
            "NotIn" => format!("{} notin ({list})", self.key),
            "Exists" => self.key.clone(),
            _ => format!("!{}", self.key),
        }
    }

    fn means(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            "In" => value.is_some_and(|v| self.values.contains(v)),
            "NotIn" => !value.is_some_and(|v| self.values.contains(v)),
            "Exists" => value.is_some(),
            _ => value.is_none(),
        }
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-z]{0,3}".prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-d/~]{1,2}", inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect()))
        ]
    })
}

/// An RFC 7386 patch from `a` to `b`; exact when `b` holds no nulls in objects.
fn difference(a: &Value, b: &Value) -> Value {
    let (Value::Object(from), Value::Object(to)) = (a, b) else { return b.clone() };
    let mut patch = Map::new();
    for key in from.keys().filter(|key| !to.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    for (key, value) in to {
        match from.get(key) {
            Some(before) if before == value => {}
            Some(before) => drop(patch.insert(key.clone(), difference(before, value))),
            None => drop(patch.insert(key.clone(), value.clone())),
        }
    }
    Value::Object(patch)
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            Value::Object(map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

/// Pod-like specs: keyed lists, atomic lists, maps.
fn spec() -> impl Strategy<Value = Value> {
    let env = prop::collection::btree_map("[A-C]", "[x-z]", 0..3).prop_map(|map| {
        Value::from(map.into_iter().map(|(name, value)| json!({"name": name, "value": value})).collect::<Vec<_>>())
    });
    let container = ("[u-z]{1,2}", env, prop::collection::vec("[a-c]", 0..3))
        .prop_map(|(image, env, args)| json!({"image": image, "env": env, "args": args}));
    let containers = prop::collection::btree_map("[a-d]", container, 0..4).prop_map(|map| {
        let named = |(name, mut c): (String, Value)| {
            c["name"] = name.into();
            c
        };
        Value::from(map.into_iter().map(named).collect::<Vec<_>>())
    });
    let labels = labels().prop_map(|l| Value::Object(map(&l)));
    (containers, labels, 0..5_i32).prop_map(|(containers, labels, replicas)| {
        json!({"metadata": {"labels": labels}, "spec": {"containers": containers, "replicas": replicas}})
    })
}

fn writer(manager: &str) -> Writer<'_> {
    Writer { manager, subresource: "", api_version: "v1", now: "2026-01-01T00:00:00Z" }
}

/// The object without who owns what.
fn bare(object: &Value) -> Value {
    let mut object = object.clone();
    object["metadata"].as_object_mut().unwrap().remove("managedFields");
    object
}

fn sorted(object: &Value) -> Value {
    let mut object = bare(object);
    if let Some(Value::Array(containers)) = object.pointer_mut("/spec/containers") {
        containers.sort_by_key(|c| c["name"].as_str().unwrap_or("").to_owned());
        for container in containers {
            if let Some(Value::Array(env)) = container.get_mut("env") {
                env.sort_by_key(|e| e["name"].as_str().unwrap_or("").to_owned());
            }
        }
    }
    object
}

proptest! {
    #[test]
    fn a_selector_means_the_same_as_text_and_as_an_object(
        terms in prop::collection::vec(term(), 0..4), labels in labels(),
    ) {
        let expected = terms.iter().all(|t| t.means(&labels));
        let text = terms.iter().map(Term::text).collect::<Vec<_>>().join(",");
        let parsed = Labels::parse(&text).unwrap();
        prop_assert_eq!(parsed.matches(Some(&map(&labels))), expected, "{}", text);
        let expressions: Vec<Value> = terms.iter()
            .map(|t| json!({"key": t.key, "operator": t.operator, "values": t.values})).collect();
        let object = Labels::from_object(&json!({"matchExpressions": expressions})).unwrap();
        prop_assert_eq!(object.matches(Some(&map(&labels))), expected);
    }

    #[test]
    fn exact_selectors_select_their_own_labels(a in labels(), b in labels()) {
        let selector = Labels::exact(&map(&a));
        prop_assert!(selector.matches(Some(&map(&a))));
        let subset = a.iter().all(|(k, v)| b.get(k) == Some(v));
        prop_assert_eq!(selector.matches(Some(&map(&b))), subset);
        let text = a.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
        prop_assert_eq!(Labels::parse(&text).unwrap(), selector);
    }

    #[test]
    fn no_text_upsets_the_parsers(text in "\\PC{0,40}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Labels::parse(&text);
        let _ = Fields::parse("Pod", &text);
        let _ = quantity::milli(&text);
        let _ = manifest::parse(&bytes);
        let _ = manifest::parse(text.as_bytes());
        let _ = protobuf::decode(&bytes);
        let _ = protobuf::decode(&[b"k8s\0", bytes.as_slice()].concat());
    }

    #[test]
    fn selector_punctuation_never_panics(text in "[a-c(),!=<>in not]{0,30}") {
        if let Ok(selector) = Labels::parse(&text) {
            selector.matches(None);
        }
    }

    #[test]
    fn a_merge_patch_of_the_difference_leads_there(a in json_value(), b in json_value()) {
        let (a, b) = (without_nulls(a), without_nulls(b));
        let mut patched = a.clone();
        patch::merge(&mut patched, &difference(&a, &b));
        prop_assert_eq!(patched, b);
    }

    #[test]
    fn a_merge_patch_twice_is_a_merge_patch_once(a in json_value(), change in json_value()) {
        let mut once = a;
        patch::merge(&mut once, &change);
        let mut twice = once.clone();
        patch::merge(&mut twice, &change);
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn json_patches_add_and_remove_without_a_trace(object in json_value(), key in "[a-d/~]{1,3}", value in json_value()) {
        prop_assume!(object.is_object() && object.get(&key).is_none());
        let path = format!("/{}", key.replace('~', "~0").replace('/', "~1"));
        let added = json_patch::apply(&object, &json!([{"op": "add", "path": path, "value": value}])).unwrap();
        prop_assert_eq!(added.get(&key), Some(&value));
        let operations = json!([{"op": "test", "path": path, "value": value}, {"op": "remove", "path": path}]);
        prop_assert_eq!(json_patch::apply(&added, &operations).unwrap(), object);
    }

    #[test]
    fn no_patch_panics(object in json_value(), change in json_value(), op in "[a-z]{3,7}", path in "[a-d/~0-3-]{0,6}") {
        let _ = strategic::apply(&object, &change);
        for op in ["add", "remove", "replace", "move", "copy", "test", op.as_str()] {
            let operation = json!([{"op": op, "path": path, "from": path, "value": change}]);
            let _ = json_patch::apply(&object, &operation);
        }
        let _ = apply::apply(&json!({"metadata": {}, "spec": object}), &json!({"spec": change}), writer("m"), true);
    }

    #[test]
    fn a_strategic_patch_merges_by_key_and_is_idempotent(live in spec(), change in spec()) {
        let once = strategic::apply(&live, &change).unwrap();
        prop_assert_eq!(&strategic::apply(&once, &change).unwrap(), &once);
        let names = |o: &Value| -> Vec<String> {
            o["spec"]["containers"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect()
        };
        // All of both, each once; those that were there first, in their order.
        let (before, after) = (names(&live), names(&once));
        prop_assert_eq!(&after[..before.len()], &before[..]);
        for container in change["spec"]["containers"].as_array().unwrap() {
            let found = once["spec"]["containers"].as_array().unwrap().iter().filter(|c| c["name"] == container["name"]);
            let found: Vec<_> = found.collect();
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!(&found[0]["image"], &container["image"]);
            prop_assert_eq!(&found[0]["args"], &container["args"], "args is atomic");
        }
        let order: Vec<Value> = after.iter().rev().map(|n| json!({"name": n})).collect();
        let turned = strategic::apply(&once, &json!({"spec": {"$setElementOrder/containers": order}})).unwrap();
        prop_assert_eq!(names(&turned), after.into_iter().rev().collect::<Vec<_>>());
    }

    #[test]
    fn an_apply_is_idempotent_and_a_single_manager_gets_exactly_its_wish(first in spec(), second in spec()) {
        let blank = json!({"metadata": {}});
        let made = apply::apply(&blank, &first, writer("m"), false).unwrap();
        prop_assert_eq!(sorted(&made), sorted(&first));
        prop_assert_eq!(&apply::apply(&made, &first, writer("m"), false).unwrap(), &made);
        let changed = apply::apply(&made, &second, writer("m"), false).unwrap();
        prop_assert_eq!(sorted(&changed)["spec"].clone(), sorted(&second)["spec"].clone());
        let mut labels = changed["metadata"]["labels"].clone();
        if labels.is_null() {
            labels = json!({});
        }
        prop_assert_eq!(&labels, &second["metadata"]["labels"]);
    }

    #[test]
    fn an_apply_conflicts_exactly_when_another_manager_holds_another_value(first in spec(), second in spec()) {
        let made = apply::apply(&json!({"metadata": {}}), &first, writer("alice"), false).unwrap();
        let free = apply::apply(&made, &second, writer("bob"), false);
        let forced = apply::apply(&made, &second, writer("bob"), true).unwrap();
        if let Ok(free) = &free {
            prop_assert_eq!(sorted(free), sorted(&forced));
        }
        let other = first["spec"]["replicas"] != second["spec"]["replicas"];
        let reported = free.err().unwrap_or_default().iter().any(|(_, field)| field == ".spec.replicas");
        prop_assert_eq!(reported, other);
        // After force, alice conflicts where they differ.
        let back = apply::apply(&forced, &first, writer("alice"), false);
        if other {
            prop_assert!(back.is_err());
        }
    }

    #[test]
    fn field_sets_survive_their_own_format(object in spec()) {
        let set = FieldSet::of(&object);
        prop_assert_eq!(FieldSet::from_value(&set.to_value()), set.clone());
        let mut none = set.clone();
        none.subtract(&set);
        prop_assert!(none.is_empty());
    }

    #[test]
    fn quantities_mean_what_their_suffix_says(n in 0..1_000_000_i128) {
        prop_assert_eq!(quantity::milli(&format!("{n}")), Some(n * 1000));
        prop_assert_eq!(quantity::milli(&format!("{n}m")), Some(n));
        prop_assert_eq!(quantity::milli(&format!("{n}Ki")), Some(n * 1024 * 1000));
        prop_assert_eq!(quantity::milli(&format!("{n}k")), quantity::milli(&format!("{n}e3")));
        prop_assert_eq!(quantity::milli(&format!("0.{n:06}")), Some((n + 999) / 1000));
    }

    #[test]
    fn slices_hold_each_endpoint_once_and_change_little(
        before in prop::collection::btree_map(0..400_u32, 0..2_u8, 0..300),
        after in prop::collection::btree_map(0..400_u32, 0..2_u8, 0..300),
    ) {
        let wanted = |pods: &BTreeMap<u32, u8>| -> Vec<Wanted> {
            let mut groups: BTreeMap<u8, Vec<Endpoint>> = BTreeMap::new();
            for (pod, port) in pods {
                let value = json!({"addresses": [format!("10.0.{}.{}", pod / 256, pod % 256)],
                                   "targetRef": {"uid": pod.to_string()}});
                groups.entry(*port).or_default().push(Endpoint(value));
            }
            if groups.is_empty() {
                return vec![Wanted { family: "IPv4".into(), ports: Vec::new(), endpoints: Vec::new() }];
            }
            groups.into_iter().map(|(port, endpoints)| Wanted {
                family: "IPv4".into(), ports: vec![json!({"port": port})], endpoints,
            }).collect()
        };
        let mut next = 0;
        let mut settle = |have: &[Have], pods: &BTreeMap<u32, u8>| -> Vec<Have> {
            let plan = slices::arrange(have, wanted(pods));
            plan.write.into_iter().map(|s| {
                next += 1;
                Have {
                    name: s.name.unwrap_or_else(|| format!("made-{next}")), family: s.family, ports: s.ports,
                    endpoints: s.endpoints.into_iter().map(|e| e.0).collect(),
                }
            }).collect()
        };
        let first = settle(&[], &before);
        let second = settle(&first, &after);
        for slices in [(&first, &before), (&second, &after)] {
            let (slices, pods) = slices;
            let mut found: Vec<u32> = slices.iter().flat_map(|s| &s.endpoints)
                .map(|e| e["targetRef"]["uid"].as_str().unwrap().parse().unwrap()).collect();
            found.sort_unstable();
            prop_assert_eq!(found, pods.keys().copied().collect::<Vec<_>>());
            prop_assert!(slices.iter().all(|s| s.endpoints.len() <= slices::MOST));
            prop_assert!(!slices.is_empty(), "there is always a slice");
        }
        // Who stays with its port stays in its slice.
        let place = |slices: &[Have]| -> BTreeMap<String, String> {
            slices.iter().flat_map(|s| s.endpoints.iter().map(|e| (e["targetRef"]["uid"].to_string(), s.name.clone())))
                .collect()
        };
        let (was, is) = (place(&first), place(&second));
        for pod in after.iter().filter(|(pod, port)| before.get(pod) == Some(port)).map(|(pod, _)| pod) {
            let uid = format!("\"{pod}\"");
            prop_assert_eq!(&was[&uid], &is[&uid]);
        }
        let again = slices::arrange(&second, wanted(&after));
        prop_assert!(again.delete.is_empty() && again.write.iter().all(|s| s.name.is_some()), "settled");
    }

    #[test]
    fn a_rolling_update_keeps_its_bounds_and_arrives(
        wanted in 0..8_i64, surge in 0..4_i64, missing in 0..4_i64, old in prop::collection::vec((0..5_i64, 0..5_i64), 0..3),
        new in (0..5_i64, 0..5_i64),
    ) {
        let set = |size: i64, ready: i64| Arc::new(json!({"spec": {"replicas": size}, "status": {"availableReplicas": ready.min(size)}}));
        let deployment = json!({"spec": {"replicas": wanted, "strategy": {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": missing}}}});
        let missing = if surge == 0 && missing == 0 { 1 } else { missing }.min(wanted);
        let mut new = set(new.0.min(wanted), new.1);
        let mut old: Vec<_> = old.into_iter().map(|(size, ready)| set(size, ready)).collect();
        let ready = |set: &Value| set["status"]["availableReplicas"].as_i64().unwrap();
        let size = |set: &Value| set["spec"]["replicas"].as_i64().unwrap();
        for _ in 0..100 {
            let steps = deployment::plan(&deployment, &new, &old);
            let total = size(&new) + old.iter().map(|s| size(s)).sum::<i64>();
            let up = ready(&new) + old.iter().map(|s| ready(s)).sum::<i64>();
            prop_assert!(steps.new <= size(&new).max(wanted));
            prop_assert!(steps.new - size(&new) <= (wanted + surge - total).max(0), "more than the surge");
            // Ready pods that are taken away: never below the bound.
            let left = ready(&new) + old.iter().zip(&steps.old).map(|(s, to)| ready(s).min(*to)).sum::<i64>();
            prop_assert!(left >= (wanted - missing).min(up), "{left} ready of {wanted} with {missing} allowed to miss");
            // Everything that was started becomes ready.
            new = set(steps.new, steps.new);
            old = old.iter().zip(&steps.old).map(|(s, to)| set(*to, ready(s))).collect();
        }
        prop_assert_eq!(size(&new), wanted);
        prop_assert!(old.iter().all(|s| size(s) == 0), "old ones are left");
    }
}

#[test]
fn selectors_that_make_no_sense_are_refused() {
    for text in
        ["a in", "a in (", "a in b", "(a)", "a=b=c", "a in (b))", "a,", ",a", "a b", "!", "=x", "a>x", "a/b/c=d", "-a"]
    {
        assert!(Labels::parse(text).is_err(), "{text}");
    }
    for text in ["", "a", "!a", "a=", "a==b", "a!=b", "x.io/a in (b,)", "a>1", " a = b , c "] {
        Labels::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    }
    let bad = json!({"matchExpressions": [{"key": "a", "operator": "In", "values": []}]});
    assert!(Labels::from_object(&bad).is_err());
}

#[test]
fn field_selectors_read_absent_fields_as_empty() {
    let pod = json!({"metadata": {"name": "p"}, "spec": {"hostNetwork": true}, "status": {"phase": "Running"}});
    let matches = |text: &str| Fields::parse("Pod", text).unwrap().matches(&pod);
    assert!(matches("metadata.name=p,status.phase==Running,spec.nodeName="));
    assert!(matches("status.phase!=Failed,status.phase!=Succeeded,spec.hostNetwork=true"));
    assert!(!matches("spec.nodeName=n1"));
    assert!(Fields::parse("Pod", "spec.containers=x").is_err());
}

#[test]
fn every_kind_decodes_its_own_minimum_and_names_unknown_fields() {
    for kind in KINDS {
        let object = json!({"apiVersion": kind.api_version(), "kind": kind.kind, "metadata": {"name": "x"}, "zzz": 1});
        let decoded = kind.decode(&object).unwrap_or_else(|e| panic!("{}: {e}", kind.kind));
        assert_eq!(decoded.unknown, ["zzz"], "{}", kind.kind);
    }
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [
        {"name": "a", "ports": [{"containerPort": 1}, {"containerPort": "x"}]}]}});
    let error = named("Pod").decode(&pod).err().unwrap();
    assert!(error.starts_with("spec.containers[0].ports[1].containerPort: invalid type"), "{error}");
    let typo = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"imagee": "x"}]}});
    assert_eq!(named("Pod").decode(&typo).unwrap().unknown, ["spec.containers[0].imagee"]);
}

#[test]
fn strategic_directives_are_obeyed() {
    let live = json!({"metadata": {"finalizers": ["a", "b"]}, "spec": {
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}},
        "containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}],
        "volumes": [{"name": "v", "emptyDir": {}}]}});
    let patched = |change: Value| strategic::apply(&live, &change).unwrap();
    let after = patched(json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}));
    assert_eq!(after["spec"]["strategy"], json!({"type": "Recreate"}));
    let after = patched(json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}));
    assert_eq!(after["metadata"]["finalizers"], json!(["b", "c"]));
    let after = patched(json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "c", "image": "2"}]}}));
    assert_eq!(after["spec"]["containers"], json!([{"name": "c", "image": "2"}]));
    let after = patched(json!({"spec": {"containers": [{"$patch": "delete", "name": "a"}]}}));
    assert_eq!(after["spec"]["containers"], json!([{"name": "b", "image": "1"}]));
    let order = json!([{"name": "c"}, {"name": "a"}]);
    let after =
        patched(json!({"spec": {"$setElementOrder/containers": order, "containers": [{"name": "c", "image": "3"}]}}));
    let names: Vec<&Value> = after["spec"]["containers"].as_array().unwrap().iter().map(|c| &c["name"]).collect();
    assert_eq!(names, ["c", "a", "b"], "what the order does not name stays behind its neighbour");
    let after = patched(
        json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "secret"], "secret": {"secretName": "s"}}]}}),
    );
    assert_eq!(after["spec"]["volumes"], json!([{"name": "v", "secret": {"secretName": "s"}}]));
}

#[test]
fn manifests_are_read_as_people_write_them() {
    let text = r#"
# a comment before everything
---
apiVersion: v1
kind: List
items:
  - {apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {answer: "yes", mode: "0644"}}
  - apiVersion: v1
    kind: Pod
    metadata: {name: p, namespace: other}
    spec:
      containers: [{name: c, image: i, resources: {limits: {cpu: 2}}}]
      volumes: [{name: v, configMap: {name: a, defaultMode: 0644}}]
---
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: web}
---
apiVersion: v1
kind: Node
metadata: {name: n1, namespace: ignored, labels: {on: off}}
---
apiVersion: v1
kind: SecretList
items: [{metadata: {name: s}}]
---
{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "json"}}
"#;
    let manifest = manifest::parse(text.as_bytes()).unwrap();
    let found: Vec<String> =
        manifest.objects.iter().map(|o| format!("{} {}/{}", o.kind.kind, o.namespace, o.name)).collect();
    let expected = ["ConfigMap default/a", "Pod other/p", "Node /n1", "Secret default/s", "Deployment default/json"];
    assert_eq!(found, expected);
    assert_eq!(manifest.objects[0].object["data"], json!({"answer": "yes", "mode": "0644"}));
    assert_eq!(manifest.objects[1].object["spec"]["volumes"][0]["configMap"]["defaultMode"], 420, "0644 is octal");
    assert_eq!(manifest.objects[2].object["metadata"]["labels"], json!({"on": false}), "as kubectl reads it");
    let skipped: Vec<String> = manifest.skipped.iter().map(ToString::to_string).collect();
    assert_eq!(skipped, ["HorizontalPodAutoscaler web (autoscaling/v2)"]);
}

#[test]
fn bad_manifests_say_what_is_wrong() {
    let error = |text: &str| manifest::parse(text.as_bytes()).unwrap_err().to_string();
    assert!(error("a: b: c").contains("not valid YAML"));
    assert!(error("just text").contains("document 1 is not an object"));
    assert!(error("apiVersion: v1\nkind: Pod\n---\nfoo: bar\n").contains("document 2"));
    assert!(error("a: 1\na: 2").contains("not valid YAML"), "a key twice is a mistake");
    assert!(manifest::parse(&[0xff, 0xfe]).unwrap_err().to_string().contains("UTF-8"));
    assert!(manifest::parse(b"").unwrap().objects.is_empty());
    let deep = format!("a: {}{}", "[".repeat(500), "]".repeat(500));
    assert!(error(&deep).contains("not valid YAML"));
}
