//! The actor over a scripted provider, in paused time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::actor::{ActorState, AskError, ChildPolicy, Deadline, Handle, Message, Placement, Registry, Tree};
use crate::cloud::provider::{Attempt, CallLimits, Failure, Page, Provider};
use crate::cloud::*;

/// What the provider answers next, and after how long.
enum Reply {
    Done,
    Eni(Eni),
    V4(Vec<Ipv4Addr>),
    V6(Vec<Ipv6Addr>),
    Enis(Vec<Eni>, Option<&'static str>),
    Fails(Failure),
    Never,
}

#[derive(Default)]
struct Script {
    answers: Mutex<VecDeque<(Duration, Reply)>>,
    calls: Mutex<Vec<(Duration, String)>>,
    began: Mutex<Option<Instant>>,
}

#[derive(Clone, Default)]
struct Scripted(Arc<Script>);

impl Scripted {
    fn then(&self, reply: Reply) -> &Self {
        self.after(Duration::from_millis(10), reply)
    }
    fn after(&self, took: Duration, reply: Reply) -> &Self {
        self.0.answers.lock().push_back((took, reply));
        self
    }
    fn calls(&self) -> Vec<String> {
        self.0.calls.lock().iter().map(|(_, call)| call.clone()).collect()
    }
    async fn next(&self, call: String) -> Result<Reply, Failure> {
        let began = *self.0.began.lock().get_or_insert_with(Instant::now);
        self.0.calls.lock().push((began.elapsed(), call.clone()));
        let next = self.0.answers.lock().pop_front();
        let (took, reply) = next.unwrap_or_else(|| panic!("nothing is scripted for {call}"));
        tokio::time::sleep(took).await;
        match reply {
            Reply::Fails(failure) => Err(failure),
            Reply::Never => std::future::pending().await,
            reply => Ok(reply),
        }
    }
    fn attempt<'a, T: 'a>(&'a self, call: String, want: fn(Reply) -> Option<T>) -> Attempt<'a, T> {
        Box::pin(async move { Ok(want(self.next(call).await?).expect("the script answers another call")) })
    }
}

fn done(reply: Reply) -> Option<()> {
    matches!(reply, Reply::Done).then_some(())
}

impl Provider for Scripted {
    fn limits(&self) -> CallLimits {
        CallLimits { create_ipv4: 50, create_ipv6: 10, ipv6: 10, describe_ids: 100 }
    }
    fn create_eni<'a>(&'a self, m: &'a CreateEni) -> Attempt<'a, Eni> {
        self.attempt(format!("create {} {} {}", m.ipv4, m.ipv6, m.token), |r| match r {
            Reply::Eni(eni) => Some(eni),
            _ => None,
        })
    }
    fn attach_eni<'a>(&'a self, eni: &'a EniId, _: &'a InstanceId) -> Attempt<'a, ()> {
        self.attempt(format!("attach {eni}"), done)
    }
    fn detach_eni<'a>(&'a self, eni: &'a EniId, _: &'a InstanceId) -> Attempt<'a, ()> {
        self.attempt(format!("detach {eni}"), done)
    }
    fn delete_eni<'a>(&'a self, eni: &'a EniId) -> Attempt<'a, ()> {
        self.attempt(format!("delete {eni}"), done)
    }
    fn assign_ipv4<'a>(&'a self, eni: &'a EniId, count: u32, token: &'a ClientToken) -> Attempt<'a, Vec<Ipv4Addr>> {
        self.attempt(format!("assign4 {eni} {count} {token}"), |r| match r {
            Reply::V4(list) => Some(list),
            _ => None,
        })
    }
    fn unassign_ipv4<'a>(&'a self, eni: &'a EniId, addresses: &'a [Ipv4Addr]) -> Attempt<'a, ()> {
        self.attempt(format!("unassign4 {eni} {addresses:?}"), done)
    }
    fn assign_ipv6<'a>(&'a self, eni: &'a EniId, count: u32, token: &'a ClientToken) -> Attempt<'a, Vec<Ipv6Addr>> {
        self.attempt(format!("assign6 {eni} {count} {token}"), |r| match r {
            Reply::V6(list) => Some(list),
            _ => None,
        })
    }
    fn unassign_ipv6<'a>(&'a self, eni: &'a EniId, addresses: &'a [Ipv6Addr]) -> Attempt<'a, ()> {
        self.attempt(format!("unassign6 {eni} {}", addresses.len()), done)
    }
    fn describe_enis<'a>(
        &'a self,
        _: &'a DescribeEnis,
        ids: &'a [EniId],
        page: Option<&'a str>,
    ) -> Attempt<'a, Page<Eni>> {
        self.attempt(format!("describe {} {page:?}", ids.len()), |r| match r {
            Reply::Enis(items, next) => Some(Page { items, next: next.map(str::to_owned) }),
            _ => None,
        })
    }
    fn describe_instance_type<'a>(&'a self, name: &'a str) -> Attempt<'a, InstanceLimits> {
        self.attempt(format!("type {name}"), |_| None)
    }
    fn describe_vswitches<'a>(&'a self, id: Option<&'a VSwitchId>, _: Option<&'a str>) -> Attempt<'a, Page<VSwitch>> {
        self.attempt(format!("vswitch {id:?}"), |_| None)
    }
    fn who_am_i(&self) -> Attempt<'_, Identity> {
        self.attempt("who am I".to_owned(), |_| None)
    }
    fn metadata_enis(&self) -> Attempt<'_, Vec<MetadataEni>> {
        self.attempt("metadata".to_owned(), |_| None)
    }
}

