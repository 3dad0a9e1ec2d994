//! The embedded object: loading it over the pinned maps, and what those maps
//! must look like before they are trusted.
//!
//! aya takes a pinned map by its path alone; a map of another type or size would
//! be read as garbage. So every pin is compared with [`MapSpec`] first, and the
//! object's own maps with the same table after loading.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use aya::maps::{Map, MapError, MapInfo, MapType, PerCpuArray, PerCpuHashMap};
use aya::programs::{Program, ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use fairway_ebpf_abi::{
    AFFINITIES, Addr, Affinity, AffinityKey, BACKENDS, Backend, CLASS_NETS, CLASSES, COUNTERS, Counters, ENDPOINT,
    ENI_INGRESS, EVENT_COUNT, EVENTS, Endpoint, FLOWS, FRAGMENTS, FRONTENDS, Flow, FlowKey, Fragment, FragmentKey,
    Frontend, FrontendKey, IN_POD, LINK_EGRESS, LINKS, Link, MAX_AFFINITIES, MAX_BACKENDS, MAX_CLASS_NETS, MAX_CLASSED,
    MAX_ENDPOINTS, MAX_FLOWS, MAX_FRAGMENTS, MAX_FRONTENDS, MAX_NAMESPACES, MAX_NODE_ADDRESSES, MAX_POD_ADDRESSES,
    MAX_RULE_BLOCKS, MAX_RULES, MAX_SOCKETS, MAX_SOURCE_RANGES, MAX_SPARE_FLOWS, NAMESPACES, NODE, NODE_EGRESS,
    NODE_INGRESS, NetKey, ORIGINALS, Original, PACES, POD_EGRESS, POD_INGRESS, PODS, POLICY, Pace, Pod, PolicyState,
    RULE_HITS, RULES, RuleBlock, RuleKey, SAMPLES, SAMPLES_SIZE, SLOTS, SOCKETS, SOURCE_RANGES, SPARE_FLOWS, SlotKey,
    SocketKey, TrieKey, UPLINK, Uplink,
};

use super::DatapathError;
use super::error::refusal;
use super::hook::{Direction, Place, chain};
use super::pins::Pins;
use crate::sys::bpf::{self, TcxChain};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/fairway-ebpf.o"));

const BPF_F_NO_PREALLOC: u32 = 1;

/// What a map must be for the programs and this crate to agree about it.
struct MapSpec {
    name: &'static str,
    map_type: MapType,
    key_size: usize,
    value_size: usize,
    max_entries: u32,
    flags: u32,
}

/// Every pinned map.
const MAPS: [MapSpec; 24] = [
    hash::<Endpoint, Counters>(COUNTERS, MAX_ENDPOINTS).of_type(MapType::PerCpuHash),
    hash::<Endpoint, Link>(LINKS, MAX_ENDPOINTS),
    hash::<Addr, Pod>(PODS, MAX_POD_ADDRESSES),
    hash::<Addr, u32>(NODE, MAX_NODE_ADDRESSES),
    hash::<FrontendKey, Frontend>(FRONTENDS, MAX_FRONTENDS),
    hash::<SlotKey, Backend>(SLOTS, MAX_BACKENDS),
    hash::<u32, Backend>(BACKENDS, MAX_BACKENDS),
    hash::<TrieKey, u32>(SOURCE_RANGES, MAX_SOURCE_RANGES).of_type(MapType::LpmTrie),
    lru::<AffinityKey, Affinity>(AFFINITIES, MAX_AFFINITIES),
    hash::<u64, u32>(NAMESPACES, MAX_NAMESPACES),
    lru::<SocketKey, Original>(SOCKETS, MAX_SOCKETS),
    MapSpec { flags: 0, ..hash::<FlowKey, Flow>(FLOWS, MAX_FLOWS) },
    lru::<FlowKey, Flow>(SPARE_FLOWS, MAX_SPARE_FLOWS),
    lru::<FragmentKey, Fragment>(FRAGMENTS, MAX_FRAGMENTS),
    MapSpec { flags: 0, ..hash::<u32, u64>(EVENTS, EVENT_COUNT).of_type(MapType::PerCpuArray) },
    MapSpec { flags: 0, ..hash::<u32, Uplink>(UPLINK, 1).of_type(MapType::Array) },
    MapSpec { flags: 0, ..hash::<u32, Pace>(PACES, EVENT_COUNT).of_type(MapType::PerCpuArray) },
    MapSpec { flags: 0, ..hash::<(), ()>(SAMPLES, SAMPLES_SIZE).of_type(MapType::RingBuf) },
    hash::<Addr, u64>(CLASSES, MAX_CLASSED),
    hash::<NetKey, u64>(CLASS_NETS, MAX_CLASS_NETS).of_type(MapType::LpmTrie),
    hash::<RuleKey, RuleBlock>(RULES, MAX_RULE_BLOCKS),
    hash::<u64, u64>(RULE_HITS, MAX_RULES).of_type(MapType::PerCpuHash),
    MapSpec { flags: 0, ..hash::<u32, PolicyState>(POLICY, 1).of_type(MapType::Array) },
    MapSpec { max_entries: 0, ..hash::<i32, Original>(ORIGINALS, 0).of_type(MapType::SkStorage) },
];

/// A hash that is full forgets its oldest.
const fn lru<K, V>(name: &'static str, max_entries: u32) -> MapSpec {
    MapSpec { flags: 0, ..hash::<K, V>(name, max_entries).of_type(MapType::LruHash) }
}

/// A hash that takes memory per entry.
const fn hash<K, V>(name: &'static str, max_entries: u32) -> MapSpec {
    MapSpec {
        name,
        map_type: MapType::Hash,
        key_size: size_of::<K>(),
        value_size: size_of::<V>(),
        max_entries,
        flags: BPF_F_NO_PREALLOC,
    }
}

impl MapSpec {
    const fn of_type(self, map_type: MapType) -> Self {
        Self { map_type, ..self }
    }

    /// How a map differs from this, in words; `None` when it does not.
    fn mismatch(&self, info: &MapInfo) -> Option<String> {
        let mut found = Vec::new();
        match info.map_type() {
            Ok(map_type) if map_type == self.map_type => {}
            other => found.push(format!("type {other:?} instead of {:?}", self.map_type)),
        }
        for (what, is, should) in [
            ("key size", info.key_size(), self.key_size as u32),
            ("value size", info.value_size(), self.value_size as u32),
            ("capacity", info.max_entries(), self.max_entries),
            ("flags", info.map_flags(), self.flags),
        ] {
            if is != should {
                found.push(format!("{what} {is} instead of {should}"));
            }
        }
        (!found.is_empty()).then(|| format!("{}: {}", self.name, found.join(", ")))
    }

    /// As [`Self::mismatch`], for what is pinned at `path`.
    fn mismatch_at(&self, path: &Path) -> io::Result<Option<String>> {
        let pinned = match bpf::open_pinned(path) {
            Ok(fd) => fd,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            // A directory, say.
            Err(e) => return Ok(Some(format!("{}: {e}", self.name))),
        };
        match bpf::kind(pinned.as_fd())? {
            bpf::Kind::Map => Ok(self.mismatch(&MapInfo::from_pin(path).map_err(io::Error::other)?)),
            other => Ok(Some(format!("{}: a {other:?} instead of a map", self.name))),
        }
    }
}

/// A map whose entries nobody's books know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    pub name: &'static str,
    pub key_size: usize,
    /// What the kernel copies for an entry.
    pub value_size: usize,
    pub capacity: usize,
}

