//! The page at `/` shows the actors live in a real browser: one has failed, and
//! the page says so with its reason. Skipped, and counted, without Chromium.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/skip.rs"]
mod skipping;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use fairway::actor::{
    Actor, ChildPolicy, Ctx, Deadline, Handle, Handles, Message, Placement, Registry, Responder, Tree,
};
use fairway::debug::{Config, DebugHttp, Listen, View, Views};
use skipping::skip as skipped;

struct Failing;
struct Fail;
impl Message for Fail {
    const NAME: &'static str = "Fail";
    type Reply = ();
    type Error = String;
}
impl Actor for Failing {
    const NAME: &'static str = "Failing";
}
impl Handles<Fail> for Failing {
    fn handle(&mut self, _: Fail, _: Responder<Fail>, ctx: &mut Ctx<'_, Self>) {
        ctx.fail("the disk said no");
    }
}

#[test]
fn the_page_shows_actors_and_their_failures_in_a_browser() {
    let Some(chromium) =
        ["/usr/bin/chromium", "/usr/bin/chromium-browser"].into_iter().find(|p| std::path::Path::new(p).exists())
    else {
        return skipped("the_page_shows_actors_and_their_failures_in_a_browser", "chromium is not installed");
    };
    fairway::actor::run(async move {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
        let failing: Handle<Failing> = tree.child(|| async { Ok(Failing) });
        let views = Views {
            actors: tree.registry().clone(),
            views: BTreeMap::from([("pool", Arc::new(|| serde_json::json!({"instance": "i-page-test"})) as View)]),
            ..Views::default()
        };
        let _: Handle<DebugHttp> =
            tree.child(move || DebugHttp::bind(Config { listen: Listen::Tcp(free) }, views.clone()));
        while tree.registry().snapshot()[0].restarts == 0 {
            let _ = failing.ask(Fail, Deadline::after(Duration::from_secs(1))).await;
        }
        while tokio::net::TcpStream::connect(free).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let profile = tempfile::tempdir().unwrap();
        let dom = tokio::task::spawn_blocking(move || {
            let output = Command::new(chromium)
                .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
                .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
                .args(["--virtual-time-budget=3000", "--dump-dom"])
                .arg(format!("--user-data-dir={}", profile.path().display()))
                .arg(format!("http://{free}/"))
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
        .await
        .unwrap();
        for shown in ["<strong>Failing</strong>", "<strong>DebugHttp</strong>", "the disk said no", "i-page-test"] {
            assert!(dom.contains(shown), "{shown:?} is not on the page:\n{dom}");
        }
    });
}
