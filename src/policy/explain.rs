//! Why a connection is let through or not, from the compiled data.
//!
//! Pure.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::compile::Compiler;
use super::model::{Direction, Name};
use super::tables::Verdict;
use crate::service::model::Protocol;

/// From a pod to an address, as policies see it: after Services are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// `None`: somebody who is no pod.
    pub from: Option<Name>,
    pub from_ips: Vec<IpAddr>,
    pub to: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

/// One direction of it, at the pod that is on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    pub direction: String,
    pub pod: String,
    pub allowed: bool,
    pub why: String,
    /// Policies that isolate the pod in this direction.
    pub policies: Vec<String>,
}

pub fn judge(compiler: &Compiler, question: &Question) -> Vec<Judgement> {
    let mut all = Vec::new();
    let receiver = compiler.owner(question.to);
    let sides = [
        (Direction::Egress, question.from.as_ref(), Some(question.to)),
        (
            Direction::Ingress,
            receiver,
            question.from_ips.iter().find(|ip| ip.is_ipv4() == question.to.is_ipv4()).copied(),
        ),
    ];
    for (direction, pod, peer) in sides {
        let Some(pod) = pod else { continue };
        let Some(peer) = peer else { continue };
        let Some(endpoint) = compiler.endpoint_of(pod) else {
            all.push(Judgement {
                direction: direction.to_string(),
                pod: pod.to_string(),
                allowed: true,
                why: "the pod is on another node, which judges this direction".to_owned(),
                policies: Vec::new(),
            });
            continue;
        };
        let policies = compiler.isolating(pod, direction);
        let verdict = compiler.judge(endpoint, direction, peer, question.protocol, question.port);
        let (allowed, why) = match verdict {
            Verdict::Open => (true, "no policy isolates the pod in this direction".to_owned()),
            Verdict::Allowed(rule) => (true, format!("let through by {rule}")),
            Verdict::Denied if !compiler.knows(pod) => {
                (false, "the pod is not known from the API yet; closed until it is".to_owned())
            }
            Verdict::Denied => (false, format!("no rule of these policies has {peer} with this port")),
        };
        let policies = policies.into_iter().map(|name| name.to_string()).collect();
        all.push(Judgement { direction: direction.to_string(), pod: pod.to_string(), allowed, why, policies });
    }
    all
}
