//! kill -9 of the agent: at every journalled step, and at random under churn.
//! Afterwards every address, ENI, link, route and rule is accounted for once.

mod e2e_support;

use std::collections::BTreeSet;
use std::time::Duration;

use e2e_support::{Lab, lab, lay, missing, skip};
use fairway::lab::cloud::{Eni, EniKind, EniStatus, Fault, FaultSpec};
use fairway::pool::step::{FailPoint, Step};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use tokio::time::timeout;

/// Steps that pods coming and going lead to.
const ORDINARY: &[&str] = &[
    "lease",
    "confirm",
    "unwire",
    "release",
    "settle",
    "create-eni",
    "eni-created",
    "eni-attaching",
    "eni-ready",
    "drain-eni",
    "detach-eni",
    "eni-detaching",
    "eni-detached",
    "eni-deleted",
    "assign-ipv4",
    "ipv4-assigned",
    "assign-ipv6",
    "ipv6-assigned",
    "release-addresses",
    "ipv6-released",
    "ipv4-released",
];

/// Steps that need something to go wrong, or somebody to interfere.
const TROUBLED: &[&str] =
    &["recover", "adopt-eni", "create-failed", "assign-failed", "hold", "unhold", "eni-lost", "sync-eni", "learn"];

#[test]
fn every_step_is_killed_at() {
    let tried: BTreeSet<&str> = ORDINARY.iter().chain(TROUBLED).copied().collect();
    let all: BTreeSet<&str> = Step::NAMES.iter().copied().collect();
    assert_eq!(tried, all);
}

/// Ends the names of pods that have an ENI of their own.
const EXCLUSIVE: &str = "x";

/// Pods of one node, made under names that are never used twice.
struct Pods<'a> {
    lab: &'a Lab,
    node: usize,
    made: u32,
    present: Vec<String>,
}

impl<'a> Pods<'a> {
    fn on(lab: &'a Lab, node: usize) -> Self {
        Self { lab, node, made: 0, present: Vec::new() }
    }

    fn create(&mut self, exclusive: bool) {
        self.made += 1;
        let name = format!("c{}-{}{}", self.node, self.made, if exclusive { EXCLUSIVE } else { "" });
        self.lab.create(self.node, &name, exclusive);
        self.present.push(name);
    }

    fn exclusives(&self) -> usize {
        self.present.iter().filter(|name| name.ends_with(EXCLUSIVE)).count()
    }

    fn delete(&mut self, at: usize) {
        self.lab.delete(&self.present.remove(at));
    }

    fn delete_all(&mut self) {
        self.present.drain(..).for_each(|name| self.lab.delete(&name));
    }

    async fn all_ready(&self) {
        for name in &self.present {
            self.lab.ready(name).await;
        }
    }
}

