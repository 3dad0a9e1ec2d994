//! The ledger's records, as a disk gives them back: one a line, key and value.
#![no_main]

use std::collections::BTreeMap;

use fairway::pool::ledger::{decode, encode};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut records = BTreeMap::new();
    for line in data.split(|b| *b == b'\n') {
        let at = line.iter().position(|b| *b == b' ').unwrap_or(line.len());
        let (key, value) = line.split_at(at);
        records.insert(String::from_utf8_lossy(key).into_owned(), value.get(1..).unwrap_or_default().to_vec());
    }
    if let Ok(state) = decode(&records) {
        let written = encode(&state).expect("a state can be written");
        let again = decode(&written).expect("what we write we read");
        assert_eq!(encode(&again).unwrap(), written);
    }
});
