//! The servers themselves: metadata, admin interface, TLS, start and end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fairway::lab::cloud::{CloudConfig, CloudLab, Fault, FaultSpec, Listeners, Running};
use fairway::lab::fabric::NullFabric;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::*;

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
