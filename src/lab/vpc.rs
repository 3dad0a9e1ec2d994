//! The VPC's packets: a router in a namespace of its own, and a port per ENI.
//!
//! Purpose: carries exactly what the cloud's API has assigned. An ENI is a
//! multi-queue veth pair; one end (`ethN`, the ENI's hardware address) is born
//! in the instance's namespace, the other is a port of the router `fwl-<id>-vpc`.
//! Each assigned address is a host route to its port, next hop the ENI itself;
//! the rest of a vSwitch's block is a blackhole. Sources are checked per port.
//!
//! Owner of: the router's namespace, its ports, routes and filter. One lock
//! orders all changes, so a device that dies and is made again cannot race with
//! a call about it.
//!
//! Invariants: a port's routes are the last set given for its ENI; an attached
//! ENI whose device vanished (its pod's namespace died) reappears in its
//! instance's namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::sync::{Arc, Weak};

use futures::StreamExt;
use futures::future::BoxFuture;
use ipnet::IpNet;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use tokio::sync::Mutex;

use crate::lab::fabric::{EniPort, Fabric, FabricError, InstancePlace};

/// VM, NAT gateway, outside host, load balancer.
pub mod edge;
/// rtnetlink for one namespace.
pub mod link;
/// What everything is called.
pub mod name;
/// The router's filter and translation.
pub mod nft;
/// Named namespaces.
pub mod ns;
/// Boot configuration of a machine's primary device.
pub mod os;

use link::{Events, LinkError, Links, VethEnd, Via};
use name::LabId;
use nft::{Counters, Listeners, NftError};
use ns::{Netns, NsError, OwnedNetns};

/// Next hop of every assigned address: the ENI, by a permanent neighbour, for
/// the cloud delivers to the ENI's hardware address without asking.
const NEXT_HOP4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
const NEXT_HOP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 1, 1));

/// Interface indices of the router's ports: above those of any node.
const FIRST_INDEX: u32 = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum VpcError {
    #[error(transparent)]
    Ns(#[from] NsError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Nft(#[from] NftError),
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error("{what}: {cause}")]
    Io { what: String, cause: std::io::Error },
}

#[derive(Clone, Debug)]
pub struct VpcConfig {
    pub id: LabId,
    /// MTU of ENIs: 1500, or 8500 where the cloud has jumbo frames.
    pub mtu: u32,
}

impl VpcConfig {
    pub fn new(id: LabId) -> Self {
        Self { id, mtu: 1500 }
    }
}

/// A running VPC; dropping the last clone removes the router and every ENI.
#[derive(Clone)]
pub struct Vpc {
    inner: Arc<Inner>,
}

struct Inner {
    config: VpcConfig,
    ns: OwnedNetns,
    links: Links,
    loopback: u32,
    state: Mutex<State>,
    watcher: parking_lot::Mutex<Option<tokio::task::JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    instances: BTreeMap<String, Netns>,
    ports: BTreeMap<String, Port>,
    blocks: BTreeSet<IpNet>,
    next_port: u32,
    listeners: Listeners,
    /// Addresses of load balancers; they stay.
    published: BTreeSet<IpAddr>,
    edge: edge::Hosts,
}

struct Port {
    eni: EniPort,
    /// Router side.
    name: String,
    index: u32,
    routed: BTreeSet<IpAddr>,
}

