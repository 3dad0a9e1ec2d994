//! Alibaba Cloud: ECS 2014-05-26, VPC 2016-04-28, the metadata service.
//!
//! Each method encodes one request (`encode`), signs it (`sign`), sends it and
//! decodes the answer (`decode`, `errors`): pure functions around one `rpc`.

pub mod decode;
pub mod encode;
pub mod errors;
pub mod metadata;
pub mod sign;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::rc::Rc;
use std::time::Duration;

use futures::future::LocalBoxFuture;
use http::{Method, Request};
use http_body_util::Full;
use hyper::body::Bytes;
use rand::Rng as _;
use tokio::sync::OnceCell;

use self::encode::Params;
use self::metadata::Metadata;
use super::config::{Config, ConfigError, Endpoint, Endpoints, is_region};
use super::credentials::{Credentials, Keys};
use super::http::{Answer, Http, HttpError, TlsError};
use super::provider::{Api, Attempt, CallLimits, Failure, Page, Provider};
use super::{CloudError, CloudErrorKind, CreateEni, DescribeEnis, Eni, Identity, InstanceLimits, MetadataEni, VSwitch};
use crate::model::{ClientToken, EniId, InstanceId, VSwitchId};

const METADATA: &str = "http://100.100.100.200";
const USER_AGENT: &str = concat!("fairway/", env!("CARGO_PKG_VERSION"));
/// A full page of 500 ENIs with 50 addresses each stays below this.
const ANSWER_MOST: usize = 16 * 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    Ecs,
    Vpc,
}

impl Product {
    pub fn of(api: Api) -> Self {
        if api == Api::DescribeVSwitches { Product::Vpc } else { Product::Ecs }
    }
    pub fn version(self) -> &'static str {
        match self {
            Product::Ecs => "2014-05-26",
            Product::Vpc => "2016-04-28",
        }
    }
    fn host(self, region: &str) -> String {
        match self {
            Product::Ecs => format!("https://ecs-vpc.{region}.aliyuncs.com"),
            Product::Vpc => format!("https://vpc-vpc.{region}.aliyuncs.com"),
        }
    }
}

pub struct Aliyun {
    http: Rc<Http>,
    metadata: Rc<Metadata>,
    credentials: Credentials,
    endpoints: Endpoints,
    region: OnceCell<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum AliyunError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl Aliyun {
    /// Reads certificate files: blocks for some milliseconds.
    pub fn http(config: &Config) -> Result<Http, AliyunError> {
        let timeout = Duration::from_millis(config.connect_timeout_ms);
        Ok(Http::new(config.ca_file.as_deref(), timeout)?)
    }

    pub fn new(config: &Config, http: Http) -> Result<Self, AliyunError> {
        let http = Rc::new(http);
        let base = Endpoint::parse(config.endpoints.metadata.as_deref().unwrap_or(METADATA))?;
        let metadata = Rc::new(Metadata::new(http.clone(), base));
        Ok(Self {
            credentials: Credentials::new(config.credentials.clone(), metadata.clone()),
            http,
            metadata,
            endpoints: config.endpoints.clone(),
            region: OnceCell::new_with(config.region.clone()),
        })
    }

    async fn region(&self, api: Api) -> Result<&str, Failure> {
        let ask = || async {
            let region = self.metadata.region().await.map_err(|e| e.failure(api.name()))?;
            if is_region(&region) { Ok(region) } else { Err(ConfigError::Region(region)).map_err(|e| bad(api, &e)) }
        };
        self.region.get_or_try_init(ask).await.map(String::as_str)
    }

    fn endpoint(&self, product: Product, region: &str) -> Result<Endpoint, ConfigError> {
        let given = match product {
            Product::Ecs => &self.endpoints.ecs,
            Product::Vpc => &self.endpoints.vpc,
        };
        match given {
            Some(url) => Endpoint::parse(url),
            None => Endpoint::parse(&product.host(region)),
        }
    }

    /// One signed call; keys the cloud refuses are read again, once.
    async fn rpc(&self, api: Api, params: Params) -> Result<Bytes, Failure> {
        let region = self.region(api).await?;
        let mut params = params;
        if api != Api::DescribeInstanceTypes {
            params.add("RegionId", region);
        }
        let endpoint = self.endpoint(Product::of(api), region).map_err(|e| bad(api, &e))?;
        let mut again = true;
        loop {
            let keys = self.credentials.keys().await.map_err(|e| no_keys(api, &e))?;
            let answer = self.send(api, &endpoint, &params, &keys).await?;
            let Some(failure) = errors::refusal(api, answer.status, answer.retry_after, &answer.body) else {
                return Ok(answer.body);
            };
            let stale = failure.error.code.as_deref().is_some_and(errors::keys_are_stale);
            if !(stale && again && self.credentials.renewed(&keys).await) {
                return Err(failure);
            }
            again = false;
        }
    }

    async fn send(&self, api: Api, endpoint: &Endpoint, params: &Params, keys: &Keys) -> Result<Answer, Failure> {
        let query = params.canonical();
        let headers = sign::headers(&sign::Call {
            action: api.name(),
            version: Product::of(api).version(),
            host: endpoint.authority.as_str(),
            date: &jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            nonce: &hex::encode(rand::rng().random::<[u8; 16]>()),
            query: &query,
            keys,
        });
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(endpoint.url(&format!("/?{query}")))
            .header("accept", "application/json")
            .header("user-agent", USER_AGENT);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(Bytes::new())).map_err(|e| bad(api, &e))?;
        self.http.send(request, ANSWER_MOST).await.map_err(|e| transport(api.name(), &endpoint.url(""), &e).into())
    }

