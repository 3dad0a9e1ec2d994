//! The plot: how CRR and UDP_RR go with the number of Services.
//!
//! One SVG without scripts or fonts of its own, legible on a light ground and on
//! a dark one; the colours differ for those who do not tell red from green, and
//! every line has its name beside it.

use std::fmt::Write as _;

use super::BASELINE;
use crate::bench::stats::Row;

/// A subject, its colour on light ground, on dark ground.
const SUBJECTS: [(&str, &str, &str); 4] = [
    (BASELINE, "#6b7280", "#9ca3af"),
    ("iptables", "#b45309", "#f59e0b"),
    ("nftables", "#7c3aed", "#c4b5fd"),
    ("fairway", "#0369a1", "#38bdf8"),
];
const PANELS: [(&str, &str); 2] = [("tcp_crr", "TCP connections per second"), ("udp_rr", "UDP request-response")];
/// Where the probed Service is: at its worst for whoever looks through them all.
const POSITION: &str = "last";

/// Of a panel, without its margins.
const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 180.0;
const LEFT: f64 = 46.0;
const TOP: f64 = 68.0;
const RIGHT: f64 = 74.0;
const GAP: f64 = 62.0;
/// The least height between two names.
const LINE: f64 = 12.0;

struct Axes {
    /// Logarithms of the fewest and the most Services.
    from: f64,
    to: f64,
    /// The highest ratio.
    top: f64,
}

impl Axes {
    fn x(&self, services: f64) -> f64 {
        let span = (self.to - self.from).max(1e-9);
        LEFT + (services.log10() - self.from) / span * WIDTH
    }
    fn y(&self, ratio: f64) -> f64 {
        HEIGHT * (1.0 - ratio.clamp(0.0, self.top) / self.top)
    }
}

/// `None` when nothing of it was measured.
pub fn svg(rows: &[Row]) -> Option<String> {
    let of_panels = |r: &&Row| {
        let position = r.params.get("position").is_some_and(|p| p == POSITION);
        position && PANELS.iter().any(|(metric, _)| r.metric == *metric)
    };
    let shown: Vec<&Row> = rows.iter().filter(of_panels).collect();
    let mut services: Vec<f64> = shown.iter().filter_map(|r| services_of(r)).collect();
    services.sort_by(f64::total_cmp);
    services.dedup();
    let (from, to) = (services.first()?.log10(), services.last()?.log10());
    let highest = shown.iter().filter_map(|r| r.ratio_q3).fold(1.0, f64::max);
    let axes = Axes { from, to, top: (highest * 5.0).ceil().clamp(5.0, 10.0) / 5.0 };
    let (width, height) = (2.0 * (LEFT + WIDTH + RIGHT), TOP + 2.0 * (HEIGHT + GAP));
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="Services: ratio over plain routing by number of Services">"#
    );
    out.push_str(&style());
    let _ = writeln!(
        out,
        r#"<text x="{LEFT}" y="20" class="title">Through a Service, over plain routing without one</text>"#
    );
    let _ = writeln!(
        out,
        r#"<text x="{LEFT}" y="36">Median of ratios within a round; the band is from quartile to quartile. The probed Service is the {POSITION} one.</text>"#
    );
    for (row, (metric, title)) in PANELS.iter().enumerate() {
        for (column, nodes) in [1, 2].into_iter().enumerate() {
            let (x, y) = (column as f64 * (LEFT + WIDTH + RIGHT), TOP + row as f64 * (HEIGHT + GAP));
            let nodes_are = |r: &Row| r.params.get("nodes").is_some_and(|n| *n == nodes.to_string());
            let of_panel = |r: &&&Row| r.metric == *metric && nodes_are(r);
            let rows: Vec<&Row> = shown.iter().filter(of_panel).copied().collect();
            let _ = writeln!(out, r#"<g transform="translate({x} {y})">"#);
            let plural = if nodes == 1 { "one node" } else { "two nodes" };
            panel(&mut out, &axes, &services, &format!("{title}, {plural}"), &rows);
            out.push_str("</g>\n");
        }
    }
    out.push_str("</svg>\n");
    Some(out)
}

fn services_of(row: &Row) -> Option<f64> {
    row.params.get("services")?.parse().ok()
}

fn style() -> String {
    let mut text = String::from(
        "<style>\n:root{color-scheme:light dark}\ntext{font:11px system-ui,sans-serif;fill:#374151}\n.title{font-size:14px;font-weight:600}\n.grid{stroke:#9ca3af;stroke-opacity:.35}\n.line{fill:none;stroke-width:2}\n.band{fill-opacity:.18}\n",
    );
    for dark in [false, true] {
        if dark {
            text.push_str("@media (prefers-color-scheme:dark){\nsvg{background:#111827}\ntext{fill:#d1d5db}\n");
        } else {
            text.push_str("svg{background:#fff}\n");
        }
        for (subject, on_light, on_dark) in SUBJECTS {
            let colour = if dark { on_dark } else { on_light };
            let _ = writeln!(text, ".{subject}{{stroke:{colour}}} .{subject}-fill{{fill:{colour};stroke:none}}");
        }
    }
    text.push_str("}\n</style>\n");
    text
}

