//! Small things with a spelling: pin directories' names, hardware addresses,
//! cores in sysfs, the Host header of a debug request.
#![no_main]

use fairway::fuzz;
use fairway::model::Mac;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(again) = fuzz::pin_name(text) {
        assert_eq!(again, text, "a pin name has one spelling");
    }
    if let Ok(mac) = text.parse::<Mac>() {
        assert_eq!(mac.to_string().parse().ok(), Some(mac));
    }
    let (cores, again) = fuzz::cores(text);
    assert_eq!(cores, again);
    let _ = fuzz::is_local(text);
    let _ = fuzz::nft_counters(text);
});
