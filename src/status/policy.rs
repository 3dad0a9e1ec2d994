//! `fairway status policy` as text.

use std::fmt::Write as _;

use super::{columns, row};
use crate::policy::status::PolicySnapshot;

pub(super) fn table(s: &PolicySnapshot) -> String {
    let mut out = String::new();
    let settled = &s.settled;
    match &s.awaited {
        Some(what) => {
            let _ = writeln!(out, "waiting for {what}; what was in force before stays so");
        }
        None => {
            let _ = writeln!(
                out,
                "{} policies; {} pods of this node, {} of them isolated, {} closed until they are known",
                settled.policies, settled.pods, settled.isolated, settled.closed
            );
        }
    }
    let known = &s.known;
    let _ = writeln!(
        out,
        "known of the cluster: {} NetworkPolicies, {} pods, {} namespaces",
        known.policies, known.pods, known.namespaces
    );
    if let Some(ago) = s.settled_ms_ago {
        let _ = writeln!(
            out,
            "last change {:.1} s ago: {} entries written in {:.1} ms",
            ago as f64 / 1e3,
            settled.writes,
            settled.took_us as f64 / 1e3
        );
    }
    let _ = writeln!(
        out,
        "tables: {} profiles, {} rules, {} addresses, {} ranges",
        settled.profiles, settled.rules, settled.addresses, settled.ranges
    );
    if s.waiting > 0 {
        let _ = writeln!(out, "{} new pods wait for the watch to show them", s.waiting);
    }
    if let Some(error) = &s.error {
        let _ = writeln!(out, "cannot be written: {error}; it is tried again every 10 s");
    }
    if !s.hits.is_empty() {
        let mut lines = vec![row(["RULE", "FLOWS LET THROUGH"])];
        lines.extend(s.hits.iter().map(|(rule, count)| row([rule, &count.to_string()])));
        let _ = write!(out, "\n{}", columns(&lines));
    }
    if !s.refusals.is_empty() {
        let _ = writeln!(out, "\nnot understood, so that what was known of them stands:");
        for refusal in &s.refusals {
            let _ = writeln!(out, "  {refusal}");
        }
    }
    out
}
