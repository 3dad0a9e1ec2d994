//! Rules for Services, EndpointSlices, NetworkPolicies and Ingresses.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde_json::Value;

use super::{Issues, LABEL, PORT_NAME, is_label, is_port_name, is_subdomain, port_number, selector};
use crate::lab::kube::object::{list, text};

pub fn service(object: &Value, old: Option<&Value>, issues: &mut Issues) {
    let kind = text(object, "/spec/type");
    issues.one_of("spec.type", kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    let headless = text(object, "/spec/clusterIP") == "None";
    let ports = list(object, "/spec/ports");
    if kind == "ExternalName" {
        let name = text(object, "/spec/externalName").trim_end_matches('.');
        if !is_subdomain(name) {
            issues.required("spec.externalName", "a lowercase RFC 1123 subdomain");
        }
        return;
    }
    if ports.is_empty() && !headless {
        issues.required("spec.ports", "");
    }
    if headless && kind != "ClusterIP" {
        issues.invalid_text("spec.clusterIPs[0]", "None", &format!("may not be set to 'None' for {kind} services"));
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let place = format!("spec.ports[{index}]");
        port_number(format!("{place}.port"), port.get("port"), issues);
        let protocol = text(port, "/protocol");
        issues.one_of(format!("{place}.protocol"), protocol, &["SCTP", "TCP", "UDP"]);
        let name = text(port, "/name");
        if name.is_empty() && ports.len() > 1 {
            issues.required(format!("{place}.name"), "");
        } else if !name.is_empty() && !is_label(name) {
            issues.invalid_text(format!("{place}.name"), name, LABEL);
        }
        if ports.len() > 1 && !names.insert(name) {
            issues.duplicate(format!("{place}.name"), name);
        }
        let number = port.get("port").and_then(Value::as_i64);
        if !numbers.insert((number, protocol)) {
            issues.duplicate(place.clone(), &format!("{}/{protocol}", number.unwrap_or(0)));
        }
        match port.get("targetPort") {
            Some(Value::String(name)) if !is_port_name(name) => {
                issues.invalid_text(format!("{place}.targetPort"), name, PORT_NAME);
            }
            Some(Value::Number(_)) => port_number(format!("{place}.targetPort"), port.get("targetPort"), issues),
            _ => {}
        }
    }
    issues.one_of("spec.sessionAffinity", text(object, "/spec/sessionAffinity"), &["ClientIP", "None"]);
    for policy in ["internalTrafficPolicy", "externalTrafficPolicy"] {
        let value = text(object, &format!("/spec/{policy}"));
        if !value.is_empty() {
            issues.one_of(format!("spec.{policy}"), value, &["Cluster", "Local"]);
        }
    }
    // Its first address is a Service's identity as long as it has one.
    if let Some(old) = old
        && text(old, "/spec/type") != "ExternalName"
    {
        issues.immutable("spec.clusterIP", Some(old), object);
    }
}

pub fn endpoint_slice(object: &Value, old: Option<&Value>, issues: &mut Issues) {
    let family = text(object, "/addressType");
    issues.one_of("addressType", family, &["FQDN", "IPv4", "IPv6"]);
    issues.immutable("addressType", old, object);
    let endpoints = list(object, "/endpoints");
    if endpoints.len() > 1000 {
        issues.add(
            "endpoints",
            "FieldValueTooMany",
            format!("Too many: {}: must have at most 1000 items", endpoints.len()),
        );
    }
    if list(object, "/ports").len() > 100 {
        issues.add("ports", "FieldValueTooMany", "Too many: must have at most 100 items".into());
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let addresses = list(endpoint, "/addresses");
        if addresses.is_empty() {
            issues.required(format!("endpoints[{index}].addresses"), "must contain at least 1 address");
        }
        for address in addresses {
            let address = address.as_str().unwrap_or("");
            let fits = match family {
                "IPv4" => address.parse::<Ipv4Addr>().is_ok(),
                "IPv6" => address.parse::<Ipv6Addr>().is_ok(),
                _ => is_subdomain(address),
            };
            if !fits {
                issues.invalid_text(
                    format!("endpoints[{index}].addresses[0]"),
                    address,
                    &format!("must be a valid {family} address"),
                );
            }
        }
    }
}

pub fn policy(object: &Value, issues: &mut Issues) {
    selector(object, "spec.podSelector", issues);
    for kind in list(object, "/spec/policyTypes") {
        issues.one_of("spec.policyTypes", kind.as_str().unwrap_or(""), &["Egress", "Ingress"]);
    }
    for (direction, side) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in list(object, &format!("/spec/{direction}")).iter().enumerate() {
            let place = format!("spec.{direction}[{index}]");
            for (at, peer) in list(rule, &format!("/{side}")).iter().enumerate() {
                peer_rules(peer, &format!("{place}.{side}[{at}]"), issues);
            }
            for (at, port) in list(rule, "/ports").iter().enumerate() {
                policy_port(port, &format!("{place}.ports[{at}]"), issues);
            }
        }
    }
}

