//! Whether the node's network is ready, asked like containerd asks; and GC.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::unix::pipe::Receiver;

use super::Context;
use super::cni::CniError;

/// Ask STATUS regularly and when a configuration appears; tell everyone.
pub(super) async fn keep(context: Arc<Context>) {
    let changes = watch_folder(&context.config.dirs.net_d)
        .map_err(|e| tracing::debug!(target: "lab", "watching net.d: {e}"))
        .ok();
    let mut status = tokio::time::interval(context.config.status_interval);
    status.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut gc =
        tokio::time::interval_at(tokio::time::Instant::now() + context.config.gc_interval, context.config.gc_interval);
    let mut told = None;
    loop {
        tokio::select! {
            _ = status.tick() => {}
            () = changed(changes.as_ref()) => {}
            _ = gc.tick() => {
                if let Err(e) = self::gc(&context).await {
                    tracing::info!(target: "lab", node = context.config.node, "{e}");
                }
                continue;
            }
        }
        let ready = ask(&context).await;
        context.network.send_if_modified(|old| std::mem::replace(old, ready.clone()) != ready);
        if told.as_ref() != Some(&ready) {
            if let Err(why) = &ready {
                tracing::info!(target: "lab", node = context.config.node, "NotReady: {why}");
            }
            // An API server that is away must not stop STATUS: try next time.
            if context.sink.node_ready(&ready).await.is_ok() {
                told = Some(ready);
            }
        }
    }
}

async fn ask(context: &Context) -> Result<(), String> {
    let list = context.runner.load().map_err(|e| format!("Network plugin returns error: {e}"))?;
    if list.knows_status_and_gc() {
        context.runner.status(&list).await.map_err(|e| format!("Network plugin returns error: {e}"))?;
    }
    Ok(())
}

/// Tell the plugins which sandboxes exist.
pub(super) async fn gc(context: &Context) -> Result<(), CniError> {
    let Ok(list) = context.runner.load() else { return Ok(()) };
    if !list.knows_status_and_gc() || list.disable_gc {
        return Ok(());
    }
    let valid: Vec<String> = context.live.lock().iter().cloned().collect();
    context.runner.gc(&list, &valid).await
}

/// A stream of changes in the folder; what they are does not matter.
fn watch_folder(dir: &Path) -> io::Result<Receiver> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let flags = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
    inotify.add_watch(dir, flags)?;
    // Read like a pipe: tokio's safe way to wait for any descriptor.
    Receiver::from_owned_fd_unchecked(OwnedFd::from(inotify))
}

async fn changed(folder: Option<&Receiver>) {
    let Some(folder) = folder else { return std::future::pending().await };
    if folder.readable().await.is_ok() {
        let mut events = [0; 4096];
        while folder.try_read(&mut events).is_ok_and(|n| n > 0) {}
    }
}
