//! NetworkPolicies: what a verdict costs traffic, and what policies cost the agent.
//!
//! - `tcp_rr`, `tcp_crr`: two pods on two nodes, both isolated in both directions by
//!   so many policies at once, over the same two without any ([`BASELINE`])
//! - `compile_s`, `pod_change_ms`: what PolicyCompiler's worker does, into the
//!   kernel's tables: 1,000 policies over 10,000 pods from nothing, and one pod's
//!   labels at that size
//! - `rss_mb`: a whole agent, a process of its own in a lab whose cluster has
//!   150,000 pods elsewhere

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use fairway_ebpf_abi::Endpoint;
use serde_json::json;

use super::Plan;
use super::cni::rss_mb;
use super::network::traffic::{self, PORT};
use super::services::fairway::{Fairway, private_bpffs};
use super::services::on_a_thread;
use super::services::place::{Place, Space};
use super::stats::{Params, Row, Sample, rows, there_and_back};
use crate::datapath::Datapath;
use crate::datapath::policies::KernelPolicies;
use crate::debug::Listen;
use crate::lab::site::{Site, SiteConfig};
use crate::model::AttachmentId;
use crate::policy::desk::Desk;
use crate::policy::index::{Index, Kind};
use crate::policy::maps::{Change, InForce, PolicyMaps};
use crate::policy::memory::Memory;
use crate::policy::model::{Labels, Name, Peer, Pod, Policy, Port, PortAt, Requirement, Rule, Selector, Test, Word};
use crate::policy::tables::{Enforced, RuleId};
use crate::service::model::Protocol;

const BASELINE: &str = "none";
const SUBJECT: &str = "fairway";
const SIZES: [usize; 3] = [1, 100, 1000];
const ROUNDS: usize = 40;
/// How often a round goes through both, there and back.
const TURNS: usize = 2;
const WARM_UP: Duration = Duration::from_millis(5);
const RR_TIME: Duration = Duration::from_millis(20);
const CRR_TIME: Duration = Duration::from_millis(30);
/// What is compiled.
const POLICIES: usize = 1000;
const PODS: usize = 10_000;
/// Pods of this node among them.
const LOCAL: usize = 50;
const COMPILES: usize = 5;
const CHANGES: usize = 300;
const REMOTE_PODS: usize = 150_000;
const PATIENCE: Duration = Duration::from_secs(300);

pub async fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let rounds = plan.rounds.unwrap_or(ROUNDS);
    let mut samples = memory(plan).await?;
    samples.extend(on_a_thread(plan, &rounds, |_, say| control(say)).await?);
    samples.extend(on_a_thread(plan, &rounds, |rounds, say| traffic_costs(*rounds, say)).await?);
    Ok(rows(&samples, |metric| match metric {
        "tcp_rr" | "tcp_crr" => BASELINE.to_owned(),
        _ => String::new(),
    }))
}

fn sample(
    metric: &'static str,
    unit: &'static str,
    subject: &str,
    size: [usize; 2],
    round: usize,
    value: f64,
) -> Sample {
    let pairs = [("policies", size[0].to_string()), ("pods", size[1].to_string())];
    let params: Params = pairs.map(|(key, value)| (key.to_owned(), value)).into();
    Sample { metric, unit, subject: subject.to_owned(), params, round, value }
}

fn word(text: String) -> Word {
    text.into()
}

fn labelled(pairs: &[(&str, String)]) -> Arc<Labels> {
    Arc::new(Labels::new(pairs.iter().map(|(key, value)| ((*key).into(), word(value.clone())))))
}

fn with(key: &str, value: String) -> Selector {
    Selector([Requirement { key: key.into(), test: Test::In([word(value)].into()) }].into())
}

/// One that isolates whom `selects` says in both directions, and lets `peer` through.
fn policy(selects: Selector, peer: Selector) -> Policy {
    let rule = |pods| Rule {
        peers: Some([Peer::Pods { namespaces: None, pods }].into()),
        ports: Some([Port { protocol: Protocol::Tcp, at: PortAt::Range(PORT, PORT) }].into()),
    };
    let rules = Some([rule(peer)].into());
    Policy { selects, ingress: rules.clone(), egress: rules }
}

