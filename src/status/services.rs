//! `fairway status services` as text.

use std::fmt::Write as _;

use super::{columns, row};
use crate::service::status::ServiceSnapshot;
use crate::service::tend::Tended;

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
    let mut lines = vec![row(["MAP", "ENTRIES", "CAPACITY", "USED", ""])];
    for u in s.uses() {
        let state = if s.nearly_full.contains(&u.map) { "nearly full" } else { "" };
        lines.push(row([
            &u.map,
            &u.entries.to_string(),
            &u.capacity.to_string(),
            &percent(u.entries, u.capacity),
            state,
        ]));
    }
    let _ = write!(out, "\n{}", columns(&lines));
    out.push_str(&packets(&s.tended));
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

/// What the packet path has done, and what was collected.
fn packets(t: &Tended) -> String {
    let mut out = String::new();
    let list = |pairs: Vec<String>| if pairs.is_empty() { "none".to_owned() } else { pairs.join(", ") };
    let flows = list(t.flows.iter().map(|(protocol, n)| format!("{n} {protocol}")).collect());
    let _ = writeln!(
        out,
        "\nflows translated packet by packet: {flows}; collected: {} entries that were silent, {} of backends that are gone",
        t.expired, t.orphaned
    );
    if t.squeeze > 0 {
        let _ =
            writeln!(out, "their table is short of room: they are kept for 1/{} of the normal time", 1u32 << t.squeeze);
    }
    let happened = t.events.iter().filter(|(_, n)| **n > 0);
    let happened = list(happened.map(|(event, n)| format!("{n} {}", event.replace('_', " "))).collect());
    let _ = writeln!(out, "packets: {happened}");
    let _ = writeln!(
        out,
        "connected UDP sockets ended because their backend was gone: {}; not ended: {}",
        t.sockets_ended, t.sockets_not_ended
    );
    if let Some(why) = &t.sockets_unable {
        let _ = writeln!(out, "connected UDP sockets of the node stay with a backend that is gone: {why}");
    }
    if !t.told.last.is_empty() {
        let mut lines = vec![row(["DROPPED OR REFUSED", "AT", "PROTOCOL", "FROM", "TO", "MORE"])];
        // Newest first.
        lines.extend(t.told.last.iter().rev().take(20).map(|s| {
            let words = s.what.replace('_', " ");
            row([&words, &s.at, &s.protocol, &s.from, &s.to, &s.untold.to_string()])
        }));
        let _ = write!(out, "\n{}", columns(&lines));
        let _ = writeln!(out, "{} told so far, {} more happened", t.told.read, t.told.untold);
    }
    if let Some(error) = &t.error {
        let _ = writeln!(out, "the flow table cannot be looked through: {error}");
    }
    out
}
