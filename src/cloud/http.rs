//! One HTTP client for all of the cloud: connections kept, sizes bounded.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

/// Headers of an answer, all together.
const HEADERS_MOST: usize = 64 * 1024;
const IDLE: Duration = Duration::from_secs(30);

pub struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<Duration>,
    pub body: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Nothing was sent.
    #[error("no connection: {0}")]
    Connect(String),
    #[error("the connection failed before the answer was complete: {0}")]
    Broken(String),
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cloud.ca_file {path}: {cause}")]
    CaFile { path: String, cause: String },
    #[error("no certificate authority is trusted: install ca-certificates or set cloud.ca_file")]
    NoRoots,
    #[error("TLS: {0}")]
    Config(#[from] rustls::Error),
}

impl Http {
    /// Reads certificates: blocks for some milliseconds.
    pub fn new(ca_file: Option<&Path>, connect_timeout: Duration) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(system_certificates());
        if let Some(path) = ca_file {
            let bad = |cause: String| TlsError::CaFile { path: path.display().to_string(), cause };
            let certificates = CertificateDer::pem_file_iter(path).map_err(|e| bad(e.to_string()))?;
            let mut found = false;
            for certificate in certificates {
                let certificate = certificate.map_err(|e| bad(e.to_string()))?;
                roots.add(certificate).map_err(|e| bad(e.to_string()))?;
                found = true;
            }
            if !found {
                return Err(bad("holds no certificate (PEM)".to_owned()));
            }
        }
        if roots.is_empty() {
            return Err(TlsError::NoRoots);
        }
        Self::with_roots(roots, connect_timeout)
    }

    fn with_roots(roots: RootCertStore, connect_timeout: Duration) -> Result<Self, TlsError> {
        let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(connect_timeout));
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(4)
            .http1_max_buf_size(HEADERS_MOST)
            .build(connector);
        Ok(Self { client })
    }

    #[cfg(test)]
    pub(super) fn without_tls() -> Self {
        Self::with_roots(RootCertStore::empty(), Duration::from_secs(1)).unwrap()
    }

    pub async fn send(&self, request: Request<Full<Bytes>>, most: usize) -> Result<Answer, HttpError> {
        let response = self.client.request(request).await.map_err(|e| {
            let cause = chain(&e);
            if e.is_connect() { HttpError::Connect(cause) } else { HttpError::Broken(cause) }
        })?;
        read(response, most).await
    }
}

/// The system's certificate authorities; none where it has no bundle.
fn system_certificates() -> Vec<CertificateDer<'static>> {
    // Debian and Alpine; Red Hat and Alibaba Cloud Linux; the rest.
    let usual =
        ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"].map(Into::into);
    let bundle = match std::env::var_os("SSL_CERT_FILE") {
        Some(file) => Some(file.into()),
        None => usual.into_iter().find(|path: &std::path::PathBuf| path.exists()),
    };
    let Some(Ok(certificates)) = bundle.map(CertificateDer::pem_file_iter) else {
        return Vec::new();
    };
    // A certificate that cannot be read is one less to trust.
    certificates.filter_map(Result::ok).collect()
}

async fn read(response: Response<Incoming>, most: usize) -> Result<Answer, HttpError> {
    let status = response.status().as_u16();
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.as_bytes()));
    match Limited::new(response.into_body(), most).collect().await {
        Ok(body) => Ok(Answer { status, retry_after, body: body.to_bytes() }),
        Err(e) if e.is::<LengthLimitError>() => Err(HttpError::TooLarge(most)),
        Err(e) => Err(HttpError::Broken(chain(&*e))),
    }
}

/// Whole seconds; dates are not worth the trouble. A hostile value cannot stop
/// us for long.
fn retry_after(value: &[u8]) -> Option<Duration> {
    let seconds: u64 = std::str::from_utf8(value).ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds.min(60)))
}

/// An error with all its causes: hyper's own text says only "client error".
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
