//! Services in the lab: what the API server says is in every node's maps, can be
//! asked for on the command line, and outlives the agent.

mod e2e_support;

use std::process::Command;
use std::time::Duration;

use e2e_support::pods::{first4, pod};
use e2e_support::{Lab, lab, missing, skip};
use serde_json::{Value, json};

fn fairway(lab: &Lab, node: usize, args: &[&str]) -> (bool, String) {
    let socket = lab.node(node).debug_socket();
    let out = Command::new(env!("CARGO_BIN_EXE_fairway")).args(args).arg("--endpoint").arg(&socket).output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

async fn trace(lab: &Lab, node: usize, from: &str, to: &str) -> Result<Value, String> {
    lab.view(node, &format!("/debug/trace?from={from}&to={to}")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_are_in_every_nodes_maps_and_outlive_the_agent() {
    if let Some(missing) = missing() {
        return skip("services_are_in_every_nodes_maps_and_outlive_the_agent", missing);
    }
    let lab = lab("sv", 2, |_| ()).await;
    for node in 0..2 {
        let name = format!("web{node}");
        let mut web = pod(&name, &lab.node(node).name, false);
        web["metadata"]["labels"] = json!({"app": "web"});
        lab.site.kube.apply(web).unwrap();
        lab.ready(&name).await;
    }
    lab.site
        .kube
        .apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"},
            "spec": {"type": "NodePort", "selector": {"app": "web"}, "externalTrafficPolicy": "Local",
                     "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]},
        }))
        .unwrap();
    let service = lab.site.kube.get("Service", "default", "web").unwrap();
    let at = format!("{}:80", service["spec"]["clusterIP"].as_str().unwrap());
    let mut before = Vec::new();
    for node in 0..2 {
        let explained = lab
            .until("the Service on each node", Duration::from_secs(30), async || {
                let explained = trace(&lab, node, "node", &at).await?;
                let chosen = explained["backends"].as_array().into_iter().flatten().filter(|b| !b["slot"].is_null());
                if chosen.count() == 2 { Ok(explained) } else { Err(explained.to_string()) }
            })
            .await;
        assert_eq!(explained["outcome"], "balanced");
        assert_eq!(explained["service"]["service"], "default/web");
        let status = lab.view(node, "/debug/services").await.unwrap();
        assert_eq!((&status["awaited"], status["problem_counts"].as_object().unwrap().len()), (&Value::Null, 0));
        before.push(explained);
    }

    // On the command line, from a pod, and from somebody outside at the node port.
    let (found, text) = fairway(&lab, 0, &["trace", "default/web0", &at]);
    let there = first4(&lab.record("web1").unwrap());
    assert!(found && text.contains("Service default/web") && text.contains(&format!("{there}:8080")), "{text}");
    let address = lab.site.kube.get("Node", "", &lab.node(0).name).unwrap();
    let address = address["status"]["addresses"][0]["address"].as_str().unwrap().to_owned();
    let port = service["spec"]["ports"][0]["nodePort"].to_string();
    let (found, text) = fairway(&lab, 0, &["trace", "outside", &format!("{address}:{port}")]);
    assert!(found && text.contains("one of 1 backends on this node"), "{text}");
    let (found, text) = fairway(&lab, 0, &["trace", "default/nobody", &at]);
    assert!(!found && text.contains("no pod default/nobody"), "{text}");
    let (found, text) = fairway(&lab, 0, &["status", "services"]);
    assert!(found && text.contains("Services carried") && text.contains("frontends"), "{text}");
    println!("{text}");

    // A new agent finds in the maps what the last one wrote, and numbers are kept.
    lab.node(0).node.stop_agent().await;
    lab.delete("web1");
    lab.gone("web1").await;
    lab.start_agent(0, &[], None).await;
    let after = lab
        .until("the Service without the pod that is gone", Duration::from_secs(30), async || {
            let explained = trace(&lab, 0, "node", &at).await?;
            if explained["backends"].as_array().is_some_and(|b| b.len() == 1) {
                Ok(explained)
            } else {
                Err(explained.to_string())
            }
        })
        .await;
    assert_eq!(after["service"]["set"], before[0]["service"]["set"]);
    let old = before[0]["backends"].as_array().unwrap();
    let same = old.iter().find(|b| b["addr"] == after["backends"][0]["addr"]).unwrap();
    assert_eq!(same["id"], after["backends"][0]["id"]);
    lab.down().await;
}
