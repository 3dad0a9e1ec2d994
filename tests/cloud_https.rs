//! CloudApi against a real HTTPS server of its own CA and a real metadata
//! service: what goes over the wire is signed and complete, and whatever comes
//! back, nothing is done twice, lost, or waited for past the deadline.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/cloud_actor.rs"]
mod cloud_actor;

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cloud_actor::with_cloud;
use fairway::actor::{AskError, Deadline, Handle, Handles, Message};
use fairway::cloud::aliyun::sign;
use fairway::cloud::config::{Endpoints, Source};
use fairway::cloud::credentials::Secret;
use fairway::cloud::provider::Api;
use fairway::cloud::*;
use fairway::model::EniId;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;

type Body = BoxBody<Bytes, std::io::Error>;

/// A request as it arrived.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    params: BTreeMap<String, String>,
}

impl Seen {
    fn action(&self) -> &str {
        self.headers.get("x-acs-action").map_or("", String::as_str)
    }
    fn param(&self, name: &str) -> &str {
        self.params.get(name).map_or("", String::as_str)
    }
}

enum Answer {
    Json(u16, Value),
    Raw(u16, Vec<u8>),
    /// The request is read; the connection ends without an answer.
    Hangup,
    /// The answer breaks off in the middle.
    Half,
    Silence,
}

fn text(status: u16, text: impl Into<String>) -> Answer {
    Answer::Raw(status, text.into().into_bytes())
}

fn refuse(status: u16, code: &str) -> Answer {
    Answer::Json(status, json!({"RequestId": "R", "HostId": "h", "Code": code, "Message": "m", "Recommend": "r"}))
}

type Handler = Arc<dyn Fn(&Seen) -> Answer + Send + Sync>;

/// A server on a thread of its own, until dropped.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Server {
    fn start(
        tls: Option<Arc<rustls::ServerConfig>>,
        handler: impl Fn(&Seen) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let handler: Handler = Arc::new(handler);
        let (seen, connections) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<AtomicUsize>::default());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (up, address) = mpsc::channel();
        let (log, count) = (seen.clone(), connections.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
                up.send(listener.local_addr().unwrap()).unwrap();
                let accept = async {
                    loop {
                        let (stream, _) = listener.accept().await.unwrap();
                        count.fetch_add(1, Ordering::SeqCst);
                        let (tls, handler, log) = (tls.clone(), handler.clone(), log.clone());
                        tokio::spawn(async move {
                            match tls {
                                None => serve(TokioIo::new(stream), handler, log).await,
                                Some(tls) => {
                                    if let Ok(stream) = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await {
                                        serve(TokioIo::new(stream), handler, log).await;
                                    }
                                }
                            }
                        });
                    }
                };
                tokio::select! { () = accept => {} _ = stopped => {} }
            });
        });
        Self { address: address.recv().unwrap(), seen, connections, _stop: stop }
    }

    fn actions(&self) -> Vec<String> {
        self.seen.lock().iter().map(|s| s.action().to_owned()).collect()
    }
}

async fn serve<I>(io: I, handler: Handler, log: Arc<Mutex<Vec<Seen>>>)
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let (handler, log) = (handler.clone(), log.clone());
        async move {
            let (parts, body) = request.into_parts();
            body.collect().await.map_err(std::io::Error::other)?;
            let query = parts.uri.query().unwrap_or_default();
            let header = |(n, v): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
                (n.as_str().to_owned(), v.to_str().unwrap().to_owned())
            };
            let seen = Seen {
                method: parts.method.to_string(),
                path: parts.uri.path().to_owned(),
                headers: parts.headers.iter().map(header).collect(),
                params: query.split('&').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect(),
            };
            if !seen.action().is_empty() {
                verify(&seen, query);
            }
            log.lock().push(seen.clone());
            let whole = |status, bytes: Vec<u8>| {
                let body: Body = Full::new(Bytes::from(bytes)).map_err(|e: Infallible| match e {}).boxed();
                Response::builder().status(status).body(body).unwrap()
            };
            Ok::<_, std::io::Error>(match handler(&seen) {
                Answer::Json(status, value) => whole(status, value.to_string().into_bytes()),
                Answer::Raw(status, bytes) => whole(status, bytes),
                Answer::Hangup => return Err(std::io::Error::other("hang up")),
                Answer::Half => {
                    let first = Ok(Frame::data(Bytes::from_static(b"{\"RequestId\":")));
                    let parts = futures::stream::iter([first, Err(std::io::Error::other("broken off"))]);
                    Response::new(StreamBody::new(parts).boxed())
                }
                Answer::Silence => std::future::pending().await,
            })
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    let _ = http.timer(TokioTimer::new()).serve_connection(io, service).await;
}

