//! The instance metadata service, in token mode.
//!
//! A session token is fetched with PUT and used for half its life; a 401 brings
//! a new one, once. Everything the service says is parsed before it is used, in
//! paths above all. It lags behind the API by seconds.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use http::{Method, Request};
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::decode::identifier;
use crate::cloud::config::{Endpoint, is_region};
use crate::cloud::credentials::Secret;
use crate::cloud::http::{Answer, Http, HttpError};
use crate::cloud::provider::Failure;
use crate::cloud::{CloudError, CloudErrorKind, Identity, MetadataEni};
use crate::model::{EniId, InstanceId, Mac, VSwitchId};

const TOKEN_TTL: Duration = Duration::from_secs(21_600);
const TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_MOST: usize = 64 * 1024;
const ENIS_MOST: usize = 256;

pub struct Metadata {
    http: Rc<Http>,
    base: Endpoint,
    token: Mutex<Option<(Secret, Instant)>>,
}

/// Temporary keys of the instance's role.
#[derive(Debug)]
pub struct RoleKeys {
    pub id: String,
    pub secret: Secret,
    pub token: Secret,
    pub life: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    #[error("metadata service: {path}: {cause}")]
    Http { path: String, cause: HttpError },
    #[error("metadata service: {path}: no answer in time")]
    Timeout { path: String },
    #[error("metadata service: {path}: HTTP {status}")]
    Status { path: String, status: u16 },
    #[error("metadata service: {path}: the answer makes no sense")]
    Senseless { path: String },
    #[error("this instance has no RAM role")]
    NoRole,
}

impl MetadataError {
    pub(crate) fn failure(&self, action: &str) -> Failure {
        let (kind, remedy) = match self {
            MetadataError::NoRole => (
                CloudErrorKind::Forbidden,
                "attach a RAM role to the instance, or name other keys in cloud.credentials",
            ),
            MetadataError::Status { status: 429, .. } => {
                (CloudErrorKind::Throttled { retry_after: Duration::ZERO }, "the metadata service is asked too often")
            }
            MetadataError::Status { status: 404, .. } => {
                (CloudErrorKind::NotFound, "check that this node is an instance in a VPC")
            }
            MetadataError::Status { status, .. } if *status < 500 => {
                (CloudErrorKind::Rejected, "allow the metadata service, in token mode, for this instance")
            }
            _ => (CloudErrorKind::Transport, "check that the node reaches the metadata service"),
        };
        CloudError::new(kind, action, self.to_string(), remedy).into()
    }
}

type Got<T> = Result<T, MetadataError>;

impl Metadata {
    pub fn new(http: Rc<Http>, base: Endpoint) -> Self {
        Self { http, base, token: Mutex::new(None) }
    }

    #[cfg(test)]
    pub(crate) fn unreachable() -> Self {
        Self::new(Rc::new(Http::without_tls()), Endpoint::parse("http://127.0.0.1:9").unwrap())
    }

    pub async fn region(&self) -> Got<String> {
        self.text("region-id", |text| Some(text.to_owned()).filter(|t| is_region(t))).await
    }

    pub async fn who_am_i(&self) -> Got<Identity> {
        let (instance, instance_type, region, zone, vpc, vswitch, primary_mac) = futures::try_join!(
            self.id("instance-id"),
            self.id("instance/instance-type"),
            self.region(),
            self.id("zone-id"),
            self.id("vpc-id"),
            self.id("vswitch-id"),
            self.text("mac", |text| text.parse().ok()),
        )?;
        Ok(Identity {
            instance: InstanceId(instance),
            instance_type,
            region,
            zone,
            vpc,
            vswitch: VSwitchId(vswitch),
            primary_mac,
        })
    }

    /// The ENIs the instance has. One that goes while we look is left out.
    pub async fn enis(&self) -> Got<Vec<MetadataEni>> {
        let path = "network/interfaces/macs/";
        let macs = parse_macs(&self.get(path).await?).ok_or_else(|| senseless(path))?;
        let all: Vec<Option<MetadataEni>> = futures::stream::iter(macs)
            .map(async |mac| match self.eni(mac).await {
                Ok(eni) => Ok(Some(eni)),
                Err(MetadataError::Status { status: 404, .. }) => Ok(None),
                Err(e) => Err(e),
            })
            .buffered(4)
            .try_collect()
            .await?;
        Ok(all.into_iter().flatten().collect())
    }

