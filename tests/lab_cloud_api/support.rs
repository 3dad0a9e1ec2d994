//! A cloud to ask: its packet side, a signer of the test's own, requests in short.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fairway::lab::cloud::{AccessKey, CloudConfig, CloudLab, Listeners, RegisterInstance, Resolver, Running};
use fairway::lab::fabric::{EniPort, Fabric, FabricError};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use ring::{digest, hmac};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A packet side that remembers, and fails on demand.
#[derive(Default)]
pub struct Recorder {
    pub ports: Mutex<BTreeMap<String, EniPort>>,
    pub fail: Mutex<BTreeSet<&'static str>>,
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

pub struct Cloud {
    pub running: Running,
    pub fabric: Arc<Recorder>,
}

#[derive(Clone)]
pub struct Key {
    pub id: String,
    pub secret: String,
    pub token: Option<String>,
}

pub fn key() -> Key {
    Key { id: "k".into(), secret: "s".into(), token: None }
}

pub fn config() -> CloudConfig {
    CloudConfig {
        keys: vec![AccessKey { id: "k".into(), secret: "s".into() }],
        latency_scale: 0.0,
        ..CloudConfig::default()
    }
}

pub fn local() -> Option<TcpListener> {
    Some(TcpListener::bind(("127.0.0.1", 0)).unwrap())
}

pub fn start(config: CloudConfig) -> Cloud {
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

pub fn node(id: &str, kind: &str) -> RegisterInstance {
    serde_json::from_value(json!({"instance_id": id, "instance_type": kind, "vswitch": "vsw-lab-a"})).unwrap()
}

/// One HTTP exchange; `None` when the connection closes without an answer.
pub async fn exchange(address: SocketAddr, head: String, body: &[u8]) -> Option<(u16, String)> {
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

pub fn encode(text: &str) -> String {
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
pub fn signed(key: &Key, api: &str, params: &[(&str, String)], form: bool) -> (String, String) {
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
    pub async fn send(&self, key: &Key, api: &str, params: &[(&str, String)]) -> Option<(u16, Value)> {
        let (head, body) = signed(key, api, params, false);
        let (status, body) = exchange(self.running.http.unwrap(), head, body.as_bytes()).await?;
        Some((status, serde_json::from_str(&body).unwrap()))
    }

    pub async fn ask(&self, api: &str, params: &[(&str, &str)]) -> Result<Value, String> {
        let mut all: Vec<(&str, String)> = params.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
        all.push(("RegionId", "cn-hangzhou".to_owned()));
        let (status, value) = self.send(&key(), api, &all).await.ok_or("closed")?;
        if status == 200 { Ok(value) } else { Err(format!("{status} {}", value["Code"].as_str().unwrap())) }
    }

    pub async fn create(&self, more: &[(&str, &str)]) -> Result<Value, String> {
        let mut params = vec![("VSwitchId", "vsw-lab-a"), ("SecurityGroupId", "sg-lab")];
        params.extend(more);
        self.ask("CreateNetworkInterface", &params).await
    }

    pub async fn eni(&self, more: &[(&str, &str)]) -> String {
        self.create(more).await.unwrap()["NetworkInterfaceId"].as_str().unwrap().to_owned()
    }

    pub async fn status(&self, eni: &str) -> String {
        let all = self.ask("DescribeNetworkInterfaces", &[("NetworkInterfaceId.1", eni)]).await.unwrap();
        all["NetworkInterfaceSets"]["NetworkInterfaceSet"][0]["Status"].as_str().unwrap_or("gone").to_owned()
    }

    pub async fn until(&self, eni: &str, status: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.status(eni).await != status {
            assert!(Instant::now() < end, "{eni} did not become {status}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn attached(&self, more: &[(&str, &str)]) -> String {
        let eni = self.eni(more).await;
        self.ask("AttachNetworkInterface", &[("NetworkInterfaceId", &eni), ("InstanceId", "i-1")]).await.unwrap();
        self.until(&eni, "InUse").await;
        eni
    }

    pub async fn assign(&self, eni: &str, more: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let mut params = vec![("NetworkInterfaceId", eni)];
        params.extend(more);
        let answer = self.ask("AssignPrivateIpAddresses", &params).await?;
        let set = &answer["AssignedPrivateIpAddressesSet"]["PrivateIpSet"]["PrivateIpAddress"];
        Ok(serde_json::from_value(set.clone()).unwrap())
    }

    pub async fn meta(&self, method: &str, path: &str, headers: &str) -> (u16, String) {
        let head = format!("{method} {path} HTTP/1.1\r\nhost: meta\r\nconnection: close\r\n{headers}\r\n");
        exchange(self.running.metadata.unwrap(), head, b"").await.unwrap_or((0, String::new()))
    }

    pub async fn admin(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: lab\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        let (status, text) = exchange(self.running.admin.unwrap(), head, body.as_bytes()).await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The packet side has exactly the attached ENIs with exactly their addresses.
    pub fn assert_fabric_agrees(&self) {
        let state = self.running.cloud.state();
        let attached = state.enis.iter().filter(|e| e.instance.is_some());
        let want: BTreeMap<_, _> = attached.map(|e| (e.id.clone(), (e.v4.clone(), e.v6.clone()))).collect();
        let ports = self.fabric.ports.lock();
        let have: BTreeMap<_, _> = ports.iter().map(|(id, p)| (id.clone(), (p.v4.clone(), p.v6.clone()))).collect();
        assert_eq!(have, want);
        assert_eq!(self.running.cloud.audit(), Vec::<String>::new());
    }
}

pub fn instant() -> fairway::lab::cloud::Latencies {
    serde_json::from_value(json!({
        "create": 0, "attach_answer": 0, "attach": 0, "assign": 0, "unassign": 0,
        "detach_answer": 0, "detach": 0, "delete": 0, "describe": 0, "spread": 0.0,
    }))
    .unwrap()
}