/// Judge a request by what arrived: names, order, signature.
fn verify(seen: &Seen, query: &str) {
    let authorization = &seen.headers["authorization"];
    let part = |name: &str| {
        let rest = authorization.split(&format!("{name}=")).nth(1).expect("a part of Authorization");
        rest.split(',').next().unwrap().to_owned()
    };
    let secret = match part("Credential").as_str() {
        "testid" => "testsecret",
        id => &format!("secret-of-{id}"),
    };
    let signed = part("SignedHeaders");
    let headers: Vec<(&str, &str)> = signed.split(';').map(|n| (n, seen.headers[n].as_str())).collect();
    for name in seen.headers.keys().filter(|n| n.starts_with("x-acs-") || *n == "host") {
        assert!(headers.iter().any(|(n, _)| n == name), "{name} is not signed");
    }
    let text = sign::string_to_sign(&seen.method, &seen.path, query, &headers, &seen.headers["x-acs-content-sha256"]);
    assert_eq!(sign::signature(&Secret::new(secret), &text), part("Signature"));
}

/// A CA, its file, and a server certificate of it for 127.0.0.1.
fn authority(dir: &std::path::Path) -> (std::path::PathBuf, Arc<rustls::ServerConfig>) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    let file = dir.join("ca.pem");
    std::fs::write(&file, ca.pem()).unwrap();
    let issuer = rcgen::Issuer::new(params, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = config.with_no_client_auth().with_single_cert(vec![leaf.der().clone()], key).unwrap();
    (file, Arc::new(config))
}

struct World {
    cloud: Handle<CloudApi>,
    api: Server,
    metadata: Server,
    stats: CloudStats,
    _dir: tempfile::TempDir,
}

impl World {
    async fn ask<M: Message>(&self, message: M, seconds: u64) -> Result<M::Reply, AskError<M::Error>>
    where
        CloudApi: Handles<M>,
    {
        self.cloud.ask(message, Deadline::after(Duration::from_secs(seconds))).await
    }

    fn outcomes(&self, api: Api) -> BTreeMap<&'static str, u64> {
        self.stats.snapshot().apis[&api].calls.clone()
    }
}

fn config() -> Config {
    let credentials = Source::Static {
        access_key_id: "testid".to_owned(),
        access_key_secret: Secret::new("testsecret"),
        security_token: None,
    };
    Config { credentials, region: Some("cn-hangzhou".to_owned()), ..Config::default() }
}

fn world<F: Future<Output = ()>>(
    config: Config,
    api: impl Fn(&Seen) -> Answer + Send + Sync + 'static,
    metadata: impl Fn(&Seen) -> Answer + Send + Sync + 'static,
    test: impl FnOnce(World) -> F,
) {
    let dir = tempfile::tempdir().unwrap();
    let (ca_file, tls) = authority(dir.path());
    let (api, metadata) = (Server::start(Some(tls), api), Server::start(None, metadata));
    let https = format!("https://{}", api.address);
    let config = Config {
        endpoints: Endpoints {
            ecs: Some(https.clone()),
            vpc: Some(https),
            metadata: Some(format!("http://{}", metadata.address)),
        },
        ca_file: Some(config.ca_file.clone().unwrap_or(ca_file)),
        ..config
    };
    with_cloud(config, |cloud, stats| async move {
        test(World { cloud, api, metadata, stats, _dir: dir }).await;
    });
}

fn nobody(seen: &Seen) -> Answer {
    panic!("nobody should ask {seen:?}")
}