fn fails(kind: CloudErrorKind) -> Reply {
    Reply::Fails(CloudError::new(kind, "Scripted", "as scripted", "none").into())
}

fn throttled() -> Reply {
    fails(CloudErrorKind::Throttled { retry_after: Duration::ZERO })
}

fn eni(id: &str, status: EniStatus, instance: Option<&str>) -> Eni {
    Eni {
        id: id.into(),
        mac: Mac([0, 22, 62, 0, 0, 1]),
        status,
        kind: EniKind::Secondary,
        instance: instance.map(Into::into),
        vswitch: "vsw-1".into(),
        vpc: "vpc-1".to_owned(),
        zone: "z".to_owned(),
        security_groups: vec![],
        primary4: v4(1),
        ipv4: vec![v4(1), v4(2), v4(3)],
        ipv6: vec![],
        tags: BTreeMap::new(),
        queues: None,
        delete_on_release: true,
        description: String::new(),
        created: String::new(),
    }
}

fn v4(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, n)
}

struct World {
    cloud: Handle<CloudApi>,
    script: Scripted,
    stats: CloudStats,
    _tree: Tree,
}

impl World {
    async fn ask<M: Message>(&self, message: M, seconds: u64) -> Result<M::Reply, AskError<M::Error>>
    where
        CloudApi: Handles<M>,
    {
        self.cloud.ask(message, Deadline::after(Duration::from_secs(seconds))).await
    }
}

/// Runs a test against a fresh actor; time stands still but for sleeping.
fn world<F: Future<Output = ()>>(config: Config, test: impl FnOnce(World) -> F) {
    crate::actor::run(async {
        tokio::time::pause();
        let registry = Registry::default();
        let mut tree = Tree::new(registry.clone(), Placement::Here, ChildPolicy::default());
        let (script, stats) = (Scripted::default(), CloudStats::default());
        let (provider, counters) = (script.clone(), stats.clone());
        let cloud = tree.child(move || {
            let actor = CloudApi::over(Box::new(provider.clone()), &config, counters.clone());
            async move { Ok(actor) }
        });
        while registry.snapshot()[0].state != ActorState::Running {
            tokio::task::yield_now().await;
        }
        test(World { cloud, script, stats, _tree: tree }).await;
    });
}

