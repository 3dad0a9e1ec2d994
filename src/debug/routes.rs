//! The routes. Every handler reads a snapshot; none changes anything.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde_json::json;

use super::{Views, metrics};
use crate::actor::{ActorState, Deadline};

/// An actor silent for longer is not alive.
const SILENT: Duration = Duration::from_secs(10);
const QUERY_BUDGET: Duration = Duration::from_secs(60);

pub(super) fn router(views: Views) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/debug", get(index))
        .route("/debug/actors", get(actors))
        .route("/debug/{view}", get(view))
        .route("/metrics", get(scrape))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .layer(middleware::from_fn(local_only))
        .with_state(views)
}

/// A page elsewhere must not read this through a browser on the node: only
/// names of the loopback are answered.
async fn local_only(headers: HeaderMap, request: Request, next: Next) -> Response {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
    if !is_local(host) {
        return (StatusCode::FORBIDDEN, "this endpoint answers to localhost only\n").into_response();
    }
    next.run(request).await
}

pub(crate) fn is_local(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.ends_with(']') { host } else { name });
    name == "localhost" || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn page() -> impl IntoResponse {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(include_str!("page.html")))
}

async fn index(State(views): State<Views>) -> Json<serde_json::Value> {
    let names = ["actors"].into_iter().chain(views.views.keys().copied()).chain(views.queries.keys().copied());
    Json(json!({ "views": names.map(|n| format!("/debug/{n}")).collect::<Vec<_>>() }))
}

async fn actors(State(views): State<Views>) -> impl IntoResponse {
    Json(views.actors.snapshot())
}

async fn view(
    State(views): State<Views>,
    Path(name): Path<String>,
    Query(arguments): Query<BTreeMap<String, String>>,
) -> Response {
    if let Some(view) = views.views.get(name.as_str()) {
        return Json(view()).into_response();
    }
    let Some(query) = views.queries.get(name.as_str()) else {
        return (StatusCode::NOT_FOUND, format!("no view {name:?}; /debug lists them\n")).into_response();
    };
    match query(arguments, Deadline::after(QUERY_BUDGET)).await {
        Ok(value) => Json(value).into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn scrape(State(views): State<Views>) -> Response {
    match metrics::text(&views) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

/// Alive: every actor's thread turns its loop, and none has given up. An actor
/// that is being rebuilt is not a reason to kill the others.
async fn healthz(State(views): State<Views>) -> Response {
    let stuck: Vec<String> = views
        .actors
        .snapshot()
        .into_iter()
        .filter(|a| match a.state {
            ActorState::Running => Duration::from_millis(a.silent_ms) > SILENT,
            ActorState::Escalated => true,
            _ => false,
        })
        .map(|a| format!("{}: {:?}, silent for {} ms", a.name, a.state, a.silent_ms))
        .collect();
    verdict(stuck)
}

/// Ready: every actor runs and every check passes.
async fn readyz(State(views): State<Views>) -> Response {
    let mut waiting = views.actors.unwell(SILENT);
    for (what, check) in &views.ready {
        if let Err(reason) = check() {
            waiting.push(format!("{what}: {reason}"));
        }
    }
    verdict(waiting)
}

fn verdict(problems: Vec<String>) -> Response {
    if problems.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, problems.join("\n") + "\n").into_response()
}
