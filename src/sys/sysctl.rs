//! Kernel settings below /proc/sys: read, and written with or without a look.
//!
//! /proc/sys/net is that of the calling thread's network namespace.

use std::io;
use std::path::PathBuf;

/// Set `net.<path>` (slashes, as below /proc/sys/net) if it differs; true when it
/// did. For settings of all devices, where a write walks them all even when
/// nothing changes.
pub fn set_net(path: &str, value: &str) -> io::Result<bool> {
    let file = PathBuf::from("/proc/sys/net").join(path);
    if std::fs::read_to_string(&file)?.trim() == value {
        return Ok(false);
    }
    std::fs::write(&file, value)?;
    Ok(true)
}

/// Write `net.<path>` without looking.
pub fn write_net(path: &str, value: &str) -> io::Result<()> {
    // Not `fs::write`: there is nothing to create or to truncate.
    let mut file = std::fs::OpenOptions::new().write(true).open(PathBuf::from("/proc/sys/net").join(path))?;
    io::Write::write_all(&mut file, value.as_bytes())
}

/// Read `net.<path>`; `None` when this kernel has no such setting.
pub fn get_net(path: &str) -> io::Result<Option<String>> {
    match std::fs::read_to_string(PathBuf::from("/proc/sys/net").join(path)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
