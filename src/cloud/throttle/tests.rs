//! Random schedules of calls against the limiter: nobody starves, no window
//! holds too many, and lanes keep their order.

use super::*;
use proptest::prelude::*;

const API: Api = Api::AssignPrivateIpAddresses;
const LIMIT: Limit = Limit { per_minute: 60, burst: 9 };

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// One call of a random schedule.
#[derive(Clone, Debug)]
struct Planned {
    at: Duration,
    lane: Lane,
    /// How long it stays in flight once granted.
    takes: Duration,
    throttled: bool,
}

fn planned(lanes: impl Strategy<Value = Lane>, throttled: bool) -> impl Strategy<Value = Planned> {
    (0u64..60_000, lanes, 0u64..4_000, prop::bool::weighted(0.3)).prop_map(move |(at, lane, takes, hit)| Planned {
        at: ms(at),
        lane,
        takes: ms(takes),
        throttled: throttled && hit,
    })
}

fn any_lane() -> impl Strategy<Value = Lane> {
    prop_oneof![Just(Lane::PodWaiting), Just(Lane::Refill), Just(Lane::Release)]
}

fn low_lane() -> impl Strategy<Value = Lane> {
    prop_oneof![Just(Lane::Refill), Just(Lane::Release)]
}

/// What happened to each planned call, in grant order: (index, granted at).
/// The clock jumps from event to event, as it would in the gate.
fn simulate(throttle: &mut Throttle, plan: &[Planned]) -> Vec<(usize, Duration)> {
    let mut arrivals: Vec<(Duration, usize)> = plan.iter().enumerate().map(|(i, p)| (p.at, i)).collect();
    arrivals.sort();
    let mut arrivals = std::collections::VecDeque::from(arrivals);
    let mut of: BTreeMap<Ticket, usize> = BTreeMap::new();
    let mut ends: BTreeMap<(Duration, usize), Ticket> = BTreeMap::new();
    let mut granted = Vec::new();
    let mut wake: Option<Duration> = None;
    loop {
        let next = [arrivals.front().map(|(at, _)| *at), ends.keys().next().map(|(at, _)| *at), wake];
        let Some(now) = next.into_iter().flatten().min() else {
            return granted;
        };
        while arrivals.front().is_some_and(|(at, _)| *at <= now) {
            let (_, i) = arrivals.pop_front().unwrap();
            of.insert(throttle.enter(now, API, plan[i].lane), i);
        }
        while ends.keys().next().is_some_and(|(at, _)| *at <= now) {
            let ((_, i), ticket) = ends.pop_first().unwrap();
            let verdict = match plan[i].throttled {
                true => Verdict::Throttled { account_wide: i % 5 == 0 },
                false => Verdict::NotThrottled,
            };
            throttle.learn(now, ticket, verdict, 0.5);
            throttle.leave(ticket);
        }
        let grants = throttle.grant(now);
        assert!(grants.wake.is_none_or(|wake| wake > now), "a wake-up in the past spins");
        wake = grants.wake;
        for ticket in grants.granted {
            let i = of[&ticket];
            granted.push((i, now));
            ends.insert((now + plan[i].takes, i), ticket);
        }
    }
}

