//! Datapath: loads the eBPF programs, attaches them to pods' devices, pins what
//! must outlive the process, and takes it up again after a restart.
//!
//! The only module that knows bpffs paths. Owner: one thread (an actor's
//! `Worker`); every call blocks for some system calls and none waits for anyone.
//!
//! Invariants:
//! - What is attached goes on working when this process dies at any instruction;
//!   the next [`Datapath::open`] finds it by its pins, takes it over without a
//!   gap, and removes what is half made or whose device is gone.
//! - A pinned map is used only if its type and sizes are those of this build.
//! - The pins are the memory: nothing here is known that they do not say.

mod ahead;
mod clsact;
mod entry;
mod error;
pub mod flows;
mod hook;
pub(crate) mod pins;
pub mod policies;
mod programs;
pub mod samples;
mod seen;
pub mod services;
mod sockets;
mod takeover;
pub mod upgrade;
mod uplink;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{MapError, PerCpuValues};
pub use fairway_ebpf_abi::Counters;
use fairway_ebpf_abi::{Endpoint, IN_POD, MAX_ENDPOINTS, PROFILE_OPEN};
use serde::Serialize;

use self::ahead::Ahead;
pub use self::ahead::{Load, Loaded};
use self::entry::Entry;
pub use self::error::DatapathError;
pub use self::hook::Device;
use self::hook::{Direction, Place, chain, has_tcx};
use self::pins::{PinName, Pins, pin_of};
use self::programs::{CounterMap, EventMap, Loader, Programs};
pub use self::sockets::cgroup_root;
use self::takeover::Held;
use self::upgrade::{Awaits, Layout, Upgrade};
pub use self::uplink::Uplink;
use self::ways::Ways;
pub use self::ways::{NodeLink, Way};
use crate::model::{AttachMode, AttachmentId};
use crate::policy::tables::Enforced;
use crate::sys::bpf;

/// The node's eBPF programs and maps.
pub struct Datapath {
    pins: Pins,
    /// Serve every device in the node's namespace.
    shared: Programs,
    counters: CounterMap,
    ways: Ways,
    events: EventMap,
    known: BTreeMap<AttachmentId, Entry>,
    /// Adopted, and still running what an earlier process loaded: a clsact device
    /// inside a pod is out of reach until the next `attach`.
    dated: BTreeSet<AttachmentId>,
    enis: uplink::Enis,
    loader: Loader,
    ahead: Ahead,
    options: Options,
    layout: Layout,
    /// While an earlier layout's programs are in force.
    held: Option<Held>,
}

/// How programs are attached. Attaching by tcx waits for an RCU grace period with
/// the kernel's network lock held, some 10 ms a program, and so does the device's
/// end; a clsact filter takes a tenth of a millisecond. So tcx is for devices that
/// move into a pod, which only it survives (docs/decisions/0004).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// A link of the kernel's own (6.6 and later); moves with the device.
    Tcx,
    /// A filter of the device's clsact qdisc; lost when the device moves.
    Clsact,
}

/// What [`Datapath::open`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Adoption {
    /// Taken over: they now run this build's programs.
    pub adopted: Vec<AttachmentId>,
    /// Pin directories removed: half made, unreadable, or the device is gone.
    pub collected: Vec<String>,
    /// Maps that were not of this build's layout, and why; replaced by empty ones.
    pub rotated: Vec<String>,
    /// What has to be written before [`Datapath::take_over`]: until then the
    /// earlier programs stay in force, with their own maps.
    pub awaits: Awaits,
}

/// One attachment, as the kernel describes it now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Attached {
    pub attachment: AttachmentId,
    pub mode: AttachMode,
    pub via: Via,
    /// Index of the device in its own namespace. `None` when it is gone, or is a
    /// clsact device inside a pod, which cannot be seen from here.
    pub ifindex: Option<u32>,
    /// Kernel ids of the egress and ingress programs.
    pub programs: [u32; 2],
    /// Its packets may pass by the node's stack.
    pub short: bool,
}

/// Which kernel interface to use where. A kernel without tcx uses clsact for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub host_side: Via,
    pub in_pod: Via,
}

impl Default for Options {
    fn default() -> Self {
        Self { host_side: Via::Clsact, in_pod: Via::Tcx }
    }
}

