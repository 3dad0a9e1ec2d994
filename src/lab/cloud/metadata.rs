//! The metadata service: what an instance is told about itself.
//!
//! Purpose: the paths of `http://100.100.100.200/latest/meta-data/`, behind the
//! API by a configurable time. Owner: the engine publishes a view per change,
//! the server reads the one that is old enough. Invariants: pure but for
//! `server`; a view never changes; an ENI shows only while it is InUse.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::state::{Account, Eni, EniStatus, Millis};

pub(super) mod server;

/// Most the service may be behind.
pub const MAX_LAG_MS: u64 = 120_000;
/// Configured lag and an injected one may add up.
const KEEP_MS: u64 = 2 * MAX_LAG_MS;
const MAX_VIEWS: usize = 4096;

/// Everything static about an instance and its attached ENIs, by path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstanceView {
    leaves: BTreeMap<String, String>,
}

impl InstanceView {
    pub fn of(account: &Account, instance_id: &str, role: Option<&str>) -> Option<Self> {
        let instance = account.instances.get(instance_id)?;
        let primary = account.enis.get(&instance.primary_eni)?;
        let mut view = Self::default();
        view.put("instance-id", &instance.id);
        view.put("instance/instance-type", &instance.instance_type);
        view.put("hostname", &instance.id);
        view.put("region-id", &account.region);
        view.put("zone-id", &instance.zone);
        view.put("vpc-id", &account.vpc_id);
        view.put("vpc-cidr-block", account.vpc_cidr4);
        view.put("vswitch-id", &instance.vswitch);
        view.put("vswitch-cidr-block", account.spaces.get(&instance.vswitch)?.spec.cidr4);
        view.put("private-ipv4", primary.primary4());
        view.put("mac", primary.mac);
        view.put("network-type", "vpc");
        view.put("owner-account-id", account.account_id);
        if let Some(role) = role {
            // The value is made on reading: it expires.
            view.put(&format!("ram/security-credentials/{role}"), "");
        }
        for eni in account.enis_of(instance_id).filter(|eni| eni.status == EniStatus::InUse) {
            view.put_eni(account, eni)?;
        }
        Some(view)
    }

    fn put(&mut self, path: &str, value: impl ToString) {
        self.leaves.insert(path.to_owned(), value.to_string());
    }

    fn put_eni(&mut self, account: &Account, eni: &Eni) -> Option<()> {
        let space = account.spaces.get(&eni.vswitch)?;
        let at = |leaf: &str| format!("network/interfaces/macs/{}/{leaf}", eni.mac);
        self.put(&at("network-interface-id"), &eni.id);
        self.put(&at("primary-ip-address"), eni.primary4());
        self.put(&at("private-ipv4s"), serde_json::to_string(&eni.v4).ok()?);
        self.put(&at("netmask"), space.spec.cidr4.netmask());
        self.put(&at("gateway"), space.gateway4());
        self.put(&at("vswitch-id"), &eni.vswitch);
        self.put(&at("vswitch-cidr-block"), space.spec.cidr4);
        self.put(&at("vpc-id"), &account.vpc_id);
        self.put(&at("vpc-cidr-block"), account.vpc_cidr4);
        if let (Some(cidr6), Some(gateway6)) = (space.spec.cidr6, space.gateway6()) {
            self.put(&at("vswitch-ipv6-cidr-block"), cidr6);
            self.put(&at("ipv6-gateway"), gateway6);
        }
        if let Some(vpc6) = account.vpc_cidr6 {
            self.put(&at("vpc-ipv6-cidr-blocks"), vpc6);
        }
        if !eni.v6.is_empty() {
            // Unlike private-ipv4s this list has no quotes; there is none
            // (404) without an address.
            let list: Vec<String> = eni.v6.iter().map(ToString::to_string).collect();
            self.put(&at("ipv6s"), format!("[{}]", list.join(",")));
        }
        Some(())
    }

    /// The value at `path`, or the names below it, directories with a slash.
    pub fn read(&self, path: &str) -> Option<String> {
        let path = path.trim_matches('/');
        if let Some(value) = self.leaves.get(path) {
            return Some(value.clone());
        }
        let below = if path.is_empty() { String::new() } else { format!("{path}/") };
        let names: BTreeSet<String> = self
            .leaves
            .range(below.clone()..)
            .map_while(|(leaf, _)| leaf.strip_prefix(&below))
            .map(|rest| rest.split_once('/').map_or_else(|| rest.to_owned(), |(dir, _)| format!("{dir}/")))
            .collect();
        if names.is_empty() { None } else { Some(names.into_iter().collect::<Vec<_>>().join("\n")) }
    }
}

