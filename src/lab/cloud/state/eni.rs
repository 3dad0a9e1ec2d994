//! The life of an ENI: create, attach, detach, delete.
//!
//! Invariants: Available → Attaching → InUse → Detaching → Available → Deleting
//! → gone; the slow steps are a `begin_` and a `finish_`, and a finish whose
//! epoch has passed changes nothing.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::super::error::ApiError;
use super::space::Want;
use super::{Account, Eni, EniKind, EniStatus, Millis};

/// An Available ENI holds at most this many IPv4 addresses, the primary included.
pub(super) const AVAILABLE_MAX_V4: u32 = 50;
/// And this many IPv6 addresses.
pub(super) const AVAILABLE_MAX_V6: u32 = 10;

/// CreateNetworkInterface, its parameters checked one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateEni {
    pub vswitch: String,
    pub security_groups: Vec<String>,
    pub primary4: Option<Ipv4Addr>,
    /// Besides the primary address.
    pub secondary4: Want<Ipv4Addr>,
    pub v6: Want<Ipv6Addr>,
    pub queues: Option<u32>,
    pub tags: BTreeMap<String, String>,
    pub name: String,
    pub description: String,
    pub resource_group: String,
    pub delete_on_release: bool,
    pub source_dest_check: bool,
}

impl Account {
    /// Would [`Self::create`] succeed?
    pub fn check_create(&self, spec: &CreateEni) -> Result<(), ApiError> {
        let space = self.spaces.get(&spec.vswitch).ok_or_else(|| ApiError::vswitch_not_found(&spec.vswitch))?;
        if self.enis.len() >= self.eni_quota as usize {
            let message = format!("The number of ENIs exceeds the quota of {} in the region.", self.eni_quota);
            return Err(ApiError::new(403, "MaxEniCountExceeded", message));
        }
        if spec.security_groups.is_empty() {
            return Err(ApiError::missing("SecurityGroupId"));
        }
        if let Some(unknown) = spec.security_groups.iter().find(|id| !self.groups.contains(id)) {
            return Err(ApiError::security_group_not_found(unknown));
        }
        let wanted = self.wanted4(spec);
        let total: u32 = wanted.iter().map(Want::count).sum();
        if total > AVAILABLE_MAX_V4 {
            return Err(ApiError::count4(AVAILABLE_MAX_V4));
        }
        if spec.v6.count() > AVAILABLE_MAX_V6 {
            return Err(ApiError::count6(AVAILABLE_MAX_V6));
        }
        self.check_groups(&spec.security_groups, total)?;
        if self.exhausted.contains(&spec.vswitch) || total > space.available4() {
            return Err(ApiError::not_enough(&spec.vswitch));
        }
        if let (Some(primary), Want::These(list)) = (spec.primary4, &spec.secondary4)
            && list.contains(&primary)
        {
            return Err(ApiError::ip_repeated(primary));
        }
        for want in &wanted {
            space.check4(want)?;
        }
        space.check6(&spec.v6)
    }

    fn wanted4(&self, spec: &CreateEni) -> [Want<Ipv4Addr>; 2] {
        let primary = spec.primary4.map_or(Want::Any(1), |ip| Want::These(vec![ip]));
        [primary, spec.secondary4.clone()]
    }

    /// A security group holds a bounded number of private addresses.
    pub(super) fn check_groups(&self, groups: &[String], more: u32) -> Result<(), ApiError> {
        for group in groups {
            let held: usize =
                self.enis.values().filter(|e| e.security_groups.contains(group)).map(|e| e.v4.len()).sum();
            if held + more as usize > self.group_quota as usize {
                let message = format!("The security group \"{group}\" holds as many addresses as it may.");
                return Err(ApiError::new(403, "SecurityGroupInstanceLimitExceed", message));
            }
        }
        Ok(())
    }

