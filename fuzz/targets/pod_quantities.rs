//! The values of a pod's annotations: quantities and durations.
#![no_main]

use fairway::cni::wishes;
use fairway::lab::kube::quantity;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = wishes::quantity(text);
    if let Some(duration) = wishes::duration(text) {
        let again = wishes::duration(&format!("{}s", duration.as_secs()));
        assert_eq!(again, Some(duration), "seconds say the same");
    }
    let _ = quantity::milli(text);
});