/// The kernel's tables, with pods whose profiles are only noted, or really set.
struct Tables {
    kernel: KernelPolicies,
    pods: Vec<(AttachmentId, Endpoint, Enforced)>,
}

impl PolicyMaps for Tables {
    fn read(&mut self) -> Result<InForce, String> {
        self.kernel.read().map_err(|e| e.to_string())
    }
    fn apply(&mut self, change: &Change) -> Result<(), String> {
        self.kernel.apply(change)
    }
    fn next_generation(&mut self) -> Result<(), String> {
        self.kernel.next_generation().map_err(|e| e.to_string())
    }
    fn hits(&mut self) -> Result<Vec<(RuleId, u64)>, String> {
        self.kernel.hits().map_err(|e| e.to_string())
    }
    fn pods(&mut self) -> Result<Vec<(AttachmentId, Endpoint, Enforced)>, String> {
        Ok(self.pods.clone())
    }
    fn endpoint(&mut self, attachment: &AttachmentId) -> Result<Option<Endpoint>, String> {
        Ok(self.pods.iter().find(|(id, ..)| id == attachment).map(|(_, endpoint, _)| *endpoint))
    }
    fn enforce(&mut self, attachment: &AttachmentId, how: Enforced) -> Result<Option<Endpoint>, String> {
        let found = self.pods.iter_mut().find(|(id, ..)| id == attachment);
        Ok(found.map(|pod| {
            pod.2 = how;
            pod.1
        }))
    }
}

fn address(n: usize) -> IpAddr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + n as u32).into()
}

/// A cluster of ten namespaces whose pods have one of fifty `app`s.
fn pod(n: usize, app: usize) -> (Name, Pod) {
    let name = Name::new(format!("ns{}", n % 10), format!("pod-{n}"));
    let labels = labelled(&[("app", format!("app-{app}")), ("tier", format!("tier-{}", app % 5))]);
    (name, Pod { uid: n as u64, ips: [address(n)].into(), labels, ports: [].into() })
}

