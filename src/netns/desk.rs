//! What a wiring thread does with a request.
//!
//! Purpose: opens the pod's namespace, asks `plan` what is to be done, does it,
//! and undoes it when it fails. Owner: each wiring thread has a desk of its own
//! with its own rtnetlink socket; they share nothing but [`Shared`], whose locks
//! are held per attachment, never for the node.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::message::{self, Devices};
use super::names::{self, link_names};
use super::nl::{GONE, Nl, NlError};
use super::note;
use super::objects::{Dev, Key, LinkKind, State, Value, word};
use super::plan::{self, Facts, Op};
use super::programs::{Attachment, PodPrograms};
use super::read::{self, Device};
use super::site::{PodSide, Site};
use super::unlink::Unlinker;
use super::{Config, Finding, WireError, Wired};
use crate::model::{AttachMode, EniRef, Lease, Mac};
use crate::sys::netns::{Netns, NetnsError};

/// What the desks of one node share, and what outlives an actor's failure.
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) programs: Arc<dyn PodPrograms>,
    pub(super) locks: Locks,
    /// Where an ENI's device was last seen: a hint, checked at each use.
    pub(super) eni_index: Mutex<HashMap<Mac, u32>>,
}

/// One holder per name at a time, across all wiring threads, also those of an
/// embodiment of the actor that failed and whose last job is still running.
#[derive(Default)]
pub(super) struct Locks {
    held: Mutex<BTreeSet<String>>,
    freed: Condvar,
}

pub(super) struct Held<'a>(&'a Locks, String);

impl Locks {
    pub(super) fn hold(&self, name: String) -> Held<'_> {
        let mut held = self.held.lock();
        while held.contains(&name) {
            self.freed.wait(&mut held);
        }
        held.insert(name.clone());
        Held(self, name)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.lock().remove(&self.1);
        self.0.freed.notify_all();
    }
}

/// A wiring thread's tools.
pub(super) struct Desk {
    pub(super) nl: Nl,
    pub(super) home: Netns,
    pub(super) shared: Arc<Shared>,
    pub(super) unlinker: Unlinker,
}

impl Desk {
    pub(super) fn open(shared: Arc<Shared>, unlinker: Unlinker) -> std::io::Result<Self> {
        Ok(Self { nl: Nl::open()?, home: Netns::current()?, shared, unlinker })
    }

