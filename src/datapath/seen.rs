//! What is attached and what has passed, read from the kernel; changes nothing.

use aya::maps::MapError;
use fairway_ebpf_abi::{Counters, EVENT_COUNT, Endpoint};

use super::entry::Entry;
use super::hook::Device;
use super::{Attached, Datapath, DatapathError};
use crate::model::AttachmentId;

impl Datapath {
    /// Whether both programs are on this device now, read from the kernel.
    pub fn verify(&self, attachment: &AttachmentId, device: Device<'_>) -> Result<bool, DatapathError> {
        let Some(entry) = self.known.get(attachment) else { return Ok(false) };
        if self.dated.contains(attachment) {
            return Ok(false);
        }
        entry.is_on(device).map_err(|cause| DatapathError::Attach {
            attachment: attachment.clone(),
            device: device.to_string(),
            cause,
        })
    }

    /// What is attached, read from the kernel.
    pub fn attached(&self) -> Result<Vec<Attached>, DatapathError> {
        let described = |(attachment, entry): (&AttachmentId, &Entry)| {
            let attached = entry.describe(attachment)?;
            Ok(Attached { short: self.ways.is_short(entry.endpoint), ..attached })
        };
        self.known.iter().map(described).collect()
    }

    /// What passed each attachment since it was attached.
    pub fn counters(&self) -> Result<Vec<(AttachmentId, Counters)>, DatapathError> {
        let sum = |endpoint: &Endpoint| {
            let mut total = Counters::default();
            match self.counters.get(endpoint, 0) {
                Ok(per_cpu) => per_cpu.iter().for_each(|c| add(&mut total, c)),
                Err(MapError::KeyNotFound) => {}
                Err(e) => return Err(DatapathError::Counters(e)),
            }
            Ok(total)
        };
        self.known.iter().map(|(attachment, entry)| Ok((attachment.clone(), sum(&entry.endpoint)?))).collect()
    }

    /// What the packet path of Services has done, by `EVENT_*`.
    pub fn service_events(&self) -> Result<[u64; EVENT_COUNT as usize], DatapathError> {
        let mut counts = [0; EVENT_COUNT as usize];
        for (which, count) in (0u32..).zip(&mut counts) {
            let per_cpu = self.events.get(&which, 0).map_err(DatapathError::Counters)?;
            *count = per_cpu.iter().sum();
        }
        Ok(counts)
    }
}

fn add(total: &mut Counters, one: &Counters) {
    total.ingress_packets += one.ingress_packets;
    total.ingress_bytes += one.ingress_bytes;
    total.egress_packets += one.egress_packets;
    total.egress_bytes += one.egress_bytes;
    total.ingress_short += one.ingress_short;
    total.egress_short += one.egress_short;
    total.spoofed += one.spoofed;
    total.denied_ingress += one.denied_ingress;
    total.denied_egress += one.denied_egress;
}
