//! Promise: in the lab, clients outside the nodes reach Services by node ports
//! and load balancers, as their policies say; and nobody notices that pods come
//! and go.

mod e2e_support;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e_support::pods::{first4, ns, pod};
use e2e_support::{Lab, lab, missing, skip};
use fairway::lab::vpc::edge::OUTSIDE4;
use fairway::lab::vpc::ns::Netns;
use fairway::lab::workload::client::Ask;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

fn service(name: &str, spec: Value) -> Value {
    let port =
        |protocol: &str| json!({"name": protocol.to_lowercase(), "port": 80, "targetPort": 8080, "protocol": protocol});
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
        "spec": {"selector": {"app": "web"}, "ports": [port("TCP"), port("UDP")]},
    });
    e2e_support::lay(&mut service["spec"], spec);
    service
}

/// The node port, the same of both protocols or not: TCP's and UDP's.
fn node_ports(lab: &Lab, name: &str) -> [u16; 2] {
    let service = lab.kube().get("Service", "default", name).unwrap();
    [0, 1].map(|n| service["spec"]["ports"][n]["nodePort"].as_u64().unwrap().try_into().unwrap())
}

async fn balancer(lab: &Lab, name: &str) -> IpAddr {
    lab.until("an address of the load balancer", PATIENCE, async || {
        let service = lab.kube().get("Service", "default", name).ok_or("no Service")?;
        let ip = service["status"]["loadBalancer"]["ingress"][0]["ip"].as_str();
        ip.and_then(|ip| ip.parse().ok()).ok_or_else(|| service["status"].to_string())
    })
    .await
}

/// Who answers, and whom they see, by both protocols at their ports.
async fn seen(from: &Netns, ip: IpAddr, ports: [u16; 2]) -> Result<(BTreeSet<String>, BTreeSet<String>), String> {
    let (mut names, mut peers) = (BTreeSet::new(), BTreeSet::new());
    let [tcp, udp] = ports.map(|port| SocketAddr::new(ip, port));
    for _ in 0..16 {
        names.insert(Ask::new(tcp).tcp(from).await.map_err(|e| format!("tcp: {e}"))?.text);
        names.insert(Ask::new(udp).udp(from).await.map_err(|e| format!("udp: {e}"))?.text);
        peers.insert(Ask::peer(tcp).tcp(from).await.map_err(|e| format!("tcp: {e}"))?.text);
        peers.insert(Ask::peer(udp).udp(from).await.map_err(|e| format!("udp: {e}"))?.text);
    }
    Ok((names, peers))
}

