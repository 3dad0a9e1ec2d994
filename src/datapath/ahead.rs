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
}

impl Load {
    pub fn run(mut self) -> Result<Loaded, DatapathError> {
        let programs = self.loader.load(self.endpoint)?;
        Ok(Loaded { endpoint: self.endpoint, _taken: self.taken, programs })
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
        Load { endpoint, taken, loader: Loader::new(pins) }
    }

    pub(super) fn put(&mut self, loaded: Loaded) {
        self.ready.push(loaded);
    }

    pub(super) fn take(&mut self) -> Option<Loaded> {
        self.ready.pop()
    }
}