/// An answer as recorded from the real API, with some fields set.
fn shaped(call: &str, set: Value) -> Value {
    fn fill(key: &str, shape: &Value) -> Value {
        match shape {
            Value::Object(fields) => fields.iter().map(|(k, v)| (k.clone(), fill(k, v))).collect(),
            Value::Array(items) => items.iter().map(|item| fill(key, item)).collect(),
            Value::String(kind) => match kind.as_str() {
                "int" => json!(4),
                "bool" => json!(false),
                "float" => json!(0.5),
                "List[str]" => json!([word(key)]),
                _ => json!(word(key)),
            },
            other => other.clone(),
        }
    }
    fn word(key: &str) -> &'static str {
        match key {
            "PrivateIpAddress" => "10.0.0.5",
            "Ipv6Address" => "fd00::5",
            "MacAddress" => "00:16:3e:00:00:05",
            "CidrBlock" => "10.0.0.0/24",
            "Ipv6CidrBlock" | "NextToken" => "",
            "Status" => "Available",
            "Type" => "Secondary",
            _ => "x-1",
        }
    }
    let shapes: Value = serde_json::from_str(include_str!("testdata/cloud/alibaba-response-shapes.json")).unwrap();
    let mut filled = fill("", &shapes[call]);
    for (key, value) in set.as_object().unwrap() {
        filled[key] = value.clone();
    }
    filled
}

fn ok(call: &str) -> Answer {
    Answer::Json(200, shaped(call, json!({})))
}

fn create(token: &str) -> CreateEni {
    CreateEni {
        vswitch: "vsw-1".into(),
        security_groups: vec!["sg-1".into()],
        ipv4: 10,
        ipv6: 2,
        tags: [("creator".to_owned(), "fairway node/1".to_owned())].into(),
        description: "pod ENI (ü)".to_owned(),
        token: token.into(),
        lane: Lane::PodWaiting,
    }
}

fn attach() -> AttachEni {
    AttachEni { eni: "eni-1".into(), instance: "i-1".into(), lane: Lane::PodWaiting }
}

fn list() -> DescribeEnis {
    DescribeEnis { ids: vec![], instance: None, tags: BTreeMap::new(), status: None, lane: Lane::Refill }
}

fn error<T: std::fmt::Debug>(result: Result<T, AskError<CloudError>>) -> CloudError {
    result.unwrap_err().domain().expect("an answer, not a timeout")
}

#[test]
fn every_call_reaches_the_server_signed_and_complete_over_one_connection() {
    world(
        config(),
        |seen| ok(seen.action()),
        nobody,
        |w| async move {
            let (eni, instance) = (EniId::from("eni-1"), "i-1".into());
            let created = w.ask(create("tok-1"), 10).await.unwrap();
            assert_eq!((created.id.as_str(), created.primary4), ("x-1", Ipv4Addr::new(10, 0, 0, 5)));
            w.ask(attach(), 10).await.unwrap();
            let (lane, token) = (Lane::Refill, "tok-2".into());
            w.ask(AssignIpv4 { eni: eni.clone(), count: 3, token, lane }, 10).await.unwrap();
            w.ask(AssignIpv6 { eni: eni.clone(), count: 3, token: "tok-3".into(), lane }, 10).await.unwrap();
            assert_eq!(w.ask(list(), 10).await.unwrap().len(), 1);
            w.ask(UnassignIpv4 { eni: eni.clone(), addresses: vec![Ipv4Addr::new(10, 0, 0, 6)], lane }, 10)
                .await
                .unwrap();
            w.ask(UnassignIpv6 { eni: eni.clone(), addresses: vec!["fd00::6".parse().unwrap()], lane }, 10)
                .await
                .unwrap();
            w.ask(DetachEni { eni: eni.clone(), instance, lane: Lane::Release }, 10).await.unwrap();
            w.ask(DeleteEni { eni, lane: Lane::Release }, 10).await.unwrap();
            let limits = w.ask(DescribeInstanceType { type_name: "x-1".to_owned(), lane }, 10).await.unwrap();
            assert_eq!((limits.enis, limits.ipv4_per_eni), (4, 4));
            let vswitches = w.ask(DescribeVSwitches { ids: vec!["x-1".into()], lane }, 10).await.unwrap();
            assert_eq!(vswitches[0].available, 4);

            let seen = w.api.seen.lock().clone();
            assert_eq!(seen.len(), 11);
            assert_eq!(w.api.connections.load(Ordering::SeqCst), 1, "connections are reused");
            let first = &seen[0];
            assert_eq!((first.method.as_str(), first.path.as_str()), ("POST", "/"));
            for (name, value) in [
                ("ClientToken", "tok-1"),
                ("RegionId", "cn-hangzhou"),
                ("SecondaryPrivateIpAddressCount", "9"),
                ("Ipv6AddressCount", "2"),
                ("DeleteOnRelease", "true"),
                ("SecurityGroupIds.1", "sg-1"),
                ("Tag.1.Key", "creator"),
                ("Tag.1.Value", "fairway%20node%2F1"),
                ("Description", "pod%20ENI%20%28%C3%BC%29"),
            ] {
                assert_eq!(first.param(name), value, "{name}");
            }
            let versions: BTreeMap<&str, &str> =
                seen.iter().map(|s| (s.action(), s.headers["x-acs-version"].as_str())).collect();
            assert_eq!(versions["DescribeVSwitches"], "2016-04-28");
            assert_eq!(versions["DescribeInstanceTypes"], "2014-05-26");
            let nonces: std::collections::BTreeSet<&String> =
                seen.iter().map(|s| &s.headers["x-acs-signature-nonce"]).collect();
            assert_eq!(nonces.len(), seen.len(), "a nonce is never used twice");
        },
    );
}

