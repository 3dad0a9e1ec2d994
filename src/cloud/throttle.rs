//! Who may call the cloud when. Pure: time and randomness are arguments.
//!
//! Three things hold a call back: its API's configured rate (governor), the
//! adaptive rate that follows the cloud's throttling, and the slots for calls
//! in flight. Invariants, each with a property test:
//! - Each API's rate and slots are split: a share that only waiting pods may
//!   use and a rest that everybody may. Refill and release never touch the
//!   pods' share, so they never delay a pod; pods take from the rest first.
//! - Within one API a waiting pod goes before a refill, a refill before a
//!   release. A release that waited for [`AGED`] ranks as a refill, and one
//!   slot is closed to refills, so releases get through in the end.
//! - A throttled answer halves its API's rate, once for all calls that were
//!   already in flight; the rate grows back linearly over [`RECOVERY`].
//! - A throttling of the whole account stops everything for a while that
//!   doubles each time, with jitter, so that nodes do not come back together.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::rc::Rc;
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};

use super::Lane;
use super::config::Limit;
use super::provider::Api;

/// From almost nothing back to the full rate.
pub const RECOVERY: Duration = Duration::from_secs(120);
/// The adaptive rate never falls below this part of the configured one.
pub const FLOOR: f64 = 1.0 / 64.0;
/// A release that waited this long is as urgent as a refill.
pub const AGED: Duration = Duration::from_secs(30);
const FIRST_HOLD: Duration = Duration::from_secs(1);
const LONGEST_HOLD: Duration = Duration::from_secs(16);
/// The next account-wide throttling after this much quiet counts as the first.
const HOLD_FORGOTTEN: Duration = Duration::from_secs(60);
/// The pods' share of each rate and burst.
const POD_SHARE: f64 = 2.0 / 3.0;

/// One call's place in the queue, then in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// How the cloud took a call, as far as rates are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Throttled { account_wide: bool },
    NotThrottled,
}

/// What [`Throttle::grant`] decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    pub granted: Vec<Ticket>,
    /// When to ask again even if nothing else happens; always in the future.
    pub wake: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Call {
    api: Api,
    lane: Lane,
    /// Of entering, then of being granted.
    since: Duration,
}

pub struct Throttle {
    clock: HandClock,
    slots: u32,
    apis: Vec<ApiState>,
    waiting: BTreeMap<Ticket, Call>,
    running: BTreeMap<Ticket, Call>,
    next: u64,
    hold: Option<Hold>,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    began: Duration,
    until: Duration,
    streak: u32,
}

impl Throttle {
    pub fn new(limit: impl Fn(Api) -> Limit, slots: u32) -> Self {
        let clock = HandClock::default();
        let apis = Api::ALL.iter().map(|api| ApiState::new(limit(*api), &clock)).collect();
        Self { clock, slots, apis, waiting: BTreeMap::new(), running: BTreeMap::new(), next: 0, hold: None }
    }

    /// Take a place in the queue.
    pub fn enter(&mut self, now: Duration, api: Api, lane: Lane) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.waiting.insert(ticket, Call { api, lane, since: now });
        ticket
    }

    /// Give the place or the slot back.
    pub fn leave(&mut self, ticket: Ticket) {
        self.waiting.remove(&ticket);
        self.running.remove(&ticket);
    }

    pub fn is_granted(&self, ticket: Ticket) -> bool {
        self.running.contains_key(&ticket)
    }

    /// Learn from an answer. `random` is uniform in 0..1.
    pub fn learn(&mut self, now: Duration, ticket: Ticket, verdict: Verdict, random: f64) {
        let (Some(call), Verdict::Throttled { account_wide }) = (self.running.get(&ticket).copied(), verdict) else {
            return;
        };
        self.apis[call.api.index()].cut(now, call.since);
        // Calls that were in flight when the hold began say nothing new.
        if account_wide && self.hold.is_none_or(|h| call.since >= h.began) {
            let streak = match self.hold {
                Some(h) if now.saturating_sub(h.until) < HOLD_FORGOTTEN => h.streak + 1,
                _ => 0,
            };
            let full = FIRST_HOLD.saturating_mul(2u32.saturating_pow(streak.min(16))).min(LONGEST_HOLD);
            let until = now + full.mul_f64(0.75 + 0.5 * random.clamp(0.0, 1.0));
            self.hold = Some(Hold { began: now, until, streak });
        }
    }

    /// Let as many waiting calls go as may, the most urgent first.
    pub fn grant(&mut self, now: Duration) -> Grants {
        self.clock.0.set(now);
        let mut grants = Grants::default();
        if self.waiting.is_empty() {
            return grants;
        }
        if let Some(until) = self.held(now) {
            grants.wake = Some(until);
            return grants;
        }
        let mut queue: Vec<(Lane, Ticket, Call)> =
            self.waiting.iter().map(|(ticket, call)| (rank(call, now), *ticket, *call)).collect();
        queue.sort_by_key(|(rank, ticket, _)| (*rank, *ticket));
        let mut dry = [false; Api::ALL.len()];
        for (_, ticket, call) in queue {
            let i = call.api.index();
            if dry[i] || !self.slot_free(call.lane) {
                continue;
            }
            match self.apis[i].take(call.lane, now) {
                Ok(()) => {
                    self.waiting.remove(&ticket);
                    self.running.insert(ticket, Call { since: now, ..call });
                    grants.granted.push(ticket);
                }
                Err(at) => {
                    dry[i] = true;
                    // Rounding inside the limiter must not make us spin.
                    let at = at.max(now + Duration::from_millis(1));
                    grants.wake = Some(grants.wake.map_or(at, |wake| wake.min(at)));
                }
            }
        }
        grants
    }

    /// The end of an account-wide back-off that is on.
    pub fn held(&self, now: Duration) -> Option<Duration> {
        self.hold.map(|h| h.until).filter(|until| now < *until)
    }

    /// How much of its configured rate an API has, 0..=1.
    pub fn factor(&self, now: Duration, api: Api) -> f64 {
        self.apis[api.index()].factor(now)
    }

    /// The last time an API's rate was cut.
    pub fn cut(&self, api: Api) -> Option<Cut> {
        self.apis[api.index()].cut
    }

    /// Roughly how long a call would wait for its rate if it came now.
    pub fn estimate(&self, now: Duration, api: Api) -> Duration {
        let state = &self.apis[api.index()];
        let queue = 1 + self.waiting.values().filter(|call| call.api == api).count();
        let pace = Duration::from_secs_f64(queue as f64 / (state.per_second * state.factor(now)));
        pace.max(self.held(now).map_or(Duration::ZERO, |until| until - now))
    }

    pub fn waiting(&self, lane: Lane) -> usize {
        self.waiting.values().filter(|call| call.lane == lane).count()
    }

    pub fn in_flight(&self) -> usize {
        self.running.len()
    }

    fn slot_free(&self, lane: Lane) -> bool {
        let running = |lane| self.running.values().filter(|call| call.lane == lane).count() as u32;
        let (pods, refills, releases) = (running(Lane::PodWaiting), running(Lane::Refill), running(Lane::Release));
        let quarter = (self.slots / 4).max(1);
        let common = self.slots.saturating_sub(quarter);
        let total_free = pods + refills + releases < self.slots;
        total_free
            && match lane {
                Lane::PodWaiting => true,
                Lane::Refill => refills + releases < common && refills + 1 < common,
                Lane::Release => refills + releases < common && releases < quarter,
            }
    }
}

