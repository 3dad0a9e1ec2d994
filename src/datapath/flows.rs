//! The kernel's side of [`FlowTables`]: flows, counts of events, how full maps
//! are, and the sockets that Services were resolved for.
//!
//! Owner: ServiceMap's second worker, in the node's own namespace. Holds
//! descriptors of its own, so that no look through a large table keeps the lock
//! of `Datapath`.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use fairway_ebpf_abi::{
    Addr, BACKENDS, Backend, EVENT_COUNT, EVENTS, FLOWS, Flow, FlowKey, MAX_FLOWS, Original, SOCKETS, Sample, SocketKey,
};

use super::DatapathError;
use super::pins::Pins;
use super::programs::{self, Counted};
use super::samples::Samples;
use crate::service::maps::Gone;
use crate::service::tend::{EndedSockets, FlowTables, Use};
use crate::sys::bpf::{self, Batch, Cursor};
use crate::sys::clock::monotonic_ns;
use crate::sys::diag::Diag;

/// What the programs fill, as it is pinned.
pub struct KernelFlows {
    flows: OwnedFd,
    backends: OwnedFd,
    events: OwnedFd,
    sockets: OwnedFd,
    counted: Vec<(Counted, OwnedFd)>,
    cpus: usize,
    samples: Samples,
    at: Cursor,
}

impl KernelFlows {
    /// The maps have been compared with what this build takes them for.
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let open = |name: &str| {
            let path = pins.map(name);
            bpf::open_pinned(&path).map_err(|cause| DatapathError::Pins { path, cause })
        };
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| DatapathError::Counters(e.into()))?;
        Ok(Self {
            flows: open(FLOWS)?,
            backends: open(BACKENDS)?,
            events: open(EVENTS)?,
            sockets: open(SOCKETS)?,
            counted: programs::counted(cpus)
                .map(|counted| open(counted.name).map(|map| (counted, map)))
                .collect::<Result<_, _>>()?,
            cpus,
            samples: Samples::open(pins)?,
            at: Cursor::default(),
        })
    }

    fn flows(&self) -> Batch<'_, FlowKey, Flow> {
        Batch::of(self.flows.as_fd())
    }

    fn end(
        &self,
        gone: &BTreeSet<u32>,
        addresses: &BTreeSet<(Addr, u16)>,
    ) -> io::Result<(u64, u64, Option<io::Error>)> {
        let mut diag = Diag::open()?;
        let sockets = Batch::<SocketKey, Original>::of(self.sockets.as_fd());
        let (mut ended, mut failed, mut why) = (0, 0, None);
        for socket in &diag.connected_udp()? {
            let (addr, port) = (Addr::from_octets6(socket.peer()), socket.peer_port());
            if !addresses.contains(&(addr, port)) {
                continue;
            }
            // Who has connected to the address itself meant it.
            let key = SocketKey { cookie: socket.cookie(), addr, port, _pad: [0; 3] };
            if !sockets.get(&key)?.is_some_and(|original| gone.contains(&original.backend)) {
                continue;
            }
            match diag.destroy_udp(socket) {
                Ok(()) => ended += 1,
                // Closed meanwhile, or connected to somebody else.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => {}
                Err(e) => (failed, why) = (failed + 1, Some(e)),
            }
        }
        Ok((ended, failed, why))
    }
}

impl FlowTables for KernelFlows {
    fn look(&mut self, room: usize, found: &mut Vec<(FlowKey, Flow)>) -> io::Result<bool> {
        let mut at = self.at.clone();
        let ended = self.flows().read_some(&mut at, room, found)?;
        self.at = at;
        Ok(ended)
    }

    fn flow(&mut self, key: &FlowKey) -> io::Result<Option<Flow>> {
        self.flows().get(key)
    }

    fn backend_lives(&mut self, id: u32) -> io::Result<bool> {
        Batch::<u32, Backend>::of(self.backends.as_fd()).get(&id).map(|found| found.is_some())
    }

    fn forget(&mut self, keys: &[FlowKey]) -> io::Result<()> {
        self.flows().delete(keys).map_err(|(_, e)| e)
    }

    fn now(&self) -> u64 {
        monotonic_ns()
    }

    fn capacity(&self) -> usize {
        MAX_FLOWS as usize
    }

    fn events(&mut self) -> io::Result<Vec<u64>> {
        let one = |which| bpf::sum_per_cpu(self.events.as_fd(), which, self.cpus);
        (0..EVENT_COUNT).map(one).collect()
    }

    fn samples(&mut self, most: usize) -> Vec<Sample> {
        std::iter::from_fn(|| self.samples.take()).take(most).collect()
    }

    fn uses(&mut self) -> io::Result<Vec<Use>> {
        let one = |(counted, map): &(Counted, OwnedFd)| {
            let entries = bpf::count(map.as_fd(), counted.key_size, counted.value_size)?;
            Ok(Use { map: counted.name.to_lowercase().replace("_", " "), entries, capacity: counted.capacity })
        };
        self.counted.iter().map(one).collect()
    }

    fn end_sockets(&mut self, gone: &[Gone]) -> EndedSockets {
        let ids = gone.iter().map(|g| g.backend.id).collect();
        let addresses = gone.iter().map(|g| (g.backend.addr, g.backend.port)).collect();
        match self.end(&ids, &addresses) {
            Ok((ended, failed, why)) => EndedSockets { ended, failed, unable: why.map(|e| unable("end", &e)) },
            Err(e) => EndedSockets { ended: 0, failed: 0, unable: Some(unable("list", &e)) },
        }
    }
}

fn unable(what: &str, e: &io::Error) -> String {
    let lacks = match e.raw_os_error() {
        Some(libc::ENOENT) => ": the kernel lacks CONFIG_INET_UDP_DIAG (module udp_diag)",
        Some(libc::EOPNOTSUPP) => ": the kernel lacks CONFIG_INET_DIAG_DESTROY",
        Some(libc::EPERM) => ": the process needs CAP_NET_ADMIN",
        _ => "",
    };
    format!("cannot {what} UDP sockets{lacks} ({e})")
}
