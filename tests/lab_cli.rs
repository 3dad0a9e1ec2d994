//! `fairway lab up|run|status|down` as a person uses them: separate processes,
//! and nothing left in the end, whatever happened in between.

#[path = "support/skip.rs"]
mod skipping;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use fairway::lab::cloud::LabCa;
use fairway::lab::node::down;
use fairway::lab::report::Report;
use fairway::lab::vpc::name::LabId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use skipping::{NFT, missing_of, skip};
use tokio_rustls::TlsAcceptor;

/// A lab's name; what is left of it goes when the test ends.
struct Named(LabId);

impl Named {
    fn new(letters: &str) -> Self {
        Self(format!("{letters}{}", std::process::id()).parse().unwrap())
    }
    fn id(&self) -> &str {
        self.0.as_str()
    }
    fn pid(&self) -> i32 {
        std::fs::read_to_string(self.0.state_dir().join("lab.pid")).unwrap().trim().parse().unwrap()
    }
    fn folder(&self) -> PathBuf {
        self.0.state_dir()
    }
    fn assert_nothing_left(&self) {
        assert_eq!(down::sweep(&self.0).unwrap(), down::Swept::default(), "left behind");
        let prefix = self.0.prefix();
        for dir in ["/var/run/netns", "/sys/fs/cgroup", "/sys/class/net", "/sys/fs/bpf"] {
            let left: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
            assert!(!left.iter().any(|n| n.to_string_lossy().starts_with(&prefix)), "{dir}: {left:?}");
        }
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(self.folder().to_str().unwrap()), "{table}");
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = down::sweep(&self.0);
    }
}

fn fairway(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fairway"));
    command.arg("lab").args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    fairway(args).output().unwrap()
}

fn good(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "lab {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

fn bad(args: &[&str]) -> String {
    let out = run(args);
    assert!(!out.status.success(), "lab {args:?}: {}", text(&out.stdout));
    text(&out.stderr)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// What a lab might change for the whole machine.
fn sysctls() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for dir in ["ipv4/conf/all", "ipv4/conf/default", "ipv6/conf/all", "ipv6/conf/default", "ipv4/neigh/default"] {
        for entry in std::fs::read_dir(Path::new("/proc/sys/net").join(dir)).into_iter().flatten().flatten() {
            if let Ok(value) = std::fs::read_to_string(entry.path()) {
                found.push((entry.path(), value));
            }
        }
    }
    for file in ["ipv4/ip_forward", "core/bpf_jit_enable", "core/rmem_max"] {
        let path = Path::new("/proc/sys/net").join(file);
        found.push((path.clone(), std::fs::read_to_string(path).unwrap_or_default()));
    }
    found.sort();
    found
}

fn manifest(dir: &Path) -> String {
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "image": "registry.example/c:1", "ports": [{"containerPort": 8080}]}]},
        }},
    });
    let unknown = json!({"apiVersion": "example.com/v1", "kind": "Gadget", "metadata": {"name": "g"}});
    let path = dir.join("web.yaml");
    std::fs::write(&path, format!("{deployment}\n---\n{unknown}\n")).unwrap();
    path.display().to_string()
}

