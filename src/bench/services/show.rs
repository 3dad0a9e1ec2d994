//! A table for a person: a line for each thing measured, a column for each
//! subject.

use std::collections::BTreeMap;

use super::BASELINE;
use super::fleet::POSITIONS;
use crate::bench::stats::{Params, Row, significant};

const SUBJECTS: [&str; 3] = ["iptables", "nftables", "fairway"];

/// Ratios over `routed` of the same round, with their quartiles, in the order of
/// the rows; what has no baseline as it is.
pub fn table(rows: &[Row]) -> String {
    let mut order: Vec<(&str, &Params)> = Vec::new();
    let mut by_key: BTreeMap<(&str, &Params), BTreeMap<&str, &Row>> = BTreeMap::new();
    for row in rows {
        let key = (row.metric.as_str(), &row.params);
        let subjects = by_key.entry(key).or_insert_with(|| {
            order.push(key);
            BTreeMap::new()
        });
        subjects.insert(&row.subject, row);
    }
    // Together what belongs together; otherwise as measured.
    let rank = |metric: &str| order.iter().position(|(of, _)| *of == metric);
    let mut keys = order.clone();
    keys.sort_by_key(|(metric, params)| {
        let number = |key: &str| params.get(key).and_then(|n| n.parse::<usize>().ok());
        let position = params.get("position").and_then(|p| POSITIONS.iter().position(|of| of == p));
        (rank(metric), number("nodes"), position, number("services"))
    });
    let mut head = vec!["metric", "nodes", "position", "services", BASELINE];
    head.extend(SUBJECTS);
    let mut lines = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for key @ (metric, params) in keys {
        let Some(subjects) = by_key.get(&key) else { continue };
        let mut line = vec![metric.to_owned()];
        line.extend(["nodes", "position", "services"].map(|key| params.get(key).cloned().unwrap_or_default()));
        line.push(subjects.get(BASELINE).map(|row| absolute(row)).unwrap_or_default());
        line.extend(SUBJECTS.map(|subject| subjects.get(subject).map(|row| ratio(row)).unwrap_or_default()));
        lines.push(line);
    }
    crate::status::columns(&lines)
}

fn absolute(row: &Row) -> String {
    format!("{} {}", significant(row.value), row.unit)
}

fn ratio(row: &Row) -> String {
    match (row.ratio, row.ratio_q1, row.ratio_q3) {
        (Some(ratio), Some(q1), Some(q3)) => format!("{ratio:.3} ({q1:.3}–{q3:.3})"),
        _ => absolute(row),
    }
}
