//! What of an object is taken over, and what is refused with which words.

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde_json::{Value, json};

use super::*;

fn read(mut object: Value) -> Result<Option<Service>, Refused> {
    object["metadata"]["name"] = json!("web");
    object["metadata"]["namespace"] = json!("default");
    service(serde_json::from_value::<core::Service>(object).unwrap(), &mut Names::default())
}

fn spec(change: impl FnOnce(&mut Value)) -> Value {
    let mut object = json!({"metadata": {}, "spec": {
        "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
        "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
        "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    }});
    change(&mut object);
    object
}

#[test]
fn a_service_keeps_what_the_tables_need() {
    let got = read(spec(|o| {
        o["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        o["spec"]["sessionAffinity"] = json!("ClientIP");
        o["spec"]["loadBalancerSourceRanges"] = json!([" 192.0.2.1/24 ", "192.0.2.0/24"]);
        o["status"] = json!({"loadBalancer": {"ingress": [
            {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "Proxy"}, {"hostname": "lb.example.com"}]}});
    }));
    let got = got.unwrap().unwrap();
    assert_eq!(got.created, 1_767_225_600);
    assert_eq!(got.cluster_ips.len(), 2);
    assert_eq!(got.load_balancer_ips.to_vec(), ["203.0.113.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(got.source_ranges.to_vec(), ["192.0.2.0/24".parse::<IpNet>().unwrap()]);
    assert_eq!(got.affinity_seconds, Some(10_800));
    assert_eq!((got.external_local, got.internal_local), (true, false));
    assert_eq!(got.health_check_port, Some(32_000));
    assert_eq!(got.ports[0].node_port, Some(30_080));
    assert_eq!(got.ports[1].protocol, Protocol::Udp);
}

#[test]
fn what_is_not_ours_to_carry_is_not_carried() {
    let ignored = |change: fn(&mut Value)| assert_eq!(read(spec(change)), Ok(None));
    ignored(|o| o["spec"]["clusterIPs"] = json!(["None"]));
    ignored(|o| {
        o["spec"]["clusterIPs"] = json!(null);
        o["spec"]["clusterIP"] = json!("");
    });
    ignored(|o| o["spec"]["type"] = json!("ExternalName"));
    ignored(|o| o["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "mesh"}));
    ignored(|o| o["metadata"]["labels"] = json!({"service.kubernetes.io/headless": ""}));
    // What makes no difference to others is not looked at.
    ignored(|o| {
        o["metadata"]["labels"] = json!({"service.kubernetes.io/headless": ""});
        o["spec"]["ports"] = json!([{"port": 99999}]);
    });
}

#[test]
fn a_service_that_cannot_be_is_refused_with_its_reason() {
    let refused = |change: fn(&mut Value), why: &str| {
        let error = read(spec(change)).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(|o| o["spec"]["ports"][0]["port"] = json!(0), "port 0 is no port");
    refused(|o| o["spec"]["ports"][0]["port"] = json!(65_536), "port 65536");
    refused(|o| o["spec"]["ports"][0]["nodePort"] = json!(-1), "nodePort -1");
    refused(|o| o["spec"]["ports"][0]["protocol"] = json!("ICMP"), "ICMP");
    refused(|o| o["spec"]["ports"][1] = json!({"port": 80}), "port 80/TCP is there twice");
    refused(|o| o["spec"]["healthCheckNodePort"] = json!(70_000), "healthCheckNodePort 70000");
    refused(|o| o["spec"]["clusterIPs"] = json!(["10.96.0.256"]), "no IP address");
    refused(|o| o["spec"]["clusterIPs"] = json!(["::ffff:10.0.0.1"]), "IPv6 clothes");
    refused(|o| o["spec"]["externalIPs"] = json!(["127.0.0.1"]), "loopback");
    refused(|o| o["spec"]["externalIPs"] = json!(["0.0.0.0"]), "unspecified");
    refused(|o| o["spec"]["externalIPs"] = json!(["224.0.0.1"]), "not the address of one host");
    refused(|o| o["spec"]["externalIPs"] = json!(vec!["10.0.0.1"; 300]), "300 addresses");
    refused(|o| o["spec"]["loadBalancerSourceRanges"] = json!(["10.0.0.0"]), "no range");
    refused(
        |o| {
            o["spec"]["sessionAffinity"] = json!("ClientIP");
            o["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 86_401}});
        },
        "86401",
    );
}

fn read_slice(change: impl FnOnce(&mut Value)) -> Result<Option<Slice>, Refused> {
    let mut object = json!({
        "metadata": {"name": "web-1", "namespace": "default"}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "any"}],
        "endpoints": [
            {"addresses": ["10.0.0.1", "10.0.0.2"], "nodeName": "n1", "hints": {"forZones": [{"name": "a"}]}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "terminating": true}, "hints": {}},
        ],
    });
    change(&mut object);
    slice(serde_json::from_value::<discovery::EndpointSlice>(object).unwrap(), &mut Names::default())
}

#[test]
fn a_slice_keeps_addresses_conditions_and_hints() {
    let got = read_slice(|_| ()).unwrap().unwrap();
    assert_eq!(got.port("http", Protocol::Tcp), Some(8080));
    assert_eq!(got.port("http", Protocol::Udp), None);
    assert_eq!(got.port("any", Protocol::Tcp), None, "a port without a number is none");
    let [one, two] = &got.endpoints[..] else { panic!("{got:?}") };
    assert!(one.ready && one.serving && !one.terminating, "what is not said is ready");
    assert_eq!((one.addr, one.node.as_deref()), ("10.0.0.1".parse().unwrap(), Some("n1")));
    assert_eq!(&*one.hints.as_ref().unwrap().zones[0], "a");
    assert!(!two.ready && two.serving && two.terminating && two.hints.is_none());
}

#[test]
fn a_slice_that_cannot_be_is_refused_with_its_reason() {
    assert_eq!(read_slice(|o| o["addressType"] = json!("FQDN")), Ok(None));
    let refused = |change: fn(&mut Value), why: &str| {
        let error = read_slice(change).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(|o| o["addressType"] = json!("MAC"), "MAC");
    refused(|o| o["addressType"] = json!("IPv6"), "not of the slice's address type");
    refused(|o| o["endpoints"][0]["addresses"] = json!([]), "no address");
    refused(|o| o["endpoints"][0]["addresses"] = json!(["169.254.1.1"]), "link-local");
    refused(|o| o["endpoints"][0]["addresses"] = json!(["10.0.0.01"]), "no IP address");
    refused(|o| o["ports"][0]["port"] = json!(100_000), "100000");
    refused(|o| o["ports"] = json!([{"port": 1}, {"port": 2}]), "twice");
    refused(|o| o["endpoints"] = json!(vec![json!({"addresses": ["10.0.0.1"]}); 1001]), "1001 endpoints");
}

#[test]
fn a_slice_is_of_the_service_that_its_label_names() {
    let owner = |labels: Value| {
        let meta = serde_json::from_value(json!({"namespace": "default", "name": "web-1", "labels": labels})).unwrap();
        slice_owner(&meta, &mut Names::default()).map(|n| n.to_string())
    };
    assert_eq!(owner(json!({"kubernetes.io/service-name": "web"})).as_deref(), Some("default/web"));
    assert_eq!(owner(json!({})), None);
    assert_eq!(owner(json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""})), None);
}

#[test]
fn names_that_nobody_uses_are_forgotten() {
    let mut names = Names::default();
    let kept = names.name("kept");
    for n in 0..20_000 {
        names.name(&format!("n{n}"));
    }
    assert!(names.names.len() < 10_000);
    assert!(std::sync::Arc::ptr_eq(&kept, &names.name("kept")));
}
