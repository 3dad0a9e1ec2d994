//! Traffic between pods on two nodes, beside node to node and an overlay.
//!
//! All subjects cross the same router between the same two nodes. `node` has no
//! pod at all and is what a virtual machine would get; `exclusive` pods have an
//! ENI of their own; `veth` pods share one; `vxlan` is what they are spared.

pub mod overlay;
pub mod traffic;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use super::Plan;
use super::stats::{Params, Row, Sample, rows, there_and_back};
use crate::lab::demo::wait_pods;
use crate::lab::site::{Site, SiteConfig};
use overlay::{End, Overlay};
use traffic::{Pair, Server};

const INSTANCE_TYPE: &str = "ecs.g7.2xlarge";
const MTU: u32 = 1500;
const ROUNDS: usize = 100;
/// How often a round goes through all subjects, there and back.
const TURNS: usize = 3;
/// Of one measurement. Many short ones: each is a connection with a port of its
/// own, which falls on some queue and with it on some core, and that makes more of
/// a difference than what is compared here.
const TIME: Duration = Duration::from_millis(20);
/// Of the first, which warms up caches and is thrown away.
const WARM_UP: Duration = Duration::from_millis(5);

pub async fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let mut config = SiteConfig::new(plan.id.clone(), 2, INSTANCE_TYPE)?;
    config.cloud.latency_scale = 0.1;
    config.mtu = MTU;
    let site = Site::up(config, &|step| plan.progress.say(step)).await?;
    let measured = async {
        plan.progress.say("two pods with an ENI of their own, two that share one, an overlay");
        for eni in ["exclusive", "shared"] {
            pods(&site, eni).await?;
        }
        wait_pods(&site, 4, Duration::from_secs(60)).await?;
        let overlay = overlay(&site)?;
        let pairs = vec![
            node_pair(&site)?,
            pod_pair(&site, "exclusive", "exclusive")?,
            pod_pair(&site, "shared", "veth")?,
            Pair {
                subject: "vxlan".to_owned(),
                client: overlay.pod(0),
                server: overlay.pod(1),
                address: overlay.address(1).into(),
            },
        ];
        let rounds = plan.rounds.unwrap_or(ROUNDS);
        let progress = &plan.progress;
        // The traffic's threads block; the lab's tasks go on meanwhile.
        let samples = tokio::task::block_in_place(|| traffic(&pairs, rounds, &|what| progress.say(what)));
        drop(overlay);
        samples
    };
    let measured = measured.await;
    site.down().await?;
    Ok(rows(&measured?, |_| "node".to_owned()))
}

fn traffic(pairs: &[Pair], rounds: usize, say: &dyn Fn(&str)) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let servers: Vec<Server> = pairs
        .iter()
        .map(|pair| Server::start(&pair.server, pair.address).with_context(|| pair.subject.clone()))
        .collect::<Result<_, _>>()?;
    for round in 0..rounds {
        if round % 10 == 0 {
            say(&format!("traffic, round {} of {rounds}", round + 1));
        }
        for metric in METRICS {
            let mut sums = vec![0.0; pairs.len()];
            for which in (0..TURNS).flat_map(|turn| there_and_back(round + turn, pairs.len())) {
                let (pair, server) = (&pairs[which], &servers[which]);
                let about = || format!("{} of {}", metric.name, pair.subject);
                (metric.measure)(pair, server, WARM_UP).with_context(about)?;
                sums[which] += (metric.measure)(pair, server, TIME).with_context(about)?;
            }
            samples.extend(pairs.iter().zip(sums).map(|(pair, sum)| Sample {
                metric: metric.name,
                unit: metric.unit,
                subject: pair.subject.clone(),
                params: Params::new(),
                round,
                value: sum / (2 * TURNS) as f64,
            }));
        }
    }
    Ok(samples)
}

struct Metric {
    name: &'static str,
    unit: &'static str,
    measure: fn(&Pair, &Server, Duration) -> std::io::Result<f64>,
}

const METRICS: [Metric; 4] = [
    Metric {
        name: "tcp_rr",
        unit: "1/s",
        measure: |pair, _, time| Ok(traffic::tcp_rr(&pair.client, pair.to(), time)?.per_second),
    },
    Metric {
        name: "udp_rr",
        unit: "1/s",
        measure: |pair, _, time| Ok(traffic::udp_rr(&pair.client, pair.to(), time)?.per_second),
    },
    Metric {
        name: "udp_pps",
        unit: "1/s",
        measure: |pair, server, time| traffic::udp_pps(&pair.client, pair.to(), &[server], time),
    },
    Metric {
        name: "tcp_gbps",
        unit: "Gbit/s",
        measure: |pair, server, time| traffic::tcp_gbps(&pair.client, pair.to(), &[server], time),
    },
];

/// One pod of the kind on each node.
async fn pods(site: &Site, eni: &str) -> anyhow::Result<()> {
    for node in &site.nodes {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": "default",
                "name": format!("{eni}-{}", node.name),
                "annotations": { "fairway.io/eni": eni },
            },
            "spec": { "nodeName": node.name, "containers": [{ "name": "c", "image": "registry.example/c:1" }] },
        });
        site.cluster.apply(pod).await?;
    }
    Ok(())
}

fn node_pair(site: &Site) -> anyhow::Result<Pair> {
    let [client, server] = ends(site)?;
    Ok(Pair {
        subject: "node".to_owned(),
        client: client.node.ns().path().to_owned(),
        server: server.node.ns().path().to_owned(),
        address: *server.addresses.first().context("the node has no address")?,
    })
}

fn pod_pair(site: &Site, eni: &str, subject: &str) -> anyhow::Result<Pair> {
    let place = |node: &crate::lab::site::SiteNode| -> anyhow::Result<(PathBuf, IpAddr)> {
        let name = format!("{eni}-{}", node.name);
        let record = node.kubelet.record("default", &name).with_context(|| format!("no pod {name}"))?;
        let address = *record.ips.first().with_context(|| format!("{name} has no address"))?;
        Ok((record.netns.with_context(|| format!("{name} has no namespace"))?, address))
    };
    let [client, server] = ends(site)?;
    let ((client, _), (server, address)) = (place(client)?, place(server)?);
    Ok(Pair { subject: subject.to_owned(), client, server, address })
}

fn ends(site: &Site) -> anyhow::Result<[&crate::lab::site::SiteNode; 2]> {
    let [one, other] = site.nodes.as_slice() else { anyhow::bail!("the site has not two nodes") };
    Ok([one, other])
}

fn overlay(site: &Site) -> anyhow::Result<Overlay> {
    let end = |node: &crate::lab::site::SiteNode| -> anyhow::Result<End> {
        match node.addresses.first() {
            Some(IpAddr::V4(underlay)) => Ok(End { node: node.node.ns().name().to_owned(), underlay: *underlay }),
            _ => anyhow::bail!("node {} has no IPv4 address", node.name),
        }
    };
    let [one, other] = ends(site)?;
    Ok(Overlay::build(&site.id().prefix(), [end(one)?, end(other)?], MTU)?)
}
