//! `fairway trace`: where a connection goes, whether policies let it through, and why.

use std::fmt::Write as _;

use super::client::{StatusError, get};
use super::{Output, columns, or_dash, parse_endpoint, read, row, show};
use crate::agent::trace::Traced;
use crate::policy::explain::Judged;
use crate::service::explain::{Explanation, Found, Outcome};
use crate::service::model::Protocol;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  fairway trace default/web-0 10.96.0.10:53/udp\n  fairway trace default/web-0 shop/db-0:5432\n  fairway trace node 10.96.0.1:443\n  fairway trace outside=203.0.113.7 10.0.0.4:30080 -o json"
)]
pub struct Args {
    /// Who connects: a pod of this node (namespace/name), `node` for the node itself, or
    /// `outside[=address]` for somebody beyond the cluster.
    from: String,
    /// Where to: an address or a pod (namespace/name), and a port; `/udp` or `/sctp` behind
    /// it if it is not TCP.
    to: String,
    /// The same, in an option of its own.
    #[arg(long)]
    protocol: Option<Protocol>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// The agent's debug endpoint: an address, or the path of a Unix socket.
    #[arg(long, default_value = "127.0.0.1:9471", env = "FAIRWAY_ENDPOINT")]
    endpoint: String,
}

/// Whether the connection has somewhere to go.
pub async fn run(args: &Args) -> Result<bool, StatusError> {
    let (to, named) = match args.to.rsplit_once('/') {
        Some((to, word)) if word.parse::<Protocol>().is_ok() => (to, word.parse().ok()),
        _ => (args.to.as_str(), None),
    };
    let protocol = args.protocol.or(named).unwrap_or(Protocol::Tcp);
    let path = format!("/debug/trace?from={}&to={}&protocol={protocol}", escaped(&args.from), escaped(to));
    let answer = get(&parse_endpoint(&args.endpoint), &path).await?;
    let traced: Traced = read("/debug/trace", answer.clone())?;
    show(args.output, &answer, || whole(&args.from, to, protocol, &traced));
    let goes = |e: &Explanation| matches!(e.outcome, Outcome::Balanced | Outcome::NotAService);
    let passes = |all: &Vec<Judged>| all.iter().all(|judged| judged.allowed);
    Ok(traced.service.as_ref().is_none_or(goes) && traced.policies.as_ref().is_none_or(passes))
}

fn whole(from: &str, to: &str, protocol: Protocol, traced: &Traced) -> String {
    let mut out = match &traced.service {
        Some(explanation) => text(explanation),
        None => format!("{from} to {to}/{protocol}\n"),
    };
    if let Some(judged) = &traced.policies {
        out.push_str(&policies(judged));
    }
    out
}

/// Direction by direction, at each place where the connection may go.
fn policies(all: &[Judged]) -> String {
    let mut lines = vec![row(["TO", "VERDICT", "DIRECTION", "AT POD", "WHY", "POLICIES"])];
    for judged in all {
        for d in &judged.directions {
            let verdict = if d.allowed { "allowed" } else { "DENIED" };
            let policies = if d.policies.is_empty() { "-".to_owned() } else { d.policies.join(", ") };
            lines.push(row([&judged.to.to_string(), verdict, &d.direction, &d.pod, &d.why, &policies]));
        }
    }
    match lines.len() {
        1 => String::new(),
        _ => format!("\n{}", columns(&lines)),
    }
}

/// For a query: all but letters, digits and what needs no escape.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'/' | b':' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

fn text(e: &Explanation) -> String {
    let mut out = format!("{} to {}/{}\n{}\n", e.client, e.to, e.protocol, e.summary);
    if let Some(found) = &e.service {
        let _ = writeln!(out, "{}", how(found));
    }
    if !e.backends.is_empty() {
        let mut lines = vec![row(["BACKEND", "NODE", "SLOT", "ID", "WHY"])];
        for b in &e.backends {
            let draining = b.id.is_some() && b.slot.is_none();
            let why = b.verdict.words().to_owned() + if draining { "; its flows go on" } else { "" };
            lines.push(row([b.addr.to_string(), or_dash(&b.node), or_dash(&b.slot), or_dash(&b.id), why]));
        }
        let _ = write!(out, "\n{}", columns(&lines));
    }
    out
}

fn how(found: &Found) -> String {
    let name = if found.port_name.is_empty() { String::new() } else { format!(" ({})", found.port_name) };
    let origin = match found.origin {
        crate::service::compile::Origin::ClusterIp => "its cluster address",
        crate::service::compile::Origin::LoadBalancer => "its load balancer's address",
        crate::service::compile::Origin::ExternalIp => "an external address of it",
        crate::service::compile::Origin::NodePort => "its node port",
    };
    let mut out = format!("by {origin}, port {}{name}, set {}", found.port, found.set);
    if let Some(seconds) = found.affinity_seconds {
        let _ = write!(out, "; a client comes back to the same backend for {seconds} s");
    }
    if !found.source_ranges.is_empty() {
        let _ = write!(out, "; for clients in {}", found.source_ranges.join(", "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_s_name_cannot_change_the_question() {
        assert_eq!(escaped("default/web-0"), "default/web-0");
        assert_eq!(escaped("a&to=b c%"), "a%26to%3Db%20c%25");
        assert_eq!(escaped("[fd00::1]:80"), "%5Bfd00::1%5D:80");
    }
}