    /// Creates a secondary ENI with all its addresses, Available at once.
    pub fn create(&mut self, spec: &CreateEni, now: Millis) -> Result<String, ApiError> {
        self.check_create(spec)?;
        let wanted = self.wanted4(spec);
        let (id, mac) = (self.new_id("eni"), self.new_mac());
        let space = self.spaces.get_mut(&spec.vswitch).ok_or_else(|| ApiError::vswitch_not_found(&spec.vswitch))?;
        let zone = space.spec.zone.clone();
        let mut v4 = Vec::new();
        // Named addresses first: a random pick must not take them away.
        let order = if matches!(wanted[1], Want::These(_)) { [1, 0] } else { [0, 1] };
        for index in order {
            let taken = space.take4(&id, &wanted[index], &mut self.rng)?;
            let at = if index == 0 { 0 } else { v4.len() };
            v4.splice(at..at, taken);
        }
        let v6 = space.take6(&id, &spec.v6, &mut self.rng)?;
        let eni = Eni {
            id: id.clone(),
            mac,
            kind: EniKind::Secondary,
            status: EniStatus::Available,
            vswitch: spec.vswitch.clone(),
            zone,
            security_groups: spec.security_groups.clone(),
            v4,
            v6,
            instance: None,
            device_index: 0,
            queues_asked: spec.queues,
            queues: None,
            tags: spec.tags.clone(),
            name: spec.name.clone(),
            description: spec.description.clone(),
            resource_group: spec.resource_group.clone(),
            delete_on_release: spec.delete_on_release,
            source_dest_check: spec.source_dest_check,
            created_ms: now,
            latency_ms: 0,
            busy: false,
            epoch: 0,
        };
        self.enis.insert(id.clone(), eni);
        Ok(id)
    }

    pub fn eni(&self, id: &str) -> Result<&Eni, ApiError> {
        self.enis.get(id).ok_or_else(|| ApiError::eni_not_found(id))
    }

    fn eni_mut(&mut self, id: &str) -> Result<&mut Eni, ApiError> {
        self.enis.get_mut(id).ok_or_else(|| ApiError::eni_not_found(id))
    }

    /// Marks a change as in progress; a second one is a conflict.
    pub fn hold(&mut self, id: &str) -> Result<(), ApiError> {
        let eni = self.eni_mut(id)?;
        if eni.busy {
            return Err(ApiError::conflict(id));
        }
        eni.busy = true;
        Ok(())
    }

    pub fn release_hold(&mut self, id: &str) {
        if let Some(eni) = self.enis.get_mut(id) {
            eni.busy = false;
        }
    }

    pub fn check_attach(&self, id: &str, instance_id: &str) -> Result<(), ApiError> {
        let eni = self.eni(id)?;
        let instance = self.instances.get(instance_id).ok_or_else(|| ApiError::instance_not_found(instance_id))?;
        let kind = self.type_of(instance_id).ok_or_else(|| ApiError::instance_not_found(instance_id))?;
        if eni.busy {
            return Err(ApiError::conflict(id));
        }
        if eni.status != EniStatus::Available {
            return Err(ApiError::eni_state("Available", eni.status.as_str()));
        }
        if instance.leaving {
            let message = "The operation is not allowed in the current ECS state.";
            return Err(ApiError::new(400, "InvalidOperation.InvalidEcsState", message));
        }
        if eni.zone != instance.zone {
            let message =
                format!("ENI \"{id}\" is in {}, instance \"{instance_id}\" is in {}.", eni.zone, instance.zone);
            return Err(ApiError::new(403, "InvalidOperation.AvailabilityZoneMismatch", message));
        }
        if self.enis_of(instance_id).count() >= kind.eni_quantity as usize {
            return Err(ApiError::enis_per_instance(kind.eni_quantity));
        }
        if eni.v4.len() > kind.eni_private_ip_address_quantity as usize {
            return Err(ApiError::count4(kind.eni_private_ip_address_quantity));
        }
        if eni.v6.len() > kind.eni_ipv6_address_quantity as usize {
            return Err(ApiError::count6(kind.eni_ipv6_address_quantity));
        }
        if eni.queues_asked.is_some_and(|n| n > kind.maximum_queue_number_per_eni) {
            let why = format!("the instance type allows {} queues per ENI", kind.maximum_queue_number_per_eni);
            return Err(ApiError::invalid("QueueNumber", why));
        }
        Ok(())
    }

