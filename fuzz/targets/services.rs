//! Services and EndpointSlices, as the API server sends them.
#![no_main]

use fairway::service::convert::{self, Names};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut names = Names::default();
    if let Ok(service) = serde_json::from_slice(data) {
        let _ = convert::service(service, &mut names);
    }
    if let Ok(slice) = serde_json::from_slice(data) {
        let _ = convert::slice(slice, &mut names);
    }
});
