//! Assigning and unassigning addresses of an ENI.
//!
//! Invariants: all or nothing; the primary address stays; an attached ENI never
//! holds more than its instance's type allows, an Available one no more than 50.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::super::error::ApiError;
use super::eni::{AVAILABLE_MAX_V4, AVAILABLE_MAX_V6};
use super::space::Want;
use super::{Account, Eni, EniStatus};

/// One call on an Available ENI assigns at most this many.
const AVAILABLE_PER_CALL: u32 = 32;

impl Account {
    /// Most IPv4 and IPv6 addresses the ENI may hold as it is now.
    pub fn limits_of(&self, eni: &Eni) -> (u32, u32) {
        let kind = eni.instance.as_deref().and_then(|id| self.type_of(id));
        kind.map_or((AVAILABLE_MAX_V4, AVAILABLE_MAX_V6), |t| {
            (t.eni_private_ip_address_quantity, t.eni_ipv6_address_quantity)
        })
    }

    fn changeable(&self, id: &str) -> Result<&Eni, ApiError> {
        let eni = self.eni(id)?;
        match eni.status {
            EniStatus::InUse | EniStatus::Available => Ok(eni),
            other => Err(ApiError::eni_state("Available or InUse", other.as_str())),
        }
    }

    pub fn check_assign4(&self, id: &str, want: &Want<Ipv4Addr>) -> Result<(), ApiError> {
        let eni = self.changeable(id)?;
        if eni.status == EniStatus::Available && want.count() > AVAILABLE_PER_CALL {
            let why = format!("an Available ENI takes at most {AVAILABLE_PER_CALL} in one call");
            return Err(ApiError::invalid("SecondaryPrivateIpAddressCount", why));
        }
        let (limit, _) = self.limits_of(eni);
        if eni.v4.len() + want.count() as usize > limit as usize {
            return Err(ApiError::count4(limit));
        }
        self.check_groups(&eni.security_groups, want.count())?;
        if self.exhausted.contains(&eni.vswitch) {
            return Err(ApiError::not_enough(&eni.vswitch));
        }
        let space = self.spaces.get(&eni.vswitch).ok_or_else(|| ApiError::vswitch_not_found(&eni.vswitch))?;
        space.check4(want)
    }

    pub fn assign4(&mut self, id: &str, want: &Want<Ipv4Addr>) -> Result<Vec<Ipv4Addr>, ApiError> {
        self.check_assign4(id, want)?;
        let eni = self.enis.get_mut(id).ok_or_else(|| ApiError::eni_not_found(id))?;
        let space = self.spaces.get_mut(&eni.vswitch).ok_or_else(|| ApiError::vswitch_not_found(&eni.vswitch))?;
        let taken = space.take4(id, want, &mut self.rng)?;
        eni.v4.extend(&taken);
        Ok(taken)
    }

    pub fn check_unassign4(&self, id: &str, list: &[Ipv4Addr]) -> Result<(), ApiError> {
        let eni = self.changeable(id)?;
        for (index, ip) in list.iter().enumerate() {
            if list[..index].contains(ip) {
                return Err(ApiError::ip_repeated(ip));
            }
            if *ip == eni.primary4() {
                return Err(ApiError::invalid("PrivateIpAddress", format!("{ip} is the ENI's primary address")));
            }
            if !eni.v4.contains(ip) {
                return Err(ApiError::ip_unassigned(ip));
            }
        }
        Ok(())
    }

    pub fn unassign4(&mut self, id: &str, list: &[Ipv4Addr]) -> Result<(), ApiError> {
        self.check_unassign4(id, list)?;
        let eni = self.enis.get_mut(id).ok_or_else(|| ApiError::eni_not_found(id))?;
        eni.v4.retain(|ip| !list.contains(ip));
        if let Some(space) = self.spaces.get_mut(&eni.vswitch) {
            list.iter().for_each(|ip| space.give4(*ip));
        }
        Ok(())
    }

    pub fn check_assign6(&self, id: &str, want: &Want<Ipv6Addr>) -> Result<(), ApiError> {
        let eni = self.changeable(id)?;
        let (_, limit) = self.limits_of(eni);
        if limit == 0 {
            let message = "The instance type does not support IPv6.";
            return Err(ApiError::new(403, "InvalidOperation.Ipv6NotSupport", message));
        }
        if eni.v6.len() + want.count() as usize > limit as usize {
            return Err(ApiError::count6(limit));
        }
        let space = self.spaces.get(&eni.vswitch).ok_or_else(|| ApiError::vswitch_not_found(&eni.vswitch))?;
        space.check6(want)
    }

    pub fn assign6(&mut self, id: &str, want: &Want<Ipv6Addr>) -> Result<Vec<Ipv6Addr>, ApiError> {
        self.check_assign6(id, want)?;
        let eni = self.enis.get_mut(id).ok_or_else(|| ApiError::eni_not_found(id))?;
        let space = self.spaces.get_mut(&eni.vswitch).ok_or_else(|| ApiError::vswitch_not_found(&eni.vswitch))?;
        let taken = space.take6(id, want, &mut self.rng)?;
        eni.v6.extend(&taken);
        Ok(taken)
    }

    pub fn check_unassign6(&self, id: &str, list: &[Ipv6Addr]) -> Result<(), ApiError> {
        let eni = self.changeable(id)?;
        for (index, ip) in list.iter().enumerate() {
            if list[..index].contains(ip) {
                return Err(ApiError::ip_repeated(ip));
            }
            if !eni.v6.contains(ip) {
                return Err(ApiError::ip_unassigned(ip));
            }
        }
        Ok(())
    }

    pub fn unassign6(&mut self, id: &str, list: &[Ipv6Addr]) -> Result<(), ApiError> {
        self.check_unassign6(id, list)?;
        let eni = self.enis.get_mut(id).ok_or_else(|| ApiError::eni_not_found(id))?;
        eni.v6.retain(|ip| !list.contains(ip));
        if let Some(space) = self.spaces.get_mut(&eni.vswitch) {
            list.iter().for_each(|ip| space.give6(*ip));
        }
        Ok(())
    }
}