    /// The ENI is Attaching; the epoch goes to [`Self::finish_attach`].
    pub fn begin_attach(&mut self, id: &str, instance_id: &str) -> Result<u64, ApiError> {
        self.check_attach(id, instance_id)?;
        let queues = self.type_of(instance_id).map(|t| t.secondary_eni_queue_number);
        let used: Vec<u32> = self.enis_of(instance_id).map(|eni| eni.device_index).collect();
        let index = (1..).find(|i| !used.contains(i)).unwrap_or(u32::MAX);
        let eni = self.eni_mut(id)?;
        eni.status = EniStatus::Attaching;
        eni.instance = Some(instance_id.to_owned());
        eni.queues = eni.queues_asked.or(queues);
        eni.device_index = index;
        eni.epoch += 1;
        Ok(eni.epoch)
    }

    /// Is the ENI still in the state that `begin_` of this epoch has put it in?
    pub fn is_current(&self, id: &str, epoch: u64, status: EniStatus) -> bool {
        self.enis.get(id).is_some_and(|eni| eni.epoch == epoch && eni.status == status)
    }

    /// InUse when the device is there, Available again when it could not be made.
    pub fn finish_attach(&mut self, id: &str, epoch: u64, attached: bool) {
        if !self.is_current(id, epoch, EniStatus::Attaching) {
            return;
        }
        if let Some(eni) = self.enis.get_mut(id) {
            eni.busy = false;
            if attached {
                eni.status = EniStatus::InUse;
            } else {
                eni.status = EniStatus::Available;
                eni.instance = None;
                eni.queues = None;
                eni.device_index = 0;
            }
        }
    }

    pub fn check_detach(&self, id: &str, instance_id: &str) -> Result<(), ApiError> {
        let eni = self.eni(id)?;
        if !self.instances.contains_key(instance_id) {
            return Err(ApiError::instance_not_found(instance_id));
        }
        if eni.kind == EniKind::Primary {
            let message = "Detaching the primary ENI from the instance is not allowed.";
            return Err(ApiError::new(400, "InvalidOperation.DetachPrimaryEniNotAllowed", message));
        }
        if eni.busy {
            return Err(ApiError::conflict(id));
        }
        if eni.status != EniStatus::InUse {
            return Err(ApiError::eni_state("InUse", eni.status.as_str()));
        }
        if eni.instance.as_deref() != Some(instance_id) {
            return Err(ApiError::invalid("InstanceId", "the ENI is attached to another instance"));
        }
        Ok(())
    }

    pub fn begin_detach(&mut self, id: &str, instance_id: &str) -> Result<u64, ApiError> {
        self.check_detach(id, instance_id)?;
        let eni = self.eni_mut(id)?;
        eni.status = EniStatus::Detaching;
        eni.epoch += 1;
        Ok(eni.epoch)
    }

    pub fn finish_detach(&mut self, id: &str, epoch: u64) {
        if !self.is_current(id, epoch, EniStatus::Detaching) {
            return;
        }
        if let Some(eni) = self.enis.get_mut(id) {
            eni.status = EniStatus::Available;
            eni.instance = None;
            eni.queues = None;
            eni.device_index = 0;
            eni.busy = false;
        }
    }

    pub fn check_delete(&self, id: &str) -> Result<(), ApiError> {
        let eni = self.eni(id)?;
        if eni.kind == EniKind::Primary {
            return Err(ApiError::eni_type("a primary ENI goes with its instance"));
        }
        if eni.busy {
            return Err(ApiError::conflict(id));
        }
        if eni.status != EniStatus::Available {
            return Err(ApiError::eni_state("Available", eni.status.as_str()));
        }
        Ok(())
    }

    pub fn begin_delete(&mut self, id: &str) -> Result<u64, ApiError> {
        self.check_delete(id)?;
        let eni = self.eni_mut(id)?;
        eni.status = EniStatus::Deleting;
        eni.epoch += 1;
        Ok(eni.epoch)
    }

    pub fn finish_delete(&mut self, id: &str, epoch: u64) {
        if self.is_current(id, epoch, EniStatus::Deleting) {
            self.forget_eni(id);
        }
    }

    pub(super) fn forget_eni(&mut self, id: &str) {
        let Some(eni) = self.enis.remove(id) else { return };
        if let Some(space) = self.spaces.get_mut(&eni.vswitch) {
            eni.v4.iter().for_each(|ip| space.give4(*ip));
            eni.v6.iter().for_each(|ip| space.give6(*ip));
        }
    }
}
