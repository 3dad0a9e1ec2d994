//! Who Fairway is towards the cloud: access keys and where they come from.
//!
//! Owner of the only copies of secrets. Invariants: a [`Secret`] never prints;
//! keys of a role are replaced before they expire, and as long as they hold, a
//! metadata service that is away costs nothing; keys that the cloud refused are
//! read again before they are used again.

use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::aliyun::metadata::{Metadata, MetadataError, RoleKeys};

/// A text that is kept out of logs, Debug output and serialised config.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
    /// The text itself: to sign with, or to put into a header.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{self:?}"))
    }
}

/// Where keys come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// The RAM role of this instance, through the metadata service; the
    /// instance's only one unless named.
    RamRole {
        #[serde(default)]
        role: Option<String>,
    },
    /// Files, such as a mounted Secret; read again as they change.
    Files {
        access_key_id: PathBuf,
        access_key_secret: PathBuf,
        #[serde(default)]
        security_token: Option<PathBuf>,
    },
    /// Environment variables: ALIBABA_CLOUD_ACCESS_KEY_ID, …_ACCESS_KEY_SECRET
    /// and, if set, …_SECURITY_TOKEN.
    Env {},
    /// Written in the configuration.
    Static {
        access_key_id: String,
        access_key_secret: Secret,
        #[serde(default)]
        security_token: Option<Secret>,
    },
}

impl Default for Source {
    fn default() -> Self {
        Source::RamRole { role: None }
    }
}

