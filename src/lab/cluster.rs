//! The Kubernetes API that a lab's nodes belong to.
//!
//! Purpose: one face for two things. Without `--kubeconfig` it is the stand-in,
//! served by this process, with the lab's controllers and scheduler. With it, it
//! is a server somewhere else: nothing of the stand-in is started, so only that
//! server's own controllers and scheduler are in force.
//!
//! Owner of: the stand-in or the [`relay`](self) that makes the other server
//! reachable inside the VPC, and the files that say where to find it. Invariant:
//! what the lab has put on another server (its Nodes) is removed again.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::kube::{KubeConfig, KubeLab, kind, kubeconfig, object};
use super::kubelet::api::KubeApi;
use super::vpc::Vpc;

/// Where people find the API.
const FOR_PEOPLE: &str = "kubeconfig";
/// Where agents find it, inside the VPC.
pub const FOR_NODES: &str = "kubeconfig-vpc";
/// Names of nodes that the lab has put on another server.
const ELSEWHERE: &str = "nodes-elsewhere";
/// As real kubelets: the node is alive.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Another server is given this long before the lab gives up on it.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Cluster {
    client: kube::Client,
    /// The stand-in, unless another server is used.
    pub stand_in: Option<KubeLab>,
    /// Nodes registered with another server, and their heartbeats.
    nodes: parking_lot::Mutex<Vec<(String, JoinHandle<()>)>>,
    relay: Option<JoinHandle<()>>,
    state: PathBuf,
}

impl Cluster {
    /// Start the stand-in: at `at` inside the VPC, and on loopback for people.
    pub fn stand_in(vpc: &Vpc, at: SocketAddr, state: &Path) -> anyhow::Result<Self> {
        let local = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        let address = local.local_addr()?;
        let config = KubeConfig { advertise: vec![at], ..KubeConfig::default() };
        let kube = KubeLab::start(config, vec![vpc.listen_tcp(at)?, local])?;
        crate::install::replace(&state.join(FOR_PEOPLE), kubeconfig(address).as_bytes(), 0o600)?;
        crate::install::replace(&state.join(FOR_NODES), kubeconfig(at).as_bytes(), 0o600)?;
        let client = kube::Client::try_from(kube::Config::new(format!("http://{address}").parse()?))?;
        Ok(Self { client, stand_in: Some(kube), nodes: Default::default(), relay: None, state: state.to_owned() })
    }

    /// Use the server that `file` leads to, and make it reachable at `at`.
    pub async fn elsewhere(vpc: &Vpc, at: SocketAddr, state: &Path, file: &Path) -> anyhow::Result<Self> {
        let named = || format!("kubeconfig {}", file.display());
        let read = Kubeconfig::read_from(file).with_context(named)?;
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(read.clone(), &options).await.with_context(named)?;
        let client = kube::Client::try_from(config).with_context(named)?;
        // A wrong address or certificate is said now, not by every node later.
        match tokio::time::timeout(PATIENCE, client.apiserver_version()).await {
            Ok(answer) => drop(answer.with_context(|| format!("{}: the server does not answer", file.display()))?),
            Err(_) => bail!("{}: the server does not answer within {PATIENCE:?}", file.display()),
        }
        // Read, its paths are absolute.
        let text = serde_json::to_string_pretty(&read)?;
        crate::install::replace(&state.join(FOR_PEOPLE), text.as_bytes(), 0o600)?;
        let relay = publish(vpc, at, state, read)?;
        Ok(Self { client, stand_in: None, nodes: Default::default(), relay: Some(relay), state: state.to_owned() })
    }

    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Create or change an object so that it is as `object` says.
    pub async fn apply(&self, object: Value) -> anyhow::Result<()> {
        if let Some(kube) = &self.stand_in {
            kube.apply(object)?;
            return Ok(());
        }
        let (api_version, word) = (object::text(&object, "/apiVersion"), object::text(&object, "/kind"));
        let kind = kind::by_gvk(api_version, word).with_context(|| format!("no kind {word} in {api_version}"))?;
        let gvk = GroupVersionKind::gvk(kind.group, kind.version, kind.kind);
        let resource = ApiResource::from_gvk_with_plural(&gvk, kind.plural);
        let namespace = Some(object::namespace(&object)).filter(|n| !n.is_empty()).unwrap_or("default");
        let api: Api<DynamicObject> = match kind.namespaced {
            true => Api::namespaced_with(self.client(), namespace, &resource),
            false => Api::all_with(self.client(), &resource),
        };
        match object::name(&object) {
            "" => drop(api.create(&PostParams::default(), &serde_json::from_value(object)?).await?),
            name => {
                let params = PatchParams::apply("fairway-lab").force();
                api.patch(name, &params, &Patch::Apply(&object)).await?;
            }
        }
        Ok(())
    }

