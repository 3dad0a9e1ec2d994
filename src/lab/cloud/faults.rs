//! Faults: what goes wrong on purpose.
//!
//! Purpose: latency, errors, throttling storms, lost replies, dropped
//! connections, exhausted vSwitches, outages; switched at run time by tests or
//! over `/lab/faults`. Owner: the engine, behind its lock. Invariants: pure
//! (time and randomness come in); bounded; a fault whose time or count has run
//! out no longer exists.

use std::collections::BTreeSet;

use rand::Rng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::metadata::MAX_LAG_MS;
use super::state::Millis;
use super::throttle::throttled;

const MAX_FAULTS: usize = 64;
const MAX_LATENCY_MS: u64 = 600_000;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// Calls take this much longer.
    Latency { ms: u64 },
    /// Calls fail before any effect.
    ServerError {
        #[serde(default = "five_hundred")]
        status: u16,
        #[serde(default)]
        code: Option<String>,
    },
    /// Calls are refused for their rate: with `code`, or with each of the
    /// codes the real cloud uses, HTTP 429 included, in turn.
    Throttle {
        #[serde(default)]
        code: Option<String>,
    },
    /// The call has its effect; the caller sees the connection close, or, with
    /// `status`, an InternalError.
    LostReply {
        #[serde(default)]
        status: Option<u16>,
    },
    /// The connection closes before any effect.
    DropConnection,
    /// The credentials may not do this.
    Deny,
    /// The vSwitch has no free address.
    ExhaustVswitch { vswitch: String },
    /// An attachment is accepted but ends as Available.
    AttachFails,
    /// The API takes no connection.
    Down,
    /// The metadata service is this much further behind.
    MetadataLag { ms: u64 },
    /// The metadata service answers with `status`, or not at all.
    MetadataDown {
        #[serde(default)]
        status: Option<u16>,
    },
}

fn five_hundred() -> u16 {
    500
}

fn always() -> u8 {
    100
}

/// A fault and when it strikes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultSpec {
    pub fault: Fault,
    /// Only these APIs; empty: all.
    #[serde(default)]
    pub apis: Vec<String>,
    /// Share of the calls that are hit.
    #[serde(default = "always")]
    pub percent: u8,
    /// Gone after this many hits.
    #[serde(default)]
    pub count: Option<u64>,
    /// Gone after this time.
    #[serde(default)]
    pub seconds: Option<f64>,
}

impl From<Fault> for FaultSpec {
    fn from(fault: Fault) -> Self {
        Self { fault, apis: Vec::new(), percent: 100, count: None, seconds: None }
    }
}

impl FaultSpec {
    pub fn apis(mut self, apis: &[&str]) -> Self {
        self.apis = apis.iter().map(|&api| api.to_owned()).collect();
        self
    }

    pub fn percent(self, percent: u8) -> Self {
        Self { percent, ..self }
    }

    pub fn count(self, count: u64) -> Self {
        Self { count: Some(count), ..self }
    }

    pub fn seconds(self, seconds: f64) -> Self {
        Self { seconds: Some(seconds), ..self }
    }

    fn validate(&self) -> Result<(), ApiError> {
        let status = |s: &u16| (400..600).contains(s);
        let fine = match &self.fault {
            Fault::Latency { ms } => *ms <= MAX_LATENCY_MS,
            Fault::MetadataLag { ms } => *ms <= MAX_LAG_MS,
            Fault::ServerError { status: s, code } => status(s) && code.as_ref().is_none_or(|c| c.len() <= 128),
            Fault::Throttle { code } => code.as_ref().is_none_or(|c| c.len() <= 128),
            Fault::LostReply { status: s } | Fault::MetadataDown { status: s } => s.as_ref().is_none_or(status),
            Fault::ExhaustVswitch { vswitch } => vswitch.len() <= 128,
            Fault::DropConnection | Fault::Deny | Fault::AttachFails | Fault::Down => true,
        };
        let time = self.seconds.is_none_or(|s| (0.0..=86_400.0).contains(&s));
        let names = self.apis.len() <= 32 && self.apis.iter().all(|api| api.len() <= 64);
        if fine && time && names && self.percent <= 100 {
            Ok(())
        } else {
            Err(ApiError::invalid("fault", "a value is out of bounds"))
        }
    }
}

