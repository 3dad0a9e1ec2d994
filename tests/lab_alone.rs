//! Parts of the lab on their own: `fairway lab cloud` and `fairway lab kube-api`
//! as two processes, agents that somebody starts by hand in namespaces of their
//! own, and pods that the shim is called for.

#[path = "support/skip.rs"]
mod skipping;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fairway::debug::Listen;
use fairway::lab::node::down;
use fairway::lab::vpc::name::LabId;
use fairway::lab::vpc::ns::OwnedNetns;
use fairway::lab::workload::client::ping;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use skipping::{IP, NFT, missing_of, skip};

/// A process that ends in good order when it is dropped.
struct Running(Child);

impl Running {
    /// Start it and read what it says up to a line with these words.
    fn until_says(mut command: Command, words: &str) -> (Self, Vec<String>) {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let running = Self(child);
        let mut said = Vec::new();
        for line in lines {
            said.push(line);
            if said.last().unwrap().contains(words) {
                return (running, said);
            }
        }
        panic!("it did not say {words:?}: {said:?}")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(15) && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Swept(LabId);

impl Drop for Swept {
    fn drop(&mut self) {
        let _ = down::sweep(&self.0);
    }
}

fn lab(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fairway"));
    command.arg("lab").args(args);
    command
}

/// A node by hand: an agent in a namespace, with its own folder.
struct ByHand {
    dir: PathBuf,
    _agent: Running,
}

impl ByHand {
    async fn start(dir: &Path, netns: &str, node: &str, ca: &str, kubeconfig: &Path) -> Self {
        let dir = dir.join(node);
        std::fs::create_dir_all(&dir).unwrap();
        let api = "https://100.100.0.10";
        let config = json!({
            "node": node, "state_dir": dir.join("state"), "bpffs": null,
            "cloud": {"endpoints": {"ecs": api, "vpc": api, "metadata": "http://100.100.100.200"}, "ca_file": ca},
            "pool": {"cluster_id": "by-hand"},
            "cni": {"socket": dir.join("cni.sock"), "spool_dir": dir.join("spool")},
            "cluster": {"source": {"kubeconfig": kubeconfig}},
            "debug": {"listen": dir.join("debug.sock")},
        });
        let path = dir.join("agent.yaml");
        std::fs::write(&path, config.to_string()).unwrap();
        let log = std::fs::File::create(dir.join("agent.log")).unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns, env!("CARGO_BIN_EXE_fairway"), "agent", "--config"]).arg(path);
        let agent = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let this = Self { dir, _agent: Running(agent) };
        let socket = Listen::Unix(this.dir.join("debug.sock"));
        let began = Instant::now();
        while let Err(e) = fairway::status::client::get_text(&socket, "/readyz").await {
            let log = || std::fs::read_to_string(this.dir.join("agent.log")).unwrap();
            assert!(began.elapsed() < Duration::from_secs(30), "the agent is not ready: {e}\n{}", log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        this
    }

    fn shim(&self, verb: &str, id: &str, pod: &OwnedNetns) -> Value {
        let config = json!({
            "cniVersion": "1.0.0", "name": "fairway", "type": "fairway-cni",
            "socket": self.dir.join("cni.sock"), "spoolDir": self.dir.join("spool"),
        });
        let mut child = Command::new(env!("CARGO_BIN_EXE_fairway-cni"))
            .env_clear()
            .envs([("CNI_COMMAND", verb), ("CNI_CONTAINERID", id), ("CNI_IFNAME", "eth0"), ("CNI_PATH", "/")])
            .env("CNI_NETNS", pod.path())
            .env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={id}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{verb}: {said}");
        if said.trim().is_empty() { Value::Null } else { serde_json::from_str(&said).unwrap() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_by_hand_serve_pods_from_a_cloud_and_an_api_server_of_their_own() {
    if let Some(missing) = missing_of(&[NFT, IP]) {
        return skip("agents_by_hand_serve_pods_from_a_cloud_and_an_api_server_of_their_own", missing);
    }
    let id: LabId = format!("al{}", std::process::id()).parse().unwrap();
    let swept = Swept(id.clone());
    let dir = tempfile::tempdir().unwrap();
    let [a, b, pod_a, pod_b] =
        ["a", "b", "pa", "pb"].map(|n| OwnedNetns::create(&format!("fwt-{}-{n}", std::process::id())).unwrap());

    let kubeconfig = dir.path().join("kubeconfig");
    let path = kubeconfig.to_str().unwrap();
    let (kube_api, _) =
        Running::until_says(lab(&["kube-api", "--listen", "127.0.0.1:0", "--kubeconfig", path]), "Kubernetes API at");
    // Only what a test may not have: fixed ports of this machine.
    let config = dir.path().join("cloud.yaml");
    std::fs::write(&config, "{https: null, metadata: null, admin: '127.0.0.1:0'}").unwrap();
    let args = ["cloud", "--id", id.as_str(), "--config", config.to_str().unwrap(), "--node", a.name()];
    let mut command = lab(&args);
    command.args(["--latency-scale", "0.02", "--kubeconfig", path]);
    let (cloud, said) = Running::until_says(command, "Ctrl-C");
    let word = |of: &str| {
        let line = said.iter().find(|l| l.starts_with(of)).unwrap_or_else(|| panic!("no {of}: {said:?}"));
        line.split_whitespace().nth(1).unwrap().to_owned()
    };

    // The second node comes over HTTP; both have booted from their ENI.
    let spec =
        json!({"instance_id": "i-b", "instance_type": "ecs.g7.2xlarge", "vswitch": "vsw-lab-b", "netns": b.name()});
    let registered = post(&format!("{}/lab/instances", word("admin")), &spec);
    assert_eq!(registered["instance"]["id"], "i-b", "{registered}");
    for ns in [&a, &b] {
        ping(ns, "100.100.0.10".parse().unwrap(), Duration::from_secs(2)).await.unwrap();
    }

    let in_vpc = PathBuf::from(word("kubeconfig"));
    let (ca, dir) = (word("CA"), dir.path());
    let nodes =
        [ByHand::start(dir, a.name(), "a", &ca, &in_vpc).await, ByHand::start(dir, b.name(), "b", &ca, &in_vpc).await];
    let address = |said: Value| -> std::net::IpAddr {
        said["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap()
    };
    let of_a = address(nodes[0].shim("ADD", "pod-a", &pod_a));
    let of_b = address(nodes[1].shim("ADD", "pod-b", &pod_b));
    ping(&pod_a, of_b, Duration::from_secs(2)).await.unwrap();
    ping(&pod_b, of_a, Duration::from_secs(2)).await.unwrap();
    nodes[0].shim("DEL", "pod-a", &pod_a);
    assert!(ping(&pod_b, of_a, Duration::from_millis(300)).await.is_err(), "the address answers after DEL");
    nodes[1].shim("DEL", "pod-b", &pod_b);

    drop(nodes);
    drop((cloud, kube_api));
    assert_eq!(down::sweep(&id).unwrap(), down::Swept::default(), "left behind");
    drop(swept);
}

/// POST JSON by hand: the admin interface is for curl.
fn post(url: &str, body: &Value) -> Value {
    use std::io::Read as _;
    let (host, path) = url.trim_start_matches("http://").split_once('/').unwrap();
    let body = body.to_string();
    let mut stream = std::net::TcpStream::connect(host).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let head =
        format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 201"), "{answer}");
    serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"))
}
