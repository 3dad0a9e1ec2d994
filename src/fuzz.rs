//! Doors for `fuzz/targets`: what reads outside input and is private to its module.
//!
//! Purpose: a parser stays private and can still be fuzzed. Nothing here is
//! called by the agent or the lab, and nothing here decides anything: each
//! function passes bytes on and gives back what a target can hold them to.

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use crate::lab::cloud::{params, read_all, signature};
use crate::lab::kube::http::{negotiate, route};
use crate::lab::kube::kind::KINDS;
use crate::lab::kube::registry::{Ctx, DeleteOptions, PatchKind, Registry, Sub, Validation};
use crate::lab::kube::{KubeConfig, object};
use crate::pool::ledger::{Write, tail};

/// The spelling that this module gives a pin directory's name, if it is one.
pub fn pin_name(name: &str) -> Option<String> {
    crate::datapath::pins::respelled(name)
}

/// A datagram of the kernel's answers, and all that is read from each.
pub fn netlink(datagram: &[u8]) {
    for message in crate::netns::nl::messages(datagram) {
        crate::netns::read::everything(&message);
    }
}

/// The alias of a host link, read by the link whose alias it would be.
pub fn link_note(link: &str, alias: &str) -> Option<crate::netns::Attached> {
    crate::netns::note::read("fw", link, alias)
}

/// The name of the host link of an attachment.
pub fn host_link(attachment: &crate::model::AttachmentId) -> String {
    crate::netns::names::link_names("fw", attachment).host
}

/// The ledger's tail as a disk gives it back, and how much of it is whole.
pub fn ledger_tail(bytes: &[u8], number: u64) -> (Vec<Write>, usize) {
    tail::read(bytes, number)
}

/// A frame of the tail with this body, as if we had written it.
pub fn ledger_frame(number: u64, body: &[u8]) -> Vec<u8> {
    tail::frame(number, body)
}

/// The frame of these writes.
pub fn ledger_written(number: u64, writes: &[Write]) -> Vec<u8> {
    tail::encode(writes).map(|body| tail::frame(number, &body)).unwrap_or_default()
}

/// A receive queue's cores as sysfs writes them: masks there and back, and lists.
pub fn cores(text: &str) -> (Vec<u32>, Vec<u32>) {
    crate::netns::queues::read_back(text)
}

/// Whether the debug endpoint answers a request with this Host header.
pub fn is_local(host: &str) -> bool {
    crate::debug::routes::is_local(host)
}

/// The counters of the lab's router, as nft prints them.
pub fn nft_counters(json: &str) -> bool {
    crate::lab::vpc::nft::parse_counters(json).is_ok()
}

/// A request to the simulated cloud, up to the point where something happens.
pub fn cloud_request(headers: &[(&str, &str)], query: &str, body: &[u8]) {
    let headers = header_map(headers);
    if let Ok(claim) = signature::Claim::read(&headers) {
        let request = signature::Request { method: "POST", path: "/", query, headers: &headers, body };
        let _ = claim.check_date(0).and(claim.verify(request, "secret"));
    }
    let text = std::str::from_utf8(body).unwrap_or_default();
    let pairs = params::decode_pairs(query).and_then(|mut pairs| {
        pairs.extend(params::decode_pairs(text)?);
        Ok(pairs)
    });
    let _ = pairs.and_then(params::Params::new).and_then(|params| read_all(&params));
}

/// A request to the Kubernetes stand-in before its object is looked at.
pub fn kube_request(path: &str, query: &str, accept: &str) {
    let _ = route::parse(path);
    if let Ok(query) = negotiate::Query::parse(query) {
        let _ = query.revision();
    }
    let _ = negotiate::view(&header_map(&[("accept", accept)]));
}

/// What a body says; a patch when its type is one's.
pub fn kube_body(content_type: &str, body: &[u8]) -> Option<(Option<PatchKind>, Value)> {
    let headers = header_map(&[("content-type", content_type)]);
    if let Ok((kind, patch)) = negotiate::patch(&headers, true, body) {
        return Some((Some(kind), patch));
    }
    negotiate::body(&headers, body).ok().map(|value| (None, value))
}

/// Creates an object of the kind it names and changes it: defaults, validation,
/// all four patches, deletion. The object as it is after each step.
pub fn kube_write(created: &Value, patch: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let word = |key: &str| created.get(key).and_then(Value::as_str).unwrap_or_default();
    let Some(kind) = KINDS.iter().find(|k| k.kind == word("kind") && k.api_version() == word("apiVersion")) else {
        return Vec::new();
    };
    let registry = Registry::new(&KubeConfig::default());
    let ctx = Ctx { now, validation: Validation::Ignore, ..Ctx::new("fuzz") };
    let namespace = if kind.namespaced { "default" } else { "" };
    let space = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}});
    let _ = registry.create(&ctx, crate::lab::kube::kind::named("Namespace"), "", space);
    let Ok(written) = registry.create(&ctx, kind, namespace, created.clone()) else { return Vec::new() };
    let name = object::name(&written.object).to_owned();
    let mut seen = vec![(*written.object).clone()];
    let kinds =
        [PatchKind::Json, PatchKind::Merge, PatchKind::Strategic, PatchKind::Apply(false), PatchKind::Apply(true)];
    for how in kinds {
        if let Ok(written) = registry.patch(&ctx, kind, (namespace, &name), Sub::Main, how, patch) {
            seen.push((*written.object).clone());
        }
    }
    if let Ok(options) = DeleteOptions::from_body(patch) {
        let _ = registry.delete(&ctx, kind, namespace, &name, &options);
    }
    seen
}

fn header_map(headers: &[(&str, &str)]) -> HeaderMap {
    let read = |(name, value): &(&str, &str)| {
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_str(value).ok()?))
    };
    headers.iter().filter_map(read).collect()
}
