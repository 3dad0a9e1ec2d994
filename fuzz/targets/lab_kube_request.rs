//! Path, query and Accept header of a request to the Kubernetes stand-in, one a line.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.split('\n');
    let mut next = || lines.next().unwrap_or_default();
    fairway::fuzz::kube_request(next(), next(), next());
});
