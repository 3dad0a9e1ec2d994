//! Programs that are loaded before they are asked for.
//!
//! Owner: `Datapath`, whose lock is not held while they load. A number is taken as
//! long as somebody loads for it or holds what was loaded.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use fairway_ebpf_abi::Endpoint;

use super::DatapathError;
use super::pins::Pins;
use super::programs::{Loader, Programs};

#[derive(Default)]
pub(super) struct Ahead {
    taken: BTreeMap<Endpoint, Weak<()>>,
    ready: Vec<Loaded>,
    /// Making one reads the kernel's own types, megabytes of them: none is thrown
    /// away. There are as many as have been at work at once.
    loaders: Vec<Loader>,
}

/// To be run without the datapath.
pub struct Load {
    endpoint: Endpoint,
    taken: Arc<()>,
    loader: Loader,
}

/// Programs of one number.
pub struct Loaded {
    endpoint: Endpoint,
    _taken: Arc<()>,
    programs: Programs,
    loader: Option<Loader>,
}

impl Load {
    pub fn run(mut self) -> Result<Loaded, DatapathError> {
        let programs = self.loader.load(self.endpoint)?;
        Ok(Loaded { endpoint: self.endpoint, _taken: self.taken, programs, loader: Some(self.loader) })
    }
}

impl Loaded {
    pub(super) fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    pub(super) fn programs(self) -> Programs {
        self.programs
    }
}

impl Ahead {
    pub(super) fn has(&self, endpoint: Endpoint) -> bool {
        self.taken.get(&endpoint).is_some_and(|taken| taken.strong_count() > 0)
    }

    pub(super) fn begin(&mut self, endpoint: Endpoint, pins: &Pins) -> Load {
        self.taken.retain(|_, taken| taken.strong_count() > 0);
        let taken = Arc::new(());
        self.taken.insert(endpoint, Arc::downgrade(&taken));
        let loader = self.loaders.pop().unwrap_or_else(|| Loader::new(pins));
        Load { endpoint, taken, loader }
    }

    pub(super) fn put(&mut self, mut loaded: Loaded) {
        self.loaders.extend(loaded.loader.take());
        self.ready.push(loaded);
    }

    pub(super) fn take(&mut self) -> Option<Loaded> {
        self.ready.pop()
    }
}
