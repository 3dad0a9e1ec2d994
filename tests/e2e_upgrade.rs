//! Promise: killing the agent and starting a build whose maps have another layout,
//! with a thousand connections a second to a Service and datagrams beside them,
//! costs no connection and no flow.

mod e2e_support;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use e2e_support::pods::{ns, pod};
use e2e_support::{Lab, lab, missing, skip};
use fairway::lab::vpc::ns::Netns;
use fairway_ebpf_abi::LAYOUT_VERSION;
use serde_json::json;

/// Together some 1,400 connections a second.
const WORKERS: usize = 7;
const PACE: Duration = Duration::from_millis(5);
const FLOWS: usize = 16;

/// Connections from one namespace, each asked and answered, at a pace.
struct Load {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    workers: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(from: &[&Netns], to: SocketAddr) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let worker = |n: usize| {
            let (stop, made, from) = (stop.clone(), made.clone(), from[n % from.len()].clone());
            std::thread::spawn(move || {
                from.enter().unwrap();
                let mut lost = Vec::new();
                let mut next = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    match connection(to) {
                        Ok(()) => drop(made.fetch_add(1, Ordering::Relaxed)),
                        Err(e) => lost.push(e.to_string()),
                    }
                    // The next one is due when it is due, however long this one took.
                    next += PACE;
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                lost
            })
        };
        let workers = (0..WORKERS).map(worker).collect();
        Self { stop, made, workers }
    }

    fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    fn end(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
    }
}

fn connection(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"who\n")?;
    let mut line = String::new();
    match BufReader::new(stream).read_line(&mut line)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Flows of datagrams from a namespace, asked in turn all the time.
struct Datagrams {
    stop: Arc<AtomicBool>,
    worker: JoinHandle<(u64, BTreeMap<usize, Vec<String>>)>,
}

impl Datagrams {
    fn start(from: &Netns, to: SocketAddr) -> Self {
        let (stop, from) = (Arc::new(AtomicBool::new(false)), from.clone());
        let told = stop.clone();
        let worker = std::thread::spawn(move || {
            from.enter().unwrap();
            let bind = || {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
                socket
            };
            let sockets: Vec<UdpSocket> = (0..FLOWS).map(|_| bind()).collect();
            let mut said: BTreeMap<usize, Vec<String>> = BTreeMap::new();
            let mut asked = 0;
            while !told.load(Ordering::Relaxed) {
                for (n, socket) in sockets.iter().enumerate() {
                    socket.send_to(b"who", to).unwrap();
                    let mut buffer = [0; 256];
                    let answer = match socket.recv_from(&mut buffer) {
                        Ok((len, from)) if from == to => String::from_utf8_lossy(&buffer[..len]).trim().to_owned(),
                        Ok((_, from)) => format!("an answer from {from}"),
                        Err(e) => format!("none: {e}"),
                    };
                    let said = said.entry(n).or_default();
                    if said.last() != Some(&answer) {
                        said.push(answer);
                    }
                    asked += 1;
                }
                std::thread::sleep(PACE);
            }
            (asked, said)
        });
        Self { stop, worker }
    }

    /// How many were asked, and who answered each flow, one after the other.
    fn end(self) -> (u64, BTreeMap<usize, Vec<String>>) {
        self.stop.store(true, Ordering::Relaxed);
        self.worker.join().unwrap()
    }
}

/// Until the agent's programs are in force, after a start with another layout.
async fn taken_over(lab: &Lab, version: u32) {
    let root = lab.node(0).node.dirs().root.join("bpf/fairway");
    lab.until("the earlier layout to be gone", Duration::from_secs(60), async || {
        let names = std::fs::read_dir(&root).map_err(|e| e.to_string())?;
        let names: Vec<_> = names.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        if names == [format!("v{version}")] { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_under_load_costs_no_connection_and_no_flow() {
    if let Some(missing) = missing() {
        return skip("an_upgrade_under_load_costs_no_connection_and_no_flow", missing);
    }
    let lab = lab("up", 2, |_| ()).await;
    for (name, node) in [("web0", 0), ("web1", 0), ("web2", 1), ("ask", 0)] {
        let mut made = pod(name, &lab.node(node).name, false);
        if name.starts_with("web") {
            made["metadata"]["labels"] = json!({"app": "web"});
        }
        lab.kube().apply(made).unwrap();
    }
    for name in ["web0", "web1", "web2"] {
        lab.ready(name).await;
    }
    let ask = ns(&lab.ready("ask").await);
    let at = lab.serve_web();
    lab.until("all backends in the maps", Duration::from_secs(20), async || {
        let explained = lab.view(0, &format!("/debug/trace?from=node&to={at}")).await?["service"].clone();
        let chosen = explained["backends"].as_array().map_or(0, |b| b.iter().filter(|b| !b["slot"].is_null()).count());
        if chosen == 3 { Ok(()) } else { Err(explained.to_string()) }
    })
    .await;

    // The second one leaves the tables of Services behind: flows may move, but none
    // goes unanswered.
    for (version, changed, stay) in
        [(LAYOUT_VERSION + 1, "FLOWS,LINKS", true), (LAYOUT_VERSION + 2, "FRONTENDS", false)]
    {
        let datagrams = Datagrams::start(&ask, at);
        let node = lab.node(0).node.ns().clone();
        let (began, load) = (Instant::now(), Load::start(&[&ask, &node], at));
        lab.until("some load", Duration::from_secs(20), async || {
            if load.made() > 1000 { Ok(()) } else { Err(format!("{} connections", load.made())) }
        })
        .await;
        lab.node(0).node.kill_agent().await;
        lab.start_agent(0, &[("FAIRWAY_LAYOUT", &format!("{version}:{changed}"))], None).await;
        taken_over(&lab, version).await;
        lab.agent_ready(0).await;
        let after = load.made() + 1000;
        lab.until("load with the new programs", Duration::from_secs(20), async || {
            if load.made() > after { Ok(()) } else { Err(format!("{} connections", load.made())) }
        })
        .await;
        let (made, seconds) = (load.made(), began.elapsed().as_secs_f64());
        let lost = load.end();
        let (asked, said) = datagrams.end();
        println!(
            "layout {version} ({changed}): {made} connections in {seconds:.1} s, {:.0}/s, {} lost; {asked} datagrams of {FLOWS} flows",
            made as f64 / seconds,
            lost.len()
        );
        assert!(
            lost.is_empty(),
            "{} lost, the first: {:?}\n{}",
            lost.len(),
            &lost[..lost.len().min(5)],
            lab.last_words()
        );
        for (flow, said) in &said {
            assert!(said.iter().all(|s| s.starts_with("web")), "flow {flow} was answered by {said:?}");
            assert!(!stay || said.len() == 1, "flow {flow} has moved: {said:?}");
        }
        assert!(made as f64 / seconds >= 1000.0, "the load was too light: {made} in {seconds:.1} s");
    }
    // What pods need to go past the stack is there as before.
    let endpoints = lab.view(0, "/debug/endpoints").await.unwrap();
    let short: Vec<_> = endpoints.as_array().unwrap().iter().map(|e| e["short"].as_bool()).collect();
    assert_eq!(short, [Some(true); 3], "{endpoints:#}");
    lab.down().await;
}
