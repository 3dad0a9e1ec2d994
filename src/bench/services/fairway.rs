//! Fairway on both nodes of a place: the agent's programs on every pod's device
//! and on the ENI, the maps filled by the agent's own compiler and sync, the
//! policy rules that its wirer gives a pod, the short way on.
//!
//! The programs of the socket path are on the root of the machine's cgroup tree,
//! as on a real node; they are taken off when it is another subject's turn, so
//! that nobody else pays for them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::fleet::Fleet;
use super::objects::Feed;
use super::place::{ENI, Node, Place, ip};
use crate::datapath::services::KernelMaps;
use crate::datapath::{Datapath, Device, Way, cgroup_root};
use crate::model::{AttachMode, AttachmentId};
use crate::service::model::NodeFacts;
use crate::service::sync::Syncer;

/// A BPF file system in a mount namespace of the calling thread's own, and of
/// those it starts: what is pinned there ends with them.
pub fn private_bpffs() -> anyhow::Result<PathBuf> {
    let at = Path::new("/sys/fs/bpf");
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), None::<&str>).context("a BPF file system")?;
    Ok(at.to_owned())
}

/// What an agent would have on one node.
struct Agent {
    datapath: Datapath,
    feed: Feed,
    syncer: Syncer<KernelMaps>,
}

pub struct Fairway {
    near: Agent,
    far: Agent,
    cgroups: PathBuf,
}

impl Fairway {
    /// The calling thread must have a BPF file system at `bpffs`.
    pub fn start(place: &Place, bpffs: &Path) -> anyhow::Result<Self> {
        let near = place.near.space.run(|| Agent::start(&place.near, &folder(bpffs, "near")?))?;
        let far = place.far.space.run(|| Agent::start(&place.far, &folder(bpffs, "far")?))?;
        Ok(Self { near, far, cgroups: cgroup_root(None)? })
    }

    pub fn load(&mut self, fleet: &Fleet) -> anyhow::Result<()> {
        std::thread::scope(|scope| {
            let far = scope.spawn(|| self.far.load(fleet));
            self.near.load(fleet)?;
            far.join().unwrap_or_else(|_| anyhow::bail!("the thread that fills maps panicked"))
        })
    }

    /// Resolve Services where processes connect, or no longer. In the client's
    /// node, whose namespace the programs are told.
    pub fn sockets(&mut self, place: &Place, on: bool) -> anyhow::Result<()> {
        let (datapath, cgroups) = (&mut self.near.datapath, &self.cgroups);
        let mut switch = || match on {
            true => datapath.attach_sockets(cgroups),
            false => datapath.detach_sockets(),
        };
        place.near.space.run(|| Ok(switch()?))
    }

    /// What is attached on both nodes.
    pub fn agents(&mut self) -> [&mut Datapath; 2] {
        [&mut self.near.datapath, &mut self.far.datapath]
    }

    /// Flows that the packet path has given a backend.
    pub fn translated(&self) -> anyhow::Result<u64> {
        Ok(self.near.datapath.service_events()?[fairway_ebpf_abi::EVENT_CHOSEN as usize])
    }
}

fn folder(bpffs: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = bpffs.join(name);
    std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}

impl Agent {
    /// In the node's namespace.
    fn start(node: &Node, bpffs: &Path) -> anyhow::Result<Self> {
        let (mut datapath, _) = Datapath::open(bpffs)?;
        datapath.set_node_addresses(&[IpAddr::V4(node.eni)])?;
        let eni = nix::net::if_::if_nametoindex(ENI)?;
        datapath.attach_eni(eni)?;
        let rules = crate::netns::Config::default();
        // Of its own, with the way out alone.
        let table = 1000;
        ip(&format!("route add default via {} dev {ENI} table {table}", node.gateway))?;
        for pod in &node.pods {
            let address = pod.address;
            ip(&format!("rule add to {address} lookup main pref {}", rules.rule_to_pod))?;
            ip(&format!("rule add from {address} lookup {table} pref {}", rules.rule_from_pod))?;
            let id = AttachmentId { sandbox: pod.link.as_str().into(), ifname: "eth0".into() };
            datapath.attach(&id, AttachMode::Veth, Device::named(&pod.link))?;
            let way = Way {
                v4: address,
                v6: None,
                gateway4: node.gateway,
                gateway6: None,
                eni: Some(eni),
                node_link: None,
                cookie: pod.space.cookie()?,
                netns: None,
                per_packet: false,
                short: true,
                limited: false,
            };
            datapath.lead(&id, &way)?;
        }
        let mut syncer = Syncer::open(datapath.service_maps()?)?;
        let facts = NodeFacts { name: "here".into(), zone: None, addresses: vec![IpAddr::V4(node.eni)] };
        syncer.book.set_node(Arc::new(facts));
        Ok(Self { datapath, feed: Feed::default(), syncer })
    }

    fn load(&mut self, fleet: &Fleet) -> anyhow::Result<()> {
        self.feed.list(fleet)?;
        let dirty = self.feed.index.take_dirty();
        self.syncer.sync(dirty.names, &self.feed.index)?;
        let problems: Vec<_> = self.syncer.book.problems().map(|p| p.message.clone()).collect();
        anyhow::ensure!(problems.is_empty(), "Services that are not carried: {problems:?}");
        let (services, _) = self.syncer.book.sizes();
        anyhow::ensure!(services == fleet.services, "{services} of {} Services are carried", fleet.services);
        Ok(())
    }
}
