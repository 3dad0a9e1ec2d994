//! ENIs and addresses: their lives, refusals and answers.

use std::collections::BTreeSet;

use fairway::lab::cloud::{CloudConfig, Fault, FaultSpec};
use serde_json::Value;

use crate::support::*;

#[tokio::test]
async fn an_eni_lives_from_creation_to_deletion() {
    let cloud = start(config());
    let registered = cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    assert_eq!(registered.primary.queues, 8);
    let made = cloud
        .create(&[
            ("SecondaryPrivateIpAddressCount", "9"),
            ("Ipv6AddressCount", "2"),
            ("Tag.1.Key", "owner"),
            ("Tag.1.Value", "n1"),
        ])
        .await
        .unwrap();
    assert_eq!(made["PrivateIpSets"]["PrivateIpSet"].as_array().unwrap().len(), 10);
    assert_eq!(made["Status"], "Available");
    let eni = made["NetworkInterfaceId"].as_str().unwrap();
    let on_instance = [("NetworkInterfaceId", eni), ("InstanceId", "i-1")];
    cloud.ask("AttachNetworkInterface", &on_instance).await.unwrap();
    cloud.until(eni, "InUse").await;
    assert_eq!(cloud.fabric.ports.lock()[eni].queues, 8);
    assert_eq!(cloud.assign(eni, &[("SecondaryPrivateIpAddressCount", "20")]).await.unwrap().len(), 20);
    cloud.assert_fabric_agrees();
    let six =
        cloud.ask("AssignIpv6Addresses", &[("NetworkInterfaceId", eni), ("Ipv6AddressCount", "3")]).await.unwrap();
    let six = six["Ipv6Sets"]["Ipv6Address"][1].as_str().unwrap().to_owned();
    cloud.ask("UnassignIpv6Addresses", &[("NetworkInterfaceId", eni), ("Ipv6Address.1", &six)]).await.unwrap();
    let four = cloud.fabric.ports.lock()[eni].v4[3].to_string();
    cloud
        .ask("UnassignPrivateIpAddresses", &[("NetworkInterfaceId", eni), ("PrivateIpAddress.1", &four)])
        .await
        .unwrap();
    cloud.assert_fabric_agrees();
    assert_eq!(
        cloud.ask("DeleteNetworkInterface", &on_instance[..1]).await.unwrap_err(),
        "400 InvalidOperation.InvalidEniState"
    );
    cloud.ask("DetachNetworkInterface", &on_instance).await.unwrap();
    cloud.until(eni, "Available").await;
    cloud.assert_fabric_agrees();
    cloud.ask("DeleteNetworkInterface", &on_instance[..1]).await.unwrap();
    assert_eq!(cloud.status(eni).await, "gone");
    cloud.running.cloud.remove_instance("i-1").await.unwrap();
    assert!(cloud.fabric.ports.lock().is_empty());
    let state = cloud.running.cloud.state();
    assert!(state.enis.is_empty() && state.vswitches.iter().all(|v| v.available == v.capacity));
    cloud.running.shutdown().await;
}

