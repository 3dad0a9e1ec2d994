//! One attachment's two namespaces, opened: reads the state and applies steps.
//!
//! Purpose: the thin shell under `plan`. Owner: the wiring thread that serves the
//! request. Links are made first, one round trip each; everything else goes to
//! the kernel in one system call per namespace.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsFd as _;

use netlink_packet_route::link::InfoKind;

use super::message::{self, Devices};
use super::names::{LinkNames, eni_home_name, shaper};
use super::nl::{GONE, Nl, NlError, Request};
use super::objects::{Dev, Key, Link, LinkKind, Side, State, Value};
use super::plan::Op;
use super::programs::Placed;
use super::read::{self, Device};
use crate::model::Mac;
use crate::sys::netns::Netns;
use crate::sys::sysctl;

/// The pod's namespace with a socket in it.
pub(super) struct PodSide {
    pub(super) ns: Netns,
    pub(super) nl: Nl,
}

/// Who we are wiring and with what.
pub(super) struct Site<'a> {
    pub(super) host: &'a mut Nl,
    pub(super) home: &'a Netns,
    pub(super) pod: Option<PodSide>,
    pub(super) names: LinkNames,
    /// What the host link will say of its attachment.
    pub(super) note: Option<String>,
    /// The pod's interface.
    pub(super) ifname: String,
    /// The side of the veth pair in the pod: `Pod` or `NodeLink`.
    pub(super) peer: Dev,
    /// The hardware address of an exclusive ENI.
    pub(super) eni_mac: Option<Mac>,
    /// An exclusive ENI's device while it is in the node's namespace.
    pub(super) eni: Option<Device>,
    pub(super) devices: Devices,
}

/// Called between the making of links and their being set up: before an ENI moves,
/// and again when it has moved if programs are to wait for that.
pub(super) type Ready<'a> = &'a mut dyn FnMut(&Devices) -> Result<Placed, String>;