/// On a thread of its own, which gets namespaces for good.
fn control(say: &dyn Fn(&str)) -> anyhow::Result<Vec<Sample>> {
    Space::new()?.enter()?;
    let bpffs = private_bpffs()?;
    let mut samples = Vec::new();
    let size = [POLICIES, PODS];
    for round in 0..COMPILES {
        say(&format!("{POLICIES} policies over {PODS} pods, {} of {COMPILES}", round + 1));
        let folder = bpffs.join(format!("policies-{round}"));
        std::fs::create_dir(&folder)?;
        let (datapath, _) = Datapath::open(&folder)?;
        let attachment = |n: usize| AttachmentId { sandbox: format!("pod-{n}").as_str().into(), ifname: "eth0".into() };
        let pods = (0..LOCAL).map(|n| (attachment(n), n as Endpoint + 1, Enforced::default())).collect();
        let tables = Tables { kernel: datapath.policy_maps()?, pods };
        let index = Index::default();
        let mut desk = Desk::open(Box::new(tables), index.clone(), Memory::open(None));
        let local: Vec<(AttachmentId, Name)> = (0..LOCAL).map(|n| (attachment(n), pod(n, n % 50).0)).collect();
        let failed = anyhow::Error::msg;
        desk.adopt(&local).map_err(failed)?;
        for kind in Kind::ALL {
            index.list_begins(kind);
        }
        for n in 0..10 {
            index.namespace(word(format!("ns{n}")), Some(labelled(&[("team", format!("team-{n}"))])));
        }
        for n in 0..PODS {
            let (name, pod) = pod(n, n % 50);
            index.pod(name, Some(pod));
        }
        for n in 0..POLICIES {
            let name = Name::new(format!("ns{}", n % 10), format!("policy-{n}"));
            let made = policy(with("app", format!("app-{}", n % 50)), with("app", format!("app-{}", (n / 10) % 50)));
            index.policy(name, Some(made));
        }
        Kind::ALL.into_iter().for_each(|kind| index.list_ends(kind));
        let began = Instant::now();
        let settled = desk.settle().map_err(failed)?.context("the cluster is not complete")?;
        let took = began.elapsed();
        anyhow::ensure!(settled.isolated == LOCAL && settled.addresses > PODS / 20, "too little: {settled:?}");
        samples.push(sample("compile_s", "s", SUBJECT, size, round, took.as_secs_f64()));
        if round == 0 {
            say(&format!("the labels of one of them, {CHANGES} times"));
            for round in 0..CHANGES {
                let n = LOCAL + (round * 7919) % (PODS - LOCAL);
                let (name, pod) = pod(n, (n + 1 + round) % 50);
                let began = Instant::now();
                index.pod(name, Some(pod));
                desk.settle().map_err(failed)?.context("the cluster is not complete")?;
                let took = began.elapsed();
                samples.push(sample("pod_change_ms", "ms", SUBJECT, size, round, took.as_secs_f64() * 1e3));
            }
        }
        drop((desk, datapath));
        std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    Ok(samples)
}

/// Two nodes and pods on them; the client of the one asks a server of the other.
struct Subject {
    name: &'static str,
    place: Place,
    fairway: Fairway,
}

impl Subject {
    fn start(name: &'static str, bpffs: &Path) -> anyhow::Result<Self> {
        let place = Place::build()?;
        std::fs::create_dir(bpffs)?;
        let fairway = Fairway::start(&place, bpffs).context("Fairway's programs")?;
        Ok(Self { name, place, fairway })
    }

    fn to(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.place.far.pods[0].address), PORT)
    }

    /// Both ends are isolated by so many policies; one of them lets the other through.
    fn isolate(&mut self, policies: usize) -> anyhow::Result<()> {
        let ends = [self.place.near.pods[0].address, self.place.far.pods[0].address];
        let named = |n: usize| Name::new("bench", format!("end-{n}"));
        for (n, agent) in self.fairway.agents().into_iter().enumerate() {
            let link = if n == 0 { &self.place.near.pods[0].link } else { &self.place.far.pods[0].link };
            let id = AttachmentId { sandbox: link.as_str().into(), ifname: "eth0".into() };
            let endpoint = agent.endpoint(&id).context("the pod's programs")?;
            let tables =
                Tables { kernel: agent.policy_maps()?, pods: vec![(id.clone(), endpoint, Enforced::default())] };
            let index = Index::default();
            let mut desk = Desk::open(Box::new(tables), index.clone(), Memory::open(None));
            let failed = anyhow::Error::msg;
            desk.adopt(&[(id.clone(), named(n))]).map_err(failed)?;
            Kind::ALL.into_iter().for_each(|kind| index.list_begins(kind));
            for (n, ip) in ends.into_iter().enumerate() {
                let labels = labelled(&[("app", "end".to_owned())]);
                index.pod(named(n), Some(Pod { uid: 0, ips: [ip.into()].into(), labels, ports: [].into() }));
            }
            for n in 0..policies {
                let peer = if n + 1 == policies { "end".to_owned() } else { format!("other-{n}") };
                index.policy(
                    Name::new("bench", format!("policy-{n}")),
                    Some(policy(with("app", "end".to_owned()), with("app", peer))),
                );
            }
            Kind::ALL.into_iter().for_each(|kind| index.list_ends(kind));
            desk.settle().map_err(failed)?;
            let how = desk.isolation(&id).context("the pod is not isolated")?;
            anyhow::ensure!(how.ingress.is_some() && how.egress.is_some(), "not in both directions: {how:?}");
            agent.isolate(&id, how)?;
        }
        Ok(())
    }

    fn measured(&self, metric: &'static str) -> anyhow::Result<f64> {
        let (client, to) = (self.place.client(), self.to());
        Ok(match metric {
            "tcp_rr" => {
                traffic::tcp_rr(&client, to, WARM_UP)?;
                traffic::tcp_rr(&client, to, RR_TIME)?.per_second
            }
            _ => {
                traffic::tcp_crr(&client, vec![to], WARM_UP)?;
                traffic::tcp_crr(&client, vec![to], CRR_TIME)?.per_second
            }
        })
    }
}

