//! How long a flow of the packet path is remembered, and how much of the table
//! is looked through at a time.
//!
//! Pure. The times are conntrack's, where it has them (docs/decisions/0010). An
//! entry says when it was last used, to the second; a flow has two, and lives as
//! long as the younger of them. A flow that is forgotten too early is sent to the
//! backend that its addresses and ports fall on, which is the same one as long as
//! its Service has not changed: so when room is short, what has been silent
//! longest goes before its time.

use fairway_ebpf_abi::{
    Addr, FLOW_ANSWER, FLOW_ENDED, FLOW_FORWARD, FLOW_JUDGED, FLOW_OUTSIDE, FLOW_REVERSE, Flow, FlowKey, HAIRPIN4,
    HAIRPIN6,
};

pub const SECOND: u64 = 1_000_000_000;

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// An established connection (RFC 5382, REQ-5: no less than 2 h 4 min).
const TCP_IDLE: u64 = 7440;
/// One of which both ends have said that they will send no more.
const TCP_CLOSING: u64 = 120;
/// A question and its answer.
const UDP_ONCE: u64 = 30;
/// More than that.
const UDP_STREAM: u64 = 120;
/// Heartbeats come every 30 s.
const SCTP_IDLE: u64 = 210;
/// Nothing is forgotten sooner, however short room is.
const LEAST: u64 = 15;

/// What goes with an entry: the other direction of its flow. One that was judged
/// serves both.
pub fn partner(key: &FlowKey, flow: &Flow) -> Option<FlowKey> {
    let of = |src, dst, sport, dport, kind| FlowKey { src, dst, sport, dport, protocol: key.protocol, kind, _pad: 0 };
    // A pod that talks to itself is seen by itself as somebody else.
    let is_hairpin = |addr: &Addr| *addr == HAIRPIN4 || *addr == HAIRPIN6;
    let seen = match (flow.addr == key.src, key.src.is_v4()) {
        (false, _) => key.src,
        (true, true) => HAIRPIN4,
        (true, false) => HAIRPIN6,
    };
    Some(match key.kind {
        FLOW_JUDGED => return None,
        FLOW_FORWARD => of(flow.addr, seen, flow.port, key.sport, FLOW_REVERSE),
        FLOW_OUTSIDE => of(flow.addr, flow.peer, flow.port, flow.peer_port, FLOW_ANSWER),
        FLOW_ANSWER => of(flow.peer, flow.addr, flow.peer_port, flow.port, FLOW_OUTSIDE),
        _ => {
            let client = if is_hairpin(&key.dst) { key.src } else { key.dst };
            of(client, flow.addr, key.dport, flow.port, FLOW_FORWARD)
        }
    })
}

/// Whether an entry is the one of its flow that is counted.
pub fn leads(key: &FlowKey) -> bool {
    matches!(key.kind, FLOW_FORWARD | FLOW_OUTSIDE)
}

/// How long a flow is kept after it was last used, in seconds. `partner` is the
/// other entry, if it is there.
pub fn age(key: &FlowKey, flow: &Flow, partner: Option<&Flow>, squeeze: u8) -> u64 {
    let outside = matches!(key.kind, FLOW_OUTSIDE | FLOW_ANSWER);
    let over = |flow: &Flow| flow.flags & FLOW_ENDED == FLOW_ENDED;
    let normal = match key.protocol {
        TCP if over(flow) || partner.is_some_and(over) => TCP_CLOSING,
        // Its port would be another's: it would not go on as it was.
        TCP if outside => return TCP_IDLE,
        TCP => TCP_IDLE,
        SCTP => SCTP_IDLE,
        // One entry does not tell how many packets have passed.
        UDP if key.kind == FLOW_JUDGED || partner.is_some_and(|p| went_on(flow, p)) => UDP_STREAM,
        _ => UDP_ONCE,
    };
    (normal >> squeeze.min(32)).max(LEAST)
}

/// Both entries are made at one instant and marked as used again a second later
/// at the earliest: where they differ, more than one packet has passed, and where
/// they differ by little, in both directions.
fn went_on(a: &Flow, b: &Flow) -> bool {
    let apart = a.last_used.abs_diff(b.last_used);
    apart != 0 && apart <= UDP_ONCE * SECOND
}

