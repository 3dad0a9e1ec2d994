//! What the lab itself asks of its cloud: instances, faults; and its configuration.
#![no_main]

use fairway::lab::cloud::{CloudConfig, FaultSpec, RegisterInstance};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = serde_json::from_slice::<RegisterInstance>(data);
    let _ = serde_json::from_slice::<FaultSpec>(data);
    let _ = serde_json::from_slice::<CloudConfig>(data);
});