#[tokio::test]
async fn refusals_carry_the_real_codes() {
    let cloud = start(config());
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g6.xlarge")).await.unwrap();
    let eni = cloud.attached(&[]).await;
    let assign = |more| cloud.assign(&eni, more);
    for (more, want) in [
        (&[("SecondaryPrivateIpAddressCount", "10")][..], "403 InvalidOperation.Ipv4CountExceeded"),
        (&[("SecondaryPrivateIpAddressCount", "0")], "400 InvalidParameter.SecondaryPrivateIpAddressCount"),
        (&[("SecondaryPrivateIpAddressCount", "x")], "400 InvalidParameter.SecondaryPrivateIpAddressCount"),
        (
            &[("SecondaryPrivateIpAddressCount", "1"), ("PrivateIpAddress.1", "10.0.0.9")],
            "400 InvalidParameter.Conflict",
        ),
        (&[("PrivateIpAddress.1", "10.9.0.9")], "403 InvalidVSwitchId.IpInvalid"),
        (&[("PrivateIpAddress.1", "10.0.15.253")], "403 InvalidVSwitchId.IpInvalid"),
        (&[("Ipv4PrefixCount", "1")], "400 UnsupportedParameter"),
        (&[], "400 MissingParameter.SecondaryPrivateIpAddressCount"),
    ] {
        assert_eq!(assign(more).await.unwrap_err(), want, "{more:?}");
    }
    for (more, want) in [
        (&[("SecondaryPrivateIpAddressCount", "50")][..], "400 InvalidParameter.SecondaryPrivateIpAddressCount"),
        (&[("Ipv6AddressCount", "11")], "400 InvalidParameter.Ipv6AddressCount"),
        (&[("SecurityGroupIds.1", "sg-lab")], "400 InvalidParameter.Conflict"),
        (&[("InstanceType", "Trunk")], "400 UnsupportedParameter"),
        (&[("QueueNumber", "0")], "400 InvalidParameter.QueueNumber"),
        (&[("Description", "http://x")], "400 InvalidParameter.Description"),
        (&[("ClientToken", &"x".repeat(65))], "400 InvalidParameter.ClientToken"),
        (&[("Tag.1.Key", "a"), ("Tag.2.Key", "a")], "400 Duplicate.TagKey"),
    ] {
        assert_eq!(cloud.create(more).await.unwrap_err(), want, "{more:?}");
    }
    let unknown = ("NetworkInterfaceId", "eni-none");
    for (api, params, want) in [
        ("DeleteNetworkInterface", vec![unknown], "404 InvalidEniId.NotFound"),
        ("DeleteNetworkInterface", vec![], "400 MissingParameter.NetworkInterfaceId"),
        (
            "AttachNetworkInterface",
            vec![("NetworkInterfaceId", &eni), ("InstanceId", "i-1")],
            "400 InvalidOperation.InvalidEniState",
        ),
        (
            "DetachNetworkInterface",
            vec![("NetworkInterfaceId", &eni), ("InstanceId", "i-2")],
            "404 InvalidEcsId.NotFound",
        ),
        (
            "UnassignPrivateIpAddresses",
            vec![("NetworkInterfaceId", &eni), ("PrivateIpAddress.1", "10.0.0.77")],
            "403 InvalidIp.IpUnassigned",
        ),
        ("DescribeInstanceTypes", vec![("InstanceTypes.1", "ecs.none")], "404 InvalidInstanceType.NotFound"),
        ("RunInstances", vec![], "404 InvalidAction.NotFound"),
    ] {
        assert_eq!(cloud.ask(api, &params).await.unwrap_err(), want, "{api} {params:?}");
    }
    let primary = cloud.running.cloud.instances()[0].primary_eni.clone();
    let detach = [("NetworkInterfaceId", primary.as_str()), ("InstanceId", "i-1")];
    assert_eq!(
        cloud.ask("DetachNetworkInterface", &detach).await.unwrap_err(),
        "400 InvalidOperation.DetachPrimaryEniNotAllowed"
    );
    cloud.attached(&[]).await;
    let fourth = cloud.eni(&[]).await;
    let attach = [("NetworkInterfaceId", fourth.as_str()), ("InstanceId", "i-1")];
    assert_eq!(cloud.ask("AttachNetworkInterface", &attach).await.unwrap_err(), "403 EniPerInstanceLimitExceeded");
    let other_zone = cloud
        .ask("CreateNetworkInterface", &[("VSwitchId", "vsw-lab-b"), ("SecurityGroupIds.1", "sg-lab")])
        .await
        .unwrap();
    cloud.running.cloud.register_instance(&node("i-2", "ecs.g6.xlarge")).await.unwrap();
    let attach = [("NetworkInterfaceId", other_zone["NetworkInterfaceId"].as_str().unwrap()), ("InstanceId", "i-2")];
    assert_eq!(
        cloud.ask("AttachNetworkInterface", &attach).await.unwrap_err(),
        "403 InvalidOperation.AvailabilityZoneMismatch"
    );
    cloud.assert_fabric_agrees();
}

