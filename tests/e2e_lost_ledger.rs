//! The ledger is deleted under running pods: who they are is read back from the
//! kernel, so that DEL and ADD find their attachments at once.

mod e2e_support;

use std::time::Duration;

use e2e_support::direct::Sandbox;
use e2e_support::pods::{all_ask_all, asks};
use e2e_support::{Lab, lab, lay, missing, skip};
use serde_json::{Value, json};

/// The pool's line about the address of a pod.
async fn line_of(lab: &Lab, pod: &str) -> Option<Value> {
    let view = lab.view(0, "/debug/pool").await.unwrap();
    let addresses = view["addresses"].as_array().unwrap().clone();
    addresses.into_iter().find(|a| a["pod"] == json!({"namespace": "default", "name": pod}))
}

/// The pod holds no address any more; the view is published a moment later.
async fn released(lab: &Lab, pod: &str) {
    lab.until(&format!("{pod}'s address to be released"), Duration::from_secs(3), async || {
        match line_of(lab, pod).await {
            None => Ok(()),
            Some(line) => Err(line.to_string()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attachments_survive_the_loss_of_the_ledger() {
    if let Some(missing) = missing() {
        return skip("attachments_survive_the_loss_of_the_ledger", missing);
    }
    let lab = lab("ga", 1, |config| {
        config.dual = true;
        // With GC, which portmap of the reference plugins does not know.
        config.cni_version = "1.1.0".to_owned();
        config.plugins = None;
        // Nothing but DEL itself can be what releases an address in this test.
        lay(&mut config.agent, json!({"pool": {"sandbox_gone_after": "10m", "pod_gone_after": "10m"}}));
    })
    .await;
    lab.create(0, "shared", false);
    lab.create(0, "own", true);
    let pods = vec![lab.ready("shared").await, lab.ready("own").await];
    let by_hand = Sandbox::new(&lab, 0, "hand");
    by_hand.call(&lab, 0, "ADD").await.ips();
    asks(by_hand.ns(), &pods[0]).await.unwrap();

    for round in 0..2 {
        let node = &lab.node(0).node;
        node.stop_agent().await;
        std::fs::remove_dir_all(node.dirs().state.join("ledger")).unwrap();
        lab.start_agent(0, &[], Some(Duration::from_millis(200))).await;
        lab.agent_ready(0).await;
        let report = lab.view(0, "/debug/pool").await.unwrap()["ledger"].clone();
        assert_eq!(report["new"], true, "{report}");
        // The runtime's list is complete, so nobody is taken for stale.
        lab.node(0).kubelet.gc().await.unwrap();
        for pod in ["shared", "own"] {
            assert!(line_of(&lab, pod).await.is_some(), "round {round}: no lease says that it is {pod}'s");
            lab.node(0).kubelet.check("default", pod).await.unwrap();
        }
        all_ask_all(&pods).await.unwrap();
        if round == 0 {
            // GC has taken the sandbox that kubelet does not know: it was found.
            released(&lab, "hand").await;
        }
    }

    // ADD again for a sandbox that the ledger has forgotten: the same address.
    let again = Sandbox::new(&lab, 0, "again");
    let given_again = again.call(&lab, 0, "ADD").await.ips();
    let node = &lab.node(0).node;
    node.stop_agent().await;
    std::fs::remove_dir_all(node.dirs().state.join("ledger")).unwrap();
    lab.start_agent(0, &[], Some(Duration::from_millis(200))).await;
    lab.agent_ready(0).await;
    assert_eq!(again.call(&lab, 0, "ADD").await.ips(), given_again);
    asks(again.ns(), &pods[1]).await.unwrap();
    // DEL releases at once: the address is nobody's when it returns.
    assert!(again.call(&lab, 0, "DEL").await.ok);
    released(&lab, "again").await;
    for pod in ["shared", "own"] {
        lab.delete(pod);
        lab.gone(pod).await;
        released(&lab, pod).await;
    }
    drop((by_hand, again));
    lab.settled().await;
    lab.down().await;
}
