//! `fairway install-cni`: puts the shim and the network configuration in place.
//!
//! The shim first, the conflist last: a runtime that sees the conflist starts
//! calling the shim. Both are replaced atomically, so that a kubelet in the
//! middle of a call sees the old file or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The network configuration's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflist {
    pub cni_version: String,
    pub socket: PathBuf,
    pub spool: PathBuf,
    /// Chain the reference `portmap` plugin after Fairway (for hostPort).
    pub portmap: bool,
}

impl Conflist {
    pub fn render(&self) -> Value {
        let mut plugins = vec![json!({
            "type": "fairway-cni",
            "socket": self.socket,
            "spoolDir": self.spool,
            "capabilities": { "bandwidth": true, "portMappings": true, "io.kubernetes.cri.pod-annotations": true },
        })];
        if self.portmap {
            plugins.push(json!({ "type": "portmap", "snat": false, "capabilities": { "portMappings": true } }));
        }
        json!({ "cniVersion": self.cni_version, "name": "fairway", "plugins": plugins })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{path}: {cause}")]
pub struct InstallError {
    path: PathBuf,
    cause: io::Error,
}

/// Install the shim from `shim` into `bin_dir`, then the conflist as
/// `10-fairway.conflist` into `conf_dir`.
pub fn install(shim: &Path, bin_dir: &Path, conf_dir: &Path, conflist: &Conflist) -> Result<(), InstallError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |cause| InstallError { path, cause }
    };
    for dir in [bin_dir, conf_dir] {
        fs::create_dir_all(dir).map_err(at(dir))?;
    }
    let program = fs::read(shim).map_err(at(shim))?;
    replace(&bin_dir.join("fairway-cni"), &program, 0o755).map_err(at(bin_dir))?;
    let text = format!("{:#}\n", conflist.render());
    replace(&conf_dir.join("10-fairway.conflist"), text.as_bytes(), 0o600).map_err(at(conf_dir))
}

/// Replace a file so that readers see all of the old content or all of the new,
/// and so does a machine that loses power.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("no parent folder"))?;
    let name = path.file_name().ok_or_else(|| io::Error::other("no file name"))?.to_string_lossy();
    // A runtime reads every *.conflist of its folder: this name is not one.
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn conflist() -> Conflist {
        Conflist {
            cni_version: "1.0.0".into(),
            socket: "/run/f.sock".into(),
            spool: "/var/spool".into(),
            portmap: true,
        }
    }

    #[test]
    fn the_shim_is_executable_and_the_conflist_parses() {
        let dir = tempfile::tempdir().unwrap();
        let shim = dir.path().join("shim");
        fs::write(&shim, b"#!").unwrap();
        let (bin, conf) = (dir.path().join("bin"), dir.path().join("net.d"));
        for _ in 0..2 {
            install(&shim, &bin, &conf, &conflist()).unwrap();
        }
        assert_eq!(fs::metadata(bin.join("fairway-cni")).unwrap().permissions().mode() & 0o777, 0o755);
        let written: Value = serde_json::from_slice(&fs::read(conf.join("10-fairway.conflist")).unwrap()).unwrap();
        assert_eq!(written["plugins"][0]["type"], "fairway-cni");
        assert_eq!(fs::read_dir(&conf).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn without_the_shim_no_conflist_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("net.d");
        let error = install(&dir.path().join("missing"), &dir.path().join("bin"), &conf, &conflist()).unwrap_err();
        assert!(error.to_string().contains("missing"));
        assert!(!conf.join("10-fairway.conflist").exists());
    }
}