impl Vpc {
    /// Make the router. Fails when a lab with this id is there already.
    pub async fn up(config: VpcConfig) -> Result<Self, VpcError> {
        let ns = OwnedNetns::create(&config.id.name("vpc"))?;
        ns.sysctl(&[
            ("net/ipv4/ip_forward", "1"),
            // The filter checks sources, counts, and knows both families; this
            // would also leave ARP unanswered, which the cloud does not.
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            // Machines ask for on-link neighbours; the cloud answers for them.
            ("net/ipv4/conf/default/proxy_arp", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv6/conf/default/accept_ra", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
        ])?;
        nft::apply(&ns, &nft::base())?;
        let links = Links::open(&ns).await?;
        os::loopback(&links).await?;
        let loopback = links.find("lo").await?.index;
        let (watch, events) = Links::watch(&ns).await?;
        let inner = Arc::new(Inner {
            config,
            ns,
            links,
            loopback,
            state: Mutex::default(),
            watcher: parking_lot::Mutex::default(),
        });
        let task = tokio::spawn(revive(Arc::downgrade(&inner), watch, events));
        *inner.watcher.lock() = Some(task);
        Ok(Self { inner })
    }

    pub fn id(&self) -> &LabId {
        &self.inner.config.id
    }

    pub fn mtu(&self) -> u32 {
        self.inner.config.mtu
    }

    /// The router's namespace.
    pub fn ns(&self) -> &Netns {
        &self.inner.ns
    }

    /// Say where an instance's devices appear.
    pub async fn register_instance(&self, instance_id: &str, ns: &Netns) {
        self.inner.state.lock().await.instances.insert(instance_id.to_owned(), ns.clone());
    }

    /// The instance is gone: its ENIs are removed and nothing comes back.
    pub async fn forget_instance(&self, instance_id: &str) -> Result<(), VpcError> {
        let mut state = self.inner.state.lock().await;
        state.instances.remove(instance_id);
        let gone: Vec<String> =
            state.ports.iter().filter(|(_, p)| p.eni.instance_id == instance_id).map(|(k, _)| k.clone()).collect();
        for eni in gone {
            if let Some(port) = state.ports.remove(&eni) {
                self.inner.links.delete(port.index).await?;
            }
        }
        Ok(())
    }

    /// After a machine has set an ENI's device up: wait until the router's side
    /// has followed, so that not even the first packet is lost. False when the
    /// machine has not done its part in time.
    pub async fn settled(&self, eni_id: &str) -> Result<bool, VpcError> {
        let name = {
            let state = self.inner.state.lock().await;
            let port = state.ports.get(eni_id).ok_or_else(|| FabricError::UnknownEni(eni_id.to_owned()))?;
            port.name.clone()
        };
        Ok(link::wait_running(&self.inner.ns, &name, os::CARRIER_WITHIN).await?)
    }

    /// Packets refused so far.
    pub async fn counters(&self) -> Result<Counters, VpcError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || nft::counters(&inner.ns)).await
    }

    /// An address of the router itself, for a service in it (API, metadata).
    pub async fn add_service_address(&self, address: IpAddr) -> Result<(), VpcError> {
        Ok(self.inner.links.add_address(self.inner.loopback, IpNet::from(address)).await?)
    }

    /// Listen inside the router's namespace, from the lab's process.
    pub fn listen_tcp(&self, at: std::net::SocketAddr) -> Result<TcpListener, VpcError> {
        let bound = self.inner.ns.run(|| {
            let listener = TcpListener::bind(at)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        bound.map_err(|cause| VpcError::Io { what: format!("listen on {at} in the VPC"), cause })
    }

    /// As [`Self::listen_tcp`], for UDP.
    pub fn listen_udp(&self, at: std::net::SocketAddr) -> Result<UdpSocket, VpcError> {
        let bound = self.inner.ns.run(|| {
            let socket = UdpSocket::bind(at)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        bound.map_err(|cause| VpcError::Io { what: format!("listen on {at} in the VPC"), cause })
    }

    /// Remove the router and every ENI now.
    pub async fn down(self) -> Result<(), VpcError> {
        let mut state = self.inner.state.lock().await;
        for (_, port) in std::mem::take(&mut state.ports) {
            self.inner.links.delete(port.index).await?;
        }
        state.edge = edge::Hosts::default();
        Ok(())
    }
}

impl Fabric for Vpc {
    fn instance_added(&self, place: InstancePlace) -> BoxFuture<'_, Result<(), FabricError>> {
        Box::pin(async move {
            let Some(name) = &place.netns else { return Ok(()) };
            let ns = Netns::named(name).map_err(|e| failed("register", &place.instance_id, e.into()))?;
            self.register_instance(&place.instance_id, &ns).await;
            Ok(())
        })
    }

    fn instance_removed(&self, instance_id: &str) -> BoxFuture<'_, Result<(), FabricError>> {
        let instance_id = instance_id.to_owned();
        Box::pin(async move { self.forget_instance(&instance_id).await.map_err(|e| failed("forget", &instance_id, e)) })
    }

    fn attach(&self, port: EniPort) -> BoxFuture<'_, Result<(), FabricError>> {
        let inner = Arc::clone(&self.inner);
        let eni_id = port.eni_id.clone();
        whole("attach", eni_id, async move { inner.attach(port).await })
    }

    fn detach(&self, eni_id: &str) -> BoxFuture<'_, Result<(), FabricError>> {
        let inner = Arc::clone(&self.inner);
        let eni_id = eni_id.to_owned();
        whole("detach", eni_id.clone(), async move {
            let mut state = inner.state.lock().await;
            if let Some(port) = state.ports.get(&eni_id) {
                inner.links.delete(port.index).await?;
                state.ports.remove(&eni_id);
            }
            Ok(())
        })
    }

    fn set_addresses(
        &self,
        eni_id: &str,
        v4: Vec<Ipv4Addr>,
        v6: Vec<Ipv6Addr>,
    ) -> BoxFuture<'_, Result<(), FabricError>> {
        let inner = Arc::clone(&self.inner);
        let eni_id = eni_id.to_owned();
        whole("set_addresses", eni_id.clone(), async move {
            let mut state = inner.state.lock().await;
            let port = state.ports.get_mut(&eni_id).ok_or(FabricError::UnknownEni(eni_id))?;
            port.eni.v4 = v4;
            port.eni.v6 = v6;
            Ok(inner.sync_routes(port).await?)
        })
    }
}

