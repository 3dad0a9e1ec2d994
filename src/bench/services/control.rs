//! How fast what the cluster says is in the kernel's maps, and what it costs.
//!
//! `endpoint_update_ms` and `full_sync_s` are of the ServiceMap actor itself,
//! fed as ClusterWatch feeds it and writing the kernel's maps; a shim around the
//! maps says when an entry is in. `rss_mb` is of a whole agent, a process of its
//! own in a lab, whose cluster has the Services.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::sync::watch;

use super::fairway::private_bpffs;
use super::objects::{Feed, service, slice};
use super::place::Space;
use super::{Metric, Task};
use crate::actor::{ChildPolicy, Handle, Placement, Port, Registry, Tree};
use crate::bench::network::traffic::PORT;
use crate::bench::stats::{Params, Sample};
use crate::cluster::{self, NodeInfo};
use crate::datapath::Datapath;
use crate::datapath::services::KernelMaps;
use crate::service::maps::{Chunk, Counts, ReadFailed, ServiceMaps, Tables, WriteFailed};
use crate::service::status::ServiceSnapshot;
use crate::service::{Deps, ServiceMap};

/// Services while one endpoint changes, and endpoints of each.
const SERVICES: usize = 10_000;
const ENDPOINTS: usize = 4;
/// The other size that is synced from nothing: 100,000 endpoints.
const LARGE: usize = 25_000;
const UPDATES: usize = 200;
const SYNCS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);

/// The kernel's maps; says when frontends have been written.
struct Told {
    maps: KernelMaps,
    frontends: Sender<usize>,
}

impl ServiceMaps for Told {
    fn read_all(&mut self) -> Result<Tables, ReadFailed> {
        self.maps.read_all()
    }
    fn apply(&mut self, chunk: Chunk<'_>) -> Result<(), WriteFailed> {
        self.maps.apply(chunk)?;
        if let Chunk::PutFrontends(frontends) = chunk {
            // Nobody may be listening any more.
            let _ = self.frontends.send(frontends.len());
        }
        Ok(())
    }
    fn capacity(&self) -> Counts {
        self.maps.capacity()
    }
}

/// A ServiceMap over empty maps of the kernel.
struct Carrier {
    feed: Feed,
    frontends: Receiver<usize>,
    tree: Option<Tree>,
    _datapath: Datapath,
    _senders: (cluster::Publisher, watch::Receiver<Arc<ServiceSnapshot>>),
}

impl Carrier {
    /// In a namespace of its own, on a thread that has a BPF file system.
    fn start(bpffs: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir(bpffs)?;
        let (datapath, _) = Datapath::open(bpffs)?;
        let (say, frontends) = mpsc::channel();
        let maps = std::sync::Mutex::new(Some(Told { maps: datapath.service_maps()?, frontends: say }));
        let feed = Feed::default();
        let (publisher, facts) = cluster::facts();
        publisher.node.send_replace(Some(Arc::new(NodeInfo { name: "here".into(), ..NodeInfo::default() })));
        let (snapshots, seen) = watch::channel(Arc::default());
        let deps = Deps {
            node_name: "here".to_owned(),
            index: feed.index.clone(),
            node: facts.node.clone(),
            pods: facts.pods.clone(),
            leader: facts.leader.clone(),
            // Nothing is wrong with these Services that would have to be told.
            record_event: Port::probe(|_| Ok(())),
            maps: Arc::new(move || {
                let maps = maps.lock().unwrap_or_else(|broken| broken.into_inner()).take();
                Ok(Box::new(maps.ok_or("the maps were given to an earlier embodiment")?))
            }),
            // What programs fill is not looked after: nothing passes them here.
            flows: None,
            snapshots,
        };
        let mut tree = Tree::new(Registry::default(), Placement::OwnThread, ChildPolicy::default());
        let _: Handle<ServiceMap> = tree.child(move || ServiceMap::open(deps.clone()));
        Ok(Self { feed, frontends, tree: Some(tree), _datapath: datapath, _senders: (publisher, seen) })
    }