fn peer_rules(peer: &Value, place: &str, issues: &mut Issues) {
    let selectors = ["podSelector", "namespaceSelector"];
    for name in selectors {
        selector(peer, name, issues);
    }
    let selects = selectors.iter().any(|name| peer.get(*name).is_some());
    let Some(block) = peer.get("ipBlock") else {
        if !selects {
            issues.required(place, "must specify a peer");
        }
        return;
    };
    if selects {
        issues.forbidden(place, "may not specify both ipBlock and another peer");
    }
    let cidr = text(block, "/cidr");
    let Ok(net) = cidr.parse::<IpNet>() else {
        issues.invalid_text(format!("{place}.ipBlock.cidr"), cidr, "must be a valid CIDR, for example 10.9.8.0/24");
        return;
    };
    for (at, except) in list(block, "/except").iter().enumerate() {
        let except = except.as_str().unwrap_or("");
        let inside = except.parse::<IpNet>().is_ok_and(|e| net.contains(&e) && e.prefix_len() > net.prefix_len());
        if !inside {
            issues.invalid_text(
                format!("{place}.ipBlock.except[{at}]"),
                except,
                &format!("must be a strict subset of `cidr` {cidr}"),
            );
        }
    }
}

fn policy_port(port: &Value, place: &str, issues: &mut Issues) {
    issues.one_of(format!("{place}.protocol"), text(port, "/protocol"), &["SCTP", "TCP", "UDP"]);
    match port.get("port") {
        Some(Value::String(name)) if !is_port_name(name) => {
            issues.invalid_text(format!("{place}.port"), name, PORT_NAME);
        }
        Some(Value::Number(_)) => port_number(format!("{place}.port"), port.get("port"), issues),
        _ => {}
    }
    if let Some(end) = port.get("endPort").and_then(Value::as_i64) {
        match port.get("port").and_then(Value::as_i64) {
            Some(first) if (first..=65535).contains(&end) => {}
            Some(_) => issues.invalid(format!("{place}.endPort"), end, "must be between `port` and 65535"),
            None => issues.invalid(format!("{place}.endPort"), end, "may not be set without a numeric `port`"),
        }
    }
}

pub fn ingress(object: &Value, issues: &mut Issues) {
    if object.pointer("/spec/defaultBackend").is_none() && list(object, "/spec/rules").is_empty() {
        issues.invalid("spec", "{}", "either `defaultBackend` or `rules` must be specified");
    }
    for (index, rule) in list(object, "/spec/rules").iter().enumerate() {
        for (at, path) in list(rule, "/http/paths").iter().enumerate() {
            let place = format!("spec.rules[{index}].http.paths[{at}]");
            let kind = text(path, "/pathType");
            if kind.is_empty() {
                issues.required(format!("{place}.pathType"), "pathType must be specified");
            } else {
                issues.one_of(format!("{place}.pathType"), kind, &["Exact", "ImplementationSpecific", "Prefix"]);
            }
        }
    }
}

/// Whether a text is an address of this family, for the allocator too.
pub fn family(address: &str) -> Option<&'static str> {
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => Some("IPv4"),
        Ok(IpAddr::V6(_)) => Some("IPv6"),
        Err(_) => None,
    }
}
