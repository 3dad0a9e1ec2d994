//! `/debug/trace?from=…&to=…&protocol=…`: where a connection goes, and whether
//! policies let it through, asked of ServiceMap and of PolicyCompiler.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::actor::{AskError, Deadline, Port};
use crate::policy::explain::{Judged, Question, Target};
use crate::policy::model::Name;
use crate::policy::{Judge, PolicyError};
use crate::service::explain::{Explanation, Outcome};
use crate::service::model::Protocol;
use crate::service::{Client, Explain, ExplainError};

/// Backends that are judged: more would say the same.
const MOST_BACKENDS: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    /// Absent where this agent carries no Services, and for a client of another node.
    pub service: Option<Explanation>,
    /// What policies say of each place where the connection may go. Absent where this
    /// agent enforces none.
    pub policies: Option<Vec<Judged>>,
}

/// Whom there is to ask.
#[derive(Clone)]
pub struct Tracer {
    pub services: Option<Port<Explain>>,
    pub policies: Option<Port<Judge>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Asked {
    from: Client,
    to: Target,
    protocol: Protocol,
}

impl Tracer {
    pub async fn trace(&self, arguments: &BTreeMap<String, String>, deadline: Deadline) -> Result<Traced, String> {
        let Asked { from, to, protocol } = question(arguments)?;
        let mut policies = None;
        let at = match &to {
            Target::Address(at) => *at,
            Target::Pod(name, _) => {
                let judged = self.judge(&from, vec![to.clone()], protocol, deadline).await?;
                let judged = judged.ok_or("this agent knows addresses alone: policies are not enforced")?;
                let first = judged.first().ok_or_else(|| format!("pod {name} has no address yet"))?.to;
                policies = Some(judged);
                first
            }
        };
        let service = match &self.services {
            Some(port) => {
                let ask = Explain { client: from.clone(), to: at, protocol };
                match port.ask(ask, deadline).await {
                    Ok(explanation) => Some(explanation),
                    // Of another node: that one leads its connections to Services.
                    Err(AskError::Domain(ExplainError::NoSuchPod(_))) if self.policies.is_some() => None,
                    Err(e) => return Err(e.to_string()),
                }
            }
            None => None,
        };
        if policies.is_none() {
            let places = match &service {
                Some(e) if e.outcome == Outcome::Balanced => {
                    let chosen = e.backends.iter().filter(|b| b.slot.is_some()).take(MOST_BACKENDS);
                    chosen.map(|b| Target::Address(b.addr)).collect()
                }
                Some(e) if e.outcome != Outcome::NotAService => Vec::new(),
                _ => vec![to],
            };
            policies = self.judge(&from, places, protocol, deadline).await?;
        }
        Ok(Traced { service, policies })
    }

    async fn judge(
        &self,
        from: &Client,
        to: Vec<Target>,
        protocol: Protocol,
        deadline: Deadline,
    ) -> Result<Option<Vec<Judged>>, String> {
        let Some(port) = &self.policies else { return Ok(None) };
        let question = Question { from: from.clone(), to, protocol };
        let judged = port.ask(Judge { question }, deadline).await;
        judged.map(Some).map_err(|e: AskError<PolicyError>| e.to_string())
    }
}

fn question(arguments: &BTreeMap<String, String>) -> Result<Asked, String> {
    let known = ["from", "to", "protocol"];
    if let Some(unknown) = arguments.keys().find(|k| !known.contains(&k.as_str())) {
        return Err(format!("no argument {unknown:?}; want {}", known.join(", ")));
    }
    let given = |name: &str| arguments.get(name).map(String::as_str);
    let to = given("to").ok_or("to which address and port? give `to`")?;
    let protocol: Protocol = given("protocol").unwrap_or("TCP").parse().map_err(|e| format!("{e}"))?;
    let from: Client = given("from").unwrap_or("node").parse()?;
    Ok(Asked { from, to: target(to)?, protocol })
}

/// An address or a pod, with a port.
fn target(text: &str) -> Result<Target, String> {
    if let Ok(at) = text.parse::<SocketAddr>() {
        return Ok(Target::Address(at));
    }
    let wrong = || format!("{text:?} is no address or pod with a port (10.96.0.1:80, [fd00::1]:80, shop/web-0:8080)");
    let (pod, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().map_err(|_| wrong())?;
    let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
    let is_word = |word: &str| {
        let sound = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        !word.is_empty() && word.len() <= 253 && word.chars().all(sound)
    };
    // An address without a port is no pod.
    match is_word(namespace) && is_word(name) && pod.parse::<std::net::IpAddr>().is_err() {
        true => Ok(Target::Pod(Name::new(namespace, name), port)),
        false => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PodKey;

    fn ask(pairs: &[(&str, &str)]) -> Result<Asked, String> {
        question(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn what_is_asked_is_understood_or_refused_in_words() {
        let asked = ask(&[("from", "shop/web-0"), ("to", "[fd00::1]:53"), ("protocol", "udp")]).unwrap();
        assert_eq!(asked.from, Client::Pod(PodKey::new("shop", "web-0")));
        assert_eq!((asked.to, asked.protocol), (Target::Address("[fd00::1]:53".parse().unwrap()), Protocol::Udp));
        assert_eq!(ask(&[("to", "10.0.0.1:1")]).unwrap().from, Client::Node);
        let outside = ask(&[("from", "outside=192.0.2.1"), ("to", "10.0.0.1:1")]).unwrap().from;
        assert_eq!(outside, Client::Outside(Some("192.0.2.1".parse().unwrap())));
        assert_eq!(ask(&[("to", "shop/web-0:80")]).unwrap().to, Target::Pod(Name::new("shop", "web-0"), 80));
        assert_eq!(ask(&[("to", "web-0:80")]).unwrap().to, Target::Pod(Name::new("default", "web-0"), 80));
        assert!(ask(&[]).unwrap_err().contains("to which"));
        for bad in ["10.0.0.1", "web-0", "web-0:http", "10.0.0.300:1x", "a/b/c:1", "fd00::1", ":80", "a b:80"] {
            assert!(ask(&[("to", bad)]).unwrap_err().contains("port"), "{bad}");
        }
        assert!(ask(&[("to", "10.0.0.1:1"), ("protocol", "icmp")]).unwrap_err().contains("SCTP"));
        assert!(ask(&[("to", "10.0.0.1:1"), ("from", "inside=1")]).unwrap_err().contains("client"));
        assert!(ask(&[("to", "10.0.0.1:1"), ("form", "x")]).unwrap_err().contains("form"));
    }
}
