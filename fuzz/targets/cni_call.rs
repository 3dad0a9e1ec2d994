//! What the shim hands the agent, and through it anyone who may call the shim.
#![no_main]

use fairway::cni::spec::{Call, PodArgs};
use fairway::cni::{spool, wire};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<wire::Request>(data) {
        let _ = Call::parse(&request);
        let framed = wire::frame(&request);
        assert!(framed.is_err() || framed.is_ok_and(|f| f.len() > 4));
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = PodArgs::parse(text);
        if let Some((container, ifname)) = spool::parse_name(text) {
            assert_eq!(spool::file_name(container, ifname), text, "a spool name has one spelling");
        }
    }
});
