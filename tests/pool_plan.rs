//! The plan's promises, against a model of the cloud and of the pods: no address
//! is leased twice, none is lost, calls are bounded, and from any state the pool
//! comes to rest. Pure: no clock, no thread, no network.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::result_large_err)]

#[path = "pool_support/cloud.rs"]
mod cloud;
#[path = "pool_support/links.rs"]
mod links;
#[path = "pool_support/world.rs"]
mod world;

use std::net::Ipv4Addr;
use std::time::Duration;

use fairway::cloud::{CloudErrorKind, EniStatus};
use fairway::model::*;
use fairway::pool::config::VSwitchPolicy;
use fairway::pool::demand::BoundPod;
use fairway::pool::state::{AddressState, Purpose};
use fairway::pool::{Config, PoolError, step::Step};
use proptest::prelude::*;
use world::World;

fn config() -> Config {
    Config { cluster_id: "c1".to_owned(), vswitches: vec!["vsw-a".into(), "vsw-b".into()], ..Config::default() }
}

/// No stock, so that a test sees only what it asks for.
fn bare() -> Config {
    Config { min_idle: 0, max_idle: 0, ..config() }
}

#[test]
fn a_burst_of_200_on_a_cold_8x30_node_costs_7_creates_and_7_attaches_started_at_once() {
    let mut world = World::new(8, 30, 1, config());
    for n in 0..200 {
        world.add(n, AttachMode::Veth, false);
    }
    let first = world.plan();
    let creates = first.iter().filter(|s| matches!(s, Step::CreateEni { .. })).count();
    assert_eq!(creates, 7, "all at once: {first:?}");
    world.settle();
    assert_eq!(world.served(), 200);
    assert_eq!(world.cloud.mutating_calls(), 14, "{:?}", world.cloud.calls());
}

#[test]
fn a_burst_that_trickles_in_costs_no_more_calls() {
    for stride in [1, 3, 16] {
        let mut world = World::new(8, 30, 1, config());
        for n in 0..200 {
            world.add(n, AttachMode::Veth, false);
            if n % stride == 0 {
                world.turn(usize::from(n % 7 == 0));
            }
        }
        world.settle();
        assert_eq!(world.served(), 200);
        let calls = world.cloud.mutating_calls();
        assert!(calls <= 15, "{calls} calls: {:?}", world.cloud.calls());
    }
}

#[test]
fn bound_pods_are_fetched_for_before_they_ask_and_counted_once_when_they_do() {
    let mut world = World::new(8, 30, 1, bare());
    for n in 0..20 {
        world.bind(n, AttachMode::Veth);
    }
    world.settle();
    let calls = world.cloud.mutating_calls();
    assert_eq!(world.idle(), 30, "one ENI with all its addresses");
    for n in 0..20 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    assert_eq!(world.served(), 20);
    assert_eq!(world.cloud.mutating_calls(), calls, "no call when they ask");
}

#[test]
fn the_stock_is_filled_once_and_then_costs_nothing() {
    let mut world = World::new(4, 15, 1, config());
    world.settle();
    assert_eq!(world.idle(), 10, "halfway between 5 and 15");
    let calls = world.cloud.mutating_calls();
    assert_eq!(calls, 2);
    for n in 0..5 {
        world.add(n, AttachMode::Veth, false);
        world.settle();
    }
    assert_eq!(world.cloud.mutating_calls(), calls, "idle 5 is not below the minimum");
    world.add(5, AttachMode::Veth, false);
    world.settle();
    assert_eq!(world.cloud.mutating_calls(), calls + 1, "one call brings the stock back");
    assert!(world.idle() >= 9, "{}", world.idle());
}

#[test]
fn a_released_address_cools_down_before_another_pod_gets_it() {
    let mut world = World::new(2, 2, 1, bare());
    world.add(0, AttachMode::Veth, false);
    world.add(1, AttachMode::Veth, false);
    world.settle();
    let address = world.address_of(0).unwrap();
    world.del(0);
    world.add(2, AttachMode::Veth, false);
    world.settle_for(Duration::from_secs(29));
    assert_eq!(world.address_of(2), None, "quarantine");
    world.settle_for(Duration::from_secs(2));
    assert_eq!(world.address_of(2), Some(address));
}