#[tokio::test]
async fn changes_of_one_eni_at_a_time_conflict() {
    let cloud = start(CloudConfig { latency_scale: 0.2, ..config() });
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    let primary = cloud.running.cloud.instances()[0].primary_eni.clone();
    let one = [("SecondaryPrivateIpAddressCount", "1")];
    let (a, b) = tokio::join!(cloud.assign(&primary, &one), cloud.assign(&primary, &one));
    let mut codes: Vec<String> = [a, b].into_iter().filter_map(Result::err).collect();
    assert_eq!(codes.pop().as_deref(), Some("403 Operation.Conflict"));
    assert!(codes.is_empty(), "the other one succeeds");
    cloud.assert_fabric_agrees();
}

#[tokio::test]
async fn an_attachment_that_fails_leaves_the_eni_available() {
    let cloud = start(config());
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    cloud.running.cloud.add_fault(FaultSpec::from(Fault::AttachFails).count(1)).unwrap();
    let eni = cloud.eni(&[]).await;
    let attach = [("NetworkInterfaceId", eni.as_str()), ("InstanceId", "i-1")];
    cloud.ask("AttachNetworkInterface", &attach).await.unwrap();
    cloud.until(&eni, "Available").await;
    cloud.assert_fabric_agrees();
    cloud.ask("AttachNetworkInterface", &attach).await.unwrap();
    cloud.until(&eni, "InUse").await;
    cloud.fabric.fail.lock().insert("set_addresses");
    assert_eq!(cloud.assign(&eni, &[("SecondaryPrivateIpAddressCount", "2")]).await.unwrap_err(), "500 InternalError");
    cloud.fabric.fail.lock().clear();
    assert_eq!(cloud.running.cloud.state().fabric_errors.len(), 1);
    let held = cloud.running.cloud.state().enis.into_iter().find(|e| e.id == eni).unwrap().v4.len();
    assert_eq!(held, 1, "what the packet side refused is not assigned");
}

#[tokio::test]
async fn every_eni_is_on_exactly_one_page() {
    let cloud = start(config());
    for n in 0..25 {
        cloud.eni(&[("Tag.1.Key", "n"), ("Tag.1.Value", if n < 5 { "few" } else { "many" })]).await;
    }
    let mut seen = BTreeSet::new();
    let (mut token, mut pages) = (String::new(), 0);
    loop {
        let page =
            cloud.ask("DescribeNetworkInterfaces", &[("MaxResults", "10"), ("NextToken", &token)]).await.unwrap();
        let items = page["NetworkInterfaceSets"]["NetworkInterfaceSet"].as_array().unwrap();
        for item in items {
            assert!(seen.insert(item["NetworkInterfaceId"].as_str().unwrap().to_owned()));
        }
        pages += 1;
        token = page["NextToken"].as_str().unwrap().to_owned();
        if token.is_empty() {
            break;
        }
    }
    assert_eq!((seen.len(), pages), (25, 3));
    let few = cloud
        .ask("DescribeNetworkInterfaces", &[("Tag.1.Key", "n"), ("Tag.1.Value", "few"), ("PageSize", "2")])
        .await
        .unwrap();
    assert_eq!(
        (few["TotalCount"].as_u64(), few["NetworkInterfaceSets"]["NetworkInterfaceSet"].as_array().unwrap().len()),
        (Some(5), 2)
    );
    let bad = cloud.ask("DescribeNetworkInterfaces", &[("NextToken", "zz")]).await;
    assert_eq!(bad.unwrap_err(), "400 InvalidNextToken");
    let types = cloud.ask("DescribeInstanceTypes", &[("MaxResults", "3")]).await.unwrap();
    assert!(!types["NextToken"].as_str().unwrap().is_empty());
}

