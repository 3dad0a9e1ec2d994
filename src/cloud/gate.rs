//! The throttle with a real clock: calls wait here until they may go.
//!
//! Each waiting call drives the throttle itself: it wakes when its turn may
//! have come or when another call came, went or was granted. Whatever way a
//! call ends, dropping its [`Pass`] gives the place back.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rand::Rng as _;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Lane;
use super::config::Config;
use super::provider::Api;
use super::stats::{CloudStats, Rates};
use super::throttle::{Throttle, Ticket, Verdict};

pub(super) struct Gate {
    throttle: RefCell<Throttle>,
    began: Instant,
    changed: Notify,
    limits: Vec<u32>,
    stats: CloudStats,
}

/// The right to make one call; learns from its answer.
pub(super) struct Pass {
    gate: Rc<Gate>,
    ticket: Ticket,
}

impl Gate {
    pub(super) fn new(config: &Config, stats: CloudStats) -> Self {
        let throttle = Throttle::new(|api| config.limit(api), config.max_in_flight);
        let limits = Api::ALL.iter().map(|api| config.limit(*api).per_minute).collect();
        let gate =
            Self { throttle: RefCell::new(throttle), began: Instant::now(), changed: Notify::new(), limits, stats };
        gate.publish();
        gate
    }

    /// Wait for this call's turn. `None` when it did not come before the
    /// deadline.
    pub(super) async fn pass(self: &Rc<Self>, api: Api, lane: Lane, deadline: Instant) -> Option<Pass> {
        let ticket = self.throttle.borrow_mut().enter(self.now(), api, lane);
        let pass = Pass { gate: self.clone(), ticket };
        loop {
            if Instant::now() >= deadline {
                return None;
            }
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let grants = self.throttle.borrow_mut().grant(self.now());
            self.publish();
            if grants.granted.iter().any(|granted| *granted != ticket) {
                self.changed.notify_waiters();
            }
            if self.throttle.borrow().is_granted(ticket) {
                return Some(pass);
            }
            let wake = grants.wake.map_or(deadline, |wake| (self.began + wake).min(deadline));
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Roughly how long a new call of this API would wait.
    pub(super) fn estimate(&self, api: Api) -> Duration {
        self.throttle.borrow().estimate(self.now(), api)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn publish(&self) {
        let throttle = self.throttle.borrow();
        let rates = Rates {
            began: self.began,
            held_until: throttle.held(self.now()).unwrap_or_default(),
            apis: Api::ALL.iter().map(|api| (self.limits[api.index()], throttle.cut(*api))).collect(),
        };
        self.stats.queue(|lane| throttle.waiting(lane), throttle.in_flight(), rates);
    }
}

impl Pass {
    /// The call was answered.
    pub(super) fn learn(&self, verdict: Verdict) {
        let random = rand::rng().random::<f64>();
        self.gate.throttle.borrow_mut().learn(self.gate.now(), self.ticket, verdict, random);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.throttle.borrow_mut().leave(self.ticket);
        self.gate.publish();
        self.gate.changed.notify_waiters();
    }
}
