//! Why a connection is let through or not, from the compiled data.
//!
//! Pure.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::compile::Compiler;
use super::model::{Direction, Name};
use super::tables::Verdict;
use crate::service::Client;
use crate::service::model::Protocol;

/// From somebody to an address or a pod, after Services are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub from: Client,
    pub to: Vec<Target>,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Address(SocketAddr),
    /// At each of its addresses.
    Pod(Name, u16),
}

/// What policies say of a connection to one address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    pub to: SocketAddr,
    pub allowed: bool,
    pub directions: Vec<Judgement>,
}

/// One direction of it, at one pod's door.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    pub direction: String,
    pub pod: String,
    pub allowed: bool,
    pub why: String,
    /// Policies that isolate the pod in this direction.
    pub policies: Vec<String>,
}

/// `Err`: there is no such pod.
pub fn judge(compiler: &Compiler, question: &Question) -> Result<Vec<Judged>, Name> {
    let client = match &question.from {
        Client::Pod(key) => {
            let name = Name::new(key.namespace.as_str(), key.name.as_str());
            if !compiler.knows(&name) && compiler.endpoint_of(&name).is_none() {
                return Err(name);
            }
            Some(name)
        }
        _ => None,
    };
    let mut all = Vec::new();
    for target in &question.to {
        match target {
            Target::Address(at) => all.push(*at),
            Target::Pod(name, _) if !compiler.knows(name) => return Err(name.clone()),
            Target::Pod(name, port) => all.extend(compiler.ips(name).iter().map(|ip| SocketAddr::new(*ip, *port))),
        }
    }
    Ok(all.into_iter().map(|at| one(compiler, question, client.as_ref(), at)).collect())
}

fn one(compiler: &Compiler, question: &Question, client: Option<&Name>, to: SocketAddr) -> Judged {
    let mut directions = Vec::new();
    let v4 = to.is_ipv4();
    if let Some(pod) = client {
        directions.push(at_door(compiler, Direction::Egress, pod, to.ip(), question.protocol, to.port()));
    }
    if let Some(pod) = compiler.owner(to.ip()) {
        let peer = match &question.from {
            Client::Pod(_) => client.and_then(|name| compiler.ips(name).iter().find(|ip| ip.is_ipv4() == v4).copied()),
            Client::Outside(ip) => *ip,
            Client::Node => None,
        };
        directions.push(match (&question.from, peer) {
            (Client::Node, _) => told(Direction::Ingress, pod, "the node always reaches its own pods"),
            (_, Some(peer)) => at_door(compiler, Direction::Ingress, pod, peer, question.protocol, to.port()),
            (_, None) => told(Direction::Ingress, pod, "depends on the client's address: ask with outside=<address>"),
        });
    }
    Judged { to, allowed: directions.iter().all(|d| d.allowed), directions }
}

fn told(direction: Direction, pod: &Name, why: &str) -> Judgement {
    Judgement {
        direction: direction.to_string(),
        pod: pod.to_string(),
        allowed: true,
        why: why.to_owned(),
        policies: Vec::new(),
    }
}

fn at_door(
    compiler: &Compiler,
    direction: Direction,
    pod: &Name,
    peer: IpAddr,
    protocol: Protocol,
    port: u16,
) -> Judgement {
    let Some(endpoint) = compiler.endpoint_of(pod) else {
        return told(direction, pod, "the pod is on another node, which judges this direction");
    };
    if compiler.ips(pod).contains(&peer) {
        return told(direction, pod, "a pod always reaches itself");
    }
    let (allowed, why) = match compiler.judge(endpoint, direction, peer, protocol, port) {
        Verdict::Open => (true, "no policy isolates the pod in this direction".to_owned()),
        Verdict::Allowed(rule) => (true, format!("let through by {rule}")),
        Verdict::Denied if !compiler.knows(pod) => {
            (false, "the pod is not known from the API yet, and closed until it is".to_owned())
        }
        Verdict::Denied => (false, format!("no rule of these policies opens {protocol} {port} to {peer}")),
    };
    let policies = compiler.isolating(pod, direction).into_iter().map(ToString::to_string).collect();
    Judgement { direction: direction.to_string(), pod: pod.to_string(), allowed, why, policies }
}
