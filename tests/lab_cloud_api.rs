//! The simulated cloud as a client meets it: signed requests over real sockets.
//!
//! The signer here is the test's own; `lab_cloud_sdk` drives the same server
//! with Alibaba's SDK.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fairway::lab::cloud::{
    AccessKey, CloudConfig, CloudLab, Fault, FaultSpec, Listeners, RegisterInstance, Resolver, Running,
};
use fairway::lab::fabric::{EniPort, Fabric, FabricError, NullFabric};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use ring::{digest, hmac};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A packet side that remembers, and fails on demand.
#[derive(Default)]
struct Recorder {
    ports: Mutex<BTreeMap<String, EniPort>>,
    fail: Mutex<BTreeSet<&'static str>>,
}

impl Recorder {
    fn act(
        &self,
        op: &'static str,
        eni_id: &str,
        act: impl FnOnce(&mut BTreeMap<String, EniPort>),
    ) -> Result<(), FabricError> {
        if self.fail.lock().contains(op) {
            return Err(FabricError::Failed { op, eni_id: eni_id.to_owned(), cause: "asked to fail".into() });
        }
        act(&mut self.ports.lock());
        Ok(())
    }
}

impl Fabric for Recorder {
    fn attach(&self, port: EniPort) -> BoxFuture<'_, Result<(), FabricError>> {
        let id = port.eni_id.clone();
        let done = self.act("attach", &id.clone(), |ports| drop(ports.insert(id, port)));
        Box::pin(async { done })
    }

    fn detach(&self, eni_id: &str) -> BoxFuture<'_, Result<(), FabricError>> {
        let done = self.act("detach", eni_id, |ports| drop(ports.remove(eni_id)));
        Box::pin(async { done })
    }

    fn set_addresses(
        &self,
        eni_id: &str,
        v4: Vec<Ipv4Addr>,
        v6: Vec<std::net::Ipv6Addr>,
    ) -> BoxFuture<'_, Result<(), FabricError>> {
        let done = self.act("set_addresses", eni_id, |ports| {
            let port = ports.get_mut(eni_id).unwrap();
            (port.v4, port.v6) = (v4, v6);
        });
        Box::pin(async { done })
    }
}

struct Cloud {
    running: Running,
    fabric: Arc<Recorder>,
}

#[derive(Clone)]
struct Key {
    id: String,
    secret: String,
    token: Option<String>,
}

fn key() -> Key {
    Key { id: "k".into(), secret: "s".into(), token: None }
}

fn config() -> CloudConfig {
    CloudConfig {
        keys: vec![AccessKey { id: "k".into(), secret: "s".into() }],
        latency_scale: 0.0,
        ..CloudConfig::default()
    }
}

fn local() -> Option<TcpListener> {
    Some(TcpListener::bind(("127.0.0.1", 0)).unwrap())
}

fn start(config: CloudConfig) -> Cloud {
    let fabric = Arc::new(Recorder::default());
    let listeners = Listeners {
        http: local(),
        metadata: local(),
        admin: local(),
        resolver: Resolver::Custom(Arc::new(|peer| {
            (peer.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST)).then(|| "i-1".into())
        })),
        ..Listeners::default()
    };
    let running = CloudLab::start(config, fabric.clone(), listeners).unwrap();
    Cloud { running, fabric }
}

fn node(id: &str, kind: &str) -> RegisterInstance {
    serde_json::from_value(json!({"instance_id": id, "instance_type": kind, "vswitch": "vsw-lab-a"})).unwrap()
}

