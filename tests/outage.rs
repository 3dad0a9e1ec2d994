//! The cloud is away for two minutes of real time.
//!
//! In a binary of its own, because it mostly waits: `.config/nextest.toml` begins
//! it first, beside all others.

mod e2e_support;

use std::time::{Duration, Instant};

use e2e_support::pods::{all_ask_all, asks, ns};
use e2e_support::{lab, missing, skip};
use fairway::lab::cloud::{Fault, FaultSpec};

const AWAY: Duration = Duration::from_secs(120);
/// How much longer the slowest pod may take: the longest pause between tries of
/// agent and kubelet, one after the other.
const RECOVERY: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_minutes_without_the_cloud_cost_waiting_and_nothing_else() {
    if let Some(missing) = missing() {
        return skip("two_minutes_without_the_cloud_cost_waiting_and_nothing_else", missing);
    }
    // With kubelet's real pauses, and places enough: which of two kinds of pods gets
    // the last one is no matter of outages.
    let lab = lab("ot", 1, |config| {
        config.backoff = (Duration::from_secs(1), Duration::from_secs(10));
        config.nodes[0].instance_type = "ecs.g7.4xlarge".to_owned();
    })
    .await;
    lab.create(0, "old", false);
    lab.create(0, "ending", false);
    let old = lab.ready("old").await;
    lab.ready("ending").await;
    lab.settled().await;
    // What was too much of the stock is back: pods are to wait for the cloud.
    lab.until("the stock to be small and at rest", Duration::from_secs(30), async || {
        let totals = lab.view(0, "/debug/pool").await?["totals"].clone();
        let count = |key: &str| totals[key].as_u64().unwrap_or(u64::MAX);
        if count("idle") <= 4 && count("releasing") + count("coming") == 0 { Ok(()) } else { Err(totals.to_string()) }
    })
    .await;

    let calls = lab.site.cloud.calls(0).total;
    lab.site.cloud.add_fault(FaultSpec::from(Fault::Down).seconds(AWAY.as_secs_f64())).unwrap();
    let began = Instant::now();
    // From the stock; then there is none.
    lab.create(0, "stock", false);
    let stock = lab.ready_within("stock", Duration::from_secs(10)).await;
    let waiting: Vec<String> = (0..8).map(|n| format!("late{n}")).collect();
    for (n, name) in waiting.iter().enumerate() {
        lab.create(0, name, n % 4 == 3);
    }
    // A pod ends without the cloud.
    lab.delete("ending");
    lab.gone("ending").await;
    // Why the others wait is there to be read.
    lab.until("the reason to be told", Duration::from_secs(60), async || {
        let view = lab.view(0, "/debug/pool").await?;
        let said = view["waiting_reason"].as_str().unwrap_or_default();
        if said.contains("no connection") { Ok(()) } else { Err(view["waiting_reason"].to_string()) }
    })
    .await;

    let mut killed = false;
    while began.elapsed() < AWAY {
        // What runs goes on, whatever happens to the agent.
        asks(&ns(&old), &stock).await.unwrap();
        asks(&ns(&stock), &old).await.unwrap();
        if !killed && began.elapsed() > AWAY / 2 {
            lab.node(0).node.kill_agent().await.unwrap();
            killed = true;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let mut pods = vec![old, stock];
    for name in &waiting {
        pods.push(lab.ready_within(name, RECOVERY).await);
    }
    println!("all pods were ready {:?} after the cloud was back", began.elapsed() - AWAY);
    println!("cloud calls meanwhile and after: {}", lab.site.cloud.calls(0).total - calls);
    all_ask_all(&pods).await.unwrap();
    lab.settled().await;
    lab.down().await;
}
