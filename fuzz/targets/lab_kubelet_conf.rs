//! A network configuration list in /etc/cni/net.d.
#![no_main]

use fairway::lab::kubelet::conf::{ConfList, Version};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Version::parse(text);
    if let Ok(list) = ConfList::parse("10-net.conflist", text) {
        assert!(!list.plugins.is_empty() && !list.name.is_empty());
    }
});