/// On a thread of its own, which gets a mount namespace for good.
fn traffic_costs(rounds: usize, say: &dyn Fn(&str)) -> anyhow::Result<Vec<Sample>> {
    let bpffs = private_bpffs()?;
    let mut subjects =
        [Subject::start(BASELINE, &bpffs.join("none"))?, Subject::start(SUBJECT, &bpffs.join("fairway"))?];
    let mut samples = Vec::new();
    for policies in SIZES {
        subjects[1].isolate(policies)?;
        for round in 0..rounds {
            if round % 10 == 0 {
                say(&format!("two pods under {policies} policies, round {} of {rounds}", round + 1));
            }
            for metric in ["tcp_rr", "tcp_crr"] {
                let mut sums = [0.0; 2];
                for turn in 0..TURNS {
                    for which in there_and_back(round + turn, 2) {
                        sums[which] += subjects[which].measured(metric)?;
                    }
                }
                for (subject, sum) in subjects.iter().zip(sums) {
                    let value = sum / (2 * TURNS) as f64;
                    samples.push(sample(metric, "1/s", subject.name, [policies, 2], round, value));
                }
            }
        }
    }
    // What was measured was under policies.
    let [_, policed] = &mut subjects;
    for agent in policed.fairway.agents() {
        let hits: u64 = agent.policy_maps()?.hits()?.iter().map(|(_, count)| count).sum();
        anyhow::ensure!(hits > 0, "no rule let a flow through");
    }
    Ok(samples)
}

/// A whole agent, in a lab whose cluster has many pods elsewhere.
async fn memory(plan: &Plan) -> anyhow::Result<Vec<Sample>> {
    let mut config = SiteConfig::new(plan.id.clone(), 1, "ecs.g7.2xlarge")?;
    config.cloud.latency_scale = 0.1;
    config.runs_pods = false;
    let site = Site::up(config, &|step| plan.progress.say(step)).await?;
    let measured = known(plan, &site).await;
    site.down().await?;
    Ok(vec![sample("rss_mb", "MB", SUBJECT, [1, REMOTE_PODS], 0, measured?)])
}

async fn known(plan: &Plan, site: &Site) -> anyhow::Result<f64> {
    plan.progress.say(&format!("{REMOTE_PODS} pods elsewhere for an agent of the lab"));
    for n in 0..10 {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("ns{n}")}});
        site.cluster.apply(namespace).await?;
    }
    let spec = json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]});
    let metadata = json!({"name": "all", "namespace": "ns0"});
    let policy =
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec});
    site.cluster.apply(policy).await?;
    for n in 0..REMOTE_PODS {
        let made = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("pod-{n}"), "namespace": format!("ns{}", n % 10),
                "labels": {"app": format!("app-{}", n % 500), "pod-template-hash": format!("{:x}", n % 1000)},
            },
            "spec": {
                "nodeName": "elsewhere",
                "containers": [{"name": "c", "image": "registry.example/c:1", "ports": [{"containerPort": 8080, "name": "http"}]}],
            },
            "status": {"phase": "Running", "podIP": address(n).to_string(), "podIPs": [{"ip": address(n).to_string()}]},
        });
        site.cluster.apply(made).await?;
        if n % 10_000 == 9_999 {
            plan.progress.say(&format!("{} of {REMOTE_PODS} pods are in the API", n + 1));
        }
    }
    let socket = Listen::Unix(site.nodes[0].debug_socket());
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let view = crate::status::client::get(&socket, "/debug/policies").await?;
        let known = view["known"]["pods"].as_u64().context("the agent's view of policies")?;
        if known >= REMOTE_PODS as u64 {
            return rss_mb(site).await;
        }
        anyhow::ensure!(tokio::time::Instant::now() < deadline, "the agent knows {known} pods only");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
