//! Who is served: signatures, nonces, credentials of a role.

use std::time::Duration;

use fairway::lab::cloud::{AccessKey, CloudConfig};
use serde_json::Value;

use crate::support::*;

#[tokio::test]
async fn only_the_holder_of_a_key_is_served_and_only_once_per_nonce() {
    let cloud = start(config());
    let region = [("RegionId", "cn-hangzhou".to_owned())];
    let code = |answer: Option<(u16, Value)>| answer.unwrap().1["Code"].as_str().unwrap_or("ok").to_owned();
    let api = "DescribeNetworkInterfaces";
    assert_eq!(code(cloud.send(&key(), api, &region).await), "ok");
    let wrong = Key { secret: "t".into(), ..key() };
    assert_eq!(code(cloud.send(&wrong, api, &region).await), "SignatureDoesNotMatch");
    let unknown = Key { id: "x".into(), ..key() };
    assert_eq!(code(cloud.send(&unknown, api, &region).await), "InvalidAccessKeyId.NotFound");
    let token = Key { token: Some("invented".into()), ..key() };
    assert_eq!(code(cloud.send(&token, api, &region).await), "InvalidSecurityToken.Malformed");
    let (head, body) = signed(&key(), api, &region, false);
    let address = cloud.running.http.unwrap();
    let (first, _) = exchange(address, head.clone(), body.as_bytes()).await.unwrap();
    let (_, second) = exchange(address, head, body.as_bytes()).await.unwrap();
    assert!(first == 200 && second.contains("SignatureNonceUsed"));
    let (head, body) = signed(&key(), api, &region, true);
    assert_eq!(exchange(address, head, body.as_bytes()).await.unwrap().0, 200, "parameters in a form");
    let unsigned = "GET /?Action=DescribeVSwitches&Version=2016-04-28 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    assert!(exchange(address, unsigned.into(), b"").await.unwrap().1.contains("IncompleteSignature"));
    // What nobody signed is nobody's call.
    assert_eq!(cloud.running.cloud.calls(0).total, 3);
}

#[tokio::test]
async fn requests_recorded_from_the_official_sdk_are_known_but_too_old() {
    let cloud =
        start(CloudConfig { keys: vec![AccessKey { id: "testid".into(), secret: "testsecret".into() }], ..config() });
    let recorded: Value =
        serde_json::from_str(include_str!("../testdata/lab_cloud/alibaba-sdk-requests.json")).unwrap();
    let mut asked = 0;
    for request in recorded["requests"].as_array().unwrap() {
        let mut head = format!(
            "{} {} HTTP/1.1\r\nconnection: close\r\n",
            request["method"].as_str().unwrap(),
            request["path"].as_str().unwrap()
        );
        for pair in request["headers"].as_array().unwrap() {
            head.push_str(&format!("{}: {}\r\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
        }
        head.push_str("\r\n");
        let (_, body) = exchange(cloud.running.http.unwrap(), head, b"").await.unwrap();
        let code = serde_json::from_str::<Value>(&body).unwrap()["Code"].as_str().unwrap().to_owned();
        let private_zone = request["headers"].to_string().contains("2018-01-01");
        let want = if private_zone { "InvalidAction.NotFound" } else { "InvalidTimeStamp.Expired" };
        assert_eq!(code, want, "{}", request["call"]);
        asked += 1;
    }
    assert_eq!(asked, 16);
}

#[tokio::test]
async fn role_credentials_sign_until_they_expire() {
    let cloud = start(CloudConfig { sts_lifetime_seconds: 1, ..config() });
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g6.xlarge")).await.unwrap();
    let (_, role) = cloud.meta("GET", "/latest/meta-data/ram/security-credentials/", "").await;
    let path = format!("/latest/meta-data/ram/security-credentials/{role}");
    let (_, text) = cloud.meta("GET", &path, "").await;
    let given: Value = serde_json::from_str(&text).unwrap();
    let text = |name: &str| given[name].as_str().unwrap().to_owned();
    assert_eq!(text("Code"), "Success");
    let key = Key { id: text("AccessKeyId"), secret: text("AccessKeySecret"), token: Some(text("SecurityToken")) };
    let region = [("RegionId", "cn-hangzhou".to_owned())];
    let (status, _) = cloud.send(&key, "DescribeNetworkInterfaces", &region).await.unwrap();
    assert_eq!(status, 200);
    assert_eq!(cloud.running.cloud.calls(0).calls[0].instance.as_deref(), Some("i-1"));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (_, refused) = cloud.send(&key, "DescribeNetworkInterfaces", &region).await.unwrap();
    assert_eq!(refused["Code"], "InvalidSecurityToken.Expired");
}