    pub(super) fn wire(&mut self, lease: &Lease) -> Result<Wired, WireError> {
        let shared = self.shared.clone();
        let _held = shared.locks.hold(lease.attachment.to_string());
        let pod = self.open_pod(lease)?;
        let known = (pod.nl.netns_cookie(), self.nl.netns_number(pod.ns.as_fd()));
        let names = link_names(&shared.config.link_prefix, &lease.attachment);
        let cause = |e: NlError| kernel(lease, &e);

        let (host, eni, facts) = self.facts(lease, &names.host).map_err(cause)?;
        let mut site = self.site(lease, Some(pod));
        let mtu = match (lease.mode, &eni) {
            (_, Some(eni)) => eni.mtu,
            (AttachMode::Veth, None) => return Err(WireError::DeviceMissing(lease.eni.id.clone())),
            // Perhaps it is in the pod already.
            (AttachMode::Exclusive, None) => 0,
        };
        let mut facts = facts;
        facts.mtu = shared.config.mtu.unwrap_or(mtu);
        match (lease.mode, &eni) {
            (AttachMode::Veth, Some(eni)) => site.devices.set(Dev::Eni, eni.index, &eni.name),
            (_, eni) => site.eni = eni.clone(),
        }

        // A pod that is wired for the first time has nothing of ours; that the
        // interface's name is free the kernel says itself.
        let first = host.is_none() && eni.is_some();
        let mut actual = State::new();
        if eni.is_none() {
            actual = site.read(host.as_ref(), &State::new(), &[]).map_err(cause)?;
            facts.mtu = shared.config.mtu.unwrap_or(known_mtu(&actual, lease)?);
        }
        let desired = plan::desired(&shared.config, lease, &facts);
        if !first {
            actual = site.read(host.as_ref(), &desired, &ips(lease)).map_err(cause)?;
        }
        let ops = plan::diff(&desired, &actual).map_err(|e| conflict(lease, e))?;
        let programs = shared.programs.clone();
        let mut ready = |devices: &Devices| programs.attach(&attachment(&shared.config, lease, devices, known));
        if let Err(errors) = site.apply(&ops, &mut ready) {
            drop(site);
            let mut causes: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.what, remedy(e))).collect();
            if errors.iter().any(|e| e.errno == libc::EEXIST && e.what.starts_with("create link")) {
                causes.push(format!("is there another {} in the pod?", lease.attachment.ifname));
            }
            let undone = self.undo(lease, false).and_then(|undone| self.remove_pair(lease, undone));
            if let Err(e) = undone {
                causes.push(format!("and undoing it failed: {e}"));
            }
            let gone = matches!(Netns::open(&lease.netns), Err(NetnsError::Gone(_)));
            return Err(if gone {
                WireError::NamespaceGone(lease.netns.clone())
            } else {
                fault(lease, "wire", causes)
            });
        }
        Ok(Wired {
            host_ifname: Some(names.host),
            host_mac: Some(names.host_mac),
            pod_mac: match lease.mode {
                AttachMode::Veth => names.pod_mac,
                AttachMode::Exclusive => lease.eni.mac,
            },
            mtu: facts.mtu,
        })
    }

    /// Give a returned ENI its name at home, with nothing left on it and down.
    /// False when it is not here.
    pub(super) fn normalise(&mut self, mac: Mac) -> Result<bool, NlError> {
        let Some(eni) = self.find_eni(mac)? else { return Ok(false) };
        let home = names::eni_home_name(mac);
        if eni.name != home || eni.up {
            self.nl.all(message::rename_down(&eni.name, eni.index, &home).into())?;
        }
        let mut devices = Devices::default();
        devices.set(Dev::Eni, eni.index, &home);
        let mut stale = Vec::new();
        for a in read::addresses(&mut self.nl, eni.index)?.into_iter().filter(|a| a.global) {
            message::delete(&Key::Address(Dev::Eni, a.net), &Value::Address, &devices, &mut stale);
        }
        self.nl.all(stale)?;
        Ok(true)
    }

    pub(super) fn verify(&mut self, lease: &Lease) -> Result<Vec<Finding>, WireError> {
        let shared = self.shared.clone();
        let _held = shared.locks.hold(lease.attachment.to_string());
        let cause = |e: NlError| kernel(lease, &e);
        let pod = match self.open_pod(lease) {
            Ok(pod) => pod,
            Err(WireError::NamespaceGone(path)) => {
                let detail = format!("{} is gone", path.display());
                return Ok(vec![Finding { what: "namespace".to_owned(), detail }]);
            }
            Err(e) => return Err(e),
        };
        let names = link_names(&shared.config.link_prefix, &lease.attachment);
        let (host, eni, mut facts) = self.facts(lease, &names.host).map_err(cause)?;
        let mut site = self.site(lease, Some(pod));
        if let (AttachMode::Veth, Some(eni)) = (lease.mode, &eni) {
            site.devices.set(Dev::Eni, eni.index, &eni.name);
        }
        let there = site.read(host.as_ref(), &State::new(), &[]).map_err(cause)?;
        let there_mtu = match there.get(&Key::Link(Dev::Pod)) {
            Some(Value::Link(l)) => l.mtu,
            _ => None,
        };
        let own = eni.as_ref().filter(|_| lease.mode == AttachMode::Veth).map(|e| e.mtu);
        facts.mtu = shared.config.mtu.or(own).or(there_mtu).unwrap_or(1500);
        let desired = plan::desired(&shared.config, lease, &facts);
        let actual = site.read(host.as_ref(), &desired, &ips(lease)).map_err(cause)?;
        let mut findings = Vec::new();
        if lease.mode == AttachMode::Veth && eni.is_none() {
            let detail = format!("the device of {} is not on this node", lease.eni.id);
            findings.push(Finding { what: "link".to_owned(), detail });
        }
        let ops = match plan::diff(&desired, &actual) {
            Ok(ops) => ops,
            Err(e) => {
                findings.push(Finding { what: "link".to_owned(), detail: e.to_string() });
                Vec::new()
            }
        };
        let devices = &site.devices;
        findings.extend(ops.iter().map(|op| {
            let (key, detail) = match op {
                Op::Put(key, value) if actual.contains_key(key) => {
                    (key, format!("{} is not as it should be", message::describe(key, value, devices)))
                }
                Op::Put(key, value) => (key, format!("{} is missing", message::describe(key, value, devices))),
                Op::Delete(key, value) => (key, format!("{} is left over", message::describe(key, value, devices))),
            };
            Finding { what: word(key).to_owned(), detail }
        }));
        let problems = shared
            .programs
            .verify(&attachment(&shared.config, lease, devices, (None, None)))
            .map_err(|e| fault(lease, "program", vec![e]))?;
        findings.extend(problems.into_iter().map(|detail| Finding { what: "program".to_owned(), detail }));
        Ok(findings)
    }

    pub(super) fn site<'a>(&'a mut self, lease: &Lease, pod: Option<PodSide>) -> Site<'a> {
        let names = link_names(&self.shared.config.link_prefix, &lease.attachment);
        let exclusive = lease.mode == AttachMode::Exclusive;
        let mut devices = Devices::default();
        devices.set(Dev::HostLink, 0, &names.host);
        devices.set(Dev::Pod, 0, &lease.attachment.ifname);
        devices.set(Dev::NodeLink, 0, &names.host);
        devices.set(Dev::Shaper, 0, &names::shaper(&names.host));
        // Index 1 in every namespace.
        devices.set(Dev::Loopback, 1, "lo");
        Site {
            host: &mut self.nl,
            home: &self.home,
            pod,
            names,
            note: note::write(lease),
            ifname: lease.attachment.ifname.clone(),
            peer: if exclusive { Dev::NodeLink } else { Dev::Pod },
            eni_mac: exclusive.then_some(lease.eni.mac),
            eni: None,
            devices,
        }
    }

    /// The pod's namespace, validated, with a socket in it.
    pub(super) fn open_pod(&self, lease: &Lease) -> Result<PodSide, WireError> {
        let attachment = || lease.attachment.clone();
        let wrong = |cause: String| WireError::Kernel { attachment: attachment(), step: "namespace".to_owned(), cause };
        if !names::valid_ifname(&lease.attachment.ifname) || lease.attachment.ifname == "lo" {
            return Err(wrong(format!("{:?} cannot name a pod's interface", lease.attachment.ifname)));
        }
        let ns = Netns::open(&lease.netns).map_err(|e| match e {
            NetnsError::Gone(path) => WireError::NamespaceGone(path),
            e => wrong(e.to_string()),
        })?;
        if ns.id() == self.home.id() {
            return Err(wrong(format!("{} is the node's own namespace", lease.netns.display())));
        }
        let nl = ns.within(&self.home, Nl::open).and_then(|r| r).map_err(|e| wrong(e.to_string()))?;
        Ok(PodSide { ns, nl })
    }

    /// One system call for what the plan wants to know: the host link, the ENI's
    /// device, and the node's own addresses.
    fn facts(&mut self, lease: &Lease, host: &str) -> Result<(Option<Device>, Option<Device>, Facts), NlError> {
        let mac = lease.eni.mac;
        let hint = self.shared.eni_index.lock().get(&mac).copied();
        let subnet = &lease.eni.subnet;
        let mut ask = vec![
            message::get_link(host, GONE),
            // Index 1 is the loopback: never an ENI, always there.
            message::get_link_by_index(hint.unwrap_or(1), GONE),
            message::route_lookup(subnet.gateway4.into()),
        ];
        if let (Some(_), Some(net)) = (lease.v6, subnet.cidr6) {
            let beyond = std::net::Ipv6Addr::from(u128::from(net.network()) | 1);
            ask.push(message::route_lookup(beyond.into()));
        }
        let answers = self.nl.all(ask)?;
        let link = answers.first().and_then(|a| read::first_device(a));
        let mut eni = answers.get(1).and_then(|a| read::first_device(a)).filter(|d| d.mac == Some(mac));
        if eni.is_none() {
            eni = self.find_eni(mac)?;
        }
        let source = |at: usize| answers.get(at).and_then(|a| read::first_path(a)).and_then(|p| p.source);
        let mut facts = Facts::default();
        if let Some(IpAddr::V4(ip)) = source(2) {
            facts.node4 = Some(ip);
        }
        if let Some(IpAddr::V6(ip)) = source(3) {
            facts.node6 = Some(ip);
        }
        if lease.mode == AttachMode::Exclusive {
            facts.node_addresses = self.node_addresses()?;
        }
        Ok((link, eni, facts))
    }

    /// The global addresses of the devices that carry the node's default routes.
    fn node_addresses(&mut self) -> Result<Vec<IpAddr>, NlError> {
        let mut devices: BTreeSet<u32> = BTreeSet::new();
        for p in read::routes(&mut self.nl, super::objects::MAIN, None)? {
            if p.to.prefix_len() == 0 && p.index != 0 {
                devices.insert(p.index);
            }
        }
        let mut found = Vec::new();
        for index in devices {
            let addresses = read::addresses(&mut self.nl, index)?;
            found.extend(addresses.into_iter().filter(|a| a.global && a.permanent).map(|a| a.net.addr()));
        }
        Ok(found)
    }

    /// The device with an ENI's hardware address in the node's namespace.
    pub(super) fn find_eni(&mut self, mac: Mac) -> Result<Option<Device>, NlError> {
        let prefix = &self.shared.config.link_prefix;
        let found = read::devices(&mut self.nl)?
            .into_iter()
            .find(|d| d.mac == Some(mac) && read::may_be_eni(d) && !names::is_host_link(prefix, &d.name));
        let mut hints = self.shared.eni_index.lock();
        match &found {
            Some(d) => hints.insert(mac, d.index),
            None => hints.remove(&mac),
        };
        drop(hints);
        Ok(found)
    }
}