impl Datapath {
    /// Loads the programs over what is pinned below `bpffs` and takes it over.
    pub fn open(bpffs: &Path) -> Result<(Self, Adoption), DatapathError> {
        Self::open_with(bpffs, Options::default())
    }

    pub fn open_with(bpffs: &Path, options: Options) -> Result<(Self, Adoption), DatapathError> {
        Self::open_as(bpffs, options, Layout::CURRENT)
    }

    /// As if the maps had this layout.
    pub fn open_as(bpffs: &Path, options: Options, layout: Layout) -> Result<(Self, Adoption), DatapathError> {
        // Before 5.11 maps count against the locked-memory limit.
        let infinity = nix::sys::resource::RLIM_INFINITY;
        let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK, infinity, infinity);

        let at = |cause| DatapathError::Pins { path: bpffs.to_owned(), cause };
        let pins =
            Pins::open(bpffs, layout.version).map_err(at)?.ok_or_else(|| DatapathError::NotBpffs(bpffs.to_owned()))?;
        let rotated = programs::rotate_foreign_maps(&pins).map_err(at)?;
        let replaced: Vec<_> = rotated.iter().map(|(name, _)| *name).collect();
        let upgrade = Upgrade::begin(&pins, &layout, &replaced).map_err(at)?;
        let mut loader = Loader::new(&pins);
        let mut shared = loader.load(0)?;
        programs::check_loaded_maps(&pins)?;
        upgrade.keep_marks(&pins).map_err(at)?;
        upgrade.convert(&pins, &layout, false).map_err(at)?;
        let counters = shared.take_counters()?;
        let ways = Ways::open(&mut shared, upgrade.forgets_pods())?;
        let events = shared.take_events()?;
        let enis = uplink::Enis::open(&mut shared)?;
        let options = if has_tcx() { options } else { Options { host_side: Via::Clsact, in_pod: Via::Clsact } };
        let (known, dated) = (BTreeMap::new(), BTreeSet::new());
        let awaits = upgrade.awaits();
        let held = Some(Held::new(upgrade));
        let ahead = Ahead::default();
        let mut datapath =
            Self { pins, shared, counters, ways, events, known, dated, enis, loader, ahead, options, layout, held };
        let rotated = rotated.into_iter().map(|(_, why)| why).collect();
        let mut adoption = Adoption { rotated, awaits, ..Default::default() };
        for dir in datapath.pins.pods().map_err(at)? {
            match datapath.adopt(&dir) {
                Some(attachment) => adoption.adopted.push(attachment),
                None => {
                    datapath.collect(&dir).map_err(at)?;
                    adoption.collected.push(dir.file_name().unwrap_or_default().to_string_lossy().into_owned());
                }
            }
        }
        datapath.drop_orphans()?;
        // Nothing to be held up by: there were no earlier programs, or all that
        // they know is known to this build's too.
        if !awaits.any() || datapath.known.is_empty() && !datapath.has_sockets() {
            adoption.awaits = Awaits::default();
            adoption.collected.extend(datapath.take_over()?);
            adoption.adopted.retain(|attachment| datapath.known.contains_key(attachment));
        }
        Ok((datapath, adoption))
    }

    /// Whether attached programs stay on a device that moves to another
    /// namespace. If so, attach to an exclusive ENI before it moves: then there
    /// is no moment without them. If not, attach inside, before the link is up.
    pub fn moves_with_device(&self) -> bool {
        self.options.in_pod == Via::Tcx
    }

    /// Attaches both programs to a pod's device: the host side of its veth pair,
    /// or its exclusive ENI, wherever that is now. Done again for the same device
    /// it changes nothing; for another one the attachment moves there.
    pub fn attach(
        &mut self,
        attachment: &AttachmentId,
        mode: AttachMode,
        device: Device<'_>,
    ) -> Result<(), DatapathError> {
        let place = Place::from(mode);
        let fail = |cause| DatapathError::Attach { attachment: attachment.clone(), device: device.to_string(), cause };
        if let Some(entry) = self.known.get(attachment)
            && entry.place == place
            && entry.is_on(device).map_err(fail)?
        {
            if self.dated.contains(attachment) && self.held.is_none() {
                self.renew(attachment, device)?.map_err(fail)?;
                self.dated.remove(attachment);
            }
            return Ok(());
        }
        self.detach(attachment)?;
        let mut loaded = None;
        let endpoint = match place {
            Place::HostSide => device.enter(Ok).map_err(fail)?,
            Place::InPod => {
                loaded = self.ahead.take();
                loaded.as_ref().map_or_else(|| self.free_number(), |loaded| Ok(loaded.endpoint()))?
            }
        };
        // A device has one attachment: an earlier one with this index is stale.
        if let Some(stale) = self.known.iter().find(|(_, e)| e.endpoint == endpoint).map(|(a, _)| a.clone()) {
            self.detach(&stale)?;
        }
        let name = PinName { attachment: attachment.clone(), place, endpoint };
        let name = name.encode().ok_or_else(|| DatapathError::NameTooLong { attachment: attachment.clone() })?;
        let dir = self.pins.pod(&name);
        self.reset_counters(endpoint)?;
        let entry = Entry { place, endpoint, dir };
        if let Err(cause) = self.attach_and_pin(&entry, device, loaded)? {
            // Undo as far as it goes; the next start collects the rest.
            let _ = entry.discard();
            let _ = self.counters.remove(&endpoint);
            return Err(fail(cause));
        }
        self.known.insert(attachment.clone(), entry);
        Ok(())
    }

    pub fn is_attached(&self, attachment: &AttachmentId) -> bool {
        self.known.contains_key(attachment)
    }

    /// Begins to load programs for a device inside a pod, which have a number of
    /// their own: that takes the kernel a tenth of a second or more, which nobody
    /// else has to wait for ([`Load::run`], then [`Datapath::loaded`]).
    pub fn load(&mut self) -> Result<Load, DatapathError> {
        let endpoint = self.free_number()?;
        Ok(self.ahead.begin(endpoint, &self.pins))
    }

    /// The next [`Datapath::attach`] inside a pod takes them.
    pub fn loaded(&mut self, loaded: Loaded) {
        self.ahead.put(loaded);
    }

    /// Takes the programs off and forgets the attachment. Success when there is
    /// nothing to take off. A clsact filter inside a pod goes with its device.
    pub fn detach(&mut self, attachment: &AttachmentId) -> Result<(), DatapathError> {
        let Some(entry) = self.known.get(attachment) else { return Ok(()) };
        self.ways.forget(entry.endpoint)?;
        entry.discard().map_err(|cause| DatapathError::Pins { path: entry.dir.clone(), cause })?;
        let _ = self.counters.remove(&entry.endpoint);
        self.known.remove(attachment);
        self.dated.remove(attachment);
        if let Some(held) = &mut self.held {
            held.earlier.remove(attachment);
        }
        Ok(())
    }

    /// What still runs an earlier process's programs; [`Datapath::attach`] with
    /// its device swaps this build's in. Empty where tcx links are inside pods.
    pub fn dated(&self) -> impl Iterator<Item = &AttachmentId> {
        self.dated.iter()
    }

    /// Tells the programs who the pod is. They are attached already.
    pub fn lead(&mut self, attachment: &AttachmentId, way: &Way) -> Result<(), DatapathError> {
        match self.known.get(attachment) {
            Some(entry) => self.ways.set(entry.endpoint, way, entry.place == Place::InPod),
            None => Ok(()),
        }
    }

    /// Makes the node's own addresses these: what is sent to them goes through
    /// the node's stack.
    pub fn set_node_addresses(&mut self, addresses: &[std::net::IpAddr]) -> Result<(), DatapathError> {
        self.ways.set_node(addresses)
    }

    /// Resolves Services where processes connect: programs on the root of the
    /// cgroup tree ([`cgroup_root`]).
    pub fn attach_sockets(&mut self, root: &Path) -> Result<(), DatapathError> {
        let own = std::net::UdpSocket::bind("127.0.0.1:0").and_then(|s| crate::sys::netns::cookie_of(s.as_fd()));
        if let Ok(Some(cookie)) = own {
            self.ways.set_node_namespace(cookie)?;
        }
        if let Some(held) = &mut self.held {
            held.sockets = Some(root.to_owned());
            return Ok(());
        }
        sockets::attach(&self.pins, &mut self.shared, root)
    }

    /// The other way round. Success when they are not there.
    pub fn detach_sockets(&mut self) -> Result<(), DatapathError> {
        sockets::detach(&self.pins)
    }

    /// Keeps pods from passing by programs inside them: one more program on the root of
    /// the cgroup tree.
    pub fn attach_guard(&mut self, root: &Path) -> Result<(), DatapathError> {
        if let Some(held) = &mut self.held {
            held.guard = Some(root.to_owned());
            return Ok(());
        }
        sockets::attach_guard(&self.pins, &mut self.shared, root)
    }

    /// Some of those that were drops or refusals, in full, for their one reader.
    pub fn samples(&self) -> Result<samples::Samples, DatapathError> {
        samples::Samples::open(&self.pins)
    }

    /// The maps behind Services, for their owner.
    pub fn service_maps(&self) -> Result<services::KernelMaps, DatapathError> {
        services::KernelMaps::open(&self.pins)
    }

    /// The tables that policies compile to, for their owner.
    pub fn policy_maps(&self) -> Result<policies::KernelPolicies, DatapathError> {
        policies::KernelPolicies::open(&self.pins)
    }

    /// The number of a pod's device.
    pub fn endpoint(&self, attachment: &AttachmentId) -> Option<Endpoint> {
        self.known.get(attachment).map(|entry| entry.endpoint)
    }

    /// How policies isolate the pod, from now on; its number, if it is attached.
    pub fn isolate(&mut self, attachment: &AttachmentId, how: Enforced) -> Result<Option<Endpoint>, DatapathError> {
        let Some(entry) = self.known.get(attachment) else { return Ok(None) };
        let profile = |of: Option<u64>| of.unwrap_or(PROFILE_OPEN);
        let there = self.ways.isolate(entry.endpoint, profile(how.ingress), profile(how.egress))?;
        Ok(there.then_some(entry.endpoint))
    }

    /// Every pod, and how it is isolated.
    pub fn isolated(&self) -> Result<Vec<(AttachmentId, Endpoint, Enforced)>, DatapathError> {
        let one = |(attachment, entry): (&AttachmentId, &Entry)| {
            let profile = |of: u64| (of != PROFILE_OPEN).then_some(of);
            let found = self.ways.isolation(entry.endpoint)?;
            Ok(found.map(|(ingress, egress)| {
                let how = Enforced { ingress: profile(ingress), egress: profile(egress) };
                (attachment.clone(), entry.endpoint, how)
            }))
        };
        self.known.iter().filter_map(|entry| one(entry).transpose()).collect()
    }

    /// What the programs fill themselves, for whoever keeps it in order.
    pub fn flow_tables(&self) -> Result<flows::KernelFlows, DatapathError> {
        flows::KernelFlows::open(&self.pins)
    }

    /// The programs of the socket path that are in force, read from the kernel.
    pub fn socket_doors(&self) -> Vec<&'static str> {
        sockets::attached(&self.pins)
    }

    /// Detaches what `live` does not want; what was detached comes back.
    pub fn retain(&mut self, live: impl Fn(&AttachmentId) -> bool) -> Result<Vec<AttachmentId>, DatapathError> {
        let gone: Vec<_> = self.known.keys().filter(|a| !live(a)).cloned().collect();
        for attachment in &gone {
            self.detach(attachment)?;
        }
        Ok(gone)
    }

    /// The inner error is the device's, the outer one ours.
    fn attach_and_pin(
        &mut self,
        entry: &Entry,
        device: Device<'_>,
        loaded: Option<Loaded>,
    ) -> Result<io::Result<()>, DatapathError> {
        let mut own;
        let programs = match entry.place {
            Place::HostSide => &mut self.shared,
            Place::InPod => {
                own = loaded.map_or_else(|| self.loader.load(entry.endpoint), |loaded| Ok(loaded.programs()))?;
                &mut own
            }
        };
        if let Err(e) = fs::create_dir(&entry.dir) {
            return Ok(Err(e));
        }
        let via = match entry.place {
            Place::HostSide => self.options.host_side,
            Place::InPod => self.options.in_pod,
        };
        if via == Via::Tcx {
            for direction in Direction::BOTH {
                let (chain, pin) = (chain(entry.place, direction), pin_of(&entry.dir, direction));
                let program = programs.get(direction)?;
                let link = device.enter(|ifindex| hook::attach_tcx(program, ifindex, chain));
                if let Err(e) = link.and_then(|link| bpf::pin(link.as_fd(), &pin)) {
                    return Ok(Err(e));
                }
            }
            return Ok(Ok(()));
        }
        let pair = programs.pair(entry.place)?;
        // Pinned first: a filter without a pin would not be found again.
        for (direction, (fd, _)) in Direction::BOTH.into_iter().zip(&pair) {
            if let Err(e) = bpf::pin(*fd, &pin_of(&entry.dir, direction)) {
                return Ok(Err(e));
            }
        }
        Ok(device.enter(|ifindex| clsact::attach(&pair, ifindex)))
    }

    /// Takes over one pin directory. `None` when there is nothing alive in it;
    /// the caller removes it then.
    fn adopt(&mut self, dir: &Path) -> Option<AttachmentId> {
        let name = PinName::decode(dir.file_name()?.to_str()?)?;
        if self.known.contains_key(&name.attachment) || self.known.values().any(|e| e.endpoint == name.endpoint) {
            return None;
        }
        let mut entry = Entry { place: name.place, endpoint: name.endpoint, dir: dir.to_owned() };
        let attached = entry.describe(&name.attachment).ok().filter(|_| entry.is_alive())?;
        let home = self.pins.pod(&name.encode()?);
        if home != entry.dir {
            fs::rename(&entry.dir, &home).ok()?;
            entry.dir = home;
        }
        if matches!(self.counters.get(&entry.endpoint, 0), Err(MapError::KeyNotFound)) {
            self.reset_counters(entry.endpoint).ok()?;
        }
        if (attached.via, entry.place) == (Via::Clsact, Place::InPod) {
            self.dated.insert(name.attachment.clone());
        }
        self.known.insert(name.attachment.clone(), entry);
        if let Some(held) = &mut self.held {
            held.earlier.insert(name.attachment.clone());
        }
        Some(name.attachment)
    }

    /// Removes a pin directory that was not adopted.
    fn collect(&self, dir: &Path) -> io::Result<()> {
        let entry = Entry::unknown(dir);
        if self.known.values().any(|e| e.endpoint == entry.endpoint) {
            // What is on that device is an adopted attachment's.
            return pins::remove(dir);
        }
        entry.discard()
    }

    /// Swaps this build's programs in on a clsact device inside a pod. A crash
    /// between pin and filter shows as "not on it", and all is attached anew.
    fn renew(&mut self, attachment: &AttachmentId, device: Device<'_>) -> Result<io::Result<()>, DatapathError> {
        let Some(entry) = self.known.get(attachment) else { return Ok(Ok(())) };
        let programs = self.loader.load(entry.endpoint)?;
        let pair = programs.pair(entry.place)?;
        for (direction, (fd, _)) in Direction::BOTH.into_iter().zip(&pair) {
            if let Err(e) = pins::replace(*fd, &pin_of(&entry.dir, direction)) {
                return Ok(Err(e));
            }
        }
        Ok(device.enter(|ifindex| clsact::attach(&pair, ifindex)))
    }

    fn free_number(&self) -> Result<Endpoint, DatapathError> {
        let taken = |n: &Endpoint| self.known.values().any(|e| e.endpoint == *n) || self.ahead.has(*n);
        (IN_POD..IN_POD + MAX_ENDPOINTS).find(|n| !taken(n)).ok_or(DatapathError::Full)
    }

    fn reset_counters(&mut self, endpoint: Endpoint) -> Result<(), DatapathError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| DatapathError::Counters(e.into()))?;
        let zero =
            PerCpuValues::try_from(vec![Counters::default(); cpus]).map_err(|e| DatapathError::Counters(e.into()))?;
        self.counters.insert(endpoint, zero, 0).map_err(DatapathError::Counters)
    }

    /// Entries that a crash left behind, between a device's end and ours.
    fn drop_orphans(&mut self) -> Result<(), DatapathError> {
        let keys = self.counters.keys().collect::<Result<Vec<_>, _>>().map_err(DatapathError::Counters)?;
        for key in keys {
            if !self.known.values().any(|e| e.endpoint == key) {
                let _ = self.counters.remove(&key);
            }
        }
        let known = &self.known;
        self.ways.retain(|endpoint| known.values().any(|e| e.endpoint == endpoint))
    }
}
