//! Which slices a Service should have, and how to get there from those it has
//! with few writes. Pure.
//!
//! Invariants: at most [`MOST`] endpoints in a slice; one slice has one family
//! and one set of ports; an endpoint stays in the slice it is in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::lab::controllers::pods;
use crate::lab::kube::object::{self, flag, int, list, text};
use crate::lab::kube::validate::family;

/// Endpoints in one slice, as in a real cluster.
pub const MOST: usize = 100;

/// One endpoint, as slices hold it.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint(pub Value);

impl Endpoint {
    fn identity(value: &Value) -> (String, String) {
        let address = list(value, "/addresses").first().and_then(Value::as_str).unwrap_or("");
        (address.to_owned(), text(value, "/targetRef/uid").to_owned())
    }
}

/// All endpoints of one family with the same ports.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    pub family: String,
    pub ports: Vec<Value>,
    pub endpoints: Vec<Endpoint>,
}

/// A slice that exists.
#[derive(Clone, Debug)]
pub struct Have {
    pub name: String,
    pub family: String,
    pub ports: Vec<Value>,
    pub endpoints: Vec<Value>,
}

/// A slice to be made (no name) or changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    pub name: Option<String>,
    pub family: String,
    pub ports: Vec<Value>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub write: Vec<Slice>,
    pub delete: Vec<String>,
}

/// From the slices there are to those that are wanted.
pub fn arrange(have: &[Have], wanted: Vec<Wanted>) -> Plan {
    let mut plan = Plan::default();
    let mut used = BTreeSet::new();
    for group in wanted {
        let mut new: BTreeMap<(String, String), Endpoint> =
            group.endpoints.into_iter().map(|e| (Endpoint::identity(&e.0), e)).collect();
        let mut slices: Vec<Slice> = Vec::new();
        for slice in have.iter().filter(|s| s.family == group.family && s.ports == group.ports) {
            used.insert(slice.name.as_str());
            let kept = slice.endpoints.iter().filter_map(|old| new.remove(&Endpoint::identity(old))).collect();
            slices.push(Slice {
                name: Some(slice.name.clone()),
                family: group.family.clone(),
                ports: group.ports.clone(),
                endpoints: kept,
            });
        }
        let mut rest = new.into_values();
        for slice in &mut slices {
            let room = MOST.saturating_sub(slice.endpoints.len());
            slice.endpoints.extend(rest.by_ref().take(room));
        }
        let rest: Vec<Endpoint> = rest.collect();
        let mut chunks: Vec<Vec<Endpoint>> = rest.chunks(MOST).map(<[Endpoint]>::to_vec).collect();
        // A Service without endpoints has one empty slice, not none.
        if chunks.is_empty() && slices.is_empty() {
            chunks.push(Vec::new());
        }
        for endpoints in chunks {
            // A slice whose ports nobody wants any more may take new ones.
            let spare = have
                .iter()
                .find(|s| s.family == group.family && s.endpoints.is_empty() && !used.contains(s.name.as_str()));
            if let Some(spare) = spare {
                used.insert(spare.name.as_str());
            }
            slices.push(Slice {
                name: spare.map(|s| s.name.clone()),
                family: group.family.clone(),
                ports: group.ports.clone(),
                endpoints,
            });
        }
        let full = slices.iter().any(|slice| !slice.endpoints.is_empty());
        let mut kept_empty = false;
        for slice in slices {
            let empty = slice.endpoints.is_empty();
            match slice.name.clone() {
                Some(name) if empty && (full || kept_empty) => plan.delete.push(name),
                _ => {
                    kept_empty |= empty;
                    plan.write.push(slice);
                }
            }
        }
    }
    plan.delete.extend(have.iter().filter(|s| !used.contains(s.name.as_str())).map(|s| s.name.clone()));
    plan
}

/// The endpoints that a selector's pods make.
pub fn from_pods(service: &Value, all: &[Arc<Value>], zones: &BTreeMap<String, String>) -> Vec<Wanted> {
    let headless = text(service, "/spec/clusterIP") == "None";
    let mut wanted = Vec::new();
    for wanted_family in list(service, "/spec/ipFamilies").iter().filter_map(Value::as_str) {
        let mut groups: BTreeMap<String, Wanted> = BTreeMap::new();
        for pod in all.iter().filter(|pod| !pods::finished(pod)) {
            let Some(address) = address(pod, wanted_family) else { continue };
            let Some(ports) = ports(service, pod, headless) else { continue };
            let group = groups.entry(Value::from(ports.clone()).to_string()).or_insert_with(|| Wanted {
                family: wanted_family.to_owned(),
                ports,
                endpoints: Vec::new(),
            });
            group.endpoints.push(endpoint(service, pod, address, zones));
        }
        if groups.is_empty() {
            let empty = Wanted { family: wanted_family.to_owned(), ports: Vec::new(), endpoints: Vec::new() };
            groups.insert(String::new(), empty);
        }
        wanted.extend(groups.into_values());
    }
    wanted
}

fn address<'a>(pod: &'a Value, wanted: &str) -> Option<&'a str> {
    let ips = list(pod, "/status/podIPs").iter().map(|entry| text(entry, "/ip"));
    ips.chain([text(pod, "/status/podIP")]).find(|ip| family(ip) == Some(wanted))
}