    async fn eni(&self, mac: Mac) -> Got<MetadataEni> {
        let path = |name: &str| format!("network/interfaces/macs/{mac}/{name}");
        let (id, vswitch) = (path("network-interface-id"), path("vswitch-id"));
        let (primary4, ipv4, ipv6) = (path("primary-ip-address"), path("private-ipv4s"), path("ipv6s"));
        let v6 = async {
            match self.get(&ipv6).await {
                Ok(body) => parse_list::<Ipv6Addr>(&body).ok_or_else(|| senseless(&ipv6)),
                // No IPv6 on this ENI.
                Err(MetadataError::Status { status: 404, .. }) => Ok(Vec::new()),
                Err(e) => Err(e),
            }
        };
        let v4 = async {
            let body = self.get(&ipv4).await?;
            parse_list::<Ipv4Addr>(&body).ok_or_else(|| senseless(&ipv4))
        };
        let (id, vswitch, primary4, ipv4, ipv6) = futures::try_join!(
            self.id(&id),
            self.id(&vswitch),
            self.text(&primary4, |text| text.parse::<Ipv4Addr>().ok()),
            v4,
            v6
        )?;
        let mut all4 = vec![primary4];
        all4.extend(ipv4.into_iter().filter(|a| *a != primary4));
        Ok(MetadataEni { id: EniId(id), mac, vswitch: VSwitchId(vswitch), primary4, ipv4: all4, ipv6 })
    }

    pub async fn role_keys(&self, role: Option<&str>) -> Got<RoleKeys> {
        let base = "ram/security-credentials/";
        let role = match role {
            Some(role) => role.to_owned(),
            None => match self.get(base).await {
                Ok(body) => first_word(&body).ok_or(MetadataError::NoRole)?,
                Err(MetadataError::Status { status: 404, .. }) => return Err(MetadataError::NoRole),
                Err(e) => return Err(e),
            },
        };
        let path = format!("{base}{}", identifier("role", role).map_err(|_| senseless(base))?);
        let body = self.get(&path).await?;
        parse_role_keys(&body, jiff::Timestamp::now()).ok_or_else(|| senseless(&path))
    }

    async fn id(&self, path: &str) -> Got<String> {
        self.text(path, |text| identifier("id", text.to_owned()).ok()).await
    }

    async fn text<T>(&self, path: &str, parse: impl FnOnce(&str) -> Option<T>) -> Got<T> {
        let body = self.get(path).await?;
        let text = std::str::from_utf8(&body).ok().map(str::trim);
        text.and_then(parse).ok_or_else(|| senseless(path))
    }

    async fn get(&self, path: &str) -> Got<Bytes> {
        let full = format!("/latest/meta-data/{path}");
        let mut token = self.token().await?;
        let mut again = true;
        loop {
            let header = [("x-aliyun-ecs-metadata-token", token.expose())];
            let answer = self.send(Method::GET, &full, header).await?;
            match answer.status {
                200 => return Ok(answer.body),
                401 if again => {
                    again = false;
                    self.forget(&token).await;
                    token = self.token().await?;
                }
                status => return Err(MetadataError::Status { path: full, status }),
            }
        }
    }

    async fn token(&self) -> Got<Secret> {
        let mut held = self.token.lock().await;
        if let Some((token, until)) = held.as_ref()
            && Instant::now() < *until
        {
            return Ok(token.clone());
        }
        let path = "/latest/api/token";
        let ttl = TOKEN_TTL.as_secs().to_string();
        let header = [("x-aliyun-ecs-metadata-token-ttl-seconds", ttl.as_str())];
        let asked = Instant::now();
        let answer = self.send(Method::PUT, path, header).await?;
        if answer.status != 200 {
            return Err(MetadataError::Status { path: path.to_owned(), status: answer.status });
        }
        let token = Secret::new(first_word(&answer.body).ok_or_else(|| senseless(path))?);
        *held = Some((token.clone(), asked + TOKEN_TTL / 2));
        Ok(token)
    }

    async fn forget(&self, refused: &Secret) {
        let mut held = self.token.lock().await;
        if held.as_ref().is_some_and(|(token, _)| token == refused) {
            *held = None;
        }
    }

