//! The actor's own rtnetlink connection: link notifications and listings.
//!
//! Purpose: says when a device somebody waits for has appeared or changed, when
//! the node's addresses have, and answers `Inventory` with fresh listings. Owner: one embodiment of the actor,
//! on its executor; ends with it. A notification that was lost (the kernel says
//! so) counts as a change of everything: whoever waits looks again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::RouteMessage;
use parking_lot::Mutex;
use rtnetlink::{Handle, IpVersion, MulticastGroup};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::names::is_host_link;
use super::objects::MAIN;
use super::read::{self, Device};
use super::{Config, KernelInventory};
use crate::model::Mac;

const GROUPS: [MulticastGroup; 3] = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];

pub(super) struct Monitor {
    handle: Handle,
    /// Counts changes of watched devices.
    changes: watch::Receiver<u64>,
    seen: Arc<Mutex<Seen>>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Default)]
struct Seen {
    /// Who is interested in a device: how many.
    watched: BTreeMap<Mac, usize>,
    changed: BTreeSet<Mac>,
    /// Some address of the node came or went.
    addresses: bool,
}

impl Monitor {
    /// In the calling thread's namespace.
    pub(super) fn start() -> std::io::Result<Self> {
        let (connection, handle, mut messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
        let (tell, changes) = watch::channel(0u64);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let listener = {
            let seen = seen.clone();
            async move {
                while let Some((message, _)) = messages.next().await {
                    if note(&mut seen.lock(), &message) {
                        tell.send_modify(|n| *n += 1);
                    }
                }
            }
        };
        let tasks = [tokio::spawn(connection), tokio::spawn(listener)];
        Ok(Self { handle, changes, seen, tasks })
    }

    /// Changes of this device are told while the guard lives.
    pub(super) fn watch(&self, mac: Mac) -> Watched {
        *self.seen.lock().watched.entry(mac).or_default() += 1;
        Watched { mac, seen: self.seen.clone() }
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// The watched devices that have changed since the last call.
    pub(super) fn take_changed(&self) -> BTreeSet<Mac> {
        std::mem::take(&mut self.seen.lock().changed)
    }

    /// Whether the node's addresses have changed since the last call.
    pub(super) fn take_addresses(&self) -> bool {
        std::mem::take(&mut self.seen.lock().addresses)
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

/// Somebody's interest in a device.
pub(super) struct Watched {
    mac: Mac,
    seen: Arc<Mutex<Seen>>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut seen = self.seen.lock();
        if let Some(n) = seen.watched.get_mut(&self.mac) {
            *n -= 1;
            if *n == 0 {
                seen.watched.remove(&self.mac);
                seen.changed.remove(&self.mac);
            }
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn note(seen: &mut Seen, message: &NetlinkMessage<Rtnl>) -> bool {
    let changed: BTreeSet<Mac> = match &message.payload {
        NetlinkPayload::InnerMessage(Rtnl::NewLink(link) | Rtnl::DelLink(link)) => {
            let mac = link.attributes.iter().find_map(|a| match a {
                LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(&bytes[..]).ok().map(Mac),
                _ => None,
            });
            mac.filter(|mac| seen.watched.contains_key(mac)).into_iter().collect()
        }
        NetlinkPayload::InnerMessage(Rtnl::NewAddress(_) | Rtnl::DelAddress(_)) => {
            seen.addresses = true;
            return true;
        }
        NetlinkPayload::InnerMessage(_) | NetlinkPayload::Noop | NetlinkPayload::Done(_) => return false,
        _ => {
            seen.addresses = true;
            seen.watched.keys().copied().collect()
        }
    };
    let any = !changed.is_empty() || seen.addresses;
    seen.changed.extend(changed);
    any
}

/// What of ours is in the kernel, listed afresh.
pub(super) async fn inventory(handle: Handle, config: &Config) -> Result<KernelInventory, rtnetlink::Error> {
    let mut found = KernelInventory::default();
    let links: Vec<Device> = handle.link().get().execute().map_ok(|m| read::device(&m)).try_collect().await?;
    for d in links {
        if is_host_link(&config.link_prefix, &d.name) {
            found.host_links.push(d.name);
        } else if let (true, Some(mac)) = (read::may_be_eni(&d), d.mac) {
            found.enis.push((mac, d.name));
        }
    }
    for family in [IpVersion::V4, IpVersion::V6] {
        let all = match family {
            IpVersion::V4 => rtnetlink::RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            IpVersion::V6 => rtnetlink::RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        };
        let routes: Vec<RouteMessage> = handle.route().get(all).execute().try_collect().await?;
        let routes = routes.iter().filter_map(read::path);
        let host_route = |p: &read::Path| p.ours && p.table == MAIN && p.to.prefix_len() == p.to.max_prefix_len();
        found.routed.extend(routes.filter(host_route).map(|p| p.to.addr()));
        let rules: Vec<_> = handle.rule().get(family).execute().try_collect().await?;
        found.ruled.extend(rules.iter().filter_map(read::rule).map(|r| r.selector.address()));
    }
    found.ruled.sort();
    found.ruled.dedup();
    Ok(found)
}
