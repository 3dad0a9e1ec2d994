//! `fairway status` and `fairway trace`: the debug endpoint for a terminal.

pub mod client;
mod policy;
mod services;
pub mod trace;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::Value;

use crate::debug::Listen;
use crate::pool::audit::AuditReport;
use crate::pool::snapshot::PoolSnapshot;
use client::{StatusError, get};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
}

/// What to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Section {
    /// The node at a glance, its ENIs and its pods.
    #[default]
    Summary,
    /// Every actor: state, mailbox, restarts, latencies.
    Actors,
    /// ENIs with their addresses, queues and load.
    Enis,
    /// Addresses with their states and owners.
    Addresses,
    /// Pods' devices: programs, packets and bytes.
    Endpoints,
    /// Cloud calls by API and outcome.
    Cloud,
    /// Services: how many are carried, how full the maps are, what is wrong.
    Services,
    /// NetworkPolicies: what is in force, how often each rule let somebody through.
    Policy,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  fairway status\n  fairway status enis\n  fairway status addresses -o json\n  fairway status services\n  fairway status policy\n  fairway status --audit       compare ledger, cloud, kernel and cluster by fresh reads"
)]
pub struct Args {
    #[arg(value_enum, default_value_t)]
    section: Section,
    /// Compare ledger, cloud, kernel and cluster by fresh reads; exit code 1 when they differ.
    #[arg(long)]
    audit: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// The agent's debug endpoint: an address, or the path of a Unix socket.
    #[arg(long, default_value = "127.0.0.1:9471", env = "FAIRWAY_ENDPOINT")]
    endpoint: String,
}

/// Whether the command found everything in order.
pub async fn run(args: &Args) -> Result<bool, StatusError> {
    let endpoint = parse_endpoint(&args.endpoint);
    if args.audit {
        let answer = get(&endpoint, "/debug/audit").await?;
        let report: AuditReport = read("/debug/audit", answer.clone())?;
        show(args.output, &answer, || audit(&report));
        return Ok(report.clean());
    }
    let (path, text): (&str, fn(&Value) -> Result<String, StatusError>) = match args.section {
        Section::Summary => ("/debug/pool", |v| Ok(summary(&read("/debug/pool", v.clone())?))),
        Section::Enis => ("/debug/pool", |v| Ok(enis(&read("/debug/pool", v.clone())?))),
        Section::Addresses => ("/debug/pool", |v| Ok(addresses(&read("/debug/pool", v.clone())?))),
        Section::Actors => ("/debug/actors", |v| Ok(actors(v))),
        Section::Endpoints => ("/debug/endpoints", |v| Ok(generic(v))),
        Section::Cloud => ("/debug/cloud", |v| Ok(generic(v))),
        Section::Policy => ("/debug/policies", |v| Ok(policy::table(&read("/debug/policies", v.clone())?))),
        Section::Services => ("/debug/services", |v| Ok(services::table(&read("/debug/services", v.clone())?))),
    };
    let answer = get(&endpoint, path).await?;
    let text = text(&answer)?;
    show(args.output, &answer, || text);
    Ok(true)
}

fn parse_endpoint(text: &str) -> Listen {
    text.parse::<SocketAddr>()
        .map_or_else(|_| Listen::Unix(PathBuf::from(text.trim_start_matches("unix:"))), Listen::Tcp)
}

fn read<T: serde::de::DeserializeOwned>(path: &str, value: Value) -> Result<T, StatusError> {
    serde_json::from_value(value).map_err(|e| StatusError::Unreadable(path.to_owned(), e.to_string()))
}

fn show(output: Output, value: &Value, text: impl FnOnce() -> String) {
    match output {
        Output::Json => println!("{value:#}"),
        Output::Table => print!("{}", text()),
    }
}

fn row<const N: usize>(cells: [impl ToString; N]) -> Vec<String> {
    cells.iter().map(ToString::to_string).collect()
}

fn or_dash<T: ToString>(value: &Option<T>) -> String {
    value.as_ref().map_or("-".to_owned(), T::to_string)
}

fn summary(pool: &PoolSnapshot) -> String {
    let t = &pool.totals;
    let mut out = String::new();
    let state = if pool.reconciled { "serving" } else { "reconciling ledger, cloud and kernel" };
    let _ = writeln!(out, "instance {}, {state}", pool.instance);
    let _ = writeln!(
        out,
        "addresses: {} leased, {} idle, {} cooling, {} reserved, {} coming; room for {} pods, {} of them exclusive",
        t.leased, t.idle, t.cooling, t.reserved, t.coming, t.capacity, t.exclusive_capacity
    );
    if let Some(reason) = &pool.waiting_reason {
        let _ = writeln!(out, "{} pods wait for an address: {reason}", pool.waiting);
    }
    if let Some(error) = &pool.ledger_error {
        let _ = writeln!(out, "the ledger cannot be written: {error}");
    }
    for hold in &pool.holds {
        let _ = writeln!(out, "avoided for {} s: {} ({})", hold.for_ms / 1000, hold.what, hold.reason);
    }
    let _ = write!(out, "\n{}", enis(pool));
    let mut lines = vec![row(["POD", "ADDRESS", "IPV6", "ENI", "STATE"])];
    for a in pool.addresses.iter().filter(|a| a.pod.is_some()) {
        lines.push(row([or_dash(&a.pod), a.v4.to_string(), or_dash(&a.v6), eni_name(pool, a.eni), a.state.clone()]));
    }
    if lines.len() > 1 {
        let _ = write!(out, "\n{}", columns(&lines));
    }
    out
}