fn report(out: &str) -> Report {
    serde_json::from_str(out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

fn assert_web(report: &Report) {
    assert!(report.ok(), "{report:?}");
    assert_eq!(report.pods.len(), 2, "{report:?}");
    assert!(report.pods.iter().all(|p| p.ready && p.name.starts_with("web-") && !p.addresses.is_empty()));
    assert_eq!(report.reach.len(), 4);
}

#[test]
fn a_lab_goes_on_in_the_background_and_takes_manifests() {
    if let Some(missing) = missing_of(&[NFT]) {
        return skip("a_lab_goes_on_in_the_background_and_takes_manifests", missing);
    }
    let (lab, dir, before) = (Named::new("ca"), tempfile::tempdir().unwrap(), sysctls());
    let web = manifest(dir.path());
    let up = run(&["up", "--id", lab.id(), "--nodes", "2", "--latency-scale", "0"]);
    let (out, err) = (text(&up.stdout), text(&up.stderr));
    assert!(up.status.success(), "{out}{err}");
    assert!(err.contains("node n2") && err.contains("the lab is up"), "progress: {err}");
    assert!(out.contains("kubeconfig get nodes") && out.contains(&format!("lab down --id {}", lab.id())), "{out}");
    let pid = lab.pid();
    assert!(alive(pid));

    let again = bad(&["up", "--id", lab.id()]);
    assert!(again.contains("running already") && again.contains("lab down --id"), "{again}");
    let json = good(&["run", "--id", lab.id(), &web, "--json"]);
    let first = report(&json);
    assert_web(&first);
    assert_eq!(first.skipped, ["Gadget g (example.com/v1)"]);
    // Once more changes nothing, and a person reads a table.
    let table = good(&["run", "--id", lab.id(), &web]);
    assert!(table.contains("reachability: 4 of 4"), "{table}");
    let shape = bad(&["run", "--id", lab.id(), &web, "--nodes", "3"]);
    assert!(shape.contains("is up and has its nodes already"), "{shape}");
    assert!(bad(&["run", "--id", lab.id(), "/no/such.yaml"]).contains("/no/such.yaml"));

    let line = good(&["status"]).lines().find(|l| l.starts_with(lab.id())).unwrap().to_owned();
    assert!(line.contains(" up ") && line.contains(&pid.to_string()), "{line}");
    assert_web(&report(&good(&["status", "--id", lab.id(), "--json"])));
    // Nobody else can speak with it.
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&lab.folder().join("lab.sock").metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    assert!(good(&["down", "--id", lab.id()]).contains("taken down"));
    assert!(!alive(pid));
    lab.assert_nothing_left();
    assert_eq!(sysctls(), before);
    assert!(good(&["down", "--id", lab.id()]).contains("nothing to remove"));
    let gone = bad(&["status", "--id", lab.id()]);
    assert!(gone.contains("lab up --id"), "{gone}");
}

#[test]
fn a_killed_lab_is_named_replaced_and_removed() {
    if let Some(missing) = missing_of(&[NFT]) {
        return skip("a_killed_lab_is_named_replaced_and_removed", missing);
    }
    let (lab, other) = (Named::new("cb"), Named::new("cc"));
    let up = ["up", "--id", lab.id(), "--nodes", "1", "--latency-scale", "0"];
    let strike = || {
        let pid = lab.pid();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        // Its last thread lets go of the lock a moment after its first has ended.
        while down::life(&lab.0) != down::Life::Dead {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    good(&up);
    strike();
    let line = good(&["status"]).lines().find(|l| l.starts_with(lab.id())).unwrap().to_owned();
    assert!(line.contains("dead"), "{line}");
    // Another lab tells of it.
    let noticed = run(&["up", "--id", other.id(), "--nodes", "1", "--latency-scale", "0"]);
    let err = text(&noticed.stderr);
    assert!(noticed.status.success(), "{err}");
    let sentence = err.lines().find(|l| l.contains(lab.id())).unwrap_or_else(|| panic!("{err}"));
    assert!(sentence.contains("fairway lab down --dead"), "{sentence}");
    // Of its own name it takes the place.
    let out = run(&up);
    let err = text(&out.stderr);
    assert!(out.status.success() && err.contains("that died had left"), "{err}");
    strike();
    assert!(good(&["down", "--id", lab.id()]).contains("namespaces"));
    lab.assert_nothing_left();
    good(&["down", "--id", other.id()]);
    other.assert_nothing_left();
}

/// Start a command and wait for a line of what it says.
fn until_says(mut child: Child, words: &str) -> Child {
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut said = Vec::new();
    for line in lines {
        said.push(line);
        if said.last().unwrap().contains(words) {
            return child;
        }
    }
    panic!("it did not say {words:?}: {said:?}")
}

#[test]
fn an_interrupted_lab_leaves_nothing() {
    if let Some(missing) = missing_of(&[NFT]) {
        return skip("an_interrupted_lab_leaves_nothing", missing);
    }
    let (lab, dir) = (Named::new("cd"), tempfile::tempdir().unwrap());
    let web = manifest(dir.path());
    for (args, words) in [
        (vec!["up", "--id", lab.id()], "VPC: router"),
        (vec!["up", "--id", lab.id()], "node n2"),
        (vec!["up", "--id", lab.id(), "--foreground"], "node n1"),
        (vec!["run", "--id", lab.id(), &web], "applying"),
    ] {
        let child = fairway(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut child = until_says(child, words);
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
        let began = Instant::now();
        assert!(!child.wait().unwrap().success(), "{args:?}");
        assert!(began.elapsed() < Duration::from_secs(20), "{args:?}: {:?}", began.elapsed());
        lab.assert_nothing_left();
    }
}

/// Interrupted while its kubelets make sandboxes, whose namespaces have names
/// that only the notes in the lab's folder tell to be this lab's.
#[test]
fn pods_namespaces_go_with_a_lab_that_is_interrupted_while_it_makes_them() {
    if let Some(missing) = missing_of(&[NFT]) {
        return skip("pods_namespaces_go_with_a_lab_that_is_interrupted_while_it_makes_them", missing);
    }
    let (lab, dir) = (Named::new("cg"), tempfile::tempdir().unwrap());
    let web = manifest(dir.path());
    let many = std::fs::read_to_string(&web).unwrap().replace("\"replicas\":2", "\"replicas\":16");
    assert!(many.contains("16"));
    std::fs::write(&web, many).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for pause in [0, 20, 40, 60] {
        let args = ["run", "--id", lab.id(), "--latency-scale", "0", &web];
        let child = fairway(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut child = until_says(child, "applying");
        let interrupt = Instant::now() + Duration::from_millis(pause);
        let mut told = false;
        while child.try_wait().unwrap().is_none() {
            if !told && Instant::now() > interrupt {
                kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
                told = true;
            }
            for node in ["n1", "n2"] {
                let notes =
                    std::fs::read_dir(lab.folder().join(node).join("sandboxes")).into_iter().flatten().flatten();
                let lines = notes.filter_map(|note| std::fs::read_to_string(note.path()).ok());
                seen.extend(lines.map(|line| PathBuf::from(line.trim())).filter(|p| p.is_absolute()));
            }
        }
        lab.assert_nothing_left();
    }
    assert!(!seen.is_empty(), "never interrupted in the middle");
    let left: Vec<_> = seen.into_iter().filter(|path| path.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn run_makes_a_lab_of_its_own_and_tells_what_failed() {
    if let Some(missing) = missing_of(&[NFT]) {
        return skip("run_makes_a_lab_of_its_own_and_tells_what_failed", missing);
    }
    let (lab, dir) = (Named::new("ce"), tempfile::tempdir().unwrap());
    let web = manifest(dir.path());
    let shape = ["run", "--id", lab.id(), "--nodes", "1", "--latency-scale", "0", "--json"];
    assert_web(&report(&good(&[&shape[..], &[&web]].concat())));
    lab.assert_nothing_left();

    let nowhere = dir.path().join("nowhere.yaml");
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "nowhere"}, "spec": {
        "nodeSelector": {"disk": "golden"}, "containers": [{"name": "c", "image": "registry.example/c:1"}]}});
    std::fs::write(&nowhere, pod.to_string()).unwrap();
    let out = run(&[&shape[..], &["--patience", "2", nowhere.to_str().unwrap()]].concat());
    assert!(!out.status.success());
    let failures = report(&text(&out.stdout)).failures;
    assert!(failures.iter().any(|f| f.contains("pod default/nowhere has no node")), "{failures:?}");
    lab.assert_nothing_left();
}

/// An API server that is another process's.
struct Elsewhere {
    child: Child,
    kubeconfig: PathBuf,
}

impl Elsewhere {
    fn start(dir: &Path) -> Self {
        let kubeconfig = dir.join("kubeconfig");
        let args = ["kube-api", "--listen", "127.0.0.1:0", "--kubeconfig", kubeconfig.to_str().unwrap()];
        let child = fairway(&args).stdout(Stdio::null()).spawn().unwrap();
        while !kubeconfig.exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, kubeconfig }
    }

    /// The same server as real ones are met: by its name, with a certificate for
    /// that name alone.
    async fn behind_tls(&self, dir: &Path) -> PathBuf {
        let ca = LabCa::generate("somebody's CA").unwrap();
        let tls = TlsAcceptor::from(ca.server(&["localhost".to_owned()]).unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let text = std::fs::read_to_string(&self.kubeconfig).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        let plain = config["clusters"][0]["cluster"]["server"].as_str().unwrap().replace("http://", "");
        let pem = base64::engine::general_purpose::STANDARD.encode(ca.pem());
        config["clusters"][0]["cluster"] =
            json!({"server": format!("https://localhost:{port}"), "certificate-authority-data": pem});
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, plain) = (tls.clone(), plain.clone());
                tokio::spawn(async move {
                    let mut stream = tls.accept(stream).await?;
                    let mut server = tokio::net::TcpStream::connect(plain).await?;
                    tokio::io::copy_bidirectional(&mut stream, &mut server).await
                });
            }
        });
        let path = dir.join("kubeconfig-tls");
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    async fn names(&self, path: &str) -> Vec<String> {
        let read = kube::config::Kubeconfig::read_from(&self.kubeconfig).unwrap();
        let config = kube::Config::from_custom_kubeconfig(read, &Default::default()).await.unwrap();
        let client = kube::Client::try_from(config).unwrap();
        let list: Value = client.request(http::Request::get(path).body(Vec::new()).unwrap()).await.unwrap();
        let items = list["items"].as_array().unwrap();
        items.iter().map(|o| o["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubeconfig_takes_the_stand_ins_place() {
    if let Some(missing) = missing_of(&[NFT]) {
        return skip("a_kubeconfig_takes_the_stand_ins_place", missing);
    }
    let (lab, dir) = (Named::new("cf"), tempfile::tempdir().unwrap());
    let web = manifest(dir.path());
    let there = Elsewhere::start(dir.path());
    let file = there.behind_tls(dir.path()).await.display().to_string();
    let up = ["up", "--id", lab.id(), "--nodes", "2", "--latency-scale", "0", "--kubeconfig", &file];
    good(&up);
    assert_eq!(there.names("/api/v1/nodes").await, ["n1", "n2"]);
    assert_eq!(there.names("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases").await, ["n1", "n2"]);
    // The lab's process serves no API of its own.
    let server = |path: &Path| -> String {
        let read: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        read["clusters"][0]["cluster"]["server"].as_str().unwrap().to_owned()
    };
    assert_eq!(server(&lab.folder().join("kubeconfig")), server(Path::new(&file)));

    assert_web(&report(&good(&["run", "--id", lab.id(), &web, "--json"])));
    assert_eq!(there.names("/api/v1/namespaces/default/pods").await.len(), 2, "made by its controllers");
    // The agents are heard there, too.
    let events = there.names("/apis/events.k8s.io/v1/namespaces/default/events").await;
    assert!(events.iter().any(|e| e.starts_with("web-")), "{events:?}");
    good(&["down", "--id", lab.id()]);
    assert_eq!(there.names("/api/v1/nodes").await, [""; 0]);
    lab.assert_nothing_left();

    // A lab that is killed leaves its nodes there; down finds them.
    good(&up);
    kill(Pid::from_raw(lab.pid()), Signal::SIGKILL).unwrap();
    while down::life(&lab.0) != down::Life::Dead {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(there.names("/api/v1/nodes").await.len(), 2);
    good(&["down", "--id", lab.id()]);
    assert_eq!(there.names("/api/v1/nodes").await, [""; 0]);

    // Somebody else's node of the same name is left alone.
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": {"providerID": "x"}});
    create_node(&there, object).await;
    let refused = bad(&up);
    assert!(refused.contains("node n1 that is not this lab's"), "{refused}");
    assert_eq!(there.names("/api/v1/nodes").await, ["n1"]);
    lab.assert_nothing_left();
    drop(there);
    let away = bad(&up);
    assert!(away.contains("does not answer"), "{away}");
    lab.assert_nothing_left();
}

async fn create_node(there: &Elsewhere, object: Value) {
    let read = kube::config::Kubeconfig::read_from(&there.kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(read, &Default::default()).await.unwrap();
    let client = kube::Client::try_from(config).unwrap();
    let api: kube::Api<k8s_openapi::api::core::v1::Node> = kube::Api::all(client);
    api.create(&Default::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
}
