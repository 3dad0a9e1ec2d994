//! Whether, and when, a failed attempt is repeated. Pure.
//!
//! Every call can be repeated without harm: creations and assignments carry a
//! client token, the others are idempotent by nature. So the failure alone
//! decides, and the deadline: nothing is retried that cannot end in time.

use std::time::Duration;

use super::CloudErrorKind;

/// More attempts than this only add load while the cloud is in trouble.
const MOST_ATTEMPTS: u32 = 12;
/// An attempt needs at least this long to have a chance.
const SHORTEST_ATTEMPT: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    RetryAfter(Duration),
    GiveUp,
}

/// `attempts` counts those already made, `remaining` is the time to the
/// deadline, `random` is uniform in 0..1.
pub fn decide(kind: &CloudErrorKind, attempts: u32, remaining: Duration, random: f64) -> Decision {
    let (first, most, floor) = match kind {
        CloudErrorKind::Transport => (Duration::from_millis(200), Duration::from_secs(5), Duration::ZERO),
        CloudErrorKind::Conflict => (Duration::from_millis(500), Duration::from_secs(5), Duration::ZERO),
        // The adaptive rate does the waiting; this spreads what comes back.
        CloudErrorKind::Throttled { retry_after } => (Duration::from_millis(500), Duration::from_secs(5), *retry_after),
        CloudErrorKind::VSwitchExhausted
        | CloudErrorKind::InstanceEniLimit
        | CloudErrorKind::InstanceIpLimit
        | CloudErrorKind::QuotaExceeded
        | CloudErrorKind::Forbidden
        | CloudErrorKind::NotFound
        | CloudErrorKind::InvalidState
        | CloudErrorKind::TokenMismatch
        | CloudErrorKind::Deadline
        | CloudErrorKind::Rejected => return Decision::GiveUp,
    };
    if attempts >= MOST_ATTEMPTS {
        return Decision::GiveUp;
    }
    let full = first.saturating_mul(2u32.saturating_pow(attempts.saturating_sub(1).min(16))).min(most);
    // Half fixed, half random: spread out, yet never at once.
    let delay = full.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0)).max(floor);
    if delay.saturating_add(SHORTEST_ATTEMPT) > remaining { Decision::GiveUp } else { Decision::RetryAfter(delay) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FINAL: [CloudErrorKind; 10] = [
        CloudErrorKind::VSwitchExhausted,
        CloudErrorKind::InstanceEniLimit,
        CloudErrorKind::InstanceIpLimit,
        CloudErrorKind::QuotaExceeded,
        CloudErrorKind::Forbidden,
        CloudErrorKind::NotFound,
        CloudErrorKind::InvalidState,
        CloudErrorKind::TokenMismatch,
        CloudErrorKind::Deadline,
        CloudErrorKind::Rejected,
    ];

    fn passing() -> impl Strategy<Value = CloudErrorKind> {
        prop_oneof![
            Just(CloudErrorKind::Transport),
            Just(CloudErrorKind::Conflict),
            (0u64..20_000).prop_map(|ms| CloudErrorKind::Throttled { retry_after: Duration::from_millis(ms) }),
        ]
    }

    #[test]
    fn what_repeating_cannot_mend_is_not_repeated() {
        for kind in FINAL {
            assert_eq!(decide(&kind, 1, Duration::from_secs(3600), 0.5), Decision::GiveUp, "{kind:?}");
        }
    }

    proptest! {
        #[test]
        fn a_retry_fits_into_the_deadline_and_is_never_immediate(
            kind in passing(), attempts in 1u32..20, remaining in 0u64..60_000, random in 0.0f64..1.0,
        ) {
            let remaining = Duration::from_millis(remaining);
            if let Decision::RetryAfter(delay) = decide(&kind, attempts, remaining, random) {
                prop_assert!(delay < remaining);
                prop_assert!(delay >= Duration::from_millis(100));
                if let CloudErrorKind::Throttled { retry_after } = kind {
                    prop_assert!(delay >= retry_after);
                }
            }
        }

        #[test]
        fn attempts_are_bounded_even_without_a_deadline(kind in passing()) {
            let forever = Duration::from_secs(1 << 40);
            let last = (1..100).find(|n| decide(&kind, *n, forever, 0.3) == Decision::GiveUp);
            prop_assert_eq!(last, Some(MOST_ATTEMPTS));
        }

        #[test]
        fn the_delay_grows_and_random_spreads_it(attempts in 1u32..8, a in 0.0f64..0.4, b in 0.6f64..1.0) {
            let at = |n, r| match decide(&CloudErrorKind::Transport, n, Duration::from_secs(3600), r) {
                Decision::RetryAfter(d) => d,
                Decision::GiveUp => Duration::ZERO,
            };
            prop_assert!(at(attempts, a) < at(attempts, b));
            prop_assert!(at(attempts + 1, a) >= at(attempts, a));
        }
    }
}
