//! The stand-in, as the real `kubectl` sees it. Skipped where there is none.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "testdata/lab_kube/support.rs"]
mod support;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fairway::lab::kube::{KubeConfig, KubeLab, kubeconfig};
use serde_json::{Value, json};
use support::{kubelet, node, skipped, start, until};

struct Kubectl {
    program: PathBuf,
    minor: u32,
    home: tempfile::TempDir,
}

impl Kubectl {
    /// `FAIRWAY_KUBECTL`, or the one in the path.
    fn new(test: &str, address: SocketAddr) -> Option<Self> {
        let program = PathBuf::from(std::env::var_os("FAIRWAY_KUBECTL").unwrap_or_else(|| "kubectl".into()));
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("config"), kubeconfig(address)).unwrap();
        let version =
            Command::new(&program).args(["version", "--client", "-o", "json"]).env("HOME", home.path()).output();
        let Some(version) = version.ok().filter(|output| output.status.success()) else {
            skipped(test, "no kubectl in the path");
            return None;
        };
        let version: Value = serde_json::from_slice(&version.stdout).unwrap();
        let minor = version["clientVersion"]["minor"].as_str().unwrap().trim_end_matches('+').parse().unwrap();
        Some(Self { program, minor, home })
    }

    fn run(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = Command::new(&self.program)
            .args(arguments)
            .env("KUBECONFIG", self.home.path().join("config"))
            .env("HOME", self.home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// Must succeed; its output.
    async fn ok(&self, arguments: &[&str]) -> String {
        self.fed(arguments, "").await
    }

    async fn fed(&self, arguments: &[&str], input: &str) -> String {
        let output = self.output(arguments, input).await;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "kubectl {}: {out}{err}", arguments.join(" "));
        out.into_owned()
    }

    /// Must fail; its complaint.
    async fn refused(&self, arguments: &[&str], input: &str) -> String {
        let output = self.output(arguments, input).await;
        assert!(!output.status.success(), "kubectl {} should fail", arguments.join(" "));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    async fn output(&self, arguments: &[&str], input: &str) -> Output {
        // The server runs in this process: the runtime must not be blocked.
        tokio::task::block_in_place(|| self.run(arguments, input))
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.extend(["-o", "json"]);
        serde_json::from_str(&self.ok(&all).await).unwrap()
    }
}

fn manifest(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testdata/lab_kube").join(name);
    path.to_str().unwrap().to_owned()
}

async fn shop(lab: &KubeLab, kubectl: &Kubectl) -> tokio::task::JoinHandle<()> {
    for name in ["n1", "n2"] {
        node(lab.registry(), name, json!({"cpu": "8", "memory": "8Gi", "pods": "100"}));
    }
    let kubelet = kubelet(lab.registry());
    kubectl.ok(&["apply", "-f", &manifest("shop.yaml")]).await;
    until(lab.registry(), "Deployment", "shop", "three pods", |all| {
        all.iter().any(|d| d["status"]["availableReplicas"] == 3)
    })
    .await;
    until(lab.registry(), "StatefulSet", "shop", "two pods", |all| all[0]["status"]["readyReplicas"] == 2).await;
    kubelet
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_is_applied_shown_changed_and_deleted() {
    let (lab, address) = start(KubeConfig::default());
    let Some(kubectl) = Kubectl::new("a_manifest_is_applied_shown_changed_and_deleted", address) else { return };
    let _kubelet = shop(&lab, &kubectl).await;
    let file = manifest("shop.yaml");

    let again = kubectl.ok(&["apply", "-f", &file]).await;
    assert!(again.lines().all(|line| line.ends_with("unchanged")), "{again}");

    let pods = kubectl.ok(&["get", "pods", "-n", "shop", "-o", "wide"]).await;
    let header: Vec<&str> = pods.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(header[..7], ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE"]);
    assert_eq!(pods.lines().filter(|l| l.contains("Running") && l.contains(" n")).count(), 5, "{pods}");
    let all = kubectl.ok(&["get", "all,cm,netpol,ing,endpointslices,endpoints,sa,events", "-n", "shop"]).await;
    for name in
        ["deployment.apps/web", "statefulset.apps/db", "service/web", "configmap/web", "ingress.networking.k8s.io/web"]
    {
        assert!(all.contains(name), "{name} is not in {all}");
    }

    let described = kubectl.ok(&["describe", "-f", &file]).await;
    for text in ["NewReplicaSetAvailable", "Endpoints:  ", "PodSelector:", "Pod Template:", "ScalingReplicaSet"] {
        assert!(described.contains(text), "{text} is not in {described}");
    }
    let described = kubectl.ok(&["describe", "pod", "db-0", "-n", "shop"]).await;
    assert!(described.contains("Successfully assigned shop/db-0"), "{described}");
    let described = kubectl.ok(&["describe", "node", "n1"]).await;
    assert!(described.contains("Non-terminated Pods:"), "{described}");
    kubectl.ok(&["describe", "namespace", "shop"]).await;

    let text = std::fs::read_to_string(&file).unwrap().replace("image: web:1.0", "image: web:1.1");
    let changed = kubectl.fed(&["apply", "-f", "-"], &text).await;
    assert!(changed.contains("deployment.apps/web configured"), "{changed}");
    kubectl.ok(&["rollout", "status", "deployment/web", "-n", "shop", "--timeout=30s"]).await;
    let pods = kubectl.json(&["get", "pods", "-n", "shop", "-l", "app in (web)"]).await;
    let images: Vec<&Value> =
        pods["items"].as_array().unwrap().iter().map(|p| &p["spec"]["containers"][0]["image"]).collect();
    assert_eq!(images, ["web:1.1", "web:1.1", "web:1.1"]);
    kubectl.ok(&["rollout", "undo", "deployment/web", "-n", "shop"]).await;
    kubectl.ok(&["rollout", "status", "deployment/web", "-n", "shop", "--timeout=30s"]).await;

    let deleted = kubectl.ok(&["delete", "-f", &file, "--timeout=60s"]).await;
    assert_eq!(deleted.lines().filter(|l| l.contains("deleted")).count(), 9, "{deleted}");
    let left = kubectl.refused(&["get", "namespace", "shop"], "").await;
    assert!(left.contains("NotFound"), "{left}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_commands_do_what_they_say() {
    let (lab, address) = start(KubeConfig::default());
    let Some(kubectl) = Kubectl::new("single_commands_do_what_they_say", address) else { return };
    let _kubelet = shop(&lab, &kubectl).await;
    kubectl.ok(&["scale", "deployment/web", "-n", "shop", "--replicas=4"]).await;
    kubectl.ok(&["wait", "--for=condition=Available", "deployment/web", "-n", "shop", "--timeout=30s"]).await;
    until(lab.registry(), "Deployment", "shop", "four pods", |all| all[0]["status"]["replicas"] == 4).await;
    kubectl.ok(&["label", "pod", "db-0", "-n", "shop", "tier=back"]).await;
    kubectl.ok(&["annotate", "pod", "db-0", "-n", "shop", "note=x"]).await;
    let found = kubectl.ok(&["get", "pods", "-n", "shop", "-l", "tier=back,app!=web", "-o", "name"]).await;
    assert_eq!(found.trim(), "pod/db-0");
    kubectl.ok(&["label", "pod", "db-0", "-n", "shop", "tier-"]).await;
    let found =
        kubectl.ok(&["get", "pods", "-n", "shop", "--field-selector", "metadata.name=db-1", "-o", "name"]).await;
    assert_eq!(found.trim(), "pod/db-1");
    for (kind, patch) in [
        (
            "strategic",
            r#"{"spec":{"template":{"spec":{"containers":[{"name":"web","env":[{"name":"A","value":"b"}]}]}}}}"#,
        ),
        ("merge", r#"{"spec":{"minReadySeconds":0,"paused":false}}"#),
        ("json", r#"[{"op":"replace","path":"/spec/replicas","value":2}]"#),
    ] {
        kubectl.ok(&["patch", "deployment", "web", "-n", "shop", "--type", kind, "-p", patch]).await;
    }
    let web = kubectl.json(&["get", "deployment", "web", "-n", "shop"]).await;
    let container = &web["spec"]["template"]["spec"]["containers"][0];
    assert_eq!((&container["image"], &container["env"][0]["name"]), (&json!("web:1.0"), &json!("A")));
    assert_eq!(web["spec"]["replicas"], 2);

    let made = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: made, namespace: shop}\ndata: {mode: '0644'}\n";
    kubectl.fed(&["create", "-f", "-"], made).await;
    let twice = kubectl.refused(&["create", "-f", "-"], made).await;
    assert!(twice.contains("AlreadyExists"), "{twice}");
    kubectl.fed(&["replace", "-f", "-"], &made.replace("0644", "0600")).await;
    let conflict = kubectl.refused(&["apply", "--server-side", "-f", "-"], made).await;
    assert!(conflict.contains(".data.mode"), "{conflict}");
    kubectl.fed(&["apply", "--server-side", "--force-conflicts", "-f", "-"], made).await;
    kubectl.fed(&["apply", "--dry-run=server", "-f", "-"], &made.replace("made", "dry")).await;
    let none = kubectl.refused(&["get", "configmap", "dry", "-n", "shop"], "").await;
    assert!(none.contains("NotFound"), "{none}");
    // Without a file: from 1.32 on in protobuf.
    for what in [
        &["namespace", "two"][..],
        &["configmap", "typed", "--from-literal=a=b", "-n", "shop"],
        &["secret", "generic", "typed", "--from-literal=password=x", "-n", "shop"],
        &["serviceaccount", "typed", "-n", "shop"],
        &["deployment", "typed", "--image=typed:1", "--replicas=0", "--port=80", "-n", "shop"],
        &["service", "clusterip", "typed", "--tcp=80:8080", "-n", "shop"],
    ] {
        kubectl.ok(&[&["create"], what].concat()).await;
    }
    let made = |kind: &str| lab.get(kind, "shop", "typed").unwrap_or_else(|| panic!("no {kind}"));
    assert_eq!(made("ConfigMap")["data"], json!({"a": "b"}));
    assert_eq!(made("Secret")["data"], json!({"password": "eA=="}));
    assert_eq!(made("Service")["spec"]["ports"][0]["targetPort"], 8080);
    let typed = made("Deployment");
    assert_eq!(typed["spec"]["replicas"], 0);
    assert_eq!(typed["spec"]["template"]["spec"]["containers"][0]["image"], "typed:1");
    assert_eq!(typed["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"], 80);
    if kubectl.minor >= 27 {
        // Older ones want whole schemas for this, in protobuf.
        assert!(kubectl.ok(&["explain", "deployment"]).await.contains("Deployment"));
    }
    assert!(kubectl.ok(&["api-resources"]).await.contains("endpointslices"));
    kubectl.ok(&["cordon", "n1"]).await;
    let drained = kubectl.ok(&["drain", "n1", "--ignore-daemonsets", "--timeout=30s"]).await;
    assert!(drained.contains("drained"), "{drained}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_in_manifests_are_named() {
    let (lab, address) = start(KubeConfig { controllers: false, ..KubeConfig::default() });
    let Some(kubectl) = Kubectl::new("mistakes_in_manifests_are_named", address) else { return };
    let good = std::fs::read_to_string(manifest("shop.yaml")).unwrap();
    kubectl.fed(&["create", "-f", "-"], "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n").await;
    for (from, to, complaint) in [
        ("replicas: 3", "replicas: three", "replicas"),
        ("containerPort: 8080", "containerPort: 808080", "must be between 1 and 65535"),
        ("matchLabels: {app: web}", "matchLabels: {app: other}", "`selector` does not match template `labels`"),
        ("  name: web\n  namespace: shop\n  labels", "  name: Web_1\n  namespace: shop\n  labels", "RFC 1123"),
    ] {
        assert!(good.contains(from), "the manifest has no {from}");
        let told = kubectl.refused(&["create", "-f", "-"], &good.replace(from, to)).await;
        assert!(told.contains(complaint), "{from} → {to}: {told}");
        assert!(!told.contains("internal"), "{told}");
        kubectl
            .output(&["delete", "deployment,service,configmap,statefulset,netpol,ing,sa", "--all", "-n", "shop"], "")
            .await;
    }
    // kubectl before 1.25 has no word for the server's check of unknown fields.
    let typo = good.replace("replicas: 3", "replicaz: 3");
    let output = kubectl.output(&["create", "-f", "-"], &typo).await;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("unknown field \"spec.replicaz\"") || output.status.success(), "{told}");
    lab.stop().await;
}
