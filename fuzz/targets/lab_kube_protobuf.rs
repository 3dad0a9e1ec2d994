//! An object in Kubernetes' protobuf, without the four bytes that announce it.
#![no_main]

use fairway::lab::kube::protobuf;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = protobuf::decode(&[b"k8s\0", data].concat());
});