#[test]
fn a_statefulset_pod_gets_its_address_back_and_others_do_not_meanwhile() {
    let mut world = World::new(2, 3, 1, bare());
    world.add(0, AttachMode::Veth, true);
    world.settle();
    let address = world.address_of(0).unwrap();
    world.del(0);
    for n in 10..12 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle_for(Duration::from_secs(120));
    assert!(world.pods_with(address).is_empty());
    world.add(0, AttachMode::Veth, true);
    world.settle();
    assert_eq!(world.address_of(0), Some(address));

    world.del(0);
    world.settle_for(Duration::from_secs(301));
    world.add(13, AttachMode::Veth, false);
    world.settle();
    assert_eq!(world.address_of(13), Some(address), "the promise has ended");
}

#[test]
fn the_add_of_a_new_sandbox_before_the_del_of_the_old_one_gets_another_address() {
    let mut world = World::new(2, 5, 1, bare());
    world.add(0, AttachMode::Veth, true);
    world.settle();
    let old = world.address_of(0).unwrap();
    world.add_sandbox(0, 1, AttachMode::Veth, true);
    world.settle();
    let held: Vec<Ipv4Addr> = world.state.leases().map(|(ip, _)| ip).collect();
    assert_eq!(held.len(), 2);
    world.del(0);
    world.settle();
    assert!(
        matches!(world.state.addresses[&old].state, AddressState::Cooling { .. } | AddressState::Idle { .. }),
        "the pod has an address: none is kept for it"
    );
}

#[test]
fn whole_enis_are_given_back_after_the_delay_and_never_below_the_stock() {
    let mut world = World::new(8, 30, 1, config());
    for n in 0..100 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    for n in 0..100 {
        world.del(n);
    }
    world.settle_for(Duration::from_secs(31));
    let enis = world.cloud.secondary().len();
    assert_eq!(enis, 4, "not before the delay");
    world.settle_for(Duration::from_secs(600));
    let enis = world.cloud.secondary();
    assert_eq!(enis.len(), 1, "{enis:?}");
    assert!((5..=15).contains(&world.idle()), "{}", world.idle());
    assert_eq!(world.cloud.calls()["unassign4"], 1, "the rest in one call");
    let calls = world.cloud.mutating_calls();
    world.settle_for(Duration::from_secs(3600));
    assert_eq!(world.cloud.mutating_calls(), calls, "and then it rests");
}

#[test]
fn an_exhausted_vswitch_is_avoided_until_its_cool_off_ends() {
    let mut world = World::new(8, 10, 1, bare());
    world.cloud.0.lock().vswitches.get_mut(&"vsw-a".into()).unwrap().free.clear();
    // The last reading says otherwise.
    for n in 0..10 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    assert_eq!(world.served(), 10);
    assert_eq!(world.cloud.calls()["create"], 2, "one refusal, then the other vSwitch");
    assert_eq!(world.cloud.secondary()[0].vswitch, "vsw-b".into());
}

#[test]
fn a_new_eni_leaves_the_vswitch_what_a_busy_one_will_be_asked_for() {
    let mut world = World::new(4, 10, 1, Config { vswitch_policy: VSwitchPolicy::Ordered, ..bare() });
    {
        let mut cloud = world.cloud.0.lock();
        let free = &mut cloud.vswitches.get_mut(&"vsw-a".into()).unwrap().free;
        *free = free.iter().copied().take(4).collect();
    }
    world.read_vswitches();
    world.add(0, AttachMode::Veth, false);
    world.turn(0);
    // The first ENI is being created with one of the four; the plan counts on the
    // three others for it, and repeats nothing (asserted each turn).
    for n in 1..13 {
        world.add(n, AttachMode::Veth, false);
    }
    world.turn(0);
    world.settle();
    assert_eq!(world.served(), 13);
    assert_eq!(world.cloud.calls()["create"], 2, "{:?}", world.cloud.calls());
}

#[test]
fn a_cloud_that_is_away_makes_no_shared_pod_take_the_place_of_an_exclusive_one() {
    let mut world = World::new(3, 10, 1, bare());
    world.add(0, AttachMode::Veth, false);
    world.settle();
    world.cloud.0.lock().chaos.down = true;
    for n in 1..4 {
        world.add(n, AttachMode::Veth, false);
        world.turn(1);
    }
    world.turn(1);
    world.add(4, AttachMode::Exclusive, false);
    world.turn(1);
    world.cloud.0.lock().chaos.down = false;
    world.settle();
    assert_eq!((world.served(), world.refusal(4)), (5, None));
    assert_eq!(world.cloud.secondary().len(), 2, "the room of the ENI whose call failed was waited for");
}

#[test]
fn when_every_vswitch_is_exhausted_the_pod_hears_it_at_once() {
    let mut world = World::new(8, 10, 1, bare());
    for net in world.cloud.0.lock().vswitches.values_mut() {
        net.free.clear();
    }
    world.add(0, AttachMode::Veth, false);
    world.settle();
    assert!(world.refusal(0).unwrap().contains("VSwitchExhausted"), "{:?}", world.refusal(0));
    assert_eq!(world.cloud.calls()["create"], 2, "no storm");
}