/// Until exactly these answer and see exactly this one.
async fn expect(lab: &Lab, what: &str, from: &Netns, ip: IpAddr, ports: [u16; 2], names: &[&str], peer: IpAddr) {
    let wanted = (names.iter().map(|n| (*n).to_owned()).collect(), BTreeSet::from([peer.to_string()]));
    lab.until(what, PATIENCE, async || match seen(from, ip, ports).await? {
        seen if seen == wanted => Ok(()),
        other => Err(format!("{other:?} instead of {wanted:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_ports_and_load_balancers_serve_clients_outside_as_their_policies_say() {
    let test = "node_ports_and_load_balancers_serve_clients_outside_as_their_policies_say";
    if let Some(missing) = missing() {
        return skip(test, missing);
    }
    let lab = lab("so", 2, |_| ()).await;
    for (name, node, exclusive) in [("web0", 0, false), ("web1", 1, false), ("web2", 1, true), ("ask", 0, false)] {
        let mut made = pod(name, &lab.node(node).name, exclusive);
        if name.starts_with("web") {
            made["metadata"]["labels"] = json!({"app": "web"});
        }
        lab.kube().apply(made).unwrap();
    }
    for name in ["web0", "web1", "web2"] {
        lab.ready(name).await;
    }
    let ask = lab.ready("ask").await;
    let mut by_nodes = service("local", json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}));
    by_nodes["metadata"]["annotations"] = json!({"service.beta.kubernetes.io/backend-type": "ecs"});
    let near = service("near", json!({"internalTrafficPolicy": "Local"}));
    for made in [service("web", json!({"type": "LoadBalancer"})), by_nodes, near] {
        lab.kube().apply(made).unwrap();
    }

    let (vm, outside) = (lab.site.vm.clone(), lab.site.outside.clone());
    let vm4: IpAddr = "10.0.240.10".parse().unwrap();
    let all = ["web0", "web1", "web2"];
    let nodes = [0, 1].map(|n| lab.node(n).addresses[0]);
    for (n, node) in nodes.into_iter().enumerate() {
        let what = format!("the node port of node {n}");
        expect(&lab, &what, &vm, node, node_ports(&lab, "web"), &all, node).await;
        let own: &[&str] = if n == 0 { &["web0"] } else { &["web1", "web2"] };
        expect(&lab, &format!("{what}, Local"), &vm, node, node_ports(&lab, "local"), own, vm4).await;
    }
    // Straight to pods' addresses, and by node ports.
    for name in ["web", "local"] {
        let vip = balancer(&lab, name).await;
        expect(&lab, &format!("the load balancer of {name}"), &outside, vip, [80, 80], &all, OUTSIDE4.into()).await;
        // From inside it is short-cut: from the backend's own node, too.
        expect(&lab, &format!("{name} from a pod"), &ns(&ask), vip, [80, 80], &all, first4(&ask)).await;
    }
    let near =
        lab.kube().get("Service", "default", "near").unwrap()["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
    expect(&lab, "internalTrafficPolicy Local", &ns(&ask), near, [80, 80], &["web0"], first4(&ask)).await;

    // The pod of node 0 goes: Local says nothing there, Cluster goes on.
    lab.delete("web0");
    lab.gone("web0").await;
    expect(&lab, "node 0 without a pod", &vm, nodes[0], node_ports(&lab, "web"), &["web1", "web2"], nodes[0]).await;
    let [tcp, _] = node_ports(&lab, "local");
    let silent = Ask::new(SocketAddr::new(nodes[0], tcp)).within(Duration::from_millis(500)).tcp(&vm).await;
    assert!(matches!(silent, Err(fairway::lab::workload::client::AskError::Timeout(_))), "{silent:?}");
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_client_notices_that_pods_come_and_go() {
    if let Some(missing) = missing() {
        return skip("no_client_notices_that_pods_come_and_go", missing);
    }
    let lab = lab("sc", 2, |_| ()).await;
    let deployment = |replicas: u32| {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": "default", "name": "web"},
            "spec": {
                "replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {
                    // As everywhere, what serves on while the news goes round is not noticed to end.
                    "containers": [{
                        "name": "c", "image": "registry.example/c:1", "ports": [{"containerPort": 8080}],
                        "lifecycle": {"preStop": {"sleep": {"seconds": 3}}},
                    }],
                }},
            },
        })
    };
    lab.kube().apply(deployment(2)).unwrap();
    lab.create(0, "ask", false);
    let ask = ns(&lab.ready("ask").await);
    lab.kube().apply(service("web", json!({"type": "LoadBalancer"}))).unwrap();
    let service = lab.kube().get("Service", "default", "web").unwrap();
    let cluster_ip: IpAddr = service["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
    let vip = balancer(&lab, "web").await;
    let [tcp, udp] = node_ports(&lab, "web");
    let node = lab.node(1).addresses[0];
    let (vm, outside) = (lab.site.vm.clone(), lab.site.outside.clone());
    let clients = [
        ("a pod", ask, SocketAddr::new(cluster_ip, 80), SocketAddr::new(cluster_ip, 80)),
        ("a VM", vm, SocketAddr::new(node, tcp), SocketAddr::new(node, udp)),
        ("somebody outside", outside, SocketAddr::new(vip, 80), SocketAddr::new(vip, 80)),
    ];
    let answering = async |count: usize| {
        for (who, from, tcp, _) in &clients {
            lab.until(&format!("{count} pods to answer {who}"), PATIENCE, async || {
                let mut names = BTreeSet::new();
                for _ in 0..8 * count {
                    names.insert(Ask::new(*tcp).tcp(from).await.map_err(|e| e.to_string())?.text);
                }
                if names.len() == count { Ok(()) } else { Err(format!("{names:?}")) }
            })
            .await;
        }
    };
    answering(2).await;

    let (stop, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = async |who: &str, from: &Netns, tcp: SocketAddr, udp: SocketAddr| {
        while !stop.load(Ordering::Relaxed) {
            let tcp = Ask::new(tcp).tcp(from).await.map_err(|e| format!("{who}, tcp: {e}"))?;
            let udp = Ask::new(udp).udp(from).await.map_err(|e| format!("{who}, udp: {e}"))?;
            assert!(tcp.text.starts_with("web-") && udp.text.starts_with("web-"));
            asked.fetch_add(2, Ordering::Relaxed);
        }
        Ok::<(), String>(())
    };
    let scale = async || {
        for replicas in [6, 1, 4, 2] {
            lab.kube().apply(deployment(replicas)).unwrap();
            answering(replicas as usize).await;
        }
        stop.store(true, Ordering::Relaxed);
        Ok(())
    };
    let [(a, from_a, tcp_a, udp_a), (b, from_b, tcp_b, udp_b), (c, from_c, tcp_c, udp_c)] = &clients;
    let done = tokio::try_join!(
        load(a, from_a, *tcp_a, *udp_a),
        load(b, from_b, *tcp_b, *udp_b),
        load(c, from_c, *tcp_c, *udp_c),
        scale()
    );
    done.unwrap();
    println!("{} questions, all answered", asked.load(Ordering::Relaxed));
    lab.down().await;
}