    async fn done(&self, api: Api, params: Params) -> Result<(), Failure> {
        self.decoded(api, params, decode::done).await
    }

    async fn decoded<T>(
        &self,
        api: Api,
        params: Params,
        decode: impl FnOnce(&[u8]) -> Result<T, decode::DecodeError>,
    ) -> Result<T, Failure> {
        let body = self.rpc(api, params).await?;
        decode(&body).map_err(|e| errors::unreadable(api.name(), &e.to_string(), None).into())
    }
}

/// A call that cannot be made as asked or configured.
fn bad(api: Api, cause: &dyn std::error::Error) -> Failure {
    let remedy = "correct the cloud section of the agent's configuration";
    CloudError::new(CloudErrorKind::Rejected, api.name(), cause.to_string(), remedy).into()
}

fn no_keys(api: Api, cause: &super::credentials::CredentialsError) -> Failure {
    use super::credentials::CredentialsError::Role;
    match cause {
        Role(e) => e.failure(api.name()),
        other => {
            let remedy = "provide the keys that cloud.credentials names";
            CloudError::new(CloudErrorKind::Forbidden, api.name(), other.to_string(), remedy).into()
        }
    }
}

pub(super) fn transport(action: &str, to: &str, cause: &HttpError) -> CloudError {
    let remedy = match cause {
        HttpError::Connect(_) => "check route, name resolution, certificate and security group towards the endpoint",
        HttpError::Broken(_) => "nothing to do if it passes; else check the network path to the endpoint",
        HttpError::TooLarge(_) => "check that the endpoint is the cloud's API",
    };
    CloudError::new(CloudErrorKind::Transport, action, format!("{to}: {cause}"), remedy)
}

fn boxed<'a, T>(attempt: impl Future<Output = Result<T, Failure>> + 'a) -> LocalBoxFuture<'a, Result<T, Failure>> {
    Box::pin(attempt)
}

impl Provider for Aliyun {
    fn limits(&self) -> CallLimits {
        CallLimits { create_ipv4: 50, create_ipv6: 10, ipv6: 10, describe_ids: 100 }
    }