fn eni_name(pool: &PoolSnapshot, key: u64) -> String {
    pool.enis.iter().find(|e| e.key == key).map_or("-".to_owned(), |e| or_dash(&e.id))
}

fn enis(pool: &PoolSnapshot) -> String {
    let mut lines = vec![row([
        "ENI",
        "DEVICE",
        "USE",
        "PHASE",
        "VSWITCH",
        "MAC",
        "ADDRESSES",
        "LEASED",
        "RX QUEUES",
        "CORES",
        "PODS/QUEUE",
    ])];
    for e in &pool.enis {
        lines.push(row([
            or_dash(&e.id),
            or_dash(&e.ifname),
            e.purpose.as_str().to_owned(),
            e.phase.clone(),
            e.vswitch.to_string(),
            or_dash(&e.mac),
            e.addresses.to_string(),
            e.leased.to_string(),
            e.rx_queues.to_string(),
            // Per queue; unspread, whichever core the device's interrupt hits.
            if e.receive_cores.is_empty() { "any".to_owned() } else { e.receive_cores.join(" | ") },
            format!("{:.1}", e.load_per_queue_milli as f64 / 1000.0),
        ]));
    }
    columns(&lines)
}

fn addresses(pool: &PoolSnapshot) -> String {
    let mut lines = vec![row(["ADDRESS", "IPV6", "ENI", "STATE", "POD", "ATTACHMENT"])];
    for a in &pool.addresses {
        lines.push(row([
            a.v4.to_string(),
            or_dash(&a.v6),
            eni_name(pool, a.eni),
            a.state.clone(),
            or_dash(&a.pod),
            or_dash(&a.attachment),
        ]));
    }
    columns(&lines)
}

fn audit(report: &AuditReport) -> String {
    let mut out = format!("{} ENIs, {} addresses, {} leases compared\n", report.enis, report.addresses, report.leases);
    for unknown in &report.unknown {
        let _ = writeln!(out, "not compared: {unknown}");
    }
    if report.findings.is_empty() {
        out.push_str("no difference found\n");
        return out;
    }
    let mut lines = vec![row(["FINDING", "WHAT", "DETAIL"])];
    lines.extend(report.findings.iter().map(|f| row([format!("{:?}", f.kind), f.what.clone(), f.detail.clone()])));
    out.push_str(&columns(&lines));
    out
}

fn actors(value: &Value) -> String {
    let mut lines = vec![row([
        "ACTOR",
        "STATE",
        "RESTARTS",
        "MAILBOX",
        "IN WORK",
        "OLDEST WAITING",
        "OK",
        "ERROR",
        "BUSY",
        "LAST RESTART",
    ])];
    for a in value.as_array().into_iter().flatten() {
        let sum = |key: &str| {
            let types = a["by_type"].as_object().into_iter().flatten();
            types.filter_map(|(_, t)| t[key].as_u64()).sum::<u64>().to_string()
        };
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        let oldest = &a["oldest_waiting"];
        lines.push(vec![
            text(&a["name"]),
            text(&a["state"]),
            text(&a["restarts"]),
            format!("{}/{}", a["depth"], a["capacity"]),
            a["in_work"].as_array().map_or(0, Vec::len).to_string(),
            if oldest.is_null() {
                "-".to_owned()
            } else {
                format!("{} {} ms", text(&oldest["message"]), oldest["age_ms"])
            },
            sum("ok"),
            sum("error"),
            sum("busy"),
            a["restart_reasons"].as_array().and_then(|r| r.last()).map_or("-".to_owned(), |r| text(&r["reason"])),
        ]);
    }
    columns(&lines)
}

/// A list of flat objects as a table; anything else as JSON.
fn generic(value: &Value) -> String {
    let Some(list) = value.as_array().filter(|l| !l.is_empty()) else { return format!("{value:#}\n") };
    let Some(first) = list[0].as_object() else { return format!("{value:#}\n") };
    let keys: Vec<&String> = first.keys().collect();
    let mut lines = vec![keys.iter().map(|k| k.replace('_', " ").to_uppercase()).collect::<Vec<_>>()];
    for item in list {
        lines.push(
            keys.iter()
                .map(|k| item[k.as_str()].as_str().map_or_else(|| item[k.as_str()].to_string(), str::to_owned))
                .collect(),
        );
    }
    columns(&lines)
}

/// Lines as a table: columns padded to their widest cell, two spaces between,
/// the first line a heading.
pub fn columns(lines: &[Vec<String>]) -> String {
    let width = |i: usize| lines.iter().filter_map(|l| l.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines.iter().map(Vec::len).max().unwrap_or(0)).map(width).collect();
    let mut out = String::new();
    for line in lines {
        let mut text = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}
