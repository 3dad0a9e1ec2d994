//! The kernel's answers: links, addresses, routes, rules, queues, filters.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fairway::fuzz::netlink(data));