    fn create_eni<'a>(&'a self, request: &'a CreateEni) -> Attempt<'a, Eni> {
        boxed(self.decoded(Api::CreateNetworkInterface, encode::create_eni(request), decode::created_eni))
    }

    fn attach_eni<'a>(&'a self, eni: &'a EniId, instance: &'a InstanceId) -> Attempt<'a, ()> {
        boxed(self.done(Api::AttachNetworkInterface, encode::eni_and_instance(eni, instance)))
    }

    fn detach_eni<'a>(&'a self, eni: &'a EniId, instance: &'a InstanceId) -> Attempt<'a, ()> {
        boxed(self.done(Api::DetachNetworkInterface, encode::eni_and_instance(eni, instance)))
    }

    fn delete_eni<'a>(&'a self, eni: &'a EniId) -> Attempt<'a, ()> {
        boxed(self.done(Api::DeleteNetworkInterface, encode::eni(eni)))
    }

    fn assign_ipv4<'a>(&'a self, eni: &'a EniId, count: u32, token: &'a ClientToken) -> Attempt<'a, Vec<Ipv4Addr>> {
        let params = encode::assign_ipv4(eni, count, token);
        boxed(self.decoded(Api::AssignPrivateIpAddresses, params, decode::assigned_ipv4))
    }

    fn unassign_ipv4<'a>(&'a self, eni: &'a EniId, addresses: &'a [Ipv4Addr]) -> Attempt<'a, ()> {
        boxed(self.done(Api::UnassignPrivateIpAddresses, encode::unassign_ipv4(eni, addresses)))
    }

    fn assign_ipv6<'a>(&'a self, eni: &'a EniId, count: u32, token: &'a ClientToken) -> Attempt<'a, Vec<Ipv6Addr>> {
        let params = encode::assign_ipv6(eni, count, token);
        boxed(self.decoded(Api::AssignIpv6Addresses, params, decode::assigned_ipv6))
    }

    fn unassign_ipv6<'a>(&'a self, eni: &'a EniId, addresses: &'a [Ipv6Addr]) -> Attempt<'a, ()> {
        boxed(self.done(Api::UnassignIpv6Addresses, encode::unassign_ipv6(eni, addresses)))
    }

    fn describe_enis<'a>(
        &'a self,
        filter: &'a DescribeEnis,
        ids: &'a [EniId],
        page: Option<&'a str>,
    ) -> Attempt<'a, Page<Eni>> {
        let params = encode::describe_enis(filter, ids, page);
        boxed(self.decoded(Api::DescribeNetworkInterfaces, params, decode::enis))
    }

    fn describe_instance_type<'a>(&'a self, type_name: &'a str) -> Attempt<'a, InstanceLimits> {
        boxed(async move {
            let api = Api::DescribeInstanceTypes;
            let read = |body: &[u8]| decode::instance_limits(body, type_name);
            let limits = self.decoded(api, encode::describe_instance_type(type_name), read).await?;
            limits.ok_or_else(|| {
                let message = format!("the cloud knows no instance type {type_name:?}");
                let remedy = "check the node's instance type and region";
                CloudError::new(CloudErrorKind::NotFound, api.name(), message, remedy).into()
            })
        })
    }

    fn describe_vswitches<'a>(
        &'a self,
        id: Option<&'a VSwitchId>,
        page: Option<&'a str>,
    ) -> Attempt<'a, Page<VSwitch>> {
        boxed(self.decoded(Api::DescribeVSwitches, encode::describe_vswitches(id, page), decode::vswitches))
    }

    fn who_am_i(&self) -> Attempt<'_, Identity> {
        boxed(async { self.metadata.who_am_i().await.map_err(|e| e.failure("WhoAmI")) })
    }

    fn metadata_enis(&self) -> Attempt<'_, Vec<MetadataEni>> {
        boxed(async { self.metadata.enis().await.map_err(|e| e.failure("MetadataEnis")) })
    }
}
