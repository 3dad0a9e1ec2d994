//! KeyRing: which access keys the cloud knows, fixed and issued.
//!
//! Purpose: the secret of a key for the signature check; temporary keys of an
//! instance's RAM role, as the metadata service hands them out. Owner: the
//! engine. Invariants: a temporary key is worth nothing without the security
//! token it was issued with, nor after its time; secrets never in Debug output.

use std::collections::BTreeMap;
use std::fmt;

use rand::Rng;
use rand::rngs::StdRng;

use super::config::AccessKey;
use super::error::ApiError;
use super::state::Millis;

/// An expired key is remembered this long, to be told apart from an unknown one.
const REMEMBER_MS: u64 = 3600 * 1000;

/// Temporary credentials of one instance.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    pub key_id: String,
    pub secret: String,
    pub token: String,
    pub instance: String,
    pub issued_ms: Millis,
    pub expires_ms: Millis,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("key_id", &self.key_id).field("instance", &self.instance).finish_non_exhaustive()
    }
}

/// All keys of the account.
#[derive(Debug)]
pub struct KeyRing {
    fixed: Vec<AccessKey>,
    issued: BTreeMap<String, Issued>,
    lifetime_ms: u64,
}

impl KeyRing {
    pub fn new(fixed: Vec<AccessKey>, lifetime_seconds: u64) -> Self {
        Self { fixed, issued: BTreeMap::new(), lifetime_ms: lifetime_seconds * 1000 }
    }

    /// The secret to check a signature with.
    pub fn secret(&self, key_id: &str, token: Option<&str>, now: Millis) -> Result<&str, ApiError> {
        if let Some(issued) = self.issued.get(key_id) {
            let token = token.ok_or_else(|| {
                ApiError::new(400, "MissingSecurityToken", "SecurityToken is mandatory for this action.")
            })?;
            if token != issued.token {
                return Err(ApiError::new(
                    400,
                    "InvalidSecurityToken.MismatchWithAccessKey",
                    "Specified SecurityToken mismatch with the AccessKey.",
                ));
            }
            if now >= issued.expires_ms {
                return Err(ApiError::new(400, "InvalidSecurityToken.Expired", "Specified SecurityToken is expired."));
            }
            return Ok(&issued.secret);
        }
        let key = self.fixed.iter().find(|key| key.id == key_id);
        let key =
            key.ok_or_else(|| ApiError::new(404, "InvalidAccessKeyId.NotFound", "Specified access key is not found."))?;
        if token.is_some() {
            return Err(ApiError::new(400, "InvalidSecurityToken.Malformed", "Specified SecurityToken is malformed."));
        }
        Ok(&key.secret)
    }

    pub fn instance_of(&self, key_id: &str) -> Option<&str> {
        self.issued.get(key_id).map(|issued| issued.instance.as_str())
    }

    /// The instance's credentials: the last ones while they have a third of
    /// their life before them, else new ones.
    pub fn issue(&mut self, instance: &str, now: Millis, rng: &mut StdRng) -> Issued {
        self.issued.retain(|_, issued| now < issued.expires_ms + REMEMBER_MS);
        let good = self.issued.values().filter(|i| i.instance == instance && now + self.lifetime_ms / 3 < i.expires_ms);
        if let Some(issued) = good.max_by_key(|issued| issued.expires_ms) {
            return issued.clone();
        }
        let issued = Issued {
            key_id: format!("STS.{}", random_text(rng, 24)),
            secret: random_text(rng, 44),
            token: random_text(rng, 128),
            instance: instance.to_owned(),
            issued_ms: now,
            expires_ms: now + self.lifetime_ms,
        };
        self.issued.insert(issued.key_id.clone(), issued.clone());
        issued
    }

    /// Nothing issued to the instance is good any more.
    pub fn revoke(&mut self, instance: &str) {
        self.issued.retain(|_, issued| issued.instance != instance);
    }
}

fn random_text(rng: &mut StdRng, len: usize) -> String {
    (0..len).map(|_| char::from(rng.sample(rand::distr::Alphanumeric))).collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn temporary_keys_work_with_their_token_and_for_their_time_only() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut ring = KeyRing::new(vec![AccessKey { id: "fixed".into(), secret: "s".into() }], 90);
        let first = ring.issue("i-1", 0, &mut rng);
        let code =
            |ring: &KeyRing, id: &str, token: Option<&str>, now| ring.secret(id, token, now).err().map(|e| e.code);
        let (id, token) = (first.key_id.as_str(), Some(first.token.as_str()));
        assert_eq!(ring.secret(id, token, 89_999), Ok(first.secret.as_str()));
        assert_eq!(code(&ring, id, token, 90_000).as_deref(), Some("InvalidSecurityToken.Expired"));
        assert_eq!(code(&ring, id, None, 0).as_deref(), Some("MissingSecurityToken"));
        assert_eq!(code(&ring, id, Some("x"), 0).as_deref(), Some("InvalidSecurityToken.MismatchWithAccessKey"));
        assert_eq!(code(&ring, "fixed", Some("x"), 0).as_deref(), Some("InvalidSecurityToken.Malformed"));
        assert_eq!(code(&ring, "other", None, 0).as_deref(), Some("InvalidAccessKeyId.NotFound"));
        assert_eq!(ring.secret("fixed", None, 0), Ok("s"));
    }

    #[test]
    fn credentials_are_renewed_well_before_they_expire() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut ring = KeyRing::new(vec![], 90);
        let first = ring.issue("i-1", 0, &mut rng);
        assert_eq!(ring.issue("i-1", 59_000, &mut rng), first);
        let second = ring.issue("i-1", 61_000, &mut rng);
        assert_ne!(second.key_id, first.key_id);
        ring.secret(&first.key_id, Some(&first.token), 61_000).unwrap();
        assert_ne!(ring.issue("i-2", 61_000, &mut rng).key_id, second.key_id);
        assert!(!format!("{ring:?}").contains(&second.secret) && !format!("{ring:?}").contains(&second.token));
    }
}