/// Those to be counted by reading them.
pub(super) fn counted(cpus: usize) -> impl Iterator<Item = Counted> {
    const BY_BOOKS: [&str; 5] = [FRONTENDS, SLOTS, BACKENDS, SOURCE_RANGES, FLOWS];
    let countable = |spec: &&MapSpec| matches!(spec.map_type, MapType::Hash | MapType::LruHash | MapType::PerCpuHash);
    MAPS.iter().filter(|spec| !BY_BOOKS.contains(&spec.name)).filter(countable).map(move |spec| Counted {
        name: spec.name,
        key_size: spec.key_size,
        value_size: match spec.map_type {
            MapType::PerCpuHash => spec.value_size.next_multiple_of(8) * cpus,
            _ => spec.value_size,
        },
        capacity: spec.max_entries as usize,
    })
}

/// The names of all pinned maps.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    MAPS.iter().map(|spec| spec.name)
}

/// How what is pinned at `path` differs from the map of this name; `None` when it
/// does not.
pub(super) fn mismatch(name: &str, path: &Path) -> io::Result<Option<String>> {
    match MAPS.iter().find(|spec| spec.name == name) {
        Some(spec) => spec.mismatch_at(path),
        None => Ok(Some(format!("{name}: no map of this build"))),
    }
}

/// Removes pins that are not what they should be; new maps take their places.
/// Says which and why.
pub(super) fn rotate_foreign_maps(pins: &Pins) -> io::Result<Vec<(&'static str, String)>> {
    let mut rotated = Vec::new();
    for spec in &MAPS {
        let path = pins.map(spec.name);
        if let Some(why) = spec.mismatch_at(&path)? {
            if std::fs::symlink_metadata(&path)?.is_dir() {
                std::fs::remove_dir_all(&path)?;
            } else {
                std::fs::remove_file(&path)?;
            }
            rotated.push((spec.name, why));
        }
    }
    Ok(rotated)
}

pub(super) type EventMap = PerCpuArray<aya::maps::MapData, u64>;
pub(super) type CounterMap = PerCpuHashMap<aya::maps::MapData, Endpoint, Counters>;

/// The constants that programs are loaded with: 0, and every number of a device
/// inside a pod. The loader keeps references to them.
static NUMBERS: [Endpoint; MAX_ENDPOINTS as usize + 1] = {
    let mut numbers = [0; MAX_ENDPOINTS as usize + 1];
    let mut i = 0;
    while i < MAX_ENDPOINTS {
        numbers[i as usize + 1] = IN_POD + i;
        i += 1;
    }
    numbers
};

