//! Pods and nodes, as the API server sends them, and what a pod wishes by its
//! annotations and `runtimeConfig`.
#![no_main]

use fairway::cluster::convert;
use fairway::cni::wishes::{self, Known};
use fairway::model::AttachMode;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(pod) = serde_json::from_slice(data)
        && let Some((_, info)) = convert::pod(pod)
    {
        let known = Known { annotations: Some(&info.annotations), node_labels: Some(&info.labels), ..Known::default() };
        if let Ok(wishes) = wishes::decide(&known) {
            let mode = wishes::mode(known.annotations, known.node_labels, AttachMode::Veth);
            assert_eq!(mode.ok(), Some(wishes.mode), "who expects a pod and who wires it agree");
        }
    }
    if let Ok(node) = serde_json::from_slice(data) {
        convert::node(node);
    }
    if let Ok(value) = serde_json::from_slice(data) {
        let _ = wishes::decide(&Known { runtime_bandwidth: Some(&value), ..Known::default() });
    }
});