/// One HTTP exchange; `None` when the connection closes without an answer.
async fn exchange(address: SocketAddr, head: String, body: &[u8]) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    stream.write_all(head.as_bytes()).await.ok()?;
    stream.write_all(body).await.ok()?;
    let mut raw = Vec::new();
    let _ = stream.read_to_end(&mut raw).await;
    let text = String::from_utf8(raw).unwrap();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| {
            if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) {
                (b as char).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

/// A signed request. `form`: parameters in the body instead of the query.
fn signed(key: &Key, api: &str, params: &[(&str, String)], form: bool) -> (String, String) {
    static NONCE: AtomicU64 = AtomicU64::new(0);
    let version = if api == "DescribeVSwitches" { "2016-04-28" } else { "2014-05-26" };
    let mut pairs: Vec<String> = params.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect();
    pairs.sort();
    let text = pairs.join("&");
    let (query, body) = if form { (String::new(), text) } else { (text, String::new()) };
    let hash = |data: &[u8]| hex::encode(digest::digest(&digest::SHA256, data));
    let date = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let nonce = format!("{}-{}", std::process::id(), NONCE.fetch_add(1, Ordering::Relaxed));
    let mut headers = vec![
        ("host", "cloud.test".to_owned()),
        ("x-acs-action", api.to_owned()),
        ("x-acs-content-sha256", hash(body.as_bytes())),
        ("x-acs-date", date),
        ("x-acs-signature-nonce", nonce),
        ("x-acs-version", version.to_owned()),
    ];
    if let Some(token) = &key.token {
        headers.insert(4, ("x-acs-security-token", token.clone()));
    }
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let lines: String = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let canonical = format!("POST\n/\n{query}\n{lines}\n{}\n{}", names.join(";"), hash(body.as_bytes()));
    let to_sign = format!("ACS3-HMAC-SHA256\n{}", hash(canonical.as_bytes()));
    let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.secret.as_bytes()), to_sign.as_bytes());
    let mut head = format!("POST /?{query} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    if form {
        head.push_str("content-type: application/x-www-form-urlencoded\r\n");
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let (id, names, signature) = (&key.id, names.join(";"), hex::encode(signature));
    head.push_str(&format!(
        "authorization: ACS3-HMAC-SHA256 Credential={id},SignedHeaders={names},Signature={signature}\r\n\r\n"
    ));
    (head, body)
}

impl Cloud {
    async fn send(&self, key: &Key, api: &str, params: &[(&str, String)]) -> Option<(u16, Value)> {
        let (head, body) = signed(key, api, params, false);
        let (status, body) = exchange(self.running.http.unwrap(), head, body.as_bytes()).await?;
        Some((status, serde_json::from_str(&body).unwrap()))
    }

    async fn ask(&self, api: &str, params: &[(&str, &str)]) -> Result<Value, String> {
        let mut all: Vec<(&str, String)> = params.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
        all.push(("RegionId", "cn-hangzhou".to_owned()));
        let (status, value) = self.send(&key(), api, &all).await.ok_or("closed")?;
        if status == 200 { Ok(value) } else { Err(format!("{status} {}", value["Code"].as_str().unwrap())) }
    }

    async fn create(&self, more: &[(&str, &str)]) -> Result<Value, String> {
        let mut params = vec![("VSwitchId", "vsw-lab-a"), ("SecurityGroupId", "sg-lab")];
        params.extend(more);
        self.ask("CreateNetworkInterface", &params).await
    }

    async fn eni(&self, more: &[(&str, &str)]) -> String {
        self.create(more).await.unwrap()["NetworkInterfaceId"].as_str().unwrap().to_owned()
    }

    async fn status(&self, eni: &str) -> String {
        let all = self.ask("DescribeNetworkInterfaces", &[("NetworkInterfaceId.1", eni)]).await.unwrap();
        all["NetworkInterfaceSets"]["NetworkInterfaceSet"][0]["Status"].as_str().unwrap_or("gone").to_owned()
    }

