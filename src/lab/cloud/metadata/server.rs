//! The metadata service's HTTP side: tokens, who is asking, credentials.
//!
//! Invariants: an instance only ever sees itself; a token works for the
//! instance it was issued to and for its time; tokens are not stored.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use futures::future::BoxFuture;
use http::Method;
use ring::hmac;
use serde_json::json;

use super::super::engine::Engine;
use super::super::http::{Answer, Call, Handler};
use super::super::state::Millis;

const TOKEN: &str = "x-aliyun-ecs-metadata-token";
const TOKEN_TTL: &str = "x-aliyun-ecs-metadata-token-ttl-seconds";
const MAX_TTL_SECONDS: u64 = 21_600;

/// Which instance a peer is.
#[derive(Clone, Default)]
pub enum Resolver {
    /// The one whose attached ENI has the peer's address.
    #[default]
    ByAddress,
    /// The one named for the peer's address; any other peer by its ENI.
    Peers(BTreeMap<IpAddr, String>),
    Custom(Arc<dyn Fn(SocketAddr) -> Option<String> + Send + Sync>),
}

pub(in super::super) struct MetadataServer {
    engine: Arc<Engine>,
    resolver: Resolver,
    key: hmac::Key,
}

impl MetadataServer {
    pub fn new(engine: Arc<Engine>, resolver: Resolver) -> Self {
        let secret: [u8; 32] = {
            use rand::Rng;
            engine.world().rng.random()
        };
        Self { engine, resolver, key: hmac::Key::new(hmac::HMAC_SHA256, &secret) }
    }

    fn answer(&self, call: &Call) -> Answer {
        let now = self.engine.now();
        let (extra_lag, down) = self.engine.world().faults.metadata(now);
        match down {
            Some(None) => return Answer::Drop,
            Some(Some(status)) => return Answer::text(status, "an injected fault"),
            None => {}
        }
        let peer = call.peer.ip().to_canonical();
        let by_address = || self.engine.world().account.instance_at(peer).map(str::to_owned);
        let instance = match &self.resolver {
            Resolver::ByAddress => by_address(),
            Resolver::Peers(peers) => peers.get(&peer).cloned().or_else(by_address),
            Resolver::Custom(resolve) => resolve(call.peer),
        };
        let Some(instance) = instance else {
            return Answer::text(404, format!("no instance has the address {peer}"));
        };
        match (&call.head.method, call.path()) {
            (&Method::PUT, "/latest/api/token") => self.token(call, &instance, now),
            (&Method::GET, path) => self.read(call, path, &instance, now, extra_lag),
            _ => Answer::text(405, "method not allowed"),
        }
    }

    fn token(&self, call: &Call, instance: &str, now: Millis) -> Answer {
        // The real service refuses to hand a token to a proxy.
        if call.head.headers.contains_key("x-forwarded-for") {
            return Answer::text(403, "forbidden");
        }
        let ttl = call.head.headers.get(TOKEN_TTL).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
        match ttl.filter(|ttl| (1..=MAX_TTL_SECONDS).contains(ttl)) {
            None => Answer::text(400, format!("the header {TOKEN_TTL} must be within 1 and {MAX_TTL_SECONDS}")),
            Some(ttl) => Answer::text(200, self.sign(now + ttl * 1000, instance)),
        }
    }

    fn sign(&self, expires: Millis, instance: &str) -> String {
        let tag = hmac::sign(&self.key, format!("{expires}/{instance}").as_bytes());
        format!("{expires:x}-{}", hex::encode(tag))
    }

    fn token_is_good(&self, token: &str, instance: &str, now: Millis) -> bool {
        let parts = token
            .split_once('-')
            .and_then(|(expires, tag)| Some((u64::from_str_radix(expires, 16).ok()?, hex::decode(tag).ok()?)));
        parts.is_some_and(|(expires, tag)| {
            let signed = format!("{expires}/{instance}");
            now < expires && hmac::verify(&self.key, signed.as_bytes(), &tag).is_ok()
        })
    }

    fn read(&self, call: &Call, path: &str, instance: &str, now: Millis, extra_lag: u64) -> Answer {
        let given = call.head.headers.get(TOKEN).map(|v| v.to_str().unwrap_or_default());
        let good = given.map(|token| self.token_is_good(token, instance, now));
        if good == Some(false) || (good.is_none() && self.engine.config.metadata_token_required) {
            return Answer::text(401, "the metadata token is missing, wrong or expired: PUT /latest/api/token");
        }
        let versions = ["/latest/meta-data", "/2016-01-01/meta-data"];
        let Some(path) = versions.iter().find_map(|version| path.strip_prefix(version)) else {
            return if path == "/" { Answer::text(200, "2016-01-01\nlatest") } else { Answer::text(404, "not found") };
        };
        let mut world = self.engine.world();
        world.calls.metadata_reads += 1;
        let view = world.views.at(instance, now, self.engine.metadata_lag() + extra_lag);
        drop(world);
        let Some(value) = view.and_then(|view| view.read(path)) else { return Answer::text(404, "not found") };
        let role = path.trim_matches('/').strip_prefix("ram/security-credentials/");
        match role {
            Some(role) if self.engine.config.role.as_deref() == Some(role) => self.credentials(instance, now),
            _ => Answer::text(200, value),
        }
    }

    fn credentials(&self, instance: &str, now: Millis) -> Answer {
        let mut world = self.engine.world();
        let super::super::engine::World { keys, rng, .. } = &mut *world;
        let issued = keys.issue(instance, now, rng);
        let time = |ms: Millis| {
            let at = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
            at.unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
        };
        Answer::json(
            200,
            &json!({
                "AccessKeyId": issued.key_id,
                "AccessKeySecret": issued.secret,
                "SecurityToken": issued.token,
                "LastUpdated": time(issued.issued_ms),
                "Expiration": time(issued.expires_ms),
                "Code": "Success",
            }),
        )
    }
}

impl Handler for MetadataServer {
    fn handle(self: Arc<Self>, call: Call) -> BoxFuture<'static, Answer> {
        Box::pin(async move { self.answer(&call) })
    }
}
