//! One effect per call, whatever happens to its answer; injected faults, throttling.

use std::time::{Duration, Instant};

use fairway::lab::cloud::{CloudConfig, Fault, FaultSpec};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::*;

#[tokio::test]
async fn a_client_token_has_one_effect() {
    let cloud = start(config());
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    let with =
        |token: &'static str, count: &'static str| [("ClientToken", token), ("SecondaryPrivateIpAddressCount", count)];
    let first = cloud.create(&with("t", "3")).await.unwrap();
    let second = cloud.create(&with("t", "3")).await.unwrap();
    assert_eq!(first["NetworkInterfaceId"], second["NetworkInterfaceId"]);
    assert_ne!(first["RequestId"], second["RequestId"]);
    assert_eq!(cloud.create(&with("t", "4")).await.unwrap_err(), "400 IdempotentParameterMismatch");
    let eni = cloud.attached(&[]).await;
    let ips = cloud.assign(&eni, &with("u", "5")).await.unwrap();
    assert_eq!(cloud.assign(&eni, &with("u", "5")).await.unwrap(), ips);
    assert_eq!(cloud.fabric.ports.lock()[&eni].v4.len(), 6);
    assert_eq!(cloud.running.cloud.state().enis.len(), 3);
}

#[tokio::test]
async fn a_lost_reply_has_its_effect_and_the_token_finds_it() {
    let cloud = start(config());
    let lose = FaultSpec::from(Fault::LostReply { status: None }).apis(&["CreateNetworkInterface"]).count(1);
    cloud.running.cloud.add_fault(lose).unwrap();
    let token = [("ClientToken", "t")];
    assert_eq!(cloud.create(&token).await.unwrap_err(), "closed");
    let made = cloud.running.cloud.state().enis;
    assert_eq!(made.len(), 1);
    assert_eq!(cloud.create(&token).await.unwrap()["NetworkInterfaceId"], made[0].id.as_str());
    let outcomes = &cloud.running.cloud.calls(0).by_api["CreateNetworkInterface"];
    assert_eq!((outcomes["lost-reply"], outcomes["ok"]), (1, 1));
    let lose = FaultSpec::from(Fault::LostReply { status: Some(500) }).count(1);
    cloud.running.cloud.add_fault(lose).unwrap();
    assert_eq!(cloud.create(&[]).await.unwrap_err(), "500 InternalError");
    assert_eq!(cloud.running.cloud.state().enis.len(), 2);
}

#[tokio::test]
async fn a_client_that_gives_up_does_not_stop_the_effect() {
    let cloud = start(CloudConfig { latency_scale: 0.2, ..config() });
    let params = [("RegionId", "cn-hangzhou"), ("VSwitchId", "vsw-lab-a"), ("SecurityGroupId", "sg-lab")];
    let params = params.map(|(k, v)| (k, v.to_owned()));
    let (head, _) = signed(&key(), "CreateNetworkInterface", &params, false);
    let mut stream = TcpStream::connect(cloud.running.http.unwrap()).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(stream);
    let end = Instant::now() + Duration::from_secs(5);
    while cloud.running.cloud.state().enis.is_empty() {
        assert!(Instant::now() < end, "the ENI was never made");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(cloud.running.cloud.calls(0).of("CreateNetworkInterface"), 1);
}

#[tokio::test]
async fn faults_are_switched_over_http_and_hit_as_said() {
    let cloud = start(config());
    let (status, made) =
        cloud.admin("POST", "/lab/faults", r#"{"fault":{"kind":"exhaust-vswitch","vswitch":"vsw-lab-a"}}"#).await;
    assert_eq!(status, 201);
    assert_eq!(cloud.create(&[]).await.unwrap_err(), "403 InvalidVSwitchId.IpNotEnough");
    let seen = cloud.ask("DescribeVSwitches", &[("VSwitchId", "vsw-lab-a")]).await.unwrap();
    assert_eq!(seen["VSwitches"]["VSwitch"][0]["AvailableIpAddressCount"], 0);
    let id = made["id"].as_u64().unwrap();
    assert_eq!(cloud.admin("DELETE", &format!("/lab/faults/{id}"), "").await.0, 200);
    cloud.create(&[]).await.unwrap();
    assert_eq!(cloud.admin("POST", "/lab/faults", r#"{"fault":{"kind":"nonsense"}}"#).await.0, 400);
    cloud.admin("POST", "/lab/faults", r#"{"fault":{"kind":"server-error","status":503},"count":1}"#).await;
    assert_eq!(cloud.create(&[]).await.unwrap_err(), "503 ServiceUnavailable");
    cloud.create(&[]).await.unwrap();
    cloud.admin("POST", "/lab/faults", r#"{"fault":{"kind":"latency","ms":300}}"#).await;
    let begun = Instant::now();
    cloud.create(&[]).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(cloud.admin("DELETE", "/lab/faults", "").await.0, 200);
    assert_eq!(cloud.admin("GET", "/lab/faults", "").await.1, json!([]));
    cloud.running.cloud.add_fault(FaultSpec::from(Fault::Down).seconds(0.4)).unwrap();
    assert_eq!(cloud.create(&[]).await.unwrap_err(), "closed");
    let end = Instant::now() + Duration::from_secs(5);
    while cloud.create(&[]).await.is_err() {
        assert!(Instant::now() < end, "the cloud did not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_account_is_throttled_over_all_its_callers() {
    let mut config = config();
    config.throttle.per_api.insert("DescribeVSwitches".into(), 5);
    let cloud = start(config);
    let mut refused = 0;
    for _ in 0..8 {
        match cloud.ask("DescribeVSwitches", &[]).await {
            Ok(_) => {}
            Err(code) => {
                assert_eq!(code, "400 Throttling.User");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 3);
    cloud.ask("DescribeNetworkInterfaces", &[]).await.unwrap();
    let (_, report) = cloud.admin("GET", "/lab/calls", "").await;
    assert_eq!(report["by_api"]["DescribeVSwitches"], json!({"ok": 5, "Throttling.User": 3}));
}
