//! Answers as recorded, as documented, damaged and made up: read in full, or
//! refused without panic.

use super::*;
use serde_json::{Value, json};

/// The recorded shape of an answer, filled with plausible values.
fn shaped(call: &str) -> Value {
    let shapes: Value =
        serde_json::from_str(include_str!("../../../../tests/testdata/cloud/alibaba-response-shapes.json")).unwrap();
    fill("", &shapes[call])
}

fn fill(key: &str, shape: &Value) -> Value {
    match shape {
        Value::Object(fields) => fields.iter().map(|(k, v)| (k.clone(), fill(k, v))).collect(),
        Value::Array(items) => items.iter().map(|item| fill(key, item)).collect(),
        Value::String(kind) => match (kind.as_str(), key) {
            ("int", _) => json!(7),
            ("bool", _) => json!(true),
            ("float", _) => json!(1.5),
            ("List[str]", _) => json!([word_for(key)]),
            _ => json!(word_for(key)),
        },
        other => other.clone(),
    }
}

fn word_for(key: &str) -> &'static str {
    match key {
        "PrivateIpAddress" => "10.0.0.5",
        "Ipv6Address" => "fd00::5",
        "MacAddress" => "00:16:3e:00:00:05",
        "CidrBlock" => "10.0.0.0/24",
        "Ipv6CidrBlock" => "fd00::/64",
        "Status" => "InUse",
        "Type" => "Secondary",
        "NextToken" => "next-1",
        "InstanceTypeId" => "ecs.g7.2xlarge",
        "NetworkInterfaceId" => "eni-5",
        "InstanceId" => "i-5",
        "VSwitchId" => "vsw-5",
        _ => "text",
    }
}

fn bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

#[test]
fn answers_of_the_recorded_shape_are_read_in_full() {
    let eni = created_eni(&bytes(&shaped("CreateNetworkInterface"))).unwrap();
    assert_eq!((eni.id.as_str(), eni.vswitch.as_str(), eni.kind), ("eni-5", "vsw-5", EniKind::Secondary));
    assert_eq!((eni.primary4, eni.ipv4.len(), eni.ipv6.len()), (Ipv4Addr::new(10, 0, 0, 5), 1, 1));
    assert_eq!((eni.tags.get("text").map(String::as_str), eni.delete_on_release), (Some("text"), true));

    let page = enis(&bytes(&shaped("DescribeNetworkInterfaces"))).unwrap();
    assert_eq!(page.next.as_deref(), Some("next-1"));
    let eni = &page.items[0];
    assert_eq!((eni.status, eni.queues), (EniStatus::InUse, Some(7)));
    assert_eq!(eni.instance.as_ref().map(InstanceId::as_str), Some("i-5"));
    assert_eq!(eni.security_groups, ["text".into()]);

    assert_eq!(assigned_ipv4(&bytes(&shaped("AssignPrivateIpAddresses"))).unwrap(), [Ipv4Addr::new(10, 0, 0, 5)]);
    assert_eq!(assigned_ipv6(&bytes(&shaped("AssignIpv6Addresses"))).unwrap().len(), 1);

    let types = bytes(&shaped("DescribeInstanceTypes"));
    let limits = instance_limits(&types, "ecs.g7.2xlarge").unwrap().unwrap();
    assert_eq!((limits.enis, limits.ipv4_per_eni, limits.ipv6_per_eni, limits.queues_per_secondary_eni), (7, 7, 7, 7));
    assert_eq!(instance_limits(&types, "ecs.other").unwrap(), None);

    let page = vswitches(&bytes(&shaped("DescribeVSwitches"))).unwrap();
    assert_eq!((page.items[0].available, page.items[0].zone.as_str()), (7, "text"));
    assert_eq!(page.items[0].cidr6, Some("fd00::/64".parse().unwrap()));
    assert_eq!(page.next, None, "7 pages of 7 hold all 7");
}

#[test]
fn the_primary_address_comes_first_and_none_is_lost_or_doubled() {
    let mut answer = shaped("DescribeNetworkInterfaces");
    answer["NetworkInterfaceSets"]["NetworkInterfaceSet"][0]["PrivateIpSets"]["PrivateIpSet"] = json!([
        {"PrivateIpAddress": "10.0.0.9", "Primary": false},
        {"PrivateIpAddress": "10.0.0.5", "Primary": true},
        {"PrivateIpAddress": "10.0.0.7", "Primary": false},
    ]);
    let eni = enis(&bytes(&answer)).unwrap().items.remove(0);
    assert_eq!(eni.ipv4, [5, 9, 7].map(|n| Ipv4Addr::new(10, 0, 0, n)));
}

