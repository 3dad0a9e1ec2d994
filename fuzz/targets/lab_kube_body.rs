//! A body for the Kubernetes stand-in, of the type that the first line names.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let at = data.iter().position(|b| *b == b'\n').unwrap_or(data.len());
    let (kind, rest) = data.split_at(at);
    let Ok(kind) = std::str::from_utf8(kind) else { return };
    let _ = fairway::fuzz::kube_body(kind, rest.get(1..).unwrap_or_default());
});
