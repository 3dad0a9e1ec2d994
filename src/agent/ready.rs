//! When the agent is ready: what must stand before pods are sent to this node,
//! each with what is still awaited, in words.

use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use super::programs::Programs;
use crate::debug::ReadyCheck;
use crate::pool::snapshot::PoolSnapshot;
use crate::service::status::ServiceSnapshot;

/// Ledger, cloud and kernel agree.
pub fn pool(seen: watch::Receiver<Arc<PoolSnapshot>>) -> (&'static str, ReadyCheck) {
    let check = move || match seen.borrow().reconciled {
        true => Ok(()),
        false => Err("reconciling ledger, cloud and kernel".to_owned()),
    };
    ("pool", Arc::new(check))
}

/// The socket that the conflist leads kubelet to. The conflist itself is written
/// before the agent starts (`fairway install-cni`).
pub fn cni(socket: PathBuf) -> (&'static str, ReadyCheck) {
    let check = move || match std::fs::symlink_metadata(&socket) {
        Ok(meta) if meta.file_type().is_socket() => Ok(()),
        Ok(_) => Err(format!("{} is not a socket: pods cannot start; restart the agent", socket.display())),
        Err(e) => Err(format!("the socket {}: {e}: pods cannot start", socket.display())),
    };
    ("cni", Arc::new(check))
}

/// The kernel's maps say what the cluster says, or what it said to an earlier run.
pub fn services(seen: watch::Receiver<Arc<ServiceSnapshot>>) -> (&'static str, ReadyCheck) {
    ("services", Arc::new(move || seen.borrow().ready()))
}

/// This build's programs are in force, rather than those of an earlier layout.
pub fn programs(programs: Arc<Programs>) -> (&'static str, ReadyCheck) {
    let check = move || match programs.is_held() {
        false => Ok(()),
        true => Err("an earlier layout's programs are in force until the new maps are filled".to_owned()),
    };
    ("programs", Arc::new(check))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_ready_after_the_first_complete_sync_and_say_what_is_awaited() {
        let (sender, seen) = watch::channel(Arc::new(ServiceSnapshot::default()));
        let (_, check) = services(seen);
        assert!(check().unwrap_err().contains("the start"));
        sender.send_modify(|s| Arc::make_mut(s).awaited = Some("the first full list of Services".to_owned()));
        assert_eq!(check().unwrap_err(), "waiting for the first full list of Services");
        sender.send_modify(|s| Arc::make_mut(s).adopted = true);
        assert_eq!(check(), Ok(()), "they go on as an earlier run left them");
        sender.send_modify(|s| Arc::make_mut(s).adopted = false);
        sender.send_modify(|s| (Arc::make_mut(s).awaited, Arc::make_mut(s).syncs) = (None, 1));
        assert_eq!(check(), Ok(()));
    }

    #[test]
    fn the_socket_must_stand() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cni.sock");
        let (_, check) = cni(path.clone());
        assert!(check().unwrap_err().contains("pods cannot start"));
        std::fs::write(&path, "").unwrap();
        assert!(check().unwrap_err().contains("not a socket"));
        std::fs::remove_file(&path).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(check(), Ok(()));
    }
}
