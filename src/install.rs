//! `fairway install-cni`: puts the shim and the network configuration in place.
//!
//! The shim first, the conflist last: a runtime that sees the conflist starts
//! calling the shim. Both are replaced atomically, so that a kubelet in the
//! middle of a call sees the old file or the new one.

use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The shim's name, as the network configuration has it.
pub const SHIM: &str = "fairway-cni";

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
            "type": SHIM,
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

/// The shim that this program carries; none where the build had no static C
/// library to link it with (`build/shim.rs`).
pub fn carried_shim() -> Option<&'static [u8]> {
    const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/fairway-cni"));
    (!PROGRAM.is_empty()).then_some(PROGRAM)
}

/// The given shim, or the one carried, or the one that lies beside this program
/// (for tests: one folder up).
pub fn shim(given: Option<&Path>) -> Result<Cow<'static, [u8]>, InstallError> {
    let read =
        |path: &Path| fs::read(path).map(Cow::Owned).map_err(|cause| InstallError { path: path.to_owned(), cause });
    match (given, carried_shim()) {
        (Some(path), _) => read(path),
        (None, Some(program)) => Ok(Cow::Borrowed(program)),
        (None, None) => {
            let own = std::env::current_exe().unwrap_or_default();
            let beside: Vec<PathBuf> = own.ancestors().skip(1).take(2).map(|dir| dir.join(SHIM)).collect();
            let found = beside.iter().find(|path| path.exists()).or(beside.first());
            read(found.map_or(Path::new(SHIM), PathBuf::as_path))
        }
    }
}

/// Install the shim into `bin_dir`, then the conflist as `10-fairway.conflist` into
/// `conf_dir`.
pub fn install(shim: &[u8], bin_dir: &Path, conf_dir: &Path, conflist: &Conflist) -> Result<(), InstallError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |cause| InstallError { path, cause }
    };
    for dir in [bin_dir, conf_dir] {
        fs::create_dir_all(dir).map_err(at(dir))?;
    }
    replace(&bin_dir.join(SHIM), shim, 0o755).map_err(at(bin_dir))?;
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
        let (bin, conf) = (dir.path().join("bin"), dir.path().join("net.d"));
        for _ in 0..2 {
            install(b"#!", &bin, &conf, &conflist()).unwrap();
        }
        assert_eq!(fs::metadata(bin.join("fairway-cni")).unwrap().permissions().mode() & 0o777, 0o755);
        let written: Value = serde_json::from_slice(&fs::read(conf.join("10-fairway.conflist")).unwrap()).unwrap();
        assert_eq!(written["plugins"][0]["type"], "fairway-cni");
        assert_eq!(fs::read_dir(&conf).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_named_shim_is_taken_and_a_missing_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shim");
        let error = shim(Some(&path)).unwrap_err();
        assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
        fs::write(&path, b"#!").unwrap();
        assert_eq!(*shim(Some(&path)).unwrap(), *b"#!");
    }
}