/// A fault that is switched on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActiveFault {
    pub id: u64,
    pub spec: FaultSpec,
    pub until_ms: Option<Millis>,
    pub hits: u64,
}

/// What happens to one call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub latency_ms: u64,
    /// Close the connection before any effect.
    pub drop: bool,
    /// Answer this before any effect.
    pub refuse: Option<ApiError>,
    /// Have the effect, then close the connection or answer with this status.
    pub lose: Option<Option<u16>>,
}

/// All faults that are switched on.
#[derive(Debug, Default)]
pub struct Faults {
    active: Vec<ActiveFault>,
    last_id: u64,
    storm: usize,
}

impl Faults {
    pub fn add(&mut self, spec: FaultSpec, now: Millis) -> Result<u64, ApiError> {
        spec.validate()?;
        self.prune(now);
        if self.active.len() >= MAX_FAULTS {
            return Err(ApiError::new(403, "QuotaExceeded.Fault", format!("At most {MAX_FAULTS} faults at a time.")));
        }
        self.last_id += 1;
        let until_ms = spec.seconds.map(|s| now + (s * 1000.0) as u64);
        self.active.push(ActiveFault { id: self.last_id, spec, until_ms, hits: 0 });
        Ok(self.last_id)
    }

    pub fn remove(&mut self, id: u64) -> bool {
        let before = self.active.len();
        self.active.retain(|fault| fault.id != id);
        self.active.len() != before
    }

    pub fn clear(&mut self) {
        self.active.clear();
    }

    pub fn list(&mut self, now: Millis) -> Vec<ActiveFault> {
        self.prune(now);
        self.active.clone()
    }

    fn prune(&mut self, now: Millis) {
        self.active.retain(|fault| {
            fault.until_ms.is_none_or(|until| now < until) && fault.spec.count.is_none_or(|count| fault.hits < count)
        });
    }

    /// What happens to a call of `api` that arrives now.
    pub fn decide(&mut self, api: &str, now: Millis, rng: &mut StdRng) -> Verdict {
        self.prune(now);
        let mut verdict = Verdict::default();
        for active in &mut self.active {
            let meant = active.spec.apis.is_empty() || active.spec.apis.iter().any(|name| name == api);
            if !meant || rng.random_range(0..100) >= u32::from(active.spec.percent) {
                continue;
            }
            match &active.spec.fault {
                Fault::Latency { ms } => verdict.latency_ms += ms,
                Fault::ServerError { status, code } => {
                    let code = code.clone().unwrap_or_else(|| standard_code(*status).to_owned());
                    verdict.refuse = Some(ApiError::new(*status, code, "An injected fault."));
                }
                Fault::Throttle { code } => {
                    self.storm += 1;
                    verdict.refuse = Some(storm(code.as_deref(), self.storm));
                }
                Fault::LostReply { status } => verdict.lose = Some(*status),
                Fault::DropConnection => verdict.drop = true,
                Fault::Deny => {
                    let message = format!(
                        "User not authorized to operate on the specified resource, or this API doesn't support RAM: {api}."
                    );
                    verdict.refuse = Some(ApiError::new(403, "Forbidden.RAM", message));
                }
                _ => continue,
            }
            active.hits += 1;
        }
        verdict
    }

    /// Does an attachment that is due now fail?
    pub fn attach_fails(&mut self, now: Millis) -> bool {
        self.hit(now, |fault| matches!(fault, Fault::AttachFails))
    }

    /// Is the API unreachable?
    pub fn down(&mut self, now: Millis) -> bool {
        self.hit(now, |fault| matches!(fault, Fault::Down))
    }

    fn hit(&mut self, now: Millis, is: impl Fn(&Fault) -> bool) -> bool {
        self.prune(now);
        let found = self.active.iter_mut().find(|active| is(&active.spec.fault));
        found.map(|active| active.hits += 1).is_some()
    }

    pub fn exhausted(&mut self, now: Millis) -> BTreeSet<String> {
        self.prune(now);
        let vswitch = |active: &ActiveFault| match &active.spec.fault {
            Fault::ExhaustVswitch { vswitch } => Some(vswitch.clone()),
            _ => None,
        };
        self.active.iter().filter_map(vswitch).collect()
    }

