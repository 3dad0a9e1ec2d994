//! An object and a patch, one a line, through the stand-in's whole way of writing.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let at = data.iter().position(|b| *b == b'\n').unwrap_or(data.len());
    let (object, patch) = data.split_at(at);
    let Ok(object) = serde_json::from_slice(object) else { return };
    let patch = serde_json::from_slice(patch).unwrap_or_default();
    for seen in fairway::fuzz::kube_write(&object, &patch, jiff::Timestamp::UNIX_EPOCH) {
        assert!(seen.is_object());
        assert!(seen["metadata"]["name"].is_string() && seen["metadata"]["uid"].is_string(), "{seen}");
    }
});