/// A change runs to its end even when its caller (an HTTP request, say) goes
/// away half-way: the kernel and our record of it must stay in step.
fn whole(
    op: &'static str,
    eni_id: String,
    work: impl Future<Output = Result<(), VpcError>> + Send + 'static,
) -> BoxFuture<'static, Result<(), FabricError>> {
    Box::pin(async move {
        let done = match tokio::spawn(work).await {
            Ok(done) => done,
            Err(e) => Err(VpcError::Io { what: "task".into(), cause: std::io::Error::other(e) }),
        };
        done.map_err(|e| failed(op, &eni_id, e))
    })
}

fn failed(op: &'static str, eni_id: &str, e: VpcError) -> FabricError {
    match e {
        VpcError::Fabric(e) => e,
        other => FabricError::Failed { op, eni_id: eni_id.to_owned(), cause: other.to_string() },
    }
}

impl Inner {
    async fn attach(&self, eni: EniPort) -> Result<(), VpcError> {
        let mut state = self.state.lock().await;
        if let Some(port) = state.ports.get_mut(&eni.eni_id) {
            port.eni.v4 = eni.v4;
            port.eni.v6 = eni.v6;
            return Ok(self.sync_routes(port).await?);
        }
        self.add_block(&mut state, eni.subnet4.into(), eni.gateway4.into()).await?;
        if let Some((net, gateway)) = eni.subnet6.zip(eni.gateway6) {
            self.add_block(&mut state, net.into(), gateway.into()).await?;
        }
        let port = self.make_port(&mut state, eni).await?;
        state.ports.insert(port.eni.eni_id.clone(), port);
        Ok(())
    }

    /// A vSwitch's block: its gateway answers, the unassigned rest is dropped.
    async fn add_block(&self, state: &mut State, net: IpNet, gateway: IpAddr) -> Result<(), VpcError> {
        let net = net.trunc();
        if state.blocks.contains(&net) {
            return Ok(());
        }
        self.links.add_address(self.loopback, IpNet::from(gateway)).await?;
        self.links.add_route(net, Via::Blackhole).await?;
        self.nft(nft::add_cidr(net)).await?;
        state.blocks.insert(net);
        Ok(())
    }

    /// The device and the router's side of an ENI, with its routes.
    async fn make_port(&self, state: &mut State, eni: EniPort) -> Result<Port, VpcError> {
        let instance =
            state.instances.get(&eni.instance_id).ok_or(FabricError::UnknownInstance(eni.instance_id.clone()))?;
        let name = format!("{}{}", nft::PORT_PREFIX, state.next_port);
        let index = FIRST_INDEX + state.next_port;
        state.next_port += 1;
        let queues = eni.queues.clamp(1, 64);
        let near = VethEnd { name: &name, index, mac: None, mtu: self.config.mtu, queues };
        let far = VethEnd { name: "eth%d", index: 0, mac: Some(eni.mac), mtu: self.config.mtu, queues };
        self.links.add_veth(&near, &far, instance).await?;
        let mut port = Port { eni, name, index, routed: BTreeSet::new() };
        match self.configure(&mut port).await {
            Ok(()) => Ok(port),
            Err(e) => {
                // Half a port must not stay behind: the caller will try again.
                let _ = self.links.delete(index).await;
                Err(e)
            }
        }
    }

