//! The lab's controllers.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::kube::registry::Registry;

pub fn spawn(_registry: &Arc<Registry>, _stop: &watch::Receiver<bool>, _tasks: &mut JoinSet<()>) {}