/// Churn on a node until the agent dies at the fail point; then it comes back
/// and everything must add up.
async fn crash_at(pods: &mut Pods<'_>, step: &str, moment: &str) {
    let (lab, node) = (pods.lab, pods.node);
    let point = format!("{step}:{moment}");
    let instance = lab.node(node).instance.clone();
    let troubled = TROUBLED.contains(&step);
    let ledger_lost = matches!(step, "recover" | "adopt-eni");
    if ledger_lost {
        pods.create(false);
        pods.create(true);
        pods.all_ready().await;
        lab.node(node).node.stop_agent().await;
        std::fs::remove_dir_all(lab.node(node).node.dirs().state.join("ledger")).unwrap();
    }
    lab.start_agent(node, &[(FailPoint::ENV, &point)], None).await;
    let mut exits = lab.node(node).node.agent_exits().await.unwrap();
    let stirring = async {
        for _ in 0..4 {
            let foreign = interfere(lab, &instance, step).await;
            (0..if troubled { 4 } else { 2 }).for_each(|_| pods.create(false));
            pods.create(true);
            let _ = timeout(Duration::from_secs(5), pods.all_ready()).await;
            if let Some(eni) = foreign {
                lab.until("the agent to see another's ENI", Duration::from_secs(5), async || {
                    match lab.view(node, "/debug/pool").await?["steps"]["learn"].as_u64() {
                        Some(_) => Ok(()),
                        None => Err("it has not".to_owned()),
                    }
                })
                .await;
                remove(lab, &eni).await;
            }
            if step == "unhold" {
                // Tried again while it is still wanted.
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
            pods.delete_all();
            // What is surplus now goes back after a while.
            tokio::time::sleep(Duration::from_millis(2500)).await;
        }
    };
    let died = tokio::select! {
        exits = exits.wait_for(|exits| exits.count > 0) => exits.map(|e| e.last.clone()).ok().flatten(),
        () = stirring => None,
    };
    let died = died.unwrap_or_else(|| panic!("{point} was not reached\n{}", lab.last_words()));
    assert!(died.status.contains("SIGKILL"), "{point}: {}\n{}", died.status, lab.last_words());
    lab.site.cloud.clear_faults();
    for eni in foreign_enis(lab, &instance) {
        remove(lab, &eni.id).await;
    }
    lab.start_agent(node, &[], None).await;
    lab.agent_ready(node).await;
    pods.all_ready().await;
    lab.node_settled(node).await;
    pods.delete_all();
}

/// What makes a step happen that pods alone do not lead to. Returns an ENI that
/// is to be removed again.
async fn interfere(lab: &Lab, instance: &str, step: &str) -> Option<String> {
    let cloud = &lab.site.cloud;
    let deny = |apis: &[&str]| {
        cloud.add_fault(FaultSpec::from(Fault::Deny).apis(apis).count(1)).unwrap();
    };
    match step {
        "create-failed" | "hold" => deny(&["CreateNetworkInterface"]),
        "unhold" => {
            deny(&["CreateNetworkInterface"]);
            deny(&["AssignPrivateIpAddresses"]);
        }
        "assign-failed" => deny(&["AssignPrivateIpAddresses"]),
        "eni-lost" => {
            let ours = own_enis(lab, instance);
            if let Some(eni) = ours.iter().find(|e| e.tags.get("fairway.io/purpose").is_some_and(|p| p == "exclusive"))
            {
                remove(lab, &eni.id).await;
            }
        }
        "sync-eni" => {
            for eni in own_enis(lab, instance)
                .iter()
                .filter(|e| e.tags.get("fairway.io/purpose").is_some_and(|p| p == "shared"))
            {
                let params = [("NetworkInterfaceId", &*eni.id), ("SecondaryPrivateIpAddressCount", "1")];
                let _ = cloud.operate("AssignPrivateIpAddresses", &params).await;
            }
        }
        "learn" => {
            let vswitch = cloud.state().vswitches[0].spec.id.clone();
            let params = [("VSwitchId", &*vswitch), ("SecurityGroupId", "sg-lab")];
            let made = cloud.operate("CreateNetworkInterface", &params).await.unwrap();
            let eni = made["NetworkInterfaceId"].as_str().unwrap().to_owned();
            let params = [("NetworkInterfaceId", &*eni), ("InstanceId", instance)];
            cloud.operate("AttachNetworkInterface", &params).await.unwrap();
            return Some(eni);
        }
        _ => {}
    }
    None
}

fn own_enis(lab: &Lab, instance: &str) -> Vec<Eni> {
    let mut enis = lab.site.cloud.state().enis;
    enis.retain(|e| e.tags.get("fairway.io/node").is_some_and(|n| n == instance) && e.status == EniStatus::InUse);
    enis
}

fn foreign_enis(lab: &Lab, instance: &str) -> Vec<Eni> {
    let mut enis = lab.site.cloud.state().enis;
    enis.retain(|e| e.kind != EniKind::Primary && e.instance.as_deref() == Some(instance));
    enis.retain(|e| !e.tags.contains_key("fairway.io/node"));
    enis
}

/// Detach and delete an ENI behind the agent's back.
async fn remove(lab: &Lab, eni: &str) {
    lab.until("an ENI to be removed in the console", Duration::from_secs(10), async || {
        let Some(now) = lab.site.cloud.state().enis.into_iter().find(|e| e.id == eni) else { return Ok(()) };
        let id = ("NetworkInterfaceId", eni);
        let done = match (now.status, now.instance.as_deref()) {
            (EniStatus::InUse, Some(instance)) => {
                lab.site.cloud.operate("DetachNetworkInterface", &[id, ("InstanceId", instance)]).await
            }
            (EniStatus::Available, _) => lab.site.cloud.operate("DeleteNetworkInterface", &[id]).await,
            _ => Ok(json!(null)),
        };
        Err(format!("{} {:?}", now.status.as_str(), done.err()))
    })
    .await;
}

/// Every address moves with every pod.
fn lean() -> serde_json::Value {
    json!({"pool": {"min_idle": 1, "max_idle": 1, "quarantine": "200ms", "release_delay": "200ms"}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_ordinary_step_it_comes_back_with_everything_accounted_for() {
    if let Some(missing) = missing() {
        return skip("killed_at_every_ordinary_step_it_comes_back_with_everything_accounted_for", missing);
    }
    let lab = lab("ca", 3, |config| {
        config.dual = true;
        lay(&mut config.agent, lean());
    })
    .await;
    let points: Vec<(&str, &str)> = ORDINARY.iter().flat_map(|s| [(*s, "before"), (*s, "after")]).collect();
    let share = |node: usize| {
        let (lab, points) = (&lab, &points);
        async move {
            let mut pods = Pods::on(lab, node);
            for (step, moment) in points.iter().skip(node).step_by(3) {
                let began = std::time::Instant::now();
                crash_at(&mut pods, step, moment).await;
                println!("{step}:{moment} survived in {:.1} s", began.elapsed().as_secs_f64());
            }
        }
    };
    tokio::join!(share(0), share(1), share(2));
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_step_of_trouble_it_comes_back_with_everything_accounted_for() {
    if let Some(missing) = missing() {
        return skip("killed_at_every_step_of_trouble_it_comes_back_with_everything_accounted_for", missing);
    }
    let lab = lab("cb", 1, |config| {
        config.nodes[0].instance_type = "ecs.g7.4xlarge".to_owned();
        lay(&mut config.agent, json!({"pool": {"idle_exclusive": 1}}));
    })
    .await;
    let mut pods = Pods::on(&lab, 0);
    for step in TROUBLED {
        for moment in ["before", "after"] {
            let began = std::time::Instant::now();
            crash_at(&mut pods, step, moment).await;
            println!("{step}:{moment} survived in {:.1} s", began.elapsed().as_secs_f64());
        }
    }
    lab.settled().await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_kills_under_churn_leak_nothing() {
    if let Some(missing) = missing() {
        return skip("random_kills_under_churn_leak_nothing", missing);
    }
    let kills: u32 = std::env::var("FAIRWAY_RANDOM_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(30);
    let seed = std::env::var("FAIRWAY_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or_else(rand::random);
    println!("FAIRWAY_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let lab = lab("cc", 2, |config| {
        config.dual = true;
        lay(&mut config.agent, lean());
    })
    .await;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let churn = |node: usize, seed: u64| {
        let (lab, stop) = (&lab, &stop);
        async move {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut pods = Pods::on(lab, node);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let full = pods.present.len() >= 6;
                if pods.present.is_empty() || (!full && rng.random_bool(0.6)) {
                    // Of the node's three places one is for the pods that share.
                    let exclusive = rng.random_bool(0.2) && pods.exclusives() < 2;
                    pods.create(exclusive);
                } else {
                    let at = rng.random_range(0..pods.present.len());
                    pods.delete(at);
                }
                tokio::time::sleep(Duration::from_millis(rng.random_range(20..250))).await;
            }
            pods
        }
    };
    let (first, second) = (rng.random(), rng.random());
    let killing = async {
        for n in 0..kills {
            tokio::time::sleep(Duration::from_millis(rng.random_range(50..700))).await;
            let node = &lab.node(rng.random_range(0..2)).node;
            node.kill_agent().await.unwrap();
            // From time to time it must also get somewhere.
            if n % 10 == 9 {
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let (mut a, mut b, ()) = tokio::join!(churn(0, first), churn(1, second), killing);
    let made = a.made + b.made;
    for pods in [&a, &b] {
        // A kill may hit before the node's agent was ready once.
        lab.agent_ready(pods.node).await;
        pods.all_ready().await;
    }
    lab.settled().await;
    a.delete_all();
    b.delete_all();
    lab.settled().await;
    println!("{kills} kills, {made} pods: nothing leaked, nothing doubled");
    lab.down().await;
}