fn create(token: &str) -> CreateEni {
    CreateEni {
        vswitch: "vsw-1".into(),
        security_groups: vec![],
        ipv4: 10,
        ipv6: 0,
        tags: BTreeMap::new(),
        description: String::new(),
        token: token.into(),
        lane: Lane::PodWaiting,
    }
}

fn attach(lane: Lane) -> AttachEni {
    AttachEni { eni: "eni-1".into(), instance: "i-1".into(), lane }
}

fn detach() -> DetachEni {
    DetachEni { eni: "eni-1".into(), instance: "i-1".into(), lane: Lane::Release }
}

fn kind<T: std::fmt::Debug>(result: Result<T, AskError<CloudError>>) -> CloudErrorKind {
    result.unwrap_err().domain().expect("an error of the cloud's").kind
}

#[test]
fn a_lost_reply_is_asked_for_again_with_the_same_token() {
    world(Config::default(), |w| async move {
        w.script.then(fails(CloudErrorKind::Transport)).then(Reply::Eni(eni("eni-1", EniStatus::Available, None)));
        let got = w.ask(create("t-1"), 30).await.unwrap();
        assert_eq!(got.id.as_str(), "eni-1");
        assert_eq!(w.script.calls(), ["create 10 0 t-1", "create 10 0 t-1"]);
        let stats = w.stats.snapshot();
        let calls = &stats.apis[&provider::Api::CreateNetworkInterface].calls;
        assert_eq!((calls["ok"], calls["transport"], stats.in_flight), (1, 1, 0));
    });
}

#[test]
fn an_interrupted_assignment_is_repeated_with_its_token() {
    world(Config::default(), |w| async move {
        w.script.then(fails(CloudErrorKind::Conflict)).then(Reply::V4(vec![v4(7)]));
        let assign = AssignIpv4 { eni: "eni-1".into(), count: 1, token: "t".into(), lane: Lane::PodWaiting };
        assert_eq!(w.ask(assign, 30).await.unwrap(), [v4(7)]);
        assert_eq!(w.script.calls(), ["assign4 eni-1 1 t", "assign4 eni-1 1 t"]);
    });
}

#[test]
fn what_the_cloud_refuses_for_good_is_asked_once() {
    world(Config::default(), |w| async move {
        for refused in [CloudErrorKind::Forbidden, CloudErrorKind::VSwitchExhausted, CloudErrorKind::TokenMismatch] {
            w.script.then(fails(refused.clone()));
            assert_eq!(kind(w.ask(create("t"), 30).await), refused);
        }
        assert_eq!(w.script.calls().len(), 3);
    });
}

#[test]
fn more_addresses_than_one_call_may_ask_for_are_not_asked_for() {
    world(Config::default(), |w| async move {
        w.script.then(Reply::Eni(eni("eni-1", EniStatus::Available, None)));
        w.ask(CreateEni { ipv4: 64, ipv6: 64, ..create("t") }, 30).await.unwrap();
        assert_eq!(w.script.calls(), ["create 50 10 t"]);
        assert_eq!(kind(w.ask(CreateEni { ipv4: 0, ..create("t") }, 30).await), CloudErrorKind::Rejected);
    });
}

#[test]
fn throttling_is_waited_out_within_the_deadline_and_halves_the_rate() {
    world(Config::default(), |w| async move {
        w.script.then(throttled()).then(throttled()).then(Reply::Done);
        w.ask(attach(Lane::PodWaiting), 60).await.unwrap();
        let api = w.stats.snapshot().apis.remove(&provider::Api::AttachNetworkInterface).unwrap();
        assert_eq!(api.throttled, 2);
        assert!((30.0..60.0).contains(&api.rate_per_minute), "a quarter of 120, growing: {}", api.rate_per_minute);
        tokio::time::sleep(throttle::RECOVERY).await;
        assert_eq!(w.stats.snapshot().apis[&provider::Api::AttachNetworkInterface].rate_per_minute, 120.0);
    });
}

