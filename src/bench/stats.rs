//! From samples to rows: medians of ratios over interleaved rounds.
//!
//! These machines drift by tens of percent within a minute. What holds still is
//! the ratio of a subject to the baseline of the same round, a moment apart; so
//! a row's ratio is the median over rounds of that, and its quartiles say how
//! far to trust it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a sample was taken under; part of a row's identity.
pub type Params = BTreeMap<String, String>;

/// One measurement of one subject in one round.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub metric: &'static str,
    pub unit: &'static str,
    pub subject: String,
    pub params: Params,
    pub round: usize,
    pub value: f64,
}

/// One line of `target/bench/<suite>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub metric: String,
    pub subject: String,
    pub params: Params,
    pub value: f64,
    pub unit: String,
    /// The subject that `ratio` is over.
    pub baseline: String,
    /// Median over rounds of value / baseline's value of the same round.
    pub ratio: Option<f64>,
    /// Quartiles of that ratio.
    pub ratio_q1: Option<f64>,
    pub ratio_q3: Option<f64>,
    pub rounds: usize,
}

/// Everyone once, another one first each time, then everyone again backwards, so
/// that a machine that gets steadily slower does so for all of them alike.
pub fn there_and_back(first: usize, of: usize) -> impl Iterator<Item = usize> {
    let which = move |turn| (first + turn) % of;
    (0..of).map(which).chain((0..of).rev().map(which))
}

/// Reduce samples to rows, in order of first appearance. `baseline` names the
/// subject each metric is compared with.
pub fn rows(samples: &[Sample], baseline: impl Fn(&str) -> String) -> Vec<Row> {
    type Key = (&'static str, String, Params);
    let mut order: Vec<Key> = Vec::new();
    let mut by_key: BTreeMap<Key, BTreeMap<usize, f64>> = BTreeMap::new();
    for s in samples {
        let key = (s.metric, s.subject.clone(), s.params.clone());
        let rounds = by_key.entry(key.clone()).or_insert_with(|| {
            order.push(key);
            BTreeMap::new()
        });
        rounds.insert(s.round, s.value);
    }
    let unit = |metric| samples.iter().find(|s| s.metric == metric).map_or("", |s| s.unit);
    order
        .iter()
        .map(|key @ (metric, subject, params)| {
            let own = &by_key[key];
            let over = baseline(metric);
            let base = by_key.get(&(metric, over.clone(), params.clone()));
            let mut ratios: Vec<f64> = own
                .iter()
                .filter_map(|(round, value)| {
                    let b = *base?.get(round)?;
                    (b != 0.0).then_some(value / b)
                })
                .collect();
            let mut values: Vec<f64> = own.values().copied().collect();
            Row {
                metric: (*metric).to_owned(),
                subject: subject.clone(),
                params: params.clone(),
                value: quantile(&mut values, 0.5).unwrap_or(f64::NAN),
                unit: unit(*metric).to_owned(),
                baseline: over,
                ratio: quantile(&mut ratios, 0.5),
                ratio_q1: quantile(&mut ratios, 0.25),
                ratio_q3: quantile(&mut ratios, 0.75),
                rounds: own.len(),
            }
        })
        .collect()
}

/// The `q`-quantile, interpolated between neighbours. Sorts in place.
pub fn quantile(values: &mut [f64], q: f64) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let at = q.clamp(0.0, 1.0) * (values.len() - 1) as f64;
    let (low, high) = (values[at.floor() as usize], values[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

/// A table for a person.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![
        ["metric", "subject", "params", "value", "unit", "over", "ratio", "quartiles"].map(str::to_owned).to_vec(),
    ];
    for r in rows {
        let params = r.params.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" ");
        let ratio = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.3}"));
        lines.push(vec![
            r.metric.clone(),
            r.subject.clone(),
            params,
            significant(r.value),
            r.unit.clone(),
            r.baseline.clone(),
            ratio(r.ratio),
            format!("{} … {}", ratio(r.ratio_q1), ratio(r.ratio_q3)),
        ]);
    }
    crate::status::columns(&lines)
}

pub fn significant(v: f64) -> String {
    match v.abs() {
        a if a >= 1000.0 => format!("{v:.0}"),
        a if a >= 10.0 => format!("{v:.1}"),
        _ => format!("{v:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(subject: &str, round: usize, value: f64) -> Sample {
        Sample { metric: "tcp_rr", unit: "1/s", subject: subject.into(), params: Params::new(), round, value }
    }

    #[test]
    fn ratios_are_taken_within_a_round_so_drift_cancels() {
        // The machine gets three times faster; the subject stays 10 % behind.
        let samples: Vec<_> = (0..9)
            .flat_map(|round| {
                let speed = 1000.0 * (1.0 + round as f64 / 4.0);
                [sample("node", round, speed), sample("veth", round, speed * 0.9)]
            })
            .collect();
        let rows = rows(&samples, |_| "node".into());
        assert_eq!(rows[0].ratio, Some(1.0));
        for q in [rows[1].ratio, rows[1].ratio_q1, rows[1].ratio_q3] {
            assert!((q.unwrap() - 0.9).abs() < 1e-9);
        }
    }

    #[test]
    fn everyone_has_the_same_turns_and_the_same_mean_place() {
        for first in 0..5 {
            let order: Vec<usize> = there_and_back(first, 4).collect();
            for who in 0..4 {
                let places = order.iter().enumerate().filter(|(_, w)| **w == who).map(|(place, _)| place);
                assert_eq!(places.clone().count(), 2);
                assert_eq!(places.sum::<usize>(), 7, "{order:?}");
            }
        }
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&mut [4.0, 1.0, 3.0, 2.0], 0.5), Some(2.5));
        assert_eq!(quantile(&mut [5.0], 0.99), Some(5.0));
        assert_eq!(quantile(&mut [], 0.5), None);
    }
}
