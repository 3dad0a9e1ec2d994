//! What the lab's kubelet says to the Kubernetes API, over real HTTP.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use fairway::lab::kubelet::api::{KubeApi, PodEvent, PodSource, PodStatusSink, SinkError, node_object};
use fairway::lab::kubelet::spec::PodRef;
use futures::StreamExt;
use parking_lot::Mutex;
use serde_json::{Value, json};

#[derive(Default)]
struct Server {
    requests: Mutex<Vec<(String, Value)>>,
}

/// Just enough of an API server: one pod, then its deletion.
async fn answer(State(server): State<Arc<Server>>, method: Method, uri: Uri, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let line = format!("{method} {uri}");
    server.requests.lock().push((line.clone(), body));
    let pod = |uid: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": []},
               "metadata": {"name": "web-0", "namespace": "default", "uid": uid, "resourceVersion": "7"}})
    };
    let status = |code: StatusCode| {
        (
            code,
            Json(json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no",
                           "reason": "Conflict", "code": code.as_u16()})),
        )
            .into_response()
    };
    let query = uri.query().unwrap_or_default();
    match (method.as_str(), uri.path()) {
        ("GET", "/api/v1/pods") if query.contains("watch=true") => {
            let event = json!({"type": "DELETED", "object": pod("u1")});
            format!("{event}\n").into_response()
        }
        ("GET", "/api/v1/pods") => Json(json!({"apiVersion": "v1", "kind": "PodList",
            "metadata": {"resourceVersion": "7"}, "items": [pod("u1")]}))
        .into_response(),
        ("PATCH" | "DELETE", path) if path.contains("other") => status(StatusCode::CONFLICT),
        ("PATCH" | "DELETE", path) if path.contains("broken") => status(StatusCode::INTERNAL_SERVER_ERROR),
        ("POST", _) => status(StatusCode::CONFLICT),
        (_, path) if path.contains("/nodes/") => {
            Json(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})).into_response()
        }
        _ => Json(pod("u1")).into_response(),
    }
}

async fn api() -> (Arc<Server>, KubeApi) {
    let server = Arc::<Server>::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let app = axum::Router::new().fallback(answer).with_state(Arc::clone(&server));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let client = kube::Client::try_from(kube::Config::new(url.parse().unwrap())).unwrap();
    (server, KubeApi::new(client, "n1"))
}

fn pod(name: &str) -> PodRef {
    PodRef { namespace: "default".into(), name: name.into(), uid: "u1".into() }
}

#[tokio::test]
async fn pods_of_the_node_alone_are_watched() {
    let (server, api) = api().await;
    let mut events = api.watch();
    let next = async {
        match events.next().await {
            Some(PodEvent::Snapshot(all)) => assert_eq!(all[0].metadata.uid.as_deref(), Some("u1")),
            other => panic!("{other:?}"),
        }
        match events.next().await {
            Some(PodEvent::Deleted(pod)) => assert_eq!(pod.metadata.name.as_deref(), Some("web-0")),
            other => panic!("{other:?}"),
        }
    };
    tokio::time::timeout(Duration::from_secs(10), next).await.unwrap();
    for (line, _) in server.requests.lock().iter() {
        assert!(line.contains("fieldSelector=spec.nodeName%3Dn1"), "{line}");
    }
}

#[tokio::test]
async fn a_status_goes_to_the_subresource_of_that_very_pod() {
    let (server, api) = api().await;
    let status = k8s_openapi::api::core::v1::PodStatus { phase: Some("Running".into()), ..Default::default() };
    api.pod_status(&pod("web-0"), &status).await.unwrap();
    api.pod_ended(&pod("web-0")).await.unwrap();
    {
        let requests = server.requests.lock();
        assert!(requests[0].0.starts_with("PATCH /api/v1/namespaces/default/pods/web-0/status"), "{}", requests[0].0);
        assert_eq!(requests[0].1, json!({"metadata": {"uid": "u1"}, "status": {"phase": "Running"}}));
        assert!(requests[1].0.starts_with("DELETE /api/v1/namespaces/default/pods/web-0"), "{}", requests[1].0);
        assert_eq!(requests[1].1["gracePeriodSeconds"], 0);
        assert_eq!(requests[1].1["preconditions"]["uid"], "u1");
    }
    // Somebody else's name now: moot. A server in trouble: to be repeated.
    assert_eq!(api.pod_status(&pod("other"), &status).await, Err(SinkError::Gone));
    assert_eq!(api.pod_ended(&pod("other")).await, Err(SinkError::Gone));
    assert!(matches!(api.pod_status(&pod("broken"), &status).await, Err(SinkError::Failed(_))));
}

#[tokio::test]
async fn a_node_registers_and_says_whether_it_is_ready() {
    let (server, api) = api().await;
    let node = node_object("n1", &["10.0.0.1".parse().unwrap()], "cn-lab-a", "cn-lab.i-1", 110);
    assert_eq!(node.status.as_ref().unwrap().allocatable.as_ref().unwrap()["pods"].0, "110");
    // The object is there already: brought up to date instead.
    api.register(&node).await.unwrap();
    api.node_ready(&Err("Network plugin returns error: x".into())).await.unwrap();
    let requests = server.requests.lock();
    let lines: Vec<&str> = requests.iter().map(|(l, _)| l.split('?').next().unwrap()).collect();
    assert_eq!(
        lines,
        [
            "POST /api/v1/nodes",
            "PATCH /api/v1/nodes/n1",
            "PATCH /api/v1/nodes/n1/status",
            "PATCH /api/v1/nodes/n1/status"
        ]
    );
    let condition = &requests[3].1["status"]["conditions"][0];
    assert_eq!((&condition["type"], &condition["status"]), (&json!("Ready"), &json!("False")));
    assert!(condition["message"].as_str().unwrap().contains("NetworkPluginNotReady"));
}