#[test]
fn a_reply_lost_after_the_effect_does_not_make_a_second_eni() {
    let made: Arc<Mutex<HashMap<String, String>>> = Arc::default();
    let effects = made.clone();
    let api = move |seen: &Seen| {
        let mut made = made.lock();
        let token = seen.param("ClientToken").to_owned();
        if let Some(id) = made.get(&token) {
            return Answer::Json(200, shaped("CreateNetworkInterface", json!({"NetworkInterfaceId": id})));
        }
        let id = format!("eni-{}", made.len());
        made.insert(token, id);
        Answer::Hangup
    };
    world(config(), api, nobody, |w| async move {
        let eni = w.ask(create("tok-1"), 20).await.unwrap();
        assert_eq!(eni.id.as_str(), "eni-0");
        assert_eq!(effects.lock().len(), 1);
        assert_eq!(w.outcomes(Api::CreateNetworkInterface), [("ok", 1), ("transport", 1)].into());
    });
}

#[test]
fn faults_of_the_server_pass_and_refusals_come_through() {
    let turn = AtomicUsize::new(0);
    let api = move |_: &Seen| match turn.fetch_add(1, Ordering::SeqCst) {
        0 => refuse(500, "InternalError"),
        1 => text(503, "<html>upstream is down</html>"),
        2 => Answer::Half,
        3 => text(200, "\u{0}\u{1}garbage"),
        4 => refuse(400, "Throttling"),
        5 => ok("DescribeNetworkInterfaces"),
        6 => text(200, "<html>Please log in</html>"),
        7 => refuse(403, "Forbidden.RAM"),
        n => panic!("request {n}"),
    };
    world(config(), api, nobody, |w| async move {
        assert_eq!(w.ask(list(), 60).await.unwrap().len(), 1);
        assert_eq!(w.outcomes(Api::DescribeNetworkInterfaces), [("ok", 1), ("throttled", 1), ("transport", 4)].into());
        // A page of some proxy is no proof that the ENI was attached.
        let refused = error(w.ask(attach(), 20).await);
        assert_eq!(refused.kind, CloudErrorKind::Forbidden);
        assert!(refused.remedy.contains("ecs:AttachNetworkInterface"), "{refused}");
    });
}

#[test]
fn a_huge_answer_is_cut_off_and_not_kept_in_memory() {
    let api = |_: &Seen| Answer::Raw(200, vec![b' '; 17 * 1024 * 1024]);
    world(config(), api, nobody, |w| async move {
        let error = error(w.ask(list(), 8).await);
        assert_eq!(error.kind, CloudErrorKind::Transport);
        assert!(error.message.contains("larger than"), "{error}");
    });
}

#[test]
fn a_server_that_never_answers_costs_the_deadline_and_no_more() {
    world(
        config(),
        |_| Answer::Silence,
        nobody,
        |w| async move {
            let began = Instant::now();
            let error = error(w.ask(create("tok-1"), 1).await);
            assert_eq!(error.kind, CloudErrorKind::Deadline);
            assert!(error.effect_unknown() && began.elapsed() < Duration::from_secs(4));
        },
    );
}