#[tokio::test]
async fn answers_have_the_recorded_shapes() {
    fn check(path: &str, value: &Value, shape: &Value) {
        match (value, shape) {
            (Value::Object(fields), Value::Object(known)) => {
                for (name, value) in fields {
                    let shape =
                        known.get(name).unwrap_or_else(|| panic!("{path}.{name} is no field of the real answer"));
                    check(&format!("{path}.{name}"), value, shape);
                }
            }
            (Value::Array(items), Value::Array(one)) => items.iter().for_each(|item| check(path, item, &one[0])),
            (Value::Array(items), Value::String(s)) if s == "List[str]" => {
                assert!(items.iter().all(Value::is_string), "{path}")
            }
            (value, Value::String(kind)) => {
                let fits = match kind.as_str() {
                    "str" => value.is_string(),
                    "bool" => value.is_boolean(),
                    "int" => value.is_u64(),
                    "float" => value.is_number(),
                    other => panic!("{path}: {other}"),
                };
                assert!(fits, "{path} = {value}, want {kind}");
            }
            _ => panic!("{path}: {value} against {shape}"),
        }
    }
    let shapes: Value =
        serde_json::from_str(include_str!("../testdata/lab_cloud/alibaba-response-shapes.json")).unwrap();
    let cloud = start(config());
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    let eni = cloud.attached(&[("Ipv6AddressCount", "1"), ("Tag.1.Key", "k"), ("Tag.1.Value", "v")]).await;
    let id = ("NetworkInterfaceId", eni.as_str());
    let other = cloud.eni(&[]).await;
    let instance = ("InstanceId", "i-1");
    let six = cloud.ask("AssignIpv6Addresses", &[id, ("Ipv6AddressCount", "1")]).await.unwrap();
    let address6 = six["Ipv6Sets"]["Ipv6Address"][0].as_str().unwrap().to_owned();
    check("AssignIpv6Addresses", &six, &shapes["AssignIpv6Addresses"]);
    let four = cloud.ask("AssignPrivateIpAddresses", &[id, ("SecondaryPrivateIpAddressCount", "2")]).await.unwrap();
    let address4 =
        four["AssignedPrivateIpAddressesSet"]["PrivateIpSet"]["PrivateIpAddress"][0].as_str().unwrap().to_owned();
    check("AssignPrivateIpAddresses", &four, &shapes["AssignPrivateIpAddresses"]);
    for (api, params) in [
        (
            "CreateNetworkInterface",
            vec![("VSwitchId", "vsw-lab-a"), ("SecurityGroupId", "sg-lab"), ("Ipv6AddressCount", "1")],
        ),
        ("AttachNetworkInterface", vec![("NetworkInterfaceId", other.as_str()), instance]),
        ("DescribeNetworkInterfaces", vec![]),
        ("DescribeNetworkInterfaceAttribute", vec![id]),
        ("UnassignIpv6Addresses", vec![id, ("Ipv6Address.1", &address6)]),
        ("UnassignPrivateIpAddresses", vec![id, ("PrivateIpAddress.1", &address4)]),
        ("DetachNetworkInterface", vec![id, instance]),
        ("DescribeInstanceTypes", vec![]),
        ("DescribeVSwitches", vec![]),
    ] {
        let answer = cloud.ask(api, &params).await.unwrap();
        assert!(answer["RequestId"].is_string());
        check(api, &answer, &shapes[api]);
    }
    cloud.until(&eni, "Available").await;
    check(
        "DeleteNetworkInterface",
        &cloud.ask("DeleteNetworkInterface", &[id]).await.unwrap(),
        &shapes["DeleteNetworkInterface"],
    );
}

#[tokio::test]
async fn an_error_answer_has_the_real_shape() {
    let cloud = start(config());
    let (status, body) = cloud.send(&key(), "DeleteNetworkInterface", &[]).await.unwrap();
    assert_eq!(status, 400);
    let keys: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["Code", "HostId", "Message", "Recommend", "RequestId"]);
    assert_eq!(body["HostId"], "ecs.cn-hangzhou.aliyuncs.com");
    assert_eq!(body["RequestId"].as_str().unwrap().len(), 36);
}