/// The Service's ports on this pod; none when it lacks all of them.
fn ports(service: &Value, pod: &Value, headless: bool) -> Option<Vec<Value>> {
    let declared = list(service, "/spec/ports");
    let mut found = Vec::new();
    for port in declared {
        let protocol = text(port, "/protocol");
        let number = match port.get("targetPort") {
            Some(Value::String(name)) => list(pod, "/spec/containers")
                .iter()
                .chain(list(pod, "/spec/initContainers"))
                .flat_map(|c| list(c, "/ports"))
                .find(|p| text(p, "/name") == name && text(p, "/protocol") == protocol)
                .and_then(|p| int(p, "/containerPort")),
            Some(number) => number.as_i64(),
            None => int(port, "/port"),
        };
        let Some(number) = number else { continue };
        let mut entry = json!({"name": text(port, "/name"), "port": number, "protocol": protocol});
        if let Some(application) = port.get("appProtocol") {
            entry["appProtocol"] = application.clone();
        }
        found.push(entry);
    }
    let none = found.is_empty() && !(headless && declared.is_empty());
    (!none).then_some(found)
}

fn endpoint(service: &Value, pod: &Value, address: &str, zones: &BTreeMap<String, String>) -> Endpoint {
    let serving = pods::ready(pod);
    let terminating = object::deleting(pod);
    let early = flag(service, "/spec/publishNotReadyAddresses");
    let mut value = json!({
        "addresses": [address],
        "conditions": {"ready": early || (serving && !terminating), "serving": serving, "terminating": terminating},
        "targetRef": {"kind": "Pod", "namespace": object::namespace(pod), "name": object::name(pod),
                      "uid": object::uid(pod)},
    });
    let node = text(pod, "/spec/nodeName");
    if !node.is_empty() {
        value["nodeName"] = node.into();
    }
    if let Some(zone) = zones.get(node) {
        value["zone"] = zone.as_str().into();
    }
    let hostname = text(pod, "/spec/hostname");
    if !hostname.is_empty() && text(pod, "/spec/subdomain") == object::name(service) {
        value["hostname"] = hostname.into();
    }
    Endpoint(value)
}

/// Endpoints that someone wrote by hand, as slices.
pub fn from_endpoints(endpoints: &Value) -> Vec<Wanted> {
    let mut groups: BTreeMap<(String, String), Wanted> = BTreeMap::new();
    for subset in list(endpoints, "/subsets") {
        let ports: Vec<Value> = list(subset, "/ports")
            .iter()
            .map(|p| json!({"name": text(p, "/name"), "port": int(p, "/port"), "protocol": text(p, "/protocol")}))
            .collect();
        for (side, ready) in [("/addresses", true), ("/notReadyAddresses", false)] {
            for entry in list(subset, side) {
                let ip = text(entry, "/ip");
                let Some(family) = family(ip) else { continue };
                let mut value = json!({"addresses": [ip], "conditions": {"ready": ready}});
                for (field, from) in [("nodeName", "nodeName"), ("hostname", "hostname"), ("targetRef", "targetRef")] {
                    if let Some(found) = entry.get(from) {
                        value[field] = found.clone();
                    }
                }
                let key = (family.to_owned(), Value::from(ports.clone()).to_string());
                let group = groups.entry(key).or_insert_with(|| Wanted {
                    family: family.to_owned(),
                    ports: ports.clone(),
                    endpoints: Vec::new(),
                });
                group.endpoints.push(Endpoint(value));
            }
        }
    }
    groups.into_values().collect()
}

/// The same in the older form: addresses of the primary family, by ports.
pub fn subsets(service: &Value, all: &[Arc<Value>]) -> Vec<Value> {
    const MOST_ADDRESSES: usize = 1000;
    let primary = list(service, "/spec/ipFamilies").first().and_then(Value::as_str).unwrap_or("IPv4");
    let headless = text(service, "/spec/clusterIP") == "None";
    let early = flag(service, "/spec/publishNotReadyAddresses");
    #[derive(Default)]
    struct Group {
        ports: Vec<Value>,
        ready: Vec<Value>,
        not_ready: Vec<Value>,
    }
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for pod in all.iter().filter(|pod| pods::active(pod)).take(MOST_ADDRESSES) {
        let Some(ip) = address(pod, primary) else { continue };
        let Some(ports) = ports(service, pod, headless) else { continue };
        let mut entry = json!({"ip": ip, "targetRef": {"kind": "Pod", "namespace": object::namespace(pod),
                               "name": object::name(pod), "uid": object::uid(pod)}});
        let node = text(pod, "/spec/nodeName");
        if !node.is_empty() {
            entry["nodeName"] = node.into();
        }
        let group =
            groups.entry(Value::from(ports.clone()).to_string()).or_insert_with(|| Group { ports, ..Group::default() });
        if early || pods::ready(pod) {
            group.ready.push(entry);
        } else {
            group.not_ready.push(entry);
        }
    }
    groups
        .into_values()
        .map(|Group { mut ports, ready, not_ready }| {
            for port in &mut ports {
                if text(port, "/name").is_empty() {
                    object::map_mut(port, &[]).remove("name");
                }
            }
            let mut subset = json!({"ports": ports});
            if !ready.is_empty() {
                subset["addresses"] = ready.into();
            }
            if !not_ready.is_empty() {
                subset["notReadyAddresses"] = not_ready.into();
            }
            subset
        })
        .collect()
}
