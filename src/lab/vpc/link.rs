//! Links, addresses, routes and neighbours of one namespace, over rtnetlink.
//!
//! The socket is opened inside the namespace and keeps working on it from any
//! task; nothing here changes a thread's namespace for longer than the opening.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use ipnet::IpNet;
use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage, State};
use netlink_packet_route::neighbour::NeighbourState;
use netlink_packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, MulticastGroup, RouteMessageBuilder};

use super::ns::{Netns, NsError};
use crate::model::Mac;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error(transparent)]
    Ns(#[from] NsError),
    #[error("{what}: {cause}")]
    Netlink { what: String, cause: io::Error },
    #[error("{0}: no such link")]
    NoLink(String),
}

impl LinkError {
    /// The kernel's error number, when it gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink { cause, .. } => cause.raw_os_error(),
            _ => None,
        }
    }
}

fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    move |e| {
        let cause = match e {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other.to_string()),
        };
        LinkError::Netlink { what: what.into(), cause }
    }
}

/// Success also when the kernel says it is there or gone already.
fn tolerate(result: Result<(), LinkError>, errno: &[i32]) -> Result<(), LinkError> {
    match result {
        Err(e) if e.errno().is_some_and(|n| errno.contains(&n)) => Ok(()),
        other => other,
    }
}

/// A link as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<Mac>,
    pub mtu: u32,
    pub up: bool,
    /// Up with a carrier, and its queues in use: the kernel gets there some time
    /// after `up`.
    pub running: bool,
    pub tx_queues: u32,
    pub rx_queues: u32,
}

impl Link {
    fn from_message(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            running: false,
            tx_queues: 0,
            rx_queues: 0,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(raw) => link.mac = raw.as_slice().try_into().ok().map(Mac),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::OperState(state) => link.running = *state == State::Up,
                LinkAttribute::NumTxQueues(n) => link.tx_queues = *n,
                LinkAttribute::NumRxQueues(n) => link.rx_queues = *n,
                _ => {}
            }
        }
        link
    }
}

/// One end of a veth pair to be made.
#[derive(Clone, Debug)]
pub struct VethEnd<'a> {
    /// May be a pattern such as `eth%d`: the kernel takes the first free name.
    pub name: &'a str,
    /// Its interface index, or zero for the next free one. The two ends of a
    /// pair should not have the same: the kernel then takes the device for one
    /// without a peer and may let a carrier change wait for a second.
    pub index: u32,
    pub mac: Option<Mac>,
    pub mtu: u32,
    pub queues: u32,
}

impl VethEnd<'_> {
    fn apply<T>(&self, builder: LinkMessageBuilder<T>) -> LinkMessageBuilder<T> {
        let builder = builder
            .index(self.index)
            .mtu(self.mtu)
            .append_extra_attribute(LinkAttribute::NumTxQueues(self.queues))
            .append_extra_attribute(LinkAttribute::NumRxQueues(self.queues));
        match self.mac {
            Some(mac) => builder.address(mac.0.to_vec()),
            None => builder,
        }
    }
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// To a neighbour on the link itself.
    Link(u32),
    /// To a gateway taken to be on the link.
    Gateway(u32, IpAddr),
    /// Nowhere: dropped in silence.
    Blackhole,
}

pub type Events = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, netlink_sys::SocketAddr)>;

/// A netlink socket of one namespace.
#[derive(Clone)]
pub struct Links {
    handle: Handle,
}