    async fn configure(&self, port: &mut Port) -> Result<(), VpcError> {
        // Answers for on-link neighbours come at once, as the cloud's do.
        self.ns.sysctl(&[(&format!("net/ipv4/neigh/{}/proxy_delay", port.name), "0")])?;
        self.links.set_up(port.index, Some(&port.eni.eni_id)).await?;
        self.links.add_neighbour(port.index, NEXT_HOP4, port.eni.mac).await?;
        if let Some(gateway) = port.eni.gateway6 {
            // Neighbour discovery is answered per device, unlike ARP.
            self.links.add_address(port.index, IpNet::from(IpAddr::V6(gateway))).await?;
            self.links.add_neighbour(port.index, NEXT_HOP6, port.eni.mac).await?;
        }
        Ok(self.sync_routes(port).await?)
    }

    /// Make the routes those of the port's addresses: new ones first.
    async fn sync_routes(&self, port: &mut Port) -> Result<(), LinkError> {
        let v4 = port.eni.v4.iter().copied().map(IpAddr::V4);
        let wanted: BTreeSet<IpAddr> = v4.chain(port.eni.v6.iter().copied().map(IpAddr::V6)).collect();
        let via = |a: &IpAddr| Via::Gateway(port.index, if a.is_ipv4() { NEXT_HOP4 } else { NEXT_HOP6 });
        for address in wanted.difference(&port.routed.clone()) {
            self.links.add_route(IpNet::from(*address), via(address)).await?;
            port.routed.insert(*address);
        }
        for address in port.routed.clone().difference(&wanted) {
            self.links.delete_route(IpNet::from(*address), via(address)).await?;
            port.routed.remove(address);
        }
        Ok(())
    }

    async fn nft(self: &Inner, commands: String) -> Result<(), VpcError> {
        let ns = Netns::clone(&self.ns);
        blocking(move || nft::apply(&ns, &commands)).await
    }

    /// Make again the ports whose device is gone.
    async fn revive(&self) -> Result<(), VpcError> {
        let mut state = self.state.lock().await;
        let present: BTreeSet<u32> = self.links.list().await?.into_iter().map(|l| l.index).collect();
        let gone: Vec<String> =
            state.ports.iter().filter(|(_, p)| !present.contains(&p.index)).map(|(k, _)| k.clone()).collect();
        for id in gone {
            let Some(dead) = state.ports.remove(&id) else { continue };
            tracing::info!(target: "lab", eni = id, "device gone with its namespace; back on its instance");
            match self.make_port(&mut state, dead.eni).await {
                Ok(port) => drop(state.ports.insert(id, port)),
                Err(e) => tracing::warn!(target: "lab", eni = id, "device cannot come back: {e}"),
            }
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.lock().take() {
            watcher.abort();
        }
    }
}

/// Watches the router's devices; one that vanishes while its ENI is attached is
/// made again where the cloud says it belongs.
async fn revive(vpc: Weak<Inner>, _socket: Links, mut events: Events) {
    while let Some((message, _)) = events.next().await {
        let lost = match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(_)) => true,
            // Events were lost: look at everything.
            NetlinkPayload::Overrun(_) | NetlinkPayload::Error(_) => true,
            _ => false,
        };
        let Some(vpc) = vpc.upgrade() else { return };
        if lost && let Err(e) = vpc.revive().await {
            tracing::warn!(target: "lab", "looking for vanished devices: {e}");
        }
    }
}

/// Run what blocks (a child process) off the runtime's threads.
async fn blocking<T: Send + 'static, E: Into<VpcError> + Send + 'static>(
    f: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, VpcError> {
    match tokio::task::spawn_blocking(f).await {
        Ok(result) => result.map_err(Into::into),
        Err(e) => Err(VpcError::Io { what: "worker thread".into(), cause: std::io::Error::other(e) }),
    }
}
