//! Promise: what `deploy/` would install is what the Kubernetes API and the agent
//! understand, and asks for no more rights than are used.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::path::Path;

use fairway::cloud::provider::Api;
use fairway::config::Config;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

fn text(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name)).unwrap()
}

fn documents(name: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&text(name)).unwrap()
}

/// The document of this kind, as the API's type; a field that the type does not
/// know is an error.
fn object<T: DeserializeOwned + Serialize>(file: &str, kind: &str) -> T {
    let written = documents(file).into_iter().find(|d| d["kind"] == kind).unwrap();
    let typed: T = serde_json::from_value(written.clone()).unwrap();
    contained(&written, &serde_json::to_value(&typed).unwrap(), kind);
    typed
}

fn contained(written: &Value, known: &Value, at: &str) {
    match (written, known) {
        (Value::Object(fields), Value::Object(known)) => {
            for (name, value) in fields {
                let at = format!("{at}.{name}");
                match known.get(name) {
                    Some(same) => contained(value, same, &at),
                    // An empty list or object says nothing and is left out.
                    None => assert!(matches!(value, Value::Object(o) if o.is_empty()), "{at} is not of this API"),
                }
            }
        }
        (Value::Array(written), Value::Array(known)) => {
            assert_eq!(written.len(), known.len(), "{at}");
            written.iter().zip(known).enumerate().for_each(|(i, (w, k))| contained(w, k, &format!("{at}[{i}]")));
        }
        _ => assert_eq!(written, known, "{at}"),
    }
}

fn daemonset() -> DaemonSet {
    object("daemonset.yaml", "DaemonSet")
}

fn agent() -> Container {
    daemonset().spec.unwrap().template.spec.unwrap().containers.remove(0)
}

#[test]
fn every_manifest_is_of_the_kubernetes_api_and_in_the_kustomization() {
    #[derive(Deserialize)]
    struct Kustomization {
        resources: Vec<String>,
    }
    let all: Vec<Kustomization> = serde_saphyr::from_multiple(&text("kustomization.yaml")).unwrap();
    assert_eq!(all[0].resources, ["rbac.yaml", "configmap.yaml", "daemonset.yaml"]);
    daemonset();
    object::<ConfigMap>("configmap.yaml", "ConfigMap");
    object::<ServiceAccount>("rbac.yaml", "ServiceAccount");
    object::<ClusterRole>("rbac.yaml", "ClusterRole");
    object::<ClusterRoleBinding>("rbac.yaml", "ClusterRoleBinding");
    object::<Role>("rbac.yaml", "Role");
    object::<RoleBinding>("rbac.yaml", "RoleBinding");
    let kinds: usize = all[0].resources.iter().map(|file| documents(file).len()).sum();
    assert_eq!(kinds, 7, "a document that this test does not know");
}

#[test]
fn the_daemonset_selects_its_own_pods_and_names_what_exists() {
    let spec = daemonset().spec.unwrap();
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    assert!(spec.selector.match_labels.unwrap().iter().all(|(k, v)| labels.get(k) == Some(v)));
    let pod = spec.template.spec.unwrap();
    let account: ServiceAccount = object("rbac.yaml", "ServiceAccount");
    assert_eq!(pod.service_account_name, account.metadata.name);
    let volumes: BTreeSet<_> = pod.volumes.unwrap().into_iter().map(|v| v.name).collect();
    let containers = pod.containers.iter().chain(pod.init_containers.iter().flatten());
    let mounted: BTreeSet<_> = containers.flat_map(|c| c.volume_mounts.clone().unwrap()).map(|m| m.name).collect();
    assert_eq!(volumes, mounted);
    assert_eq!(pod.host_network, Some(true));
}

#[test]
fn the_roles_are_bound_to_the_agents_account() {
    let account: ServiceAccount = object("rbac.yaml", "ServiceAccount");
    let cluster: ClusterRoleBinding = object("rbac.yaml", "ClusterRoleBinding");
    let namespaced: RoleBinding = object("rbac.yaml", "RoleBinding");
    for (role, subjects) in [(cluster.role_ref, cluster.subjects), (namespaced.role_ref, namespaced.subjects)] {
        assert!(
            documents("rbac.yaml")
                .iter()
                .any(|d| d["kind"] == role.kind.as_str() && d["metadata"]["name"] == role.name.as_str())
        );
        let subject = subjects.unwrap().remove(0);
        assert_eq!(
            (Some(subject.name), subject.namespace),
            (account.metadata.name.clone(), account.metadata.namespace.clone())
        );
    }
}

