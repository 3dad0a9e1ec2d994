//! Services in the lab: what the API server says is in every node's maps, can be
//! asked for on the command line, carries pods' and nodes' traffic, and outlives
//! the agent.

mod e2e_support;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use e2e_support::pods::{first4, ns, pod};
use e2e_support::{Lab, lab, missing, skip};
use fairway::lab::vpc::ns::Netns;
use fairway::lab::workload::client::Ask;
use serde_json::{Value, json};

fn fairway(lab: &Lab, node: usize, args: &[&str]) -> (bool, String) {
    let socket = lab.node(node).debug_socket();
    let out = Command::new(env!("CARGO_BIN_EXE_fairway")).args(args).arg("--endpoint").arg(&socket).output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

async fn trace(lab: &Lab, node: usize, from: &str, to: &str) -> Result<Value, String> {
    Ok(lab.view(node, &format!("/debug/trace?from={from}&to={to}")).await?["service"].clone())
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
        lab.kube().apply(web).unwrap();
        lab.ready(&name).await;
    }
    lab.kube()
        .apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"},
            "spec": {"type": "NodePort", "selector": {"app": "web"}, "externalTrafficPolicy": "Local",
                     "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]},
        }))
        .unwrap();
    let service = lab.kube().get("Service", "default", "web").unwrap();
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
    let address = lab.kube().get("Node", "", &lab.node(0).name).unwrap();
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

/// Who answers at a Service, asked some times by both protocols.
async fn answers(from: &Netns, at: SocketAddr) -> Result<BTreeSet<String>, String> {
    let mut seen = BTreeSet::new();
    for n in 0..16 {
        let (how, answer) =
            if n % 2 == 0 { ("tcp", Ask::new(at).tcp(from).await) } else { ("udp", Ask::new(at).udp(from).await) };
        seen.insert(answer.map_err(|e| format!("{how}: {e}"))?.text);
    }
    Ok(seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_and_nodes_reach_a_service_also_while_the_agent_is_dead() {
    if let Some(missing) = missing() {
        return skip("pods_and_nodes_reach_a_service_also_while_the_agent_is_dead", missing);
    }
    let lab = lab("st", 2, |_| ()).await;
    let mut records = Vec::new();
    for (name, node, exclusive) in
        [("web0", 0, false), ("web1", 1, false), ("web2", 1, true), ("ask0", 0, false), ("ask1", 0, true)]
    {
        let mut made = pod(name, &lab.node(node).name, exclusive);
        if name.starts_with("web") {
            made["metadata"]["labels"] = json!({"app": "web"});
        }
        lab.kube().apply(made).unwrap();
    }
    for name in ["web0", "web1", "web2", "ask0", "ask1"] {
        records.push(lab.ready(name).await);
    }
    let at = lab.serve_web();
    let all: BTreeSet<String> = ["web0", "web1", "web2"].map(str::to_owned).into();

    let mut clients: Vec<(String, Netns)> = records.iter().map(|r| (r.pod.name.clone(), ns(r))).collect();
    clients.extend((0..2).map(|n| (lab.node(n).name.clone(), lab.node(n).node.ns().clone())));
    for (who, from) in &clients {
        lab.until(&format!("every backend from {who}"), Duration::from_secs(20), async || {
            let seen = answers(from, at).await.map_err(|e| format!("{who}: {e}"))?;
            if seen == all { Ok(()) } else { Err(format!("{who} reached {seen:?}")) }
        })
        .await;
    }

    // Nobody is needed for that.
    lab.node(0).node.kill_agent().await;
    for (who, from) in &clients {
        answers(from, at).await.unwrap_or_else(|e| panic!("{who}, without an agent: {e}"));
    }
    lab.start_agent(0, &[], None).await;
    lab.agent_ready(0).await;

    // The last backend goes: refused, by both protocols, from everywhere; and a
    // process of the node that had connected to one finds out.
    let connected = lab.node(0).node.ns().run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    });
    let connected = connected.unwrap();
    for name in ["web0", "web1", "web2"] {
        lab.delete(name);
    }
    let told = tokio::task::spawn_blocking(move || connected.recv(&mut [0; 8]).unwrap_err().kind()).await.unwrap();
    assert_eq!(told, std::io::ErrorKind::ConnectionAborted);
    let clients = clients.iter().filter(|(who, _)| !who.starts_with("web"));
    for (who, from) in clients {
        lab.until(&format!("a refusal at {who}"), Duration::from_secs(20), async || {
            for answer in [Ask::new(at).tcp(from).await, Ask::new(at).udp(from).await] {
                match answer {
                    Err(fairway::lab::workload::client::AskError::Refused(_)) => {}
                    other => return Err(format!("{other:?}")),
                }
            }
            Ok(())
        })
        .await;
    }
    lab.down().await;
}
