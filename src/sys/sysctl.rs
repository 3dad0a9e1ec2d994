//! Kernel settings below /proc/sys.
//!
//! /proc/sys/net is that of the calling thread's network namespace. A setting is
//! read first and written only when it differs: some writes walk every device
//! even when nothing changes.

use std::io;
use std::path::PathBuf;

/// Set `net.<path>` (slashes, as below /proc/sys/net). True when it was changed.
pub fn set_net(path: &str, value: &str) -> io::Result<bool> {
    let file = PathBuf::from("/proc/sys/net").join(path);
    if std::fs::read_to_string(&file)?.trim() == value {
        return Ok(false);
    }
    std::fs::write(&file, value)?;
    Ok(true)
}

/// Read `net.<path>`; `None` when this kernel has no such setting.
pub fn get_net(path: &str) -> io::Result<Option<String>> {
    match std::fs::read_to_string(PathBuf::from("/proc/sys/net").join(path)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