#[test]
fn the_vswitch_policies_choose_as_named() {
    for (policy, expected) in [(VSwitchPolicy::Ordered, "vsw-a"), (VSwitchPolicy::MostAvailable, "vsw-b")] {
        let mut world = World::new(8, 10, 1, Config { vswitch_policy: policy, ..bare() });
        world.cloud.0.lock().vswitches.get_mut(&"vsw-a".into()).unwrap().free.retain(|ip| ip.octets()[2] < 1);
        world.read_vswitches();
        world.add(0, AttachMode::Veth, false);
        world.settle();
        assert_eq!(world.cloud.secondary()[0].vswitch, expected.into(), "{policy:?}");
    }
    let mut chosen = std::collections::BTreeSet::new();
    for random in 0..20 {
        let mut world = World::new(8, 10, 1, Config { vswitch_policy: VSwitchPolicy::Random, ..bare() });
        world.demand.random = random;
        world.add(0, AttachMode::Veth, false);
        world.settle();
        chosen.insert(world.cloud.secondary()[0].vswitch.clone());
    }
    assert_eq!(chosen.len(), 2);
}

#[test]
fn pods_are_spread_over_enis_by_load_per_queue() {
    let mut world = World::new(4, 15, 1, Config { min_idle: 45, max_idle: 45, ..config() });
    world.settle();
    for n in 0..30 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    for key in world.state.enis.keys() {
        let leased = world.state.of_eni(*key).filter(|(_, a)| a.held().is_some()).count();
        assert_eq!(leased, 10);
    }
}

#[test]
fn exclusive_pods_get_an_eni_each_and_warm_ones_are_kept() {
    let mut world = World::new(8, 30, 1, Config { idle_exclusive: 1, ..bare() });
    for n in 0..3 {
        world.add(n, AttachMode::Exclusive, false);
    }
    world.settle();
    assert_eq!(world.served(), 3);
    let exclusive = world.state.enis.values().filter(|e| e.purpose == Purpose::Exclusive).count();
    assert_eq!(exclusive, 4, "three in use, one warm");
    let calls = world.cloud.mutating_calls();
    assert_eq!(calls, 8);
    for n in 0..3 {
        world.del(n);
    }
    world.settle_for(Duration::from_secs(900));
    assert_eq!(world.cloud.secondary().len(), 1, "the warm one stays");
}

#[test]
fn an_idle_shared_eni_makes_room_for_an_exclusive_pod() {
    let mut world = World::new(3, 10, 1, Config { min_idle: 15, max_idle: 20, ..config() });
    world.settle();
    assert_eq!(world.cloud.secondary().len(), 2);
    world.add(0, AttachMode::Exclusive, false);
    world.settle();
    assert!(world.address_of(0).is_some());
}

#[test]
fn a_full_node_says_so_at_once_with_figures() {
    let mut world = World::new(2, 3, 1, bare());
    for n in 0..4 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    assert_eq!(world.served(), 3);
    let error = PoolError::NodeFull { in_use: 3, limit: 3 }.to_string();
    assert_eq!(world.refusal(3).unwrap(), error);
}

#[test]
fn an_exclusive_pod_without_a_place_hears_of_enis_not_of_addresses() {
    let mut world = World::new(4, 10, 1, bare());
    for n in 0..11 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    for n in 20..22 {
        world.add(n, AttachMode::Exclusive, false);
    }
    world.settle();
    assert_eq!(world.served(), 12);
    // Eleven addresses are in use, which has nothing to do with it.
    let error = PoolError::NoPlace { shared: 2, limit: 3 }.to_string();
    assert_eq!(world.refusal(21).or(world.refusal(20)).unwrap(), error);
    assert!(error.contains("all 3 that") && error.contains("2 of them by ENIs that pods share"), "{error}");
}

#[test]
fn the_nodes_primary_eni_is_never_used() {
    let mut world = World::new(3, 4, 1, bare());
    for n in 0..20 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    assert_eq!(world.served(), 8, "2 secondary ENIs of 4");
    let primary = world.cloud.0.lock().enis.values().find(|e| e.kind == fairway::cloud::EniKind::Primary).cloned();
    assert_eq!(primary.unwrap().ipv4.len(), 1);
}

