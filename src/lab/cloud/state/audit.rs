//! The account's invariants, checked from scratch.
//!
//! Purpose: property tests after every step, and `/lab/audit` at any time.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::{Account, EniKind, EniStatus};

impl Account {
    /// One sentence per broken invariant; empty is good.
    pub fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut holders: BTreeMap<IpAddr, &str> = BTreeMap::new();
        for eni in self.enis.values() {
            let addresses = eni.v4.iter().map(|ip| IpAddr::V4(*ip)).chain(eni.v6.iter().map(|ip| IpAddr::V6(*ip)));
            for ip in addresses {
                if let Some(other) = holders.insert(ip, &eni.id) {
                    found.push(format!("{ip} is on {other} and on {}", eni.id));
                }
            }
            self.check_eni(eni, &mut found);
        }
        self.check_spaces(&holders, &mut found);
        for instance in self.instances.values() {
            let (held, limit) =
                (self.enis_of(&instance.id).count(), self.type_of(&instance.id).map(|t| t.eni_quantity));
            if limit.is_none_or(|limit| held > limit as usize) {
                found.push(format!("{} holds {held} ENIs, its type allows {limit:?}", instance.id));
            }
            if !self.enis.contains_key(&instance.primary_eni) {
                found.push(format!("{} has lost its primary ENI", instance.id));
            }
        }
        found
    }

    fn check_eni(&self, eni: &super::Eni, found: &mut Vec<String>) {
        let id = &eni.id;
        let attached = matches!(eni.status, EniStatus::Attaching | EniStatus::InUse | EniStatus::Detaching);
        if attached != eni.instance.is_some() {
            found.push(format!("{id} is {} with instance {:?}", eni.status.as_str(), eni.instance));
        }
        if eni.instance.as_ref().is_some_and(|i| !self.instances.contains_key(i)) {
            found.push(format!("{id} is attached to {:?}, which does not exist", eni.instance));
        }
        let (limit4, limit6) = self.limits_of(eni);
        if eni.v4.is_empty() || eni.v4.len() > limit4 as usize || eni.v6.len() > limit6 as usize {
            found.push(format!(
                "{id} holds {} + {} addresses, {limit4} + {limit6} allowed",
                eni.v4.len(),
                eni.v6.len()
            ));
        }
        if eni.kind == EniKind::Primary && !self.instances.values().any(|i| i.primary_eni == *id) {
            found.push(format!("{id} is a primary ENI without an instance"));
        }
        if self.enis.values().any(|other| other.id != *id && other.mac == eni.mac) {
            found.push(format!("{id} shares its MAC {}", eni.mac));
        }
    }

    fn check_spaces(&self, holders: &BTreeMap<IpAddr, &str>, found: &mut Vec<String>) {
        let mut booked = 0;
        for space in self.spaces.values() {
            let four = space.used4().map(|(ip, eni)| (IpAddr::V4(*ip), eni));
            let six = space.used6().map(|(ip, eni)| (IpAddr::V6(*ip), eni));
            for (ip, eni) in four.chain(six) {
                booked += 1;
                if holders.get(&ip).copied() != Some(eni.as_str()) {
                    found.push(format!("{ip} is booked for {eni} but on {:?}", holders.get(&ip)));
                }
            }
        }
        if booked != holders.len() {
            found.push(format!("{booked} addresses are booked, {} are on ENIs", holders.len()));
        }
    }
}