/// Whether a flow has been silent for long enough to be forgotten.
pub fn expired(now: u64, key: &FlowKey, flow: &Flow, partner: Option<&Flow>, squeeze: u8) -> bool {
    let last = partner.map_or(flow.last_used, |p| flow.last_used.max(p.last_used));
    now.saturating_sub(last) >= age(key, flow, partner, squeeze) * SECOND
}

/// The least that any flow of the protocol is kept: younger ones need no look at
/// their other entry.
pub fn least(protocol: u8, squeeze: u8) -> u64 {
    let normal = match protocol {
        TCP => TCP_CLOSING,
        SCTP => SCTP_IDLE,
        _ => UDP_ONCE,
    };
    (normal >> squeeze.min(32)).max(LEAST)
}

/// Seconds of silence after which an entry goes whose backend is gone. The next
/// packet to the Service moves the flow without our help; until then an answer
/// that is on its way must be known. Packets are noted once a second.
pub const ORPHANED: u64 = 3;

/// Whether a flow leaves a backend that is gone: a datagram finds another one, a
/// TCP connection ends where it was.
pub fn leaves_its_backend(key: &FlowKey) -> bool {
    key.protocol != TCP && key.kind != FLOW_JUDGED
}

/// How room in a table is: what follows from it for the collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    pub used: usize,
    pub capacity: usize,
    /// Something did not find room since the last turn.
    pub refused: bool,
}

/// In how many turns a table is seen whole that has much room.
pub const PASS: u32 = 32;

/// Times are halved this often at most.
const MOST_SQUEEZE: u8 = 9;

impl Room {
    fn percent(&self) -> usize {
        if self.refused { 100 } else { 100 * self.used / self.capacity.max(1) }
    }

    /// Less than half full: there is no hurry.
    pub fn is_roomy(&self) -> bool {
        self.percent() < 50
    }

    /// Entries to look at in one turn, of which there is one a second: the whole
    /// table in half a minute, in 8 s when it is half full, at once when it is
    /// four fifths full.
    pub fn turn(&self) -> usize {
        match self.percent() {
            0..50 => self.capacity.div_ceil(PASS as usize),
            50..80 => self.capacity.div_ceil(8),
            _ => self.capacity,
        }
    }