#[test]
fn dual_stack_leases_pair_one_address_of_each_family() {
    let mut world = World::new(4, 15, 1, Config { ip_stack: IpStack::Dual, ..bare() });
    for n in 0..40 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle();
    assert_eq!(world.served(), 40);
    let v6: std::collections::BTreeSet<_> = world.state.leases().map(|(_, h)| h.lease.v6.unwrap()).collect();
    assert_eq!(v6.len(), 40);
    // 3 creates and attaches; 15 per ENI with 10 IPv6 addresses per call.
    assert_eq!(world.cloud.mutating_calls(), 9, "{:?}", world.cloud.calls());
}

#[test]
fn leases_whose_sandbox_is_gone_are_collected_and_cool_down() {
    let mut world = World::new(2, 5, 1, bare());
    world.add(0, AttachMode::Veth, false);
    world.settle();
    let (address, attachment) = (world.address_of(0).unwrap(), World::attachment(0, 0));
    world.pods.clear();
    world.demand.gone.insert(attachment);
    world.settle_for(Duration::from_secs(1));
    assert!(matches!(world.state.addresses[&address].state, AddressState::Cooling { .. }));
}

#[test]
fn forbidden_creates_are_not_repeated_in_a_storm_and_work_again_when_allowed() {
    let mut world = World::new(8, 10, 1, bare());
    world.cloud.0.lock().refuse_create = Some(CloudErrorKind::Forbidden);
    world.add(0, AttachMode::Veth, false);
    world.settle_for(Duration::from_secs(60));
    assert!(world.refusal(0).is_some());
    assert!(world.cloud.calls()["create"] <= 8, "{:?}", world.cloud.calls());
    world.cloud.0.lock().refuse_create = None;
    world.add(0, AttachMode::Veth, false);
    world.settle_for(Duration::from_secs(90));
    assert!(world.address_of(0).is_some());
}

#[test]
fn a_lost_ledger_is_rebuilt_from_cloud_kernel_and_cluster_without_giving_used_addresses_away() {
    let mut world = World::new(4, 10, 1, config());
    for n in 0..12 {
        world.add(n, AttachMode::Veth, false);
    }
    world.add(12, AttachMode::Exclusive, false);
    world.settle();
    let enis = world.cloud.secondary().len();
    world.lose_ledger();
    world.restart(true);
    assert_eq!(world.state.leases().count(), 13, "every pod's address is taken");
    for n in 20..25 {
        world.add(n, AttachMode::Veth, false);
    }
    world.settle_for(Duration::from_secs(40));
    world.check_truth();
    assert_eq!(world.cloud.secondary().len(), enis, "ENIs are adopted, not leaked");
    world.check_accounts();
}

#[test]
fn an_eni_taken_away_behind_our_back_is_attached_again_or_replaced() {
    let mut world = World::new(4, 10, 1, config());
    world.add(0, AttachMode::Veth, false);
    world.settle();
    let eni = world.cloud.secondary()[0].id.clone();
    world.cloud.0.lock().detach(&eni).unwrap();
    world.look();
    world.settle();
    assert_eq!(world.cloud.secondary()[0].status, EniStatus::InUse);

    world.cloud.0.lock().detach(&eni).unwrap();
    world.cloud.0.lock().delete(&eni).unwrap();
    world.look();
    world.look();
    world.add(1, AttachMode::Veth, false);
    world.settle();
    assert!(world.address_of(1).is_some(), "served by another ENI");
    assert!(world.state.lease_of(&World::attachment(0, 0)).is_some(), "until its pod goes");
    world.del(0);
    world.settle_for(Duration::from_secs(120));
    world.check_accounts();
}

#[derive(Clone, Debug)]
enum Op {
    Add(u32, bool, bool),
    Del(u32),
    Bind(u32),
    Unbind(u32),
    Pass(u16),
    /// Let this many calls happen, then the process dies and starts again.
    Crash(u8),
    Chaos(u32, u32),
    /// This vSwitch has room for so many more.
    Shrink(bool, u8),
    Turn(u8),
    LoseLedger,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0..40u32, prop::bool::weighted(0.1), prop::bool::weighted(0.2)).prop_map(|(n, x, r)| Op::Add(n, x, r)),
        6 => (0..40u32).prop_map(Op::Del),
        2 => (0..40u32).prop_map(Op::Bind),
        1 => (0..40u32).prop_map(Op::Unbind),
        3 => (0..900u16).prop_map(Op::Pass),
        2 => (0..6u8).prop_map(Op::Crash),
        1 => (0..40u32, 0..30u32).prop_map(|(f, l)| Op::Chaos(f, l)),
        1 => (any::<bool>(), 0..30u8).prop_map(|(v, n)| Op::Shrink(v, n)),
        4 => (0..6u8).prop_map(Op::Turn),
        1 => Just(Op::LoseLedger),
    ]
}

