//! What a client of the Kubernetes stand-in writes into a path or a query.
#![no_main]

use fairway::lab::kube::selector::{Fields, Labels};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Labels::parse(text);
    let _ = Fields::parse("Pod", text);
});