    /// How often times are halved, after the table was seen whole.
    pub fn squeeze(&self, now: u8) -> u8 {
        match self.percent() {
            0..70 => now.saturating_sub(1),
            70..80 => now,
            _ => (now + 1).min(MOST_SQUEEZE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flow(last_used: u64) -> Flow {
        Flow { last_used: last_used * SECOND, ..Flow::default() }
    }

    fn of(protocol: u8, kind: u8) -> FlowKey {
        FlowKey { protocol, kind, ..FlowKey::default() }
    }

    fn lives(protocol: u8, flow: &Flow, partner: Option<&Flow>) -> u64 {
        (0..10_000).find(|t| expired(t * SECOND, &of(protocol, FLOW_FORWARD), flow, partner, 0)).unwrap()
    }

    #[test]
    fn ages_are_conntracks() {
        assert_eq!(lives(UDP, &flow(0), Some(&flow(0))), 30, "one question");
        assert_eq!(lives(UDP, &flow(5), Some(&flow(4))), 125, "a conversation, from its last packet");
        assert_eq!(lives(UDP, &flow(60), Some(&flow(0))), 90, "nobody has answered for a minute");
        assert_eq!(lives(UDP, &flow(0), None), 30);
        assert_eq!(lives(SCTP, &flow(0), Some(&flow(0))), 210);
        assert_eq!(lives(TCP, &flow(0), Some(&flow(0))), 7440);
        let closing = Flow { flags: FLOW_ENDED, ..flow(0) };
        assert_eq!(lives(TCP, &closing, Some(&flow(0))), 120);
        assert_eq!(lives(TCP, &flow(0), Some(&closing)), 120, "whichever entry says it");
        let half = Flow { flags: fairway_ebpf_abi::FLOW_ENDED_CLIENT, ..flow(0) };
        assert_eq!(lives(TCP, &half, Some(&flow(0))), 7440, "the other end may have more to say");
    }

    #[test]
    fn the_other_entry_keeps_a_flow() {
        assert_eq!(lives(TCP, &flow(0), Some(&flow(1000))), 8440);
        assert_eq!(lives(TCP, &flow(1000), Some(&flow(0))), 8440);
    }

    #[test]
    fn a_table_that_fills_is_looked_through_faster_and_forgets_sooner() {
        let room = |used| Room { used, capacity: 1000, refused: false };
        assert_eq!((room(499).turn(), room(500).turn(), room(800).turn()), (32, 125, 1000));
        assert_eq!(Room { refused: true, ..room(0) }.turn(), 1000);
        assert_eq!(
            (room(800).squeeze(0), room(750).squeeze(3), room(699).squeeze(3), room(0).squeeze(0)),
            (1, 3, 2, 0)
        );
        assert_eq!(Room { refused: true, ..room(0) }.squeeze(2), 3);
        assert_eq!(room(1000).squeeze(MOST_SQUEEZE), MOST_SQUEEZE);
        assert_eq!(age(&of(TCP, FLOW_FORWARD), &flow(0), None, 1), 3720);
        assert_eq!(age(&of(TCP, FLOW_REVERSE), &flow(0), None, MOST_SQUEEZE), LEAST);
        assert_eq!(age(&of(TCP, FLOW_ANSWER), &flow(0), None, MOST_SQUEEZE), TCP_IDLE, "it has a port to lose");
        assert_eq!(age(&of(UDP, FLOW_ANSWER), &flow(0), None, 255), LEAST);
    }

    fn addr() -> impl Strategy<Value = Addr> {
        prop_oneof![any::<[u8; 4]>().prop_map(Addr::from_octets4), any::<[u8; 16]>().prop_map(Addr::from_octets6),]
    }

    proptest! {
        /// As the programs make the two entries of a flow.
        #[test]
        fn the_entries_of_a_flow_are_each_others_partners(
            client in addr(), service in addr(), backend in addr(), hairpin: bool,
            sport: u16, dport: u16, port: u16, protocol: u8,
        ) {
            let backend = if hairpin { client } else { backend };
            let seen = match (backend == client, client.is_v4()) {
                (false, _) => client,
                (true, true) => HAIRPIN4,
                (true, false) => HAIRPIN6,
            };
            let forward = FlowKey { src: client, dst: service, sport, dport, protocol, kind: FLOW_FORWARD, _pad: 0 };
            let to = Flow { addr: backend, port, ..Flow::default() };
            let reverse = FlowKey {
                src: backend, dst: seen, sport: port, dport: sport, protocol, kind: FLOW_REVERSE, _pad: 0,
            };
            let from = Flow { addr: service, port: dport, ..Flow::default() };
            prop_assert_eq!(partner(&forward, &to), Some(reverse));
            prop_assert_eq!(partner(&reverse, &from), Some(forward));
        }

        #[test]
        fn so_are_those_of_a_client_from_outside(
            client in addr(), service in addr(), backend in addr(), node in addr(),
            sport: u16, dport: u16, port: u16, given: u16, protocol: u8,
        ) {
            let outside = FlowKey { src: client, dst: service, sport, dport, protocol, kind: FLOW_OUTSIDE, _pad: 0 };
            let to = Flow { addr: backend, port, peer: node, peer_port: given, ..Flow::default() };
            let answer =
                FlowKey { src: backend, dst: node, sport: port, dport: given, protocol, kind: FLOW_ANSWER, _pad: 0 };
            let back = Flow { addr: service, port: dport, peer: client, peer_port: sport, ..Flow::default() };
            prop_assert_eq!(partner(&outside, &to), Some(answer));
            prop_assert_eq!(partner(&answer, &back), Some(outside));
        }

        #[test]
        fn what_is_younger_than_the_least_never_goes(
            last: u32, partner: Option<u32>, protocol: u8, squeeze: u8, flags in 0u16..4, silent in 0u64..8000,
        ) {
            let it = Flow { flags, ..flow(last.into()) };
            let partner = partner.map(|p| flow(p.into()));
            let now = (u64::from(last) + silent) * SECOND;
            if silent < least(protocol, squeeze) {
                for kind in [FLOW_FORWARD, FLOW_REVERSE, FLOW_OUTSIDE, FLOW_ANSWER] {
                    prop_assert!(!expired(now, &of(protocol, kind), &it, partner.as_ref(), squeeze));
                }
            }
        }
    }
}