/// The views of every instance, by the time they became true.
#[derive(Debug, Default)]
pub struct Views {
    by_instance: BTreeMap<String, VecDeque<(Millis, Arc<InstanceView>)>>,
}

impl Views {
    pub fn publish(&mut self, instance_id: &str, view: InstanceView, now: Millis) {
        let views = self.by_instance.entry(instance_id.to_owned()).or_default();
        if views.back().is_some_and(|(_, last)| **last == view) {
            return;
        }
        views.push_back((now, Arc::new(view)));
        let old = |views: &VecDeque<(Millis, Arc<InstanceView>)>| {
            views.get(1).is_some_and(|(second, _)| second + KEEP_MS < now)
        };
        while old(views) || views.len() > MAX_VIEWS {
            views.pop_front();
        }
    }

    pub fn remove(&mut self, instance_id: &str) {
        self.by_instance.remove(instance_id);
    }

    /// The view of `lag` ago; an instance younger than that sees its first one.
    pub fn at(&self, instance_id: &str, now: Millis, lag: u64) -> Option<Arc<InstanceView>> {
        let views = self.by_instance.get(instance_id)?;
        let seen = now.saturating_sub(lag);
        let due = views.iter().rev().find(|(since, _)| *since <= seen);
        due.or_else(|| views.front()).map(|(_, view)| view.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::CloudConfig;
    use super::super::state::{RegisterInstance, Want};
    use super::*;

    fn registered() -> (Account, String) {
        let mut account = Account::new(&CloudConfig::default());
        let spec: RegisterInstance = serde_json::from_value(serde_json::json!({
            "instance_id": "i-1", "instance_type": "ecs.g7.4xlarge", "vswitch": "vsw-lab-a", "primary_ip": "10.0.0.9",
        }))
        .unwrap();
        let eni = account.register(&spec, 0).unwrap().primary_eni;
        account.finish_attach(&eni, 1, true);
        (account, eni)
    }

    fn view(account: &Account) -> InstanceView {
        InstanceView::of(account, "i-1", Some("Role")).unwrap()
    }

    #[test]
    fn the_paths_an_agent_reads_are_there() {
        let (mut account, eni) = registered();
        let mac = account.enis[&eni].mac.to_string();
        let at = |view: &InstanceView, leaf: &str| view.read(&format!("network/interfaces/macs/{mac}/{leaf}"));
        let first = view(&account);
        assert_eq!(first.read("instance-id").as_deref(), Some("i-1"));
        assert_eq!(first.read("instance/").as_deref(), Some("instance-type"));
        assert_eq!(first.read("network/interfaces/macs/"), Some(format!("{mac}/")));
        assert_eq!(at(&first, "network-interface-id"), Some(eni.clone()));
        assert_eq!(at(&first, "private-ipv4s").as_deref(), Some(r#"["10.0.0.9"]"#));
        assert_eq!(at(&first, "gateway").as_deref(), Some("10.0.15.253"));
        assert_eq!(at(&first, "vswitch-cidr-block").as_deref(), Some("10.0.0.0/20"));
        assert_eq!(at(&first, "ipv6s"), None);
        assert_eq!(first.read("ram/security-credentials/").as_deref(), Some("Role"));
        assert_eq!(first.read("../../etc/passwd"), None);
        let six = account.assign6(&eni, &Want::Any(2)).unwrap();
        assert_eq!(at(&view(&account), "ipv6s"), Some(format!("[{},{}]", six[0], six[1])));
    }

    #[test]
    fn the_service_is_behind_the_api_by_its_lag() {
        let (mut account, eni) = registered();
        let mut views = Views::default();
        views.publish("i-1", view(&account), 1000);
        account.assign4(&eni, &Want::Any(1)).unwrap();
        views.publish("i-1", view(&account), 5000);
        let new = view(&account);
        let shows = |now, lag| *views.at("i-1", now, lag).unwrap() == new;
        assert!(!shows(5999, 1000) && shows(6000, 1000) && shows(5000, 0));
        assert!(!shows(500, 1000), "a young instance sees its first view");
        assert!(views.at("i-2", 6000, 0).is_none());
    }

    #[test]
    fn views_are_bounded() {
        let (account, _) = registered();
        let mut views = Views::default();
        for n in 0..2 * MAX_VIEWS as u64 {
            let mut view = view(&account);
            view.put("n", n);
            views.publish("i-1", view, n);
        }
        assert_eq!(views.by_instance["i-1"].len(), MAX_VIEWS);
    }
}
