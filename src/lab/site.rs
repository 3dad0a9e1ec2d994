//! Site: the whole lab assembled, from the VPC to the nodes' kubelets.
//!
//! Owner of every part; brings them up in order and takes them down in the
//! reverse one, also when bringing up fails half-way or the caller goes away.
//! The agents learn what they know from the cloud's API, the metadata service,
//! the Kubernetes API and their configuration file, as on a real node.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::cloud::{self, CloudLab, Listeners, RegisterInstance};
use super::cluster::{Cluster, FOR_NODES};
use super::controllers::balancers::Balancers;
use super::kube::KubeLab;
use super::kubelet::api::{KubeApi, NoPods, PodSource, node_object};
use super::kubelet::{Kubelet, KubeletConfig};
use super::node::agent::AgentSpec;
use super::node::{Node, down};
use super::vpc::edge::VmSpec;
use super::vpc::name::LabId;
use super::vpc::ns::Netns;
use super::vpc::os::Boot;
use super::vpc::{Vpc, VpcConfig};
use crate::install::{self, Conflist};

mod config;

pub use config::{NodeSpec, SiteConfig};

/// Where the services of the VPC listen, in the router's namespace.
pub(super) const API: Ipv4Addr = Ipv4Addr::new(100, 100, 0, 10);
pub(super) const KUBE_API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(100, 100, 0, 20)), 6443);
pub(super) const METADATA: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);
/// The plain VM, in a block of the VPC that no vSwitch has.
const VM: Ipv4Addr = Ipv4Addr::new(10, 0, 240, 10);

/// A node with its instance, agent and kubelet.
pub struct SiteNode {
    pub name: String,
    pub instance: String,
    pub addresses: Vec<IpAddr>,
    pub node: Node,
    pub kubelet: Kubelet,
}

impl SiteNode {
    pub fn debug_socket(&self) -> PathBuf {
        debug_socket(&self.node.dirs().root)
    }
}

fn debug_socket(root: &Path) -> PathBuf {
    root.join("debug.sock")
}

/// A running lab. Take it down with [`Site::down`]; dropped, it still ends, but
/// nobody hears what went wrong.
pub struct Site {
    // Fields are dropped in this order: nodes before what they live in.
    pub nodes: Vec<SiteNode>,
    pub vm: Netns,
    pub outside: Netns,
    pub vpc: Vpc,
    pub cluster: Cluster,
    pub cloud: CloudLab,
    pub admin: Option<SocketAddr>,
    /// Ends with the stand-in's controllers.
    balancing: Option<JoinHandle<()>>,
    running: cloud::Running,
    config: SiteConfig,
    claim: Option<Arc<down::Claim>>,
}

impl Site {
    /// Bring everything up; `progress` hears each step as it begins.
    pub async fn up(config: SiteConfig, progress: &(dyn Fn(&str) + Sync)) -> anyhow::Result<Self> {
        let up = Self::up_unless(std::future::pending(), config, progress).await?;
        up.context("bringing the lab up was broken off")
    }

    /// As [`Self::up`]; `None` when `stop` came first. Nothing is left then, nor
    /// after an error, nor of a lab of this name whose process died.
    pub async fn up_unless(
        stop: impl Future<Output = ()>,
        config: SiteConfig,
        progress: &(dyn Fn(&str) + Sync),
    ) -> anyhow::Result<Option<Self>> {
        let id = config.id.clone();
        // From here on the name is ours.
        let claim = Arc::new(down::claim(&id)?);
        super::cluster::forget_left_behind(&id.state_dir()).await;
        let held = claim.clone();
        let left = tokio::task::spawn_blocking(move || down::sweep_claimed(&id, &held, false)).await??;
        if !left.is_empty() {
            progress(&format!("removed what a lab {} that died had left: {left}", config.id));
        }
        let id = config.id.clone();
        let made = tokio::select! {
            made = Self::build(config, progress) => made.map(Some),
            () = stop => Ok(None),
        };
        match made {
            Ok(Some(mut site)) => {
                site.claim = Some(claim);
                Ok(Some(site))
            }
            other => {
                super::cluster::forget_left_behind(&id.state_dir()).await;
                let swept = tokio::task::spawn_blocking(move || down::sweep_claimed(&id, &claim, true)).await;
                // Why it did not come up matters more than what would not go.
                let outcome = other?;
                swept??;
                Ok(outcome)
            }
        }
    }

