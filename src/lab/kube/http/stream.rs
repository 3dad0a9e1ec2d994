//! Watches over HTTP: one JSON object a line, bookmarks, an orderly end, and
//! disorderly ends on request.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures::stream;
use http::{HeaderValue, header};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Server;
use super::negotiate::{Query, View};
use crate::lab::kube::error::ApiError;
use crate::lab::kube::events;
use crate::lab::kube::kind::Kind;
use crate::lab::kube::registry::{Filter, WatchEvent, WatchStart, Watcher};
use crate::lab::kube::table::{self, Include};

/// Longest watch; the client asks for less, or begins anew.
const LONGEST: u64 = 3600;
/// Without a timeout of the client's: half an hour, so that every client's
/// renewal is exercised in a long run.
const USUAL: u64 = 1800;

pub fn watch(
    server: &Arc<Server>,
    kind: &'static Kind,
    filter: Filter,
    query: &Query,
    view: View,
) -> Result<Response, ApiError> {
    let start = start(query)?;
    let opened = match server.registry.watch(kind, filter, start) {
        Ok(watcher) => Ok(watcher),
        // The real server says this one inside the stream.
        Err(error) if error.code == 410 => Err(error),
        Err(error) => return Err(error),
    };
    let body = match opened {
        Err(error) => Body::from(line("ERROR", &error.status())),
        Ok(watcher) => {
            let timeout = Duration::from_secs(query.timeout.unwrap_or(USUAL).min(LONGEST));
            server.counters.watches.fetch_add(1, Ordering::Relaxed);
            let feed = Feed {
                _open: Open(server.clone()),
                cuts: server.registry.cuts(),
                stop: server.stop.clone(),
                watcher,
                end: Instant::now() + timeout,
                bookmarks: query.bookmarks.then_some(server.bookmark_every),
                view,
                include: query.include,
                over: false,
            };
            Body::from_stream(stream::unfold(feed, next))
        }
    };
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

fn start(query: &Query) -> Result<WatchStart, ApiError> {
    let revision = query.revision()?;
    match query.initial {
        Some(initial) if query.revision_match != "NotOlderThan" => Err(ApiError::bad_request(format!(
            "sendInitialEvents={initial} requires resourceVersionMatch=NotOlderThan"
        ))),
        Some(true) if !query.bookmarks => {
            Err(ApiError::bad_request("sendInitialEvents=true requires allowWatchBookmarks=true"))
        }
        Some(true) => Ok(WatchStart::StateThenSynced),
        Some(false) => Ok(revision.map_or(WatchStart::Now, WatchStart::After)),
        None if !query.revision_match.is_empty() => Err(ApiError::bad_request(
            "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        )),
        None => Ok(revision.map_or(WatchStart::State, WatchStart::After)),
    }
}

/// Counts an open watch, until it is dropped.
struct Open(Arc<Server>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counters.watches.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Feed {
    /// Counted as long as this lives.
    _open: Open,
    cuts: watch::Receiver<(u64, bool)>,
    stop: watch::Receiver<bool>,
    watcher: Watcher,
    end: Instant,
    bookmarks: Option<Duration>,
    view: View,
    include: Include,
    over: bool,
}

/// The next chunk; none ends the answer in order, an error breaks it off.
async fn next(mut feed: Feed) -> Option<(Result<Bytes, std::io::Error>, Feed)> {
    if feed.over {
        return None;
    }
    let quiet = feed.bookmarks.map_or(feed.end, |every| Instant::now() + every);
    loop {
        if *feed.stop.borrow() {
            return None;
        }
        if feed.cuts.has_changed().unwrap_or(true) {
            let abruptly = feed.cuts.borrow_and_update().1;
            feed.over = true;
            return abruptly.then(|| (Err(std::io::ErrorKind::ConnectionReset.into()), feed));
        }
        let events = match feed.watcher.poll() {
            Ok(events) => events,
            Err(error) => {
                feed.over = true;
                return Some((Ok(line("ERROR", &error.status()).into()), feed));
            }
        };
        if !events.is_empty() {
            let mut chunk = Vec::new();
            for event in &events {
                chunk.extend(feed.line(event));
            }
            return Some((Ok(chunk.into()), feed));
        }
        let now = Instant::now();
        if now >= feed.end {
            feed.over = true;
            let last = feed.bookmarks.map(|_| feed.bookmark(feed.watcher.position(), false));
            return last.map(|line| (Ok(line.into()), feed));
        }
        if now >= quiet {
            let line = feed.bookmark(feed.watcher.position(), false);
            return Some((Ok(line.into()), feed));
        }
        tokio::select! {
            () = feed.watcher.changed() => {}
            _ = feed.cuts.changed() => feed.cuts.mark_changed(),
            _ = feed.stop.changed() => {}
            () = tokio::time::sleep_until(quiet.min(feed.end)) => {}
        }
    }
}

impl Feed {
    fn line(&self, event: &WatchEvent) -> Vec<u8> {
        let (word, object) = match event {
            WatchEvent::Added(object) => ("ADDED", object),
            WatchEvent::Modified(object) => ("MODIFIED", object),
            WatchEvent::Deleted(object) => ("DELETED", object),
            WatchEvent::Synced(revision) => return self.bookmark(*revision, true),
        };
        let kind = self.watcher.kind();
        match self.view {
            View::Plain => line(word, &events::outward(kind, object)),
            View::Partial => line(word, &table::partial(object)),
            View::Table => {
                let meta = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
                line(word, &table::table(kind, &[&**object], meta, self.include, Timestamp::now()))
            }
        }
    }

    fn bookmark(&self, revision: u64, initial_end: bool) -> Vec<u8> {
        let kind = self.watcher.kind();
        let mut object = json!({"kind": kind.kind, "apiVersion": kind.api_version(),
            "metadata": {"resourceVersion": revision.to_string(), "creationTimestamp": null}});
        if initial_end {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        match self.view {
            View::Plain => line("BOOKMARK", &object),
            View::Partial => line("BOOKMARK", &table::partial(&object)),
            View::Table => {
                let meta = json!({"resourceVersion": revision.to_string()});
                let table = table::table(kind, &[&object], meta, self.include, Timestamp::now());
                line("BOOKMARK", &table)
            }
        }
    }
}

fn line(kind: &str, object: &impl Serialize) -> Vec<u8> {
    #[derive(Serialize)]
    struct Line<'a, T: Serialize> {
        r#type: &'a str,
        object: &'a T,
    }
    let mut bytes = serde_json::to_vec(&Line { r#type: kind, object }).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}
