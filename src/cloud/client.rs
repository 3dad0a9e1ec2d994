//! One call made well: its turn awaited, tried, counted, tried again.
//!
//! The only place that joins throttle, retry and statistics. Invariants: no
//! attempt starts without a pass, after the deadline or when nobody waits for
//! the answer any more; a failure that leaves the effect of a mutating call
//! unknown stays visible as such, whatever a later attempt is refused for.

use std::rc::Rc;
use std::time::Duration;

use rand::Rng as _;
use tokio::time::Instant;

use super::config::Config;
use super::gate::Gate;
use super::provider::{Api, Failure, Provider};
use super::retry::{Decision, decide};
use super::stats::{CloudStats, label, lane_label};
use super::throttle::Verdict;
use super::{CloudError, CloudErrorKind, Lane};

/// The answer must reach the caller before the caller's own deadline.
const WAY_BACK: Duration = Duration::from_millis(100);

/// Who asks: how urgent, until when, and whether still there.
#[derive(Clone, Copy)]
pub(super) struct Caller<'a> {
    lane: Lane,
    deadline: Instant,
    gone: &'a dyn Fn() -> bool,
}

impl<'a> Caller<'a> {
    pub(super) fn new(lane: Lane, deadline: Instant, gone: &'a dyn Fn() -> bool) -> Self {
        let budget = deadline.saturating_duration_since(Instant::now());
        let deadline = deadline.checked_sub(WAY_BACK.min(budget / 10)).unwrap_or(deadline);
        Self { lane, deadline, gone }
    }

    fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// Why a call did not succeed, and whether some attempt may have had an effect.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub(super) error: CloudError,
    /// An attempt before the last may have had its effect.
    pub(super) uncertain: bool,
}

impl Failed {
    /// The error for the caller. After an attempt whose effect is unknown, a
    /// refusal that says nothing about that attempt must not hide it.
    pub(super) fn visible(self) -> CloudError {
        let mut error = self.error;
        let silent = matches!(error.kind, CloudErrorKind::Throttled { .. } | CloudErrorKind::Conflict);
        if self.uncertain && silent {
            error.message = format!("an attempt got no answer, then: {}", error.message);
            error.kind = CloudErrorKind::Transport;
        }
        error
    }
}

pub(super) struct Client {
    pub(super) provider: Box<dyn Provider>,
    gate: Rc<Gate>,
    stats: CloudStats,
    call_timeout: Duration,
}

impl Client {
    pub(super) fn new(provider: Box<dyn Provider>, config: &Config, stats: CloudStats) -> Self {
        let gate = Rc::new(Gate::new(config, stats.clone()));
        Self { provider, gate, stats, call_timeout: Duration::from_millis(config.call_timeout_ms) }
    }

    /// Make one call, as often as it takes and may be.
    pub(super) async fn call<T>(
        &self,
        who: &Caller<'_>,
        api: Api,
        attempt: impl AsyncFn() -> Result<T, Failure>,
    ) -> Result<T, Failed> {
        let mut attempts = 0u32;
        let mut uncertain = false;
        let mut last: Option<CloudError> = None;
        loop {
            let pass = self.gate.pass(api, who.lane, who.deadline).await;
            let Some(pass) = pass.filter(|_| !(who.gone)()) else {
                self.stats.unsent(api);
                let error = last.unwrap_or_else(|| self.no_turn(api, who));
                return Err(Failed { error, uncertain });
            };
            if attempts > 0 && last.as_ref().is_some_and(CloudError::effect_unknown) {
                uncertain |= api.mutates();
            }
            attempts += 1;

            let began = Instant::now();
            let outcome = tokio::time::timeout(self.call_timeout.min(who.remaining()), attempt()).await;
            let took = began.elapsed();
            let failure = match outcome {
                Ok(Ok(value)) => {
                    self.stats.attempt(api, None, took);
                    tracing::debug!(api = api.name(), lane = lane_label(who.lane), attempts, ?took, "Cloud call done");
                    return Ok(value);
                }
                Ok(Err(failure)) => failure,
                Err(_) => no_answer(api, took, who.remaining() < Duration::from_millis(1)).into(),
            };
            self.stats.attempt(api, Some(&failure.error.kind), took);
            let throttled = matches!(failure.error.kind, CloudErrorKind::Throttled { .. });
            pass.learn(match throttled {
                true => Verdict::Throttled { account_wide: failure.account_wide },
                false => Verdict::NotThrottled,
            });
            drop(pass);

            let mut error = failure.error;
            if let CloudErrorKind::Throttled { retry_after } = &mut error.kind {
                *retry_after = self.gate.estimate(api).max(*retry_after);
                error.remedy = format!("{}; worth trying again in {:.1} s", error.remedy, retry_after.as_secs_f64());
            }
            // The turn is awaited at the gate; only the back-off is slept here.
            let waited_at_gate = match &error.kind {
                CloudErrorKind::Throttled { .. } => CloudErrorKind::Throttled { retry_after: Duration::ZERO },
                other => other.clone(),
            };
            let decision = decide(&waited_at_gate, attempts, who.remaining(), rand::rng().random());
            tracing::debug!(
                api = api.name(),
                lane = lane_label(who.lane),
                attempts,
                ?took,
                outcome = label(&error.kind),
                code = error.code.as_deref(),
                request_id = error.request_id.as_deref(),
                ?decision,
                "Cloud call failed"
            );
            match decision {
                Decision::GiveUp => return Err(Failed { error, uncertain }),
                Decision::RetryAfter(delay) => {
                    last = Some(error);
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    fn no_turn(&self, api: Api, who: &Caller<'_>) -> CloudError {
        let retry_after = self.gate.estimate(api);
        CloudError::new(
            CloudErrorKind::Throttled { retry_after },
            api.name(),
            format!("not sent: its turn ({} lane) did not come before the deadline", lane_label(who.lane)),
            format!(
                "this node limits its calls; worth trying again in {:.1} s, or raise cloud.limits.{}",
                retry_after.as_secs_f64(),
                api.name()
            ),
        )
    }
}

fn no_answer(api: Api, took: Duration, deadline: bool) -> CloudError {
    let kind = if deadline { CloudErrorKind::Deadline } else { CloudErrorKind::Transport };
    let message = format!("no answer within {:.1} s", took.as_secs_f64());
    CloudError::new(kind, api.name(), message, "check the network path from this node to the cloud's endpoint")
}
