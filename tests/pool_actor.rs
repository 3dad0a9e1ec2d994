//! The Pool actor's promises, with a model cloud that is slow, fails and loses
//! answers, on paused time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::result_large_err)]

#[path = "pool_support/cloud.rs"]
mod cloud;
#[path = "pool_support/links.rs"]
mod links;
#[path = "pool_support/node.rs"]
mod node;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cloud::{Chaos, ModelCloud};
use fairway::actor::{AskError, Deadline};
use fairway::cloud::CloudErrorKind;
use fairway::model::*;
use fairway::pool::step::{FailPoint, Step};
use fairway::pool::*;
use futures::future::join_all;
use node::{Agent, Node};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn config() -> Config {
    Config { cluster_id: "c1".to_owned(), vswitches: vec!["vsw-a".into(), "vsw-b".into()], ..Config::default() }
}

fn node(enis: u32, per_eni: u32, config: Config) -> Node {
    Node::new(ModelCloud::new(enis, per_eni, 7, &[("vsw-a", 1000), ("vsw-b", 2000)]), config)
}

/// Paused time: hours pass in milliseconds.
fn sim<F: Future<Output = ()>>(work: F) {
    fairway::actor::run(async {
        tokio::time::pause();
        work.await;
    });
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_burst_of_200_pods_takes_the_clouds_own_latency_and_14_calls() {
    sim(async {
        let node = node(8, 30, Config { min_idle: 0, max_idle: 15, ..config() });
        let agent = node.start().await;
        let began = tokio::time::Instant::now();
        let adds = (0..200).map(|n| node.add(&agent.pool, n, AttachMode::Veth, LONG));
        let leases: Result<Vec<Lease>, String> = join_all(adds).await.into_iter().collect();
        let took = began.elapsed();
        let addresses: BTreeSet<_> = leases.unwrap().into_iter().map(|l| l.v4).collect();
        assert_eq!(addresses.len(), 200);
        assert!(node.cloud.mutating_calls() <= 15, "{:?}", node.cloud.calls());
        // Create and attach, one after the other, for all ENIs at once.
        let least = node.latency * 2;
        assert!(took <= least.mul_f64(1.2), "{took:?}, the cloud's own latency is {least:?}");
    });
}

#[test]
fn the_same_attachment_gets_the_same_lease_and_lookups_show_it() {
    sim(async {
        let node = node(4, 10, config());
        let agent = node.start().await;
        let first = node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap();
        let again = node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap();
        assert_eq!(first, again);
        let lookup = Lookup { attachment: Node::attachment(1) };
        assert_eq!(agent.pool.ask(lookup, Deadline::after(LONG)).await.unwrap(), Some(first));
        node.del(&agent.pool, 1, LONG).await.unwrap();
        node.del(&agent.pool, 1, LONG).await.unwrap();
        assert!(node.leases(&agent.pool).await.is_empty());
    });
}

#[test]
fn a_request_that_must_wait_too_long_hears_why_before_its_deadline() {
    sim(async {
        let node = node(4, 10, Config { min_idle: 0, ..config() });
        node.cloud.0.lock().chaos.down = true;
        // The ledger is new: nothing is served before the cloud was seen.
        let agent = node.start_now();
        let error = node.add(&agent.pool, 1, AttachMode::Veth, Duration::from_secs(10)).await.unwrap_err();
        assert!(error.contains("try again") || error.contains("restarted"), "{error}");
        node.cloud.0.lock().chaos.down = false;
        node.insist_add(&agent.pool, 1, AttachMode::Veth).await;

        node.cloud.0.lock().chaos.down = true;
        let adds = (10..30).map(|n| node.add(&agent.pool, n, AttachMode::Veth, Duration::from_secs(15)));
        let errors: Vec<String> = join_all(adds).await.into_iter().filter_map(Result::err).collect();
        assert!(!errors.is_empty());
        for error in errors {
            assert!(error.contains("waiting for an address") && error.contains("Transport"), "{error}");
        }
        // Two minutes later it is back, without hands.
        node.cloud.0.lock().chaos.down = false;
        node.insist_add(&agent.pool, 30, AttachMode::Veth).await;
        assert!(node.audit(&agent.pool).await.clean());
    });
}

#[test]
fn a_refusal_that_waiting_cannot_mend_reaches_the_pod_at_once() {
    sim(async {
        let node = node(4, 10, Config { min_idle: 0, ..config() });
        node.cloud.0.lock().refuse_create = Some(CloudErrorKind::Forbidden);
        let agent = node.start().await;
        let began = tokio::time::Instant::now();
        let error = node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap_err();
        assert!(error.contains("Forbidden"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn with_the_ledger_unwritable_nothing_is_handed_out_and_nothing_is_lost() {
    sim(async {
        let node = node(4, 10, config());
        let agent = node.start().await;
        let lease = node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap();
        tokio::time::sleep(LONG).await;
        node.store.fail(Some("No space left on device"));
        let error = node.add(&agent.pool, 2, AttachMode::Veth, LONG).await.unwrap_err();
        assert!(error.contains("No space left") && error.contains("nothing was handed out"), "{error}");
        assert_eq!(node.leases(&agent.pool).await, [lease]);
        let release = node.del(&agent.pool, 1, LONG).await.unwrap_err();
        assert!(release.contains("No space left"), "{release}");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(node.snapshot().ledger_error.is_some());
        node.store.fail(None);
        node.insist_del(&agent.pool, 1).await;
        node.insist_add(&agent.pool, 2, AttachMode::Veth).await;
        assert!(node.audit(&agent.pool).await.clean());
    });
}

#[test]
fn what_nobody_waits_for_is_on_disk_soon_all_the_same() {
    use fairway::pool::ledger::{Store as _, decode};
    use fairway::pool::state::LeasePhase;
    sim(async {
        let node = node(3, 10, config());
        let agent = node.start().await;
        let phase = || {
            let state = decode(&node.store.clone().load().unwrap()).unwrap();
            state.lease_of(&Node::attachment(0)).map(|(_, held)| held.phase)
        };
        node.add(&agent.pool, 0, AttachMode::Veth, LONG).await.unwrap();
        assert!(phase().is_some(), "a lease that was handed out is on disk");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(phase(), Some(LeasePhase::Wired));
        let begun = BeginRelease { attachment: Node::attachment(0) };
        agent.pool.ask(begun, Deadline::after(LONG)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(phase(), Some(LeasePhase::Unwiring));
    });
}

#[test]
fn with_the_cloud_away_a_restarted_agent_serves_from_its_ledger() {
    sim(async {
        let node = node(4, 10, config());
        let agent = node.start().await;
        let lease = node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap();
        tokio::time::sleep(LONG).await;
        node.kill();
        node.cloud.0.lock().chaos.down = true;
        let agent = node.start().await;
        let again = node.insist_add(&agent.pool, 1, AttachMode::Veth).await;
        assert_eq!(again, lease);
        node.insist_add(&agent.pool, 2, AttachMode::Veth).await;
    });
}

#[test]
fn a_lease_whose_sandbox_vanished_without_del_is_collected() {
    sim(async {
        let node = node(4, 10, config());
        let agent = node.start().await;
        node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap();
        node.bind(&[2]);
        node.add(&agent.pool, 2, AttachMode::Veth, LONG).await.unwrap();
        node.remove_sandbox(1);
        tokio::time::sleep(Duration::from_secs(200)).await;
        let left: Vec<PodKey> = node.leases(&agent.pool).await.into_iter().map(|l| l.pod).collect();
        assert_eq!(left, [PodKey::new("ns", "pod-2")]);
    });
}

#[test]
fn a_lease_whose_pod_the_cluster_forgot_is_collected_but_never_on_a_guess() {
    sim(async {
        let node = node(4, 10, config());
        node.bound.send_replace(None);
        let agent = node.start().await;
        node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(node.leases(&agent.pool).await.len(), 1, "the API server is away: nothing is known");
        node.bind(&[]);
        tokio::time::sleep(Duration::from_secs(500)).await;
        assert_eq!(node.leases(&agent.pool).await.len(), 1);
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert!(node.leases(&agent.pool).await.is_empty());
        assert!(node.kernel.lock().wired.is_empty(), "unwired before it was released");
    });
}

#[test]
fn pods_bound_to_the_node_find_their_addresses_ready() {
    sim(async {
        let node = node(8, 30, Config { min_idle: 0, max_idle: 0, ..config() });
        let agent = node.start().await;
        node.bind(&(0..50).collect::<Vec<u32>>());
        tokio::time::sleep(Duration::from_secs(10)).await;
        let began = tokio::time::Instant::now();
        let adds = (0..50).map(|n| node.add(&agent.pool, n, AttachMode::Veth, LONG));
        assert!(join_all(adds).await.into_iter().all(|r| r.is_ok()));
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    });
}

#[test]
fn the_elected_node_reclaims_what_no_node_claims_and_nothing_else() {
    sim(async {
        let node = node(4, 10, config());
        let make = |tags: &[(&str, &str)]| {
            let message = fairway::cloud::CreateEni {
                vswitch: "vsw-a".into(),
                security_groups: vec!["sg-1".into()],
                ipv4: 1,
                ipv6: 0,
                tags: tags.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
                description: String::new(),
                token: format!("{tags:?}")
                    .chars()
                    .filter(char::is_ascii_alphanumeric)
                    .take(60)
                    .collect::<String>()
                    .into(),
                lane: fairway::cloud::Lane::Refill,
            };
            node.cloud.0.lock().create(&message).unwrap().id
        };
        let orphan = make(&[("fairway.io/cluster", "c1"), ("fairway.io/node", "i-gone")]);
        let foreign = make(&[("fairway.io/cluster", "c2"), ("fairway.io/node", "i-gone2")]);
        let _agent = node.start().await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(node.cloud.0.lock().enis.contains_key(&orphan), "this node is not elected");
        node.elected.send_replace(true);
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(node.cloud.0.lock().enis.contains_key(&orphan), "its owner may be slow");
        tokio::time::sleep(Duration::from_secs(900)).await;
        assert!(!node.cloud.0.lock().enis.contains_key(&orphan));
        assert!(node.cloud.0.lock().enis.contains_key(&foreign), "another cluster's");
    });
}

#[test]
fn reads_stay_below_one_a_second_while_the_pool_works() {
    sim(async {
        let node = node(8, 30, config());
        let agent = node.start().await;
        let began = tokio::time::Instant::now();
        for round in 0..3 {
            let adds = (0..100).map(|n| node.add(&agent.pool, round * 100 + n, AttachMode::Veth, LONG));
            join_all(adds).await;
            let dels = (0..100).map(|n| node.del(&agent.pool, round * 100 + n, LONG));
            join_all(dels).await;
            tokio::time::sleep(Duration::from_secs(400)).await;
        }
        let reads: u32 = node.cloud.calls().iter().filter(|(n, _)| n.starts_with("describe")).map(|(_, n)| n).sum();
        assert!(f64::from(reads) <= began.elapsed().as_secs_f64(), "{reads} reads in {:?}", began.elapsed());
    });
}

#[test]
fn the_snapshot_shows_enis_load_and_capacity() {
    sim(async {
        let node = node(4, 10, config());
        let agent = node.start().await;
        for n in 0..4 {
            node.add(&agent.pool, n, AttachMode::Veth, LONG).await.unwrap();
        }
        node.add(&agent.pool, 4, AttachMode::Exclusive, LONG).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let snapshot = node.snapshot();
        assert!(snapshot.reconciled);
        assert_eq!(snapshot.totals.leased, 5);
        assert_eq!((snapshot.totals.exclusive_leased, snapshot.totals.exclusive_capacity), (1, 2));
        let loads: u64 = snapshot.enis.iter().map(|e| e.load_per_queue_milli).sum();
        assert_eq!(loads, 2500, "5 leases over 2 queues per ENI");
        let text = serde_json::to_string(&*snapshot).unwrap();
        assert_eq!(serde_json::from_str::<PoolSnapshot>(&text).unwrap(), *snapshot);
    });
}

#[test]
fn on_a_real_ledger_leases_survive_a_restart_and_a_damaged_one_is_rebuilt() {
    fairway::actor::run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut node = node(4, 10, config());
        node.latency = Duration::from_millis(10);
        node.folder = Some(dir.path().join("ledger"));
        let agent = node.start().await;
        let adds = (0..12).map(|n| node.add(&agent.pool, n, AttachMode::Veth, LONG));
        let leases: Vec<Lease> = join_all(adds).await.into_iter().map(|r| r.unwrap()).collect();
        let late = agent.tree.shutdown(Duration::from_secs(5)).await;
        assert!(late.is_empty(), "{late:?}");

        let agent = node.start().await;
        for lease in &leases {
            let lookup = Lookup { attachment: lease.attachment.clone() };
            assert_eq!(agent.pool.ask(lookup, Deadline::after(LONG)).await.unwrap().as_ref(), Some(lease));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!node.snapshot().ledger.rebuilt());
        agent.tree.shutdown(Duration::from_secs(5)).await;

        // The file is overwritten.
        let file = dir.path().join("ledger/db");
        let length = std::fs::metadata(&file).unwrap().len();
        std::fs::write(&file, vec![0xa5; length as usize]).unwrap();
        node.bind_all_wired();
        let agent = node.start().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let snapshot = node.snapshot();
        assert!(snapshot.ledger.rebuilt(), "{:?}", snapshot.ledger);
        let held: BTreeSet<_> = node.leases(&agent.pool).await.into_iter().map(|l| l.v4).collect();
        assert_eq!(held, leases.iter().map(|l| l.v4).collect(), "what pods use stays theirs");
        agent.tree.shutdown(Duration::from_secs(5)).await;
    });
}

/// Churn with every kind of trouble in it. Reaches all journalled steps.
async fn script(node: Node, mut agent: Agent, seed: u64, mut died: impl AsyncFnMut(&Node, Agent) -> Agent) -> Agent {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut alive: BTreeSet<u32> = BTreeSet::new();
    let mut rounds_after_death = 3;
    for round in 0..14u32 {
        // Trouble of this round.
        match round {
            2 => node.cloud.0.lock().vswitches.get_mut(&"vsw-a".into()).unwrap().free.clear(),
            3 => node.cloud.0.lock().chaos = Chaos { fail: 20, lose_reply: 20, down: false },
            5 => node.cloud.0.lock().chaos = Chaos::default(),
            // An address of a deleted ENI may come back on another one: with the
            // ledger gone as well, nobody could know that a pod still has it.
            6 if seed.is_multiple_of(2) => {
                // Somebody deletes an ENI that is in use.
                let enis = node.cloud.secondary();
                let mut cloud = node.cloud.0.lock();
                if let Some(eni) = enis.iter().find(|e| cloud.detach(&e.id).is_ok()) {
                    cloud.delete(&eni.id).unwrap();
                }
            }
            7 => {
                // Somebody assigns an address by hand, and types change.
                let mut cloud = node.cloud.0.lock();
                cloud.limits.queues_per_secondary_eni = 4;
                let eni = cloud.enis.values().find(|e| e.instance.is_some() && e.tags.len() > 2).cloned();
                if let Some(eni) = eni {
                    let message = fairway::cloud::AssignIpv4 {
                        eni: eni.id,
                        count: 1,
                        token: format!("by-hand-{round}").into(),
                        lane: fairway::cloud::Lane::Refill,
                    };
                    let _ = cloud.assign4(&message);
                }
            }
            9 if !seed.is_multiple_of(2) => {
                // The disk is replaced.
                node.kill();
                node.store.erase();
                agent = node.start().await;
            }
            _ => {}
        }
        let wanted: Vec<(u32, AttachMode)> = (0..6)
            .map(|_| {
                let mode = if rng.random_bool(0.15) { AttachMode::Exclusive } else { AttachMode::Veth };
                (rng.random_range(0..60u32), mode)
            })
            .filter(|(n, _)| !alive.contains(n))
            .collect();
        let unwanted: Vec<u32> = alive.iter().copied().filter(|_| rng.random_bool(0.4)).collect();
        let adds = wanted.iter().map(|(n, mode)| node.add(&agent.pool, *n, *mode, Duration::from_secs(40)));
        let dels = unwanted.iter().map(|n| node.del(&agent.pool, *n, Duration::from_secs(40)));
        let (added, deleted) = futures::join!(join_all(adds), join_all(dels));
        for ((n, _), result) in wanted.iter().zip(added) {
            // What failed is a sandbox that kubelet takes down again.
            if result.is_ok() {
                alive.insert(*n)
            } else {
                node.del(&agent.pool, *n, LONG).await.is_ok()
            };
        }
        for (n, result) in unwanted.iter().zip(deleted) {
            if result.is_ok() {
                alive.remove(n);
            }
        }
        // One sandbox vanishes without a word.
        if round == 10
            && let Some(n) = alive.pop_first()
        {
            node.remove_sandbox(n);
        }
        let pause = if round % 4 == 3 { 700 } else { 5 };
        tokio::time::sleep(Duration::from_secs(pause)).await;
        agent = died(&node, agent).await;
        // One death is enough for those who look for one.
        if node.died_once.load(Ordering::Relaxed) {
            rounds_after_death -= 1;
            if rounds_after_death == 0 {
                break;
            }
        }
    }
    node.cloud.0.lock().chaos = Chaos::default();
    agent
}

/// After everything: all accounts agree and every pod has its own address.
async fn all_is_well(node: &Node, agent: &Agent) {
    let broken = node.violations.lock().clone();
    assert!(broken.is_empty(), "{broken:#?}");
    let reasons: Vec<_> = agent.tree.registry().snapshot().into_iter().map(|a| a.restart_reasons).collect();
    assert!(reasons.iter().all(Vec::is_empty), "{reasons:?}");
    // kubelet takes down what it does not know.
    for lease in node.leases(&agent.pool).await {
        if !lease.attachment.sandbox.as_str().starts_with("recovered-") && !lease.netns.exists() {
            let _ = agent.pool.ask(BeginRelease { attachment: lease.attachment.clone() }, Deadline::after(LONG)).await;
        }
    }
    tokio::time::sleep(Duration::from_secs(1500)).await;
    node.bind_all_wired();
    let report = node.audit(&agent.pool).await;
    assert!(report.clean(), "{report:#?}");
    for n in 100..105 {
        node.insist_add(&agent.pool, n, AttachMode::Veth).await;
    }
    let leases = node.leases(&agent.pool).await;
    let wired = node.kernel.lock().wired.clone();
    for (ip, (attachment, ..)) in wired {
        assert!(leases.iter().any(|l| l.v4 == ip), "{attachment} uses {ip}, which nobody leased");
    }
}

fn small() -> Config {
    Config { min_idle: 2, max_idle: 4, idle_exclusive: 1, ip_stack: IpStack::Dual, ..config() }
}

#[test]
fn churn_with_failures_lost_answers_and_a_lost_ledger_ends_in_agreement_and_takes_every_step() {
    let mut reached = BTreeSet::new();
    for seed in 0..4 {
        sim(async {
            let node = node(5, 8, small());
            let agent = node.start().await;
            let agent = script(node.clone(), agent, seed, async |_: &Node, agent| agent).await;
            all_is_well(&node, &agent).await;
            reached.extend(node.store.reached());
        });
    }
    let missing: Vec<_> = Step::NAMES.iter().filter(|name| !reached.contains(*name)).collect();
    assert!(missing.is_empty(), "never taken: {missing:?}");
}

/// Die once at each of these steps, before and after it is durable.
fn die_at(steps: impl Iterator<Item = &'static str>) {
    for name in steps {
        for moment in ["before", "after"] {
            let mut died = false;
            // Not every course of events comes by every step.
            for seed in 0..6u64 {
                sim(async {
                    let node = node(5, 8, small());
                    node.store.stop_at(FailPoint::parse(&format!("{name}:{moment}")).unwrap());
                    let agent = node.start().await;
                    let agent = script(node.clone(), agent, seed, async |node: &Node, agent: Agent| {
                        if !node.store.stopped() {
                            return agent;
                        }
                        died = true;
                        node.died_once.store(true, Ordering::Relaxed);
                        node.kill();
                        node.store.stop_at(FailPoint::default());
                        node.start().await
                    })
                    .await;
                    all_is_well(&node, &agent).await;
                });
                if died {
                    break;
                }
            }
            assert!(died, "never died {moment} {name}");
        }
    }
}

#[test]
fn death_at_any_journalled_step_leaks_nothing_and_doubles_nothing_first_third() {
    die_at(Step::NAMES.iter().copied().step_by(3));
}

#[test]
fn death_at_any_journalled_step_leaks_nothing_and_doubles_nothing_second_third() {
    die_at(Step::NAMES.iter().copied().skip(1).step_by(3));
}

#[test]
fn death_at_any_journalled_step_leaks_nothing_and_doubles_nothing_last_third() {
    die_at(Step::NAMES.iter().copied().skip(2).step_by(3));
}

#[test]
fn random_deaths_under_churn_leak_nothing_and_double_nothing() {
    for seed in 0..12 {
        sim(async {
            let node = node(5, 8, small());
            let mut rng = StdRng::seed_from_u64(seed);
            let agent = node.start().await;
            // Each life ends after a random number of commits.
            let step = Step::NAMES[rng.random_range(0..Step::NAMES.len())];
            node.store.stop_at(FailPoint::parse(&format!("{step}:after:{}", rng.random_range(1..20))).unwrap());
            let agent = script(node.clone(), agent, seed, async |node: &Node, _agent: Agent| {
                // Also at no step in particular.
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..3000))).await;
                node.kill();
                let step = Step::NAMES[rng.random_range(0..Step::NAMES.len())];
                node.store.stop_at(FailPoint::parse(&format!("{step}:before:{}", rng.random_range(1..4))).unwrap());
                node.start().await
            })
            .await;
            node.kill();
            drop(agent);
            node.store.stop_at(FailPoint::default());
            let agent = node.start().await;
            all_is_well(&node, &agent).await;
        });
    }
}

#[test]
fn busy_and_dead_actors_are_answers_not_hangs() {
    sim(async {
        let node = node(4, 10, config());
        let agent = node.start().await;
        node.add(&agent.pool, 1, AttachMode::Veth, LONG).await.unwrap();
        let lookups =
            (0..3000).map(|_| agent.pool.ask(Lookup { attachment: Node::attachment(1) }, Deadline::after(LONG)));
        let busy = join_all(lookups).await.into_iter().filter(|r| matches!(r, Err(AskError::Busy { .. }))).count();
        assert!(busy > 0 && busy < 3000, "{busy}");
    });
}