    async fn until(&self, eni: &str, status: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.status(eni).await != status {
            assert!(Instant::now() < end, "{eni} did not become {status}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn attached(&self, more: &[(&str, &str)]) -> String {
        let eni = self.eni(more).await;
        self.ask("AttachNetworkInterface", &[("NetworkInterfaceId", &eni), ("InstanceId", "i-1")]).await.unwrap();
        self.until(&eni, "InUse").await;
        eni
    }

    async fn assign(&self, eni: &str, more: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let mut params = vec![("NetworkInterfaceId", eni)];
        params.extend(more);
        let answer = self.ask("AssignPrivateIpAddresses", &params).await?;
        let set = &answer["AssignedPrivateIpAddressesSet"]["PrivateIpSet"]["PrivateIpAddress"];
        Ok(serde_json::from_value(set.clone()).unwrap())
    }

    async fn meta(&self, method: &str, path: &str, headers: &str) -> (u16, String) {
        let head = format!("{method} {path} HTTP/1.1\r\nhost: meta\r\nconnection: close\r\n{headers}\r\n");
        exchange(self.running.metadata.unwrap(), head, b"").await.unwrap_or((0, String::new()))
    }

    async fn admin(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: lab\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        let (status, text) = exchange(self.running.admin.unwrap(), head, body.as_bytes()).await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The packet side has exactly the attached ENIs with exactly their addresses.
    fn assert_fabric_agrees(&self) {
        let state = self.running.cloud.state();
        let attached = state.enis.iter().filter(|e| e.instance.is_some());
        let want: BTreeMap<_, _> = attached.map(|e| (e.id.clone(), (e.v4.clone(), e.v6.clone()))).collect();
        let ports = self.fabric.ports.lock();
        let have: BTreeMap<_, _> = ports.iter().map(|(id, p)| (id.clone(), (p.v4.clone(), p.v6.clone()))).collect();
        assert_eq!(have, want);
        assert_eq!(self.running.cloud.audit(), Vec::<String>::new());
    }
}

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
async fn an_error_answer_has_the_real_shape() {
    let cloud = start(config());
    let (status, body) = cloud.send(&key(), "DeleteNetworkInterface", &[]).await.unwrap();
    assert_eq!(status, 400);
    let keys: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["Code", "HostId", "Message", "Recommend", "RequestId"]);
    assert_eq!(body["HostId"], "ecs.cn-hangzhou.aliyuncs.com");
    assert_eq!(body["RequestId"].as_str().unwrap().len(), 36);
}

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
    let recorded: Value = serde_json::from_str(include_str!("testdata/lab_cloud/alibaba-sdk-requests.json")).unwrap();
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
    let shapes: Value = serde_json::from_str(include_str!("testdata/lab_cloud/alibaba-response-shapes.json")).unwrap();
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

#[tokio::test]
async fn the_metadata_service_knows_its_instance_and_lags() {
    let cloud = start(CloudConfig {
        metadata_lag_ms: 300,
        latency_scale: 1.0,
        latency: instant(),
        metadata_token_required: true,
        ..config()
    });
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    assert_eq!(cloud.meta("GET", "/latest/meta-data/instance-id", "").await.0, 401);
    assert_eq!(cloud.meta("PUT", "/latest/api/token", "").await.0, 400);
    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n";
    assert_eq!(cloud.meta("PUT", "/latest/api/token", &format!("{ttl}x-forwarded-for: 1.2.3.4\r\n")).await.0, 403);
    let (_, token) = cloud.meta("PUT", "/latest/api/token", ttl).await;
    let with = format!("X-aliyun-ecs-metadata-token: {token}\r\n");
    assert_eq!(cloud.meta("GET", "/latest/meta-data/instance-id", &with).await, (200, "i-1".into()));
    let forged = with.replace(&token[token.len() - 4..], "0000");
    assert_eq!(cloud.meta("GET", "/latest/meta-data/instance-id", &forged).await.0, 401);
    let mac = cloud.meta("GET", "/latest/meta-data/mac", &with).await.1;
    let path = format!("/latest/meta-data/network/interfaces/macs/{mac}/private-ipv4s");
    let primary = cloud.running.cloud.instances()[0].primary_eni.clone();
    let new = cloud.assign(&primary, &[("SecondaryPrivateIpAddressCount", "1")]).await.unwrap();
    let begun = Instant::now();
    assert!(!cloud.meta("GET", &path, &with).await.1.contains(&new[0]), "the metadata service is behind");
    while !cloud.meta("GET", &path, &with).await.1.contains(&new[0]) {
        assert!(begun.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
    cloud.running.cloud.add_fault(FaultSpec::from(Fault::MetadataDown { status: Some(500) }).count(1)).unwrap();
    assert_eq!(cloud.meta("GET", "/latest/meta-data/mac", &with).await.0, 500);
    cloud.running.cloud.add_fault(FaultSpec::from(Fault::MetadataDown { status: None }).count(1)).unwrap();
    assert_eq!(cloud.meta("GET", "/latest/meta-data/mac", &with).await.0, 0);
    assert_eq!(cloud.meta("GET", "/latest/meta-data/mac", &with).await.0, 200);
}

fn instant() -> fairway::lab::cloud::Latencies {
    serde_json::from_value(json!({
        "create": 0, "attach_answer": 0, "attach": 0, "assign": 0, "unassign": 0,
        "detach_answer": 0, "detach": 0, "delete": 0, "describe": 0, "spread": 0.0,
    }))
    .unwrap()
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

#[tokio::test]
async fn nodes_come_and_go_over_the_admin_interface() {
    let cloud = start(config());
    let body = r#"{"instance_id":"i-1","instance_type":"ecs.g8i.24xlarge","vswitch":"vsw-lab-a","netns":"node1","ipv6_count":1}"#;
    let (status, made) = cloud.admin("POST", "/lab/instances", body).await;
    assert_eq!(status, 201, "{made}");
    assert_eq!(made["primary"]["instance_id"], "i-1");
    assert_eq!(made["primary"]["v6"].as_array().unwrap().len(), 1);
    assert_eq!(cloud.admin("POST", "/lab/instances", body).await.0, 409);
    assert_eq!(cloud.admin("POST", "/lab/instances", "{").await.0, 400);
    let kept = cloud.attached(&[("DeleteOnRelease", "false")]).await;
    cloud.attached(&[("DeleteOnRelease", "True")]).await;
    cloud.assert_fabric_agrees();
    let (_, state) = cloud.admin("GET", "/lab/state", "").await;
    assert_eq!((state["enis"].as_array().unwrap().len(), state["instances"].as_array().unwrap().len()), (3, 1));
    assert_eq!(cloud.admin("DELETE", "/lab/instances/i-1", "").await.0, 200);
    assert_eq!(cloud.admin("DELETE", "/lab/instances/i-1", "").await.0, 404);
    let left = cloud.running.cloud.state().enis;
    assert_eq!(left.iter().map(|e| e.id.clone()).collect::<Vec<_>>(), [kept]);
    assert!(cloud.fabric.ports.lock().is_empty());
    assert_eq!(cloud.admin("GET", "/lab/audit", "").await.1, json!({"violations": []}));
    assert_eq!(cloud.admin("GET", "/elsewhere", "").await.0, 404);
}

#[tokio::test]
async fn an_instance_is_removed_in_the_middle_of_everything() {
    let cloud = start(CloudConfig { latency_scale: 0.05, ..config() });
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    let primary = cloud.running.cloud.instances()[0].primary_eni.clone();
    let (a, b) = (cloud.eni(&[]).await, cloud.attached(&[]).await);
    cloud.ask("AttachNetworkInterface", &[("NetworkInterfaceId", &a), ("InstanceId", "i-1")]).await.unwrap();
    cloud.ask("DetachNetworkInterface", &[("NetworkInterfaceId", &b), ("InstanceId", "i-1")]).await.unwrap();
    let one = [("SecondaryPrivateIpAddressCount", "1")];
    let (_, removed) = tokio::join!(cloud.assign(&primary, &one), cloud.running.cloud.remove_instance("i-1"));
    removed.unwrap();
    // Late completions of the attachment and the detachment change nothing.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(cloud.fabric.ports.lock().is_empty());
    assert!(cloud.running.cloud.state().enis.is_empty());
    cloud.assert_fabric_agrees();
}

#[tokio::test]
async fn the_cloud_takes_as_long_as_the_real_one_scaled() {
    let cloud = start(CloudConfig { latency_scale: 0.1, ..config() });
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    // A quarter less to a quarter more than the real time, and a slow machine.
    let within = |begun: Instant, real_ms: u64| {
        let took = begun.elapsed().as_millis() as u64;
        assert!((real_ms * 7 / 100..real_ms / 5 + 500).contains(&took), "{took} ms for {real_ms} ms");
    };
    let begun = Instant::now();
    let eni = cloud.eni(&[]).await;
    within(begun, 1000);
    let begun = Instant::now();
    cloud.ask("AttachNetworkInterface", &[("NetworkInterfaceId", &eni), ("InstanceId", "i-1")]).await.unwrap();
    assert_eq!(cloud.status(&eni).await, "Attaching");
    assert!(!cloud.fabric.ports.lock().contains_key(&eni), "no device before it is InUse");
    cloud.until(&eni, "InUse").await;
    within(begun, 4000);
    let begun = Instant::now();
    cloud.assign(&eni, &[("SecondaryPrivateIpAddressCount", "1")]).await.unwrap();
    within(begun, 600);
    let begun = Instant::now();
    cloud.ask("DetachNetworkInterface", &[("NetworkInterfaceId", &eni), ("InstanceId", "i-1")]).await.unwrap();
    assert_eq!(cloud.status(&eni).await, "Detaching");
    cloud.until(&eni, "Available").await;
    within(begun, 3000);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_cloud() {
    let mut made = Vec::new();
    for _ in 0..2 {
        let cloud = start(config());
        cloud.eni(&[("SecondaryPrivateIpAddressCount", "5"), ("Ipv6AddressCount", "2")]).await;
        let eni = cloud.running.cloud.state().enis.remove(0);
        made.push((eni.id, eni.mac, eni.v4, eni.v6));
    }
    assert_eq!(made[0], made[1]);
}

#[tokio::test]
async fn alone_it_serves_until_it_is_told_to_end() {
    use fairway::lab::cloud::{ServeConfig, serve};
    let folder = tempfile::tempdir().unwrap();
    let any = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let config = ServeConfig {
        cloud: config(),
        https: any,
        http: any,
        metadata: any,
        admin: any,
        ca_file: Some(folder.path().join("ca.pem")),
        nodes: vec![node("i-1", "ecs.g7.4xlarge")],
        peers: [(IpAddr::V4(Ipv4Addr::LOCALHOST), "i-1".to_owned())].into(),
    };
    let fabric = Arc::new(Recorder::default());
    let (tell, told) = tokio::sync::oneshot::channel();
    let ready = |running: &Running| {
        tell.send((running.cloud.clone(), running.metadata.unwrap(), running.https)).unwrap_or_default()
    };
    let serving = tokio::spawn(serve(config, fabric.clone(), ready));
    let (lab, metadata, https) = told.await.unwrap();
    assert!(https.is_some());
    let pem = std::fs::read_to_string(folder.path().join("ca.pem")).unwrap();
    assert_eq!(Some(pem.as_str()), lab.ca_pem());
    let head = "GET /latest/meta-data/instance-id HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n";
    assert_eq!(exchange(metadata, head.into(), b"").await, Some((200, "i-1".into())));
    assert_eq!(fabric.ports.lock().len(), 1);
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
    serving.await.unwrap().unwrap();
    assert!(fabric.ports.lock().is_empty(), "nothing is left on the packet side");
    assert!(TcpStream::connect(metadata).await.is_err());
}

#[tokio::test]
async fn an_address_in_use_is_a_clear_error() {
    use fairway::lab::cloud::{ServeConfig, serve};
    let taken = local().unwrap();
    let config = ServeConfig { https: taken.local_addr().ok(), metadata: None, admin: None, ..ServeConfig::default() };
    let error = serve(config, Arc::new(NullFabric), |_| {}).await.unwrap_err().to_string();
    assert!(error.contains("cannot listen on 127.0.0.1") && error.contains("https"), "{error}");
}

#[tokio::test]
async fn garbage_on_the_wire_gets_an_error_and_no_more() {
    let cloud = start(config());
    for garbage in [
        "\0\0\0\0\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".into(),
        format!("GET /?{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(100_000)),
    ] {
        for address in [cloud.running.http, cloud.running.metadata, cloud.running.admin] {
            let answer = exchange(address.unwrap(), garbage.clone(), b"").await;
            assert!(answer.is_none_or(|(status, _)| status >= 400), "{garbage:.20}");
        }
    }
    let head = "POST /lab/faults HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100000\r\n\r\n";
    let (status, _) =
        exchange(cloud.running.admin.unwrap(), head.into(), &[b' '; 100_000]).await.unwrap_or((413, String::new()));
    assert_eq!(status, 413);
    cloud.create(&[]).await.unwrap();
}

#[tokio::test]
async fn https_is_trusted_by_whoever_trusts_the_labs_ca() {
    let listeners = Listeners { https: local(), ..Listeners::default() };
    let running = CloudLab::start(config(), Arc::new(NullFabric), listeners).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    let der = running.cloud.ca_pem().unwrap();
    let der: String = der.lines().filter(|line| !line.starts_with("-----")).collect();
    use base64::Engine as _;
    let der = base64::engine::general_purpose::STANDARD.decode(der).unwrap();
    roots.add(der.into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    for (name, good) in [("ecs.cn-hangzhou.aliyuncs.com", true), ("127.0.0.1", true), ("elsewhere.test", false)] {
        let stream = TcpStream::connect(running.https.unwrap()).await.unwrap();
        let result = connector.connect(name.try_into().unwrap(), stream).await;
        assert_eq!(result.is_ok(), good, "{name}");
        if let Ok(mut stream) = result {
            let (head, _) = signed(&key(), "DescribeVSwitches", &[("RegionId", "cn-hangzhou".to_owned())], false);
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut raw = Vec::new();
            let _ = stream.read_to_end(&mut raw).await;
            assert!(String::from_utf8(raw).unwrap().starts_with("HTTP/1.1 200"));
        }
    }
    running.shutdown().await;
}

#[tokio::test]
async fn shutdown_is_orderly_with_work_in_progress() {
    let cloud = start(CloudConfig { latency_scale: 1.0, ..config() });
    let address = cloud.running.http.unwrap();
    cloud.running.cloud.register_instance(&node("i-1", "ecs.g7.4xlarge")).await.unwrap();
    let params = [("RegionId", "cn-hangzhou"), ("VSwitchId", "vsw-lab-a"), ("SecurityGroupId", "sg-lab")];
    let (head, _) = signed(&key(), "CreateNetworkInterface", &params.map(|(k, v)| (k, v.to_owned())), false);
    let waiting = tokio::spawn(exchange(address, head, b""));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    cloud.running.shutdown().await;
    assert!(begun.elapsed() < Duration::from_secs(3));
    let (status, body) = waiting.await.unwrap().unwrap();
    assert!(status == 503 && body.contains("ServiceUnavailable"), "{status} {body}");
    assert!(TcpStream::connect(address).await.is_err());
}
