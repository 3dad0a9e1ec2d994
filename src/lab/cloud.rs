//! The simulated cloud: API, metadata service, injected faults.
