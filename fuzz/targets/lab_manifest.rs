//! Manifest files given to `fairway lab run`.
#![no_main]

use fairway::lab::manifest;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = manifest::parse(data);
});
