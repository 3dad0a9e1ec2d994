//! What the answer to a call means: the steps it leads to, and whether it puts
//! the ledger's view of the cloud in doubt. Pure.
//!
//! A call whose effect is unknown is repeated with the same token. One that
//! certainly failed gives up its intent, and holds back whatever would fail
//! again for the same reason.

use crate::cloud::{self, CloudError, CloudErrorKind, VSwitch};
use crate::netns::PreparedEni;

use super::apply::in_use;
use super::config::Config;
use super::plan::back_off;
use super::reconcile::eni_ref;
use super::state::{Device, EniKey, Hold, HoldKey, Phase, State, Time};
use super::step::Step;
use super::work::Work;

/// What a call brought.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Created(Box<cloud::Eni>, Box<VSwitch>),
    Prepared(PreparedEni),
    Assigned4(Vec<std::net::Ipv4Addr>),
    Assigned6(Vec<std::net::Ipv6Addr>),
    Done,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq)]
pub enum Trouble {
    Cloud(CloudError),
    /// Not answered by the actor asked: busy, restarting, too late.
    Unanswered(String),
    /// The node's own side.
    Kernel(String),
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::Cloud(e) => e.fmt(f),
            Trouble::Unanswered(text) | Trouble::Kernel(text) => f.write_str(text),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meaning {
    pub steps: Vec<Step>,
    /// Look at the cloud before deciding anything else about this.
    pub doubt: bool,
}

/// How often a device may fail to appear before its ENI is given up.
const PREPARE_ATTEMPTS: u32 = 5;

pub fn meaning(state: &State, config: &Config, work: &Work, result: Result<Answer, Trouble>, now: Time) -> Meaning {
    let mut m = Interpreter { state, config, now, steps: Vec::new(), doubt: false };
    match result {
        Ok(answer) => m.success(work, answer),
        Err(trouble) => m.failure(work, &trouble),
    }
    Meaning { steps: m.steps, doubt: m.doubt }
}

struct Interpreter<'a> {
    state: &'a State,
    config: &'a Config,
    now: Time,
    steps: Vec<Step>,
    doubt: bool,
}

