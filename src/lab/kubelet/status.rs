//! The status kubelet writes for a pod. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, HostIP,
    Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::spec;

/// Conditions that kubelet owns.
const OWN: [&str; 5] = ["PodScheduled", "Initialized", "PodReadyToStartContainers", "ContainersReady", "Ready"];

/// How far a pod has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for its sandbox, with the reason of the last failure.
    Creating {
        message: Option<String>,
    },
    Running {
        since: Time,
        ready: Vec<bool>,
    },
    /// Its containers have ended.
    Ended {
        started: Option<Time>,
        at: Time,
    },
}

/// What is known about a pod, as its status needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub stage: Stage,
    pub ips: Vec<IpAddr>,
    pub host_ips: Vec<IpAddr>,
    pub accepted: Time,
    pub restarts: i32,
    pub sandbox: Option<String>,
}

/// The whole status; conditions of others are kept, and so is the time of a
/// condition that has not changed.
pub fn pod_status(pod: &Pod, known: &Known, now: &Time) -> PodStatus {
    let old = pod.status.clone().unwrap_or_default();
    let mut conditions = old.conditions.unwrap_or_default();
    let (all_ready, sandbox_up, phase) = match &known.stage {
        Stage::Creating { .. } => (false, false, "Pending"),
        Stage::Running { ready, .. } => (ready.iter().all(|r| *r), true, "Running"),
        Stage::Ended { .. } => (false, false, "Succeeded"),
    };
    let reason = |ok: bool, why: &str| (!ok).then(|| why.to_owned());
    for (kind, ok, why) in [
        ("PodScheduled", true, ""),
        ("Initialized", true, ""),
        ("PodReadyToStartContainers", sandbox_up, ""),
        ("ContainersReady", all_ready, "ContainersNotReady"),
        ("Ready", all_ready, "ContainersNotReady"),
    ] {
        set(&mut conditions, kind, ok, reason(ok, why).filter(|w| !w.is_empty()), now);
    }
    PodStatus {
        phase: Some(phase.into()),
        conditions: Some(conditions),
        container_statuses: Some(container_statuses(pod, known)),
        host_ip: known.host_ips.first().map(IpAddr::to_string),
        host_ips: Some(known.host_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        pod_ip: known.ips.first().map(IpAddr::to_string),
        pod_ips: (!known.ips.is_empty()).then(|| known.ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
        start_time: Some(known.accepted.clone()),
        qos_class: old.qos_class.or(Some("BestEffort".into())),
        message: match &known.stage {
            Stage::Creating { message } => message.clone(),
            _ => None,
        },
        ..PodStatus::default()
    }
}

/// The pod as the API has it, with kubelet's conditions as it set them last: the
/// API may echo an older state.
pub fn keep_own_conditions(mut fresh: Pod, old: &Pod) -> Pod {
    let is_own = |c: &&PodCondition| OWN.contains(&c.type_.as_str());
    let own: Vec<PodCondition> =
        old.status.iter().flat_map(|s| s.conditions.iter().flatten()).filter(is_own).cloned().collect();
    let conditions = fresh.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|c| !own.iter().any(|o| o.type_ == c.type_));
    conditions.extend(own);
    fresh
}

fn set(conditions: &mut Vec<PodCondition>, kind: &str, ok: bool, reason: Option<String>, now: &Time) {
    let status = if ok { "True" } else { "False" };
    let slot = match conditions.iter_mut().position(|c| c.type_ == kind) {
        Some(at) => &mut conditions[at],
        None => {
            conditions.push(PodCondition { type_: kind.into(), ..PodCondition::default() });
            let last = conditions.len() - 1;
            &mut conditions[last]
        }
    };
    if slot.status != status {
        slot.last_transition_time = Some(now.clone());
    }
    slot.status = status.into();
    slot.reason = reason;
}

fn container_statuses(pod: &Pod, known: &Known) -> Vec<ContainerStatus> {
    let one = |(i, container): (usize, &k8s_openapi::api::core::v1::Container)| {
        let (state, ready, running) = match &known.stage {
            Stage::Creating { .. } => (
                ContainerState {
                    waiting: Some(ContainerStateWaiting { reason: Some("ContainerCreating".into()), message: None }),
                    ..ContainerState::default()
                },
                false,
                false,
            ),
            Stage::Running { since, ready } => (
                ContainerState {
                    running: Some(ContainerStateRunning { started_at: Some(since.clone()) }),
                    ..ContainerState::default()
                },
                ready.get(i).copied().unwrap_or(true),
                true,
            ),
            Stage::Ended { started, at } => (
                ContainerState {
                    terminated: Some(ContainerStateTerminated {
                        exit_code: 0,
                        reason: Some("Completed".into()),
                        started_at: started.clone(),
                        finished_at: Some(at.clone()),
                        ..ContainerStateTerminated::default()
                    }),
                    ..ContainerState::default()
                },
                false,
                false,
            ),
        };
        let image = container.image.clone().unwrap_or_default();
        ContainerStatus {
            name: container.name.clone(),
            image_id: if running { format!("lab://{image}") } else { String::new() },
            image,
            ready,
            restart_count: known.restarts,
            started: Some(running),
            container_id: known.sandbox.as_ref().map(|s| format!("lab://{s}/{}", container.name)),
            state: Some(state),
            ..ContainerStatus::default()
        }
    };
    spec::containers(pod).iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn time(second: i64) -> Time {
        Time(k8s_openapi::jiff::Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_changes_and_others_keep_theirs() {
        let mut pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]},
            "status": {"conditions": [{"type": "example.com/gate", "status": "True"}]}}))
            .unwrap();
        let mut known = Known {
            stage: Stage::Running { since: time(5), ready: vec![false] },
            ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            host_ips: vec![],
            accepted: time(1),
            restarts: 0,
            sandbox: None,
        };
        pod.status = Some(pod_status(&pod, &known, &time(10)));
        known.stage = Stage::Running { since: time(5), ready: vec![true] };
        let status = pod_status(&pod, &known, &time(20));
        let conditions = status.conditions.clone().unwrap();
        let at = |kind: &str| conditions.iter().find(|c| c.type_ == kind).unwrap();
        assert_eq!(at("PodReadyToStartContainers").last_transition_time, Some(time(10)));
        assert_eq!(at("Ready").last_transition_time, Some(time(20)));
        assert_eq!(at("example.com/gate").status, "True");
        // An older echo does not bring the old readiness back.
        let kept = keep_own_conditions(pod.clone(), &Pod { status: Some(status.clone()), ..Pod::default() });
        let kept = kept.status.unwrap().conditions.unwrap();
        assert_eq!(kept.iter().find(|c| c.type_ == "Ready").unwrap().status, "True");
        assert_eq!(kept.len(), 6);
        assert_eq!(status.pod_ips.unwrap()[1].ip, "fd00::1");
    }
}
