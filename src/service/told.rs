//! Packets that were dropped or refused, as far as the programs tell of them: the
//! newest are kept to be looked at, some are logged, all are counted.
//!
//! Owner: ServiceMap's second worker. The programs sample (ten of a kind a second
//! and CPU); here at most so many are read and logged in a turn.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fairway_ebpf_abi::Sample;
use serde::{Deserialize, Serialize};

/// Read in one turn: half of what the buffer holds.
pub const READ: usize = 512;
/// Logged in one turn.
const LOGGED: usize = 10;
/// Kept to be looked at.
const KEPT: usize = 50;

/// A packet that was dropped or refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// RFC 3339.
    pub at: String,
    /// As events are named.
    pub what: String,
    pub protocol: String,
    pub from: String,
    pub to: String,
    /// The device where it happened: a pod's, or an interface index of the node.
    pub endpoint: u32,
    /// Of its kind, since the last one told on the same CPU.
    pub untold: u32,
}

/// What was told so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Telling {
    /// Newest last.
    pub last: VecDeque<Told>,
    pub read: u64,
    /// Happened and were not told.
    pub untold: u64,
}

impl Telling {
    /// Takes up what was read. `now` is what samples' times are measured by, and
    /// `wall` the time of day at that moment.
    pub fn take(&mut self, samples: &[Sample], now: u64, wall: jiff::Timestamp) {
        for (n, sample) in samples.iter().enumerate() {
            let told = described(sample, now, wall);
            if n < LOGGED {
                tracing::info!(
                    what = told.what,
                    protocol = told.protocol,
                    from = told.from,
                    to = told.to,
                    endpoint = told.endpoint,
                    untold = told.untold,
                    "A packet was dropped or refused"
                );
            }
            self.untold += u64::from(sample.untold);
            self.last.push_back(told);
            if self.last.len() > KEPT {
                self.last.pop_front();
            }
        }
        self.read += samples.len() as u64;
        if samples.len() > LOGGED {
            tracing::info!(more = samples.len() - LOGGED, "More packets were dropped or refused");
        }
    }
}

fn described(sample: &Sample, now: u64, wall: jiff::Timestamp) -> Told {
    let ago = Duration::from_nanos(now.saturating_sub(sample.time));
    let end = |addr: fairway_ebpf_abi::Addr, port: u16| match (IpAddr::from(addr), u16::from_be(port)) {
        (ip, 0) => ip.to_string(),
        (ip, port) => SocketAddr::new(ip, port).to_string(),
    };
    Told {
        at: wall.checked_sub(ago).unwrap_or(wall).to_string(),
        what: super::tend::event_name(sample.what).to_owned(),
        protocol: match sample.protocol {
            1 => "icmp".to_owned(),
            6 => "tcp".to_owned(),
            17 => "udp".to_owned(),
            58 => "icmpv6".to_owned(),
            132 => "sctp".to_owned(),
            other => other.to_string(),
        },
        from: end(sample.src, sample.sport),
        to: end(sample.dst, sample.dport),
        endpoint: sample.endpoint,
        untold: sample.untold,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairway_ebpf_abi::{Addr, EVENT_REFUSED};

    #[test]
    fn the_newest_are_kept_and_all_are_counted() {
        let sample = |n: u32| Sample {
            time: 1_000_000_000,
            src: Addr::from_octets4([10, 0, 0, 2]),
            dst: Addr::from_octets6([0xfd; 16]),
            sport: 0,
            dport: 80u16.to_be(),
            what: EVENT_REFUSED,
            protocol: 6,
            endpoint: n,
            untold: 2,
            ..Sample::default()
        };
        let mut telling = Telling::default();
        let wall: jiff::Timestamp = "2026-01-01T00:00:10Z".parse().unwrap();
        telling.take(&(0..60).map(sample).collect::<Vec<_>>(), 4_000_000_000, wall);
        assert_eq!((telling.read, telling.untold, telling.last.len()), (60, 120, KEPT));
        let last = telling.last.back().unwrap();
        assert_eq!((last.endpoint, last.at.as_str()), (59, "2026-01-01T00:00:07Z"));
        let words = [&last.what, &last.protocol, &last.from, &last.to].map(String::as_str);
        assert_eq!(words, ["refused", "tcp", "10.0.0.2", "[fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd]:80"]);
    }
}