/// What a request is signed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    pub id: String,
    pub secret: Secret,
    pub token: Option<Secret>,
}

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("credentials file {path:?}: {cause}")]
    File { path: PathBuf, cause: String },
    #[error("environment variable {0} is not set")]
    Env(&'static str),
    #[error("{0} is empty, too long or has characters that no key has")]
    Malformed(&'static str),
    #[error("the keys of this instance's RAM role: {0}")]
    Role(MetadataError),
}

/// Files are looked at this often at most; refused keys at once.
const FILES_FRESH: Duration = Duration::from_secs(5);
/// A failed refresh is tried again after this long while the old keys hold.
const REFRESH_RETRY: Duration = Duration::from_secs(30);
/// How long a call may wait for a refresh while the old keys hold.
const REFRESH_PATIENCE: Duration = Duration::from_secs(2);
const LONGEST: usize = 8 * 1024;

pub struct Credentials {
    source: Source,
    metadata: Rc<Metadata>,
    cached: Mutex<Option<Cached>>,
}

struct Cached {
    keys: Rc<Keys>,
    /// Renew at the first use after this.
    renew: Instant,
    /// Not to be used from here on.
    expires: Option<Instant>,
}

impl Credentials {
    pub fn new(source: Source, metadata: Rc<Metadata>) -> Self {
        Self { source, metadata, cached: Mutex::new(None) }
    }

    /// Keys that are good now.
    pub async fn keys(&self) -> Result<Rc<Keys>, CredentialsError> {
        let mut cached = self.cached.lock().await;
        let now = Instant::now();
        if let Some(held) = cached.as_mut() {
            if now < held.renew {
                return Ok(held.keys.clone());
            }
            if held.expires.is_some_and(|expires| now < expires) {
                let failed = match tokio::time::timeout(REFRESH_PATIENCE, self.load()).await {
                    Ok(Ok(fresh)) => {
                        *held = fresh;
                        return Ok(held.keys.clone());
                    }
                    Ok(Err(e)) => e.to_string(),
                    Err(_) => "no answer".to_owned(),
                };
                tracing::warn!(error = failed, "Keys could not be renewed; using those at hand until they expire");
                held.renew = Instant::now() + REFRESH_RETRY;
                return Ok(held.keys.clone());
            }
        }
        // Dropped before the read: a failure must not leave old keys behind.
        *cached = None;
        let fresh = self.load().await?;
        let keys = fresh.keys.clone();
        *cached = Some(fresh);
        Ok(keys)
    }

    /// The cloud refused these keys: true when reading again brought others.
    pub async fn renewed(&self, refused: &Keys) -> bool {
        {
            let mut cached = self.cached.lock().await;
            if cached.as_ref().is_some_and(|held| *held.keys == *refused) {
                *cached = None;
            }
        }
        self.keys().await.is_ok_and(|keys| *keys != *refused)
    }

    async fn load(&self) -> Result<Cached, CredentialsError> {
        let now = Instant::now();
        let (keys, renew, expires) = match &self.source {
            Source::Static { access_key_id, access_key_secret, security_token } => {
                let token = security_token.as_ref().map(|t| t.expose().to_owned());
                (checked(access_key_id.clone(), access_key_secret.expose().to_owned(), token)?, None, None)
            }
            Source::Env {} => {
                let var = |name| std::env::var(name).map_err(|_| CredentialsError::Env(name));
                let id = var("ALIBABA_CLOUD_ACCESS_KEY_ID")?;
                let secret = var("ALIBABA_CLOUD_ACCESS_KEY_SECRET")?;
                let token = var("ALIBABA_CLOUD_SECURITY_TOKEN").ok().filter(|t| !t.is_empty());
                (checked(id, secret, token)?, None, None)
            }
            Source::Files { access_key_id, access_key_secret, security_token } => {
                let id = read(access_key_id).await?;
                let secret = read(access_key_secret).await?;
                let token = match security_token {
                    Some(path) => Some(read(path).await?),
                    None => None,
                };
                (checked(id, secret, token)?, Some(now + FILES_FRESH), None)
            }
            Source::RamRole { role } => {
                let RoleKeys { id, secret, token, life } =
                    self.metadata.role_keys(role.as_deref()).await.map_err(CredentialsError::Role)?;
                let keys = checked(id, secret.expose().to_owned(), Some(token.expose().to_owned()))?;
                (keys, Some(now + life - renew_ahead(life)), Some(now + life))
            }
        };
        // Static keys are good until refused.
        let renew = renew.unwrap_or(now + Duration::from_secs(365 * 86_400));
        Ok(Cached { keys: Rc::new(keys), renew, expires })
    }
}

/// How long before their end keys that live this long are replaced.
fn renew_ahead(life: Duration) -> Duration {
    (life / 4).min(Duration::from_secs(15 * 60))
}

/// Keys become parts of headers: printable, bounded, trimmed.
fn checked(id: String, secret: String, token: Option<String>) -> Result<Keys, CredentialsError> {
    let check = |text: String, what| {
        let trimmed = text.trim();
        let ok = !trimmed.is_empty() && trimmed.len() <= LONGEST && trimmed.chars().all(|c| c.is_ascii_graphic());
        if ok { Ok(trimmed.to_owned()) } else { Err(CredentialsError::Malformed(what)) }
    };
    Ok(Keys {
        id: check(id, "the access key id").and_then(|id| {
            // These separate the parts of the Authorization header.
            if id.contains([',', '=']) { Err(CredentialsError::Malformed("the access key id")) } else { Ok(id) }
        })?,
        secret: Secret::new(check(secret, "the access key secret")?),
        token: token.map(|t| check(t, "the security token")).transpose()?.map(Secret::new),
    })
}

async fn read(path: &Path) -> Result<String, CredentialsError> {
    let failed = |cause: String| CredentialsError::File { path: path.to_owned(), cause };
    let file = tokio::fs::File::open(path).await.map_err(|e| failed(e.to_string()))?;
    let mut text = Vec::new();
    file.take(LONGEST as u64 + 1).read_to_end(&mut text).await.map_err(|e| failed(e.to_string()))?;
    String::from_utf8(text).map_err(|_| failed("is not text".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_never_print() {
        let keys = checked("id-1".to_owned(), "hush-1".to_owned(), Some("hush-2".to_owned())).unwrap();
        let source = Source::Static {
            access_key_id: "id-1".to_owned(),
            access_key_secret: Secret::new("hush-1"),
            security_token: Some(Secret::new("hush-2")),
        };
        for text in [format!("{keys:?}"), format!("{source:#?}"), serde_json::to_string(&source).unwrap()] {
            assert!(text.contains("id-1") && !text.contains("hush"), "{text}");
        }
    }

    #[test]
    fn keys_that_could_break_a_header_are_refused_without_being_shown() {
        for (id, secret, token) in [
            ("", "s", None),
            ("a\nb", "s", None),
            ("a,SignedHeaders=x", "s", None),
            ("a", "  ", None),
            ("a", "s", Some("t\u{7f}")),
        ] {
            let error = checked(id.to_owned(), secret.to_owned(), token.map(str::to_owned)).unwrap_err();
            assert!(matches!(error, CredentialsError::Malformed(_)));
            assert!(!error.to_string().contains("SignedHeaders"));
        }
    }

    #[test]
    fn keys_are_renewed_well_before_their_end_however_short_they_live() {
        assert_eq!(renew_ahead(Duration::from_secs(6 * 3600)), Duration::from_secs(900));
        assert_eq!(renew_ahead(Duration::from_secs(60)), Duration::from_secs(15));
    }

    #[tokio::test(start_paused = true)]
    async fn files_are_read_again_when_they_change() {
        let dir = tempfile::tempdir().unwrap();
        let (id, secret) = (dir.path().join("id"), dir.path().join("secret"));
        std::fs::write(&id, "one\n").unwrap();
        std::fs::write(&secret, "s-one\n").unwrap();
        let source =
            Source::Files { access_key_id: id.clone(), access_key_secret: secret.clone(), security_token: None };
        let credentials = Credentials::new(source, Rc::new(Metadata::unreachable()));
        let first = credentials.keys().await.unwrap();
        assert_eq!((first.id.as_str(), first.secret.expose()), ("one", "s-one"));

        std::fs::write(&id, "two\n").unwrap();
        assert_eq!(credentials.keys().await.unwrap().id, "one", "not read for every call");
        tokio::time::advance(FILES_FRESH).await;
        assert_eq!(credentials.keys().await.unwrap().id, "two");

        std::fs::write(&id, "three\n").unwrap();
        let two = credentials.keys().await.unwrap();
        assert!(credentials.renewed(&two).await, "refused keys are read again at once");
        assert_eq!(credentials.keys().await.unwrap().id, "three");

        std::fs::remove_file(&secret).unwrap();
        tokio::time::advance(FILES_FRESH).await;
        let error = credentials.keys().await.unwrap_err().to_string();
        assert!(error.contains("secret") && error.contains("No such file"), "{error}");
    }
}
