//! Why a connection to an address goes where it goes: for `fairway trace`.
//!
//! Pure. What is said to be in the tables is read from the books, and why is
//! judged anew by the same rules that the tables were compiled by.

use std::net::{IpAddr, SocketAddr};

use fairway_ebpf_abi as abi;
use serde::{Deserialize, Serialize};

use super::book::{Book, Source};
use super::choose::{Candidate, Choice, State, Verdict, candidates};
use super::claims::Identity;
use super::compile::{Origin, SetName, compile, node_addresses};
use super::model::{Protocol, Range, ServiceName, words};
use super::place::{Installed, InstalledSet};

/// A connection to be explained.
#[derive(Clone, Debug)]
pub struct Query {
    /// In words: `pod default/web-0`.
    pub client: String,
    /// Its addresses, as far as known.
    pub client_ips: Vec<IpAddr>,
    /// From beyond the cluster's nodes and pods.
    pub outside: bool,
    pub to: SocketAddr,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub client: String,
    pub to: SocketAddr,
    pub protocol: Protocol,
    pub outcome: Outcome,
    /// The outcome and its cause, for people.
    pub summary: String,
    pub service: Option<Found>,
    pub backends: Vec<BackendLine>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// No Service: the packet goes where it is addressed to.
    NotAService,
    /// To one of the backends that are chosen.
    Balanced,
    /// Answered at once that nothing is there.
    Refused,
    /// Not answered.
    Dropped,
}

/// The frontend that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    pub service: ServiceName,
    pub port: u16,
    pub port_name: String,
    pub origin: Origin,
    /// Its number in the tables.
    pub set: u32,
    /// Only endpoints of this node.
    pub local: bool,
    pub affinity_seconds: Option<u32>,
    pub source_ranges: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendLine {
    pub addr: SocketAddr,
    pub node: Option<String>,
    pub state: State,
    pub verdict: Verdict,
    /// Its place among those that new connections choose from.
    pub slot: Option<u32>,
    /// In the tables; without a slot, its flows go on.
    pub id: Option<u32>,
}

pub fn explain(book: &Book, source: &dyn Source, query: &Query) -> Explanation {
    let key = abi::FrontendKey {
        addr: query.to.ip().into(),
        port: query.to.port().to_be(),
        protocol: query.protocol.number(),
        scope: if query.outside { abi::SCOPE_OUTSIDE } else { abi::SCOPE_INSIDE },
    };
    let mut out = Explanation {
        client: query.client.clone(),
        to: query.to,
        protocol: query.protocol,
        outcome: Outcome::NotAService,
        summary: String::new(),
        service: None,
        backends: Vec::new(),
    };
    let key = match book.claims().owner(&key) {
        None if book.node().addresses.contains(&query.to.ip()) => {
            let any = abi::FrontendKey { addr: node_addresses(query.to.is_ipv6()).into(), ..key };
            if book.claims().owner(&any).is_some() { any } else { key }
        }
        _ => key,
    };
    match book.claims().owner(&key) {
        None => out.summary = near_miss(book, &key),
        Some(owner) => found(book, source, query, &key, owner, &mut out),
    }
    out
}

/// Why nobody is there, as far as the neighbourhood tells.
fn near_miss(book: &Book, key: &abi::FrontendKey) -> String {
    let same = |f: fn(&abi::FrontendKey, &abi::FrontendKey) -> bool| {
        let mut all: Vec<_> = book.claims().iter().filter(|(k, _)| f(k, key)).collect();
        all.sort_by_key(|(k, _)| **k);
        all
    };
    let elsewhere = same(|k, key| k.addr == key.addr && k.port == key.port && k.protocol == key.protocol);
    if let Some((_, owner)) = elsewhere.first() {
        let who = if key.scope == abi::SCOPE_OUTSIDE { "from inside the cluster" } else { "from outside the cluster" };
        return format!("{} is an address of Service {} only {who}", words(key), owner.name);
    }
    let ports = same(|k, key| k.addr == key.addr && k.scope == key.scope);
    let Some((_, owner)) = ports.first() else {
        return format!("no Service has the address {}; the packet goes where it is addressed to", words(key));
    };
    let shown: Vec<String> = ports.iter().take(8).map(|(k, _)| words(k)).collect();
    format!("Service {} has the address, but not this port: {}", owner.name, shown.join(", "))
}

