//! A `prevResult`, as another plugin printed it.
#![no_main]

use fairway::cni::result::{CniResult, Version};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(data) else { return };
    let Ok(result) = CniResult::read(&value) else { return };
    let latest = Version::parse("1.1.0").unwrap();
    let again = CniResult::read(&result.write(latest)).expect("what we write we read");
    assert_eq!(again.write(latest), result.write(latest));
});