    async fn send(&self, method: Method, path: &str, header: [(&'static str, &str); 1]) -> Got<Answer> {
        let path_owned = || path.to_owned();
        let [(name, value)] = header;
        let request = Request::builder()
            .method(method)
            .uri(self.base.url(path))
            .header(name, value)
            .body(Full::new(Bytes::new()))
            .map_err(|_| senseless(path))?;
        match tokio::time::timeout(TIMEOUT, self.http.send(request, ANSWER_MOST)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(cause)) => Err(MetadataError::Http { path: path_owned(), cause }),
            Err(_) => Err(MetadataError::Timeout { path: path_owned() }),
        }
    }
}

fn senseless(path: &str) -> MetadataError {
    MetadataError::Senseless { path: path.to_owned() }
}

/// One printable word, the first line of a body.
pub fn first_word(body: &[u8]) -> Option<String> {
    let line = std::str::from_utf8(body).ok()?.lines().next()?.trim();
    let ok = !line.is_empty() && line.len() <= 4_096 && line.chars().all(|c| c.is_ascii_graphic());
    ok.then(|| line.to_owned())
}

/// The directory of ENIs: one MAC per line, each with a slash.
pub fn parse_macs(body: &[u8]) -> Option<Vec<Mac>> {
    let lines = std::str::from_utf8(body).ok()?.lines().map(|l| l.trim().trim_end_matches('/'));
    let macs: Vec<Mac> = lines.filter(|l| !l.is_empty()).map(|l| l.parse().ok()).collect::<Option<_>>()?;
    (macs.len() <= ENIS_MOST).then_some(macs)
}

/// Addresses: a JSON array, or `[a, b]` without quotes as the service writes
/// IPv6.
pub fn parse_list<A: FromStr>(body: &[u8]) -> Option<Vec<A>> {
    let inner = std::str::from_utf8(body).ok()?.trim().strip_prefix('[')?.strip_suffix(']')?;
    let items = inner.split(',').map(|item| item.trim().trim_matches('"')).filter(|item| !item.is_empty());
    items.map(|item| item.parse().ok()).collect()
}

/// The role's keys, and how long they live from `now`.
pub fn parse_role_keys(body: &[u8], now: jiff::Timestamp) -> Option<RoleKeys> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Raw {
        access_key_id: String,
        access_key_secret: Secret,
        security_token: Secret,
        expiration: jiff::Timestamp,
        code: Option<String>,
    }
    let raw: Raw = serde_json::from_slice(body).ok()?;
    if raw.code.is_some_and(|code| code != "Success") {
        return None;
    }
    let seconds = u64::try_from(raw.expiration.as_second().saturating_sub(now.as_second())).ok()?;
    let life = Duration::from_secs(seconds).min(Duration::from_secs(7 * 86_400));
    let keys = RoleKeys { id: raw.access_key_id, secret: raw.access_key_secret, token: raw.security_token, life };
    (!life.is_zero()).then_some(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_of_macs_is_read_with_and_without_slashes() {
        let macs = parse_macs(b"00:16:3e:00:00:01/\n00:16:3e:00:00:02\n").unwrap();
        assert_eq!(macs.iter().map(Mac::to_string).collect::<Vec<_>>(), ["00:16:3e:00:00:01", "00:16:3e:00:00:02"]);
        assert_eq!(parse_macs(b"../../secret"), None);
        assert_eq!(parse_macs("00:16:3e:00:00:01\n".repeat(257).as_bytes()), None);
    }

    #[test]
    fn address_lists_are_read_quoted_or_bare() {
        assert_eq!(
            parse_list(br#"["10.0.0.1","10.0.0.2"]"#),
            Some(vec![Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)])
        );
        assert_eq!(
            parse_list(b"[fd00::1, fd00::2]"),
            Some(vec!["fd00::1".parse::<Ipv6Addr>().unwrap(), "fd00::2".parse().unwrap()])
        );
        assert_eq!(parse_list::<Ipv4Addr>(b"[]"), Some(vec![]));
        assert_eq!(parse_list::<Ipv4Addr>(b"10.0.0.1"), None);
        assert_eq!(parse_list::<Ipv4Addr>(b"[10.0.0.1,oops]"), None);
    }

    #[test]
    fn role_keys_are_taken_only_when_they_still_live() {
        let now: jiff::Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
        let body = |expires: &str, code: &str| {
            format!(
                r#"{{"AccessKeyId":"STS.x","AccessKeySecret":"s","SecurityToken":"t","Expiration":"{expires}","Code":"{code}","LastUpdated":"x"}}"#
            )
        };
        let keys = parse_role_keys(body("2026-11-22T18:00:00Z", "Success").as_bytes(), now).unwrap();
        assert_eq!((keys.id.as_str(), keys.life), ("STS.x", Duration::from_secs(6 * 3600)));
        assert!(parse_role_keys(body("2026-11-22T12:00:00Z", "Success").as_bytes(), now).is_none());
        assert!(parse_role_keys(body("2026-11-22T18:00:00Z", "Failed").as_bytes(), now).is_none());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_taken(body: Vec<u8>) {
            let _ = (parse_macs(&body), parse_list::<Ipv6Addr>(&body), first_word(&body));
            let _ = parse_role_keys(&body, jiff::Timestamp::UNIX_EPOCH);
        }
    }
}
