//! Tests of `convert`: what absent and empty lists mean, and what is refused.

use serde_json::{Value, json};

use super::*;

fn read(spec: Value) -> Result<Policy, Refused> {
    let object = json!({"metadata": {"namespace": "a", "name": "p"}, "spec": spec});
    policy(&serde_json::from_value(object).unwrap(), &mut Shared::default())
}

fn why(spec: Value) -> String {
    read(spec).unwrap_err().to_string()
}

#[test]
fn types_default_as_the_api_says() {
    let directions = |spec: Value| {
        let policy = read(spec).unwrap();
        (policy.ingress.map(|r| r.len()), policy.egress.map(|r| r.len()))
    };
    assert_eq!(directions(json!({"podSelector": {}})), (Some(0), None));
    assert_eq!(directions(json!({"podSelector": {}, "egress": []})), (Some(0), None));
    assert_eq!(directions(json!({"podSelector": {}, "egress": [{}]})), (Some(0), Some(1)));
    assert_eq!(directions(json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]})), (None, Some(0)));
    assert_eq!(directions(json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})), (Some(0), Some(0)));
}

#[test]
fn an_absent_selector_is_not_an_empty_one() {
    let from = |peer: Value| read(json!({"podSelector": {}, "ingress": [{"from": [peer]}]})).unwrap();
    let peers = |policy: Policy| policy.ingress.unwrap()[0].peers.clone();
    let empty = Selector::default;
    assert_eq!(
        peers(from(json!({"podSelector": {}}))).unwrap()[0],
        Peer::Pods { namespaces: None, pods: empty() },
        "all pods here"
    );
    assert_eq!(
        peers(from(json!({"namespaceSelector": {}}))).unwrap()[0],
        Peer::Pods { namespaces: Some(empty()), pods: empty() },
        "all pods everywhere"
    );
    for anybody in [json!({}), json!({"from": []}), json!({"from": null, "ports": []})] {
        let policy = read(json!({"podSelector": {}, "ingress": [anybody]})).unwrap();
        assert_eq!(policy.ingress.unwrap()[0], Rule { peers: None, ports: None });
    }
}

#[test]
fn ports_are_numbers_ranges_and_names() {
    let port = |port: Value| {
        let policy = read(json!({"podSelector": {}, "ingress": [{"ports": [port]}]}));
        policy.map(|p| p.ingress.unwrap()[0].ports.clone().unwrap()[0].clone())
    };
    let is = |protocol, at| Ok(Port { protocol, at });
    assert_eq!(port(json!({})), is(Protocol::Tcp, PortAt::Any));
    assert_eq!(port(json!({"protocol": "UDP", "port": 53})), is(Protocol::Udp, PortAt::Range(53, 53)));
    assert_eq!(port(json!({"port": 1, "endPort": 65535})), is(Protocol::Tcp, PortAt::Range(1, 65535)));
    assert_eq!(port(json!({"protocol": "SCTP", "port": "x"})), is(Protocol::Sctp, PortAt::Named("x".into())));
    for (bad, word) in [
        (json!({"port": 0}), "no port"),
        (json!({"port": 70000}), "no port"),
        (json!({"port": 80, "endPort": 79}), "below"),
        (json!({"port": "http", "endPort": 90}), "by number"),
        (json!({"endPort": 90}), "by number"),
        (json!({"protocol": "ICMP"}), "none of TCP"),
        (json!({"port": ""}), "no name"),
    ] {
        let error = port(bad.clone()).unwrap_err().to_string();
        assert!(error.contains(word) && error.starts_with("ingress[0]"), "{bad}: {error}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_its_place() {
    let egress = |peer: Value| json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}, {"to": [peer]}]});
    for (spec, words) in [
        (json!({"podSelector": {}, "policyTypes": ["Both"]}), "Both"),
        (egress(json!({})), "egress[1]: a peer has neither"),
        (egress(json!({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}})), "selectors as well"),
        (egress(json!({"ipBlock": {"cidr": "10.0.0.0"}})), "no range"),
        (egress(json!({"ipBlock": {"cidr": "::ffff:10.0.0.0/104"}})), "IPv6 clothes"),
        (egress(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}})), "does not lie"),
        (
            egress(json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": []}]}})),
            "no values",
        ),
        (
            egress(json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}})),
            "does not take",
        ),
        (
            egress(json!({"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Like"}]}})),
            "namespaceSelector: operator",
        ),
    ] {
        let error = why(spec.clone());
        assert!(error.contains(words), "{spec}: {error}");
    }
    let many: Vec<Value> = (0..=MAX_RULES).map(|_| json!({})).collect();
    assert!(why(json!({"podSelector": {}, "ingress": many})).contains("more than"));
}

#[test]
fn a_pod_is_its_addresses_labels_and_named_ports() {
    let object = json!({
        "metadata": {"namespace": "a", "name": "x", "labels": {"app": "web"}},
        "spec": {
            "initContainers": [
                {"name": "once", "ports": [{"containerPort": 1, "name": "once"}]},
                {"name": "proxy", "restartPolicy": "Always", "ports": [{"containerPort": 15001, "name": "proxy"}]},
            ],
            "containers": [{"name": "c", "ports": [
                {"containerPort": 8080, "name": "http"}, {"containerPort": 53, "name": "dns", "protocol": "UDP"},
                {"containerPort": 9},
            ]}],
        },
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
    });
    let mut shared = Shared::default();
    let mut read = |object: &Value| pod(&serde_json::from_value(object.clone()).unwrap(), &mut shared);
    let it = read(&object).unwrap().unwrap();
    assert_eq!(it.ips.iter().map(IpAddr::to_string).collect::<Vec<_>>(), ["10.0.0.1", "fd00::1"]);
    let ports: Vec<_> = it.ports.iter().map(|p| (&*p.name, p.protocol, p.port)).collect();
    assert_eq!(ports, [("dns", Protocol::Udp, 53), ("http", Protocol::Tcp, 8080), ("proxy", Protocol::Tcp, 15001)]);
    let again = read(&object).unwrap().unwrap();
    assert!(Arc::ptr_eq(&it.labels, &again.labels) && Arc::ptr_eq(&it.ports, &again.ports), "kept once");
    for (at, value) in [("/status/phase", json!("Succeeded")), ("/spec/hostNetwork", json!(true))] {
        let mut other = object.clone();
        other["spec"]["hostNetwork"] = json!(false);
        *other.pointer_mut(at).unwrap() = value;
        assert_eq!(read(&other).unwrap(), None, "{at}");
    }
    let mut bad = object;
    bad["status"]["podIP"] = json!("10.0.0");
    assert!(read(&bad).unwrap_err().to_string().contains("no IP address"));
}
