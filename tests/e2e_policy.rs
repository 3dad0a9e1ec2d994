//! Promise: in the lab, pods reach each other as the Kubernetes API says that
//! NetworkPolicies let them, in every mode; a denial is a silence, and stays one.

mod e2e_support;
mod policy_support {
    pub mod matrix;
}

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use e2e_support::{Lab, lab, missing, skip};
use fairway::lab::vpc::ns::Netns;
use fairway::lab::workload::client::Ask;
use policy_support::matrix::{Case, Matrix, clear, pod, running, settled};
use serde_json::json;

async fn large(letter: &str) -> Lab {
    lab(letter, 2, |config| {
        for node in &mut config.nodes {
            node.instance_type = "ecs.g7.4xlarge".to_owned();
        }
    })
    .await
}

/// As [`large`], with agents that come back half a second after they are killed.
async fn restarting(letter: &str) -> Lab {
    let lab = large(letter).await;
    for node in 0..2 {
        lab.start_agent(node, &[], Some(Duration::from_millis(500))).await;
        lab.agent_ready(node).await;
    }
    lab
}

/// Every case of the table, one after the other.
async fn every_case(lab: &Lab, exclusive: bool) {
    let matrix = Matrix::up(lab, exclusive).await;
    let mut wrong = Vec::new();
    for case in Case::all() {
        matrix.apply(lab, &case);
        settled(lab, case.policies.len()).await;
        // The news has reached both nodes; what pods' addresses mean may take a moment
        // after the first pods are up. Then twice: a denial stays one.
        let began = std::time::Instant::now();
        let mut differences = matrix.differences(&case).await;
        while !differences.is_empty() && began.elapsed() < Duration::from_secs(8) {
            differences = matrix.differences(&case).await;
        }
        if differences.is_empty() {
            differences = matrix.differences(&case).await;
        }
        if !differences.is_empty() {
            differences.truncate(12);
            wrong.push(format!("{}:\n  {}", case.case, differences.join("\n  ")));
        }
    }
    clear(lab);
    assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), lab.last_words());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_of_the_documentation_holds_for_pods_that_share_enis() {
    if let Some(missing) = missing() {
        return skip("every_case_of_the_documentation_holds_for_pods_that_share_enis", missing);
    }
    let lab = large("pv").await;
    every_case(&lab, false).await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_of_the_documentation_holds_for_pods_with_enis_of_their_own() {
    if let Some(missing) = missing() {
        return skip("every_case_of_the_documentation_holds_for_pods_with_enis_of_their_own", missing);
    }
    let lab = large("px").await;
    every_case(&lab, true).await;
    lab.down().await;
}

/// Asks all the time what may never be answered, from a pod's namespace.
async fn forbidden(from: &Netns, to: IpAddr, over: &AtomicBool, asked: &AtomicU64) -> Result<(), String> {
    while !over.load(Ordering::Relaxed) {
        let at = SocketAddr::new(to, 80);
        let within = Duration::from_millis(50);
        let (tcp, udp) = tokio::join!(Ask::new(at).within(within).tcp(from), Ask::new(at).within(within).udp(from));
        for (how, said) in [("tcp", tcp), ("udp", udp)] {
            if let Ok(answer) = said {
                return Err(format!("{how} to {at} was let through: {answer:?}"));
            }
        }
        asked.fetch_add(2, Ordering::Relaxed);
    }
    Ok(())
}

/// Until it is answered; how long that took.
async fn allowed(lab: &Lab, what: &str, from: &Netns, to: IpAddr) -> Duration {
    let began = Instant::now();
    lab.until(what, Duration::from_secs(15), async || {
        let at = SocketAddr::new(to, 80);
        let within = Duration::from_millis(300);
        Ask::new(at).within(within).tcp(from).await.map_err(|e| format!("tcp: {e}"))?;
        Ask::new(at).within(within).udp(from).await.map_err(|e| format!("udp: {e}"))?;
        Ok(())
    })
    .await;
    began.elapsed()
}

fn fairway(lab: &Lab, args: &[&str]) -> (bool, String) {
    let socket = lab.node(0).debug_socket();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fairway"));
    let out = command.args(args).arg("--endpoint").arg(&socket).output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

/// The node of `x/a` says why, by address and by name, and how often.
async fn explained(lab: &Lab, to: IpAddr, stranger: &Netns) {
    for (from, to, allowed, why) in [
        ("x/b", format!("{to}:80"), true, "let through by x/own ingress[0]"),
        ("x/b", "x/a:80/udp".to_owned(), true, "let through by x/own ingress[0]"),
        ("y/b", format!("{to}:80"), false, "no rule of these policies opens TCP 80 to"),
        ("y/b", "x/a:80".to_owned(), false, "x/own"),
        ("node", "x/a:80".to_owned(), true, "the node always reaches its own pods"),
        ("x/a", "y/b:80".to_owned(), true, "no policy isolates the pod in this direction"),
    ] {
        let (passes, text) = fairway(lab, &["trace", from, &to]);
        assert!(passes == allowed && text.contains(why), "{from} to {to}: {passes}\n{text}");
    }
    let (_, text) = fairway(lab, &["trace", "x/b", "x/nobody:80"]);
    assert!(text.contains("no pod x/nobody"), "{text}");
    let (_, text) = fairway(lab, &["status", "policy"]);
    for words in ["1 policies", "x/own ingress[0]", "FLOWS LET THROUGH"] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
    // Denials are told with both ends.
    lab.until("a denial to be told", Duration::from_secs(10), async || {
        let asked = Ask::new(SocketAddr::new(to, 80)).within(Duration::from_millis(100)).tcp(stranger).await;
        assert!(asked.is_err());
        let (_, text) = fairway(lab, &["status", "services"]);
        if text.contains("denied ingress") { Ok(()) } else { Err(text) }
    })
    .await;
}

/// `x/a` is open to `app: b` of its own namespace alone, whatever happens.
async fn under_churn(lab: &Lab, exclusive: bool) {
    let mut matrix = Matrix::up(lab, exclusive).await;
    let policy = |name: &str, peer: serde_json::Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "x", "name": name},
            "spec": {"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": [peer]}]},
        })
    };
    lab.kube().apply(policy("own", json!({"podSelector": {"matchLabels": {"app": "b"}}}))).unwrap();
    settled(lab, 1).await;
    let (over, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let to = matrix.pods["x/a"].1;
    let (stranger, other) = (matrix.pods["y/b"].0.clone(), matrix.pods["x/c"].0.clone());
    allowed(lab, "x/b to reach x/a", &matrix.pods["x/b"].0.clone(), to).await;
    explained(lab, to, &stranger).await;
    let churn = async {
        let home = lab.node(1).name.clone();
        for round in 0..4 {
            // The friend comes back with another address.
            lab.kube().delete("Pod", "x", "b").unwrap();
            lab.until("x/b to be gone", Duration::from_secs(30), async || match lab.kube().get("Pod", "x", "b") {
                None => Ok(()),
                Some(_) => Err("it is there".to_owned()),
            })
            .await;
            lab.kube().apply(pod("x", "b", &home, exclusive)).unwrap();
            let (friend, ip) = running(lab, "x", "b").await;
            let took = allowed(lab, "the friend's new address to be let in", &friend, to).await;
            println!("round {round}: a new address was let in after {took:?}");
            matrix.pods.insert("x/b".to_owned(), (friend, ip));
            // A label that does not fit, and one that does.
            for (label, fits) in [("z", false), ("b", true)] {
                let mut made = pod("x", "b", &home, exclusive);
                made["metadata"]["labels"]["app"] = json!(label);
                lab.kube().apply(made).unwrap();
                let friend = matrix.pods["x/b"].0.clone();
                if fits {
                    allowed(lab, "the label that fits to count", &friend, to).await;
                } else {
                    lab.until("the label that does not fit to count", Duration::from_secs(10), async || {
                        let at = SocketAddr::new(to, 80);
                        match Ask::new(at).within(Duration::from_millis(200)).tcp(&friend).await {
                            Err(_) => Ok(()),
                            Ok(_) => Err("still let in".to_owned()),
                        }
                    })
                    .await;
                }
            }
            // Policies come and go that let others in, but never those two.
            for flap in 0..3 {
                lab.kube().apply(policy("more", json!({"ipBlock": {"cidr": format!("192.0.2.{flap}/32")}}))).unwrap();
                lab.kube().apply(policy("also", json!({"namespaceSelector": {"matchLabels": {"team": "z"}}}))).unwrap();
                tokio::time::sleep(Duration::from_millis(30)).await;
                lab.kube().delete("NetworkPolicy", "x", "more").unwrap();
                lab.kube().delete("NetworkPolicy", "x", "also").unwrap();
            }
            // And the agents die, each in its turn.
            lab.node(round % 2).node.kill_agent().await.unwrap();
            let friend = matrix.pods["x/b"].0.clone();
            allowed(lab, "the friend, with the agent away", &friend, to).await;
            lab.agent_ready(round % 2).await;
            settled(lab, 1).await;
            let took = allowed(lab, "the friend, after a restart", &friend, to).await;
            println!("round {round}: after a restart it took {took:?}");
        }
        over.store(true, Ordering::Relaxed);
        Ok(())
    };
    let done = tokio::try_join!(forbidden(&stranger, to, &over, &asked), forbidden(&other, to, &over, &asked), churn);
    done.unwrap();
    println!("{} forbidden questions, none answered", asked.load(Ordering::Relaxed));
    assert!(asked.load(Ordering::Relaxed) > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_forbidden_passes_while_pods_policies_and_agents_come_and_go() {
    if let Some(missing) = missing() {
        return skip("nothing_forbidden_passes_while_pods_policies_and_agents_come_and_go", missing);
    }
    let lab = restarting("pc").await;
    under_churn(&lab, false).await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_does_it_where_pods_have_enis_of_their_own() {
    if let Some(missing) = missing() {
        return skip("nor_does_it_where_pods_have_enis_of_their_own", missing);
    }
    let lab = restarting("pd").await;
    under_churn(&lab, true).await;
    lab.down().await;
}