fn panel(out: &mut String, axes: &Axes, services: &[f64], title: &str, rows: &[&Row]) {
    let right = LEFT + WIDTH;
    let _ = writeln!(out, r#"<text x="{LEFT}" y="-8">{title}</text>"#);
    for step in 0..=(axes.top * 5.0).round() as usize {
        let ratio = step as f64 / 5.0;
        let y = axes.y(ratio);
        let _ = writeln!(out, r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/>"#);
        let _ = writeln!(out, r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{ratio:.1}</text>"#, LEFT - 6.0, y + 4.0);
    }
    for n in services {
        let (x, below) = (axes.x(*n), HEIGHT + 16.0);
        let _ = writeln!(out, r#"<path class="grid" d="M{x:.1} 0V{HEIGHT}"/>"#);
        let _ = writeln!(out, r#"<text x="{x:.1}" y="{below}" text-anchor="middle">{}</text>"#, thousands(*n));
    }
    let _ = writeln!(
        out,
        r#"<text x="{:.1}" y="{}" text-anchor="middle">Services</text>"#,
        LEFT + WIDTH / 2.0,
        HEIGHT + 30.0
    );
    let mut names: Vec<(f64, &str)> = Vec::new();
    for (subject, ..) in SUBJECTS {
        let mut points: Vec<(f64, &Row)> =
            rows.iter().filter(|r| r.subject == subject).filter_map(|r| Some((services_of(r)?, *r))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let at = |of: fn(&Row) -> Option<f64>| -> Vec<String> {
            let point = |(n, row): &(f64, &Row)| Some(format!("{:.1} {:.1}", axes.x(*n), axes.y(of(row)?)));
            points.iter().filter_map(point).collect()
        };
        let (line, low, mut high) = (at(|r| r.ratio), at(|r| r.ratio_q1), at(|r| r.ratio_q3));
        let Some((_, last)) = points.last() else { continue };
        high.reverse();
        let _ = writeln!(out, r#"<path class="band {subject}-fill" d="M{}L{}Z"/>"#, low.join("L"), high.join("L"));
        let _ = writeln!(out, r#"<path class="line {subject}" d="M{}"/>"#, line.join("L"));
        for point in &line {
            let (x, y) = point.split_once(' ').unwrap_or((point, "0"));
            let _ = writeln!(out, r#"<circle class="{subject}-fill" cx="{x}" cy="{y}" r="2.5"/>"#);
        }
        names.push((axes.y(last.ratio.unwrap_or(0.0)), subject));
    }
    // Names beside the ends of their lines, one below the other where those meet.
    names.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = f64::NEG_INFINITY;
    for (y, subject) in names {
        let y = y.max(free);
        free = y + LINE;
        let _ =
            writeln!(out, r#"<text class="{subject}-fill" x="{:.1}" y="{:.1}">{subject}</text>"#, right + 8.0, y + 4.0);
    }
}

fn thousands(n: f64) -> String {
    if n >= 1000.0 { format!("{}k", n / 1000.0) } else { format!("{n}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Params;

    #[test]
    fn every_subject_has_a_line_in_every_panel_and_the_names_do_not_meet() {
        let mut rows = Vec::new();
        for (metric, _) in PANELS {
            for (subject, ..) in SUBJECTS {
                for (services, nodes) in [(1, 1), (1, 2), (30_000, 1), (30_000, 2)] {
                    let pairs = [
                        ("services", services.to_string()),
                        ("position", POSITION.to_owned()),
                        ("nodes", nodes.to_string()),
                    ];
                    let params: Params = pairs.map(|(k, v)| (k.to_owned(), v)).into();
                    let ratio = Some(0.97);
                    rows.push(Row {
                        metric: metric.into(),
                        subject: subject.into(),
                        params,
                        value: 1.0,
                        unit: "1/s".into(),
                        baseline: BASELINE.into(),
                        ratio,
                        ratio_q1: ratio,
                        ratio_q3: ratio,
                        rounds: 1,
                    });
                }
            }
        }
        let svg = svg(&rows).unwrap();
        assert_eq!(svg.matches(r#"class="line "#).count(), 16);
        let heights: Vec<f64> = svg
            .lines()
            .filter(|l| l.starts_with("<text class="))
            .take(4)
            .map(|l| l.split_once(" y=\"").unwrap().1.split('"').next().unwrap().parse().unwrap())
            .collect();
        assert!(heights.windows(2).all(|w| w[1] - w[0] >= LINE - 0.1), "{heights:?}");
        assert!(super::svg(&[]).is_none());
    }
}