#[test]
fn the_agent_may_do_what_it_does_and_no_more() {
    fn grants(rules: Option<Vec<PolicyRule>>) -> BTreeSet<(String, String, String)> {
        let mut found = BTreeSet::new();
        for rule in rules.unwrap() {
            for (group, resource) in rule.api_groups.iter().flatten().zip(rule.resources.iter().flatten()) {
                for verb in &rule.verbs {
                    found.insert((group.clone(), resource.clone(), verb.clone()));
                }
            }
        }
        found
    }
    let set = |wanted: &[(&str, &str, &str)]| -> BTreeSet<_> {
        wanted.iter().map(|(g, r, v)| (g.to_string(), r.to_string(), v.to_string())).collect()
    };
    let cluster: ClusterRole = object("rbac.yaml", "ClusterRole");
    assert_eq!(
        grants(cluster.rules),
        set(&[
            ("", "pods", "list"),
            ("", "pods", "watch"),
            ("", "nodes", "list"),
            ("", "nodes", "watch"),
            ("", "services", "list"),
            ("", "services", "watch"),
            ("discovery.k8s.io", "endpointslices", "list"),
            ("discovery.k8s.io", "endpointslices", "watch"),
            ("networking.k8s.io", "networkpolicies", "list"),
            ("networking.k8s.io", "networkpolicies", "watch"),
            ("", "namespaces", "list"),
            ("", "namespaces", "watch"),
            ("", "nodes/status", "patch"),
            ("events.k8s.io", "events", "create"),
            ("events.k8s.io", "events", "patch"),
        ])
    );
    let role: Role = object("rbac.yaml", "Role");
    let leases = "coordination.k8s.io";
    assert_eq!(role.metadata.namespace.as_deref(), Some(Config::default().cluster.lease_namespace.as_str()));
    let named = role.rules.iter().flatten().find_map(|r| r.resource_names.clone()).unwrap();
    assert_eq!(named, [Config::default().cluster.lease_name]);
    assert_eq!(
        grants(role.rules),
        set(&[(leases, "leases", "get"), (leases, "leases", "update"), (leases, "leases", "create")])
    );
}

#[test]
fn no_container_is_privileged_and_each_drops_all_it_does_not_name() {
    let pod = daemonset().spec.unwrap().template.spec.unwrap();
    for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
        let security = container.security_context.clone().unwrap();
        assert_ne!(security.privileged, Some(true), "{}", container.name);
        assert_eq!(security.allow_privilege_escalation, Some(false), "{}", container.name);
        assert_eq!(security.read_only_root_filesystem, Some(true), "{}", container.name);
        assert_eq!(security.capabilities.unwrap().drop.unwrap(), ["ALL"], "{}", container.name);
        assert_eq!(security.seccomp_profile.unwrap().type_, "RuntimeDefault", "{}", container.name);
    }
    let kept = agent().security_context.unwrap().capabilities.unwrap().add.unwrap();
    assert_eq!(kept, ["NET_ADMIN", "BPF", "SYS_ADMIN", "SYS_RESOURCE"]);
}

#[test]
fn the_configmap_is_a_configuration_that_lacks_only_the_clusters_name() {
    let map: ConfigMap = object("configmap.yaml", "ConfigMap");
    let data = map.data.unwrap();
    let (file, text) = data.first_key_value().unwrap();
    let config = Config::parse(text).unwrap();
    assert_eq!(config.pool.cluster_id, "");
    let named = Config::parse(&text.replace("cluster_id: \"\"", "cluster_id: c1")).unwrap();
    named.pool.validate().unwrap();
    named.cloud.validate().unwrap();

    // The DaemonSet mounts what the configuration names.
    let agent = agent();
    let mounts: Vec<_> = agent.volume_mounts.unwrap().into_iter().map(|m| m.mount_path).collect();
    let mounted = |path: &Path| mounts.iter().any(|m| path.starts_with(m));
    for path in [
        &config.state_dir,
        config.bpffs.as_ref().unwrap(),
        &config.netns.sysfs,
        &config.cni.socket,
        &config.cni.spool_dir,
    ] {
        assert!(mounted(path), "{} is not mounted", path.display());
    }
    let command = agent.command.unwrap().join(" ");
    assert!(command.contains(&format!("--config /etc/fairway/{file}")), "{command}");
    assert!(mounted(Path::new("/etc/fairway")));
    let fairway::debug::Listen::Tcp(debug) = config.debug.listen else { panic!("probes need a port") };
    for probe in [agent.startup_probe, agent.liveness_probe, agent.readiness_probe] {
        let http = probe.unwrap().http_get.unwrap();
        assert_eq!(http.port, k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(debug.port().into()));
        assert_eq!(http.host.unwrap(), debug.ip().to_string());
    }
    assert!(agent.env.unwrap().iter().any(|e| e.name == "NODE_NAME"));
}

#[test]
fn the_ram_policy_names_every_api_that_is_called() {
    let policy: Value = serde_json::from_str(&text("ram-policy.json")).unwrap();
    let allowed: BTreeSet<_> = policy["Statement"][0]["Action"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| a.as_str().unwrap().split_once(':').unwrap().1.to_owned())
        .collect();
    let called: BTreeSet<_> = Api::ALL.iter().filter(|a| **a != Api::Metadata).map(|a| a.name().to_owned()).collect();
    assert_eq!(allowed, called);
}

#[test]
fn the_image_is_built_as_the_makefile_builds() {
    let dockerfile = text("Dockerfile");
    let makefile = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Makefile")).unwrap();
    for step in ["scripts/setup.sh build", "cargo build --release --locked"] {
        assert!(dockerfile.contains(step) && makefile.contains(step), "{step}");
    }
    let copied: Vec<_> = dockerfile.lines().filter(|l| l.starts_with("COPY LICENSE")).collect();
    for file in copied.iter().flat_map(|l| l.split_whitespace()).filter(|w| w.contains("LICENSE")) {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(file).is_file(), "{file}");
    }
}
