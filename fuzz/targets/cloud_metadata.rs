//! The metadata service's answers.
#![no_main]

use std::net::{Ipv4Addr, Ipv6Addr};

use fairway::cloud::aliyun::metadata;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = metadata::parse_macs(data);
    let _ = metadata::parse_list::<Ipv4Addr>(data);
    let _ = metadata::parse_list::<Ipv6Addr>(data);
    let _ = metadata::parse_role_keys(data, jiff::Timestamp::UNIX_EPOCH);
});
