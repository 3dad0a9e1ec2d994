//! What no proper client sends: the stand-in refuses it, says why, and lives.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "testdata/lab_kube/support.rs"]
mod support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use support::{quiet, start};

fn post(address: SocketAddr, path: &str, kind: &str, body: &[u8]) -> (u16, String) {
    request(address, "POST", path, &[("Content-Type", kind)], body)
}

/// One request on a connection of its own; the status code and the body.
fn request(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes()).unwrap();
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer).into_owned();
    let code = text.split(' ').nth(1).and_then(|c| c.parse().ok()).unwrap_or(0);
    (code, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const JSON: &str = "application/json";

/// Refused with this code and a Status that says why.
fn refused(answer: (u16, String), code: u16, what: &str) -> String {
    assert_eq!(answer.0, code, "{what}: {}", answer.1);
    let status: Value = serde_json::from_str(&answer.1).unwrap_or_else(|_| panic!("{what}: no Status: {}", answer.1));
    assert_eq!((&status["kind"], &status["code"]), (&json!("Status"), &json!(code)), "{what}");
    let message = status["message"].as_str().unwrap_or("").to_owned();
    assert!(!message.is_empty(), "{what} is refused without a word");
    message
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_bodies_are_refused_and_nothing_is_stored() {
    let (lab, address) = quiet();
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_map = format!("{{\"data\":{}1{}}}", "{\"a\":".repeat(5000), "}".repeat(5000));
    let bomb = format!(
        "a: &a [x,x,x,x,x,x,x,x,x]\n{}",
        (b'b'..b'l')
            .map(|c| {
                let (this, last) = (char::from(c), char::from(c - 1));
                format!("{this}: &{this} [{}]\n", vec![format!("*{last}"); 9].join(","))
            })
            .collect::<String>()
    );
    let yaml = "application/yaml";
    for (kind, body, what) in [
        (JSON, "".as_bytes(), "nothing"),
        (JSON, b"{", "half an object"),
        (JSON, b"null", "null"),
        (JSON, b"[]", "a list"),
        (JSON, b"\"text\"", "a text"),
        (JSON, b"{\"metadata\": 7}", "metadata that is a number"),
        (JSON, b"{\"metadata\": {\"name\": 7}}", "a name that is a number"),
        (JSON, b"{\"metadata\": {\"name\": \"x\"}, \"data\": []}", "data that is a list"),
        (JSON, b"{\"metadata\": {\"name\": \"x\"}, \"data\": {\"a\": 1}}", "a value that is a number"),
        (JSON, b"\xff\xfe", "not UTF-8"),
        (JSON, deep.as_bytes(), "a deep list"),
        (JSON, deep_map.as_bytes(), "a deep map"),
        (yaml, b"a: [", "half a YAML list"),
        (yaml, b"---\nkind: ConfigMap\n---\nkind: ConfigMap\n", "two documents"),
        (yaml, bomb.as_bytes(), "a YAML bomb"),
        (yaml, b"\xff", "YAML that is not UTF-8"),
    ] {
        refused(post(address, MAPS, kind, body), 400, what);
    }
    let big = format!("{{\"metadata\":{{\"name\":\"x\"}},\"data\":{{\"a\":\"{}\"}}}}", "x".repeat(4 << 20));
    refused(post(address, MAPS, JSON, big.as_bytes()), 413, "4 MiB");
    refused(post(address, MAPS, "application/vnd.kubernetes.protobuf", b"k8s\0garbage"), 400, "garbled protobuf");
    refused(post(address, MAPS, "image/png", b"{}"), 415, "a picture");
    for (body, what) in [
        (json!({"metadata": {"name": "../x"}}), "a path for a name"),
        (json!({"metadata": {"name": "x".repeat(300)}}), "a long name"),
        (json!({"metadata": {"name": "x", "labels": {"a b": "c"}}}), "a label with a space"),
        (json!({"metadata": {"name": "x", "annotations": {"a": "x".repeat(300_000)}}}), "a huge annotation"),
        (json!({"metadata": {}}), "no name"),
        (json!({"metadata": {"name": "x"}, "data": {"../etc": "x"}}), "a key that is a path"),
    ] {
        refused(post(address, MAPS, JSON, body.to_string().as_bytes()), 422, what);
    }
    for (body, what) in [
        (json!({"kind": "Secret", "metadata": {"name": "x"}}), "another kind"),
        (json!({"apiVersion": "v2", "metadata": {"name": "x"}}), "another version"),
        (json!({"metadata": {"name": "x", "namespace": "other"}}), "another namespace"),
        (json!({"metadata": {"name": "x", "resourceVersion": "7"}}), "a revision"),
    ] {
        refused(post(address, MAPS, JSON, body.to_string().as_bytes()), 400, what);
    }
    assert!(lab.list("ConfigMap").is_empty(), "something was stored");
    lab.apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "still-there"}})).unwrap();
    assert_eq!(request(address, "GET", &format!("{MAPS}/still-there"), &[], b"").0, 200);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_patches_are_refused_and_change_nothing() {
    let (lab, address) = quiet();
    lab.apply(support::deployment("web", 1)).unwrap();
    let before = lab.get("Deployment", "default", "web").unwrap();
    let path = "/apis/apps/v1/namespaces/default/deployments/web";
    let patch = |kind: &str, body: &str| {
        let kind = format!("application/{kind}");
        request(address, "PATCH", path, &[("Content-Type", &kind)], body.as_bytes())
    };
    let (json_patch, merge, strategic) = ("json-patch+json", "merge-patch+json", "strategic-merge-patch+json");
    for (kind, body, code) in [
        (json_patch, r#"{"op":"add"}"#, 422),
        (json_patch, r#"[{"op":"add"}]"#, 422),
        (json_patch, r#"[{"op":"explode","path":"/a"}]"#, 422),
        (json_patch, r#"[{"op":"remove","path":"/spec/nothing"}]"#, 422),
        (json_patch, r#"[{"op":"replace","path":"/spec/template/spec/containers/7","value":1}]"#, 422),
        (json_patch, r#"[{"op":"remove","path":""}]"#, 422),
        (json_patch, r#"[{"op":"replace","path":"","value":7}]"#, 400),
        (json_patch, r#"[{"op":"move","from":"/spec","path":"/spec/replicas"}]"#, 422),
        (merge, "[]", 400),
        (merge, "7", 400),
        (merge, r#"{"spec":7}"#, 400),
        (merge, r#"{"metadata":7}"#, 400),
        (merge, r#"{"metadata":{"name":"other"}}"#, 400),
        (merge, r#"{"kind":"Pod"}"#, 400),
        (merge, r#"{"metadata":{"uid":"other"}}"#, 409),
        (merge, r#"{"metadata":{"resourceVersion":"1"}}"#, 409),
        (merge, r#"{"spec":{"replicas":-1}}"#, 422),
        (merge, r#"{"spec":{"selector":{"matchLabels":{"app":"other"}}}}"#, 422),
        (merge, r#"{"spec":null}"#, 422),
        (strategic, "[]", 400),
        (strategic, r#"{"spec":{"template":{"spec":{"containers":[7]}}}}"#, 400),
        (strategic, r#"{"spec":{"template":{"spec":{"containers":[{"image":"x"}]}}}}"#, 400),
        (strategic, r#"{"$patch":"explode"}"#, 400),
        (strategic, r#"{"spec":{"template":{"spec":{"$patch":"delete"}}}}"#, 422),
        ("apply-patch+yaml", "{}", 400),
        ("json", "{}", 415),
    ] {
        refused(patch(kind, body), code, &format!("{kind} {body}"));
    }
    let bad_apply = format!("{path}?fieldManager=m");
    let headers = [("Content-Type", "application/apply-patch+yaml")];
    for body in ["[", "a: &a [*a]", "spec: {template: {spec: {containers: [7]}}}", "metadata: {managedFields: []}"] {
        let answer = request(address, "PATCH", &bad_apply, &headers, body.as_bytes());
        refused(answer, 400, body);
    }
    assert_eq!(*lab.get("Deployment", "default", "web").unwrap(), *before, "a refused patch changed something");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_paths_queries_and_formats_are_refused() {
    let (lab, address) = quiet();
    let get = |path: &str| request(address, "GET", path, &[], b"");
    for (path, code) in [
        ("/api/v2", 404),
        ("/apis/none/v1/things", 404),
        ("/api/v1/things", 404),
        ("/api/v1/namespaces/default/nodes", 404),
        ("/api/v1/pods/p", 404),
        ("/api/v1/namespaces/default/pods/p/status/more", 404),
        ("/api/v1/namespaces/default/pods/%ff", 400),
        ("/api/v1/namespaces/default/pods/%2e%2e%2fetc", 404),
        ("/openapi/v3/apis/none/v1", 404),
        ("/lab/nothing", 404),
        ("/lab/compact", 405),
        ("/api/v1/pods?limit=x", 400),
        ("/api/v1/pods?limit=-1", 400),
        ("/api/v1/pods?watch=perhaps", 400),
        ("/api/v1/pods?labelSelector=a%20in%20b", 400),
        ("/api/v1/pods?labelSelector=((((", 400),
        ("/api/v1/pods?labelSelector=a,,b", 400),
        ("/api/v1/pods?fieldSelector=spec.secret%3Dx", 400),
        ("/api/v1/pods?continue=%00", 400),
        ("/api/v1/pods?resourceVersion=abc", 400),
        ("/api/v1/pods?resourceVersionMatch=Exact", 400),
        ("/api/v1/pods?watch=1&sendInitialEvents=true", 400),
        ("/api/v1/pods?watch=1&resourceVersion=99999999999999999", 504),
    ] {
        refused(get(path), code, path);
    }
    let (code, body) = get("/api/v1/pods?watch=1&resourceVersion=1");
    assert_eq!(code, 200, "an old revision is told within the stream");
    assert!(body.contains(r#""type":"ERROR""#) && body.contains("410"), "{body}");
    let accept = |accept: &str| request(address, "GET", "/api/v1/pods", &[("Accept", accept)], b"").0;
    assert_eq!(accept("application/vnd.kubernetes.protobuf"), 406);
    assert_eq!(accept("application/vnd.kubernetes.protobuf, application/json"), 200);
    assert_eq!(accept("application/json;as=Something;g=x;v=v1"), 406);
    assert_eq!(accept(""), 200);
    for method in ["POST", "PUT", "PATCH", "DELETE"] {
        assert!(matches!(request(address, method, "/api/v1", &[], b"").0, 405), "{method} on a document");
    }
    assert_eq!(request(address, "PUT", "/api/v1/pods", &[], b"{}").0, 405);
    assert_eq!(request(address, "TRACE", "/api/v1/nodes/n", &[], b"").0, 405);
    let options = br#"{"gracePeriodSeconds": "soon"}"#;
    assert_eq!(request(address, "DELETE", "/api/v1/namespaces/default", &[("Content-Type", JSON)], options).0, 403);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_requests_and_hang_ups_leave_the_server_well() {
    let (lab, address) = quiet();
    let mut open = Vec::new();
    for n in 0..50 {
        let mut stream = TcpStream::connect(address).unwrap();
        let text: &[u8] = match n % 5 {
            0 => b"",
            1 => b"GET /api/v1/pods HT",
            2 => b"\x00\x01\x02\x03\r\n\r\n",
            3 => b"POST /api/v1/namespaces/default/pods HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
            _ => b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: x\r\n\r\n",
        };
        stream.write_all(text).unwrap();
        // Half of them hang up, half stay.
        if n % 2 == 0 {
            open.push(stream);
        }
    }
    assert_eq!(request(address, "GET", "/readyz", &[], b"").0, 200);
    drop(open);
    let begin = std::time::Instant::now();
    while lab.stats()["watches"] != 0 {
        assert!(begin.elapsed() < Duration::from_secs(20), "watches of clients that hung up are still open");
        // A change makes the server notice that nobody reads any more.
        let map = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("p{}", rand::random::<u32>())},
                         "spec": {"containers": [{"name": "c", "image": "i"}]}});
        lab.apply(map).unwrap();
        tokio::task::yield_now().await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_objects_do_not_upset_the_controllers() {
    let (lab, address) = start(fairway::lab::kube::KubeConfig::default());
    support::node(lab.registry(), "n", json!({"cpu": "1", "pods": "10"}));
    let _kubelet = support::kubelet(lab.registry());
    // An owner that is its own owner, and two that own each other.
    for (name, owner) in [("self", "self"), ("a", "b"), ("b", "a")] {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name,
            "ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": owner, "uid": "none"}]}});
        let (code, body) = post(address, MAPS, JSON, map.to_string().as_bytes());
        assert_eq!(code, 201, "{body}");
    }
    support::until(lab.registry(), "ConfigMap", "default", "orphans gone", |all| all.is_empty()).await;
    // More pods than any node has room for, and numbers at their limits.
    let mut wide = support::deployment("wide", 200);
    wide["spec"]["progressDeadlineSeconds"] = i32::MAX.into();
    wide["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": "1000000000%", "maxUnavailable": i32::MAX}});
    lab.apply(wide).unwrap();
    let strange = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "strange"},
        "spec": {"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "9e18", "memory": "8Ei"}}}]}});
    lab.apply(strange).unwrap();
    let refused = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "refused"},
        "spec": {"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "1e999"}}}]}});
    assert_eq!(lab.apply(refused).unwrap_err().code, 422);
    support::until(lab.registry(), "Pod", "default", "ten running, the rest waiting", |all| {
        let running = all.iter().filter(|p| p["status"]["phase"] == "Running").count();
        let waiting = all.iter().filter(|p| p["status"]["conditions"][0]["reason"] == "Unschedulable").count();
        running == 10 && waiting == 191
    })
    .await;
    lab.stop().await;
}