fn found(
    book: &Book,
    source: &dyn Source,
    query: &Query,
    key: &abi::FrontendKey,
    owner: &Identity,
    out: &mut Explanation,
) {
    let input = source.get(&owner.name);
    let installed = book.installed(&owner.name).unwrap_or(const { &Installed { sets: vec![], frontends: vec![] } });
    let entry = installed.frontends.iter().find(|(k, _)| k == key).map(|(_, f)| *f);
    let wanted = input.service.as_ref().map(|s| compile(s, &input.slices, book.node()));
    let frontend = wanted.as_ref().and_then(|w| w.frontends.iter().find(|f| f.key == *key));
    let (Some(service), Some(wanted), Some(frontend), Some(entry)) = (&input.service, &wanted, frontend, entry) else {
        let problems: Vec<_> = book.problems_of(&owner.name).iter().map(|p| p.message.clone()).collect();
        out.summary = match problems.is_empty() {
            true => format!("Service {} has it, but it is changing right now; ask again", owner.name),
            false => format!("Service {} has it, but is not carried: {}", owner.name, problems.join("; ")),
        };
        return;
    };
    let name = wanted.sets[frontend.set].name;
    let port = service.ports.iter().find(|p| (p.protocol, p.port) == (name.protocol, name.port));
    let set = installed.sets.iter().find(|s| s.id == entry.set);
    if let Some(port) = port {
        let all = candidates(&input.slices, port, name.v6, book.node());
        let choice = Choice::new(&all, book.node());
        out.backends = all.iter().map(|c| line(c, &choice, &name, set)).collect();
    }
    let ranges: Vec<&Range> = match entry.flags & abi::FRONTEND_RANGES {
        0 => Vec::new(),
        _ => set.iter().flat_map(|s| &s.ranges).collect(),
    };
    out.service = Some(Found {
        service: owner.name.clone(),
        port: name.port,
        port_name: port.map(|p| p.name.to_string()).unwrap_or_default(),
        origin: frontend.origin,
        set: entry.set,
        local: name.local,
        affinity_seconds: (entry.flags & abi::FRONTEND_AFFINITY != 0).then_some(entry.affinity_seconds),
        source_ranges: ranges.iter().map(|r| range_words(r)).collect(),
    });
    (out.outcome, out.summary) = verdict(query, owner, &entry, &name, &ranges, out.backends.len());
}

fn verdict(
    query: &Query,
    owner: &Identity,
    entry: &abi::Frontend,
    name: &SetName,
    ranges: &[&Range],
    endpoints: usize,
) -> (Outcome, String) {
    let service = &owner.name;
    let denied = |ip: &IpAddr| !ranges.iter().any(|r| r.contains((*ip).into()));
    if !ranges.is_empty() && !query.client_ips.is_empty() && query.client_ips.iter().all(denied) {
        return (Outcome::Dropped, format!("the client is in none of the source ranges of Service {service}"));
    }
    if entry.count > 0 {
        let local = if name.local { " on this node" } else { "" };
        let summary = format!("Service {service}: one of {} backends{local}, {endpoints} endpoints known", entry.count);
        return (Outcome::Balanced, summary);
    }
    let what = match (endpoints, name.local) {
        (0, _) => "it has no endpoints",
        (_, true) => "its traffic policy is Local, and none of its endpoints on this node can be used",
        (_, false) => "none of its endpoints can be used",
    };
    match entry.flags & abi::FRONTEND_SILENT {
        0 => (Outcome::Refused, format!("Service {service}: {what}; the connection is refused")),
        _ => (Outcome::Dropped, format!("Service {service}: {what}; others have some, so nothing is answered here")),
    }
}

fn line(c: &Candidate<'_>, choice: &Choice<'_>, name: &SetName, set: Option<&InstalledSet>) -> BackendLine {
    let is = |b: &abi::Backend| IpAddr::from(b.addr) == c.addr && u16::from_be(b.port) == c.port;
    let slot = set.and_then(|s| s.slots.iter().position(is));
    BackendLine {
        addr: SocketAddr::new(c.addr, c.port),
        node: c.node.map(str::to_owned),
        state: c.state,
        verdict: if name.local { choice.local(c) } else { choice.cluster(c) },
        slot: slot.and_then(|s| u32::try_from(s).ok()),
        id: set.and_then(|s| s.backends().find(|b| is(b)).map(|b| b.id)),
    }
}

fn range_words(range: &Range) -> String {
    let bits = if range.key.addr.is_v4() { range.prefix.saturating_sub(128) } else { range.prefix.saturating_sub(32) };
    format!("{}/{bits}", IpAddr::from(range.key.addr))
}