    async fn build(config: SiteConfig, progress: &(dyn Fn(&str) + Sync)) -> anyhow::Result<Self> {
        progress("VPC: router, NAT gateway, a plain VM");
        let mut vpc_config = VpcConfig::new(config.id.clone());
        vpc_config.mtu = config.mtu;
        let vpc = Vpc::up(vpc_config).await?;
        for address in [API.into(), KUBE_API.ip(), METADATA.into()] {
            vpc.add_service_address(address).await?;
        }
        let vm = vpc.add_vm(vm_spec()).await?;
        let outside = vpc.add_outside().await?;

        progress("cloud API over HTTPS, metadata service, Kubernetes API");
        let listeners = Listeners {
            https: Some(vpc.listen_tcp((API, 443).into())?),
            metadata: Some(vpc.listen_tcp((METADATA, 80).into())?),
            admin: Some(std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?),
            ..Listeners::default()
        };
        let running = CloudLab::start(config.cloud.clone(), Arc::new(vpc.clone()), listeners)?;
        let cloud = running.cloud.clone();
        let state = config.id.state_dir();
        std::fs::write(state.join("ca.pem"), cloud.ca_pem().unwrap_or_default())?;
        let mut cluster = match &config.kubeconfig {
            None => Cluster::stand_in(&vpc, KUBE_API, &state)?,
            Some(file) => Cluster::elsewhere(&vpc, KUBE_API, &state, file).await?,
        };

        let balancing = cluster.stand_in.as_mut().map(|kube| balance(kube, &vpc));
        let admin = running.admin;
        let mut site = Self {
            nodes: Vec::new(),
            vm,
            outside,
            vpc,
            cluster,
            cloud,
            admin,
            balancing,
            running,
            config,
            claim: None,
        };
        for spec in site.config.nodes.clone() {
            progress(&format!("node {}: instance of type {}, agent, kubelet", spec.name, spec.instance_type));
            let node = site.add_node(&spec).await.with_context(|| format!("node {}", spec.name))?;
            site.nodes.push(node);
        }
        progress("waiting until every node is ready");
        site.wait_ready(Duration::from_secs(90)).await?;
        Ok(site)
    }

    pub fn id(&self) -> &LabId {
        &self.config.id
    }

    pub fn node(&self, name: &str) -> Option<&SiteNode> {
        self.nodes.iter().find(|n| n.name == name)
    }

    /// The pods of this lab's nodes, and those that have no node yet.
    pub async fn pods(&self) -> anyhow::Result<Vec<k8s_openapi::api::core::v1::Pod>> {
        let nodes: Vec<&str> = self.nodes.iter().map(|n| n.name.as_str()).collect();
        self.cluster.pods(&nodes).await
    }