fn fresh() -> Throttle {
    Throttle::new(|_| LIMIT, 16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_call_gets_its_turn(plan in prop::collection::vec(planned(any_lane(), true), 1..60)) {
        let granted = simulate(&mut fresh(), &plan);
        prop_assert_eq!(granted.len(), plan.len());
    }

    #[test]
    fn no_window_holds_more_than_rate_and_burst_allow(plan in prop::collection::vec(planned(any_lane(), true), 1..80)) {
        let granted = simulate(&mut fresh(), &plan);
        for (i, (_, from)) in granted.iter().enumerate() {
            for (n, (_, to)) in granted[i..].iter().enumerate() {
                let allowed = f64::from(LIMIT.burst) + (*to - *from).as_secs_f64() * f64::from(LIMIT.per_minute) / 60.0;
                prop_assert!((n + 1) as f64 <= allowed + 1e-6, "{} calls in {:?}", n + 1, *to - *from);
            }
        }
    }

    #[test]
    fn a_waiting_pod_goes_before_refills_and_refills_before_releases(
        plan in prop::collection::vec(planned(any_lane(), false), 1..60),
    ) {
        let granted = simulate(&mut fresh(), &plan);
        let at: BTreeMap<usize, Duration> = granted.iter().copied().collect();
        for (i, when) in &granted {
            for (j, other) in plan.iter().enumerate() {
                let more_urgent = other.lane < plan[*i].lane;
                let waited = other.at <= *when && at[&j] > *when;
                let aged = plan[*i].lane == Lane::Release && *when >= plan[*i].at + AGED && other.lane == Lane::Refill;
                // A refill may wait for a slot that releases may use.
                let slots = plan[*i].lane == Lane::Release && other.lane == Lane::Refill;
                prop_assert!(!(more_urgent && waited) || aged || slots, "{i} went at {when:?} before {j}");
            }
        }
    }

    /// The pods' own share is what they would have with nobody else about.
    #[test]
    fn refill_and_release_never_delay_a_pod(
        pods in prop::collection::vec(planned(Just(Lane::PodWaiting), false), 1..30),
        others in prop::collection::vec(planned(low_lane(), false), 0..60),
    ) {
        let own_share = Limit {
            per_minute: (f64::from(LIMIT.per_minute) * POD_SHARE) as u32,
            burst: (f64::from(LIMIT.burst) * POD_SHARE) as u32,
        };
        // Pods end at once: only rates and the others' slots could delay them.
        let pods: Vec<Planned> = pods.into_iter().map(|p| Planned { takes: Duration::ZERO, ..p }).collect();
        let mut both = pods.clone();
        both.extend(others);
        let mut with_others: Vec<(Duration, Duration)> = simulate(&mut fresh(), &both)
            .into_iter().filter(|(i, _)| *i < pods.len()).map(|(i, at)| (pods[i].at, at)).collect();
        with_others.sort();

        let clock = HandClock::default();
        let mut own = Share::new(f64::from(own_share.per_minute) / 60.0, own_share.burst, &clock);
        let mut arrivals: Vec<Duration> = pods.iter().map(|p| p.at).collect();
        arrivals.sort();
        let mut free_at = Duration::ZERO;
        for (arrived, at) in with_others {
            let mut alone = arrived.max(free_at);
            clock.0.set(alone);
            while let Err(later) = own.take(alone, 1.0) {
                alone = later.max(alone + ms(1));
                clock.0.set(alone);
            }
            free_at = alone;
            prop_assert!(at <= alone + ms(1), "arrived {arrived:?}, went {at:?}, alone {alone:?}");
        }
    }

    #[test]
    fn throttling_halves_the_rate_and_time_restores_it(before in 0u64..100_000, hits in 1u32..12) {
        let mut throttle = fresh();
        let mut now = ms(before);
        let mut expected = 1.0;
        for _ in 0..hits {
            let ticket = throttle.enter(now, API, Lane::PodWaiting);
            loop {
                let grants = throttle.grant(now);
                if throttle.is_granted(ticket) { break }
                let wake = grants.wake.unwrap();
                expected = (expected + (wake - now).as_secs_f64() / RECOVERY.as_secs_f64()).min(1.0);
                now = wake;
            }
            throttle.learn(now, ticket, Verdict::Throttled { account_wide: false }, 0.5);
            throttle.leave(ticket);
            expected = f64::max(expected / 2.0, FLOOR);
            prop_assert!((throttle.factor(now, API) - expected).abs() < 1e-9);
            prop_assert_eq!(throttle.factor(now, Api::DeleteNetworkInterface), 1.0, "other APIs keep their rate");
        }
        let half_way = throttle.factor(now + RECOVERY / 4, API);
        prop_assert!(half_way >= expected && half_way <= 1.0);
        prop_assert_eq!(throttle.factor(now + RECOVERY, API), 1.0);
    }
}

fn granted(throttle: &mut Throttle, now: Duration, lane: Lane) -> Ticket {
    let ticket = throttle.enter(now, API, lane);
    throttle.grant(now);
    assert!(throttle.is_granted(ticket));
    ticket
}

#[test]
fn calls_already_in_flight_cut_the_rate_once() {
    let mut throttle = fresh();
    let flight: Vec<Ticket> = (0..5).map(|_| granted(&mut throttle, ms(0), Lane::PodWaiting)).collect();
    for (i, ticket) in flight.into_iter().enumerate() {
        throttle.learn(ms(100 + i as u64), ticket, Verdict::Throttled { account_wide: true }, 0.5);
        throttle.leave(ticket);
    }
    assert!((throttle.factor(ms(104), API) - 0.5).abs() < 1e-4);
    assert_eq!(throttle.held(ms(104)), Some(ms(1_100)), "one hold of a second, from the first answer on");
}

#[test]
fn an_account_wide_throttling_stops_every_api_and_doubles_when_it_repeats() {
    let mut throttle = fresh();
    let mut now = ms(0);
    let mut holds = Vec::new();
    for _ in 0..7 {
        let ticket = throttle.enter(now, API, Lane::PodWaiting);
        while !throttle.is_granted(ticket) {
            now = throttle.grant(now).wake.unwrap_or(now);
        }
        throttle.learn(now, ticket, Verdict::Throttled { account_wide: true }, 0.5);
        throttle.leave(ticket);
        let until = throttle.held(now).unwrap();
        let other = throttle.enter(now, Api::DeleteNetworkInterface, Lane::PodWaiting);
        let grants = throttle.grant(now);
        assert!(!throttle.is_granted(other) && grants.wake == Some(until));
        throttle.leave(other);
        holds.push((until - now).as_secs());
        now = until;
    }
    assert_eq!(holds, [1, 2, 4, 8, 16, 16, 16]);
}

#[test]
fn low_lanes_leave_slots_to_pods_and_releases_keep_one() {
    let mut throttle = Throttle::new(|_| Limit { per_minute: 6_000, burst: 300 }, 16);
    for _ in 0..30 {
        throttle.enter(ms(0), API, Lane::Refill);
        throttle.enter(ms(0), API, Lane::Release);
    }
    throttle.grant(ms(0));
    let running = |throttle: &Throttle, lane| throttle.running.values().filter(|c| c.lane == lane).count();
    assert_eq!((running(&throttle, Lane::Refill), running(&throttle, Lane::Release)), (11, 1));
    for _ in 0..4 {
        granted(&mut throttle, ms(0), Lane::PodWaiting);
    }
    assert_eq!(throttle.in_flight(), 16);
    let mut releases = Throttle::new(|_| Limit { per_minute: 6_000, burst: 300 }, 16);
    for _ in 0..30 {
        releases.enter(ms(0), API, Lane::Release);
    }
    releases.grant(ms(0));
    assert_eq!(running(&releases, Lane::Release), 4);
}

#[test]
fn an_old_release_is_no_longer_passed_by_new_refills() {
    let mut throttle = Throttle::new(|_| Limit { per_minute: 30, burst: 2 }, 16);
    let first = granted(&mut throttle, ms(0), Lane::Refill);
    throttle.leave(first);
    let release = throttle.enter(ms(1), API, Lane::Release);
    let mut now = ms(1);
    let (mut passed, mut passed_old) = (0, 0);
    while !throttle.is_granted(release) {
        throttle.enter(now, API, Lane::Refill);
        throttle.enter(now, API, Lane::Refill);
        let grants = throttle.grant(now);
        for refill in grants.granted.into_iter().filter(|t| *t != release) {
            throttle.leave(refill);
            passed += 1;
            passed_old += u32::from(now >= ms(1) + AGED && refill > release);
        }
        now = grants.wake.unwrap_or(now + ms(500));
        assert!(now < Duration::from_secs(120));
    }
    assert!(passed >= 4, "young, it lets refills pass: {passed}");
    assert_eq!(passed_old, 0);
}

#[test]
fn a_place_given_back_is_free_again() {
    let mut throttle = fresh();
    let kept: Vec<Ticket> = (0..3).map(|_| throttle.enter(ms(0), API, Lane::Refill)).collect();
    assert_eq!(throttle.waiting(Lane::Refill), 3);
    throttle.leave(kept[0]);
    assert_eq!(throttle.grant(ms(0)).granted, kept[1..]);
    throttle.leave(kept[1]);
    throttle.leave(kept[2]);
    assert_eq!((throttle.waiting(Lane::Refill), throttle.in_flight()), (0, 0));
}
