//! The agent's configuration file.
#![no_main]

use fairway::config::Config;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = Config::parse(text) {
        let _ = config.pool.validate();
        let _ = config.cloud.validate();
    }
});