impl Site<'_> {
    /// The devices of the pod's side, with what they are to us.
    fn pod_links(&mut self, host: Option<&Device>, state: &mut State) -> Result<(), NlError> {
        let Some(pod) = self.pod.as_mut() else { return Ok(()) };
        let shaper = shaper(&self.names.host);
        for d in read::devices(&mut pod.nl)? {
            let ours = host.is_some_and(|h| h.peer == Some(d.index) && d.peer == Some(h.index))
                && d.kind == Some(InfoKind::Veth);
            let (dev, kind) = if d.name == "lo" {
                (Dev::Loopback, LinkKind::Given)
            } else if ours {
                (if d.name == self.ifname { Dev::Pod } else { Dev::NodeLink }, LinkKind::Peer)
            } else if self.eni_mac.is_some() && d.mac == self.eni_mac && read::may_be_eni(&d) {
                (if d.name == self.ifname { Dev::Pod } else { Dev::Stray }, LinkKind::MovedEni)
            } else if d.name == self.ifname {
                (Dev::Pod, LinkKind::Foreign)
            } else if d.name == shaper && d.kind == Some(InfoKind::Ifb) {
                (Dev::Shaper, LinkKind::Ifb)
            } else if d.name == self.names.host {
                (Dev::NodeLink, LinkKind::Foreign)
            } else {
                continue;
            };
            if kind != LinkKind::Foreign {
                self.devices.set(dev, d.index, &d.name);
            }
            state.insert(Key::Link(dev), Value::Link(link(&d, kind)));
        }
        Ok(())
    }

    /// Everything of ours that is there now.
    pub(super) fn read(
        &mut self,
        host: Option<&Device>,
        desired: &State,
        addresses: &[IpAddr],
    ) -> Result<State, NlError> {
        let mut state = State::new();
        if let Some(h) = host {
            self.devices.set(Dev::HostLink, h.index, &h.name);
        }
        self.pod_links(host, &mut state)?;
        if let Some(h) = host {
            let peer = match (self.devices.index(Dev::Pod), self.devices.index(Dev::NodeLink)) {
                (i, _) if i != 0 && h.peer == Some(i) => Dev::Pod,
                (_, i) if i != 0 && h.peer == Some(i) => Dev::NodeLink,
                _ => self.peer,
            };
            let kind = if h.kind == Some(InfoKind::Veth) { LinkKind::Veth { peer } } else { LinkKind::Foreign };
            state.insert(Key::Link(Dev::HostLink), Value::Link(link(h, kind)));
            read::on_device(self.host, Dev::HostLink, &self.devices, &mut state)?;
        }
        read::node_routes_and_rules(self.host, &self.devices, desired, addresses, &mut state)?;
        if let Some(pod) = self.pod.as_mut() {
            for dev in [Dev::Pod, Dev::NodeLink, Dev::Shaper] {
                if self.devices.index(dev) != 0 {
                    read::on_device(&mut pod.nl, dev, &self.devices, &mut state)?;
                }
            }
            read::pod_routes(&mut pod.nl, &self.devices, &mut state)?;
        }
        self.read_settings(desired, &mut state);
        Ok(state)
    }

    fn read_settings(&self, desired: &State, state: &mut State) {
        for side in [Side::Node, Side::Pod] {
            let there: Vec<_> = settings(desired, side).filter(|(dev, ..)| self.devices.index(*dev) != 0).collect();
            if there.is_empty() {
                continue;
            }
            let mut read = || {
                for (dev, setting, _) in &there {
                    let value = sysctl::get_net(&setting.path(self.devices.name(*dev)));
                    if let Some(value) = value.ok().flatten().and_then(|v| v.parse().ok()) {
                        state.insert(Key::Setting(*dev, *setting), Value::Setting(value));
                    }
                }
            };
            match (side, &self.pod) {
                (Side::Node, _) => read(),
                (Side::Pod, Some(pod)) => drop(pod.ns.within(self.home, read)),
                (Side::Pod, None) => {}
            }
        }
    }

    /// Take the steps. Removals go on after an error and report them all.
    pub(super) fn apply(&mut self, ops: &[Op], ready: Ready<'_>) -> Result<(), Vec<NlError>> {
        let mut errors = self.remove(ops);
        if errors.is_empty()
            && let Err(e) = self.make(ops, ready)
        {
            errors.push(e);
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn remove(&mut self, ops: &[Op]) -> Vec<NlError> {
        let mut node = Vec::new();
        let mut pod = Vec::new();
        let mut gone = BTreeSet::new();
        let mut returned = None;
        for op in ops {
            let Op::Delete(key, value) = op else { continue };
            if matches!(key, Key::Address(..)) {
                // In its place among the additions.
                continue;
            }
            match (key, value) {
                (Key::Link(dev), Value::Link(Link { kind: LinkKind::MovedEni, mac: Some(mac), .. })) => {
                    let name = eni_home_name(*mac);
                    let (from, index) = (self.devices.name(*dev), self.devices.index(*dev));
                    pod.push(message::move_link(from, index, self.home.as_fd(), &name));
                    returned = Some(name);
                    gone.insert(*dev);
                }
                _ => {
                    let out = if side(key, value) == Side::Node { &mut node } else { &mut pod };
                    message::delete(key, value, &self.devices, out);
                }
            }
            match (key, value) {
                (Key::Link(dev), Value::Link(Link { kind: LinkKind::Veth { peer }, .. })) => gone.extend([*dev, *peer]),
                (Key::Link(dev), _) => drop(gone.insert(*dev)),
                _ => {}
            }
        }
        for dev in gone {
            self.devices.set(dev, 0, "");
        }
        let mut errors = Vec::new();
        if let (Some(side), false) = (self.pod.as_mut(), pod.is_empty()) {
            errors.extend(failures(&mut side.nl, pod));
        }
        if let Some(name) = returned {
            match self.host.all(vec![message::get_link(&name, GONE)]) {
                Ok(answers) => self.eni = answers.first().and_then(|a| read::first_device(a)),
                Err(e) => errors.push(e),
            }
        }
        if !node.is_empty() {
            errors.extend(failures(self.host, node));
        }
        errors
    }

    fn make(&mut self, ops: &[Op], ready: Ready<'_>) -> Result<(), NlError> {
        let mut fresh = BTreeSet::new();
        let links: Vec<(Dev, &Link)> = ops
            .iter()
            .filter_map(|op| match op {
                Op::Put(Key::Link(dev), Value::Link(link)) if self.devices.index(*dev) == 0 => Some((*dev, link)),
                _ => None,
            })
            .collect();
        // The pair first, so that programs are in place before any device is up
        // and before an ENI moves.
        for (dev, link) in &links {
            if let LinkKind::Veth { peer } = link.kind {
                self.make_pair(*dev, peer, link.mtu.unwrap_or(1500))?;
                fresh.extend([*dev, peer]);
            }
        }
        if let Some(eni) = &self.eni {
            self.devices.set(Dev::Eni, eni.index, &eni.name);
        }
        let refused = |cause: String| NlError { what: "program".to_owned(), errno: 0, cause };
        let mut placed = ready(&self.devices).map_err(refused)?;
        for (dev, link) in &links {
            match link.kind {
                LinkKind::MovedEni => {
                    // The kernel sets a device down that moves.
                    self.move_eni(*dev)?;
                    if placed == Placed::OnceInside {
                        placed = ready(&self.devices).map_err(refused)?;
                    }
                }
                LinkKind::Ifb => self.make_ifb(*dev)?,
                _ => {}
            }
        }
        if placed == Placed::OnceInside {
            return Err(refused("the ENI has not moved into the pod".to_owned()));
        }
        self.write_settings(ops, &fresh)?;
        let mut node = Vec::new();
        let mut pod = Vec::new();
        for op in ops {
            let (Op::Put(key, value) | Op::Delete(key, value)) = op;
            let out = if side(key, value) == Side::Node { &mut node } else { &mut pod };
            match key {
                _ if matches!(op, Op::Delete(..)) => {
                    if matches!(key, Key::Address(..)) {
                        message::delete(key, value, &self.devices, out);
                    }
                }
                Key::Link(dev) if fresh.contains(dev) => {
                    let wanted: Vec<_> = ops.iter().filter_map(|op| link_setting(op, *dev)).collect();
                    out.extend(message::settings(self.devices.name(*dev), self.devices.index(*dev), &wanted));
                    let note = self.note.as_deref().filter(|_| *dev == Dev::HostLink);
                    out.push(message::link_up(self.devices.name(*dev), self.devices.index(*dev), note));
                }
                Key::Link(dev) if self.devices.index(*dev) == 0 => {
                    let cause = "the device is not there".to_owned();
                    let what = message::describe(key, value, &self.devices);
                    return Err(NlError { what, errno: libc::ENODEV, cause });
                }
                _ => message::put(key, value, &self.devices, out),
            }
        }
        self.host.all(node)?;
        if let (Some(side), false) = (self.pod.as_mut(), pod.is_empty()) {
            side.nl.all(pod)?;
        }
        Ok(())
    }

    fn pod_side(&mut self) -> Result<&mut PodSide, NlError> {
        self.pod.as_mut().ok_or_else(no_namespace)
    }

    fn make_pair(&mut self, dev: Dev, peer: Dev, mtu: u32) -> Result<(), NlError> {
        let names = self.names.clone();
        let peer_name = if peer == Dev::Pod { self.ifname.clone() } else { names.host.clone() };
        let Some(pod) = self.pod.as_ref() else { return Err(no_namespace()) };
        let create = message::new_veth(&names.host, names.host_mac, &peer_name, names.pod_mac, mtu, pod.ns.as_fd());
        // The answer about the new link says its index and its peer's.
        let answers = self.host.all(vec![create, message::get_link(&names.host, &[])])?;
        let made = answers.last().and_then(|a| read::first_device(a));
        let Some(Device { index, peer: Some(other), .. }) = made else {
            return Err(NlError { what: format!("link {}", names.host), errno: 0, cause: "not made".to_owned() });
        };
        self.devices.set(dev, index, &names.host);
        self.devices.set(peer, other, &peer_name);
        Ok(())
    }

    fn move_eni(&mut self, dev: Dev) -> Result<(), NlError> {
        let ifname = self.ifname.clone();
        let Some(eni) = self.eni.take() else {
            return Err(NlError {
                what: "ENI".to_owned(),
                errno: libc::ENODEV,
                cause: "its device is gone".to_owned(),
            });
        };
        let Some(pod) = self.pod.as_mut() else { return Err(no_namespace()) };
        self.host.all(vec![message::move_link(&eni.name, eni.index, pod.ns.as_fd(), &ifname)])?;
        let answers = pod.nl.all(vec![message::get_link(&ifname, &[])])?;
        if let Some(there) = answers.first().and_then(|a| read::first_device(a)) {
            self.devices.set(dev, there.index, &ifname);
        }
        self.devices.set(Dev::Eni, 0, "");
        Ok(())
    }

    fn make_ifb(&mut self, dev: Dev) -> Result<(), NlError> {
        let name = shaper(&self.names.host);
        let pod = self.pod_side()?;
        let answers = pod.nl.all(vec![message::new_ifb(&name), message::get_link(&name, &[])])?;
        if let Some(there) = answers.last().and_then(|a| read::first_device(a)) {
            self.devices.set(dev, there.index, &name);
        }
        Ok(())
    }

    /// Those that a new device does not get with being set up.
    fn write_settings(&self, ops: &[Op], fresh: &BTreeSet<Dev>) -> Result<(), NlError> {
        let said_later = |op: &Op, dev: Dev| fresh.contains(&dev) && link_setting(op, dev).is_some();
        for side in [Side::Node, Side::Pod] {
            let wanted: Vec<_> = ops
                .iter()
                .filter_map(|op| match op {
                    Op::Put(Key::Setting(dev, _), _) if said_later(op, *dev) => None,
                    Op::Put(Key::Setting(dev, setting), Value::Setting(v)) if dev.side() == side => {
                        Some((setting.path(self.devices.name(*dev)), *v, *setting))
                    }
                    _ => None,
                })
                .collect();
            if wanted.is_empty() {
                continue;
            }
            let write = || wanted.iter().try_for_each(|(path, value, setting)| write_setting(path, *value, *setting));
            match (side, &self.pod) {
                (Side::Node, _) => write()?,
                (Side::Pod, Some(pod)) => {
                    pod.ns.within(self.home, write).map_err(|e| NlError::io("enter the pod's namespace", &e))??
                }
                (Side::Pod, None) => {}
            }
        }
        Ok(())
    }
}

/// What the step sets on this device, if rtnetlink can say it.
fn link_setting(op: &Op, of: Dev) -> Option<(super::objects::Setting, u32)> {
    match op {
        Op::Put(Key::Setting(dev, setting), Value::Setting(v))
            if *dev == of && message::is_link_setting(*setting, *v) =>
        {
            Some((*setting, *v))
        }
        _ => None,
    }
}

fn no_namespace() -> NlError {
    NlError { what: "namespace".to_owned(), errno: libc::ENOENT, cause: "it is gone".to_owned() }
}

fn write_setting(path: &str, value: u32, setting: super::objects::Setting) -> Result<(), NlError> {
    use super::objects::Setting;
    match sysctl::write_net(path, &value.to_string()) {
        Ok(()) => Ok(()),
        // A kernel without IPv6 accepts no advertisement either.
        Err(e)
            if e.kind() == std::io::ErrorKind::NotFound
                && matches!(setting, Setting::AcceptRa | Setting::AcceptDad | Setting::AddrGenMode) =>
        {
            Ok(())
        }
        Err(e) if setting == Setting::DisableIpv6 && e.kind() == std::io::ErrorKind::NotFound => Err(NlError {
            what: format!("sysctl {path}"),
            errno: libc::ENOENT,
            cause: "this kernel runs without IPv6; boot it with IPv6 or configure ip_stack ipv4".to_owned(),
        }),
        Err(e) => Err(NlError::io(format!("sysctl {path}={value}"), &e)),
    }
}

pub(super) fn link(device: &Device, kind: LinkKind) -> Link {
    Link { kind, mac: device.mac, mtu: Some(device.mtu), up: device.up }
}

pub(super) fn side(key: &Key, value: &Value) -> Side {
    match (key, value) {
        (Key::Route(side, ..), _) => *side,
        (Key::Rule(..), _) => Side::Node,
        (
            Key::Link(dev)
            | Key::Setting(dev, _)
            | Key::Address(dev, _)
            | Key::Neighbour(dev, _)
            | Key::Queue(dev)
            | Key::Redirect(dev),
            _,
        ) => dev.side(),
    }
}

fn settings(state: &State, side: Side) -> impl Iterator<Item = (Dev, super::objects::Setting, u32)> {
    state.iter().filter_map(move |(key, value)| match (key, value) {
        (Key::Setting(dev, setting), Value::Setting(v)) if dev.side() == side => Some((*dev, *setting, *v)),
        _ => None,
    })
}

fn failures(nl: &mut Nl, requests: Vec<Request>) -> Vec<NlError> {
    match nl.batch(requests) {
        Ok(answers) => answers.into_iter().filter_map(Result::err).collect(),
        Err(e) => vec![e],
    }
}