fn rank(call: &Call, now: Duration) -> Lane {
    match call.lane {
        Lane::Release if now.saturating_sub(call.since) >= AGED => Lane::Refill,
        lane => lane,
    }
}

/// One API's configured rate, split, and its adaptive rate.
struct ApiState {
    per_second: f64,
    pods: Share,
    rest: Share,
    cut: Option<Cut>,
}

/// A halving of a rate: when, and what was left of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    at: Duration,
    left: f64,
}

impl Cut {
    /// The part of the configured rate in force at a later time.
    pub fn factor(self, now: Duration) -> f64 {
        let grown = now.saturating_sub(self.at).as_secs_f64() / RECOVERY.as_secs_f64();
        (self.left + grown).min(1.0)
    }
}

impl ApiState {
    fn new(limit: Limit, clock: &HandClock) -> Self {
        let per_second = f64::from(limit.per_minute.max(1)) / 60.0;
        let pods = ((f64::from(limit.burst) * POD_SHARE).ceil() as u32).max(1);
        let rest = limit.burst.saturating_sub(pods).max(1);
        Self {
            per_second,
            pods: Share::new(per_second * POD_SHARE, pods, clock),
            rest: Share::new(per_second * (1.0 - POD_SHARE), rest, clock),
            cut: None,
        }
    }

    fn factor(&self, now: Duration) -> f64 {
        self.cut.map_or(1.0, |cut| cut.factor(now))
    }

    fn cut(&mut self, now: Duration, granted: Duration) {
        if self.cut.is_some_and(|cut| granted < cut.at) {
            return;
        }
        let factor = (self.factor(now) / 2.0).max(FLOOR);
        self.cut = Some(Cut { at: now, left: factor });
        for share in [&mut self.pods, &mut self.rest] {
            share.pace_from(now, factor);
        }
    }

    fn take(&mut self, lane: Lane, now: Duration) -> Result<(), Duration> {
        let factor = self.factor(now);
        let rest = self.rest.take(now, factor);
        match (lane, rest) {
            (Lane::PodWaiting, Err(at)) => self.pods.take(now, factor).map_err(|own| own.min(at)),
            (_, rest) => rest,
        }
    }
}

/// A part of an API's rate. At the full rate governor alone decides; below it
/// calls are also paced evenly, without bursts.
struct Share {
    per_second: f64,
    limiter: RateLimiter<NotKeyed, InMemoryState, HandClock, NoOpMiddleware<Duration>>,
    next: Duration,
}

impl Share {
    fn new(per_second: f64, burst: u32, clock: &HandClock) -> Self {
        let period = Duration::from_secs_f64(1.0 / per_second);
        let burst = NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::with_period(period).unwrap_or_else(|| Quota::per_second(burst)).allow_burst(burst);
        Self { per_second, limiter: RateLimiter::direct_with_clock(quota, clock.clone()), next: Duration::ZERO }
    }

    fn pace_from(&mut self, now: Duration, factor: f64) {
        self.next = now + Duration::from_secs_f64(1.0 / (self.per_second * factor));
    }

    fn take(&mut self, now: Duration, factor: f64) -> Result<(), Duration> {
        if factor < 1.0 && now < self.next {
            return Err(self.next);
        }
        self.limiter.check().map_err(|not_until| not_until.earliest_possible())?;
        if factor < 1.0 {
            self.pace_from(now, factor);
        }
        Ok(())
    }
}

/// A clock that stands where it was put.
#[derive(Clone, Default)]
struct HandClock(Rc<Cell<Duration>>);

impl Clock for HandClock {
    type Instant = Duration;
    fn now(&self) -> Duration {
        self.0.get()
    }
}

#[cfg(test)]
mod tests;