#[test]
fn throttling_that_outlasts_the_deadline_says_when_to_come_back() {
    world(Config::default(), |w| async move {
        for _ in 0..10 {
            w.script.then(throttled());
        }
        let error = w.ask(attach(Lane::PodWaiting), 5).await.unwrap_err().domain().unwrap();
        let CloudErrorKind::Throttled { retry_after } = error.kind else { panic!("{error}") };
        assert!(retry_after > Duration::ZERO && error.remedy.contains("worth trying again in"), "{error}");
        assert!(!error.effect_unknown());
    });
}

#[test]
fn a_silent_cloud_is_a_deadline_error_with_unknown_effect_in_time_for_the_caller() {
    world(Config::default(), |w| async move {
        w.script.then(Reply::Never);
        let error = w.ask(create("t"), 5).await.unwrap_err().domain().expect("before the caller's own timeout");
        assert_eq!(error.kind, CloudErrorKind::Deadline);
        assert!(error.effect_unknown());
    });
}

#[test]
fn a_slow_attempt_is_given_up_and_repeated_while_the_deadline_allows() {
    world(Config::default(), |w| async move {
        w.script.then(Reply::Never).then(Reply::Done);
        w.ask(attach(Lane::Refill), 60).await.unwrap();
        assert_eq!(w.script.calls().len(), 2);
    });
}

#[test]
fn a_refusal_after_a_lost_attempt_does_not_hide_that_its_effect_is_unknown() {
    world(Config::default(), |w| async move {
        w.script.then(fails(CloudErrorKind::Transport));
        for _ in 0..10 {
            w.script.then(throttled());
        }
        let error = w.ask(create("t"), 5).await.unwrap_err().domain().unwrap();
        assert!(error.effect_unknown(), "{error}");
        assert!(error.message.contains("as scripted"));
    });
}

#[test]
fn a_call_whose_turn_does_not_come_is_not_sent_and_has_no_effect() {
    let limits = [(provider::Api::AttachNetworkInterface, config::Limit { per_minute: 1, burst: 3 })].into();
    world(Config { limits, ..Config::default() }, |w| async move {
        w.script.then(Reply::Done);
        w.ask(attach(Lane::Release), 5).await.unwrap();
        let error = w.ask(attach(Lane::Release), 5).await.unwrap_err().domain().unwrap();
        assert!(
            matches!(error.kind, CloudErrorKind::Throttled { .. }) && error.message.starts_with("not sent"),
            "{error}"
        );
        assert_eq!(w.script.calls().len(), 1);
        assert_eq!(w.stats.snapshot().apis[&provider::Api::AttachNetworkInterface].unsent, 1);
        w.script.then(Reply::Done).then(Reply::Done);
        w.ask(attach(Lane::PodWaiting), 5).await.expect("pods have a share of their own");
        w.ask(attach(Lane::PodWaiting), 5).await.expect("of two");
    });
}

#[test]
fn a_pod_goes_first_even_when_releases_fill_the_mailbox() {
    world(Config { max_in_flight: 4, ..Config::default() }, |w| async move {
        let slow = Duration::from_secs(3);
        for _ in 0..3 {
            w.script.after(slow, Reply::Done);
        }
        let detaches = futures::future::join_all((0..8).map(|_| w.ask(detach(), 8)));
        let pod = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let began = Instant::now();
            w.ask(attach(Lane::PodWaiting), 20).await.unwrap();
            began.elapsed()
        };
        // The script is a queue: the pod's answer is the second one taken.
        let (_, took) = futures::join!(detaches, pod);
        assert!(took <= slow + Duration::from_millis(20), "waited for nobody: {took:?}");
        assert_eq!(w.script.calls()[1], "attach eni-1");
    });
}