    async fn add_node(&self, spec: &NodeSpec) -> anyhow::Result<SiteNode> {
        let node = Node::create(&self.config.id, &spec.name).await?;
        let instance = format!("i-{}-{}", self.config.id, spec.name);
        let registered = self
            .cloud
            .register_instance(&RegisterInstance {
                instance_id: instance.clone(),
                instance_type: spec.instance_type.clone(),
                vswitch: spec.vswitch.clone(),
                zone: None,
                netns: Some(node.ns().name().to_owned()),
                security_groups: Vec::new(),
                primary_ip: None,
                ipv6_count: u32::from(self.config.dual),
            })
            .await?;
        let primary = registered.primary;
        node.boot(&Boot::from(&primary)).await?;
        self.vpc.settled(&primary.eni_id).await?;
        let addresses: Vec<IpAddr> =
            primary.v4.iter().map(|a| IpAddr::V4(*a)).chain(primary.v6.iter().map(|a| IpAddr::V6(*a))).collect();

        self.install(&node)?;
        let dirs = node.dirs();
        let agent_config = self.agent_config(&spec.name, &dirs.root);
        std::fs::write(&dirs.agent_config, format!("{agent_config:#}\n"))?;
        node.start_agent(AgentSpec {
            program: self.config.program.clone(),
            args: vec!["agent".into(), "--config".into(), dirs.agent_config.display().to_string()],
            env: self.config.agent_env.clone(),
            restart_after: self.config.restart_agents,
        })
        .await?;

        let api = KubeApi::new(self.cluster.client(), &spec.name);
        let provider = format!("{}.{instance}", self.config.cloud.region);
        let object = node_object(&spec.name, &addresses, &registered.instance.zone, &provider, 256);
        self.cluster.register(&api, &object).await?;
        let pods: &dyn PodSource = if self.config.runs_pods { &api.clone() } else { &NoPods };
        let kubelet = Kubelet::start(
            KubeletConfig {
                status_interval: self.config.status_interval,
                backoff: self.config.backoff,
                ..KubeletConfig::new(&spec.name, addresses.clone(), dirs.clone())
            },
            node.ns(),
            node.spawner(),
            pods,
            Arc::new(api),
        );
        Ok(SiteNode { name: spec.name.clone(), instance, addresses, node, kubelet })
    }

    /// Plugins, then the conflist, as `fairway install-cni` does.
    fn install(&self, node: &Node) -> anyhow::Result<()> {
        let shim = install::shim(self.config.shim.as_deref())?;
        install::replace(&node.dirs().cni_bin.join(install::SHIM), &shim, 0o755)?;
        if let Some(plugins) = &self.config.plugins {
            node.install_plugin("portmap", &plugins.join("portmap"))?;
        }
        let root = &node.dirs().root;
        let conflist = Conflist {
            cni_version: self.config.cni_version.clone(),
            socket: root.join("cni.sock"),
            spool: root.join("spool"),
            portmap: self.config.plugins.is_some(),
        };
        let text = format!("{:#}\n", conflist.render());
        Ok(install::replace(&node.dirs().net_d.join("10-fairway.conflist"), text.as_bytes(), 0o600)?)
    }

    fn agent_config(&self, node: &str, root: &Path) -> Value {
        let state = self.config.id.state_dir();
        let api = format!("https://{API}");
        let mut config = json!({
            "node": node,
            "state_dir": root.join("state"),
            "bpffs": root.join("bpf"),
            "cloud": {
                "endpoints": { "ecs": api, "vpc": api, "metadata": format!("http://{METADATA}") },
                "ca_file": state.join("ca.pem"),
            },
            "pool": {
                "cluster_id": format!("lab-{}", self.config.id),
                "ip_stack": if self.config.dual { "dual" } else { "ipv4" },
            },
            "netns": { "sysfs": root.join("sys") },
            "cni": { "socket": root.join("cni.sock"), "spool_dir": root.join("spool") },
            "cluster": { "source": { "kubeconfig": state.join(FOR_NODES) } },
            "debug": { "listen": debug_socket(root) },
        });
        overlay(&mut config, &self.config.agent);
        config
    }

