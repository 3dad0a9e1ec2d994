//! What the programs fill themselves: flows that have ended are collected, how
//! full every map is is counted, what happened is summed up.
//!
//! Owner: ServiceMap's second worker thread, so that neither an actor nor the
//! writing of Services waits for a look through a large table. A turn's work is
//! bounded ([`Room::turn`]); nothing is kept between turns but where the last one
//! ended, so that a new run begins with a whole look.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use fairway_ebpf_abi::{
    EVENT_CHOSEN, EVENT_DENIED_EGRESS, EVENT_DENIED_INGRESS, EVENT_ERROR_TRANSLATED, EVENT_MALFORMED, EVENT_MOVED,
    EVENT_NO_PORT, EVENT_NOT_ADMITTED, EVENT_REFUSED, EVENT_SPOOFED, EVENT_TABLE_FULL, EVENT_UNANSWERED,
    EVENT_UNWRITABLE, Flow, FlowKey, Sample,
};
use serde::{Deserialize, Serialize};

use super::ages::{self, Room};
use super::maps::Gone;
use super::model::Protocol;
use super::told::{self, Telling};

/// Entries read and deleted by one call of the kernel.
const CHUNK: usize = 2048;
/// The maps other than flows are counted every so many turns.
const COUNT_EVERY: u64 = 30;

/// Maps that programs write to, or that others own: read here, and flows deleted.
pub trait FlowTables {
    /// Some `room` flows from where the last look ended; whether the end was
    /// reached, where the next look begins anew.
    fn look(&mut self, room: usize, found: &mut Vec<(FlowKey, Flow)>) -> io::Result<bool>;
    fn flow(&mut self, key: &FlowKey) -> io::Result<Option<Flow>>;
    fn backend_lives(&mut self, id: u32) -> io::Result<bool>;
    fn forget(&mut self, keys: &[FlowKey]) -> io::Result<()>;
    /// What the flows' times are measured by, in nanoseconds.
    fn now(&self) -> u64;
    /// How many flow entries there can be.
    fn capacity(&self) -> usize;
    /// Counts by `EVENT_*`, of all CPUs.
    fn events(&mut self) -> io::Result<Vec<u64>>;
    /// Packets that were dropped or refused, oldest first; each is read once.
    fn samples(&mut self, most: usize) -> Vec<Sample>;
    /// How full the other maps are.
    fn uses(&mut self) -> io::Result<Vec<Use>>;
    /// Ends the UDP sockets that were led to these backends when they connected and
    /// would otherwise not find out.
    fn end_sockets(&mut self, gone: &[Gone]) -> EndedSockets;
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    pub map: String,
    pub entries: usize,
    pub capacity: usize,
}

/// What became of sockets whose backend has gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndedSockets {
    pub ended: u64,
    pub failed: u64,
    /// Why none can be found or ended on this kernel.
    pub unable: Option<String>,
}

/// As [`Tended::events`] names them.
const EVENT_NAMES: [(u32, &str); 13] = [
    (EVENT_CHOSEN, "backend_chosen"),
    (EVENT_REFUSED, "refused"),
    (EVENT_NOT_ADMITTED, "not_admitted"),
    (EVENT_TABLE_FULL, "flow_table_full"),
    (EVENT_MOVED, "left_gone_backend"),
    (EVENT_ERROR_TRANSLATED, "icmp_error_translated"),
    (EVENT_UNWRITABLE, "unwritable"),
    (EVENT_UNANSWERED, "no_backend_on_this_node"),
    (EVENT_NO_PORT, "no_free_node_port"),
    (EVENT_SPOOFED, "spoofed_source"),
    (EVENT_DENIED_INGRESS, "denied_ingress"),
    (EVENT_DENIED_EGRESS, "denied_egress"),
    (EVENT_MALFORMED, "malformed"),
];

/// An event in one word.
pub fn event_name(which: u32) -> &'static str {
    EVENT_NAMES.iter().find(|(w, _)| *w == which).map_or("other", |(_, name)| name)
}

/// How things are after a turn.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tended {
    /// Flows by protocol, when the table was last seen whole.
    pub flows: BTreeMap<String, usize>,
    /// Every map but those of `Counts`, flows first.
    pub uses: Vec<Use>,
    pub events: BTreeMap<String, u64>,
    pub told: Telling,
    /// Flow entries collected: silent for too long, or their backend was gone.
    pub expired: u64,
    pub orphaned: u64,
    /// Looks through the whole table.
    pub passes: u64,
    /// Times are halved this often, for want of room.
    pub squeeze: u8,
    pub sockets_ended: u64,
    pub sockets_not_ended: u64,
    /// Why connected UDP sockets cannot be ended here.
    pub sockets_unable: Option<String>,
    /// Why the last turn was not whole.
    pub error: Option<String>,
}

pub struct Tender {
    tables: Box<dyn FlowTables>,
    /// Of the look in work.
    seen: Seen,
    turns: u64,
    /// Turns without a look: a table with few entries is seen whole in one.
    rest: u32,
    full_events: u64,
    tended: Tended,
    others: Vec<Use>,
    found: Vec<(FlowKey, Flow)>,
}

#[derive(Default)]
struct Seen {
    turns: u32,
    /// Entries that stay.
    entries: usize,
    flows: BTreeMap<String, usize>,
    /// Backends asked for; the dead stay dead.
    lives: HashMap<u32, bool>,
}