#[test]
fn a_caller_that_gave_up_costs_no_call() {
    let limits = [(provider::Api::AttachNetworkInterface, config::Limit { per_minute: 6, burst: 2 })].into();
    world(Config { limits, ..Config::default() }, |w| async move {
        w.script.then(Reply::Done);
        w.ask(attach(Lane::Refill), 5).await.unwrap();
        let waits = w.ask(attach(Lane::Refill), 600);
        assert!(tokio::time::timeout(Duration::from_secs(1), waits).await.is_err(), "its turn is half a minute away");
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert_eq!(w.script.calls().len(), 1);
    });
}

#[test]
fn attaching_what_is_attached_here_succeeds_and_elsewhere_does_not() {
    world(Config::default(), |w| async move {
        for (status, instance, ok) in [
            (EniStatus::InUse, Some("i-1"), true),
            (EniStatus::Attaching, Some("i-1"), true),
            (EniStatus::InUse, Some("i-2"), false),
            (EniStatus::Detaching, Some("i-1"), false),
            (EniStatus::Available, None, false),
        ] {
            w.script.then(fails(CloudErrorKind::InvalidState));
            w.script.then(Reply::Enis(vec![eni("eni-1", status, instance)], None));
            let result = w.ask(attach(Lane::PodWaiting), 30).await;
            assert_eq!(result.is_ok(), ok, "{status:?} {instance:?}");
        }
    });
}

#[test]
fn detaching_deleting_and_unassigning_what_is_gone_succeed() {
    world(Config::default(), |w| async move {
        w.script.then(fails(CloudErrorKind::NotFound)).then(fails(CloudErrorKind::NotFound));
        w.ask(detach(), 30).await.unwrap();
        w.ask(DeleteEni { eni: "eni-1".into(), lane: Lane::Release }, 30).await.unwrap();

        w.script.then(fails(CloudErrorKind::InvalidState));
        w.script.then(Reply::Enis(vec![eni("eni-1", EniStatus::Available, None)], None));
        w.ask(detach(), 30).await.unwrap();
        w.script.then(fails(CloudErrorKind::InvalidState));
        w.script.then(Reply::Enis(vec![eni("eni-1", EniStatus::Attaching, Some("i-1"))], None));
        assert_eq!(kind(w.ask(detach(), 30).await), CloudErrorKind::InvalidState);

        let unassign = UnassignIpv4 { eni: "eni-1".into(), addresses: vec![v4(2), v4(9)], lane: Lane::Release };
        w.script.then(fails(CloudErrorKind::NotFound)).then(Reply::Enis(vec![], None));
        w.ask(unassign, 30).await.unwrap();
    });
}

#[test]
fn one_address_that_is_gone_does_not_keep_the_others_assigned() {
    world(Config::default(), |w| async move {
        w.script.then(fails(CloudErrorKind::NotFound));
        w.script.then(Reply::Enis(vec![eni("eni-1", EniStatus::InUse, Some("i-1"))], None)).then(Reply::Done);
        let addresses = vec![v4(2), v4(9), v4(3)];
        w.ask(UnassignIpv4 { eni: "eni-1".into(), addresses, lane: Lane::Release }, 30).await.unwrap();
        assert_eq!(w.script.calls()[2], "unassign4 eni-1 [10.0.0.2, 10.0.0.3]");
    });
}

#[test]
fn ipv6_goes_in_tens_with_a_token_each_and_what_was_assigned_is_not_lost() {
    world(Config::default(), |w| async move {
        let ten = || Reply::V6((0..10).map(|n| Ipv6Addr::from(u128::from(n as u8))).collect());
        let assign = || AssignIpv6 { eni: "eni-1".into(), count: 25, token: "t".into(), lane: Lane::Refill };
        w.script.then(ten()).then(ten()).then(ten());
        assert_eq!(w.ask(assign(), 30).await.unwrap().len(), 30);
        let parts = ["assign6 eni-1 10 t", "assign6 eni-1 10 t-1", "assign6 eni-1 5 t-2"];
        assert_eq!(w.script.calls(), parts);

        w.script.then(ten()).then(fails(CloudErrorKind::InstanceIpLimit));
        assert_eq!(w.ask(assign(), 30).await.unwrap().len(), 10);
        w.script.then(fails(CloudErrorKind::InstanceIpLimit));
        assert_eq!(kind(w.ask(assign(), 30).await), CloudErrorKind::InstanceIpLimit);

        w.script.then(Reply::Done).then(Reply::Done);
        let addresses = (0..15).map(|n| Ipv6Addr::from(n as u128)).collect();
        w.ask(UnassignIpv6 { eni: "eni-1".into(), addresses, lane: Lane::Release }, 30).await.unwrap();
        assert_eq!(w.script.calls()[6..], ["unassign6 eni-1 10", "unassign6 eni-1 5"]);
    });
}