pub(super) fn ips(lease: &Lease) -> Vec<IpAddr> {
    std::iter::once(IpAddr::V4(lease.v4)).chain(lease.v6.map(IpAddr::V6)).collect()
}

/// The MTU of an exclusive ENI that is in the pod already.
fn known_mtu(actual: &State, lease: &Lease) -> Result<u32, WireError> {
    let mtu = |dev| match actual.get(&Key::Link(dev)) {
        Some(Value::Link(l)) if l.kind == LinkKind::MovedEni => l.mtu,
        _ => None,
    };
    mtu(Dev::Pod).or_else(|| mtu(Dev::Stray)).ok_or_else(|| WireError::DeviceMissing(lease.eni.id.clone()))
}

fn attachment<'a>(
    config: &Config,
    lease: &'a Lease,
    devices: &'a Devices,
    (netns_cookie, netns_number): (Option<u64>, Option<i32>),
) -> Attachment<'a> {
    let index = |dev| Some(devices.index(dev)).filter(|i| *i != 0);
    Attachment {
        lease,
        host_ifname: devices.name(Dev::HostLink),
        host_ifindex: devices.index(Dev::HostLink),
        eni_ifindex: index(Dev::Eni).filter(|_| lease.mode == AttachMode::Exclusive),
        node_link: index(Dev::NodeLink).map(|i| (i, config.gateway4, config.gateway6)),
        shared_eni: index(Dev::Eni).filter(|_| lease.mode == AttachMode::Veth),
        netns_cookie,
        netns_number,
    }
}