    /// The pods of these nodes, and those that have no node yet.
    pub async fn pods(&self, nodes: &[&str]) -> anyhow::Result<Vec<Pod>> {
        let all: Vec<Pod> = match &self.stand_in {
            Some(kube) => {
                let read = kube.list("Pod").into_iter().map(|pod| serde_json::from_value((*pod).clone()));
                read.collect::<Result<_, _>>()?
            }
            None => Api::<Pod>::all(self.client()).list(&ListParams::default()).await?.items,
        };
        let node = |p: &Pod| p.spec.as_ref().and_then(|s| s.node_name.clone());
        Ok(all.into_iter().filter(|p| node(p).is_none_or(|n| nodes.contains(&n.as_str()))).collect())
    }

    /// Create the Node object and keep it alive; a node of somebody else is left
    /// alone.
    pub async fn register(&self, api: &KubeApi, node: &Node) -> anyhow::Result<()> {
        let name = node.metadata.name.clone().unwrap_or_default();
        if self.stand_in.is_none() {
            let provider = |n: &Node| n.spec.as_ref().and_then(|s| s.provider_id.clone());
            let there = Api::<Node>::all(self.client()).get_opt(&name).await?;
            if there.is_some_and(|there| provider(&there) != provider(node)) {
                bail!("the API server has a node {name} that is not this lab's; use another API server, or remove it");
            }
            let mut nodes = self.nodes.lock();
            nodes.push((name.clone(), tokio::spawn(beat(self.client(), name))));
            // For whoever takes the lab down after a crash.
            let names: Vec<&str> = nodes.iter().map(|(name, _)| name.as_str()).collect();
            std::fs::write(self.state.join(ELSEWHERE), names.join("\n"))?;
        }
        Ok(api.register(node).await?)
    }

    /// Stop the stand-in, or take the lab's nodes off the other server.
    pub async fn stop(mut self) {
        let nodes = std::mem::take(&mut *self.nodes.lock());
        for (_, beating) in &nodes {
            beating.abort();
        }
        let names: Vec<String> = nodes.into_iter().map(|(name, _)| name).collect();
        forget_nodes(&self.client, &names).await;
        if let Some(kube) = self.stand_in.take() {
            kube.stop().await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.relay.iter().for_each(JoinHandle::abort);
        self.nodes.lock().iter().for_each(|(_, beating)| beating.abort());
    }
}

/// After a crash: remove from another server the Nodes that the lab with this
/// state folder has put there.
pub async fn forget_left_behind(state: &Path) {
    let Ok(names) = std::fs::read_to_string(state.join(ELSEWHERE)) else { return };
    let names: Vec<String> = names.lines().map(str::to_owned).collect();
    let connect = async {
        let read = Kubeconfig::read_from(state.join(FOR_PEOPLE))?;
        let config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
        anyhow::Ok(kube::Client::try_from(config)?)
    };
    match connect.await {
        Ok(client) => forget_nodes(&client, &names).await,
        Err(e) => tracing::warn!(target: "lab", "nodes {} stay on the API server: {e}", names.join(", ")),
    }
}

/// Remove Nodes and their heartbeats from another server.
async fn forget_nodes(client: &kube::Client, names: &[String]) {
    let nodes: Api<Node> = Api::all(client.clone());
    let leases: Api<k8s_openapi::api::coordination::v1::Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    for name in names {
        let removing = async {
            let _ = leases.delete(name, &DeleteParams::default()).await;
            nodes.delete(name, &DeleteParams::default()).await
        };
        match tokio::time::timeout(PATIENCE, removing).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!(target: "lab", "node {name} stays on the API server: {e}"),
            Err(_) => tracing::warn!(target: "lab", "node {name} stays on the API server: it does not answer"),
        }
    }
}