#[test]
fn unknown_fields_new_words_and_nulls_are_no_error() {
    let mut answer = shaped("DescribeNetworkInterfaces");
    let eni = &mut answer["NetworkInterfaceSets"]["NetworkInterfaceSet"][0];
    eni["BrandNew"] = json!({"deep": [1, 2]});
    eni["Status"] = json!("Teleporting");
    eni["Type"] = json!("Trunk");
    for field in ["Tags", "Ipv6Sets", "Attachment", "InstanceId", "QueueNumber", "Description", "SecurityGroupIds"] {
        eni[field] = Value::Null;
    }
    answer["NextToken"] = json!("");
    let page = enis(&bytes(&answer)).unwrap();
    let eni = &page.items[0];
    assert_eq!((eni.status, eni.kind, eni.queues, page.next), (EniStatus::Unknown, EniKind::Other, None, None));
    assert!(eni.instance.is_none() && eni.tags.is_empty() && eni.ipv6.is_empty());
}

#[test]
fn what_is_used_and_makes_no_sense_fails_the_whole_listing() {
    for (field, value) in [
        ("MacAddress", json!("not-a-mac")),
        ("MacAddress", Value::Null),
        ("PrivateIpAddress", json!("10.0.0")),
        ("NetworkInterfaceId", json!("")),
        ("NetworkInterfaceId", json!("eni-1/../../x")),
        ("PrivateIpSets", json!({"PrivateIpSet": [{"PrivateIpAddress": "fd00::1"}]})),
        ("Ipv6Sets", json!({"Ipv6Set": [{"Ipv6Address": "10.0.0.1"}]})),
        ("PrivateIpSets", json!("text")),
    ] {
        let mut answer = shaped("DescribeNetworkInterfaces");
        answer["NetworkInterfaceSets"]["NetworkInterfaceSet"][0][field] = value.clone();
        assert!(enis(&bytes(&answer)).is_err(), "{field} = {value}");
    }
    for absent in [json!({}), json!({"NetworkInterfaceSets": {}}), json!({"NetworkInterfaceSets": null}), json!([])] {
        assert!(enis(&bytes(&absent)).is_err(), "an absent list is not an empty one: {absent}");
    }
    assert!(enis(b"<html>").is_err() && enis(b"").is_err());
    let empty = json!({"NetworkInterfaceSets": {"NetworkInterfaceSet": []}});
    assert!(enis(&bytes(&empty)).unwrap().items.is_empty());
}

#[test]
fn an_eni_still_being_made_hides_no_other() {
    let mut answer = shaped("DescribeNetworkInterfaces");
    let list = answer["NetworkInterfaceSets"]["NetworkInterfaceSet"].as_array_mut().unwrap();
    let mut half = list[0].clone();
    half["Status"] = json!("Creating");
    half["MacAddress"] = json!("");
    list.insert(0, half);
    assert_eq!(enis(&bytes(&answer)).unwrap().items.len(), 1);
}

#[test]
fn an_assignment_that_names_no_address_is_unreadable() {
    assert!(assigned_ipv4(br#"{"RequestId":"x"}"#).is_err());
    assert!(assigned_ipv6(br#"{"Ipv6Sets":{"Ipv6Address":[]}}"#).is_err());
}

#[test]
fn only_a_request_id_proves_that_a_call_was_made() {
    for call in ["AttachNetworkInterface", "DetachNetworkInterface", "DeleteNetworkInterface"] {
        done(&bytes(&shaped(call))).unwrap();
    }
    for body in ["", "{}", "<html>", r#"{"RequestId":""}"#, r#"{"RequestId":7}"#, "null"] {
        assert!(done(body.as_bytes()).is_err(), "{body}");
    }
}

#[test]
fn impossible_instance_limits_are_refused() {
    for field in ["EniQuantity", "EniPrivateIpAddressQuantity"] {
        for value in [json!(0), json!(1_000_000), Value::Null] {
            let mut answer = shaped("DescribeInstanceTypes");
            answer["InstanceTypes"]["InstanceType"][0][field] = value;
            assert!(instance_limits(&bytes(&answer), "ecs.g7.2xlarge").is_err());
        }
    }
}

#[test]
fn vswitch_pages_follow_the_total() {
    let mut answer = shaped("DescribeVSwitches");
    answer["PageNumber"] = json!(2);
    answer["PageSize"] = json!(50);
    answer["TotalCount"] = json!(101);
    assert_eq!(vswitches(&bytes(&answer)).unwrap().next.as_deref(), Some("3"));
    answer["TotalCount"] = json!(100);
    assert_eq!(vswitches(&bytes(&answer)).unwrap().next, None);
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_taken(body: Vec<u8>) {
        let _ = (done(&body), created_eni(&body), enis(&body), assigned_ipv4(&body), assigned_ipv6(&body));
        let _ = (instance_limits(&body, "t"), vswitches(&body));
    }

    #[test]
    fn a_damaged_answer_is_taken(at in 0usize..2_000, with: u8) {
        for call in ["CreateNetworkInterface", "DescribeNetworkInterfaces", "DescribeVSwitches"] {
            let mut body = bytes(&shaped(call));
            let at = at % body.len();
            body[at] = with;
            let _ = (created_eni(&body), enis(&body), vswitches(&body));
        }
    }
}