/// Loads the object, any number of times.
pub(super) struct Loader {
    loader: EbpfLoader<'static>,
}

impl Loader {
    pub(super) fn new(pins: &Pins) -> Self {
        let mut loader = EbpfLoader::new();
        // The kernel's own types, megabytes of them, serve relocations that this
        // object does not have. The verifier is asked for its words only after it
        // has refused.
        loader.btf(None).verifier_log_level(VerifierLogLevel::DEBUG);
        for spec in &MAPS {
            loader.map_pin_path(spec.name, pins.map(spec.name));
        }
        Self { loader }
    }

    /// A pod's programs. `endpoint` is the number they count under; 0 makes them
    /// use the interface index, and comes with the programs of ENIs.
    pub(super) fn load(&mut self, endpoint: Endpoint) -> Result<Programs, DatapathError> {
        let number = NUMBERS.iter().find(|n| **n == endpoint).ok_or(DatapathError::Full)?;
        self.loader.override_global(ENDPOINT, number, true);
        let object = self.loader.load(OBJECT).map_err(|e| refusal("the eBPF object", &e))?;
        let mut programs = Programs { object };
        for direction in Direction::BOTH {
            programs.get(direction)?.load().map_err(|e| refusal(name_of(direction), &e))?;
        }
        if endpoint == 0 {
            for name in [ENI_INGRESS, NODE_INGRESS, NODE_EGRESS, LINK_EGRESS] {
                programs.named(name)?.load().map_err(|e| refusal(name, &e))?;
            }
        }
        Ok(programs)
    }
}

/// One load of the object: its programs, over the pinned maps.
pub(super) struct Programs {
    object: Ebpf,
}

impl Programs {
    pub(super) fn get(&mut self, direction: Direction) -> Result<&mut SchedClassifier, DatapathError> {
        self.named(name_of(direction))
    }

    /// Both programs of a pod, with the chains they go to.
    pub(super) fn pair(&self, place: Place) -> Result<[(BorrowedFd<'_>, TcxChain); 2], DatapathError> {
        let fd = |direction| Ok((self.classifier(name_of(direction))?, chain(place, direction)));
        let [egress, ingress] = Direction::BOTH;
        Ok([fd(egress)?, fd(ingress)?])
    }

    /// A program of a device, loaded.
    pub(super) fn classifier(&self, name: &str) -> Result<BorrowedFd<'_>, DatapathError> {
        let program = self.object.program(name).ok_or(ProgramError::NotLoaded);
        let program: &SchedClassifier =
            program.and_then(|p| p.try_into()).map_err(|e: ProgramError| refusal(name, &e))?;
        program.fd().map(AsFd::as_fd).map_err(|e| refusal(name, &e))
    }

    /// A program of the socket path, loaded.
    pub(super) fn socket_door(&mut self, name: &str) -> Result<BorrowedFd<'_>, DatapathError> {
        let fail = |e: ProgramError| refusal(name, &e);
        let program = self.object.program_mut(name).ok_or(ProgramError::NotLoaded).map_err(fail)?;
        if program.fd().is_err() {
            match program {
                Program::CgroupSockAddr(program) => program.load(),
                Program::CgroupSockopt(program) => program.load(),
                _ => Err(ProgramError::UnexpectedProgramType),
            }
            .map_err(fail)?;
        }
        let program = self.object.program(name).ok_or(ProgramError::NotLoaded).map_err(fail)?;
        program.fd().map(AsFd::as_fd).map_err(fail)
    }

    fn named(&mut self, name: &str) -> Result<&mut SchedClassifier, DatapathError> {
        let program = self.object.program_mut(name).ok_or(ProgramError::NotLoaded);
        program.and_then(|p| p.try_into()).map_err(|e| refusal(name, &e))
    }

    /// A map, to keep; of one load only, and only once.
    pub(super) fn take_map(&mut self, name: &str) -> Result<Map, DatapathError> {
        self.object.take_map(name).ok_or_else(|| DatapathError::Object(format!("no map {name}")))
    }

    pub(super) fn take_events(&mut self) -> Result<EventMap, DatapathError> {
        self.take_map(EVENTS)?.try_into().map_err(|e: MapError| DatapathError::Object(e.to_string()))
    }

    pub(super) fn take_counters(&mut self) -> Result<CounterMap, DatapathError> {
        let map = self.take_map(COUNTERS)?;
        PerCpuHashMap::try_from(map).map_err(|e| DatapathError::Object(e.to_string()))
    }
}

/// The object and this crate must describe the maps alike.
pub(super) fn check_loaded_maps(pins: &Pins) -> Result<(), DatapathError> {
    for spec in &MAPS {
        let path = pins.map(spec.name);
        if let Some(why) = spec.mismatch_at(&path).map_err(|cause| DatapathError::Pins { path, cause })? {
            return Err(DatapathError::Object(format!("{why}; it was compiled from other sources")));
        }
    }
    Ok(())
}

fn name_of(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => POD_EGRESS,
        Direction::Ingress => POD_INGRESS,
    }
}