impl Links {
    pub async fn open(ns: &Netns) -> Result<Self, LinkError> {
        let (connection, handle, _) = ns
            .run_async(rtnetlink::new_connection)
            .await?
            .map_err(|cause| LinkError::Netlink { what: "open netlink socket".into(), cause })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Changes of links in the namespace. Keep the first for as long as the
    /// second is read.
    pub async fn watch(ns: &Netns) -> Result<(Self, Events), LinkError> {
        Self::subscribe(ns, MulticastGroup::Link).await
    }

    async fn subscribe(ns: &Netns, group: MulticastGroup) -> Result<(Self, Events), LinkError> {
        let (connection, handle, events) =
            ns.run_async(move || rtnetlink::new_multicast_connection(&[group]))
                .await?
                .map_err(|cause| LinkError::Netlink { what: "open netlink socket".into(), cause })?;
        tokio::spawn(connection);
        Ok((Self { handle }, events))
    }

    /// Make a veth pair: one end here, the other in `far_ns`.
    pub async fn add_veth(&self, near: &VethEnd<'_>, far: &VethEnd<'_>, far_ns: &Netns) -> Result<(), LinkError> {
        let peer = far
            .apply(LinkMessageBuilder::<LinkUnspec>::new().name(far.name))
            .setns_by_fd(far_ns.file().as_raw_fd())
            .build();
        let message = near
            .apply(LinkMessageBuilder::<LinkVeth>::new(near.name, far.name))
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        self.handle.link().add(message).execute().await.map_err(netlink(format!("add veth {}", near.name)))
    }

    pub async fn find(&self, name: &str) -> Result<Link, LinkError> {
        let mut found = Box::pin(self.handle.link().get().match_name(name.to_owned()).execute());
        match found.next().await {
            Some(Ok(message)) => Ok(Link::from_message(&message)),
            Some(Err(e)) => match netlink(format!("find link {name}"))(e) {
                e if e.errno() == Some(libc::ENODEV) => Err(LinkError::NoLink(name.to_owned())),
                e => Err(e),
            },
            None => Err(LinkError::NoLink(name.to_owned())),
        }
    }

    pub async fn list(&self) -> Result<Vec<Link>, LinkError> {
        let mut all = Vec::new();
        let mut stream = Box::pin(self.handle.link().get().execute());
        while let Some(message) = stream.next().await {
            all.push(Link::from_message(&message.map_err(netlink("list links"))?));
        }
        Ok(all)
    }

    pub async fn delete(&self, index: u32) -> Result<(), LinkError> {
        let result = self.handle.link().del(index).execute().await.map_err(netlink(format!("delete link {index}")));
        tolerate(result, &[libc::ENODEV])
    }

    pub async fn set_up(&self, index: u32, alias: Option<&str>) -> Result<(), LinkError> {
        let mut builder = LinkUnspec::new_with_index(index).up();
        if let Some(alias) = alias {
            builder = builder.alias(alias);
        }
        self.handle.link().set(builder.build()).execute().await.map_err(netlink(format!("set link {index} up")))
    }

    /// Add an address; it is usable at once (no duplicate address detection).
    pub async fn add_address(&self, index: u32, net: IpNet) -> Result<(), LinkError> {
        let mut request = self.handle.address().add(index, net.addr(), net.prefix_len());
        if matches!(net, IpNet::V6(_)) {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        tolerate(request.execute().await.map_err(netlink(format!("add address {net}"))), &[libc::EEXIST])
    }

    pub async fn add_neighbour(&self, index: u32, address: IpAddr, mac: Mac) -> Result<(), LinkError> {
        self.handle
            .neighbours()
            .add(index, address)
            .link_layer_address(&mac.0)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(netlink(format!("add neighbour {address}")))
    }

    pub async fn add_route(&self, net: IpNet, via: Via) -> Result<(), LinkError> {
        let what = format!("add route {net}");
        self.handle.route().add(route(net, via)).replace().execute().await.map_err(netlink(what))
    }

    /// Whether packets to the address end here.
    async fn is_local(&self, address: Ipv6Addr) -> bool {
        let question = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).build();
        let mut found = Box::pin(self.handle.route().get(question).execute());
        matches!(found.next().await, Some(Ok(route)) if route.header.kind == RouteType::Local)
    }

    pub async fn delete_route(&self, net: IpNet, via: Via) -> Result<(), LinkError> {
        let what = format!("delete route {net}");
        let result = self.handle.route().del(route(net, via)).execute().await.map_err(netlink(what));
        tolerate(result, &[libc::ESRCH, libc::ENODEV])
    }
}

/// Wait until the kernel takes an IPv6 address for its own: it does so some time
/// after the address was added. False when the time is over.
pub async fn wait_local(ns: &Netns, address: Ipv6Addr, within: Duration) -> Result<bool, LinkError> {
    let (_socket, mut events) = Links::subscribe(ns, MulticastGroup::Ipv6Route).await?;
    let links = Links::open(ns).await?;
    let until = tokio::time::Instant::now() + within;
    while !links.is_local(address).await {
        if tokio::time::timeout_at(until, events.next()).await.is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Wait until a device has its carrier and its queues are in use; false when
/// the time is over.
pub async fn wait_running(ns: &Netns, name: &str, within: Duration) -> Result<bool, LinkError> {
    let (_socket, mut events) = Links::watch(ns).await?;
    let links = Links::open(ns).await?;
    let until = tokio::time::Instant::now() + within;
    while !links.find(name).await?.running {
        if tokio::time::timeout_at(until, events.next()).await.is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn route(net: IpNet, via: Via) -> RouteMessage {
    fn finish<T>(builder: RouteMessageBuilder<T>, via: Via) -> RouteMessageBuilder<T> {
        match via {
            Via::Link(index) => builder.output_interface(index).scope(RouteScope::Link),
            Via::Gateway(index, _) => builder.output_interface(index).onlink(),
            Via::Blackhole => builder.kind(RouteType::BlackHole),
        }
    }
    match net {
        IpNet::V4(net) => {
            let builder = RouteMessageBuilder::<std::net::Ipv4Addr>::new();
            let mut builder = finish(builder.destination_prefix(net.network(), net.prefix_len()), via);
            if let Via::Gateway(_, IpAddr::V4(gateway)) = via {
                builder = builder.gateway(gateway);
            }
            builder.build()
        }
        IpNet::V6(net) => {
            let builder = RouteMessageBuilder::<Ipv6Addr>::new();
            let mut builder = finish(builder.destination_prefix(net.network(), net.prefix_len()), via);
            if let Via::Gateway(_, IpAddr::V6(gateway)) = via {
                builder = builder.gateway(gateway);
            }
            builder.build()
        }
    }
}