impl Tender {
    pub fn new(tables: Box<dyn FlowTables>) -> Self {
        Self {
            tables,
            seen: Seen::default(),
            turns: 0,
            rest: 0,
            full_events: u64::MAX,
            tended: Tended::default(),
            others: Vec::new(),
            found: Vec::new(),
        }
    }

    /// Once a second.
    pub fn turn(&mut self) -> Tended {
        let samples = self.tables.samples(told::READ);
        self.tended.told.take(&samples, self.tables.now(), jiff::Timestamp::now());
        let done = self.count().and_then(|refused| self.collect(refused));
        self.tended.error = done.err().map(|e| e.to_string());
        self.turns += 1;
        self.tended.clone()
    }

    /// These backends are gone. Their flows go at the next packet or at the next
    /// look; sockets that were connected to them do not find out by themselves.
    pub fn backends_gone(&mut self, gone: &[Gone]) -> Tended {
        let datagrams = |g: &&Gone| matches!(g.protocol, Some(Protocol::Udp) | None);
        let gone: Vec<Gone> = gone.iter().filter(datagrams).copied().collect();
        if gone.is_empty() {
            return self.tended.clone();
        }
        let done = self.tables.end_sockets(&gone);
        self.tended.sockets_ended += done.ended;
        self.tended.sockets_not_ended += done.failed;
        self.tended.sockets_unable = done.unable;
        self.tended.clone()
    }

    /// Whether a flow did not find room since the last turn.
    fn count(&mut self) -> io::Result<bool> {
        let events = self.tables.events()?;
        let of = |which: u32| events.get(which as usize).copied().unwrap_or_default();
        self.tended.events = EVENT_NAMES.iter().map(|(which, name)| ((*name).to_owned(), of(*which))).collect();
        let full = of(EVENT_TABLE_FULL);
        let refused = full > self.full_events;
        self.full_events = full;
        if self.turns.is_multiple_of(COUNT_EVERY) {
            self.others = self.tables.uses()?;
        }
        Ok(refused)
    }

    fn collect(&mut self, refused: bool) -> io::Result<()> {
        let capacity = self.tables.capacity();
        let known = self.tended.uses.first().map_or(0, |flows| flows.entries);
        let room = Room { used: known.max(self.seen.entries), capacity, refused };
        // The first look is a whole one: nothing is known before.
        let turn = if self.tended.passes == 0 { capacity } else { room.turn() };
        let roomy = room.is_roomy();
        if roomy && self.seen.turns == 0 && self.rest > 0 {
            self.rest -= 1;
            return Ok(());
        }
        self.seen.turns += 1;
        let (mut left, mut ended) = (turn, false);
        while left > 0 && !ended {
            let chunk = left.min(CHUNK);
            self.found.clear();
            ended = self.tables.look(chunk, &mut self.found)?;
            self.judge()?;
            left = left.saturating_sub(chunk);
        }
        if ended {
            let seen = std::mem::take(&mut self.seen);
            let room = Room { used: seen.entries, ..room };
            self.tended.squeeze = room.squeeze(self.tended.squeeze);
            self.tended.passes += 1;
            self.rest = ages::PASS.saturating_sub(seen.turns);
            self.tended.flows = seen.flows;
            let flows = Use { map: "flows".to_owned(), entries: seen.entries, capacity };
            self.tended.uses = std::iter::once(flows).chain(self.others.iter().cloned()).collect();
        }
        Ok(())
    }

    /// Forgets what has ended of `self.found`, and counts the rest.
    fn judge(&mut self) -> io::Result<()> {
        let (now, squeeze) = (self.tables.now(), self.tended.squeeze);
        let mut ended: HashSet<FlowKey> = HashSet::new();
        for (key, flow) in std::mem::take(&mut self.found) {
            if ended.contains(&key) {
                continue;
            }
            let silent = now.saturating_sub(flow.last_used);
            let leaves = ages::leaves_its_backend(&key) && silent >= ages::ORPHANED * ages::SECOND;
            if leaves && !self.lives(flow.backend)? {
                self.tended.orphaned += 1;
                ended.insert(key);
                continue;
            }
            if silent >= ages::least(key.protocol, squeeze) * ages::SECOND {
                let other = ages::partner(&key, &flow);
                let partner = match &other {
                    Some(other) => self.tables.flow(other)?,
                    None => None,
                };
                if ages::expired(now, &key, &flow, partner.as_ref(), squeeze) {
                    // Both in one look, whichever comes first.
                    self.tended.expired += 1 + u64::from(partner.is_some());
                    ended.insert(key);
                    ended.extend(other.filter(|_| partner.is_some()));
                    continue;
                }
            }
            self.seen.entries += 1;
            if ages::leads(&key) {
                *self.seen.flows.entry(protocol(key.protocol).to_owned()).or_default() += 1;
            }
        }
        if ended.is_empty() {
            return Ok(());
        }
        self.tables.forget(&ended.into_iter().collect::<Vec<_>>())
    }

    fn lives(&mut self, backend: u32) -> io::Result<bool> {
        if let Some(lives) = self.seen.lives.get(&backend) {
            return Ok(*lives);
        }
        let lives = self.tables.backend_lives(backend)?;
        self.seen.lives.insert(backend, lives);
        Ok(lives)
    }
}

fn protocol(number: u8) -> &'static str {
    match number {
        6 => "tcp",
        17 => "udp",
        132 => "sctp",
        _ => "other",
    }
}
