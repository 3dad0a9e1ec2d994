//! What kubelet reads from a pod's specification. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

use super::conf::HostPort;

/// A pod asked to end serves on until its grace period is over.
pub const IGNORE_SIGTERM: &str = "lab.fairway.dev/ignore-sigterm";

const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// A pod as kubelet tells pods apart: a name may be used again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl std::fmt::Display for PodRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A container's readiness probe, with Kubernetes' defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    pub how: ProbeKind,
    pub initial_delay: Duration,
    pub period: Duration,
    pub timeout: Duration,
    pub success: u32,
    pub failure: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeKind {
    Tcp(u16),
    Http {
        port: u16,
        path: String,
    },
    /// Commands cannot be run in the lab's pods: taken to succeed.
    Succeeds,
}

pub fn pod_ref(pod: &Pod) -> Option<PodRef> {
    Some(PodRef {
        namespace: pod.metadata.namespace.clone().unwrap_or_else(|| "default".into()),
        name: pod.metadata.name.clone()?,
        uid: pod.metadata.uid.clone()?,
    })
}

pub fn containers(pod: &Pod) -> &[Container] {
    pod.spec.as_ref().map(|s| s.containers.as_slice()).unwrap_or_default()
}

pub fn is_host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false)
}

pub fn annotations(pod: &Pod) -> BTreeMap<String, String> {
    pod.metadata.annotations.clone().unwrap_or_default()
}

/// Ports that answer: every declared one, once.
pub fn ports(pod: &Pod) -> Vec<u16> {
    let declared = containers(pod).iter().flat_map(|c| c.ports.iter().flatten());
    let mut ports: Vec<u16> =
        declared.filter_map(|p| u16::try_from(p.container_port).ok()).filter(|p| *p > 0).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

pub fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let declared = containers(pod).iter().flat_map(|c| c.ports.iter().flatten());
    declared
        .filter_map(|p| {
            Some(HostPort {
                host_port: p.host_port.filter(|p| *p > 0)?,
                container_port: p.container_port,
                protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
                host_ip: p.host_ip.clone().unwrap_or_default(),
            })
        })
        .collect()
}

pub fn readiness(container: &Container) -> Option<Readiness> {
    let probe: &Probe = container.readiness_probe.as_ref()?;
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default))
    };
    let count = |value: Option<i32>, default| value.and_then(|v| u32::try_from(v).ok()).unwrap_or(default).max(1);
    let how = if let Some(http) = &probe.http_get {
        let port = port(container, &http.port)?;
        ProbeKind::Http { port, path: http.path.clone().unwrap_or_else(|| "/".into()) }
    } else if let Some(tcp) = &probe.tcp_socket {
        ProbeKind::Tcp(port(container, &tcp.port)?)
    } else if let Some(grpc) = &probe.grpc {
        ProbeKind::Tcp(u16::try_from(grpc.port).ok()?)
    } else {
        ProbeKind::Succeeds
    };
    Some(Readiness {
        how,
        initial_delay: seconds(probe.initial_delay_seconds, 0),
        period: seconds(probe.period_seconds, 10).max(Duration::from_secs(1)),
        timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
        success: count(probe.success_threshold, 1),
        failure: count(probe.failure_threshold, 3),
    })
}

/// A port by number or by the container's own name for it.
fn port(container: &Container, port: &IntOrString) -> Option<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|p| p.name.as_ref() == Some(name));
            named.map(|p| p.container_port).or_else(|| name.parse().ok()).and_then(|p| u16::try_from(p).ok())
        }
    }
}

/// How long the pod serves on after it was asked to end: its preStop sleep, or
/// all of its grace period when it ignores SIGTERM; never more than that.
pub fn lingers(pod: &Pod) -> Duration {
    let spec_grace = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
    let grace = pod.metadata.deletion_grace_period_seconds.or(spec_grace);
    let grace = grace.map_or(DEFAULT_GRACE, |s| Duration::from_secs(u64::try_from(s).unwrap_or(0)));
    if annotations(pod).get(IGNORE_SIGTERM).is_some_and(|v| v == "true") {
        return grace;
    }
    let longest = containers(pod).iter().filter_map(pre_stop).max().unwrap_or_default();
    longest.min(grace)
}

/// `lifecycle.preStop.sleep`, or the usual command `sleep N`.
fn pre_stop(container: &Container) -> Option<Duration> {
    let hook = container.lifecycle.as_ref()?.pre_stop.as_ref()?;
    if let Some(sleep) = &hook.sleep {
        return u64::try_from(sleep.seconds).ok().map(Duration::from_secs);
    }
    let command = hook.exec.as_ref()?.command.as_ref()?.join(" ");
    let mut words = command.split_whitespace().skip_while(|w| !w.ends_with("sleep"));
    words.next()?;
    words.next()?.parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_probe_finds_its_port_by_name() {
        let pod = pod(json!({"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}],
            "readinessProbe": {"httpGet": {"port": "http", "path": "/healthz"}, "initialDelaySeconds": 2}}]}));
        let probe = readiness(&containers(&pod)[0]).unwrap();
        assert_eq!(probe.how, ProbeKind::Http { port: 8080, path: "/healthz".into() });
        assert_eq!((probe.initial_delay.as_secs(), probe.period.as_secs(), probe.failure), (2, 10, 3));
    }

    #[test]
    fn a_pod_lingers_for_its_pre_stop_but_never_beyond_its_grace() {
        let with = |hook: serde_json::Value, grace: u64| {
            lingers(&pod(json!({"terminationGracePeriodSeconds": grace,
                "containers": [{"name": "c", "lifecycle": {"preStop": hook}}]})))
        };
        assert_eq!(with(json!({"sleep": {"seconds": 5}}), 30).as_secs(), 5);
        assert_eq!(with(json!({"sleep": {"seconds": 50}}), 30).as_secs(), 30);
        assert_eq!(with(json!({"exec": {"command": ["sh", "-c", "sleep 7"]}}), 30).as_secs(), 7);
        assert_eq!(lingers(&pod(json!({"containers": []}))).as_secs(), 0);
    }

    #[test]
    fn each_declared_port_answers_once() {
        let pod = pod(json!({"containers": [
            {"name": "a", "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}, {"containerPort": 80, "hostPort": 8080}]},
            {"name": "b", "ports": [{"containerPort": 0}, {"containerPort": 99999}]}]}));
        assert_eq!(ports(&pod), [53, 80]);
        assert_eq!(host_ports(&pod).len(), 1);
    }
}