    /// Until so many frontends have been written.
    fn wait(&self, count: usize) -> anyhow::Result<()> {
        let mut left = count;
        while left > 0 {
            left = left.saturating_sub(self.frontends.recv_timeout(PATIENCE).context("the maps are not written")?);
        }
        Ok(())
    }

    /// From the end of the lists to the last entry.
    fn sync(&mut self, services: usize) -> anyhow::Result<Duration> {
        self.feed.begin();
        for index in 0..services {
            self.feed.service(service(index, &["tcp"]))?;
            self.feed.typed_slice(slice_of(index, ENDPOINTS)?)?;
        }
        let began = Instant::now();
        self.feed.end();
        self.wait(services)?;
        Ok(began.elapsed())
    }

    /// One endpoint more or less, from the watch's event to its entry.
    fn update(&mut self, index: usize, endpoints: usize) -> anyhow::Result<Duration> {
        let event = slice_of(index, endpoints)?;
        let began = Instant::now();
        self.feed.typed_slice(event)?;
        self.wait(1)?;
        Ok(began.elapsed())
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if let Some(tree) = self.tree.take() {
            crate::actor::run(tree.shutdown(Duration::from_secs(5)));
        }
    }
}

fn slice_of(index: usize, endpoints: usize) -> anyhow::Result<EndpointSlice> {
    let base = u32::from(Ipv4Addr::new(10, 129, 0, 0)) + (index * (ENDPOINTS + 1)) as u32;
    let addresses: Vec<Ipv4Addr> = (0..endpoints as u32).map(|n| Ipv4Addr::from(base + n)).collect();
    Ok(serde_json::from_value(slice(index, &["tcp"], &addresses, PORT, "elsewhere"))?)
}

/// On a thread of its own, which gets namespaces for good.
pub fn measure(task: &Task, say: &dyn Fn(&str)) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let wanted = |metric| task.metrics.contains(&metric);
    let (update, full) = (wanted(Metric::EndpointUpdate), wanted(Metric::FullSync));
    if !update && !full {
        return Ok(samples);
    }
    Space::new()?.enter()?;
    let bpffs = private_bpffs()?;
    let sizes: &[usize] = if full && !task.quick { &[SERVICES, LARGE] } else { &[SERVICES] };
    for services in sizes {
        say(&format!("{services} Services of {ENDPOINTS} endpoints into empty maps, {SYNCS} times"));
        for round in 0..SYNCS {
            let folder = bpffs.join(format!("sync-{services}-{round}"));
            let mut carrier = Carrier::start(&folder)?;
            let took = carrier.sync(*services)?;
            if full {
                samples.push(sample("full_sync_s", "s", *services, round, took.as_secs_f64()));
            }
            if update && *services == SERVICES && round == 0 {
                say(&format!("{UPDATES} changes of one endpoint at {services} Services"));
                for round in 0..UPDATES {
                    let index = (round * 7919) % services;
                    let took = carrier.update(index, ENDPOINTS + 1 - round % 2 * 2)?;
                    samples.push(sample("endpoint_update_ms", "ms", *services, round, took.as_secs_f64() * 1e3));
                }
            }
            drop(carrier);
            // The maps of one sync are not kept while the next is measured.
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
    }
    Ok(samples)
}

pub fn sample(metric: &'static str, unit: &'static str, services: usize, round: usize, value: f64) -> Sample {
    let pairs = [("services", services.to_string()), ("endpoints", (services * ENDPOINTS).to_string())];
    let params: Params = pairs.map(|(key, value)| (key.to_owned(), value)).into();
    Sample { metric, unit, subject: "fairway".to_owned(), params, round, value }
}

/// The objects of that cluster, for whoever has another way to say them.
pub fn objects() -> impl Iterator<Item = anyhow::Result<[serde_json::Value; 2]>> {
    (0..SERVICES).map(|index| Ok([service(index, &["tcp"]), serde_json::to_value(slice_of(index, ENDPOINTS)?)?]))
}

/// How many those are.
pub const MEMORY_SERVICES: usize = SERVICES;
