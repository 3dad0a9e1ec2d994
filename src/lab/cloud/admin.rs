//! The admin interface: what only a lab has.
//!
//! Purpose: register nodes, inject faults, read counts and the whole state,
//! over HTTP under `/lab/`, for `fairway lab cloud` and for other processes.
//! In-process users call [`CloudLab`](super::CloudLab) instead; both do the same. Owner: one per
//! listener, which belongs where only the lab's people can reach it.

use std::sync::Arc;

use futures::future::BoxFuture;
use http::Method;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::CloudLab;
use super::error::ApiError;
use super::faults::FaultSpec;
use super::http::{Answer, Call, Handler};

pub(super) struct AdminServer {
    pub lab: CloudLab,
}

const PATHS: &str = "GET /lab/state, /lab/audit, /lab/calls?since=MS, /lab/faults, /lab/instances, /lab/ca; \
    POST /lab/instances, /lab/faults; DELETE /lab/instances/ID, /lab/faults, /lab/faults/ID";

impl AdminServer {
    async fn answer(&self, call: Call) -> Result<Answer, ApiError> {
        let path: Vec<&str> = call.path().trim_matches('/').split('/').collect();
        let method = &call.head.method;
        let lab = &self.lab;
        Ok(match (method, path.as_slice()) {
            (&Method::GET, ["lab", "state"]) => Answer::json(200, &lab.state()),
            (&Method::GET, ["lab", "audit"]) => Answer::json(200, &json!({"violations": lab.audit()})),
            (&Method::GET, ["lab", "ca"]) => match lab.ca_pem() {
                Some(pem) => Answer::new(200, "application/x-pem-file", pem.to_owned()),
                None => Answer::text(404, "this cloud has no HTTPS listener"),
            },
            (&Method::GET, ["lab", "calls"]) => Answer::json(200, &lab.calls(since(&call)?)),
            (&Method::GET, ["lab", "faults"]) => Answer::json(200, &lab.faults()),
            (&Method::POST, ["lab", "faults"]) => {
                let spec: FaultSpec = body(&call)?;
                Answer::json(201, &json!({"id": lab.add_fault(spec)?}))
            }
            (&Method::DELETE, ["lab", "faults"]) => {
                lab.clear_faults();
                Answer::json(200, &json!({}))
            }
            (&Method::DELETE, ["lab", "faults", id]) => {
                let id = id.parse().map_err(|_| ApiError::invalid("id", "it is not a number"))?;
                if lab.remove_fault(id) { Answer::json(200, &json!({})) } else { Answer::text(404, "no such fault") }
            }
            (&Method::GET, ["lab", "instances"]) => Answer::json(200, &lab.instances()),
            (&Method::POST, ["lab", "instances"]) => {
                let (spec, lab) = (body(&call)?, lab.clone());
                let done = self.lab.spawn(async move { lab.register_instance(&spec).await }).await?;
                Answer::json(201, &done)
            }
            (&Method::DELETE, ["lab", "instances", id]) => {
                let (id, lab) = ((*id).to_owned(), lab.clone());
                self.lab.spawn(async move { lab.remove_instance(&id).await }).await?;
                Answer::json(200, &json!({}))
            }
            _ => Answer::text(404, format!("what there is: {PATHS}")),
        })
    }
}

impl Handler for AdminServer {
    fn handle(self: Arc<Self>, call: Call) -> BoxFuture<'static, Answer> {
        Box::pin(async move {
            self.answer(call).await.unwrap_or_else(|error| {
                Answer::json(error.status, &json!({"Code": error.code, "Message": error.message}))
            })
        })
    }
}

fn since(call: &Call) -> Result<u64, ApiError> {
    let pairs = super::params::decode_pairs(call.query())?;
    let since = pairs.iter().find(|(name, _)| name == "since");
    since.map_or(Ok(0), |(_, value)| value.parse().map_err(|_| ApiError::invalid("since", "want milliseconds")))
}

fn body<T: DeserializeOwned>(call: &Call) -> Result<T, ApiError> {
    serde_json::from_slice(&call.body).map_err(|error| ApiError::invalid("body", error))
}