/// What tells a real node controller that the kubelet lives.
async fn beat(client: kube::Client, node: String) {
    let api: Api<k8s_openapi::api::coordination::v1::Lease> = Api::namespaced(client, "kube-node-lease");
    let mut tick = tokio::time::interval(HEARTBEAT);
    loop {
        tick.tick().await;
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(k8s_openapi::jiff::Timestamp::now());
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": node},
            "spec": {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": now},
        });
        if let Err(e) = api.patch(&node, &PatchParams::apply("fairway-lab").force(), &Patch::Apply(&lease)).await {
            tracing::debug!(target: "lab", "heartbeat of {node}: {e}");
        }
    }
}

/// Make the server of a kubeconfig reachable at `at` in the VPC, by passing
/// bytes on, and write a kubeconfig with which agents find it there.
pub fn publish(vpc: &Vpc, at: SocketAddr, state: &Path, read: Kubeconfig) -> anyhow::Result<JoinHandle<()>> {
    let (server, inside) = rehost(read, at)?;
    crate::install::replace(&state.join(FOR_NODES), format!("{inside:#}\n").as_bytes(), 0o600)?;
    let listener = TcpListener::from_std(vpc.listen_tcp(at)?)?;
    Ok(tokio::spawn(relay(listener, server)))
}

/// The current context's server as host and port, and the same kubeconfig with
/// `at` in its place. The certificate is still checked against the real name.
fn rehost(mut read: Kubeconfig, at: SocketAddr) -> anyhow::Result<(String, Value)> {
    let remedy = "choose one: kubectl config use-context NAME";
    let current = read.current_context.clone().with_context(|| format!("no current-context; {remedy}"))?;
    let context = read.contexts.iter().find(|c| c.name == current).and_then(|c| c.context.clone());
    let context = context.with_context(|| format!("there is no context {current}; {remedy}"))?;
    let cluster = read.clusters.iter_mut().find(|c| c.name == context.cluster).and_then(|c| c.cluster.as_mut());
    let cluster = cluster.with_context(|| format!("context {current} names no cluster of the file"))?;
    if cluster.proxy_url.is_some() {
        bail!("the cluster is reached through a proxy, which nodes of the lab cannot use; remove proxy-url");
    }
    let url: http::Uri = cluster.server.as_deref().context("the cluster has no server")?.parse()?;
    let secure = url.scheme_str() != Some("http");
    let host = url.host().context("the cluster's server names no host")?.to_owned();
    let server = format!("{host}:{}", url.port_u16().unwrap_or(if secure { 443 } else { 80 }));
    let path = url.path().trim_end_matches('/');
    cluster.server = Some(format!("{}://{at}{path}", if secure { "https" } else { "http" }));
    if secure && cluster.tls_server_name.is_none() {
        cluster.tls_server_name = Some(host.trim_matches(['[', ']']).to_owned());
    }
    Ok((server, serde_json::to_value(read)?))
}

/// Pass every connection on to `server`, from this process's own network.
async fn relay(listener: TcpListener, server: String) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((mut from, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let server = server.clone();
                open.spawn(async move {
                    // A server that is away looks like one: the connection ends.
                    if let Ok(mut to) = TcpStream::connect(&server).await {
                        let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                    }
                });
            }
            Some(_) = open.join_next() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kubeconfig(server: &str) -> Kubeconfig {
        serde_json::from_value(json!({
            "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "other", "cluster": {"server": "https://other"}}, {"name": "k", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
        }))
        .unwrap()
    }

    #[test]
    fn the_server_moves_and_its_certificate_is_still_checked() {
        let at = "100.100.0.20:6443".parse().unwrap();
        let (server, inside) = rehost(kubeconfig("https://api.example.com/k8s/"), at).unwrap();
        assert_eq!(server, "api.example.com:443");
        let cluster = inside.pointer("/clusters/1/cluster").unwrap();
        assert_eq!(cluster["server"], "https://100.100.0.20:6443/k8s");
        assert_eq!(cluster["tls-server-name"], "api.example.com");
        assert_eq!(inside.pointer("/users/0/user/token").unwrap(), "secret");
        let (server, inside) = rehost(kubeconfig("http://[::1]:8080"), at).unwrap();
        assert_eq!(server, "[::1]:8080");
        assert_eq!(inside.pointer("/clusters/1/cluster").unwrap(), &json!({"server": "http://100.100.0.20:6443"}));
    }

    #[test]
    fn a_kubeconfig_without_a_way_to_its_server_says_what_to_do() {
        let at = "100.100.0.20:6443".parse().unwrap();
        let mut no_context = kubeconfig("https://a");
        no_context.current_context = None;
        assert!(rehost(no_context, at).unwrap_err().to_string().contains("use-context"));
    }
}
