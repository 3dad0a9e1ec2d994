//! The actor's own rtnetlink connection: link notifications and listings.
//!
//! Purpose: says when a device somebody waits for has appeared or changed, when
//! the node's addresses have, and answers `Inventory` with fresh listings. Owner:
//! one embodiment of the actor, on its executor; ends with it. A notification
//! that was lost (the kernel says so) counts as a change of everything: whoever
//! waits looks again. Our own host links come and go with every pod and are
//! nobody's news: the kernel leaves them out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::RouteMessage;
use parking_lot::Mutex;
use rtnetlink::sys::AsyncSocket as _;
use rtnetlink::{Handle, IpVersion, MulticastGroup};
use socket2::{SockFilter, SockRef};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::names::{host_link_len, is_host_link};
use super::note;
use super::objects::MAIN;
use super::read::{self, Device};
use super::{Attached, Config, KernelInventory};
use crate::model::Mac;

const GROUPS: [MulticastGroup; 3] = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];

pub(super) struct Monitor {
    handle: Handle,
    /// Counts changes of watched devices.
    changes: watch::Receiver<u64>,
    seen: Arc<Mutex<Seen>>,
    tasks: [JoinHandle<()>; 3],
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
    pub(super) fn start(link_prefix: &str) -> std::io::Result<Self> {
        // Requests go over a connection of their own: what news leaves out is in
        // their answers.
        let (requests, handle, _) = rtnetlink::new_connection()?;
        let (mut news, _, mut messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
        SockRef::from(news.socket_mut().socket_ref()).attach_filter(&without_host_links(link_prefix))?;
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
        let tasks = [tokio::spawn(requests), tokio::spawn(news), tokio::spawn(listener)];
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

/// A socket filter (classic BPF) that drops notifications of links whose name is
/// as long as a host link's and begins like one; a name is the first attribute
/// that the kernel writes. One notification is one datagram.
fn without_host_links(prefix: &str) -> Vec<SockFilter> {
    use libc::{BPF_ABS, BPF_B, BPF_H, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, RTM_DELLINK, RTM_NEWLINK};
    /// Of `struct nlmsghdr`: the type. Behind it and `struct ifinfomsg`: the first
    /// attribute's length, type and value.
    const TYPE: u32 = 4;
    const LENGTH: u32 = 32;
    const ATTRIBUTE: u32 = 34;
    const NAME: u32 = 36;
    // The filter loads as from the wire, netlink is in the host's order.
    let wire = |n: u16| u32::from(n.to_be());
    let named = (4 + host_link_len(prefix) + 1) as u16;
    let mut tests = vec![
        (BPF_H, LENGTH, vec![wire(named)]),
        (BPF_H, TYPE, vec![wire(RTM_NEWLINK), wire(RTM_DELLINK)]),
        (BPF_H, ATTRIBUTE, vec![wire(libc::IFLA_IFNAME)]),
    ];
    tests.extend(prefix.bytes().zip(NAME..).map(|(byte, at)| (BPF_B, at, vec![u32::from(byte)])));

    let op = |code: u32, jt: usize, jf: usize, k: u32| SockFilter::new(code as u16, jt as u8, jf as u8, k);
    let mut program = Vec::new();
    let mut left: usize = tests.iter().map(|(.., values)| 1 + values.len()).sum();
    for (size, at, values) in tests {
        program.push(op(BPF_LD | BPF_ABS | size, 0, 0, at));
        left -= 1 + values.len();
        for (nth, value) in values.iter().enumerate() {
            // Alternatives left, and behind all tests the drop before the accept.
            let others = values.len() - 1 - nth;
            let otherwise = if others > 0 { 0 } else { left + 1 };
            program.push(op(BPF_JMP | BPF_JEQ | BPF_K, others, otherwise, *value));
        }
    }
    program.push(op(BPF_RET | BPF_K, 0, 0, 0));
    program.push(op(BPF_RET | BPF_K, 0, 0, u32::MAX));
    program
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
    // By the index of their link.
    let mut attached: BTreeMap<u32, Attached> = BTreeMap::new();
    for d in links {
        if is_host_link(&config.link_prefix, &d.name) {
            let said = d.alias.as_deref().and_then(|alias| note::read(&config.link_prefix, &d.name, alias));
            attached.extend(said.map(|said| (d.index, said)));
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
        for path in routes.filter(host_route) {
            found.routed.push(path.to.addr());
            if let Some(over) = attached.get_mut(&path.index) {
                over.addresses.push(path.to.addr());
            }
        }
        let rules: Vec<_> = handle.rule().get(family).execute().try_collect().await?;
        found.ruled.extend(rules.iter().filter_map(read::rule).map(|r| r.selector.address()));
    }
    found.attached = attached.into_values().collect();
    found.ruled.sort();
    found.ruled.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn news_of_our_own_host_links_stay_in_the_kernel_and_all_other_is_told() {
        let names = ["fw0123456789ab", "fw0123456789a", "fx0123456789ab", "eth7", "fwan0"];
        // In a namespace that ends with its thread.
        let told = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(links_told(&names))
        });
        let told = told.join().unwrap();
        let expected: Vec<&str> = names.into_iter().filter(|name| !is_host_link("fw", name)).collect();
        assert_eq!(told, expected);
    }

    /// Makes these links; which of them news came of.
    async fn links_told<'a>(names: &[&'a str]) -> Vec<&'a str> {
        let (mut news, handle, mut messages) = rtnetlink::new_multicast_connection(&GROUPS).unwrap();
        SockRef::from(news.socket_mut().socket_ref()).attach_filter(&without_host_links("fw")).unwrap();
        tokio::spawn(news);
        for name in names {
            let veth = rtnetlink::LinkVeth::new(name, &format!("p{name}")[..14.min(name.len())]).build();
            handle.link().add(veth).execute().await.unwrap();
        }
        let mut told = Vec::new();
        while !told.contains(&"fwan0") {
            let next = tokio::time::timeout(Duration::from_secs(10), messages.next()).await;
            let NetlinkPayload::InnerMessage(Rtnl::NewLink(link)) = next.unwrap().unwrap().0.payload else { continue };
            for attribute in link.attributes {
                if let LinkAttribute::IfName(of) = attribute {
                    told.extend(names.iter().find(|name| **name == of && !told.contains(name)));
                }
            }
        }
        told
    }
}
