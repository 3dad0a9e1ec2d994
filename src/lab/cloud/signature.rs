//! Checking ACS3-HMAC-SHA256 signatures.
//!
//! Purpose: say whether a request was signed with the secret of the key it
//! names, and if not, why, in the cloud's words. Owner: the API server.
//! Invariants: pure; nothing here is shared with any client of the API; error
//! messages carry neither secrets nor security tokens.

use std::collections::{HashMap, VecDeque};

use http::HeaderMap;
use ring::{digest, hmac};

use super::error::ApiError;
use super::params::{decode_pairs, encode};
use super::state::Millis;

const ALGORITHM: &str = "ACS3-HMAC-SHA256";
/// A request may be this much older or newer than the server's clock.
pub const MAX_SKEW_MS: u64 = 15 * 60 * 1000;
const MAX_NONCES: usize = 200_000;
const MAX_NONCE: usize = 128;

/// What is signed.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub method: &'a str,
    pub path: &'a str,
    /// As on the wire, without the question mark.
    pub query: &'a str,
    pub headers: &'a HeaderMap,
    pub body: &'a [u8],
}

/// The claim a request makes about itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Claim {
    pub access_key: String,
    pub security_token: Option<String>,
    pub nonce: String,
    pub date_ms: Millis,
    signed_headers: Vec<String>,
    signature: Vec<u8>,
}

fn incomplete(why: &str) -> ApiError {
    let message = format!("The request signature does not conform to Aliyun standards: {why}.");
    ApiError::new(400, "IncompleteSignature", message)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str, ApiError> {
    let value = headers.get(name).ok_or_else(|| ApiError::missing(name))?;
    value.to_str().map(str::trim).map_err(|_| ApiError::invalid(name, "it is not ASCII"))
}

impl Claim {
    pub fn read(headers: &HeaderMap) -> Result<Self, ApiError> {
        let authorization = header(headers, "authorization")
            .map_err(|_| incomplete("the Authorization header is missing; sign with ACS3-HMAC-SHA256"))?;
        let rest = authorization.strip_prefix(ALGORITHM);
        let rest = rest.ok_or_else(|| incomplete("the Authorization header must start with ACS3-HMAC-SHA256"))?;
        let field = |name: &str| {
            let mut parts = rest.split(',').filter_map(|part| part.trim().split_once('='));
            parts.find(|(key, _)| *key == name).map(|(_, value)| value).filter(|value| !value.is_empty())
        };
        let access_key = field("Credential").ok_or_else(|| incomplete("Credential is missing"))?.to_owned();
        let signed = field("SignedHeaders").ok_or_else(|| incomplete("SignedHeaders is missing"))?;
        let signature = field("Signature").ok_or_else(|| incomplete("Signature is missing"))?;
        let signature = hex::decode(signature).map_err(|_| incomplete("Signature is not hexadecimal"))?;
        let mut signed_headers: Vec<String> = signed.split(';').map(str::to_ascii_lowercase).collect();
        signed_headers.sort_unstable();
        signed_headers.dedup();
        let must = headers.keys().map(http::HeaderName::as_str).filter(|name| name.starts_with("x-acs-"));
        if let Some(unsigned) = must.chain(["host"]).find(|name| !signed_headers.iter().any(|s| s == name)) {
            return Err(incomplete(&format!("the header {unsigned} is not signed")));
        }
        let date = header(headers, "x-acs-date")?;
        let date = date.parse::<jiff::Timestamp>().map_err(|_| {
            ApiError::new(400, "InvalidTimeStamp.Format", "Specified time stamp or date value is not well formatted.")
        })?;
        let nonce = header(headers, "x-acs-signature-nonce")?;
        if nonce.is_empty() || nonce.len() > MAX_NONCE {
            return Err(ApiError::invalid("SignatureNonce", format!("it must be 1 to {MAX_NONCE} characters")));
        }
        let security_token = match headers.get("x-acs-security-token") {
            Some(_) => Some(header(headers, "x-acs-security-token")?.to_owned()),
            None => None,
        };
        Ok(Self {
            access_key,
            security_token,
            nonce: nonce.to_owned(),
            date_ms: u64::try_from(date.as_millisecond()).unwrap_or(0),
            signed_headers,
            signature,
        })
    }

    pub fn check_date(&self, now: Millis) -> Result<(), ApiError> {
        if self.date_ms.abs_diff(now) > MAX_SKEW_MS {
            return Err(ApiError::new(
                400,
                "InvalidTimeStamp.Expired",
                "Specified time stamp or date value is expired.",
            ));
        }
        Ok(())
    }

    /// Was `request` signed with `secret`?
    pub fn verify(&self, request: Request<'_>, secret: &str) -> Result<(), ApiError> {
        let body_hash = sha256_hex(request.body);
        if header(request.headers, "x-acs-content-sha256")? != body_hash {
            return Err(ApiError::new(
                400,
                "InvalidContentSha256",
                "x-acs-content-sha256 is not the hash of the body.",
            ));
        }
        let canonical = self.canonical(request, &body_hash)?;
        let to_sign = format!("{ALGORITHM}\n{}", sha256_hex(canonical.as_bytes()));
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        hmac::verify(&key, to_sign.as_bytes(), &self.signature).map_err(|_| {
            let shown = match &self.security_token {
                Some(token) => canonical.replace(token.as_str(), "***"),
                None => canonical,
            };
            let message = format!(
                "Specified signature does not match our calculation. server StringToSign is [{to_sign}] server CanonicalRequest is [{shown}]"
            );
            ApiError::new(400, "SignatureDoesNotMatch", message.replace('\n', "\\n"))
        })
    }

    fn canonical(&self, request: Request<'_>, body_hash: &str) -> Result<String, ApiError> {
        let mut pairs = decode_pairs(request.query)?;
        pairs.sort_unstable();
        let query: Vec<String> = pairs.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect();
        let mut headers = String::new();
        for name in &self.signed_headers {
            let values: Vec<&str> = request.headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).collect();
            if values.is_empty() {
                return Err(incomplete(&format!("the signed header {name} is missing")));
            }
            headers.push_str(&format!("{name}:{}\n", values.join(",").trim()));
        }
        let path = if request.path.is_empty() { "/" } else { request.path };
        Ok(format!(
            "{}\n{path}\n{}\n{headers}\n{}\n{body_hash}",
            request.method,
            query.join("&"),
            self.signed_headers.join(";"),
        ))
    }
}

