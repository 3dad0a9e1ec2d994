//! The ledger's tail: as a disk gives it back, and with bodies that its digests
//! vouch for.
#![no_main]

use fairway::fuzz::{ledger_frame, ledger_tail, ledger_written};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((number, data)) = data.split_first_chunk() else { return };
    let number = u64::from_be_bytes(*number);
    let (writes, whole) = ledger_tail(data, number);
    assert!(whole <= data.len() && (whole > 0 || writes.is_empty()));

    // The data as the body of one frame, and its first half after a whole one.
    let mut tail = ledger_frame(number, data);
    let (writes, whole) = ledger_tail(&tail, number);
    assert!(whole == 0 || whole == tail.len());
    if whole > 0 {
        let again = ledger_written(number, &writes);
        assert_eq!(ledger_tail(&again, number), (writes.clone(), again.len()), "what we read we write");
    }
    let torn = tail.clone();
    tail.extend_from_slice(&torn[..torn.len() / 2]);
    assert_eq!(ledger_tail(&tail, number), (writes, whole), "half a frame says nothing");
    assert_eq!(ledger_tail(&tail, number.wrapping_add(1)).1, 0, "nor does another tail's");
});