impl Interpreter<'_> {
    fn success(&mut self, work: &Work, answer: Answer) {
        if let super::work::Subject::Eni(key) = work.subject() {
            for hold in [HoldKey::Eni(key), HoldKey::Create] {
                let over = hold != HoldKey::Create || matches!(work, Work::Create { .. });
                if over && self.state.holds.contains_key(&hold) {
                    self.steps.push(Step::Unhold { key: hold });
                }
            }
        }
        let step = match (work, answer) {
            (Work::Create { key }, Answer::Created(eni, vswitch)) => {
                let (ipv4, ipv6) = (eni.ipv4.clone(), eni.ipv6.clone());
                Step::EniCreated { key: *key, eni: Box::new(eni_ref(&eni, &vswitch)), ipv4, ipv6 }
            }
            (Work::Attach { key }, _) => Step::EniAttaching { key: *key, accepted: true },
            (Work::Prepare { key }, Answer::Prepared(p)) => {
                let device = Device { ifname: p.ifname, rx_queues: p.rx_queues, receive_cores: p.receive_cores };
                Step::EniReady { key: *key, device }
            }
            (Work::AssignIpv4 { key }, Answer::Assigned4(addresses)) => Step::Ipv4Assigned { key: *key, addresses },
            (Work::AssignIpv6 { key }, Answer::Assigned6(addresses)) => Step::Ipv6Assigned { key: *key, addresses },
            (Work::UnassignIpv4 { key, addresses }, _) => {
                Step::Ipv4Released { key: *key, addresses: addresses.clone() }
            }
            (Work::UnassignIpv6 { key, addresses }, _) => {
                Step::Ipv6Released { key: *key, addresses: addresses.clone() }
            }
            (Work::Detach { key }, _) => Step::EniDetaching { key: *key, accepted: true },
            (Work::Delete { key }, _) => Step::EniDeleted { key: *key },
            (Work::Unwire { v4 }, _) => Step::Release { v4: *v4, quarantine: self.config.quarantine },
            // An answer of another kind says nothing about this call.
            _ => {
                self.doubt = true;
                return;
            }
        };
        self.steps.push(step);
    }

    fn failure(&mut self, work: &Work, trouble: &Trouble) {
        use CloudErrorKind as K;
        let kind = match trouble {
            Trouble::Cloud(e) => e.kind.clone(),
            Trouble::Unanswered(_) => K::Transport,
            Trouble::Kernel(_) => K::InvalidState,
        };
        let repeat = matches!(kind, K::Transport | K::Deadline | K::Throttled { .. } | K::Conflict);
        // Waiting and trying the same again is all one can do.
        let lasting = matches!(kind, K::Forbidden | K::QuotaExceeded | K::Rejected | K::InstanceEniLimit);
        match work {
            Work::Unwire { .. } => {}
            Work::Create { key } if repeat => self.hold_eni(*key, trouble, &kind),
            Work::Create { key } => {
                self.steps.push(Step::CreateFailed { key: *key });
                let vswitch = self.state.enis.get(key).map(|e| e.vswitch.clone());
                match (kind, vswitch) {
                    (K::VSwitchExhausted, Some(vswitch)) => self.exhausted(vswitch, trouble),
                    (K::TokenMismatch, _) => self.doubt = true,
                    _ => {
                        self.hold(HoldKey::Create, trouble, None, lasting);
                        self.doubt = true;
                    }
                }
            }
            Work::Attach { key } if lasting && !self.state.of_eni(*key).any(|(_, a)| in_use(a)) => {
                // Not attached, and will not be: give it up.
                self.steps.push(Step::EniDetached { key: *key });
                self.hold(HoldKey::Create, trouble, None, true);
                self.doubt = true;
            }
            Work::Attach { key } | Work::Detach { key } => {
                self.doubt = !repeat;
                self.hold_eni(*key, trouble, &kind);
            }
            Work::Prepare { key } => {
                self.doubt = true;
                let failures = self.state.holds.get(&HoldKey::Eni(*key)).map_or(0, |h| h.failures);
                let given_up = failures + 1 >= PREPARE_ATTEMPTS
                    && self.state.enis.get(key).is_some_and(|e| matches!(e.phase, Phase::Attaching { .. }))
                    && !self.state.of_eni(*key).any(|(_, a)| in_use(a));
                if given_up {
                    self.steps.push(Step::DrainEni { key: *key });
                }
                self.hold_eni(*key, trouble, &kind);
            }
            Work::AssignIpv4 { key } | Work::AssignIpv6 { key } if repeat => self.hold_eni(*key, trouble, &kind),
            Work::AssignIpv4 { key } | Work::AssignIpv6 { key } => {
                let ipv6 = matches!(work, Work::AssignIpv6 { .. });
                self.steps.push(Step::AssignFailed { key: *key, ipv6 });
                let vswitch = self.state.enis.get(key).map(|e| e.vswitch.clone());
                match (kind, vswitch) {
                    (K::VSwitchExhausted, Some(vswitch)) if !ipv6 => self.exhausted(vswitch, trouble),
                    (kind, _) => {
                        self.doubt = true;
                        self.hold_eni(*key, trouble, &kind);
                    }
                }
            }
            Work::Delete { key } if kind == K::NotFound => self.steps.push(Step::EniDeleted { key: *key }),
            Work::Delete { key } | Work::UnassignIpv4 { key, .. } | Work::UnassignIpv6 { key, .. } => {
                self.doubt = !repeat;
                self.hold_eni(*key, trouble, &kind);
            }
        }
    }

    fn exhausted(&mut self, vswitch: crate::model::VSwitchId, trouble: &Trouble) {
        self.hold(HoldKey::VSwitch(vswitch), trouble, Some(self.config.vswitch_cool_off), true);
    }

    fn hold_eni(&mut self, key: EniKey, trouble: &Trouble, kind: &CloudErrorKind) {
        let at_least = match kind {
            CloudErrorKind::Throttled { retry_after } => Some(*retry_after),
            _ => None,
        };
        let hopeless = matches!(kind, CloudErrorKind::Forbidden | CloudErrorKind::Rejected);
        self.hold(HoldKey::Eni(key), trouble, at_least, hopeless);
    }

    fn hold(&mut self, key: HoldKey, trouble: &Trouble, at_least: Option<std::time::Duration>, hopeless: bool) {
        let failures = self.state.holds.get(&key).map_or(0, |h| h.failures) + 1;
        let wait = back_off(failures).max(at_least.unwrap_or_default());
        let hold = Hold { until: self.now.plus(wait), failures, reason: trouble.to_string(), hopeless };
        self.steps.push(Step::Hold { key, hold });
    }
}