    /// Extra lag of the metadata service, and how it is down: with a status, or
    /// without an answer.
    pub fn metadata(&mut self, now: Millis) -> (u64, Option<Option<u16>>) {
        self.prune(now);
        let (mut lag, mut down) = (0, None);
        for active in &mut self.active {
            match &active.spec.fault {
                Fault::MetadataLag { ms } => lag += ms,
                Fault::MetadataDown { status } => down = Some(*status),
                _ => continue,
            }
            active.hits += 1;
        }
        (lag, down)
    }
}

fn standard_code(status: u16) -> &'static str {
    match status {
        503 => "ServiceUnavailable",
        504 => "RequestTimeout",
        _ => "InternalError",
    }
}

fn storm(code: Option<&str>, turn: usize) -> ApiError {
    if let Some(code) = code {
        return throttled(code);
    }
    match turn % 4 {
        1 => throttled("Throttling"),
        2 => throttled("Throttling.User"),
        3 => throttled("Throttling.Api"),
        _ => ApiError { status: 429, ..throttled("Throttling") },
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn rng() -> StdRng {
        StdRng::seed_from_u64(3)
    }

    #[test]
    fn a_fault_ends_with_its_time_or_its_count() {
        let (mut faults, mut rng) = (Faults::default(), rng());
        faults.add(FaultSpec::from(Fault::DropConnection).count(2), 0).unwrap();
        faults.add(FaultSpec::from(Fault::Latency { ms: 5 }).seconds(1.0), 0).unwrap();
        let verdicts: Vec<_> = [0, 1, 2, 1000].iter().map(|now| faults.decide("X", *now, &mut rng)).collect();
        assert_eq!(verdicts.iter().map(|v| v.drop).collect::<Vec<_>>(), [true, true, false, false]);
        assert_eq!(verdicts.iter().map(|v| v.latency_ms).collect::<Vec<_>>(), [5, 5, 5, 0]);
        assert!(faults.list(1000).is_empty());
    }

    #[test]
    fn a_fault_hits_only_the_apis_it_names() {
        let (mut faults, mut rng) = (Faults::default(), rng());
        faults.add(FaultSpec::from(Fault::Deny).apis(&["CreateNetworkInterface"]), 0).unwrap();
        assert_eq!(faults.decide("DescribeVSwitches", 0, &mut rng), Verdict::default());
        let refused = faults.decide("CreateNetworkInterface", 0, &mut rng).refuse.unwrap();
        assert_eq!((refused.status, refused.code.as_str()), (403, "Forbidden.RAM"));
    }

    #[test]
    fn a_storm_uses_every_code_of_the_real_cloud() {
        let (mut faults, mut rng) = (Faults::default(), rng());
        faults.add(Fault::Throttle { code: None }.into(), 0).unwrap();
        let seen: BTreeSet<_> = (0..8)
            .filter_map(|_| faults.decide("X", 0, &mut rng).refuse)
            .map(|e| format!("{} {}", e.status, e.code))
            .collect();
        let want = ["400 Throttling", "400 Throttling.Api", "400 Throttling.User", "429 Throttling"];
        assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), want);
    }

    #[test]
    fn a_fault_reads_from_json_and_refuses_nonsense() {
        let spec: FaultSpec =
            serde_json::from_str(r#"{"fault":{"kind":"latency","ms":500},"percent":50,"seconds":3}"#).unwrap();
        assert_eq!(spec, FaultSpec::from(Fault::Latency { ms: 500 }).percent(50).seconds(3.0));
        for bad in [
            r#"{"fault":{"kind":"latency"}}"#,
            r#"{"fault":{"kind":"nothing"}}"#,
            r#"{"fault":{"kind":"down"},"typo":1}"#,
        ] {
            assert!(serde_json::from_str::<FaultSpec>(bad).is_err(), "{bad}");
        }
        let mut faults = Faults::default();
        assert!(faults.add(FaultSpec::from(Fault::Down).percent(101), 0).is_err());
        assert!(faults.add(Fault::ServerError { status: 200, code: None }.into(), 0).is_err());
        assert!(faults.add(FaultSpec::from(Fault::Down).seconds(f64::NAN), 0).is_err());
    }
}