#[test]
fn a_throttling_storm_lowers_the_rate_and_passes() {
    let turn = AtomicUsize::new(0);
    let api = move |_: &Seen| match turn.fetch_add(1, Ordering::SeqCst) {
        0 => refuse(400, "Throttling.User"),
        1 => text(429, ""),
        _ => ok("AttachNetworkInterface"),
    };
    world(config(), api, nobody, |w| async move {
        w.ask(attach(), 60).await.unwrap();
        let api = w.stats.snapshot().apis.remove(&Api::AttachNetworkInterface).unwrap();
        assert_eq!((api.throttled, api.calls["ok"]), (2, 1));
        assert!(api.rate_per_minute < 60.0, "a quarter of 120, growing: {}", api.rate_per_minute);
    });
}

#[test]
fn a_server_of_another_authority_learns_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (other_ca, _) = authority(dir.path());
    let config = Config { ca_file: Some(other_ca), ..config() };
    world(config, nobody, nobody, |w| async move {
        let error = error(w.ask(attach(), 1).await);
        assert!(error.message.contains("certificate"), "{error}");
        assert!(w.api.seen.lock().is_empty());
    });
}

#[test]
fn a_missing_or_empty_ca_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.pem");
    std::fs::write(&empty, "no certificate here").unwrap();
    for path in [dir.path().join("missing.pem"), empty] {
        let config = Config { ca_file: Some(path.clone()), ..config() };
        let failed = fairway::actor::run(CloudApi::new(&config, CloudStats::default()));
        let text = failed.err().expect("refused").to_string();
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
}

/// A metadata service in token mode: GET needs the newest token.
fn service(tokens: Arc<AtomicUsize>, files: impl Fn(&str) -> Option<String>, seen: &Seen) -> Answer {
    if seen.path == "/latest/api/token" {
        assert_eq!(seen.method, "PUT");
        assert_eq!(seen.headers["x-aliyun-ecs-metadata-token-ttl-seconds"], "21600");
        return text(200, format!("token-{}", tokens.fetch_add(1, Ordering::SeqCst) + 1));
    }
    let expected = format!("token-{}", tokens.load(Ordering::SeqCst));
    if seen.headers.get("x-aliyun-ecs-metadata-token") != Some(&expected) {
        return text(401, "");
    }
    let file = seen.path.strip_prefix("/latest/meta-data/").unwrap();
    files(file).map_or_else(|| text(404, "<html>404</html>"), |body| text(200, body))
}

fn node(file: &str) -> Option<String> {
    let mac = "network/interfaces/macs/00:16:3e:00:00:02/";
    Some(
        match file.strip_prefix(mac).unwrap_or(file) {
            "instance-id" => "i-1",
            "instance/instance-type" => "ecs.g7.2xlarge",
            "region-id" => "cn-hangzhou",
            "zone-id" => "cn-hangzhou-k",
            "vpc-id" => "vpc-1",
            "vswitch-id" => "vsw-1",
            "mac" => "00:16:3e:00:00:01",
            // The second goes while we look: nothing below it is found.
            "network/interfaces/macs/" => "00:16:3e:00:00:02/\n00:16:3e:00:00:03/",
            "network-interface-id" => "eni-2",
            "primary-ip-address" => "10.0.0.5",
            "private-ipv4s" => r#"["10.0.0.5","10.0.0.6"]"#,
            _ => return None,
        }
        .to_owned(),
    )
}

