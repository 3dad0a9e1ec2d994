//! The debug endpoint tells exactly what the actors are doing: one is flooded,
//! one wedged, one panics, and the page and the probes say so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fairway::actor::{
    Actor, AskError, ChildPolicy, Ctx, Deadline, Handle, Handles, Message, Placement, Registry, Responder, Tree,
};
use fairway::debug::{Config, DebugHttp, Listen, Views};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

struct Subject {
    parked: Vec<Responder<Do>>,
}
#[derive(Clone, Copy)]
enum Do {
    Nothing,
    Park,
    Wedge,
    Panic,
}
impl Message for Do {
    const NAME: &'static str = "Do";
    type Reply = ();
    type Error = String;
}
impl Actor for Subject {
    const NAME: &'static str = "Subject";
    const CAPACITY: usize = 8;
}
impl Handles<Do> for Subject {
    fn handle(&mut self, what: Do, to: Responder<Do>, _: &mut Ctx<'_, Self>) {
        match what {
            Do::Nothing => to.ok(()),
            Do::Park => self.parked.push(to),
            Do::Wedge => std::thread::sleep(Duration::from_secs(4)),
            Do::Panic => panic!("poisoned message"),
        }
    }
}

struct Agent {
    tree: Tree,
    subject: Handle<Subject>,
    dir: tempfile::TempDir,
}

async fn agent() -> Agent {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
    let subject = tree.child(|| async { Ok(Subject { parked: Vec::new() }) });
    let views = Views {
        actors: tree.registry().clone(),
        views: BTreeMap::from([("pool", Arc::new(|| serde_json::json!({"idle": 3})) as fairway::debug::View)]),
        ready: vec![("pool", Arc::new(|| Err("reconciling".to_owned())))],
        ..Views::default()
    };
    let config = Config { listen: Listen::Unix(dir.path().join("debug.sock")) };
    let _: Handle<DebugHttp> = tree.child(move || DebugHttp::bind(config.clone(), views.clone()));
    while !dir.path().join("debug.sock").exists()
        || subject.ask(Do::Nothing, Deadline::after(Duration::from_secs(5))).await.is_err()
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Agent { tree, subject, dir }
}

impl Agent {
    async fn get(&self, path: &str) -> (u16, String) {
        self.get_as(path, "localhost").await
    }
    async fn get_as(&self, path: &str, host: &str) -> (u16, String) {
        let mut stream = tokio::net::UnixStream::connect(self.dir.path().join("debug.sock")).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
    async fn subject(&self) -> Value {
        let actors: Vec<Value> = serde_json::from_str(&self.get("/debug/actors").await.1).unwrap();
        actors.into_iter().find(|a| a["name"] == "Subject").unwrap()
    }
    fn send(&self, what: Do, wait: Duration) -> tokio::task::JoinHandle<Result<(), AskError<String>>> {
        let subject = self.subject.clone();
        tokio::task::spawn_local(async move { subject.ask(what, Deadline::after(wait)).await })
    }
}

#[test]
fn a_flooded_actor_shows_its_depth_and_its_refusals() {
    fairway::actor::run(async {
        let agent = agent().await;
        let flood: Vec<_> = (0..20).map(|_| agent.send(Do::Park, Duration::from_millis(400))).collect();
        let mut busy = 0;
        for f in flood {
            busy += usize::from(matches!(f.await.unwrap(), Err(AskError::Busy { .. })));
        }
        assert_eq!(busy, 12);
        let seen = agent.subject().await;
        assert_eq!((&seen["depth"], &seen["capacity"]), (&8.into(), &8.into()));
        assert_eq!(seen["by_type"]["Do"]["busy"], 12);
        assert_eq!(seen["in_work"].as_array().unwrap().len(), 8);
        let (_, metrics) = agent.get("/metrics").await;
        assert!(metrics.contains("fairway_actor_mailbox_depth{actor=\"Subject\"} 8"), "{metrics}");
        assert!(metrics.contains("outcome=\"busy\"} 12"), "{metrics}");
    });
}

#[test]
fn a_wedged_actor_shows_its_message_the_queue_behind_it_and_fails_the_probes() {
    fairway::actor::run(async {
        let agent = agent().await;
        let _wedge = agent.send(Do::Wedge, Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let _behind = agent.send(Do::Nothing, Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        let seen = agent.subject().await;
        assert_eq!(seen["in_work"][0]["message"], "Do");
        let running = seen["in_work"][0]["running_ms"].as_u64().unwrap();
        assert!((2_000..3_900).contains(&running), "{seen}");
        assert_eq!(seen["oldest_waiting"]["message"], "Do");
        assert!(seen["silent_ms"].as_u64().unwrap() >= 2_000, "{seen}");
        assert_eq!(seen["depth"], 2);
    });
}

#[test]
fn a_panicking_actor_shows_its_restart_and_why_and_stays_alive() {
    fairway::actor::run(async {
        let agent = agent().await;
        let gone = agent.send(Do::Panic, Duration::from_secs(5)).await.unwrap();
        assert_eq!(gone, Err(AskError::Unavailable { actor: "Subject" }));
        // The asker hears of the panic while the message is still being unwound;
        // until the supervisor does, the actor is shown as it was: running.
        let seen = loop {
            let seen = agent.subject().await;
            if seen["restarts"] == 1 && seen["state"] == "running" {
                break seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(seen["restart_reasons"][0]["reason"], "panic: poisoned message");
        assert_eq!(seen["by_type"]["Do"]["dropped"], 1);
        assert_eq!(agent.get("/healthz").await, (200, "ok\n".to_owned()));
    });
}

#[test]
fn readiness_names_what_is_awaited_and_strangers_are_refused() {
    fairway::actor::run(async {
        let agent = agent().await;
        assert_eq!(agent.get("/readyz").await, (503, "pool: reconciling\n".to_owned()));
        assert_eq!(agent.get("/debug/pool").await, (200, "{\"idle\":3}".to_owned()));
        assert_eq!(agent.get("/debug/nothing").await.0, 404);
        assert_eq!(agent.get_as("/debug/pool", "evil.example").await.0, 403);
        assert_eq!(agent.get_as("/debug/pool", "[::1]:9471").await.0, 200);
        assert_eq!(agent.get_as("/debug/pool", "127.0.0.1:9471").await.0, 200);
        let (_, page) = agent.get("/").await;
        assert!(page.contains("/debug/actors") && !page.contains("https://"), "no outside assets");
        assert!(agent.tree.registry().snapshot().len() == 2);
    });
}
