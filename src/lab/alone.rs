//! Parts of the lab on their own: the simulated cloud with its VPC, and the
//! Kubernetes API stand-in, for agents and nodes that somebody else runs.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use futures::future::BoxFuture;
use kube::config::Kubeconfig;
use parking_lot::Mutex;

use super::cloud::{self, Listeners, RegisterInstance, ServeConfig};
use super::cluster;
use super::fabric::{EniPort, Fabric, FabricError, InstancePlace};
use super::node::down;
use super::site::{API, KUBE_API, METADATA};
use super::vpc::name::LabId;
use super::vpc::ns::Netns;
use super::vpc::os::{self, Boot};
use super::vpc::{Vpc, VpcConfig};

/// `fairway lab cloud`.
#[derive(clap::Args)]
pub struct CloudArgs {
    #[arg(long, default_value = "cloud")]
    id: LabId,
    /// What to serve and where on this machine (YAML); without it two zones, on loopback.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A network namespace that is a node, by its `ip netns` name; more can be
    /// registered over HTTP (POST /lab/instances).
    #[arg(long = "node")]
    nodes: Vec<String>,
    #[arg(long, default_value = "ecs.g7.2xlarge")]
    instance_type: String,
    /// IPv4 and IPv6 addresses for the nodes named here.
    #[arg(long)]
    dual: bool,
    /// 1 is as slow as the real cloud, 0 does not wait at all.
    #[arg(long)]
    latency_scale: Option<f64>,
    /// Make this API server reachable from the nodes, and write a kubeconfig for agents there.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
}

/// Serve until SIGINT or SIGTERM.
pub async fn cloud(args: CloudArgs) -> anyhow::Result<bool> {
    let mut config = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?
        }
        None => ServeConfig::default(),
    };
    config.cloud.latency_scale = args.latency_scale.unwrap_or(config.cloud.latency_scale);
    config.cloud.sans.push(API.to_string());
    let vswitches: Vec<String> = config.cloud.vswitches.iter().map(|v| v.id.clone()).collect();
    for (n, netns) in args.nodes.iter().enumerate() {
        config.nodes.push(RegisterInstance {
            instance_id: format!("i-{netns}"),
            instance_type: args.instance_type.clone(),
            vswitch: vswitches.get(n % vswitches.len().max(1)).cloned().unwrap_or_default(),
            zone: None,
            netns: Some(netns.clone()),
            security_groups: Vec::new(),
            primary_ip: None,
            ipv6_count: u32::from(args.dual),
        });
    }
    let id = args.id;
    let claim = Arc::new(down::claim(&id)?);
    let (swept, held) = (id.clone(), claim.clone());
    tokio::task::spawn_blocking(move || down::sweep_claimed(&swept, &held, false)).await??;
    let served = serve(&id, config, args.kubeconfig.as_deref()).await;
    tokio::task::spawn_blocking(move || down::sweep_claimed(&id, &claim, true)).await??;
    served.map(|()| true)
}

async fn serve(id: &LabId, mut config: ServeConfig, kubeconfig: Option<&Path>) -> anyhow::Result<()> {
    let state = id.state_dir();
    let vpc = Vpc::up(VpcConfig::new(id.clone())).await?;
    for address in [API.into(), METADATA.into(), KUBE_API.ip()] {
        vpc.add_service_address(address).await?;
    }
    let relay = match kubeconfig {
        Some(file) => {
            let read = Kubeconfig::read_from(file).with_context(|| file.display().to_string())?;
            Some(cluster::publish(&vpc, KUBE_API, &state, read)?)
        }
        None => None,
    };
    let more = Listeners {
        more_https: vec![vpc.listen_tcp((API, 443).into())?],
        more_metadata: vec![vpc.listen_tcp((METADATA, 80).into())?],
        ..Listeners::default()
    };
    config.ca_file.get_or_insert_with(|| state.join("ca.pem"));
    let ca_file = config.ca_file.clone();
    let fabric = Arc::new(Booting { vpc: vpc.clone(), places: Mutex::default() });
    let served = cloud::serve_also(config, more, fabric, |running| {
        let at = |what: &str, url: &str, address: Option<SocketAddr>| {
            if let Some(address) = address {
                println!("{what:<10} {url}://{address}");
            }
        };
        at("API", "https", running.https);
        at("API", "http", running.http);
        at("metadata", "http", running.metadata);
        at("admin", "http", running.admin);
        println!("in the VPC the API is at https://{API}, metadata at http://{METADATA}");
        if let Some(ca) = &ca_file {
            println!("CA         {}", ca.display());
        }
        if relay.is_some() {
            println!("kubeconfig {} (in the VPC)", state.join(cluster::FOR_NODES).display());
        }
        for instance in running.cloud.instances() {
            println!("instance   {} of type {}", instance.id, instance.instance_type);
        }
        println!("Ctrl-C ends it.");
    })
    .await;
    if let Some(relay) = relay {
        relay.abort();
    }
    vpc.down().await?;
    Ok(served?)
}

