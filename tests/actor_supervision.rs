//! The actor layer keeps its promises: a panic costs one message, the state is
//! rebuilt by the factory, depth is exact, deadlines hold, escalation ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use fairway::actor::{
    Actor, ActorState, AskError, ChildPolicy, Ctx, Deadline, Handle, Handles, Message, Placement, Registry, Responder,
    StartError, Tree,
};

const SOON: Duration = Duration::from_secs(5);

/// Counts up; breaks on request.
struct Counter {
    count: u32,
    kept: Vec<Responder<Park>>,
}

struct Add(u32);
impl Message for Add {
    const NAME: &'static str = "Add";
    type Reply = u32;
    type Error = String;
}

struct Break(&'static str);
impl Message for Break {
    const NAME: &'static str = "Break";
    type Reply = ();
    type Error = String;
}

/// Never answered until `Unpark`.
struct Park;
impl Message for Park {
    const NAME: &'static str = "Park";
    type Reply = ();
    type Error = String;
}

struct Unpark;
impl Message for Unpark {
    const NAME: &'static str = "Unpark";
    type Reply = usize;
    type Error = String;
}

impl Actor for Counter {
    const NAME: &'static str = "Counter";
    const CAPACITY: usize = 4;
}

impl Handles<Add> for Counter {
    fn handle(&mut self, Add(n): Add, to: Responder<Add>, _: &mut Ctx<'_, Self>) {
        self.count += n;
        to.ok(self.count);
    }
}

impl Handles<Break> for Counter {
    fn handle(&mut self, Break(how): Break, to: Responder<Break>, ctx: &mut Ctx<'_, Self>) {
        match how {
            "panic" => panic!("asked to"),
            "panic-later" => ctx.spawn(async {}, move |_, (), _| {
                let _kept = to;
                panic!("asked to, later");
            }),
            "fail" => ctx.fail("asked to fail"),
            "wedge" => std::thread::sleep(Duration::from_millis(900)),
            _ => to.fail("unknown".to_owned()),
        }
    }
}

impl Handles<Park> for Counter {
    fn handle(&mut self, _: Park, to: Responder<Park>, _: &mut Ctx<'_, Self>) {
        self.kept.push(to);
    }
}

impl Handles<Unpark> for Counter {
    fn handle(&mut self, _: Unpark, to: Responder<Unpark>, _: &mut Ctx<'_, Self>) {
        let kept = std::mem::take(&mut self.kept);
        let n = kept.len();
        kept.into_iter().for_each(|parked| parked.ok(()));
        to.ok(n);
    }
}

fn policy() -> ChildPolicy {
    ChildPolicy { max_failures: 4, ..ChildPolicy::default() }
}

/// A tree on the test's own executor, with paused time, and one counter whose
/// factory starts it at the number of times it was built.
fn with_counter<F: Future<Output = ()>>(test: impl FnOnce(Tree, Handle<Counter>, Arc<AtomicU32>) -> F) {
    fairway::actor::run(async {
        tokio::time::pause();
        let mut tree = Tree::new(Registry::default(), Placement::Here, policy());
        let built = Arc::new(AtomicU32::new(0));
        let handle = tree.child({
            let built = built.clone();
            move || {
                let count = 100 * built.fetch_add(1, Ordering::SeqCst);
                async move { Ok(Counter { count, kept: Vec::new() }) }
            }
        });
        up(&handle).await;
        test(tree, handle, built).await;
    });
}

/// Wait until the actor answers; paused time makes back-off instant.
async fn up(handle: &Handle<Counter>) {
    while let Err(AskError::Unavailable { .. }) = handle.ask(Add(0), Deadline::after(SOON)).await {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn a_panic_costs_the_message_and_the_state_is_rebuilt() {
    for how in ["panic", "panic-later", "fail"] {
        with_counter(|tree, handle, built| async move {
            assert_eq!(handle.ask(Add(5), Deadline::after(SOON)).await, Ok(5));
            let broken = handle.ask(Break(how), Deadline::after(SOON)).await;
            assert_eq!(broken, Err(AskError::Unavailable { actor: "Counter" }), "{how}");
            up(&handle).await;
            assert_eq!(built.load(Ordering::SeqCst), 2, "{how}");
            assert_eq!(handle.ask(Add(1), Deadline::after(SOON)).await, Ok(101), "{how}: state from the factory");
            let seen = &tree.registry().snapshot()[0];
            assert_eq!((seen.restarts, seen.depth), (1, 0));
            assert!(seen.restart_reasons[0].reason.contains("asked to"), "{:?}", seen.restart_reasons);
        });
    }
}

#[test]
fn a_full_mailbox_refuses_and_depth_is_exact() {
    with_counter(|tree, handle, _| async move {
        let parked: Vec<_> = (0..4)
            .map(|_| {
                let handle = handle.clone();
                tokio::task::spawn_local(async move { handle.ask(Park, Deadline::after(SOON)).await })
            })
            .collect();
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(tree.registry().snapshot()[0].depth, 4);
        assert_eq!(handle.ask(Add(1), Deadline::after(SOON)).await, Err(AskError::Busy { actor: "Counter" }));
        assert_eq!(tree.registry().snapshot()[0].by_type["Add"].busy, 1);
        // The deadline frees the callers, not the permits: the work goes on.
        for p in parked {
            let timed_out = AskError::Timeout { actor: "Counter", message: "Park" };
            assert_eq!(p.await.unwrap(), Err(timed_out));
        }
        assert_eq!(tree.registry().snapshot()[0].depth, 4);
    });
}

#[test]
fn an_answer_may_come_later_than_the_handler() {
    with_counter(|tree, handle, _| async move {
        let _running = tree;
        let parked = tokio::task::spawn_local({
            let handle = handle.clone();
            async move { handle.ask(Park, Deadline::after(SOON)).await }
        });
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(handle.ask(Unpark, Deadline::after(SOON)).await, Ok(1));
        assert_eq!(parked.await.unwrap(), Ok(()));
    });
}

#[test]
fn a_message_that_waited_past_its_deadline_is_not_handled() {
    with_counter(|tree, handle, _| async move {
        let past = Deadline::after(Duration::ZERO);
        assert!(matches!(handle.ask(Add(7), past).await, Err(AskError::Timeout { .. })));
        assert_eq!(handle.ask(Add(0), Deadline::after(SOON)).await, Ok(0), "the late Add had no effect");
        assert_eq!(tree.registry().snapshot()[0].by_type["Add"].expired, 1);
    });
}

#[test]
fn failing_again_and_again_escalates_with_the_reason() {
    with_counter(|mut tree, handle, built| async move {
        for _ in 0..4 {
            up(&handle).await;
            let _ = handle.ask(Break("panic"), Deadline::after(SOON)).await;
        }
        let escalation = tree.escalation().await;
        assert_eq!(escalation.actor, "Counter");
        assert!(escalation.reason.contains("asked to"), "{}", escalation.reason);
        assert_eq!(built.load(Ordering::SeqCst), 4);
        assert_eq!(tree.registry().snapshot()[0].state, ActorState::Escalated);
    });
}

#[test]
fn a_factory_that_fails_or_panics_is_tried_again_with_growing_delay() {
    fairway::actor::run(async {
        tokio::time::pause();
        let mut tree = Tree::new(Registry::default(), Placement::Here, policy());
        let tries = Arc::new(AtomicU32::new(0));
        let began = tokio::time::Instant::now();
        let handle = tree.child({
            let tries = tries.clone();
            move || {
                let n = tries.fetch_add(1, Ordering::SeqCst);
                async move {
                    match n {
                        0 => Err(StartError::new("no ledger yet")),
                        1 => panic!("broken factory"),
                        _ => Ok(Counter { count: n, kept: Vec::new() }),
                    }
                }
            }
        });
        up(&handle).await;
        let waited = began.elapsed();
        // 100 ms and 200 ms, each less up to a fifth.
        assert!(waited >= Duration::from_millis(240) && waited <= Duration::from_millis(320), "{waited:?}");
        let reasons = &tree.registry().snapshot()[0].restart_reasons;
        assert!(reasons[0].reason.contains("no ledger yet") && reasons[1].reason.contains("broken factory"));
    });
}

#[test]
fn one_actors_panic_leaves_the_others_alone() {
    fairway::actor::run(async {
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, policy());
        let a: Handle<Counter> = tree.child(|| async { Ok(Counter { count: 0, kept: Vec::new() }) });
        let b: Handle<Counter> = tree.child(|| async { Ok(Counter { count: 0, kept: Vec::new() }) });
        up(&a).await;
        up(&b).await;
        assert_eq!(b.ask(Add(3), Deadline::after(SOON)).await, Ok(3));
        let _ = a.ask(Break("panic"), Deadline::after(SOON)).await;
        assert_eq!(b.ask(Add(3), Deadline::after(SOON)).await, Ok(6), "b kept its state");
        up(&a).await;
        let late = tree.shutdown(Duration::from_secs(5)).await;
        assert!(late.is_empty(), "{late:?}");
    });
}

#[test]
fn actors_that_share_a_thread_share_nothing_else() {
    fairway::actor::run(async {
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, policy());
        let thread = tree.together("both");
        let new = || async { Ok(Counter { count: 0, kept: Vec::new() }) };
        let a: Handle<Counter> = tree.child_in(&thread, new);
        let b: Handle<Counter> = tree.child_in(&thread, new);
        up(&a).await;
        up(&b).await;
        assert_eq!(b.ask(Add(3), Deadline::after(SOON)).await, Ok(3));
        for how in ["panic", "fail", "panic-later"] {
            let _ = a.ask(Break(how), Deadline::after(SOON)).await;
        }
        assert_eq!(b.ask(Add(3), Deadline::after(SOON)).await, Ok(6), "b kept its state");
        up(&a).await;
        let late = tree.shutdown(Duration::from_secs(5)).await;
        assert!(late.is_empty(), "{late:?}");
    });
}

#[test]
fn a_wedged_actor_shows_what_it_is_in_and_is_not_waited_for() {
    fairway::actor::run(async {
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, policy());
        let registry = tree.registry().clone();
        let handle: Handle<Counter> = tree.child(|| async { Ok(Counter { count: 0, kept: Vec::new() }) });
        up(&handle).await;
        let asked = tokio::task::spawn_local({
            let handle = handle.clone();
            async move { handle.ask(Break("wedge"), Deadline::after(Duration::from_millis(300))).await }
        });
        assert!(matches!(asked.await.unwrap(), Err(AskError::Timeout { .. })));
        let seen = &registry.snapshot()[0];
        assert_eq!(seen.in_work.len(), 1, "{seen:?}");
        assert_eq!(seen.in_work[0].message, "Break");
        assert!(seen.in_work[0].running_ms.unwrap() >= 250, "{seen:?}");
        let unwell = registry.unwell(Duration::from_millis(200));
        assert!(unwell.first().is_some_and(|u| u.starts_with("Counter: silent")), "{unwell:?}");
        let late = tree.shutdown(Duration::from_millis(200)).await;
        assert_eq!(late, ["Counter"]);
    });
}
