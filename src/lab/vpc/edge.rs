//! What else lives in the VPC and at its edge: a plain VM, the NAT gateway with
//! a host outside, a load balancer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::link::{Links, VethEnd, Via};
use super::nft::{Listeners, Transport};
use super::ns::{Netns, OwnedNetns};
use super::{Vpc, VpcError, nft, os};
use crate::lab::fabric::{EniPort, Fabric};
use crate::lab::workload::{Server, Speaks};
use crate::model::Mac;

/// The router's own address on the link to the outside: what the outside sees.
pub const NAT_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The host outside (documentation addresses: never real).
pub const OUTSIDE4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const NAT_ADDRESS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1);
pub const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 2);
/// Where the VM and the outside host answer, TCP and UDP.
pub const ECHO_PORT: u16 = 7777;

/// Namespaces of the VPC's other machines; dropped with the VPC.
#[derive(Default)]
pub(super) struct Hosts(Vec<Host>);

/// A machine that is no node, with its echo server.
struct Host {
    // Before the namespace: open sockets would keep it alive.
    _server: Server,
    _ns: OwnedNetns,
}

/// A plain machine in the VPC.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Last part of its namespace's name, e.g. `vm`.
    pub name: String,
    pub subnet4: Ipv4Net,
    pub gateway4: Ipv4Addr,
    pub v4: Ipv4Addr,
    pub subnet6: Option<Ipv6Net>,
    pub gateway6: Option<Ipv6Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl Vpc {
    /// Start a plain VM in namespace `fwl-<id>-<name>`; it answers on
    /// [`ECHO_PORT`] with its name and the peer's address.
    pub async fn add_vm(&self, vm: VmSpec) -> Result<Netns, VpcError> {
        let ns = OwnedNetns::create(&self.id().name(&vm.name))?;
        let instance_id = format!("vm-{}", vm.name);
        self.register_instance(&instance_id, &ns).await;
        let [a, b, c, d] = vm.v4.octets();
        let port = EniPort {
            eni_id: format!("eni-{instance_id}"),
            instance_id,
            mac: Mac([0x02, 0xee, a, b, c, d]),
            queues: 1,
            subnet4: vm.subnet4,
            gateway4: vm.gateway4,
            subnet6: vm.subnet6,
            gateway6: vm.gateway6,
            v4: vec![vm.v4],
            v6: vm.v6.into_iter().collect(),
        };
        let boot = os::Boot::from(&port);
        let eni_id = port.eni_id.clone();
        self.attach(port).await?;
        os::boot(&ns, &boot).await?;
        self.settled(&eni_id).await?;
        self.keep(ns, &vm.name).await
    }

    /// Start the NAT gateway and the host outside, `fwl-<id>-out`. Packets leave
    /// the VPC with [`NAT_ADDRESS`]; IPv6 leaves as it is. Nothing comes in that
    /// was not asked for, except to a load balancer.
    pub async fn add_outside(&self) -> Result<Netns, VpcError> {
        let ns = OwnedNetns::create(&self.id().name("out"))?;
        let near = VethEnd { name: nft::NAT_DEVICE, index: super::FIRST_INDEX - 1, mac: None, mtu: 1500, queues: 1 };
        let far = VethEnd { name: "eth0", index: 0, ..near.clone() };
        let router = &self.inner.links;
        router.add_veth(&near, &far, &ns).await?;
        let device = near.index;
        router.set_up(device, Some("nat gateway")).await?;
        let outside = Links::open(&ns).await?;
        os::loopback(&outside).await?;
        let eth0 = outside.find("eth0").await?.index;
        outside.set_up(eth0, None).await?;
        let link4 = |a| Ipv4Net::new(a, 24).map(IpNet::V4);
        let link6 = |a| Ipv6Net::new(a, 64).map(IpNet::V6);
        for (links, index, v4, v6) in
            [(router, device, NAT_ADDRESS, NAT_ADDRESS6), (&outside, eth0, OUTSIDE4, OUTSIDE6)]
        {
            for net in [link4(v4), link6(v6)].into_iter().flatten() {
                links.add_address(index, net).await?;
            }
        }
        router.add_route(IpNet::V4(Ipv4Net::default()), Via::Gateway(device, OUTSIDE4.into())).await?;
        router.add_route(IpNet::V6(Ipv6Net::default()), Via::Gateway(device, OUTSIDE6.into())).await?;
        // Only IPv6 has a way back: IPv4 must be translated.
        outside.add_route(IpNet::V6(Ipv6Net::default()), Via::Gateway(eth0, NAT_ADDRESS6.into())).await?;
        self.inner.nft(nft::source_nat(NAT_ADDRESS)).await?;
        self.keep(ns, "out").await
    }

    /// Point a load balancer's listener at backends, TCP and UDP; none removes
    /// it. The client's address is kept, so an answer must come back through the
    /// router: a client on its backend's own node is not served, as in the cloud.
    pub async fn set_lb(&self, vip: IpAddr, port: u16, backends: Vec<SocketAddr>) -> Result<(), VpcError> {
        let mut state = self.inner.state.lock().await;
        if !backends.is_empty() {
            self.add_service_address(vip).await?;
        }
        for transport in [Transport::Tcp, Transport::Udp] {
            match backends.is_empty() {
                true => state.listeners.remove(&(vip, port, transport)),
                false => state.listeners.insert((vip, port, transport), backends.iter().copied().collect()),
            };
        }
        self.inner.nft(nft::balance(&state.listeners)).await
    }

    /// Make the load balancers' listeners these, and publish their addresses.
    pub async fn set_balancers(&self, wanted: Listeners) -> Result<(), VpcError> {
        let mut state = self.inner.state.lock().await;
        for (vip, ..) in wanted.keys() {
            if !state.published.contains(vip) {
                self.add_service_address(*vip).await?;
                self.publish(*vip).await?;
                state.published.insert(*vip);
            }
        }
        state.listeners = wanted;
        self.inner.nft(nft::balance(&state.listeners)).await
    }

    /// Let the outside host send packets for this address to the VPC, as the
    /// internet does with a load balancer's public address.
    pub async fn publish(&self, vip: IpAddr) -> Result<(), VpcError> {
        let outside = Links::open(&Netns::named(&self.id().name("out"))?).await?;
        let eth0 = outside.find("eth0").await?.index;
        let gateway = if vip.is_ipv4() { IpAddr::V4(NAT_ADDRESS) } else { IpAddr::V6(NAT_ADDRESS6) };
        Ok(outside.add_route(IpNet::from(vip), Via::Gateway(eth0, gateway)).await?)
    }

    async fn keep(&self, ns: OwnedNetns, name: &str) -> Result<Netns, VpcError> {
        let server = Server::start(&ns, name, &[], &[ECHO_PORT], Speaks::Peer)
            .await
            .map_err(|cause| VpcError::Io { what: format!("echo server of {name}"), cause })?;
        let handle = Netns::clone(&ns);
        self.inner.state.lock().await.edge.0.push(Host { _server: server, _ns: ns });
        Ok(handle)
    }
}