#[test]
fn the_node_learns_who_it_is_and_an_expired_token_is_replaced_once() {
    let tokens = Arc::<AtomicUsize>::default();
    let issued = tokens.clone();
    let metadata = move |seen: &Seen| service(issued.clone(), node, seen);
    let config = Config { region: None, ..config() };
    world(
        config,
        |seen| ok(seen.action()),
        metadata,
        |w| async move {
            let me = w.ask(WhoAmI { lane: Lane::PodWaiting }, 10).await.unwrap();
            assert_eq!(
                (me.instance.as_str(), me.region.as_str(), me.vswitch.as_str()),
                ("i-1", "cn-hangzhou", "vsw-1")
            );
            assert_eq!(me.primary_mac.to_string(), "00:16:3e:00:00:01");
            // The service forgets the token it gave.
            tokens.fetch_add(1, Ordering::SeqCst);
            let enis = w.ask(MetadataEnis { lane: Lane::Refill }, 10).await.unwrap();
            assert_eq!(enis.len(), 1, "the one that went is left out");
            assert_eq!((enis[0].id.as_str(), enis[0].ipv4.len(), enis[0].ipv6.len()), ("eni-2", 2, 0));
            assert_eq!(tokens.load(Ordering::SeqCst), 3, "one more token");
            // The region for signed calls comes from there, too.
            w.ask(attach(), 10).await.unwrap();
            assert_eq!(w.api.seen.lock()[0].param("RegionId"), "cn-hangzhou");
            assert!(w.metadata.seen.lock().iter().all(|s| !s.headers.contains_key("authorization")));
        },
    );
}

#[test]
fn a_region_that_is_no_region_never_becomes_part_of_a_host_name() {
    let tokens = Arc::<AtomicUsize>::default();
    let metadata = move |seen: &Seen| service(tokens.clone(), |_| Some("evil.example/x".to_owned()), seen);
    world(Config { region: None, ..config() }, nobody, metadata, |w| async move {
        let error = error(w.ask(attach(), 2).await);
        assert!(error.message.contains("region-id"), "{error}");
        assert!(w.api.actions().is_empty());
    });
}

#[test]
fn keys_of_the_role_are_renewed_before_they_expire_and_when_they_are_refused() {
    let (tokens, issued) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let (count, life) = (issued.clone(), [3, 3_600, 3_600]);
    let metadata = move |seen: &Seen| {
        let role = |file: &str| {
            Some(match file {
                "ram/security-credentials/" => "node-role".to_owned(),
                "ram/security-credentials/node-role" => {
                    let n = count.fetch_add(1, Ordering::SeqCst);
                    let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(life[n]);
                    let (id, secret) = (format!("STS.{n}"), format!("secret-of-STS.{n}"));
                    json!({"AccessKeyId": id, "AccessKeySecret": secret, "SecurityToken": format!("sts-{n}"),
                        "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(), "Code": "Success"})
                    .to_string()
                }
                _ => return None,
            })
        };
        service(tokens.clone(), role, seen)
    };
    let refused = AtomicUsize::new(0);
    let api = move |seen: &Seen| match seen.headers["x-acs-security-token"].as_str() {
        "sts-1" if refused.fetch_add(1, Ordering::SeqCst) > 0 => refuse(403, "InvalidSecurityToken.Expired"),
        _ => ok(seen.action()),
    };
    let config = Config { credentials: Source::RamRole { role: None }, ..config() };
    world(config, api, metadata, |w| async move {
        w.ask(attach(), 10).await.unwrap();
        w.ask(attach(), 10).await.unwrap();
        assert_eq!(issued.load(Ordering::SeqCst), 1, "kept while they live");
        // What is awaited is the clock itself: a quarter of three seconds is left.
        tokio::time::sleep(Duration::from_millis(2_300)).await;
        w.ask(attach(), 10).await.unwrap();
        assert_eq!(issued.load(Ordering::SeqCst), 2, "renewed before the end");
        w.ask(attach(), 10).await.unwrap();
        assert_eq!(issued.load(Ordering::SeqCst), 3, "refused keys are replaced within the call");
        let used: Vec<String> = w.api.seen.lock().iter().map(|s| s.headers["x-acs-security-token"].clone()).collect();
        assert_eq!(used, ["sts-0", "sts-0", "sts-1", "sts-1", "sts-2"]);
    });
}

#[test]
fn no_role_and_no_keys_say_what_to_do() {
    let tokens = Arc::<AtomicUsize>::default();
    let metadata = move |seen: &Seen| service(tokens.clone(), |_| None, seen);
    let config = Config { credentials: Source::RamRole { role: None }, ..config() };
    world(config, nobody, metadata, |w| async move {
        let error = error(w.ask(attach(), 5).await);
        assert_eq!(error.kind, CloudErrorKind::Forbidden);
        assert!(error.to_string().contains("attach a RAM role"), "{error}");
    });
}
