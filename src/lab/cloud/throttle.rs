//! Throttle: the account's request rates, one token bucket per API and one over
//! all of them. Owner: the API server. Invariants: pure; shared by every caller
//! of the account, as in the real cloud.

use std::collections::BTreeMap;

use super::config::ThrottleConfig;
use super::error::ApiError;
use super::state::Millis;

const MINUTE_MS: f64 = 60_000.0;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Millis,
}

impl Bucket {
    fn refill(&mut self, per_minute: u32, now: Millis) {
        let burst = f64::from(per_minute);
        let grown = burst * now.saturating_sub(self.at) as f64 / MINUTE_MS;
        *self = Self { tokens: (self.tokens + grown).min(burst), at: now.max(self.at) };
    }
}

/// The buckets, filled at first use.
#[derive(Debug)]
pub struct Throttle {
    config: ThrottleConfig,
    buckets: BTreeMap<String, Bucket>,
}

impl Throttle {
    pub fn new(config: ThrottleConfig) -> Self {
        Self { config, buckets: BTreeMap::new() }
    }

    /// `api` is one of the APIs the cloud has: the number of buckets is bounded.
    pub fn admit(&mut self, api: &str, now: Millis) -> Result<(), ApiError> {
        let limit = self.config.per_api.get(api).copied().unwrap_or(self.config.default_per_minute);
        let account = self.config.account_per_minute;
        for (name, per_minute, code) in [(api, limit, "Throttling.User"), ("", account, "Throttling")] {
            if let Some(wait) = self.wait(name, per_minute, now) {
                return Err(ApiError { retry_after_ms: Some(wait), ..throttled(code) });
            }
        }
        for name in [api, ""] {
            if let Some(bucket) = self.buckets.get_mut(name) {
                bucket.tokens -= 1.0;
            }
        }
        Ok(())
    }

    /// How long until the bucket has a token again; `None` when it has one.
    fn wait(&mut self, name: &str, per_minute: u32, now: Millis) -> Option<u64> {
        if per_minute == 0 {
            return None;
        }
        let full = Bucket { tokens: f64::from(per_minute), at: now };
        let bucket = self.buckets.entry(name.to_owned()).or_insert(full);
        bucket.refill(per_minute, now);
        let missing = 1.0 - bucket.tokens;
        (missing > 0.0).then(|| (missing * MINUTE_MS / f64::from(per_minute)).ceil() as u64)
    }
}

/// The refusal, by code.
pub fn throttled(code: &str) -> ApiError {
    let by = match code {
        "Throttling.User" => "user flow control",
        "Throttling.Api" => "api flow control",
        _ => "request throttling",
    };
    ApiError::new(400, code, format!("Request was denied due to {by}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(per_api: u32, account: u32) -> Throttle {
        let per_api = [("A".to_owned(), per_api)].into();
        Throttle::new(ThrottleConfig { default_per_minute: 0, per_api, account_per_minute: account })
    }

    #[test]
    fn a_burst_of_one_minutes_worth_passes_and_the_rest_at_the_rate() {
        let mut throttle = throttle(60, 0);
        let passed = (0..100).filter(|_| throttle.admit("A", 0).is_ok()).count();
        assert_eq!(passed, 60);
        let refused = throttle.admit("A", 0).unwrap_err();
        assert_eq!((refused.code.as_str(), refused.retry_after_ms), ("Throttling.User", Some(1000)));
        let passed = (0..100).filter(|_| throttle.admit("A", 10_000).is_ok()).count();
        assert_eq!(passed, 10);
        throttle.admit("B", 0).unwrap();
    }

    #[test]
    fn the_account_is_limited_over_all_apis() {
        let mut throttle = throttle(60, 5);
        let passed = (0..10).filter(|n| throttle.admit(if n % 2 == 0 { "A" } else { "B" }, 0).is_ok()).count();
        assert_eq!(passed, 5);
        assert_eq!(throttle.admit("B", 0).unwrap_err().code, "Throttling");
    }
}
