//! The API server: from an HTTP request to an action and back.
//!
//! Purpose: RPC style as the real API has it: parameters in query or form body,
//! action and version in headers or parameters, V3 signatures, throttling,
//! injected faults, request ids, error answers. Owner: one per listener.
//! Invariants: nobody unauthenticated reaches throttling or state; every
//! request that reached an action is in the call log, answered or not.

use std::sync::Arc;

use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::actions::{Api, perform};
use super::calls;
use super::engine::Engine;
use super::error::ApiError;
use super::faults::Verdict;
use super::http::{Answer, Call, Handler};
use super::params::{Params, decode_pairs};
use super::signature::{Claim, Request};
use super::state::Millis;

pub(super) struct ApiServer {
    pub engine: Arc<Engine>,
}

/// A request on its way, as far as it is known who asks for what.
#[derive(Default)]
struct Trace {
    api: Option<Api>,
    access_key: String,
    instance: Option<String>,
}

impl Handler for ApiServer {
    fn accepts(&self) -> bool {
        let now = self.engine.now();
        !self.engine.world().faults.down(now)
    }

    fn handle(self: Arc<Self>, call: Call) -> BoxFuture<'static, Answer> {
        let engine = self.engine.clone();
        Box::pin(async move {
            if !self.accepts() {
                return Answer::Drop;
            }
            // On a task of its own: a client that gives up must not stop an
            // effect half-way.
            let work = engine.tasks.spawn(async move { self.answer(call).await });
            work.await.unwrap_or(Answer::Drop)
        })
    }
}

impl ApiServer {
    async fn answer(&self, call: Call) -> Answer {
        let (begun, request_id) = (self.engine.now(), self.engine.request_id());
        let mut trace = Trace::default();
        let admitted = self.admit(&call, &mut trace, begun);
        let (result, lose) = match admitted {
            Err(error) => (Err(error), None),
            Ok((_, _, verdict)) if verdict.drop => {
                self.log(trace, begun, request_id, "dropped");
                return Answer::Drop;
            }
            Ok((api, params, verdict)) => {
                let slept = self.engine.sleep(verdict.latency_ms).await;
                let result = match (slept, verdict.refuse) {
                    (Err(error), _) | (Ok(()), Some(error)) => Err(error),
                    (Ok(()), None) => perform(&self.engine, api, &params).await,
                };
                (result, verdict.lose)
            }
        };
        let product = trace.api.map_or("Ecs", |api| api.product);
        match (&result, lose) {
            (Ok(_), Some(status)) => {
                self.log(trace, begun, request_id.clone(), "lost-reply");
                match status {
                    None => Answer::Drop,
                    Some(status) => {
                        let error = ApiError { status, ..ApiError::internal("an injected fault") };
                        self.refusal(&error, product, &request_id)
                    }
                }
            }
            (Err(error), _) => {
                self.log(trace, begun, request_id.clone(), &error.code);
                self.refusal(error, product, &request_id)
            }
            (Ok(value), None) => {
                self.log(trace, begun, request_id.clone(), "ok");
                let mut value = value.clone();
                value["RequestId"] = Value::String(request_id);
                Answer::json(200, &value)
            }
        }
    }

    /// Who asks for what, and may they? Everything up to the action itself.
    fn admit(&self, call: &Call, trace: &mut Trace, now: Millis) -> Result<(Api, Params, Verdict), ApiError> {
        let method = call.head.method.as_str();
        if !matches!(method, "GET" | "POST") {
            return Err(ApiError::new(405, "UnsupportedHTTPMethod", "This http method is not supported."));
        }
        let params = read_params(call)?;
        let named = |header: &str, param: &str| match call.head.headers.get(header) {
            Some(value) => value.to_str().map(str::to_owned).map_err(|_| ApiError::invalid(header, "it is not ASCII")),
            None => params.required(param).map(str::to_owned),
        };
        let (action, version) = (named("x-acs-action", "Action")?, named("x-acs-version", "Version")?);
        let api = Api::find(&action, &version)?;
        if call.path() != "/" {
            return Err(ApiError::new(404, "InvalidAction.NotFound", "The path of an RPC-style request is /."));
        }
        trace.api = Some(api);
        self.authenticate(call, trace, now)?;
        let mut world = self.engine.world();
        world.throttle.admit(api.name, now)?;
        let super::engine::World { faults, rng, .. } = &mut *world;
        Ok((api, params, faults.decide(api.name, now, rng)))
    }

    fn authenticate(&self, call: &Call, trace: &mut Trace, now: Millis) -> Result<(), ApiError> {
        let claim = Claim::read(&call.head.headers)?;
        claim.check_date(now)?;
        let mut world = self.engine.world();
        let secret = world.keys.secret(&claim.access_key, claim.security_token.as_deref(), now)?;
        let request = Request {
            method: call.head.method.as_str(),
            path: call.path(),
            query: call.query(),
            headers: &call.head.headers,
            body: &call.body,
        };
        claim.verify(request, secret)?;
        world.nonces.take(&claim, now)?;
        trace.instance = world.keys.instance_of(&claim.access_key).map(str::to_owned);
        trace.access_key = claim.access_key;
        Ok(())
    }

    fn log(&self, trace: Trace, begun: Millis, request_id: String, outcome: &str) {
        // What nobody has proved to have sent is not the account's call.
        let (Some(api), false) = (trace.api, trace.access_key.is_empty()) else { return };
        let duration_ms = self.engine.now().saturating_sub(begun);
        tracing::debug!(api = api.name, outcome, duration_ms, %request_id, "cloud call");
        self.engine.world().calls.add(calls::Call {
            at_ms: begun,
            duration_ms,
            api: api.name.to_owned(),
            outcome: outcome.to_owned(),
            request_id,
            access_key: trace.access_key,
            instance: trace.instance,
        });
    }

    fn refusal(&self, error: &ApiError, product: &str, request_id: &str) -> Answer {
        let host = format!("{}.{}.aliyuncs.com", product.to_ascii_lowercase(), self.engine.config.region);
        let (code, message) = (&error.code, &error.message);
        let recommend =
            format!("https://next.api.aliyun.com/troubleshoot?q={code}&product={product}&requestId={request_id}");
        let body = json!({
            "RequestId": request_id, "HostId": host, "Code": code, "Message": message, "Recommend": recommend,
        });
        let mut answer = Answer::json(error.status, &body);
        if let (Answer::Reply(response), Some(wait)) = (&mut answer, error.retry_after_ms) {
            response.headers_mut().insert("x-acs-retry-after", wait.into());
        }
        answer
    }
}

fn read_params(call: &Call) -> Result<Params, ApiError> {
    let mut pairs = decode_pairs(call.query())?;
    if !call.body.is_empty() {
        let kind = call.head.headers.get(http::header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        if !kind.starts_with("application/x-www-form-urlencoded") {
            return Err(ApiError::new(
                415,
                "UnsupportedContentType",
                "A body must be application/x-www-form-urlencoded.",
            ));
        }
        let text = std::str::from_utf8(&call.body);
        pairs
            .extend(decode_pairs(text.map_err(|_| ApiError::new(400, "InvalidParameter", "The body is not UTF-8."))?)?);
    }
    Params::new(pairs)
}
