//! Receive queues over cores.
//!
//! Purpose: an ENI's receive queues are served by the cores that the device's
//! interrupts hit, for a paravirtual or lab device often one core for all. Each
//! queue of a device with several gets its own share of the cores (RPS), so that
//! pods spread over queues are served in parallel. Which queue serves whom is the
//! device's hash; what was set is reported.

use std::path::{Path, PathBuf};

/// How many receive queues a device really has; `None` when sysfs does not show
/// it (another namespace's mount).
pub(super) fn count(sysfs: &Path, device: &str) -> Option<u32> {
    Some(rx_queues(sysfs, device)?.len() as u32)
}

fn rx_queues(sysfs: &Path, device: &str) -> Option<Vec<PathBuf>> {
    let folder = sysfs.join("class/net").join(device).join("queues");
    let entries = std::fs::read_dir(folder).ok()?;
    let mut queues: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|e| {
            let number = e.file_name().to_str()?.strip_prefix("rx-")?.parse().ok()?;
            Some((number, e.path()))
        })
        .collect();
    queues.sort();
    Some(queues.into_iter().map(|(_, path)| path).collect())
}

/// Spread the queues of a device with several; one core list per queue, as read
/// back. Empty when there is nothing to spread.
pub(super) fn spread(sysfs: &Path, device: &str) -> Vec<String> {
    let queues = rx_queues(sysfs, device).unwrap_or_default();
    if queues.len() < 2 {
        return Vec::new();
    }
    let cores = online(sysfs);
    for (queue, mask) in queues.iter().zip(shares(queues.len(), &cores)) {
        let file = queue.join("rps_cpus");
        if current(queue).as_deref() != Some(&mask[..])
            && let Err(error) = std::fs::write(&file, format_mask(&mask))
        {
            // Packets arrive all the same, on one core.
            tracing::warn!(device, file = %file.display(), %error, "Receive queue not spread");
        }
    }
    report(sysfs, device)
}

/// The cores that serve each receive queue of a device, as the kernel has it.
/// Empty when none of them is spread.
pub(super) fn report(sysfs: &Path, device: &str) -> Vec<String> {
    let queues = rx_queues(sysfs, device).unwrap_or_default();
    let lists: Vec<String> = queues.iter().map(|q| format_list(&current(q).unwrap_or_default())).collect();
    if lists.iter().all(String::is_empty) { Vec::new() } else { lists }
}

fn current(queue: &Path) -> Option<Vec<u32>> {
    Some(parse_mask(std::fs::read_to_string(queue.join("rps_cpus")).ok()?.trim()))
}

/// How many cores are on.
pub(super) fn cores(sysfs: &Path) -> usize {
    online(sysfs).len()
}

/// The cores that are on; core 0 alone when sysfs does not say.
fn online(sysfs: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(sysfs.join("devices/system/cpu/online"))
        .or_else(|_| std::fs::read_to_string("/sys/devices/system/cpu/online"))
        .unwrap_or_default();
    let cores = parse_list(text.trim());
    if cores.is_empty() { vec![0] } else { cores }
}

/// One share of the cores per queue: every core serves some queue when there are
/// enough queues, and no two queues share a core when there are enough cores.
fn shares(queues: usize, cores: &[u32]) -> Vec<Vec<u32>> {
    (0..queues)
        .map(|queue| {
            if cores.len() >= queues {
                cores.iter().copied().enumerate().filter(|(i, _)| i % queues == queue).map(|(_, c)| c).collect()
            } else {
                vec![cores[queue % cores.len()]]
            }
        })
        .collect()
}

/// Comma-separated 32-bit words in hex, the highest first.
fn format_mask(cores: &[u32]) -> String {
    let words = cores.iter().max().map_or(1, |max| max / 32 + 1) as usize;
    let mut mask = vec![0u32; words];
    for core in cores {
        mask[(core / 32) as usize] |= 1 << (core % 32);
    }
    mask.iter().rev().map(|w| format!("{w:08x}")).collect::<Vec<_>>().join(",")
}

fn parse_mask(text: &str) -> Vec<u32> {
    let mut cores = Vec::new();
    for (place, word) in text.split(',').rev().enumerate() {
        let word = u32::from_str_radix(word, 16).unwrap_or(0);
        cores.extend((0..32).filter(|bit| word >> bit & 1 == 1).map(|bit| place as u32 * 32 + bit));
    }
    cores
}

/// `0-2,5`.
fn parse_list(text: &str) -> Vec<u32> {
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(from), Ok(to)) = (from.parse::<u32>(), to.parse::<u32>()) {
            cores.extend(from..=to.min(from.saturating_add(4096)));
        }
    }
    cores
}

/// The cores of a mask, and of the same mask written by us. A list is read too.
pub(crate) fn read_back(text: &str) -> (Vec<u32>, Vec<u32>) {
    let _ = parse_list(text);
    let cores = parse_mask(text);
    let again = parse_mask(&format_mask(&cores));
    (cores, again)
}

fn format_list(cores: &[u32]) -> String {
    cores.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn masks_are_written_as_the_kernel_reads_them() {
        assert_eq!(format_mask(&[0, 1]), "00000003");
        assert_eq!(format_mask(&[0, 33]), "00000002,00000001");
        assert_eq!(parse_list("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(parse_list("nonsense"), [] as [u32; 0]);
    }

    proptest! {
        #[test]
        fn a_mask_reads_back(cores in proptest::collection::btree_set(0u32..200, 0..20)) {
            let cores: Vec<u32> = cores.into_iter().collect();
            prop_assert_eq!(parse_mask(&format_mask(&cores)), cores);
        }

        #[test]
        fn every_queue_has_cores_and_every_core_a_queue(queues in 1usize..70, cores in 1u32..130) {
            let cores: Vec<u32> = (0..cores).collect();
            let shares = shares(queues, &cores);
            prop_assert_eq!(shares.len(), queues);
            prop_assert!(shares.iter().all(|s| !s.is_empty()));
            let mut used: Vec<u32> = shares.concat();
            let all = used.len();
            used.sort_unstable();
            used.dedup();
            if cores.len() >= queues {
                prop_assert_eq!(used.len(), all, "no core twice");
                prop_assert_eq!(used, cores);
            }
        }
    }
}
