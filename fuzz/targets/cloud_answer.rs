//! The cloud API's answers.
#![no_main]

use fairway::cloud::aliyun::{decode, errors};
use fairway::cloud::provider::Api;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = decode::done(data);
    let _ = decode::created_eni(data);
    let _ = decode::enis(data);
    let _ = decode::assigned_ipv4(data);
    let _ = decode::assigned_ipv6(data);
    let _ = decode::instance_limits(data, "ecs.g7.2xlarge");
    let _ = decode::vswitches(data);
    for status in [200, 400, 403, 429, 500, 503] {
        let _ = errors::refusal(Api::AttachNetworkInterface, status, None, data);
    }
});