fn run(ops: Vec<Op>, seed: u64, enis: u32, per_eni: u32, dual: bool, min_idle: u32) {
    let ip_stack = if dual { IpStack::Dual } else { IpStack::Ipv4 };
    let config = Config { ip_stack, min_idle, max_idle: min_idle + 4, idle_exclusive: min_idle % 2, ..config() };
    let mut world = World::new(enis, per_eni, seed, config);
    for op in ops {
        match op {
            Op::Add(n, exclusive, reserve) => {
                let mode = if exclusive { AttachMode::Exclusive } else { AttachMode::Veth };
                world.add(n, mode, reserve);
            }
            Op::Del(n) => world.del(n),
            Op::Bind(n) => world.bind(n, AttachMode::Veth),
            Op::Unbind(n) => world.unbind(n),
            Op::Pass(seconds) => world.settle_for(Duration::from_secs(u64::from(seconds))),
            Op::Crash(calls) => {
                world.turn(usize::from(calls));
                world.restart(false);
            }
            Op::Chaos(fail, lose_reply) => {
                world.cloud.0.lock().chaos = cloud::Chaos { fail, lose_reply, down: false };
            }
            Op::Shrink(which, left) => {
                let name = if which { "vsw-a" } else { "vsw-b" };
                let mut cloud = world.cloud.0.lock();
                let free = &mut cloud.vswitches.get_mut(&name.into()).unwrap().free;
                *free = free.iter().copied().take(usize::from(left)).collect();
            }
            Op::Turn(calls) => world.turn(usize::from(calls)),
            Op::LoseLedger => {
                world.lose_ledger();
                world.restart(true);
            }
        }
        world.check_truth();
    }

    // Quiet returns: from wherever this is, it comes to rest, in few calls.
    world.cloud.0.lock().chaos = cloud::Chaos::default();
    world.settle_for(Duration::from_secs(7200));
    world.check_truth();
    world.check_accounts();
    let calls = world.cloud.mutating_calls();
    world.settle_for(Duration::from_secs(7200));
    let more = world.cloud.mutating_calls() - calls;
    // A vSwitch that stays exhausted is tried again after each cool-off.
    let exhausted = world.cloud.0.lock().vswitches.values().any(|v| v.free.len() < 40);
    assert!(more <= if exhausted { 2 * 2 * 13 } else { 0 }, "{more} calls while nothing happens");
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_addresses_are_held_once_none_is_lost_and_it_comes_to_rest(
        ops in prop::collection::vec(op(), 1..60),
        seed in any::<u64>(),
        (enis, per_eni) in prop_oneof![Just((2, 4)), Just((4, 6)), Just((8, 30))],
        dual in any::<bool>(),
        min_idle in 0..6u32,
    ) {
        run(ops, seed, enis, per_eni, dual, min_idle);
    }
}

#[test]
fn an_unknown_pod_list_expects_nothing() {
    let mut world = World::new(4, 10, 1, bare());
    world.demand.bound = None;
    world.settle();
    assert_eq!(world.cloud.mutating_calls(), 0);
    let pod = BoundPod {
        pod: PodKey::new("ns", "done"),
        uid: "u".to_owned(),
        mode: AttachMode::Veth,
        terminated: true,
        addresses: Vec::new(),
    };
    world.demand.bound = Some(std::sync::Arc::new(vec![pod]));
    world.settle();
    assert_eq!(world.cloud.mutating_calls(), 0, "a pod that has ended needs nothing");
}

#[test]
fn a_lost_ledger_does_not_pair_addresses_otherwise_than_pods_use_them() {
    for seed in 0..6 {
        let mut world = World::new(4, 15, seed, Config { ip_stack: IpStack::Dual, ..bare() });
        for n in 0..20 {
            world.add(n, AttachMode::Veth, false);
        }
        world.settle();
        assert_eq!(world.served(), 20);
        // Every second leaves, so that the cloud's lists have gaps.
        for n in (0..20).step_by(2) {
            world.del(n);
        }
        world.settle_for(Duration::from_secs(60));
        world.lose_ledger();
        world.restart(true);
        world.check_truth();
        // Those who come get nothing that is used, in either family.
        for n in 30..55 {
            world.add(n, AttachMode::Veth, false);
        }
        world.settle_for(Duration::from_secs(300));
        world.check_truth();
        for n in (1..20).step_by(2) {
            world.del(n);
        }
        world.settle_for(Duration::from_secs(300));
        world.check_truth();
        world.check_accounts();
    }
}
