//! CloudApi as the agent runs it, for tests of what goes over the wire.

use std::future::Future;

use fairway::actor::{ActorState, ChildPolicy, Handle, Placement, Registry, Tree};
use fairway::cloud::{CloudApi, CloudStats, Config};

/// Run a test with the actor, which ends after it.
pub fn with_cloud<F: Future<Output = ()>>(config: Config, test: impl FnOnce(Handle<CloudApi>, CloudStats) -> F) {
    fairway::actor::run(async {
        let registry = Registry::default();
        let mut tree = Tree::new(registry.clone(), Placement::Here, ChildPolicy::default());
        let stats = CloudStats::default();
        let counters = stats.clone();
        let cloud = tree.child(move || {
            let (config, stats) = (config.clone(), counters.clone());
            async move { CloudApi::new(&config, stats).await }
        });
        while registry.snapshot()[0].state != ActorState::Running {
            tokio::task::yield_now().await;
        }
        test(cloud, stats).await;
    });
}