    /// Until every agent has reconciled and every Node is Ready.
    pub async fn wait_ready(&self, patience: Duration) -> anyhow::Result<()> {
        for node in &self.nodes {
            let mut network = node.kubelet.network();
            let ready = tokio::time::timeout(patience, network.wait_for(Result::is_ok)).await;
            // The borrowed value holds a lock against the kubelet: not over a wait.
            let ready = ready.is_ok_and(|network| network.is_ok());
            if !ready {
                let why = node.kubelet.network().borrow().clone().err().unwrap_or_default();
                let log = node.node.dirs().agent_log.clone();
                bail!("node {} is not ready: {why}\n{}", node.name, tail(&log, 15));
            }
            let socket = crate::debug::Listen::Unix(node.debug_socket());
            let deadline = tokio::time::Instant::now() + patience;
            while let Err(e) = crate::status::client::get_text(&socket, "/readyz").await {
                if tokio::time::Instant::now() > deadline {
                    bail!("the agent of {} is not ready: {e}\n{}", node.name, tail(&node.node.dirs().agent_log, 15));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    /// Take everything down, in order; what is still there afterwards is an
    /// error.
    pub async fn down(self) -> anyhow::Result<()> {
        let Self { nodes, vpc, cluster, cloud, balancing, running, config, claim, .. } = self;
        let mut stopped = Vec::new();
        for SiteNode { node, kubelet, instance, .. } in nodes {
            kubelet.stop().await;
            stopped.push((node, instance));
        }
        // Named in the nodes' folders, which go with the nodes; none comes any more.
        let sandboxes = down::pod_namespaces(&config.id.state_dir());
        for (node, _) in &stopped {
            node.stop_agent().await;
        }
        for (node, instance) in stopped {
            let _ = cloud.remove_instance(&instance).await;
            node.down().await?;
        }
        for path in sandboxes {
            super::vpc::ns::remove(&path).with_context(|| path.display().to_string())?;
        }
        cluster.stop().await;
        if let Some(balancing) = balancing {
            let _ = balancing.await;
        }
        running.shutdown().await;
        vpc.down().await?;
        let id = config.id;
        let swept = tokio::task::spawn_blocking(move || match claim {
            Some(claim) => down::sweep_claimed(&id, &claim, true),
            None => down::sweep(&id),
        });
        swept.await??;
        Ok(())
    }
}

/// Services of the type LoadBalancer get an address and listeners on the router.
fn balance(kube: &mut KubeLab, vpc: &Vpc) -> JoinHandle<()> {
    let (controller, mut wanted) = Balancers::new();
    kube.run(controller);
    let vpc = vpc.clone();
    tokio::spawn(async move {
        while wanted.changed().await.is_ok() {
            let listeners = wanted.borrow_and_update().clone();
            if let Err(e) = vpc.set_balancers(listeners).await {
                tracing::error!(cause = %e, "Load balancers could not be set");
            }
        }
    })
}

fn vm_spec() -> VmSpec {
    VmSpec {
        name: "vm".to_owned(),
        subnet4: Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 240, 0), 24),
        gateway4: Ipv4Addr::new(10, 0, 240, 253),
        v4: VM,
        subnet6: None,
        gateway6: None,
        v6: None,
    }
}

/// Lay one configuration over another: objects key by key, all else replaced.
fn overlay(under: &mut Value, over: &Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                overlay(under.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over.clone(),
    }
}

/// The last lines of a log, for an error message.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Agents' own views, by node; a node whose agent does not answer is left out.
pub async fn agent_views(site: &Site, path: &str) -> BTreeMap<String, Value> {
    let mut views = BTreeMap::new();
    for node in &site.nodes {
        let socket = crate::debug::Listen::Unix(node.debug_socket());
        if let Ok(view) = crate::status::client::get(&socket, path).await {
            views.insert(node.name.clone(), view);
        }
    }
    views
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_keeps_what_it_does_not_name() {
        let mut config = json!({"pool": {"min_idle": 1, "cluster_id": "c"}, "node": "n"});
        overlay(&mut config, &json!({"pool": {"min_idle": 9}, "log": {"filter": "debug"}}));
        let expected = json!({"pool": {"min_idle": 9, "cluster_id": "c"}, "node": "n", "log": {"filter": "debug"}});
        assert_eq!(config, expected);
    }
}
