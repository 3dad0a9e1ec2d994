//! Who of all nodes is the one: a Lease, held by renewing it.
//!
//! Pure; time is an argument and only compared with itself, never with another
//! node's clock: a candidate takes the lease over when it has seen it unchanged
//! for its whole duration. A leader stops believing in itself well before that,
//! counted from before its last successful renewal was sent.

use std::time::{Duration, Instant};

/// A Lease as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub holder: String,
    pub duration: Duration,
    /// Anything that changes with each renewal.
    pub stamp: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Create,
    Take,
    Renew,
    Wait,
}

#[derive(Debug)]
pub struct Election {
    me: String,
    duration: Duration,
    observed: Option<(Seen, Instant)>,
    renewed: Option<Instant>,
}

impl Election {
    pub fn new(me: impl Into<String>, duration: Duration) -> Self {
        Self { me: me.into(), duration, observed: None, renewed: None }
    }

    /// How often to look, and how long a request may take.
    pub fn period(&self) -> Duration {
        self.duration / 4
    }

    pub fn decide(&mut self, lease: Option<&Seen>, now: Instant) -> Step {
        let Some(lease) = lease else {
            self.observed = None;
            return Step::Create;
        };
        if lease.holder == self.me {
            return Step::Renew;
        }
        // Someone else has it, whatever we believed.
        self.renewed = None;
        if lease.holder.is_empty() {
            return Step::Take;
        }
        match &self.observed {
            Some((seen, since)) if seen == lease => {
                if now.duration_since(*since) > lease.duration {
                    Step::Take
                } else {
                    Step::Wait
                }
            }
            _ => {
                self.observed = Some((lease.clone(), now));
                Step::Wait
            }
        }
    }

    /// A write succeeded; `sent` is the time before it was sent.
    pub fn held(&mut self, sent: Instant) {
        self.renewed = Some(sent);
    }

    pub fn leads(&self, now: Instant) -> bool {
        self.renewed.is_some_and(|at| now.duration_since(at) < self.duration * 2 / 3)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONG: Duration = Duration::from_secs(15);

    fn lease(holder: &str, stamp: u32) -> Seen {
        Seen { holder: holder.into(), duration: LONG, stamp: stamp.to_string() }
    }

    #[test]
    fn a_lease_is_taken_over_only_after_it_stood_still_for_its_duration() {
        let t = Instant::now();
        let mut b = Election::new("b", LONG);
        assert_eq!(b.decide(Some(&lease("a", 1)), t), Step::Wait);
        assert_eq!(b.decide(Some(&lease("a", 2)), t + LONG), Step::Wait, "it was renewed");
        assert_eq!(b.decide(Some(&lease("a", 2)), t + LONG * 2), Step::Wait);
        assert_eq!(b.decide(Some(&lease("a", 2)), t + LONG * 2 + Duration::from_secs(1)), Step::Take);
    }

    #[test]
    fn a_leader_that_cannot_renew_steps_back_before_another_may_take_over() {
        let t = Instant::now();
        let mut a = Election::new("a", LONG);
        assert_eq!(a.decide(None, t), Step::Create);
        assert!(!a.leads(t));
        a.held(t);
        assert!(a.leads(t + LONG / 2));
        assert!(!a.leads(t + LONG * 2 / 3));
    }

    #[test]
    fn a_leader_that_sees_another_holder_steps_back_at_once() {
        let t = Instant::now();
        let mut a = Election::new("a", LONG);
        a.held(t);
        a.decide(Some(&lease("b", 1)), t);
        assert!(!a.leads(t));
    }

    proptest! {
        /// Each node reaches the API or not, at each second.
        #[test]
        fn there_is_never_more_than_one_leader(reach in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 1..200)) {
            let t = Instant::now();
            let mut nodes: Vec<_> = ["a", "b", "c"].iter().map(|n| Election::new(*n, LONG)).collect();
            let mut stored: Option<Seen> = None;
            let mut stamp = 0;
            for (second, (a, b, c)) in reach.into_iter().enumerate() {
                let now = t + Duration::from_secs(second as u64);
                for (node, up) in nodes.iter_mut().zip([a, b, c]) {
                    if up && node.decide(stored.as_ref(), now) != Step::Wait {
                        stamp += 1;
                        stored = Some(lease(&node.me, stamp));
                        node.held(now);
                    }
                }
                prop_assert!(nodes.iter().filter(|n| n.leads(now)).count() <= 1);
            }
        }
    }
}