#[test]
fn a_part_token_is_short_and_differs_for_each_part() {
    let long = ClientToken("x".repeat(64));
    let tokens: std::collections::BTreeSet<_> = (0..20).map(|part| super::part_token(&long, part)).collect();
    assert!(tokens.len() == 20 && tokens.iter().all(|t| t.as_str().len() <= 64));
}

#[test]
fn nothing_asked_for_is_no_call() {
    world(Config::default(), |w| async move {
        let (eni, lane, token) = (EniId::from("eni-1"), Lane::Refill, ClientToken::from("t"));
        let none = w.ask(AssignIpv4 { eni: eni.clone(), count: 0, token: token.clone(), lane }, 5).await.unwrap();
        assert!(none.is_empty());
        w.ask(AssignIpv6 { eni: eni.clone(), count: 0, token, lane }, 5).await.unwrap();
        w.ask(UnassignIpv4 { eni, addresses: vec![], lane }, 5).await.unwrap();
        assert!(w.script.calls().is_empty());
    });
}

fn describe(ids: Vec<EniId>) -> DescribeEnis {
    DescribeEnis { ids, instance: None, tags: BTreeMap::new(), status: None, lane: Lane::PodWaiting }
}

#[test]
fn a_listing_is_read_to_its_end_and_each_eni_appears_once() {
    world(Config::default(), |w| async move {
        let one = |id: &str| eni(id, EniStatus::InUse, Some("i-1"));
        w.script.then(Reply::Enis(vec![one("eni-1"), one("eni-2")], Some("p2")));
        w.script.then(Reply::Enis(vec![one("eni-2"), one("eni-3")], None));
        let all = w.ask(describe(vec![]), 30).await.unwrap();
        assert_eq!(all.iter().map(|e| e.id.as_str()).collect::<Vec<_>>(), ["eni-1", "eni-2", "eni-3"]);
        assert_eq!(w.script.calls(), ["describe 0 None", "describe 0 Some(\"p2\")"]);
    });
}

#[test]
fn a_listing_that_does_not_end_is_an_error_and_not_a_loop() {
    world(Config::default(), |w| async move {
        for _ in 0..3 {
            w.script.then(Reply::Enis(vec![], Some("same")));
        }
        assert_eq!(kind(w.ask(describe(vec![]), 3_600).await), CloudErrorKind::Transport);
        assert_eq!(w.script.calls().len(), 2);
        for i in 0..super::MOST_PAGES {
            w.script.then(Reply::Enis(vec![], Some(if i % 2 == 0 { "a" } else { "b" })));
        }
        assert_eq!(kind(w.ask(describe(vec![]), 36_000).await), CloudErrorKind::Transport);
    });
}

#[test]
fn many_ids_are_asked_for_in_parts_and_strangers_are_left_out() {
    world(Config::default(), |w| async move {
        let ids: Vec<EniId> = (0..250).map(|n| EniId(format!("eni-{n}"))).collect();
        for id in ["eni-7", "eni-107", "eni-stranger"] {
            w.script.then(Reply::Enis(vec![eni(id, EniStatus::InUse, None)], None));
        }
        let all = w.ask(describe(ids), 30).await.unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(w.script.calls(), ["describe 100 None", "describe 100 None", "describe 50 None"]);
    });
}