fn sha256_hex(data: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, data))
}

/// Nonces seen within the time a request may be replayed.
#[derive(Debug, Default)]
pub struct Nonces {
    seen: HashMap<String, Millis>,
    order: VecDeque<String>,
}

impl Nonces {
    pub fn take(&mut self, claim: &Claim, now: Millis) -> Result<(), ApiError> {
        while let Some(oldest) = self.order.front() {
            let fresh = self.seen.get(oldest).is_some_and(|at| now.saturating_sub(*at) <= 2 * MAX_SKEW_MS);
            if fresh && self.order.len() < MAX_NONCES {
                break;
            }
            if let Some(oldest) = self.order.pop_front() {
                self.seen.remove(&oldest);
            }
        }
        let key = format!("{}/{}", claim.access_key, claim.nonce);
        if self.seen.contains_key(&key) {
            return Err(ApiError::new(400, "SignatureNonceUsed", "Specified signature nonce was used already."));
        }
        self.seen.insert(key.clone(), now);
        self.order.push_back(key);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Recorded {
        access_key_id: String,
        access_key_secret: String,
        requests: Vec<RecordedRequest>,
    }

    #[derive(Deserialize)]
    struct RecordedRequest {
        method: String,
        path: String,
        headers: Vec<(String, String)>,
        body: String,
        call: String,
    }

    fn recorded() -> Recorded {
        serde_json::from_str(include_str!("../../../tests/testdata/lab_cloud/alibaba-sdk-requests.json")).unwrap()
    }

    impl RecordedRequest {
        fn headers(&self) -> HeaderMap {
            let pair =
                |(k, v): &(String, String)| (k.parse::<HeaderName>().unwrap(), v.parse::<HeaderValue>().unwrap());
            self.headers.iter().map(pair).collect()
        }

        fn check(&self, headers: &HeaderMap, secret: &str) -> Result<Claim, ApiError> {
            let (path, query) = self.path.split_once('?').unwrap_or((&self.path, ""));
            let claim = Claim::read(headers)?;
            let body = self.body.as_bytes();
            claim.verify(Request { method: &self.method, path, query, headers, body }, secret)?;
            Ok(claim)
        }
    }

    #[test]
    fn every_request_recorded_from_the_official_sdk_verifies() {
        let recorded = recorded();
        assert_eq!(recorded.requests.len(), 16);
        for request in &recorded.requests {
            let claim = request.check(&request.headers(), &recorded.access_key_secret);
            let claim = claim.unwrap_or_else(|e| panic!("{}: {e}", request.call));
            assert_eq!(claim.access_key, recorded.access_key_id);
            assert_eq!(claim.security_token.is_some(), request.call.contains("STS"));
        }
    }

    #[test]
    fn a_request_changed_in_any_part_does_not_verify() {
        let recorded = recorded();
        let secret = &recorded.access_key_secret;
        for request in &recorded.requests {
            let headers = request.headers();
            assert_eq!(request.check(&headers, "other").err().unwrap().code, "SignatureDoesNotMatch");
            for name in ["host", "x-acs-action", "x-acs-date", "x-acs-signature-nonce", "user-agent"] {
                let mut changed = headers.clone();
                let value = if name == "x-acs-date" { "2026-11-22T13:54:17Z" } else { "changed" };
                changed.insert(name, HeaderValue::from_static(value));
                let code = request.check(&changed, secret).err().map(|e| e.code);
                assert_eq!(code.as_deref(), Some("SignatureDoesNotMatch"), "{} with another {name}", request.call);
            }
            let (path, query) = request.path.split_once('?').unwrap();
            let claim = Claim::read(&headers).unwrap();
            let method = request.method.as_str();
            let more = format!("{query}&Extra=1");
            for (query, body) in [(more.as_str(), ""), (query, "x=1")] {
                let changed = Request { method, path, query, headers: &headers, body: body.as_bytes() };
                assert!(claim.verify(changed, secret).is_err(), "{}", request.call);
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_authorization_breaks_the_reader(text in "(ACS3-HMAC-SHA256 )?[ -~]{0,120}", date in "[ -~]{0,30}") {
            let mut headers = recorded().requests[0].headers();
            headers.insert("authorization", text.parse().unwrap());
            proptest::prop_assert!(Claim::read(&headers).is_err() || text.contains("Signature="));
            headers = recorded().requests[0].headers();
            headers.insert("x-acs-date", date.parse().unwrap());
            let _ = Claim::read(&headers);
        }
    }

    #[test]
    fn an_unsigned_acs_header_is_refused() {
        let recorded = recorded();
        let mut headers = recorded.requests[0].headers();
        headers.insert("x-acs-security-token", HeaderValue::from_static("smuggled"));
        assert_eq!(Claim::read(&headers).err().map(|e| e.code).as_deref(), Some("IncompleteSignature"));
    }

    #[test]
    fn a_mismatch_does_not_repeat_the_security_token() {
        let recorded = recorded();
        let sts = recorded.requests.iter().find(|r| r.call.contains("STS")).unwrap();
        let error = sts.check(&sts.headers(), "other").err().unwrap();
        assert!(error.message.contains("CanonicalRequest") && !error.message.contains("sts-token-1"), "{error}");
    }

    #[test]
    fn old_and_replayed_requests_are_refused() {
        let recorded = recorded();
        let claim = Claim::read(&recorded.requests[0].headers()).unwrap();
        let now = claim.date_ms;
        claim.check_date(now + MAX_SKEW_MS).unwrap();
        claim.check_date(now - MAX_SKEW_MS).unwrap();
        for then in [now + MAX_SKEW_MS + 1, now - MAX_SKEW_MS - 1] {
            assert_eq!(claim.check_date(then).unwrap_err().code, "InvalidTimeStamp.Expired");
        }
        let mut nonces = Nonces::default();
        nonces.take(&claim, now).unwrap();
        assert_eq!(nonces.take(&claim, now + 1).unwrap_err().code, "SignatureNonceUsed");
        // Long after, the date alone refuses it and the memory is free again.
        nonces.take(&claim, now + 2 * MAX_SKEW_MS + 1).unwrap();
    }
}