/// The VPC, and what the operating system of a node does with its primary ENI
/// when that appears: a namespace has none that would.
struct Booting {
    vpc: Vpc,
    /// By instance: its namespace, until it has booted.
    places: Mutex<BTreeMap<String, String>>,
}

impl Booting {
    async fn boot(&self, port: &EniPort, netns: &str) -> anyhow::Result<()> {
        os::boot(&Netns::named(netns)?, &Boot::from(port)).await?;
        self.vpc.settled(&port.eni_id).await?;
        Ok(())
    }
}

impl Fabric for Booting {
    fn instance_added(&self, place: InstancePlace) -> BoxFuture<'_, Result<(), FabricError>> {
        if let Some(netns) = &place.netns {
            self.places.lock().insert(place.instance_id.clone(), netns.clone());
        }
        self.vpc.instance_added(place)
    }

    fn instance_removed(&self, instance_id: &str) -> BoxFuture<'_, Result<(), FabricError>> {
        self.places.lock().remove(instance_id);
        self.vpc.instance_removed(instance_id)
    }

    fn attach(&self, port: EniPort) -> BoxFuture<'_, Result<(), FabricError>> {
        // The first ENI of an instance is its primary one.
        let boots = self.places.lock().remove(&port.instance_id);
        Box::pin(async move {
            self.vpc.attach(port.clone()).await?;
            let Some(netns) = boots else { return Ok(()) };
            let failed = |e: anyhow::Error| FabricError::Failed {
                op: "boot",
                eni_id: port.eni_id.clone(),
                cause: format!("{e:#}"),
            };
            self.boot(&port, &netns).await.map_err(failed)
        })
    }

    fn detach(&self, eni_id: &str) -> BoxFuture<'_, Result<(), FabricError>> {
        self.vpc.detach(eni_id)
    }

    fn set_addresses(
        &self,
        eni_id: &str,
        v4: Vec<std::net::Ipv4Addr>,
        v6: Vec<std::net::Ipv6Addr>,
    ) -> BoxFuture<'_, Result<(), FabricError>> {
        self.vpc.set_addresses(eni_id, v4, v6)
    }
}

/// `fairway lab kube-api`.
#[derive(clap::Args)]
pub struct KubeApiArgs {
    #[arg(long, default_value = "127.0.0.1:6443")]
    listen: SocketAddr,
    /// Write a kubeconfig for it here.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
}

/// Serve until `until`.
pub async fn kube_api(args: KubeApiArgs, until: impl Future<Output = ()>) -> anyhow::Result<bool> {
    let listener = std::net::TcpListener::bind(args.listen).with_context(|| {
        format!("listening on {}; is another API server there? Choose another --listen", args.listen)
    })?;
    let address = listener.local_addr()?;
    let lab = super::kube::KubeLab::start(Default::default(), vec![listener])?;
    // Written once it can be used.
    if let Some(path) = args.kubeconfig {
        // All addresses of this machine are none to connect to.
        let to = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::from(([127, 0, 0, 1], address.port())),
            _ => address,
        };
        let text = super::kube::kubeconfig(to);
        crate::install::replace(&path, text.as_bytes(), 0o600).with_context(|| path.display().to_string())?;
    }
    println!("Kubernetes API at http://{address}; Ctrl-C ends it");
    until.await;
    lab.stop().await;
    Ok(true)
}