pub(super) fn kernel(lease: &Lease, e: &NlError) -> WireError {
    WireError::Kernel { attachment: lease.attachment.clone(), step: e.what.clone(), cause: remedy(e) }
}

pub(super) fn fault(lease: &Lease, step: &str, causes: Vec<String>) -> WireError {
    WireError::Kernel { attachment: lease.attachment.clone(), step: step.to_owned(), cause: causes.join("; ") }
}

fn conflict(lease: &Lease, e: plan::Conflict) -> WireError {
    let cause = format!("{e}: something else has made {} in this pod", lease.attachment.ifname);
    WireError::Kernel { attachment: lease.attachment.clone(), step: "link".to_owned(), cause }
}

/// The cause with what an operator can do about it, where that is known.
pub(super) fn remedy(e: &NlError) -> String {
    let what = if e.what.contains("tbf") && e.errno == libc::ENOENT {
        Some("this kernel has no token bucket filter: load the module sch_tbf")
    } else if e.what.contains("ifb") && e.errno == libc::EOPNOTSUPP {
        Some("this kernel has no ifb device: load the module ifb")
    } else if e.errno == libc::EPERM {
        Some("the agent needs CAP_NET_ADMIN and CAP_SYS_ADMIN")
    } else {
        None
    };
    what.map_or_else(|| e.cause.clone(), |what| format!("{}; {what}", e.cause))
}

/// The ENI as its own pseudo-attachment, for errors about it.
pub(super) fn eni_fault(eni: &EniRef, step: &str, cause: String) -> WireError {
    let attachment = crate::model::AttachmentId { sandbox: eni.id.0.clone().into(), ifname: "eni".to_owned() };
    WireError::Kernel { attachment, step: step.to_owned(), cause }
}
