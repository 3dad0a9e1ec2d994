//! What a lab shows: nodes, ENIs, pods, who reaches whom, cloud calls spent.
//!
//! Gathered afresh from the cloud's state, the Kubernetes objects and the
//! kubelets' records, and by asking every pod from every pod.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::site::Site;
use super::vpc::ns::Netns;
use super::workload::client::{Reach, Source, Target, matrix};
use crate::status::columns;

/// A matrix of more pods than this is sampled: every pod asks a few.
const FULL_MATRIX: usize = 12;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub nodes: Vec<NodeLine>,
    pub enis: Vec<EniLine>,
    pub pods: Vec<PodLine>,
    pub reach: Vec<Reach>,
    /// API → outcome → how often.
    pub calls: BTreeMap<String, BTreeMap<String, u64>>,
    pub metadata_reads: u64,
    /// Objects of kinds the lab does not have.
    pub skipped: Vec<String>,
    pub failures: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeLine {
    pub name: String,
    pub instance: String,
    pub instance_type: String,
    pub zone: String,
    pub addresses: Vec<IpAddr>,
    pub agent_pid: Option<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EniLine {
    pub id: String,
    pub node: String,
    pub kind: String,
    pub status: String,
    pub vswitch: String,
    pub addresses: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodLine {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    pub eni: String,
    pub ready: bool,
    /// The CNI chain's ADD, and from the pod's being seen to its running.
    pub add_ms: Option<f64>,
    pub running_ms: Option<f64>,
    pub port: Option<u16>,
    pub netns: Option<std::path::PathBuf>,
}

impl Report {
    pub fn ok(&self) -> bool {
        self.failures.is_empty() && self.reach.iter().all(|r| r.outcome.is_ok())
    }
}

/// Look at everything now. `since_ms` bounds the cloud calls counted.
pub async fn gather(site: &Site, since_ms: u64) -> anyhow::Result<Report> {
    let state = site.cloud.state();
    let mut report = Report::default();
    for node in &site.nodes {
        let instance = state.instances.iter().find(|i| i.id == node.instance);
        report.nodes.push(NodeLine {
            name: node.name.clone(),
            instance: node.instance.clone(),
            instance_type: instance.map(|i| i.instance_type.clone()).unwrap_or_default(),
            zone: instance.map(|i| i.zone.clone()).unwrap_or_default(),
            addresses: node.addresses.clone(),
            agent_pid: node.node.agent_pid().await,
        });
    }
    let mut eni_of = BTreeMap::new();
    for eni in &state.enis {
        let owner = site.nodes.iter().find(|n| eni.instance.as_ref() == Some(&n.instance));
        for address in &eni.v4 {
            eni_of.insert(IpAddr::V4(*address), eni.id.clone());
        }
        report.enis.push(EniLine {
            id: eni.id.clone(),
            node: owner.map_or("-".to_owned(), |n| n.name.clone()),
            kind: eni.kind.as_str().to_owned(),
            status: eni.status.as_str().to_owned(),
            vswitch: eni.vswitch.clone(),
            addresses: eni.v4.len(),
        });
    }
    let pods = site.pods().await?;
    let ports: BTreeMap<(&str, &str), u16> = pods.iter().filter_map(port_of).collect();
    for pod in pods.iter().filter(|p| p.spec.as_ref().is_some_and(|s| s.node_name.is_none())) {
        report.failures.push(format!("pod {}/{} has no node: {}", named(pod).0, named(pod).1, why_no_node(pod)));
    }
    for node in &site.nodes {
        for record in node.kubelet.records().into_iter().filter(|r| !r.ended) {
            let port = ports.get(&(record.pod.namespace.as_str(), record.pod.name.as_str())).copied();
            if !record.ready {
                let why = record.failures.last().cloned().unwrap_or_else(|| "still starting".to_owned());
                report.failures.push(format!("pod {} on {}: {why}", record.pod, node.name));
            }
            report.pods.push(PodLine {
                namespace: record.pod.namespace.clone(),
                name: record.pod.name.clone(),
                node: node.name.clone(),
                eni: record.ips.first().and_then(|ip| eni_of.get(ip)).cloned().unwrap_or_else(|| "-".to_owned()),
                addresses: record.ips.clone(),
                ready: record.ready,
                add_ms: record.phases.add.map(millis),
                running_ms: record.phases.running.map(millis),
                port,
                netns: record.netns.clone(),
            });
        }
    }
    report.pods.sort_by(|a, b| (&a.node, &a.namespace, &a.name).cmp(&(&b.node, &b.namespace, &b.name)));
    report.reach = reach(&report.pods).await;
    let calls = site.cloud.calls(since_ms);
    report.calls = calls.by_api;
    report.metadata_reads = calls.metadata_reads;
    report.failures.extend(site.cloud.audit());
    Ok(report)
}

fn named(pod: &Pod) -> (&str, &str) {
    (pod.metadata.namespace.as_deref().unwrap_or_default(), pod.metadata.name.as_deref().unwrap_or_default())
}

/// The first port of a pod's first container.
fn port_of(pod: &Pod) -> Option<((&str, &str), u16)> {
    let port = pod.spec.as_ref()?.containers.first()?.ports.as_ref()?.first()?.container_port;
    Some((named(pod), u16::try_from(port).ok()?))
}

fn why_no_node(pod: &Pod) -> String {
    let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let why = conditions.filter(|c| c.type_ == "PodScheduled").find_map(|c| c.message.clone());
    why.unwrap_or_else(|| "the scheduler has not said why".to_owned())
}

fn millis(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

async fn reach(pods: &[PodLine]) -> Vec<Reach> {
    let sources: Vec<Source> = pods
        .iter()
        .filter_map(|p| Some(Source { name: p.name.clone(), ns: Netns::open(p.netns.as_ref()?).ok()? }))
        .collect();
    let all: Vec<Target> = pods
        .iter()
        .filter_map(|p| {
            let address = SocketAddr::new(*p.addresses.first()?, p.port?);
            Some(Target { name: p.name.clone(), address })
        })
        .collect();
    let within = Duration::from_secs(3);
    if sources.len() <= FULL_MATRIX {
        return matrix(&sources, &all, within).await;
    }
    let mut found = Vec::new();
    for (n, source) in sources.iter().enumerate() {
        let few: Vec<Target> = (1..=3).filter_map(|k| all.get((n * 7 + k * 13) % all.len().max(1)).cloned()).collect();
        found.extend(matrix(std::slice::from_ref(source), &few, within).await);
    }
    found
}

/// For a person.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    let line = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<String>>();
    let join = |ips: &[IpAddr]| ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ");
    let ms = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.1}"));

    let mut lines = vec![line(&["NODE", "INSTANCE", "TYPE", "ZONE", "ADDRESSES"])];
    for n in &report.nodes {
        lines.push(line(&[&n.name, &n.instance, &n.instance_type, &n.zone, &join(&n.addresses)]));
    }
    let _ = writeln!(out, "{}", columns(&lines));

    let mut lines = vec![line(&["ENI", "NODE", "KIND", "STATUS", "VSWITCH", "ADDRESSES"])];
    for e in &report.enis {
        lines.push(line(&[&e.id, &e.node, &e.kind, &e.status, &e.vswitch, &e.addresses.to_string()]));
    }
    let _ = writeln!(out, "{}", columns(&lines));

    let mut lines = vec![line(&["POD", "NODE", "ADDRESSES", "ENI", "READY", "ADD MS", "RUNNING AFTER MS"])];
    for p in report.pods.iter().take(60) {
        let name = format!("{}/{}", p.namespace, p.name);
        let ready = if p.ready { "yes" } else { "no" };
        lines.push(line(&[&name, &p.node, &join(&p.addresses), &p.eni, ready, &ms(p.add_ms), &ms(p.running_ms)]));
    }
    let _ = writeln!(out, "{}", columns(&lines));
    if report.pods.len() > 60 {
        let _ = writeln!(out, "… and {} pods more (--json shows all)\n", report.pods.len() - 60);
    }
    out.push_str(&reach_text(&report.reach));
    out.push_str(&calls_text(report));
    for skipped in &report.skipped {
        let _ = writeln!(out, "skipped, not a kind of this lab: {skipped}");
    }
    for failure in &report.failures {
        let _ = writeln!(out, "FAILED: {failure}");
    }
    out
}

/// Round trips in milliseconds: rows ask, columns answer.
pub fn reach_text(reach: &[Reach]) -> String {
    let mut names: Vec<&str> = reach.iter().map(|r| r.from.as_str()).collect();
    names.dedup();
    let answered = reach.iter().filter(|r| r.outcome.is_ok()).count();
    let mut out = format!("reachability: {answered} of {} asked pods answered with their own name\n", reach.len());
    if names.len() <= FULL_MATRIX {
        let mut lines =
            vec![std::iter::once("RTT MS".to_owned()).chain(names.iter().map(|n| (*n).to_owned())).collect()];
        for from in &names {
            let cell = |to: &&str| match reach.iter().find(|r| r.from == **from && r.to == **to).map(|r| &r.outcome) {
                Some(Ok(rtt)) => format!("{:.2}", millis(*rtt)),
                Some(Err(_)) => "FAIL".to_owned(),
                None => "-".to_owned(),
            };
            lines.push(std::iter::once((*from).to_owned()).chain(names.iter().map(cell)).collect());
        }
        out.push_str(&columns(&lines));
    }
    for r in reach.iter().filter(|r| r.outcome.is_err()).take(10) {
        if let Err(why) = &r.outcome {
            let _ = writeln!(out, "  {} → {} ({}): {why}", r.from, r.to, r.address);
        }
    }
    out.push('\n');
    out
}

fn calls_text(report: &Report) -> String {
    let mut lines = vec![vec!["CLOUD CALL".to_owned(), "OK".to_owned(), "REFUSED".to_owned()]];
    let mut mutating = 0;
    for (api, outcomes) in &report.calls {
        let ok = outcomes.get("ok").copied().unwrap_or(0);
        let all: u64 = outcomes.values().sum();
        if !api.starts_with("Describe") {
            mutating += all;
        }
        lines.push(vec![api.clone(), ok.to_string(), (all - ok).to_string()]);
    }
    let served = report.pods.iter().filter(|p| !p.addresses.is_empty()).count();
    format!(
        "{}{mutating} calls that change something, for {served} pods; {} metadata reads\n\n",
        columns(&lines),
        report.metadata_reads
    )
}
