//! `fairway status services` as text.

use std::fmt::Write as _;

use super::{columns, row};
use crate::service::status::ServiceSnapshot;

pub(super) fn table(s: &ServiceSnapshot) -> String {
    let mut out = String::new();
    match &s.awaited {
        Some(what) => {
            let _ = writeln!(out, "waiting for {what}; connections go on as the maps were left");
        }
        None => {
            let _ = writeln!(out, "{} Services carried, {} sets of backends", s.services, s.sets);
        }
    }
    let known = &s.known;
    let _ = writeln!(
        out,
        "known of the cluster: {} Services, {} EndpointSlices, {} endpoints",
        known.services, known.slices, known.endpoints
    );
    if let Some(ago) = s.synced_ms_ago {
        let _ = writeln!(
            out,
            "last change {:.1} s ago: {} Services compiled, {} entries written in {:.1} ms (longest so far {:.1} ms)",
            ago as f64 / 1e3,
            s.last.compiled,
            s.last.written,
            s.last_us as f64 / 1e3,
            s.longest_us as f64 / 1e3
        );
    }
    if !s.health_check_ports.is_empty() {
        let ports: Vec<String> = s.health_check_ports.iter().map(u16::to_string).collect();
        let _ = writeln!(out, "health check node ports: {}", ports.join(", "));
    }
    let percent = |used: usize, of: usize| format!("{:.1} %", 100.0 * used as f64 / of.max(1) as f64);
    let mut lines = vec![row(["MAP", "ENTRIES", "CAPACITY", "USED"])];
    for (map, used, of) in [
        ("frontends", s.used.frontends, s.capacity.frontends),
        ("slots", s.used.slots, s.capacity.slots),
        ("backends", s.used.backends, s.capacity.backends),
        ("source ranges", s.used.ranges, s.capacity.ranges),
    ] {
        lines.push(row([map.to_owned(), used.to_string(), of.to_string(), percent(used, of)]));
    }
    let _ = write!(out, "\n{}", columns(&lines));
    let all: usize = s.problem_counts.values().sum();
    if all > 0 {
        let mut lines = vec![row(["PROBLEM", "ABOUT", "CAUSE"])];
        lines.extend(s.problems.iter().map(|p| row([p.reason.name(), &p.about.to_string(), &p.message])));
        let _ = write!(out, "\n{}", columns(&lines));
        if all > s.problems.len() {
            let _ = writeln!(out, "and {} more", all - s.problems.len());
        }
    }
    out
}
