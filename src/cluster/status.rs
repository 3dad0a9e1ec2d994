//! The node's status: a condition and an extended resource.
//!
//! Pure. A patch is made only of what differs, so that watching one's own node
//! does not lead in circles; the heartbeat is renewed now and then.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::convert::{CONDITION, RESOURCE};
use super::{NodeCondition, NodeInfo};

/// What the node's status should say; absent parts are left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    pub condition: Option<NodeCondition>,
    pub exclusive_enis: Option<u32>,
}

/// The strategic merge patch of the status subresource, if one is needed.
pub fn patch(desired: &Desired, node: &NodeInfo, heartbeat: bool, now: Timestamp) -> Option<Value> {
    let mut status = serde_json::Map::new();
    let now = format!("{now:.0}");
    if let Some(want) = &desired.condition {
        let have = node.condition.as_ref();
        if heartbeat || have != Some(want) {
            let mut condition = json!({
                "type": CONDITION,
                "status": if want.available { "True" } else { "False" },
                "reason": want.reason,
                "message": want.message,
                "lastHeartbeatTime": now,
            });
            if have.map(|h| h.available) != Some(want.available) {
                condition["lastTransitionTime"] = json!(now);
            }
            status.insert("conditions".into(), json!([condition]));
        }
    }
    if let Some(want) = desired.exclusive_enis.map(|n| n.to_string())
        && node.exclusive_enis.as_ref() != Some(&want)
    {
        // Kubelet derives the allocatable amount from this, but later.
        status.insert("capacity".into(), json!({ RESOURCE: want }));
        status.insert("allocatable".into(), json!({ RESOURCE: want }));
    }
    (!status.is_empty()).then(|| json!({ "status": status }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(available: bool) -> NodeCondition {
        NodeCondition { available, reason: "PoolFull".into(), message: "30 of 30 in use".into() }
    }

    #[test]
    fn a_status_that_says_it_already_is_left_alone() {
        let desired = Desired { condition: Some(condition(false)), exclusive_enis: Some(3) };
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let first = patch(&desired, &NodeInfo::default(), false, now).unwrap();
        assert_eq!(first["status"]["capacity"][RESOURCE], "3");
        assert_eq!(first["status"]["conditions"][0]["status"], "False");
        assert_eq!(first["status"]["conditions"][0]["lastTransitionTime"], "2027-01-15T08:00:00Z");
        let told =
            NodeInfo { condition: Some(condition(false)), exclusive_enis: Some("3".into()), ..NodeInfo::default() };
        assert_eq!(patch(&desired, &told, false, now), None);
        let beat = patch(&desired, &told, true, now).unwrap();
        assert!(beat["status"]["conditions"][0].get("lastTransitionTime").is_none(), "nothing has changed");
        assert!(beat["status"].get("capacity").is_none());
        assert_eq!(patch(&Desired::default(), &told, true, now), None);
    }
}
